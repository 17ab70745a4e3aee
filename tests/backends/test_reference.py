"""The reference against a second, naive reading of the contract, on every case and in both modes; its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backends.reference import Reference
from dsv4_hal.batch import Batch, cos_sin
from dsv4_hal.conformance import Expected, bitwise, compare, expect, run_case, widen
from dsv4_hal.conformance.judging.expected import largest, rows
from dsv4_hal.conformance.oracles.naive import F64, Naive
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.formats import FORMATS, Weight, plain_format
from dsv4_hal.numerics import Numerics, deployed, exact
from dsv4_hal.ops import KV, OPS, SIZES, Case, ContractError, OpSpec

# Every case, in both modes.

MODES: dict[str, Callable[[], Numerics]] = {"exact": exact, "deployed": deployed}
CASES = [
    pytest.param(spec, case, id=case.id, marks=() if case.size in SIZES[:1] else pytest.mark.full)
    for spec in OPS.values()
    for case in spec.cases()
]
TIGHT = 1e-9


@cache
def backends(mode: str) -> tuple[Resolved, Resolved, Resolved]:
    """The reference, the reference widened to float64, and the naive backend likewise."""
    numerics = MODES[mode]()
    wide = widen(numerics)
    return resolve([Reference(numerics)]), resolve([Reference(wide)]), resolve([Naive(wide)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_reference_is_what_the_contract_says(spec: OpSpec, case: Case, mode: str) -> None:
    narrow, wide, naive = backends(mode)
    got, again, exactly, want = (run_case(case, ops) for ops in (narrow, narrow, wide, naive))
    for name in got:  # two runs are equal to the bit
        assert bitwise(again[name], got[name]).ok, name
        assert not got[name].double().isnan().any(), f"{name}: poison leaked"
    floating = {name: value.double() for name, value in want.items() if value.is_floating_point()}
    tight = Expected(want, floating, {name: TIGHT * largest(rows(value)) for name, value in floating.items()})
    failed = {name: c.message for name, c in compare(exactly, tight, spec.tolerance).items() if not c.ok}
    assert not failed, "in float64"
    expected = expect(partial(run_case, case), wide, narrow.numerics.accumulate, spec.tolerance)
    failed = {name: c.message for name, c in compare(got, expected, spec.tolerance).items() if not c.ok}
    assert not failed, "in float32"
    if "same" in got and "written" in got:  # out= is what is returned, and all of it is written
        assert bool(got["same"]) and torch.equal(got["y"], got["written"])


# Batches: how a step is cut must not matter.


def one_sequence(mode: str, cuts: tuple[int, ...], company: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, picks and entries of one sequence, its tokens cut into steps, `company` other sequences beside it."""
    ops, generator = backends(mode)[0], torch.Generator().manual_seed(5)
    length, dim, heads, window = sum(cuts), 96, 3, 8
    width, storage = 2 * dim, ops.numerics.storage
    draw = {
        name: torch.randn(length, *shape, generator=generator)
        for name, shape in (("q", (heads, dim)), ("kv", (dim,)), ("c", (width,)), ("g", (width,)), ("w", (heads,)))
    }
    noise = torch.Generator().manual_seed(6)
    ape, sink = torch.randn(4, width, generator=generator), torch.randn(heads, generator=generator)
    window_layout = ops.row_layout("window", dim, 32, 1, window)
    entry_layout = ops.row_layout("entries", dim, 32, 4)
    count = company + 1
    tables = np.arange(count * 12)[::-1].reshape(count, 12)
    pools = [
        KV(formats.new_pool(layout, count * 12, rows, torch.device("cpu")).fill_(255), layout, rows)
        for layout, rows in ((window_layout, 16), (entry_layout, 64))
    ]
    state = ops.state_new(count, 4, True, width)
    out: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    for n in cuts:
        others = np.full(company, 2)
        batch = Batch(
            np.array([*others, n]),
            np.array([*(others * len(out)), done]),
            torch.device("cpu"),
            slots=np.arange(count),
            token_table=tables,
            window_table=tables,
        )
        ops.plan(batch, {4: True}, {})

        def tokens(name: str, extra: int = company * 2, done: int = done, n: int = n) -> Tensor:
            mine = draw[name][done : done + n]
            return torch.cat([torch.randn(extra, *mine.shape[1:], generator=noise), mine]).to(storage)

        ops.kv_store(tokens("kv"), window_layout, batch, pools[0])
        wide = ops.numerics.accumulate
        entries = ops.compress(tokens("c").to(wide), tokens("g").to(wide), ape, batch, 4, True, state)
        ops.kv_store(entries.to(storage), entry_layout, batch, pools[1])
        picks, scores = ops.index_topk(tokens("q"), tokens("w"), pools[1], batch, 3, with_scores=True)
        y, _ = ops.sparse_attention(tokens("q"), pools[0], sink, dim**-0.5, batch, pools[1], picks)
        assert scores is not None
        out.append((y[-n:], scores[-n:], entries[entries.shape[0] - (done + n) // 4 + done // 4 :]))
        done += n
    y, scores, entries = (torch.cat(parts) for parts in zip(*out, strict=True))
    return y, scores, entries


@pytest.mark.parametrize(("cuts", "company"), [((37,), 2), ((1,) * 37, 0), ((5, 20, 1, 11), 1), ((30, 7), 3)])
@pytest.mark.parametrize("mode", MODES)
def test_cuts_and_company_do_not_matter(mode: str, cuts: tuple[int, ...], company: int) -> None:
    unit = torch.finfo(backends(mode)[0].numerics.storage).eps
    for got, want in zip(one_sequence(mode, cuts, company), one_sequence(mode, (37,), 0), strict=True):
        assert got.shape == want.shape
        seen = want.isfinite()
        assert torch.equal(got.isfinite(), seen)
        assert ((got - want)[seen].norm() / want[seen].norm()).item() <= 4 * unit


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_depend_on_their_neighbours(mode: str) -> None:
    ops, generator = backends(mode)[0], torch.Generator().manual_seed(1)
    x = torch.randn(40, 256, generator=generator).to(ops.numerics.storage)
    q = formats.quantize(torch.randn(128, 256, generator=generator), FORMATS["e4m3_128x128"])
    w, unit = Weight(q.data, q.scale, q.format), torch.finfo(ops.numerics.storage).eps
    for run in (lambda v: ops.linear(v, w), lambda v: ops.rms_norm(v, None, 1e-6), ops.hadamard):
        alone = torch.cat([run(row[None]) for row in x])
        assert (alone - run(x)).abs().max() <= 4 * unit * alone.abs().max()


# Gradients, in float64.

EXACT64 = resolve([Reference(exact(F64))])
PACKED = EXACT64.plan(Batch.packed([7, 0, 5], padding=1), {4: True}, {})


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=F64, generator=generator).requires_grad_()


def tables(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    return cos_sin(torch.arange(tokens), torch.rand(channels // 2, generator=torch.Generator().manual_seed(0)), F64)


def plain(data: Tensor) -> Weight:
    return Weight(data, None, plain_format(data.dtype))


def packed_attention(q: Tensor, kv: Tensor, entries: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    window, compressed = EXACT64.row_layout("window", 8, 4, 1, 3), EXACT64.row_layout("entries", 8, 4, 4)
    picks = torch.tensor([[-1, -1]] * 3 + [[0, -1]] * 4 + [[-1, -1]] * 3 + [[-1, 0]] * 2 + [[-1, -1]])
    window_kv = EXACT64.kv_store(kv, window, PACKED)
    stored = EXACT64.kv_store(entries, compressed, PACKED)
    y, lse = EXACT64.sparse_attention(q, window_kv, sink, 0.5, PACKED, stored, picks, return_lse=True)
    assert lse is not None
    return y, lse[:-1]  # the padding token has none


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    stored = EXACT64.kv_store(keys, EXACT64.row_layout("index", 8, 0, 4), PACKED)
    _, scores = EXACT64.index_topk(q, weights, stored, PACKED, 1, with_scores=True)
    assert scores is not None
    return scores[scores.isfinite()]


MIXING = (leaf(8, 12), leaf(8), leaf(3))
GRADIENTS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (lambda x, w: EXACT64.linear(x, plain(w)), (leaf(3, 4), leaf(5, 4))),
    "grouped_linear": (
        lambda x, w: EXACT64.grouped_linear(x, plain(w), torch.tensor([0, 2, 2, 3])),
        (leaf(3, 4), leaf(3, 5, 4)),
    ),
    "block_diagonal_linear": (lambda x, w: EXACT64.block_diagonal_linear(x, plain(w)), (leaf(3, 2, 4), leaf(2, 5, 4))),
    "embedding": (lambda w: EXACT64.embedding(torch.tensor([1, 0, 1]), plain(w)), (leaf(3, 4),)),
    "rms_norm": (lambda x, w: EXACT64.rms_norm(x, w, 1e-6), (leaf(3, 6), leaf(6))),
    "rms_norm without weight": (lambda x: EXACT64.rms_norm(x, None, 1e-6), (leaf(3, 2, 6),)),
    "rope": (lambda x: EXACT64.rope(x, tables(3, 4)), (leaf(3, 2, 6),)),
    "rope inverse": (lambda x: EXACT64.rope(x, tables(3, 4), True), (leaf(3, 6),)),
    "hadamard": (EXACT64.hadamard, (leaf(3, 8),)),
    "swiglu": (lambda x, w: EXACT64.swiglu(x, 1.0, w), (leaf(3, 8), leaf(3))),
    "route": (lambda x: EXACT64.route(x, 2, 1.5)[1], (leaf(3, 6),)),
    "unpermute": (lambda x: EXACT64.unpermute(x, torch.tensor([3, 0, 2, 1]), (2, 2)), (leaf(4, 3),)),
    "permute": (lambda x: EXACT64.permute(x, torch.tensor([[1, 0], [2, 1]]), 3)[0], (leaf(2, 3),)),
    "hc_pre": (lambda x, *mixing: EXACT64.hc_pre(x, *mixing, 3, 1e-6, 1e-6), (leaf(2, 2, 6), *MIXING)),
    "hc_post": (EXACT64.hc_post, (leaf(2, 5), leaf(2, 3, 5), leaf(2, 3), leaf(2, 3, 3))),
    "hc_head": (
        lambda x, *mixing: EXACT64.hc_head(x, *mixing, 1e-6, 1e-6),
        (leaf(2, 2, 6), leaf(2, 12), leaf(2), leaf(1)),
    ),
    "compress": (
        lambda kv, gate, ape: EXACT64.compress(kv, gate, ape, PACKED, 4, True),
        (leaf(13, 6), leaf(13, 6, seed=1), leaf(4, 6)),
    ),
    "sparse_attention": (packed_attention, (leaf(13, 2, 8), leaf(13, 8), leaf(2, 8), leaf(2))),
    "index_topk": (index_scores, (leaf(13, 2, 8), leaf(13, 2), leaf(2, 8))),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    run, inputs = GRADIENTS[name]
    assert torch.autograd.gradcheck(run, inputs)


def test_caches_hold_no_graph() -> None:
    """A state or a pool that kept its graph would keep every step alive."""
    batch = Batch(np.array([5]), np.array([0]), torch.device("cpu"), slots=np.array([0]), token_table=np.array([[0]]))
    EXACT64.plan(batch, {4: True}, {})
    state = EXACT64.state_new(1, 4, True, 16)
    entries = EXACT64.compress(leaf(5, 16), leaf(5, 16), leaf(4, 16), batch, 4, True, state)
    layout = EXACT64.row_layout("entries", 8, 4, 4)
    pool = EXACT64.kv_store(
        entries, layout, batch, KV(formats.new_pool(layout, 1, 64, torch.device("cpu")), layout, 64)
    )
    assert entries.requires_grad and not state.requires_grad and not pool.data.requires_grad
    assert not EXACT64.kv_load(pool, batch, 0, 0, 1).requires_grad


@pytest.mark.parametrize("op", ["linear", "grouped_linear", "block_diagonal_linear", "embedding"])
def test_a_weight_that_another_backend_rearranged_is_refused(op: str) -> None:
    shape = (5, 4) if op in ("linear", "embedding") else (2, 5, 4)
    moved = replace(plain(torch.zeros(shape, dtype=F64)), layout="tiled", name="w")
    given = {
        "linear": (torch.zeros(3, 4, dtype=F64), moved),
        "grouped_linear": (torch.zeros(3, 4, dtype=F64), moved, torch.tensor([0, 1, 3])),
        "block_diagonal_linear": (torch.zeros(3, 2, 4, dtype=F64), moved),
        "embedding": (torch.zeros(3, dtype=torch.int64), moved),
    }
    with pytest.raises(ContractError, match="w is arranged as tiled"):
        getattr(EXACT64, op)(*given[op])


@pytest.mark.parametrize("op", ["sparse_attention", "index_topk"])
@pytest.mark.parametrize("numerics", [exact(), deployed()], ids=["exact", "deployed"])
def test_queries_may_lie_in_any_order(op: str, numerics: Numerics) -> None:
    """Results are the same, and contiguous. In float64: products of other strides are added in another order."""
    ops = resolve([Reference(widen(numerics))])
    run = getattr(ops, op)

    def permuted(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(q.permute(2, 1, 0).contiguous().permute(2, 1, 0), *args, **kwargs)

    for case in [case for case in OPS[op].cases() if case.size == "tiny"][:6]:
        setattr(ops, op, run)
        want = run_case(case, ops)
        setattr(ops, op, permuted)
        got = run_case(case, ops)
        assert got.keys() == want.keys()
        for name, t in got.items():
            assert t.is_contiguous(), (case.id, name)
            torch.testing.assert_close(t, want[name], equal_nan=True, msg=f"{case.id}: {name}")
