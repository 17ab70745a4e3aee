"""Gradients of an op as a case calls it, and a check of them that needs no gradients.

The case runs as ever, but for its op: that is called with the tensors of its differentiable arguments as leaves, every
floating result is weighed by a random cotangent, and the gradients of the sum are what is compared. Another backend's
are compared with the reference's, element by element. The reference's are compared with slopes: central differences of
the naive oracle in float64, which knows nothing of autograd, along random directions of each leaf.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.judging.compare import Comparison, run_case
from dsv4_hal.conformance.judging.expected import Expected, rows
from dsv4_hal.dispatch import Resolved
from dsv4_hal.formats import QTensor, plain_format
from dsv4_hal.ops import KV, OPS, Case, Compare, Tolerance

GRADIENTS = Tolerance(Compare.NMSE, 4.0, "sums run in another order backwards, too")
DIRECTIONS = 3
# In float64, of functions and directions of size one: a truncation error of about h^2 and a rounding error of about
# 1e-16 / h, both far below float32's 1e-7; and a kink (a clamp, a relu) is hardly ever within h.
STEP = 1e-6
# An error of e times the gradient's norm shows along a random direction as a normal number of deviation e.
DEVIATIONS = 4.0

Arguments = dict[str, Any]
Values = dict[str, Tensor]


class NoGradient(Exception):
    """A result without a graph, or an argument that no gradient reaches. The message names the op and which."""


def gradients(op: str, case: Case, ops: Resolved) -> Values:
    """grad_<argument> -> gradient, for every differentiable argument of the op; NoGradient where there is none."""
    out: Values = {}

    def call(run: Callable[[Arguments], Any], given: Arguments) -> Any:
        leaves: Values = {}

        def leaf(name: str, t: Tensor) -> Tensor:
            leaves[name] = t.detach().requires_grad_()
            return leaves[name]

        result = run(changed(op, given, leaf))
        weighed = loss(op, case, result)
        if weighed is None:
            return result
        with ops.watch:
            found = torch.autograd.grad(weighed, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is None:
                raise NoGradient(f"{op}: no gradient reaches {name}")
            out[f"grad_{name}"] = gradient.contiguous()
        return result

    with torch.inference_mode(False), torch.enable_grad(), intercepted(ops, op, call):
        run_case(case, ops)
    if not out:
        raise ValueError(f"{case.id} calls {op} with nothing that has a gradient")
    return out


def loss(op: str, case: Case, result: Any) -> Tensor | None:
    """The floating results times random cotangents; None where there are none. Infinities (no key at all) count 0."""
    generator = seeded(case, "cotangent")
    total = None
    for number, t in enumerate(floating(result)):
        if torch.is_grad_enabled() and not t.requires_grad:
            raise NoGradient(f"{op}: result {number} has no graph, so that no argument gets a gradient")
        cotangent = torch.randn(t.shape, generator=generator).to(t.dtype).to(t.device)
        part = (torch.where(t.isfinite(), t, 0) * cotangent).sum()
        total = part if total is None else total + part.to(total.dtype)
    return total


def slopes(op: str, case: Case, ops: Resolved) -> Values:
    """grad_<argument> -> slopes [DIRECTIONS] of the same sum along `directions`, by central differences. Needs no
    autograd, but ops in float64."""
    out: Values = {}

    def call(run: Callable[[Arguments], Any], given: Arguments) -> Any:
        result = run(given)
        if loss(op, case, result) is None:
            return result
        leaves: Values = {}
        changed(op, given, lambda name, t: leaves.setdefault(name, t))

        def moved(leaf: str, by: Tensor) -> Tensor:
            there = changed(op, given, lambda name, t: t.double() + by if name == leaf else t)
            total = loss(op, case, run(there))
            assert total is not None
            return total

        for name, value in leaves.items():
            size = float(value.double().square().nanmean().sqrt())
            step = STEP * (size if size > 0 else 1.0)
            out[f"grad_{name}"] = torch.stack(
                [(moved(name, step * v) - moved(name, -step * v)) / (2 * step) for v in directions(case, name, value)]
            )
        return result

    with torch.no_grad(), intercepted(ops, op, call):
        run_case(case, ops)
    return out


def compare_slopes(
    case: Case, got: Mapping[str, Tensor], want: Mapping[str, Tensor], budgets: Mapping[str, float]
) -> dict[str, Comparison]:
    """Gradients against slopes."""
    if got.keys() != want.keys():
        return {"results": Comparison(False, {}, f"results are {sorted(got)}, expected {sorted(want)}")}
    return {name: _compare_slopes(case, name, got[name].double(), want[name], budgets[name]) for name in want}


def slope_budgets(expected: Expected) -> dict[str, float]:
    """How far gradients may be from slopes, as a share of the gradient's norm: by their slack, and since slopes were
    never rounded to the dtype of their leaf. A rounding adds an error of eps / 2 times a uniform number in -1 .. 1,
    whose deviation is 3^-1/2."""
    out = {}
    for name, gradient in expected.results.items():
        slack, norm = rows(expected.exactly[name]) * 0 + expected.slack[name], float(expected.exactly[name].norm())
        out[name] = (float(slack.norm()) / norm if norm else 0.0) + torch.finfo(gradient.dtype).eps / 12**0.5
    return out


def _compare_slopes(case: Case, name: str, gradient: Tensor, want: Tensor, budget: float) -> Comparison:
    claimed = torch.stack([(gradient * v).sum() for v in directions(case, name.removeprefix("grad_"), gradient)])
    off, size = float((claimed - want).abs().max()) / DEVIATIONS, float(gradient.norm())
    share = off / size if size else (math.inf if off else 0.0)
    wrong = "" if share <= budget else f"slopes {claimed.tolist()}, central differences {want.tolist()}"
    return Comparison(not wrong, {"nmse": share**2, "max_rel": 0.0}, wrong, share / budget)


def directions(case: Case, name: str, like: Tensor) -> list[Tensor]:
    generator = seeded(case, name)
    return [torch.randn(like.shape, generator=generator).double() for _ in range(DIRECTIONS)]


def seeded(case: Case, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{case.id} {what}".encode()))


@contextmanager
def intercepted(ops: Resolved, op: str, call: Callable[[Callable[[Arguments], Any], Arguments], Any]) -> Iterator[None]:
    """While this lasts, `op` is called through call(run, arguments)."""
    run, signature = getattr(ops, op), inspect.signature(OPS[op].definition)

    def outer(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(None, *args, **kwargs)

        def inner(given: Arguments) -> Any:
            bound.arguments.update(given)
            return run(*bound.args[1:], **bound.kwargs)

        return call(inner, dict(bound.arguments))

    setattr(ops, op, outer)
    try:
        yield
    finally:
        setattr(ops, op, run)


def changed(op: str, given: Arguments, change: Callable[[str, Tensor], Tensor]) -> Arguments:
    """The arguments, with change(name, tensor) in place of every tensor that has a gradient."""
    return {name: _changed(value, name, change) if name in OPS[op].grad else value for name, value in given.items()}


def _changed(value: Any, name: str, change: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, QTensor) and value.format.plain:
        data = change(name, value.data)
        return replace(value, data=data, format=plain_format(data.dtype))
    if isinstance(value, KV) and not value.paged:
        return replace(value, data=change(name, value.data))
    if isinstance(value, tuple):  # CompressorWeights
        fields = value._fields  # type: ignore[attr-defined]
        return type(value)(*(_changed(v, f"{name}_{f}", change) for f, v in zip(fields, value, strict=True)))
    return value


def floating(result: Any) -> Iterator[Tensor]:
    """Floating tensors of a result."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, KV):
        yield from floating(result.data)
    elif isinstance(result, tuple):
        for part in result:
            yield from floating(part)
