"""Comparing the results of a case: dtype, shape, device and strides first, then values.

How far results may differ is derived, not chosen. Two correct backends differ for two reasons.
1. Between rounding points they add in another order and take other exponentials. How much that is, is measured: `e`,
   the error of the reference in its profile against the same profile with float64 between its rounding points. Another
   order errs otherwise, and may err more: factor x e, with a factor of 8 for most ops. The reference adds on a CPU in
   16 chains or more, the lanes of its vectors; a chain of K additions errs as sqrt(K), so that a device that adds in
   one chain errs 4 times as much. And the largest of a few errors may be twice what it is in another draw. (Seen on a
   GPU: 6.5 e in products of 256 columns in float32, 9.2 e where 7,168 were added in one chain, 7.2 e in the logarithm
   of attention.)
2. Such a difference, however small, now and then carries a value over the edge of a rounding, and the result is then
   one unit in the last place away. Few elements may show none of this while e is measured, so there is a floor:
   one unit for the largest error, and for the mean that of one unit in every 64th element, or in one element if there
   are fewer. A forgotten rounding moves about every fifth element by one unit, and so stays above it.
   Rows of a cache are rounded to a format of few bits at last; its unit is the floor of their largest error.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv4_hal.formats import Format
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops.spec import Case, Compare, Tolerance

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved

Results = Mapping[str, Tensor]

UNIT = {"e4m3": 1 / 8, "e2m1": 1 / 3, "int8": 1 / 127, "int4": 1 / 7}  # largest step over the largest value of a block
FLIPPED = 1 / 64  # share of elements that may be off by one unit


@dataclass(frozen=True)
class Budget:
    """rms: root of the mean square error over the mean square. largest: largest error over largest value."""

    rms: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """Whether a result agrees, by how much, and what is wrong if not."""

    ok: bool
    metrics: dict[str, float]
    message: str = ""


def run_case(case: Case, ops: Resolved) -> dict[str, Tensor]:
    """The results of a case. Its inputs depend on its id and on the profile of `ops` alone."""
    return case.run(ops, torch.Generator().manual_seed(zlib.crc32(case.id.encode())))


def widen(numerics: Numerics) -> Numerics:
    """The profile with float64 between its rounding points.

    A field that is no narrower than the accumulator rounds nothing and is widened with it; storage stays.
    """
    wide: dict[str, Any] = {
        field: torch.float64
        for field in ("accumulate", "q_norm", "score", "probs")
        if getattr(numerics, field) == numerics.accumulate
    }
    return replace(numerics, **wide)


def budget(case: Case, tolerance: Tolerance, reference32: Resolved, reference64: Resolved) -> dict[str, Budget]:
    """How far each floating result of a case may be from the reference; see the head of this file.

    reference32  the reference in the profile that is compared
    reference64  the reference in the widened profile
    """
    if tolerance.compare is Compare.BITWISE:
        return {}
    return budgets(run_case(case, reference32), run_case(case, reference64), tolerance, reference32.numerics)


def budgets(narrow: Results, wide: Results, tolerance: Tolerance, numerics: Numerics) -> dict[str, Budget]:
    """The same, from the results of the two."""
    rounded = getattr(numerics, tolerance.rounded) if tolerance.rounded else None
    return {
        name: derive(narrow[name], wide[name], tolerance.factor, row_format(name, numerics), rounded)
        for name in narrow
        if narrow[name].is_floating_point()
    }


def derive(
    narrow: Tensor, wide: Tensor, factor: float, rows: Format | None = None, rounded: torch.dtype | None = None
) -> Budget:
    """The budget of a result: see the head of this file.

    narrow, wide  the reference's result in its profile, and in the widened one
    rows          what its rows were rounded to at last, where they are rows of a cache
    rounded       dtype of its last rounding, where its own is finer
    """
    measured = measure(narrow, wide)
    if not math.isfinite(measured["nmse"]):
        raise ValueError("the reference disagrees with itself in float64: no tolerance can be derived")
    finite = wide.double()[wide.isfinite()]
    norm = float(finite.norm())
    # What one element, the largest, contributes to the mean.
    alone = float(finite.abs().max()) / norm if norm else 0.0
    eps = torch.finfo(rounded or narrow.dtype).eps
    unit = eps if rows is None else max(eps, UNIT[rows.element])
    return Budget(
        max(factor * math.sqrt(measured["nmse"]), eps * math.sqrt(FLIPPED), unit * alone),
        max(factor * measured["max_rel"], unit),
    )


def row_format(name: str, numerics: Numerics) -> Format | None:
    """Format that the rows of a result were rounded to, by its name."""
    return {"kv": numerics.kv, "index": numerics.index}.get(name.split("_")[0])


def compare(
    got: Results, want: Results, tolerance: Tolerance, budgets: Mapping[str, Budget], device: str = "cpu"
) -> dict[str, Comparison]:
    """Every result of a case by the comparer that its op and its name ask for (names: `dsv4_hal.ops.cases`).

    device  the device type that the results `got` must lie on
    """
    if got.keys() != want.keys():
        return {"results": Comparison(False, {}, f"results are {sorted(got)}, expected {sorted(want)}")}
    return {name: _compare(name, got, want, tolerance, budgets, device) for name in want}


def _compare(
    name: str, got: Results, want: Results, tolerance: Tolerance, budgets: Mapping[str, Budget], device: str
) -> Comparison:
    a, b = got[name], want[name]
    if name == "counts":
        return statistical(a, b, tolerance.factor, device)
    if name == "picks":
        scores = want["candidates"]
        largest = scores[scores.isfinite()].abs().max() if scores.isfinite().any() else torch.zeros(())
        # Both of two scores that change places may be off.
        return selection(a, b, scores, 2 * budgets["candidates"].largest * float(largest), device)
    if tolerance.compare is Compare.BITWISE or not b.is_floating_point():
        return bitwise(a, b, device)
    if "picks" in want and name != "candidates" and a.shape == b.shape == got["picks"].shape:
        same = (got["picks"].cpu() == want["picks"].cpu()).all(-1)  # a score goes with its pick: compare like with like
        a, b = a[same.to(a.device)], b[same.to(b.device)]
    return nmse(a, b, budgets[name], device)


def _structure(got: Tensor, want: Tensor, device: str | None = None) -> str:
    """What is wrong before values are looked at; "" if nothing."""
    if got.dtype != want.dtype:
        return f"dtype {got.dtype}, expected {want.dtype}"
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if device is not None and got.device.type != device:
        return f"on {got.device.type}, expected {device}"
    if not got.is_contiguous():
        return f"strides {got.stride()}, expected a contiguous result"
    return ""


def bitwise(got: Tensor, want: Tensor, device: str | None = None) -> Comparison:
    """Every bit equal: NaN only equals the same NaN, and -0 is not 0."""
    if wrong := _structure(got, want, device):
        return Comparison(False, {}, wrong)
    if not got.numel():
        return Comparison(True, {"differing": 0.0})
    a, b = (t.cpu().contiguous().reshape(-1).view(torch.uint8).view(t.numel(), t.itemsize) for t in (got, want))
    differs = (a != b).any(1)
    differing = int(differs.sum())
    if not differing:
        return Comparison(True, {"differing": 0.0})
    first = int(differs.nonzero()[0])
    values = f"{got.cpu().reshape(-1)[first].item()}, expected {want.cpu().reshape(-1)[first].item()}"
    message = f"{differing} of {len(a)} elements differ, the first at {first}: {values}"
    return Comparison(False, {"differing": differing / len(a)}, message)


def nmse(got: Tensor, want: Tensor, budget: Budget, device: str | None = None) -> Comparison:
    """Mean square error over mean square, and largest error over largest value, within the budget."""
    if wrong := _structure(got, want, device):
        return Comparison(False, {}, wrong)
    metrics, over = measure(got, want), []
    if math.isinf(metrics["nmse"]) and (wrong := _misplaced(got, want)):
        return Comparison(False, metrics, wrong)
    if not metrics["nmse"] <= budget.rms**2:
        over.append(f"nmse {metrics['nmse']:.3g} over {budget.rms**2:.3g}")
    if not metrics["max_rel"] <= budget.largest:
        over.append(f"largest error {metrics['max_rel']:.3g} of the largest value, over {budget.largest:.3g}")
    return Comparison(not over, metrics, "; ".join(over))


def _misplaced(got: Tensor, want: Tensor) -> str:
    """What is wrong with infinities and NaN, of which no error can be measured; "" if they stand where they should."""
    a, b = got.cpu().double().flatten(), want.cpu().double().flatten()
    wrong = ~(a.isfinite() & b.isfinite()) & ~_alike(a, b)
    if not (count := int(wrong.sum())):
        return ""
    first = int(wrong.nonzero()[0])
    return (
        f"{count} of {len(a)} elements are NaN or infinite where the reference is not, or the reverse, "
        f"the first at {first}: {a[first].item():.6g}, expected {b[first].item():.6g}"
    )


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def measure(got: Tensor, want: Tensor) -> dict[str, float]:
    """The numbers a report shows. Infinities and NaN must stand in the same places, or every error is infinite."""
    a, b = got.cpu().double().flatten(), want.cpu().double().flatten()
    finite = a.isfinite() & b.isfinite()
    if not _alike(a, b)[~finite].all():
        return dict.fromkeys(("nmse", "max_abs", "max_rel"), math.inf) | dict.fromkeys(("cosine", "1e-3", "5e-3"), 0.0)
    a, b = a[finite], b[finite]
    if not len(b):
        return dict.fromkeys(("nmse", "max_abs", "max_rel"), 0.0) | dict.fromkeys(("cosine", "1e-3", "5e-3"), 1.0)
    error = (a - b).abs()
    norms = float(a.norm() * b.norm())
    return {
        "nmse": _ratio(float(error.square().sum()), float(b.square().sum())),
        "max_abs": float(error.max()),
        "max_rel": _ratio(float(error.max()), float(b.abs().max())),
        "cosine": float(a @ b) / norms if norms else float(torch.equal(a, b)),
        "1e-3": float((error <= 1e-3 * b.abs()).double().mean()),
        "5e-3": float((error <= 5e-3 * b.abs()).double().mean()),
    }


def _ratio(error: float, size: float) -> float:
    return error / size if size else (math.inf if error else 0.0)


def selection(got: Tensor, want: Tensor, candidates: Tensor, margin: float, device: str | None = None) -> Comparison:
    """Picks [T, k] among scores `candidates` [T, N] (-inf: not visible), the reference's.

    Picks are distinct and visible, best first, as many as are visible, then -1. Everything better than the worst of
    `want` by more than `margin` is picked, and nothing that is worse by more.
    """
    if wrong := _structure(got, want, device):
        return Comparison(False, {}, wrong)
    got, want, scores = got.cpu(), want.cpu(), candidates.cpu().double()
    count, filled = scores.shape[1], want >= 0
    problems = {
        "not filled with picks, then -1": ((got >= 0) != filled).any(-1),
        "out of range": ((got < -1) | (got >= count)).any(-1),
    }
    padded = torch.cat([scores, torch.full((len(scores), 1), -math.inf, dtype=torch.float64)], 1)
    place = torch.where((got < 0) | (got >= count), count, got)
    score = padded.gather(1, place)
    times = torch.zeros_like(padded).scatter_add(1, place, torch.ones_like(score))
    worst = padded.gather(1, torch.where(filled, want, count)).masked_fill(~filled, math.inf).amin(-1, keepdim=True)
    chosen = place < count
    problems |= {
        "picked twice": (times[:, :count] > 1).any(-1),
        "not visible": (chosen & (score == -math.inf)).any(-1),
        "worse than the last pick by more than the margin": (chosen & (score < worst - margin)).any(-1),
        "a better one is missing": ((scores > worst + margin) & (times[:, :count] == 0)).any(-1),
        "not best first": (score[:, 1:] > score[:, :-1] + margin).any(-1),
    }
    metrics = {"rows_equal": float((got == want).all(-1).double().mean()) if len(got) else 1.0, "margin": margin}
    found = [
        f"{what} in {int(rows.sum())} rows, first {int(rows.nonzero()[0])}"
        for what, rows in problems.items()
        if rows.any()
    ]
    return Comparison(not found, metrics, "; ".join(found))


def statistical(got: Tensor, want: Tensor, sigmas: float, device: str | None = None) -> Comparison:
    """Counts of equally many draws: no frequency differs by more than `sigmas` standard deviations."""
    if wrong := _structure(got, want, device):
        return Comparison(False, {}, wrong)
    a, b = got.cpu().double(), want.cpu().double()
    draws = float(b.sum())
    if float(a.sum()) != draws or draws == 0 or (a < 0).any():
        return Comparison(False, {}, f"{float(a.sum()):g} draws, expected {draws:g}")
    share = (a + b) / (2 * draws)
    deviation = (2 * share * (1 - share) / draws).sqrt()
    distance = torch.where(a == b, 0.0, (a - b).abs() / draws / deviation)
    worst = float(distance.max())
    message = f"token {int(distance.argmax())} is {worst:.1f} standard deviations off" if not worst <= sigmas else ""
    return Comparison(not message, {"sigmas": worst}, message)
