"""Emulated routing, against float64 and plain loops."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

EXPERTS, TOKENS, WIDTH, K = 6, 7, 16, 3


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def scores(row: list[float], norm_type: int) -> list[float]:
    if norm_type == 0:
        return [math.exp(v) / sum(math.exp(u) for u in row) for v in row]
    return [1 / (1 + math.exp(-v)) if norm_type == 1 else math.sqrt(math.log1p(math.exp(v))) for v in row]


@pytest.mark.parametrize("norm_type", [0, 1, 2])
@pytest.mark.parametrize("renorm", [0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_gating(torch_npu: ModuleType, draw: torch.Generator, norm_type: int, renorm: int, biased: bool) -> None:
    """The bias moves the choice, never the weights."""
    x = 2 * torch.randn(TOKENS, EXPERTS, generator=draw)
    bias = torch.randn(EXPERTS, generator=draw) if biased else None
    weights, experts, out = torch_npu.npu_moe_gating_top_k(
        x, K, bias=bias, norm_type=norm_type, renorm=renorm, routed_scaling_factor=1.5, out_flag=True
    )
    for token, row in enumerate(x.double().tolist()):
        score = scores(row, norm_type)
        moved = [s + (float(bias[i]) if bias is not None else 0) for i, s in enumerate(score)]
        chosen = sorted(range(EXPERTS), key=lambda i: -moved[i])[:K]
        total = sum(score[i] for i in chosen) if norm_type or renorm else 1
        assert experts[token].tolist() == chosen
        torch.testing.assert_close(weights[token].tolist(), [1.5 * score[i] / total for i in chosen], rtol=1e-5, atol=0)
        torch.testing.assert_close(out[token].tolist(), score, rtol=1e-5, atol=1e-7)


def test_gating_of_equal_scores_takes_the_first(torch_npu: ModuleType) -> None:
    _, experts, out = torch_npu.npu_moe_gating_top_k(torch.zeros(1, EXPERTS), K, norm_type=1)
    assert experts.tolist() == [[0, 1, 2]] and out.isnan().all()  # not asked for


def test_gating_by_hash(torch_npu: ModuleType, draw: torch.Generator) -> None:
    x = torch.randn(TOKENS, EXPERTS, generator=draw)
    table = torch.stack([torch.randperm(EXPERTS, generator=draw)[:K] for _ in range(20)]).int()
    ids = torch.randint(0, 20, (TOKENS,), generator=draw)
    weights, experts, _ = torch_npu.npu_moe_gating_top_k(x, K, input_ids=ids, tid2eid=table, norm_type=2)
    assert torch.equal(experts, table[ids])
    for token, row in enumerate(x.double().tolist()):
        chosen = [scores(row, 2)[i] for i in experts[token].tolist()]
        torch.testing.assert_close(weights[token].tolist(), [c / sum(chosen) for c in chosen], rtol=1e-5, atol=0)


def choices(draw: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(EXPERTS, generator=draw)[:K] for _ in range(TOKENS)]).int()


def init(torch_npu: ModuleType, x: Tensor, experts: Tensor, **more: object) -> tuple[Tensor, ...]:
    settings = {"expert_num": EXPERTS, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    made: tuple[Tensor, ...] = torch_npu.npu_moe_init_routing_v2(x, experts, **settings, **more)
    return made


@pytest.mark.parametrize("row_idx_type", [0, 1])
@pytest.mark.parametrize("active", [[], [0, EXPERTS], [2, 4]])
def test_init_routing(torch_npu: ModuleType, draw: torch.Generator, row_idx_type: int, active: list[int]) -> None:
    x, experts = torch.randn(TOKENS, WIDTH, generator=draw).bfloat16(), choices(draw)
    first, last = active or (0, EXPERTS)
    rows, index, counts, scale = init(
        torch_npu, x, experts, active_expert_range=active, row_idx_type=row_idx_type, scale=torch.arange(TOKENS) + 1.0
    )
    order = [(t, j) for e in range(first, last) for t in range(TOKENS) for j in range(K) if experts[t, j] == e]
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int((experts == e).sum()) for e in range(first, last)]
    for place, (token, _) in enumerate(order):
        assert torch.equal(rows[place], x[token]) and scale[place] == token + 1
    assert rows[len(order) :].isnan().all() and scale[len(order) :].isnan().all()
    if row_idx_type == 1:
        assert index[: len(order)].tolist() == [token * K + choice for token, choice in order]
    else:
        wanted = {token * K + choice: place for place, (token, choice) in enumerate(order)}
        assert index.tolist() == [wanted.get(i, -1) for i in range(TOKENS * K)]


def test_init_routing_to_int8(torch_npu: ModuleType, draw: torch.Generator) -> None:
    x, experts = torch.randn(TOKENS, WIDTH, generator=draw).bfloat16(), choices(draw)
    plain, _, _, _ = init(torch_npu, x, experts)
    rows, _, _, scale = init(torch_npu, x, experts, quant_mode=1)
    torch.testing.assert_close(scale.double(), plain.double().abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert rows.dtype == torch.int8
    assert (rows.double() - plain.double() / scale.double()[:, None]).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finalize_routing(torch_npu: ModuleType, draw: torch.Generator, mode: int, dtype: torch.dtype) -> None:
    """Mode 0 names the rows of all first choices, then of all second ones; mode 2 token by token."""
    rows = torch.randn(TOKENS * K, WIDTH, generator=draw).to(dtype)
    where = torch.randperm(TOKENS * K, generator=draw).int()
    scale, bias = torch.rand(TOKENS, K, generator=draw).to(dtype), torch.randn(EXPERTS, WIDTH, generator=draw).to(dtype)
    skips, experts = torch.randn(2, TOKENS, WIDTH, generator=draw).to(dtype), choices(draw)
    got = torch_npu.npu_moe_finalize_routing(rows, *skips, bias, scale, where, experts, mode, K)
    for token in range(TOKENS):
        wanted = skips[0, token].double() + skips[1, token].double()
        for j in range(K):
            row = rows[int(where[j * TOKENS + token] if mode == 0 else where[token * K + j])]
            wanted = wanted + scale[token, j].double() * (row.double() + bias[int(experts[token, j])].double())
        torch.testing.assert_close(got[token].double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_finalize_undoes_init_only_in_mode_2(torch_npu: ModuleType, draw: torch.Generator) -> None:
    x, experts = torch.randn(TOKENS, WIDTH, generator=draw), choices(draw)
    rows, index, _, _ = init(torch_npu, x, experts)
    mean = torch.full((TOKENS, K), 1 / K)
    back = {
        mode: torch_npu.npu_moe_finalize_routing(rows, None, None, None, mean, index, None, mode, K) for mode in (0, 2)
    }
    torch.testing.assert_close(back[2], x)
    assert not torch.allclose(back[0], x)
