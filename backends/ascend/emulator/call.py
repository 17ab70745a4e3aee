"""How an emulated operator is declared, and what a call goes through before it is computed.

    @emulated("npu::npu_swiglu")
    def npu_swiglu(input: Tensor, dim: int) -> Tensor: ...

1. torch's dispatcher holds the call against the schema, the real one of torch_npu for `npu::`.
2. The operator's own meta kernel is run on the shapes and dtypes; what it returns, the body must return.
3. The rules for the operator are asked, of `rule_table` or of its own, on what the meta kernels let through.
4. The body, a function with the schema's argument names, is called with all arguments by name, defaults filled in;
   its results become contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.emulator.rule_table import RULES
from dsv4_hal.backends.ascend.emulator.rules import Call, Refused, Rule, broken

Body = Callable[..., Any]


@dataclass(frozen=True)
class Meta:
    """Why an operator's meta kernel is not the last word on what it returns.

    asked    whether it is called at all: what it refuses is refused
    reason   why its answer is not compared with the result
    results  which results are not compared, by their place; none: no result is
    """

    asked: bool
    reason: str
    results: tuple[int, ...] = ()


@dataclass(frozen=True)
class Op:
    """An emulated operator.

    name    with its namespace, and its overload behind a point: "npu::npu_format_cast.Tensor"
    body    computes it
    schema  arguments and results, for operators that torch_npu does not bring; "" where it does
    meta    None: the meta kernel is asked, and the result is what it says
    rules   of an operator that torch_npu does not bring, beside its body; the others stand in `rule_table`
    """

    name: str
    body: Body
    schema: str = ""
    meta: Meta | None = None
    rules: tuple[Rule, ...] = ()

    @property
    def overload(self) -> Any:
        namespace, _, name = self.name.partition("::")
        base, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")


OPS: dict[str, Op] = {}
"""Every emulated operator, by name: what the files of operators declare when they are imported."""


@dataclass
class _State:
    soc: Soc | None = None
    libraries: list[torch.library.Library] = field(default_factory=list)  # registrations end when these are freed


_STATE = _State()


def emulated(
    name: str, *, schema: str = "", meta: Meta | None = None, rules: tuple[Rule, ...] = ()
) -> Callable[[Body], Body]:
    """Declare the decorated function as the emulation of `name`. ValueError for a name that is declared already."""

    def declare(body: Body) -> Body:
        if name in OPS:
            raise ValueError(f"{name} is declared twice: by {OPS[name].body.__module__} and {body.__module__}")
        if (meta is None or meta.asked) and schema:
            raise ValueError(f"{name} has no meta kernel: say so with meta=NO_META")
        OPS[name] = Op(name, body, schema, meta, rules)
        return body

    return declare


def no_meta(reason: str) -> Meta:
    """The operator has no meta kernel, or one that refuses what the operator is documented to take."""
    return Meta(False, reason)


def meta_differs(reason: str, results: tuple[int, ...] = ()) -> Meta:
    """The meta kernel is asked for its objections, not for shapes and dtypes, or those of these results, where it is
    wrong."""
    return Meta(True, reason, results)


NO_META = no_meta("its C++ meta kernel belongs to a package that is not installed")


def current() -> Soc | None:
    """The SoC that this process emulates, if it does."""
    return _STATE.soc


def register(soc: Soc) -> None:
    """Give every declared operator its CPU implementation, as on `soc`. RuntimeError if that was done before, or if a
    package that brings operators of its own is loaded."""
    if _STATE.soc is not None:
        raise RuntimeError(f"operators are emulated already, as on {_STATE.soc.title}")
    libraries: dict[tuple[str, str], torch.library.Library] = {}
    for op in OPS.values():
        namespace, _, name = op.name.partition("::")
        kind = "DEF" if op.schema else "IMPL"
        library = libraries.get((namespace, kind)) or torch.library.Library(namespace, kind)
        libraries[namespace, kind] = library
        if op.schema:
            library.define(name + op.schema)
        for key in _keys(op):
            library.impl(name, partial(_called, op), key)
    _STATE.libraries += libraries.values()
    _STATE.soc = soc


def _keys(op: Op) -> tuple[str, ...]:
    """Where torch's dispatcher looks for an implementation: by a tensor's device, or without one."""
    tensors = any(str(argument.type) in ("Tensor", "List[Tensor]") for argument in op.overload._schema.arguments)
    return ("CPU",) if tensors else ("CPU", "BackendSelect")


def _called(op: Op, *args: Any, **kwargs: Any) -> Any:
    assert _STATE.soc is not None  # it is registered
    overload = op.overload
    arguments = _bound(overload._schema, args, kwargs)
    expected = _from_meta(op, overload, arguments)
    for rule, said in broken((*RULES, *op.rules), Call(op.name, _STATE.soc.name, arguments)):
        raise Refused(op.name, f"{said} ({rule.source})", rule)
    made = _plain(op.body(**arguments), arguments)
    wrong = _difference(op, made, expected)
    if wrong:
        raise AssertionError(f"{op.name}: {wrong}: an error of the emulator, or a case for a Meta of its own")
    return made


def _plain(made: Any, arguments: Mapping[str, Any]) -> Any:
    """Results as a device allocates them, row by row, whatever the arguments' strides; but for what is an argument."""
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return tree_map_only(Tensor, lambda t: t if any(t is other for other in given) else t.contiguous(), made)


def _difference(op: Op, made: Any, expected: Any) -> str:
    """Where a result is not what the meta kernel says; "" where it is, or was not asked."""
    skipped = op.meta.results if op.meta is not None else ()
    if op.meta is not None and not skipped:
        return ""
    for place, (got, said) in enumerate(zip(_described(made), _described(expected), strict=True)):
        if place not in skipped and got != said:
            return f"result {place} is {got}, the meta kernel says {said}"
    return ""


def _bound(schema: torch._C.FunctionSchema, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name. The dispatcher leaves those out that are at their defaults."""
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def _from_meta(op: Op, overload: Any, arguments: Mapping[str, Any]) -> Any:
    if op.meta is not None and not op.meta.asked:
        return None
    shapes = tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), arguments
    )
    schema = overload._schema
    positional = [shapes[a.name] for a in schema.arguments if not a.kwarg_only]
    named = {a.name: shapes[a.name] for a in schema.arguments if a.kwarg_only}
    try:
        said = overload(*positional, **named)
    except Exception as error:  # of whatever kind: it is the vendor's
        raise Refused(op.name, str(error).strip()) from error
    return said


def _described(result: Any) -> list[str]:
    return [
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in tree_leaves(result, is_leaf=lambda leaf: leaf is None)
    ]
