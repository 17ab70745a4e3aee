"""Charts count everything once, and put it where it belongs."""

from __future__ import annotations

import math

import pytest

from dsv4_hal.conformance.judging.results import Outcome
from dsv4_hal.conformance.models.drift import Part
from dsv4_hal.conformance.reports.charts import BOTTOM, LEFT, RIGHT, TOP, distributions, drift, histogram


def test_a_histogram_counts_every_value_once() -> None:
    values = [0.0, 1e-9, 0.05, 0.05, 0.5, 1.0, 5.0, 1e9, math.inf, math.nan]
    chart = histogram([(v, "agrees" if v < 1 else "fails") for v in values], -2, 1, 1)
    told = {(bar["name"], part["state"]): part["count"] for bar in chart["bars"] for part in bar["parts"]}
    assert told == {
        ("0", "agrees"): 1, ("below 0.1", "agrees"): 3, ("0.1 to 1", "agrees"): 1, ("1 and above", "fails"): 5,
    }  # fmt: skip
    assert chart["count"] == 10 and chart["most"] == 5 and chart["states"] == ["agrees", "fails"]
    for bar in chart["bars"]:
        assert bar["x"] >= LEFT and bar["x"] + bar["width"] <= RIGHT
        top, low = bar["parts"][-1], bar["parts"][0]
        assert top["y"] >= TOP and low["y"] + low["height"] == pytest.approx(BOTTOM)


def test_what_is_over_the_budget_lies_right_of_its_line() -> None:
    metrics = {"y": {"nmse": 0.01}}
    cases = [(Outcome("chip", "rope", "", "", "", "", "", v, metrics), "agrees") for v in (0.99, 1.01)]
    shares, errors = distributions(cases)
    below, above = shares["bars"]
    assert below["x"] + below["width"] <= shares["limit"] <= above["x"]
    assert errors["limit"] is None and [bar["name"] for bar in errors["bars"]] == ["0.1 to 0.32"]
    assert distributions([(Outcome("null", "rope", "", "", "", "shapes"), "shapes")]) == []


def test_the_worst_result_of_a_case_counts() -> None:
    metrics = {"a": {"nmse": 1e-12}, "b": {"nmse": 0.04}, "c": {"differing": 0.0}}
    _, errors = distributions([(Outcome("chip", "rope", "", "", "", "", "", None, metrics), "agrees")])
    assert errors["count"] == 1 and errors["bars"][0]["name"] == "0.1 to 0.32"


def test_a_result_that_failed_without_an_error_is_not_drawn_at_that_of_another() -> None:
    def case(of_budget: float, **metrics: dict[str, float]) -> tuple[Outcome, str]:
        return Outcome("chip", "rope", "", "", "", "disagrees", "", of_budget, metrics), "fails"

    cases = [
        case(math.inf, a={"nmse": 0.0}, b={}),
        case(math.inf, a={"nmse": math.inf}, b={}),
        case(3, a={"nmse": 1.0}),
    ]
    shares, errors = distributions(cases)
    assert (shares["count"], shares["missing"]) == (3, 0)
    assert (errors["count"], errors["missing"]) == (2, 1) and all(bar["name"] != "0" for bar in errors["bars"])


def test_drift_puts_larger_errors_higher_and_zero_on_its_line() -> None:
    errors = (0.0, 1e-5, 1e-3)
    parts = [Part("chip", n, 0, "attn", e, budget_rms=1e-4, verdict="agrees") for n, e in enumerate(errors)]
    parts += [Part("chip", 3, 0, "attn", verdict="error"), Part("other", 0, 0, "attn", math.inf, verdict="disagrees")]
    chart = drift(parts, ["chip", "other"])
    points = chart["series"][0]["points"]
    assert [p["x"] for p in points] == sorted(p["x"] for p in points)
    assert points[0]["y"] == BOTTOM > points[1]["y"] > chart["budgets"][0][2] > points[2]["y"] >= TOP
    assert chart["missing"] == 2 and chart["bad"] == 2 and chart["worst"] == math.inf
    assert [layer for _, layer in chart["layers"]] == [0, 1, 2, 3]


def test_a_part_without_errors_can_be_drawn() -> None:
    chart = drift([Part("chip", 0, 0, "attn", 0.0)], ["chip"])
    assert chart["series"][0]["points"][0]["y"] == BOTTOM and chart["worst"] == 0


def test_many_layers_have_few_names() -> None:
    chart = drift([Part("chip", n, 0, "ffn", 1e-4) for n in range(61)], ["chip"])
    assert len(chart["layers"]) <= 8 and len(chart["series"][0]["points"]) == 61
