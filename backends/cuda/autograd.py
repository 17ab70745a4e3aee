"""Gradients of ops that run as kernels, which leave no graph behind.

Where gradients are wanted, an op runs as a torch.autograd.Function: forwards it is the kernel; backwards a derivative
from BACKWARD, or, for all other ops, what the op means is computed again and differentiated by torch: a primitive by
the reference, a composite by its definition in the contract, on this backend's own ops. Where none are wanted, the
kernel is called as ever. Gradients have no graph, and so no gradients of their own: who asks for them gets an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backend import Backend
from dsv4_hal.backends.reference import Reference
from dsv4_hal.backends.reference.cache import load_rows, physical_rows
from dsv4_hal.backends.triton_kernels import backward as kernels
from dsv4_hal.batch import Batch
from dsv4_hal.formats import QTensor
from dsv4_hal.ops import KV, OPS

Arguments = dict[str, Any]
Gradients = Mapping[str, Tensor | None]

CARRIERS = (QTensor, KV)  # dataclasses with tensors among their fields


class Differentiable:
    """A backend of this base gives gradients to every op with a specified one that is not the reference's already."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for op, spec in OPS.items():
            owner = next(c for c in cls.__mro__ if op in vars(c))
            done = owner is not cls and issubclass(owner, Differentiable)
            defined = vars(owner)[op] is spec.definition  # its parts have gradients
            if spec.grad and not done and not defined and owner not in Reference.__mro__:
                setattr(cls, op, differentiable(op, vars(owner)[op]))


def differentiable(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The method `kernel` of a backend, with gradients."""
    signature = inspect.signature(OPS[op].definition)

    @wraps(kernel)
    def call(self: Backend, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors((*args, *kwargs.values()))):
            return kernel(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        out = given.pop("out", None)
        with torch.no_grad():
            result = kernel(self, **given)
        form, made = taken_apart(result)
        if any(t.is_floating_point() for t in made):
            arguments, inputs = taken_apart(given)
            choice = made[0].detach() if op in CHOICES else None
            made = list(_Op.apply(Call(self, op, arguments, choice), made, *inputs))
        if out is not None:
            made[0] = out.copy_(made[0])  # which torch differentiates
        return filled(form, made)

    return call


@dataclass(frozen=True)
class Hole:
    """Stands for a tensor, by its number. Tensors themselves are torch's to keep, and to free."""

    number: int


@dataclass(frozen=True)
class Call:
    """A call whose gradients are wanted.

    arguments  by name, holes in place of tensors
    choice     what the op chose, for an op of CHOICES
    """

    backend: Backend
    op: str
    arguments: Arguments
    choice: Tensor | None

    def gradients(
        self, inputs: Sequence[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> Iterator[Tensor | None]:
        """Those of the needed inputs, from those of the results; None for what has none."""
        names = [name for name, value in self.arguments.items() for _ in holes(value)]
        wanted = {name for name, need in zip(names, needed, strict=True) if need}
        derive = BACKWARD.get(self.op)
        if derive is None or not wanted <= set(OPS[self.op].grad):
            return self.again(inputs, needed, given)
        found = {} if given[0] is None else dict(derive(self.backend, filled(self.arguments, inputs), wanted, given[0]))
        return (found.pop(name, None) if need else None for name, need in zip(names, needed, strict=True))

    def again(
        self, inputs: Sequence[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> Iterator[Tensor | None]:
        """The same, by differentiating what the op means."""
        if any(isinstance(value, Batch) and value.cached for value in self.arguments.values()):
            raise RuntimeError(f"{self.op}: gradients are of packed steps only; what a cache held may be gone")
        spec = OPS[self.op]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
            arguments = filled(self.arguments, leaves)
            if spec.composite:
                result = spec.definition(self.backend, **arguments)
            else:
                reference = Reference(self.backend.numerics, self.backend.device)
                if self.choice is not None:
                    result = CHOICES[self.op](reference, arguments, self.choice)
                else:
                    result = getattr(reference, self.op)(**arguments)
        pairs = zip(tensors(result), given, strict=True)
        roots = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
        sought = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad([t for t, _ in roots], sought, [g for _, g in roots], allow_unused=True)
        rest = iter(found)
        return (next(rest) if leaf.requires_grad else None for leaf in leaves)


class _Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, made: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{ctx.call.op}: kernels have no second derivatives (create_graph=True)")
        inputs = ctx.saved_tensors
        found = ctx.call.gradients(inputs, ctx.needs_input_grad[2:], given)
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(found, inputs, strict=True))
        return None, None, *cast


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Arguments or results, with change(x) in place of every x of a kind, in order. What a batch holds stays."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, CARRIERS):
        made = copy(value)
        for field in fields(value):
            object.__setattr__(made, field.name, mapped(getattr(value, field.name), kind, change))
        return made
    if isinstance(value, dict):
        return {name: mapped(part, kind, change) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [mapped(part, kind, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, Tensor, found.append)
    return found


def holes(value: Any) -> list[Hole]:
    found: list[Hole] = []
    mapped(value, Hole, found.append)
    return found


def taken_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """The value with holes for its tensors, and these."""
    found: list[Tensor] = []

    def hole(t: Tensor) -> Hole:
        found.append(t)
        return Hole(len(found) - 1)

    return mapped(value, Tensor, hole), found


def filled(value: Any, by: Sequence[Tensor]) -> Any:
    return mapped(value, Hole, lambda hole: by[hole.number])


def _route(reference: Reference, given: Arguments, ids: Tensor) -> tuple[Tensor, Tensor]:
    return reference.route(**{**given, "picks": ids})


def _index_topk(reference: Reference, given: Arguments, picks: Tensor) -> tuple[Tensor, Tensor]:
    q, weights, keys, batch = (given[name] for name in ("q", "weights", "keys", "batch"))
    none = (picks < 0).all(1)  # a padding token: whatever it holds, it gets no gradient
    q, weights = q.masked_fill(none[:, None, None], 0), weights.masked_fill(none[:, None], 0)
    rounded = formats.round_rows(q.flatten(0, 1), keys.layout).view(q.shape)
    rows = load_rows(keys, physical_rows(keys, batch, batch.seq.clamp(min=0), picks))
    scores = reference._index_scores(rounded[:, None], weights[:, None], rows)[:, 0]
    return picks, scores.masked_fill(picks < 0, float("-inf"))


# Ops whose first result is a choice: computed again, it is to be the same, also where two scores are nearly equal.
CHOICES: Mapping[str, Callable[[Reference, Arguments, Tensor], Any]] = MappingProxyType(
    {"route": _route, "index_topk": _index_topk}
)


def _rms_norm(backend: Backend, given: Arguments, wanted: set[str], gradient: Tensor) -> Gradients:
    x, weight = kernels.rms_norm(gradient, given["x"], given["weight"], given["eps"])
    return {"x": x, "weight": weight}


def _rope(backend: Backend, given: Arguments, wanted: set[str], gradient: Tensor) -> Gradients:
    return {"x": backend.rope(gradient, given["cos_sin"], not given.get("inverse", False))}


def _swiglu(backend: Backend, given: Arguments, wanted: set[str], gradient: Tensor) -> Gradients:
    gate_up, weight = kernels.swiglu(gradient, given["gate_up"], given["limit"], given.get("row_weight"))
    return {"gate_up": gate_up, "row_weight": weight}


def _linear(backend: Backend, given: Arguments, wanted: set[str], gradient: Tensor) -> Gradients:
    """Two more products, of values as they are stored if both are stored alike, else in numerics.accumulate."""

    def product(left: Tensor, right: Tensor | QTensor) -> Tensor:
        wide = backend.numerics.accumulate
        if isinstance(right, QTensor):
            right = right.data if right.format.plain else backend.dequantize(right, wide)
        return left @ right if left.dtype == right.dtype else left.to(wide) @ right.to(wide)

    found: dict[str, Tensor | None] = {}
    if "x" in wanted:
        found["x"] = product(gradient, given["w"])
    if "w" in wanted:
        found["w"] = product(gradient.T, given["x"])
    return found


# Derivatives: backend, arguments, names of those that need a gradient, gradient of the result -> gradients by name.
BACKWARD: Mapping[str, Callable[[Backend, Arguments, set[str], Tensor], Gradients]] = MappingProxyType(
    {"rms_norm": _rms_norm, "rope": _rope, "swiglu": _swiglu, "linear": _linear}
)
