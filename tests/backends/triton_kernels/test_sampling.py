"""Draws, by uniform numbers at equal distances: frequencies without chance. Interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.triton_kernels import sampling


def frequencies(logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, draws: int = 96) -> torch.Tensor:
    uniform = (torch.arange(draws) + 0.5) / draws
    ids = sampling.draw(logits.expand(draws, -1), uniform, temperature, top_p)
    return torch.bincount(ids, minlength=len(logits)) / draws


def likely(logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    p = (logits.double() / temperature).softmax(-1)
    ranked, order = p.sort(descending=True, stable=True)
    ranked[1:][(ranked.cumsum(-1) - ranked)[1:] >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, ranked) / ranked.sum()


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.65), (1.0, 0.31), (1.0, 0.29), (1.0, 1e-6)]
)
def test_draws_follow_the_probabilities(temperature, top_p):
    logits = torch.tensor([0.05, 0.3, 0.1, 0.3, 0.02, 0.1, 0.08, 0.05]).log()
    got, want = frequencies(logits, temperature, top_p), likely(logits, temperature, top_p)
    assert (got - want).abs().max() < 1 / 96
    assert not got[want == 0].any()


def test_of_equals_the_lowest_are_kept_also_beyond_a_tile():
    logits = torch.zeros(sampling.TILE + 100)
    logits[50:] = 1.0
    kept = round(0.999 * float(likely(logits)[50:].sum()) / float(likely(logits)[50])) - 1
    top_p = (kept - 0.5) * float(likely(logits)[50])
    last = torch.tensor([0.0, 1 - 2**-24])
    assert sampling.draw(logits.expand(2, -1), last, 1.0, top_p).tolist() == [50, 50 + kept - 1]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_one_far_above_all_others_and_the_smallest_temperature():
    logits = torch.tensor([0.0, 2e4, 1e4, 2e4])
    for temperature in (1.0, 1e-45):
        assert sampling.draw(logits.expand(2, -1), torch.tensor([0.0, 0.75]), temperature, 1.0).tolist() == [1, 3]
        assert sampling.draw(logits[None], torch.tensor([0.75]), temperature, 0.4).tolist() == [1]


def test_what_cannot_be_is_never_drawn():
    logits = torch.tensor([-float("inf"), 0.0, -200.0, -float("inf")])
    for u in (0.0, 1 - 2**-24):
        assert sampling.draw(logits[None], torch.tensor([u]), 1.0, 1.0).item() == 1


def test_a_row_is_drawn_alike_alone_and_in_a_batch():
    logits, uniform = torch.randn(3, sampling.TILE + 9) * 3, torch.rand(3)
    ids = sampling.draw(logits, uniform, 1.0, 0.9)
    assert torch.equal(sampling.draw(logits[2:], uniform[2:], 1.0, 0.9), ids[2:])


def test_the_largest_is_the_lowest_of_equals():
    logits = torch.zeros(2, sampling.TILE + 9)
    logits[0, [7, 8, sampling.TILE + 3]] = 5.0
    logits[1, [sampling.TILE + 1, sampling.TILE + 3]] = 5.0
    assert sampling.largest(logits).tolist() == [7, sampling.TILE + 1]
    assert sampling.largest(torch.full((1, 9), -float("inf"))).tolist() == [0]
