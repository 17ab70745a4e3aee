"""Routing, expert order and sums over experts: what the contract's cases do not ask of kernels. Interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

import triton
import triton.language as tl

from dsv4_hal.backends.triton_kernels import moe
from dsv4_hal.backends.triton_kernels.runtime import launch


@triton.jit
def scores(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, moe.softplus_root(tl.load(source + at)))


def test_scores_are_right_to_the_last_bits_at_both_ends():
    x = torch.cat([torch.linspace(-87, 40, 3072), torch.linspace(-2, 2, 1023), torch.tensor([0.0])])
    got = torch.empty_like(x)
    launch(scores, (1,), x, got, COUNT=len(x))
    want = torch.logaddexp(x.double(), torch.zeros(())).sqrt()
    assert ((got - want) / want).abs().max() < 3e-7


def test_a_token_is_routed_alike_alone_and_in_a_batch():
    logits, bias = torch.randn(5, 37), torch.randn(37)
    ids, weights = moe.route(logits, 6, 1.5, bias)
    for t in range(5):
        alone = moe.route(logits[t : t + 1], 6, 1.5, bias)
        assert torch.equal(alone[0][0], ids[t])
        assert torch.equal(alone[1][0], weights[t])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_picks_are_experts_whatever_the_logits_of_a_padding_token(value):
    bias = torch.full((20,), -float("inf"))
    for given in (None, bias):
        ids, _ = moe.route(torch.full((1, 20), value), 6, 1.0, given)
        assert ids.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 1), (43, 3), (700, 6)])
@pytest.mark.parametrize("experts", [1, 7])
def test_expert_order_is_a_stable_sort(shape, experts):
    ids = torch.randint(experts, shape)
    offsets, order = moe.expert_order(ids, experts)
    want = ids.flatten().sort(stable=True)
    assert torch.equal(order, want.indices)
    assert torch.equal(offsets, torch.searchsorted(want.values, torch.arange(experts + 1)))
    assert torch.equal(moe.inverse(order)[order], torch.arange(len(order)))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
def test_rows_are_copied_as_they_are(dtype):
    x = torch.randint(256, (3, 1100 * dtype.itemsize), dtype=torch.uint8).view(dtype)[:, 3:]
    order = torch.tensor([5, 0, 3])
    assert torch.equal(moe.take_rows(x, order, 2).view(torch.uint8), x[order // 2].contiguous().view(torch.uint8))


def test_a_token_without_experts_is_zero():
    assert torch.equal(moe.sum_rows(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), (3, 0)), torch.zeros(3, 8))


def test_nan_survives_the_clamp():
    gate_up = torch.full((1, 4), float("nan"))
    assert moe.swiglu(gate_up, torch.empty(1, 2), 1.0).isnan().all()
