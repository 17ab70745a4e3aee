"""Whether two backends agree: running a case, comparing its results, and how far they may differ."""

from dsv4_hal.conformance.judging.budget import Budget, nmse
from dsv4_hal.conformance.judging.compare import (
    Comparison,
    bitwise,
    compare,
    run_case,
    selection,
    statistical,
    widen,
)
from dsv4_hal.conformance.judging.expected import Expected, expect

__all__ = [
    "Budget",
    "Comparison",
    "Expected",
    "bitwise",
    "compare",
    "expect",
    "nmse",
    "run_case",
    "selection",
    "statistical",
    "widen",
]
