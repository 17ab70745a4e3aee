"""The calls that DeepSeek-V4 makes of the CUDA backend, made on tensors without memory: each kind of call once.

The model itself makes them, at the size of a preset, in steps of every sort; so no shape is written down here that the
model could change. Shapes come from the backend `null`, and kernels are compiled in `ahead.compile_only`. Where the
backend has a composite as one kernel, its parts are called as well: another model of the same family, and the
conformance suite, call them alone. It lies outside the package, since a backend may not know the model.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backend import Facts
from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.cuda.autograd import BACKWARD
from dsv4_hal.backends.null import Null
from dsv4_hal.backends.triton_kernels.ahead import Compiled
from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.formats import FORMATS, Format, QTensor, Weight
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.config import preset
from dsv4_hal.model.step import Step as ModelStep
from dsv4_hal.model.transformer import Model
from dsv4_hal.model.weights import shapes_only
from dsv4_hal.numerics import numerics_for
from dsv4_hal.ops import KV, OPS, CompressorWeights

ROLLBACK = 4  # tokens that a cache may take back, for drafts


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
    """One kind of call of one step.

    inputs    the op's arguments by name, on the meta device
    result    what it returns: shapes
    part      whether only the body of a composite makes it, which the backend has as one
    count     how often the step makes it, over all layers
    launches  kernels that it launches, in order; none where the reference serves the op
    error     why it fails; ""
    """

    step: str
    op: str
    inputs: dict[str, Any]
    result: Any
    part: bool
    count: int = 0
    launches: list[Compiled] = field(default_factory=list)
    error: str = ""


def calls(model: str, mode: str, compiled: list[Compiled], steps: Iterable[str] = (*STEPS, "alone")) -> list[Call]:
    """What a preset calls of the backend in `steps` of STEPS, and in "alone": what no step calls.

    compiled  the list of `ahead.compile_only`
    The architecture is the one that is assumed (`backend.ASSUME`).
    """
    cfg, numerics = preset(model), numerics_for(mode)
    ops, watch = watched(Cuda(numerics, "meta"), vars(cfg), compiled)
    loaded = Model(cfg, ops, shapes_only(cfg, ops.repack))
    for watch.step in steps:
        if watch.step == "alone":
            _run_alone(loaded)
        else:
            _run(loaded, STEPS[watch.step])
    return list(watch.made.values())


def watched(cuda: Cuda, facts: Facts, compiled: list[Compiled]) -> tuple[Resolved, Watch]:
    """Ops that answer with shapes; what they ask of `cuda` on the way is watched."""
    null = Null(cuda.numerics)
    ops, shapes = resolve([cuda, null], facts), resolve([null])
    watch = Watch(cuda, compiled)
    native = {r.op for r in ops.resolutions if r.backend == cuda.name}
    for op, spec in OPS.items():
        if op in ("plan", "state_new"):  # what they return is the backend's own
            setattr(ops, op, getattr(cuda, op))
            continue
        answer = spec.definition.__get__(ops) if spec.composite else getattr(shapes, op)
        watched = op in native or not spec.composite  # another composite is its parts
        setattr(ops, op, watch(op, answer, op in native) if watched else answer)
    return ops, watch


class Watch:
    """Makes an op run on a backend the first time that a step calls it with such arguments.

    step  name of the step
    made  every kind of call, in order
    """

    def __init__(self, cuda: Cuda, compiled: list[Compiled]) -> None:
        self.cuda, self.compiled = cuda, compiled
        self.step, self.within = "", 0
        self.made: dict[Any, Call] = {}

    def __call__(self, op: str, answer: Callable[..., Any], native: bool) -> Callable[..., Any]:
        """`op`, answered by `answer`; native: whether it runs on the backend."""
        spec = OPS[op]
        signature = inspect.signature(spec.definition)

        @wraps(answer)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(None, *args, **kwargs)
            bound.apply_defaults()
            inputs = dict(list(bound.arguments.items())[1:])
            key = self.step, op, self.within > 0, tuple(kind(value) for value in inputs.values())
            new = key not in self.made
            found = self.made.setdefault(key, Call(self.step, op, inputs, None, self.within > 0))
            found.count += 1
            if new and native:
                self._run(found, args, kwargs)
            self.within += spec.composite
            try:
                found.result = answer(*args, **kwargs)
            finally:
                self.within -= spec.composite
            return found.result

        return call

    def _run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = len(self.compiled)
        try:
            getattr(self.cuda, call.op)(*args, **kwargs)
            if self.step == "alone" and call.op in BACKWARD:
                self._differentiate(call)
        except Exception as error:  # compilers raise what they like; the other calls are made all the same
            call.error = f"{type(error).__name__}: {error}".strip()
        call.launches = self.compiled[before:]

    def _differentiate(self, call: Call) -> None:
        """Gradients of an op that has kernels for them."""
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in call.inputs.items()
            if isinstance(value, Tensor) and name in OPS[call.op].grad
        }
        with torch.enable_grad():
            made = getattr(self.cuda, call.op)(**call.inputs | leaves)
        torch.autograd.grad(made, list(leaves.values()), torch.empty_like(made))


def kind(value: Any) -> Any:
    """What tells one argument from another kind of argument: all but values, names and addresses."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, QTensor):
        return value.format.name, getattr(value, "layout", ""), kind(value.data), kind(value.scale)
    if isinstance(value, KV):
        return value.layout, value.rows, kind(value.data)
    if isinstance(value, tuple):
        return tuple(kind(item) for item in value)
    return Batch if isinstance(value, Batch) else value  # a step has one batch


def _run(model: Model, step: Step) -> None:
    new, context = list(step.new), list(step.context)
    if not step.cached:
        model.step(_ids(sum(new)), Batch.packed(new, "meta"))
        return
    cache = filled(model, context, max(new))
    model.step(_ids(sum(new) + step.padding), cache.batch(new, padding=step.padding), cache)


def _run_alone(model: Model) -> None:
    """What no step calls."""
    cfg, ops, tokens = model.cfg, model.ops, 64
    shapes = Null(ops.numerics)
    batch = model.plan(Batch.packed([tokens], "meta"))
    x = torch.empty(tokens, cfg.hidden_size, dtype=ops.numerics.storage, device="meta")
    if model.mtp is not None:
        model.mtp(x[:, None].expand(-1, cfg.hc_mult, -1).contiguous(), x, ModelStep(_ids(tokens), batch))
    logits = torch.empty(tokens, cfg.vocab_size, dtype=ops.numerics.accumulate, device="meta")
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.7, 0.95)):
        ops.sample(logits, temperature, top_p)
    for fmt in FORMATS.values():
        if fmt.element == "e4m3":  # others wait for the device, to see whether they have codes for x
            ops.quantize(x, fmt)
        ops.dequantize(shapes.quantize(x, fmt), ops.numerics.storage)
    cache = filled(model, [512, 256], 1)
    for ratio in (r for r in (0, 4, 128) if r in cfg.layer_ratios):
        layer = cache.layers[cfg.layer_ratios.index(ratio)]
        for kv in (layer.window, layer.entries, layer.keys):
            if kv is not None:
                ops.kv_load(kv, cache.batch([1, 1]), 0, 0, 512 // kv.layout.ratio)
    cache.fork(0, 1)
    cache.truncate(0)


def filled(model: Model, context: Sequence[int], room: int) -> Cache:
    """A cache that holds `context` tokens of each sequence, with room for as many as `room` more in one step."""
    chunk = max(room, 1024)
    cache = model.new_cache(len(context), max(context) + chunk, chunk, ROLLBACK)
    for start in range(0, max(context), chunk):
        batch = cache.batch([min(chunk, max(0, length - start)) for length in context])
        cache.begin(batch)
        cache.commit(batch)
    return cache


def _ids(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device="meta")


def label(inputs: Mapping[str, Any]) -> str:
    """What a reader tells a call with these arguments by: its first tensor, its weights and its rows."""
    parts = [_shape(next((v for v in inputs.values() if isinstance(v, Tensor)), None))]
    for value in inputs.values():
        if isinstance(value, Weight):
            parts.append(f"{_LAYER.sub('', value.name)} {value.format.name} {_shape(value)}")
        elif isinstance(value, KV):
            parts.append(f"{value.layout.name} rows of {value.layout.ratio}")
        elif isinstance(value, Format):
            parts.append(value.name)
    if isinstance(inputs.get("weights"), CompressorWeights):
        parts.append(_LAYER.sub("", inputs["weights"].wkv.name).removesuffix(".wkv"))
    return ", ".join(part for part in parts if part)


_LAYER = re.compile(r"^layers\.\d+\.")


def _shape(value: Tensor | QTensor | None) -> str:
    return "" if value is None else "x".join(str(size) for size in value.shape)
