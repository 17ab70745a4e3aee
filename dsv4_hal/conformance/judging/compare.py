"""Comparing the results of a case: dtype, shape, device and strides first, then values, as `Expected` says."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv4_hal.conformance.judging.expected import Expected, largest, outside, rows
from dsv4_hal.conformance.workers.transport import octets
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops.spec import Case, Compare, Tolerance

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Whether a result agrees, by how much, and what is wrong if not.

    of_budget  the worst error as a multiple of what is allowed; inf where an exact check fails, None where nothing is
               measured
    """

    ok: bool
    metrics: dict[str, float]
    message: str = ""
    of_budget: float | None = None


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


def compare(got: Results, expected: Expected, tolerance: Tolerance, device: str = "cpu") -> dict[str, Comparison]:
    """Every result of a case by the comparer that its op and its name ask for (names: `dsv4_hal.ops.cases`).

    device  the device type that the results `got` must lie on
    """
    want = expected.results
    if got.keys() != want.keys():
        return {"results": _exactly_wrong(f"results are {sorted(got)}, expected {sorted(want)}")}
    return {name: _compare(name, got, expected, tolerance, device) for name in want}


def _compare(name: str, got: Results, expected: Expected, tolerance: Tolerance, device: str) -> Comparison:
    a, b = got[name], expected.results[name]
    if name == "counts":
        return statistical(a, b, tolerance.factor, device)
    if name == "picks":
        return selection(a, b, expected.exactly["candidates"], _margin(expected), device)
    if tolerance.compare is Compare.BITWISE or not b.is_floating_point() or name.startswith("exact_"):
        return bitwise(a, b, device)
    among = None
    if "picks" in expected.results and name != "candidates" and a.shape == b.shape == got["picks"].shape:
        among = (got["picks"].cpu() == expected.results["picks"]).all(-1)  # a score goes with its pick
    return close(name, a, expected, device, among)


def _margin(expected: Expected) -> Tensor:
    """[T, 1] how far the scores of two that change places may be apart: both may be off."""
    name = "candidates"
    flips = expected.flips[name].size if name in expected.flips else 0.0
    return 2 * (expected.slack[name] + flips * largest(rows(expected.exactly[name])))


def _exactly_wrong(message: str, metrics: dict[str, float] | None = None) -> Comparison:
    return Comparison(False, metrics or {}, message, math.inf)


def structure(got: Tensor, want: Tensor, device: str | None = None) -> str:
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
    if wrong := structure(got, want, device):
        return _exactly_wrong(wrong)
    if not got.numel():
        return Comparison(True, {"differing": 0.0})
    a, b = (octets(t.cpu()) for t in (got, want))
    differs = (a != b).any(1)
    differing = int(differs.sum())
    if not differing:
        return Comparison(True, {"differing": 0.0})
    first = int(differs.nonzero()[0])
    values = f"{got.cpu().reshape(-1)[first].item()}, expected {want.cpu().reshape(-1)[first].item()}"
    message = f"{differing} of {len(a)} elements differ, the first at {index(first, got)}: {values}"
    return _exactly_wrong(message, {"differing": differing / len(a)})


def index(flat: int, t: Tensor) -> str:
    """Where the element with a number in order lies, as one writes it."""
    return "[" + ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(flat), t.shape)) + "]"


def close(
    name: str, got: Tensor, expected: Expected, device: str | None = None, among: Tensor | None = None
) -> Comparison:
    """Every element is the rounding of a number within its row's slack, but for as many as a rounding may flip.

    among  [T] which of the first axis are compared; None: all
    """
    want = expected.results[name]
    if wrong := structure(got, want, device):
        return _exactly_wrong(wrong)
    got = got.detach().cpu()
    metrics = measure(got, want)
    if math.isinf(metrics["nmse"]) and (wrong := misplaced(got, want)):
        return _exactly_wrong(wrong, metrics)
    a, exactly, slack = rows(got), rows(expected.exactly[name]), expected.slack[name]
    if not a.numel():
        return Comparison(True, metrics, "", 0.0)
    beyond = outside(a, exactly, slack)
    off = (a.double() - exactly).abs().nan_to_num(0, 0, 0)
    unavoidable = (rows(want).double() - exactly).abs().nan_to_num(0, 0, 0)  # the last rounding itself
    shares = ((off - unavoidable).clamp(min=0) / slack).nan_to_num(0, math.inf, 0)
    if among is not None:
        kept = among.repeat_interleave(len(a) // max(1, len(among)))[:, None]
        beyond, shares = beyond & kept, shares.where(kept, 0)
    count, within = int(beyond.sum()), float(shares.masked_fill(beyond, 0).max())
    if not count:
        return Comparison(True, metrics, "", min(1.0, within))
    flips = expected.flips.get(name)
    if flips is None or not flips.count:
        worst = int(shares.masked_fill(~beyond, -1).argmax())
        told, of_budget = f"{float(shares.flatten()[worst]):.3g} times the slack", float(shares.flatten()[worst])
    else:
        size = (off / largest(exactly)).nan_to_num(0, 0, 0).masked_fill(~beyond, 0)
        worst = int(size.argmax())
        of_budget = max(count / flips.count, float(size.max()) / flips.size)
        told = f"{flips.count} may be, by {flips.size:.2g} of the row's largest value"
    value, right = a.flatten()[worst].item(), rows(want).flatten()[worst].item()
    where = f"the worst at {index(worst, got)}: {value:.8g}, expected {right:.8g}"
    message = f"{count} of {got.numel()} elements are beyond the slack, {where} ({told})"
    ok = flips is not None and bool(flips.count) and of_budget <= 1
    return Comparison(ok, metrics, "" if ok else message, of_budget if ok else max(of_budget, 1.01))


def misplaced(got: Tensor, want: Tensor) -> str:
    """What is wrong with infinities and NaN, of which no error can be measured; "" if they stand where they should."""
    a, b = got.cpu().double().flatten(), want.cpu().double().flatten()
    wrong = ~(a.isfinite() & b.isfinite()) & ~_alike(a, b)
    if not (count := int(wrong.sum())):
        return ""
    first = int(wrong.nonzero()[0])
    return (
        f"{count} of {len(a)} elements are NaN or infinite where the reference is not, or the reverse, "
        f"the first at {index(first, got)}: {a[first].item():.6g}, expected {b[first].item():.6g}"
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


def selection(got: Tensor, want: Tensor, candidates: Tensor, margin: Tensor, device: str | None = None) -> Comparison:
    """Picks [T, k] among scores `candidates` [T, N] (-inf: not visible), the reference's.

    Picks are distinct and visible, best first, as many as are visible, then -1. Everything better than the worst of
    `want` by more than `margin` [T, 1] is picked, and nothing that is worse by more.
    """
    if wrong := structure(got, want, device):
        return _exactly_wrong(wrong)
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
    metrics = {
        "rows_equal": float((got == want).all(-1).double().mean()) if len(got) else 1.0,
        "margin": float(margin.max()) if len(margin) else 0.0,
    }
    found = [
        f"{what} in {int(rows.sum())} rows, first {int(rows.nonzero()[0])}"
        for what, rows in problems.items()
        if rows.any()
    ]
    return Comparison(not found, metrics, "; ".join(found), math.inf if found else None)


def statistical(got: Tensor, want: Tensor, sigmas: float, device: str | None = None) -> Comparison:
    """Counts of equally many draws: no frequency differs by more than `sigmas` standard deviations."""
    if wrong := structure(got, want, device):
        return _exactly_wrong(wrong)
    a, b = got.cpu().double(), want.cpu().double()
    draws = float(b.sum())
    if float(a.sum()) != draws or draws == 0 or (a < 0).any():
        return _exactly_wrong(f"{float(a.sum()):g} draws, expected {draws:g}")
    share = (a + b) / (2 * draws)
    deviation = (2 * share * (1 - share) / draws).sqrt()
    distance = torch.where(a == b, 0.0, (a - b).abs() / draws / deviation)
    worst = float(distance.max())
    message = f"token {int(distance.argmax())} is {worst:.1f} standard deviations off" if not worst <= sigmas else ""
    return Comparison(not message, {"sigmas": worst}, message, math.inf if message else None)
