"""The calls that DeepSeek-V4 makes of the CUDA backend, made on tensors without memory: each kind of call once.

The model itself makes them, at the size of a preset, in steps of every sort; so no shape is written down here that the
model could change. Shapes come from the backend `null`, and kernels are compiled in `ahead.compile_only`. Where the
backend has a composite as one kernel, its parts are called as well: another model of the same family, and the
conformance suite, call them alone. It lies outside the package, since a backend may not know the model.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backend import Verdict
from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.null import Null
from dsv4_hal.backends.triton_kernels.ahead import Compiled
from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.formats import FORMATS, QTensor, Weight
from dsv4_hal.model.config import preset
from dsv4_hal.model.transformer import Model
from dsv4_hal.model.weights import shapes_only
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import KV, OPS


@dataclass(frozen=True)
class Step:
    """new tokens of each sequence behind those already there, and padding; cached: with pools, or packed without."""

    new: tuple[int, ...]
    context: tuple[int, ...] = ()
    padding: int = 0
    cached: bool = True


# 64 sequences of a decode step, of which one completes an entry of both ratios and some one of ratio 4.
_LONG = tuple(8191 + 97 * i for i in range(64))
STEPS: Mapping[str, Step] = MappingProxyType(
    {
        "decode": Step((1,) * 64, _LONG),
        "single": Step((1,), (16382,)),
        "draft": Step((4,) * 16, _LONG[:16]),
        "prefill": Step((4096,), (4096,)),
        "mixed": Step((517, 1, 0, 3, 1, 250), (0, 8190, 77, 1001, 5, 640), padding=5),
        "packed": Step((1024, 301), cached=False),
    }
)


@dataclass
class Call:
    """One kind of call.

    step      the step it was first made in
    inputs    the op's arguments by name, on the meta device
    result    what it returned: shapes
    launches  kernels that it launched, in order
    error     why it failed; ""
    """

    step: str
    op: str
    inputs: dict[str, Any]
    result: Any
    launches: list[Compiled]
    error: str = ""
    seconds: float = 0.0


class Elsewhere(Cuda):
    """The backend as it would be on another device: on the meta device, whatever GPU this machine has."""

    device_type = "meta"

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True, "compiles, and runs nothing")


def calls(model: str, numerics: Numerics, compiled: list[Compiled]) -> Iterator[Call]:
    """Every kind of call that a preset makes in STEPS; `compiled` is what `ahead.compile_only` lists.

    The architecture is the one assumed (`devices.ASSUME`).
    """
    cfg = preset(model)
    cuda, null = Elsewhere(numerics), Null(numerics)
    ops = resolve([cuda, null], vars(cfg))
    native = [r.op for r in ops.resolutions if r.backend == cuda.name]
    shapes = resolve([null])
    made: list[Call] = []
    watch = _Watch(cuda, compiled, made)
    for op in OPS:
        # a composite's body runs on `ops`, so that its parts are called, and watched, too
        answer = OPS[op].definition.__get__(ops) if OPS[op].composite else getattr(shapes, op)
        answer = cuda.plan if op == "plan" else answer
        setattr(ops, op, watch(op, answer) if op in native and op != "plan" else answer)
    weights = shapes_only(cfg, cuda.repack)
    model_ = Model(cfg, ops, weights)
    for watch.step, step in STEPS.items():
        _run(model_, step)
        yield from made
        made.clear()
    watch.step = "alone"
    _alone(ops, weights, model_)
    yield from made
