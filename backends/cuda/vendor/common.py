"""What the parts of `cuda-vendor` share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dsv4_hal.backend import Verdict
from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.batch import Batch
from dsv4_hal.numerics import Numerics


class Base(Cuda):
    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        super().__init__(numerics, device)
        self._kept: Any = WeakTensorKeyDictionary()

    def once(self, of: Tensor, make: Callable[[], Any]) -> Any:
        """What is made of a weight's tensor, kept as long as that lives; made anew of one that is trained."""
        if of.requires_grad:
            return make()
        if of in self._kept:
            return self._kept[of]
        made = make()
        if made is not of:  # a tensor that was kept for itself would live for ever
            self._kept[of] = made
        return made


def own_kernel(op: str, verdict: Verdict) -> None:
    """Say, once, that a call runs on the kernel of the CUDA backend, and why."""
    warnings.warn(f"cuda-vendor: {op} runs on the kernel of cuda: {verdict.reason}", stacklevel=3)


def once_a_step(batch: Batch, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What every layer of a step needs. A fixed batch's plan outlives the step: there it is made for every layer."""
    plan = batch.require_plan().vendor
    if batch.fixed:
        return make()
    if key not in plan:
        plan[key] = make()
    return plan[key]


def visible(batch: Batch, ratio: int) -> Tensor:
    """Entries [T] that each token sees; padding tokens see none."""
    return torch.where(batch.seq >= 0, (batch.positions + 1) // ratio, 0)
