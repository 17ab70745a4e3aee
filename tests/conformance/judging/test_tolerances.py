"""docs/tolerances.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dsv4_hal.conformance.judging.tolerances import document

NUMBER = re.compile(r"\d\.\de-\d\d")
PUBLISHED = Path(__file__).parents[3] / "docs" / "tolerances.md"


def test_it_is_current() -> None:
    """Word for word; its numbers up to a factor of two: they are measured, and another processor adds otherwise."""
    published = PUBLISHED.read_text(encoding="utf-8")
    with torch.inference_mode():
        current = document()
    told = "generate it again: python -m dsv4_hal.conformance.judging.tolerances > docs/tolerances.md"
    assert NUMBER.sub("#", published) == NUMBER.sub("#", current), told
    for then, now in zip(NUMBER.findall(published), NUMBER.findall(current), strict=True):
        assert 0.5 <= float(then) / float(now) <= 2, told
