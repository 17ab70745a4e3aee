"""The comparers catch what they are for, and let pass what is legitimate."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance import (
    Budget,
    bitwise,
    budget,
    compare,
    nmse,
    run_case,
    selection,
    statistical,
    widen,
)
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.numerics import Numerics, deployed, exact
from dsv4_hal.ops import OPS, Case, Compare, Tolerance

INF, NAN = math.inf, math.nan
X = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
LOOSE = Budget(1e-2, 1e-2)


def turned(x: Tensor) -> Tensor:
    """The same values in other strides."""
    return x.T.contiguous().T


# Structure: every comparer looks at it first.

WRONG = {
    "dtype": lambda x: x.to(torch.float64 if x.is_floating_point() else torch.int32),
    "shape": lambda x: x[:-1],
    "strides": turned,
    "transposed": lambda x: x.T,
}
PICKS = torch.tensor([[0, 1], [2, 0]])
COUNTS = torch.tensor([[40, 60], [70, 30]])
SCORES = torch.tensor([[3.0, 2.0, 1.0], [2.0, 1.0, 3.0]])


@pytest.mark.parametrize("what", WRONG)
def test_structure_comes_first(what: str) -> None:
    spoil = WRONG[what]
    results = [
        bitwise(spoil(X), X),
        nmse(spoil(X), X, Budget(INF, INF)),
        selection(spoil(PICKS), PICKS, SCORES, INF),
        statistical(spoil(COUNTS), COUNTS, INF),
    ]
    assert [r.ok for r in results] == [False] * 4
    assert all(r.message for r in results)


def test_strides_of_what_is_expected_do_not_matter() -> None:
    assert bitwise(X, turned(X)).ok and nmse(X, turned(X), Budget(0, 0)).ok


def test_device() -> None:
    assert bitwise(X, X, "cpu").ok
    for result in (bitwise(X, X, "cuda"), nmse(X, X, LOOSE, "cuda"), selection(PICKS, PICKS, SCORES, 0, "cuda")):
        assert not result.ok and "expected cuda" in result.message


# Bitwise.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_bitwise_sees_one_flipped_bit(dtype: torch.dtype) -> None:
    x = (X * 50).abs().to(dtype)
    assert bitwise(x, x.clone()).ok
    flipped = x.clone().reshape(-1).view(torch.uint8)
    flipped[5 * x.itemsize] ^= 1
    result = bitwise(flipped.view(dtype).view(x.shape), x)
    assert not result.ok and "1 of 36 elements" in result.message and "at 5" in result.message


def test_bitwise_on_special_values() -> None:
    special = torch.tensor([NAN, INF, -0.0])
    assert bitwise(special, special.clone()).ok
    assert not bitwise(torch.tensor([0.0]), torch.tensor([-0.0])).ok
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert not bitwise(other_nan, torch.tensor([NAN])).ok
    yes, no = torch.tensor(True), torch.tensor(False)
    assert bitwise(yes, yes).ok and not bitwise(yes, no).ok
    assert bitwise(X[:0], X[:0]).ok


# NMSE.


def test_nmse_metrics() -> None:
    want = torch.tensor([3.0, -4.0, 0.0])
    metrics = nmse(want + torch.tensor([0.0, 0.004, 0.0]), want, LOOSE).metrics
    assert metrics["nmse"] == pytest.approx(0.004**2 / 25, rel=1e-3)
    assert metrics["max_abs"] == pytest.approx(0.004, rel=1e-3) and metrics["max_rel"] == pytest.approx(0.001, rel=1e-3)
    assert metrics["5e-3"] == 1 and metrics["cosine"] == pytest.approx(1)
    assert nmse(want * 1.003, want, LOOSE).metrics["1e-3"] == pytest.approx(1 / 3)
    assert nmse(-want, want, LOOSE).metrics["cosine"] == pytest.approx(-1)


def test_nmse_needs_both_errors_within_budget() -> None:
    many = X * (1 + 0.02)
    one = X.clone()
    one[0, 0] += 0.5 * X.abs().max()
    assert not nmse(many, X, Budget(0.01, 1)).ok and nmse(many, X, Budget(0.03, 1)).ok
    assert not nmse(one, X, Budget(1, 0.1)).ok and nmse(one, X, Budget(1, 0.6)).ok


GARBAGE = {
    "noise": torch.randn(6, 6, generator=torch.Generator().manual_seed(1)),
    "zeros": torch.zeros(6, 6),
    "transposed": X.T.contiguous(),
    "negated": -X,
    "doubled": 2 * X,
    "rolled": X.roll(1, 0),
    "NaN": torch.full((6, 6), NAN),
    "one NaN": X.clone().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(NAN)),
    "one infinity": X.clone().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(INF)),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_nmse_passes_no_garbage(name: str) -> None:
    assert not nmse(GARBAGE[name], X, LOOSE).ok
    assert not nmse(X, GARBAGE[name], LOOSE).ok


def test_nmse_on_special_values() -> None:
    masked = X.masked_fill(X > 0, -INF)
    assert nmse(masked, masked.clone(), Budget(0, 0)).ok
    assert not nmse(masked, X.masked_fill(X > 0, INF), LOOSE).ok
    assert not nmse(torch.tensor([7.0]), torch.tensor([NAN]), LOOSE).ok
    assert nmse(X[:0], X[:0], Budget(0, 0)).ok
    zeros = torch.zeros(3)
    assert nmse(zeros, zeros, Budget(0, 0)).ok and not nmse(zeros + 1e-30, zeros, LOOSE).ok


# Selection: five entries; the second row sees three of them, the third none.

CANDIDATES = torch.tensor(
    [[5.0, 4.0, 3.0, 2.999, 1.0], [1.0, 9.0, 2.0, -INF, -INF], [-INF] * 5],
)
BEST = torch.tensor([[0, 1, 2, 3], [1, 2, 0, -1], [-1] * 4])


def changed(row: int, *picks: int) -> Tensor:
    out = BEST.clone()
    out[row] = torch.tensor(picks)
    return out


def test_selection_passes_what_is_right() -> None:
    assert selection(BEST, BEST, CANDIDATES, 0).ok
    near = changed(0, 0, 1, 3, 2)
    assert selection(near, BEST, CANDIDATES, 0.01).ok
    assert not selection(near, BEST, CANDIDATES, 1e-4).ok


def test_selection_at_the_edge() -> None:
    want, other = BEST[:, :3].contiguous(), BEST[:, :3].clone()
    other[0, 2] = 3  # 2.999 for 3.0
    assert selection(other, want, CANDIDATES, 0.01).ok and not selection(other, want, CANDIDATES, 0).ok


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (changed(0, 1, 2, 3, 4), "a better one is missing"),  # off by one
        (changed(0, 0, 1, 2, 4), "worse than the last pick"),
        (changed(0, 0, 1, 2, 2), "picked twice"),
        (changed(0, 0, 0, 0, 0), "picked twice"),
        (changed(0, 1, 0, 2, 3), "not best first"),
        (changed(0, 0, 1, 2, 5), "out of range"),
        (changed(0, 0, 1, 2, -2), "out of range"),
        (changed(0, 0, 1, 2, -1), "not filled"),
        (changed(0, 0, -1, 1, 2), "not filled"),
        (changed(1, 1, 2, 0, 3), "not filled"),  # one that is not visible
        (changed(1, 1, 2, 3, -1), "not visible"),
        (changed(2, 0, -1, -1, -1), "not filled"),
        (BEST.flip(1), "not filled"),
        (BEST.roll(1, 0), "not filled"),
    ],
)
def test_selection_catches(got: Tensor, message: str) -> None:
    result = selection(got, BEST, CANDIDATES, 0.01)
    assert not result.ok and message in result.message


def test_selection_of_nothing() -> None:
    assert selection(BEST[:0], BEST[:0], CANDIDATES[:0], 0).ok


# Statistical.


def test_statistical() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])

    def draw(share: Tensor) -> Tensor:
        return torch.multinomial(share, 20_000, True, generator=generator).bincount(minlength=5)

    want = draw(p)
    for _ in range(20):
        assert statistical(draw(p), want, 5).ok
    assert not statistical(draw(torch.tensor([0.47, 0.33, 0.15, 0.05, 0.0])), want, 5).ok
    assert not statistical(draw(torch.tensor([0.5, 0.3, 0.15, 0.03, 0.02])), want, 5).ok
    assert not statistical(want.roll(1), want, 5).ok
    assert not statistical(want // 2, want, 5).ok and "draws" in statistical(want // 2, want, 5).message
    assert not statistical(want * 0, want * 0, 5).ok
    assert statistical(want, want, 0).ok


# Budgets and whole cases.


def references(numerics: Numerics) -> tuple[Resolved, Resolved]:
    return resolve([Reference(numerics)]), resolve([Reference(widen(numerics))])


def find(id: str) -> tuple[Case, Tolerance]:
    op = OPS[id.split("[")[0]]
    return next(c for c in op.cases() if c.id == id), op.tolerance


LINEAR = "linear[format=bf16,tokens=5,inputs=256,outputs=384]"


def test_widened_profiles() -> None:
    assert widen(deployed()) == deployed(torch.float64)
    wide = widen(exact())
    assert wide.storage == torch.float32
    assert {wide.accumulate, wide.q_norm, wide.score, wide.probs} == {torch.float64}


def test_a_case_is_the_same_every_time() -> None:
    case, _ = find(LINEAR)
    ops = references(exact())[0]
    assert torch.equal(run_case(case, ops)["y"], run_case(case, ops)["y"])
    other, _ = find(LINEAR.replace("bf16", "fp32"))
    assert not torch.allclose(run_case(case, ops)["y"], run_case(other, ops)["y"], atol=0.1)


def test_budget_is_derived_from_the_reference() -> None:
    case, tolerance = find(LINEAR)
    one, four = (
        budget(case, replace(tolerance, factor=factor), *references(exact()))["y"] for factor in (100.0, 400.0)
    )
    assert four.rms == pytest.approx(4 * one.rms) and four.largest == pytest.approx(4 * one.largest)
    assert 1e-8 < four.rms / 400 < 1e-6


def test_budget_has_a_floor() -> None:
    case, tolerance = find(LINEAR)
    free = replace(tolerance, factor=0.0)
    eps = torch.finfo(torch.bfloat16).eps
    floor = budget(case, free, *references(deployed()))["y"]
    assert floor.largest == eps and eps / 8 <= floor.rms < eps
    rows, tolerance = find("compress_store[kind=csa,ragged=chunked]")
    assert budget(rows, replace(tolerance, factor=0.0), *references(deployed()))["kv_1"].largest == 1 / 8
    assert budget(rows, replace(tolerance, factor=0.0), *references(exact()))["kv_1"].largest < 1e-6


def test_budget_knows_a_rounding_in_front_of_a_finer_result() -> None:
    """moe_experts sums rows in storage and returns the accumulator's dtype: a rounding of a row that fell to the other
    side is no fault."""
    case, tolerance = find("moe_experts[format=bf16,tokens=1,experts=8,k=3]")
    free = replace(tolerance, factor=0.0)
    assert budget(case, free, *references(deployed()))["y"].largest == torch.finfo(torch.bfloat16).eps
    assert budget(case, free, *references(exact()))["y"].largest == torch.finfo(torch.float32).eps


def test_bitwise_ops_have_no_budget() -> None:
    case, tolerance = find("permute[tokens=5,experts=16,k=6]")
    assert budget(case, tolerance, *references(exact())) == {}


@pytest.mark.parametrize("numerics", [exact(), deployed()], ids=["exact", "deployed"])
@pytest.mark.parametrize("op", [name for name, spec in OPS.items()])
def test_no_case_passes_garbage(op: str, numerics: Numerics) -> None:
    """Whatever a result is, another one like it does not pass."""
    narrow, wide = references(numerics)
    spec = OPS[op]
    for case in [case for case in spec.cases() if case.size != "full"][::5]:
        want = run_case(case, narrow)
        budgets = budget(case, spec.tolerance, narrow, wide)
        assert all(c.ok for c in compare(want, want, spec.tolerance, budgets).values())
        for name, value in want.items():
            if not value.numel() or (name == "candidates" and not value.isfinite().any()):
                continue
            spoiled = {**want, name: spoil(value)}
            assert not compare(spoiled, want, spec.tolerance, budgets)[name].ok, (case.id, name)
        missing = dict(list(want.items())[1:])
        assert not want or not all(c.ok for c in compare(missing, want, spec.tolerance, budgets).values())


def spoil(value: Tensor) -> Tensor:
    """Another value of the same kind: changed by a few percent, by one, or to its opposite."""
    if value.dtype == torch.bool:
        return ~value
    if not value.is_floating_point():
        return value + 1
    if value.itemsize == 1:
        return (value.view(torch.uint8) ^ 1).view(value.dtype)
    if not value.isfinite().any():
        return torch.zeros_like(value)
    return torch.where(value == 0, 0.1, value * 1.5)


def test_scores_of_changed_picks_are_not_compared() -> None:
    tolerance = Tolerance(Compare.SELECTION, 4.0, "a test")
    candidates = torch.tensor([[5.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
    want = {"picks": torch.tensor([[0, 1], [2, 1]]), "weights": torch.tensor([[5.0, 1.0], [3.0, 2.0]])}
    got = {"picks": torch.tensor([[0, 2], [2, 1]]), "weights": torch.tensor([[5.0, 2.0], [3.0, 2.0]])}
    tight = dict.fromkeys(("weights", "candidates"), Budget(1e-6, 1e-6))
    want["candidates"] = got["candidates"] = candidates
    assert all(c.ok for c in compare(got, want, tolerance, tight).values())
    got["weights"] = torch.tensor([[5.0, 2.0], [3.0, 2.5]])
    assert not compare(got, want, tolerance, tight)["weights"].ok
