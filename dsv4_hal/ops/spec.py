"""How an op is declared.

An op is a method of one of the family classes in this package: a signature, a docstring, and
- for a primitive, a body that is its preconditions: it raises ContractError or falls through; a backend supplies the
  arithmetic, and the reference backend's arithmetic is the op's meaning;
- for a composite, a body that is its definition in terms of other ops; a backend may override it with a fused kernel,
  which must equal it, and then answers for the preconditions itself.
Tensors that an op reads may have any strides. Results are contiguous, unless the caller's own `out` is not.
The decorator adds how results are compared, how far they may differ and why, the cases to try, and what has gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved

F = TypeVar("F", bound=Callable[..., Any])


class ContractError(ValueError):
    """A precondition of an op does not hold. The message names the op and what is wrong."""


def check_out(op: str, out: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """An `out` must be exactly what the op would return: nothing is broadcast or cast into it."""
    if out is not None and (tuple(out.shape) != tuple(shape) or out.dtype != dtype):
        raise ContractError(f"{op}: out is {out.dtype} {tuple(out.shape)}, the result {dtype} {tuple(shape)}")


def check_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    """An activation must be stored as the profile says: no op casts what it is given without saying so."""
    if x.dtype != dtype:
        raise ContractError(f"{op}: {name} must be {dtype} in this profile, got {x.dtype}")


class Compare(Enum):
    """How two results of an op are compared, after dtype, shape and device."""

    BITWISE = "bitwise"  # every bit equal
    NMSE = "nmse"  # element by element, within what float32 may make of it
    SELECTION = "selection"  # picks: valid, distinct, visible; sets equal up to a margin of scores
    STATISTICAL = "statistical"  # a distribution, by many draws


@dataclass(frozen=True)
class Tolerance:
    """How far a backend may be from the reference.

    factor  how many times the errors of float32, as `dsv4_hal/conformance/judging/account.py` states them, a backend's
            may be; unused for BITWISE
    why     one sentence: what may legitimately differ
    """

    compare: Compare
    factor: float
    why: str


# Size classes of cases, each run with those before it. A backend runs those that it can afford.
#   tiny         small in every way: at most 8 tokens, 4 heads, and rows and columns of 512
#   interpreted  within the same bounds, but rows as wide as the published models' where a kernel's tiling hangs on
#                them: what a kernel under an interpreter, hundreds of times slower, still gets through
#   quick        longer and ragged steps: what is run by default
#   full         widths of the published models, with at most 64 tokens and 8 experts
SIZES = ("tiny", "interpreted", "quick", "full")


@dataclass(frozen=True)
class Case:
    """One call to try. `id` is unique and seeds the generator; `run` makes its inputs from the
    generator (on the CPU), calls the op, and returns every result by name, mutated state included.

    size        one of SIZES
    grad        whether it is a case for the op's gradients as well
    function    what `run` calls, and with which `parameters`: those that the id names
    """

    id: str
    run: Callable[[Resolved, torch.Generator], dict[str, Tensor]]
    size: str = "tiny"
    grad: bool = False
    function: Callable[..., dict[str, Tensor]] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


Cases = Iterable[Case]


@dataclass(frozen=True)
class OpSpec:
    """grad  parameters that have gradients, in a profile that rounds nothing: from every floating result of the op to
    every floating tensor in them, where they hold plain values (not quantised ones, and no pool). A product with a
    padding token's row reaches the gradient of a weight: these rows must be finite where there are gradients"""

    name: str
    family: str
    composite: bool
    tolerance: Tolerance
    cases: Callable[[], Cases]
    definition: Callable[..., Any]
    grad: tuple[str, ...] = ()

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.definition) or ""


_REGISTRY: dict[str, OpSpec] = {}
OPS: Mapping[str, OpSpec] = MappingProxyType(_REGISTRY)


def _declare(
    tolerance: Tolerance, cases: Callable[[], Cases], grad: tuple[str, ...], composite: bool
) -> Callable[[F], F]:
    def register(definition: F) -> F:
        name = definition.__name__
        if name in _REGISTRY:
            raise ValueError(f"op {name} is declared twice")
        family = definition.__module__.rsplit(".", 1)[-1]
        unknown = set(grad) - set(inspect.signature(definition).parameters)
        if unknown:
            raise ValueError(f"op {name} has no parameter {', '.join(sorted(unknown))} to have a gradient")
        _REGISTRY[name] = OpSpec(name, family, composite, tolerance, cases, definition, grad)
        return definition

    return register


def primitive(tolerance: Tolerance, cases: Callable[[], Cases], grad: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Declare an op whose body is its preconditions; `grad` as in OpSpec."""
    return _declare(tolerance, cases, grad, composite=False)


def composite(tolerance: Tolerance, cases: Callable[[], Cases], grad: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Declare an op whose body is its definition in other ops; `grad` as in OpSpec."""
    return _declare(tolerance, cases, grad, composite=True)
