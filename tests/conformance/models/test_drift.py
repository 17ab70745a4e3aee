"""Budgets of a model's parts, on results that are made up."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.conformance.models.drift import Part, _part
from dsv4_hal.conformance.models.replay import Script
from dsv4_hal.conformance.models.run import ModelRun
from dsv4_hal.numerics import deployed


def run(logits: Tensor) -> ModelRun:
    seen = {"logits": logits}
    profile = deployed().to_dict()
    return ModelRun("vendor", "deployed", {}, Script(((1,),)), profile, {}, {}, {}, {}, [seen], [])


def test_logits_may_show_a_rounding_of_the_row_they_are_sums_of() -> None:
    """A last bit of bfloat16 in one element of a token's row; a wrong row is no such thing."""
    row, head = torch.randn(8, 64).bfloat16().float(), torch.randn(96, 64)
    want, flipped = row @ head.T, row.clone()
    flipped[3, 5] *= 1 + torch.finfo(torch.bfloat16).eps
    part = Part("vendor", None, None, "head")
    assert _part(part, "logits", run(flipped @ head.T), run(want), run(want), run(want)).verdict == "agrees"
    flipped[3] *= 1.05
    assert _part(part, "logits", run(flipped @ head.T), run(want), run(want), run(want)).verdict == "disagrees"
