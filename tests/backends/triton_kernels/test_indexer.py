"""Which entries the indexer's kernels pick, and how a step is cut into chunks. Interpreted."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.triton_kernels import indexer
from dsv4_hal.backends.triton_kernels.rows import rows_of
from dsv4_hal.formats import plain_rows

TILE = {"entries": 64, "num_warps": 4, "num_stages": 1}


def picked(scores: Tensor, k: int, narrow: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """The k best of scores [N], by one token that sees them all: the channels of a key are its score and minus that,
    each for one head, since a score is a weighted sum of what is positive."""
    count = len(scores)
    keys = torch.stack([scores, -scores], 1)
    q = torch.eye(2)[None].repeat(2 * count, 1, 1)
    weights = torch.tensor([[1.0, -1.0]]).repeat(2 * count, 1)
    rows = rows_of(keys, plain_rows(2, 0, 2, 0, torch.float32), 0, torch.tensor([0]), False)
    blocks = np.array([[0, 2 * count - 1, 1]])
    part = indexer.Chunk(2 * count - 1, 2 * count, count, blocks), torch.from_numpy(blocks)
    picks, best = indexer.index_topk(
        q,
        weights,
        rows,
        [part],
        torch.arange(2 * count),
        k,
        ratio=2,
        narrow=narrow,
        with_scores=True,
        tile=TILE,
    )
    assert best is not None and (picks[:-1] == -1).all() and (best[:-1] == float("-inf")).all()
    return picks[-1], best[-1]


def sorted_picks(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, picks = scores.sort(descending=True, stable=True)
    missing = max(0, k - len(scores))
    return (
        torch.cat([picks, picks.new_full((missing,), -1)])[:k],
        torch.cat([best, best.new_full((missing,), float("-inf"))])[:k],
    )


def many(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "ties":
        return torch.randint(-2, 3, (count,), generator=generator).float()
    if kind == "equal":
        return torch.full((count,), -1.5)
    if kind == "near":  # alike but for their last bits
        return (torch.randint(0, 200, (count,), generator=generator) - 0x40000000).to(torch.int32).view(torch.float32)
    spread = torch.exp2(torch.randint(-20, 20, (count,), generator=generator).float())
    return torch.randn(count, generator=generator) * spread


@pytest.mark.parametrize("k", [1, 70, 150, 160])
@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "near"])
def test_picks_are_those_of_a_stable_sort(kind, k, monkeypatch):
    monkeypatch.setattr(indexer, "SCAN", 64)  # several blocks
    scores = many(kind, 150)
    picks, best = picked(scores, k)
    want, known = sorted_picks(scores, k)
    assert torch.equal(picks, want) and torch.equal(best, known)


def test_zeros_of_both_signs_are_equal():
    scores = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0, -2.0])
    picks, _ = picked(scores, 3)
    assert picks.tolist() == [1, 2, 3]


def test_narrow_scores_need_fewer_digits():
    scores = many("spread", 150).bfloat16().float()
    picks, best = picked(scores, 40, torch.bfloat16)
    want, known = sorted_picks(scores, 40)
    assert torch.equal(picks, want) and torch.equal(best, known)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [200, 0, 3, 64, 65, 1, 1]])
def test_chunks_hold_every_token_once_and_fit_the_scratch(lengths, monkeypatch):
    monkeypatch.setattr(indexer, "SCRATCH", 12000)
    q, context = np.array(lengths, np.int64), np.arange(len(lengths)) * 100
    sequence = np.repeat(np.arange(len(q)), q)
    position = np.concatenate([np.arange(c, c + n) for c, n in zip(context, q, strict=True)] or [np.zeros(0)])
    found = list(indexer.chunks(q, context, 4, 8))
    assert [t for c in found for t in range(c.first, c.stop)] == list(range(int(q.sum())))
    for chunk in found:
        tokens = [t for _, first, count in chunk.blocks for t in range(first, first + count)]
        assert tokens == list(range(chunk.first, chunk.stop))
        assert chunk.longest == max((position[t] + 1) // 4 for t in tokens)
        assert (chunk.stop - chunk.first) * max(8, chunk.longest) <= 12000
        for owner, first, count in chunk.blocks:
            assert 0 < count <= indexer.BLOCK and (sequence[first : first + count] == owner).all()
