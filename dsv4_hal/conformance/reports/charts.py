"""Charts of the report, as numbers that a template draws: how errors are distributed, and how a model drifts.

All axes of errors are logarithmic; what is exactly 0 has a place of its own beside them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv4_hal.conformance.judging.results import Outcome
from dsv4_hal.conformance.models.drift import GOOD, Part
from dsv4_hal.conformance.reports.cells import magnitude

LEFT, RIGHT, TOP, BOTTOM = 44, 338, 18, 180  # edges of a plot, in a picture that is 360 wide
GAP = 34  # between an axis and the place of 0
TICKS = 8  # names along an axis, at most


def distributions(outcomes: Iterable[tuple[Outcome, str]]) -> list[dict[str, Any]]:
    """Of the cases whose values were compared, each with its state: share of the budget, and relative error. One that
    failed by a result without such an error has none: that of its other results would make it look right."""
    shares, errors, unmeasured = [], [], 0
    for outcome, state in outcomes:
        if outcome.metrics:
            shares.append((0.0 if outcome.of_budget is None else outcome.of_budget, state))
            nmse = [found["nmse"] for found in outcome.metrics.values() if "nmse" in found]
            worst = max(nmse, key=magnitude, default=None)
            if not outcome.ok and outcome.of_budget == math.inf and (worst is None or math.isfinite(worst)):
                unmeasured += 1
            elif worst is not None:
                errors.append((math.sqrt(worst), state))
    found = [
        {"title": "share of budget", "zero": "0 or exact", "limit": _across(0, -3, 2), **histogram(shares, -3, 2, 4)},
        {"title": "relative error (RMS)", "zero": "0", "limit": None, **histogram(errors, -12, 0, 2)},
    ]
    found[0]["missing"], found[1]["missing"] = 0, unmeasured
    return [chart for chart in found if chart["count"]]


def histogram(values: Sequence[tuple[float, str]], low: int, high: int, bins: int) -> dict[str, Any]:
    """Bars of the values from 10^low to 10^high, `bins` for each power of ten, divided by state; what lies beyond is in
    the outermost bars."""
    last = (high - low) * bins - 1
    counts: dict[int, Counter[str]] = {}
    for value, state in values:
        if value == 0:
            place = -1
        elif math.isfinite(value):
            place = min(max(math.floor((math.log10(value) - low) * bins), 0), last)
        else:
            place = last
        counts.setdefault(place, Counter())[state] += 1
    most = max((sum(c.values()) for c in counts.values()), default=1)
    edges = [_across(low + i / bins, low, high) for i in range(last + 2)]
    bars = []
    for place, counted in sorted(counts.items()):
        left, right = (LEFT, LEFT + 14) if place < 0 else edges[place : place + 2]
        names = [f"{10 ** (low + (place + n) / bins):.2g}" for n in (0, 1)]
        if place < 0:
            name = "0"
        elif place == 0:
            name = f"below {names[1]}"
        elif place == last:
            name = f"{names[0]} and above"
        else:
            name = f"{names[0]} to {names[1]}"
        bars.append({"name": name, "x": round(left + 0.75, 1), "width": round(right - left - 1.5, 1)})
        bars[-1]["parts"] = _stacked(counted, most)
    every = math.ceil((high - low + 1) / TICKS)
    return {
        "bars": bars,
        "count": len(values),
        "most": most,
        "states": sorted({state for _, state in values}),
        "ticks": [(_across(e, low, high), _power(e)) for e in range(low, high + 1, every)],
    }


def _stacked(counts: Mapping[str, int], most: int) -> list[dict[str, Any]]:
    """One upon the other, each high enough to be seen."""
    out, floor = [], float(BOTTOM)
    for state, count in sorted(counts.items()):
        height = max(2.0, (BOTTOM - TOP) * count / most)
        floor -= height
        out.append({"state": state, "count": count, "y": round(floor, 1), "height": round(height, 1)})
    return out


def drift(parts: Sequence[Part], backends: Sequence[str]) -> dict[str, Any]:
    """The error of one part, layer by layer: points of each backend, and the budget of each layer."""
    layers = sorted({p.layer for p in parts if p.layer is not None})
    values = [v for p in parts for v in (p.rms, p.budget_rms) if v and math.isfinite(v)]
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)
    step = (RIGHT - LEFT) / max(1, len(layers))

    def x(layer: int) -> float:
        return round(LEFT + step * (layers.index(layer) + 0.5), 1)

    def y(value: float) -> float:
        if value == 0:
            return BOTTOM
        return round(BOTTOM - GAP - (BOTTOM - GAP - TOP) * (math.log10(value) - low) / (high - low), 1)

    series = []
    for number, backend in enumerate(backends):
        mine = [p for p in parts if p.backend == backend and p.layer is not None]
        points = [
            {"x": x(p.layer), "y": y(p.rms), "part": p, "bad": p.verdict not in GOOD}
            for p in mine
            if p.layer is not None and p.rms is not None and math.isfinite(p.rms)
        ]
        series.append({"number": number % 4, "points": points, "missing": len(mine) - len(points)})
    budgets = {(p.layer, p.budget_rms) for p in parts if p.layer is not None and p.budget_rms}
    return {
        "series": series,
        "budgets": [
            (round(x(n) - step / 2, 1), round(x(n) + step / 2, 1), y(b)) for n, b in sorted(budgets) if math.isfinite(b)
        ],
        "layers": [(x(layer), layer) for layer in layers[:: math.ceil(len(layers) / TICKS) or 1]],
        "ticks": [(y(10.0**e), _power(e)) for e in range(low, high + 1, math.ceil((high - low + 1) / TICKS))],
        "count": len(parts),
        "bad": sum(p.verdict not in GOOD for p in parts),
        "worst": max((p.rms for p in parts if p.rms is not None), key=magnitude, default=None),
        "missing": sum(s["missing"] for s in series),
    }


def _across(exponent: float, low: int, high: int) -> float:
    return round(LEFT + GAP + (RIGHT - LEFT - GAP) * (exponent - low) / (high - low), 1)


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"1e{exponent}"
