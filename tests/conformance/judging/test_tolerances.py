"""docs/tolerances.md says what the code does, to the digit, whatever the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4_hal.conformance.judging import tolerances
from dsv4_hal.ops import OPS

PUBLISHED = (Path(__file__).parents[3] / "docs" / "tolerances.md").read_text(encoding="utf-8")
TOLD = "generate it again: python -m dsv4_hal.conformance.judging.tolerances > docs/tolerances.md"


@pytest.mark.parametrize("op", OPS)
def test_a_row_is_current(op: str) -> None:
    with torch.inference_mode():
        assert tolerances.row(OPS[op]) in PUBLISHED, TOLD


@pytest.mark.parametrize("op", [op for op, spec in OPS.items() if spec.grad])
def test_a_row_of_gradients_is_current(op: str) -> None:
    with torch.inference_mode():
        assert tolerances.gradient_row(OPS[op]) in PUBLISHED, TOLD


def test_the_text_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerances, "_widest", lambda spec, mode: "")
    text = [line for line in tolerances.document().splitlines() if not line.startswith("|")]
    assert text == [line for line in PUBLISHED.splitlines() if not line.startswith("|")], TOLD
