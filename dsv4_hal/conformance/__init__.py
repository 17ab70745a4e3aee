"""Whether two backends agree: running a case, comparing its results, and how far they may differ."""

from dsv4_hal.conformance.judging.compare import (
    Budget,
    Comparison,
    bitwise,
    budget,
    compare,
    nmse,
    run_case,
    selection,
    statistical,
    widen,
)

__all__ = [
    "Budget",
    "Comparison",
    "bitwise",
    "budget",
    "compare",
    "nmse",
    "run_case",
    "selection",
    "statistical",
    "widen",
]
