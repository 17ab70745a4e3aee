"""What a cell of the matrix claims for its cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.conformance.reports.cells import Cell, format_of, gather, share, state
from dsv4_hal.conformance.reports.saved import OpsHead, OpsRun, SavedOutcome


def an(verdict: str, of_budget: float | None = None, **more: Any) -> SavedOutcome:
    facts = {"backend": "chip", "op": "linear", "case": "linear[format=bf16]", "mode": "exact", "runs_as": "native"}
    return SavedOutcome(**facts | more, verdict=verdict, of_budget=of_budget)


def cells(*outcomes: SavedOutcome) -> list[Cell]:
    head = OpsHead("chip", "", len(outcomes), {}, {}, {}, ())
    return gather({"chip": OpsRun(Path("results.jsonl"), head, outcomes)})


@pytest.mark.parametrize(
    ("outcomes", "state", "text"),
    [
        ([an("agrees", 0.2), an("agrees", 0.7), an("agrees")], "agrees", "0.70"),
        ([an("agrees"), an("agrees")], "agrees", "exact"),
        ([an("agrees", 0.9), an("agrees", 0.1, runs_as="reference")], "borrowed", "0.90"),
        ([an("agrees", 0.9, runs_as="composite")], "borrowed", "0.90"),
        ([an("agrees", 0.9, runs_as="")], "borrowed", "0.90"),
        ([an("agrees", 0.9, runs_as="composite", backend="reference")], "agrees", "0.90"),
        ([an("agrees", 0.9), an("shapes")], "shapes", "shapes"),
        ([an("disagrees", 3.1), an("agrees", 0.9), an("shapes")], "fails", "3.10"),
        ([an("disagrees", 3.1), an("crash")], "fails", "crash"),
        ([an("disagrees", 3.1), an("disagrees", math.nan)], "fails", "NaN"),
        ([an("disagrees", 3.1), an("disagrees", 99.0, waived=True)], "fails", "3.10"),
        ([an("disagrees", 3.1, waived=True), an("agrees", 0.5)], "waived", "3.10"),
        ([an("a verdict of tomorrow")], "fails", "a verdict of tomorrow"),
    ],
)
def test_the_worst_case_decides(outcomes: list[SavedOutcome], state: str, text: str) -> None:
    for given in (outcomes, outcomes[::-1]):
        (cell,) = cells(*given)
        assert (cell.state, cell.text) == (state, text)
        assert len(cell.outcomes) == len(outcomes)
        assert cell.failed == sum(o.verdict not in ("agrees", "shapes") for o in outcomes)


def test_shapes_have_no_fill() -> None:
    (shapes,), (agrees,) = cells(an("shapes")), cells(an("agrees", 0.4))
    assert (shapes.fill, agrees.fill) == (0, 0.4)
    assert cells(an("disagrees", math.inf))[0].fill == 1
    assert state(an("shapes", backend="reference")) == "shapes"


def test_the_order_is_that_of_the_contract() -> None:
    found = cells(
        an("agrees", op="tomorrow", case="tomorrow[]"),
        an("agrees", op="rope", case="rope[n=1]"),
        an("agrees", case="linear[format=mxfp4]"),
        an("agrees", case="linear[format=bf16,tokens=3]"),
        an("agrees", case="linear[tokens=3]"),
    )
    assert [(c.op, c.format) for c in found] == [
        ("linear", ""), ("linear", "bf16"), ("linear", "mxfp4"), ("rope", ""), ("tomorrow", ""),
    ]  # fmt: skip
    assert len({c.id for c in found}) == 5


def test_formats_are_read_from_ids() -> None:
    assert format_of("linear[format=e4m3_128x128,tokens=5]") == "e4m3_128x128"
    assert format_of("linear[tokens=5,format=bf16]") == "bf16"
    assert format_of("kv_store[kv_format=bf16]") == format_of("plan") == ""


def test_shares_in_a_few_characters() -> None:
    found = [share(v) for v in (None, 0.0, 0.004, 0.126, 1.0, 9.999, 12.34, 123456.0, math.inf, math.nan)]
    assert found == ["exact", "0.00", "<0.01", "0.13", "1.00", "10.00", "12.3", "1.23e+05", "∞", "NaN"]
