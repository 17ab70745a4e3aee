"""The comparers catch what they are for, and let pass what is legitimate."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance import (
    Budget,
    Expected,
    bitwise,
    compare,
    expect,
    nmse,
    run_case,
    selection,
    statistical,
    widen,
)
from dsv4_hal.conformance.judging.compare import close
from dsv4_hal.conformance.judging.expected import Flips, rows
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
        selection(spoil(PICKS), PICKS, SCORES, torch.full((2, 1), INF)),
        statistical(spoil(COUNTS), COUNTS, INF),
    ]
    assert [r.ok for r in results] == [False] * 4
    assert all(r.message for r in results)


def test_strides_of_what_is_expected_do_not_matter() -> None:
    assert bitwise(X, turned(X)).ok and nmse(X, turned(X), Budget(0, 0)).ok


def test_device() -> None:
    assert bitwise(X, X, "cpu").ok
    for result in (
        bitwise(X, X, "cuda"),
        nmse(X, X, LOOSE, "cuda"),
        selection(PICKS, PICKS, SCORES, torch.zeros(2, 1), "cuda"),
    ):
        assert not result.ok and "expected cuda" in result.message


# Bitwise.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_bitwise_sees_one_flipped_bit(dtype: torch.dtype) -> None:
    x = (X * 50).abs().to(dtype)
    assert bitwise(x, x.clone()).ok
    flipped = x.clone().reshape(-1).view(torch.uint8)
    flipped[5 * x.itemsize] ^= 1
    result = bitwise(flipped.view(dtype).view(x.shape), x)
    assert not result.ok and "1 of 36 elements" in result.message and "at [0, 5]" in result.message


def test_bitwise_of_a_lone_element_with_a_stride() -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0]).bfloat16()[::3], torch.tensor([4.0, 5.0, 6.0]).bfloat16()[::3]
    assert one.stride() == (3,) and bitwise(one, one.clone()).ok and not bitwise(one, other).ok


def test_bitwise_on_special_values() -> None:
    special = torch.tensor([NAN, INF, -0.0])
    assert bitwise(special, special.clone()).ok
    assert not bitwise(torch.tensor([0.0]), torch.tensor([-0.0])).ok
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert not bitwise(other_nan, torch.tensor([NAN])).ok
    yes, no = torch.tensor(True), torch.tensor(False)
    assert bitwise(yes, yes).ok and not bitwise(yes, no).ok
    assert bitwise(X[:0], X[:0]).ok


# Close: every element within its row's slack.


def expecting(exactly: Tensor, slack: float, dtype: torch.dtype = torch.float32, **more: Any) -> Expected:
    """Something to be given in a dtype, known exactly, with so much slack in every row."""
    exactly = exactly.double()
    return Expected({"y": exactly.to(dtype)}, {"y": exactly}, {"y": torch.full((len(rows(exactly)), 1), slack)}, **more)


def test_an_element_is_the_rounding_of_a_number_within_the_slack() -> None:
    exactly = X.double() * (1 + 2.0**-12)
    expected = expecting(exactly, 1e-6, torch.bfloat16)
    assert close("y", exactly.bfloat16(), expected).ok
    assert close("y", (exactly + 1e-7).bfloat16(), expected).ok
    told = close("y", X.half().bfloat16() + 0.01 * X.bfloat16(), expected)
    assert not told.ok and (told.of_budget or 0) > 100 and "the worst at [" in told.message


def test_another_rounding_of_the_same_number_is_seen_where_nothing_is_close_to_the_edge() -> None:
    expected = expecting(torch.tensor([[1.0 + 2.0**-9]]), 0.0, torch.bfloat16)
    assert not close("y", torch.tensor([[1.0078125]], dtype=torch.bfloat16), expected).ok  # the next number
    on_the_edge = expecting(torch.tensor([[1.0 + 2.0**-8]]), 1e-6, torch.bfloat16)
    assert all(close("y", torch.tensor([[v]], dtype=torch.bfloat16), on_the_edge).ok for v in (1.0, 1.0078125))


def test_every_row_has_a_slack_of_its_own() -> None:
    exactly = torch.tensor([[1e6, 1.0], [1e-6, 1e-9]], dtype=torch.float64)
    slack = {"y": torch.tensor([[10.0], [1e-11]], dtype=torch.float64)}
    expected = Expected({"y": exactly.float()}, {"y": exactly}, slack)
    assert close("y", exactly.float() + torch.tensor([[5.0, 5.0], [0.0, 0.0]]), expected).ok
    assert not close("y", exactly.float() + torch.tensor([[0.0, 0.0], [0.0, 1e-10]]), expected).ok


def test_flips_are_counted_and_bounded() -> None:
    expected = expecting(X, 1e-6, flips={"y": Flips(2, 0.01)})
    far = 0.005 * X.abs().amax(1)
    two, three, wide = X.clone(), X.clone(), X.clone()
    two[0, 0] += far[0]
    two[3, 1] -= far[3]
    three[:3, 0] += far[:3]
    wide[0, 0] += 10 * far[0]
    told = [close("y", got, expected) for got in (two, three, wide)]
    assert [t.ok for t in told] == [True, False, False]
    assert (
        told[0].of_budget == 1.0 and told[1].of_budget == 1.5 and (told[2].of_budget or 0) == pytest.approx(5, rel=0.1)
    )


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
def test_no_garbage_passes(name: str) -> None:
    loose = {"y": Flips(6, 0.1)}
    assert not close("y", GARBAGE[name], expecting(X, 1e-2, flips=loose)).ok
    assert not close("y", X, expecting(GARBAGE[name], 1e-2, flips=loose)).ok
    assert not nmse(GARBAGE[name], X, LOOSE).ok and not nmse(X, GARBAGE[name], LOOSE).ok


def test_special_values() -> None:
    masked = X.masked_fill(X > 0, -INF)
    assert close("y", masked.clone(), expecting(masked, 0.0)).ok
    assert not close("y", X.masked_fill(X > 0, INF), expecting(masked, 1.0)).ok
    assert close("y", X[:0], expecting(X[:0], 0.0)).ok
    zeros = torch.zeros(1, 3)
    assert close("y", zeros, expecting(zeros, 0.0)).ok and not close("y", zeros + 1e-30, expecting(zeros, 0.0)).ok


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
    assert selection(BEST, BEST, CANDIDATES, torch.tensor(0.0).reshape(1, 1)).ok
    near = changed(0, 0, 1, 3, 2)
    assert selection(near, BEST, CANDIDATES, torch.tensor(0.01).reshape(1, 1)).ok
    assert not selection(near, BEST, CANDIDATES, torch.tensor(0.0001).reshape(1, 1)).ok


def test_selection_at_the_edge() -> None:
    want, other = BEST[:, :3].contiguous(), BEST[:, :3].clone()
    other[0, 2] = 3  # 2.999 for 3.0
    assert (
        selection(other, want, CANDIDATES, torch.tensor(0.01).reshape(1, 1)).ok
        and not selection(other, want, CANDIDATES, torch.tensor(0.0).reshape(1, 1)).ok
    )


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
    result = selection(got, BEST, CANDIDATES, torch.tensor(0.01).reshape(1, 1))
    assert not result.ok and message in result.message


def test_selection_of_nothing() -> None:
    assert selection(BEST[:0], BEST[:0], CANDIDATES[:0], torch.tensor(0.0).reshape(1, 1)).ok


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


@pytest.mark.parametrize("numerics", [exact(), deployed()], ids=["exact", "deployed"])
@pytest.mark.parametrize("op", [name for name, spec in OPS.items()])
def test_no_case_passes_garbage(op: str, numerics: Numerics) -> None:
    """Whatever a result is, another one like it does not pass."""
    narrow, wide = references(numerics)
    spec = OPS[op]
    for case in [case for case in spec.cases() if case.size != "full"][::5]:
        want = run_case(case, narrow)
        expected = expect(partial(run_case, case), wide, numerics.accumulate, spec.tolerance)
        assert all(c.ok for c in compare(want, expected, spec.tolerance).values())
        for name, value in want.items():
            if not value.numel() or (name == "candidates" and not value.isfinite().any()):
                continue
            spoiled = {**want, name: spoil(value)}
            assert not compare(spoiled, expected, spec.tolerance)[name].ok, (case.id, name)
        missing = dict(list(want.items())[1:])
        assert not want or not all(c.ok for c in compare(missing, expected, spec.tolerance).values())


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
    want["candidates"] = got["candidates"] = candidates
    exactly = {name: want[name].double() for name in ("weights", "candidates")}
    expected = Expected(want, exactly, dict.fromkeys(exactly, torch.full((2, 1), 1e-6)))
    assert all(c.ok for c in compare(got, expected, tolerance).values())
    got["weights"] = torch.tensor([[5.0, 2.0], [3.0, 2.5]])
    assert not compare(got, expected, tolerance)["weights"].ok
