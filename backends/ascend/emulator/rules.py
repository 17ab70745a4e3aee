"""What a rule is: a check of one call, as data, with the document that it is read from.

A check is a function of the call and of what the rule names, and returns what is wrong, or "". Tensors that are not
given pass, but for `given`; where an argument is a list of tensors, every one must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.numbers import dtype_of, transposed


@dataclass(frozen=True)
class Call:
    """op, the SoC that it is made on, and all arguments by name."""

    op: str
    soc: str
    arguments: Mapping[str, Any]

    def tensors(self, name: str) -> list[Tensor]:
        """The tensors of an argument: none, one, or the members of a list."""
        value = self.arguments[name]
        if value is None:
            return []
        return [value] if isinstance(value, Tensor) else list(value)


Kind = Callable[..., str]
Check = tuple[Any, ...]
"""A kind and what it is about: (dtype, "x", torch.int8)."""


@dataclass(frozen=True)
class Rule:
    """op, the check, when it applies (all of these pass), and the document that says so."""

    op: str
    check: Check
    source: str
    when: tuple[Check, ...] = ()


class Refused(RuntimeError):
    """A call that a device would not take, or whose result nobody documents.

    op    the operator
    rule  the rule that it breaks; None where it is the operator's own meta kernel that refuses
    """

    def __init__(self, op: str, why: str, rule: Rule | None = None) -> None:
        super().__init__(f"{op}: refused by its {'rules' if rule else 'meta kernel'}: {why}")
        self.op, self.rule = op, rule


def rules(op: str, source: str, *checks: Check, when: tuple[Check, ...] = ()) -> tuple[Rule, ...]:
    """Rules of one operator from one document."""
    return tuple(Rule(op, check, source, when) for check in checks)


def complaint(check: Check, call: Call) -> str:
    """What is wrong with a call; "" if nothing is."""
    kind, *about = check
    said: str = kind(call, *about)
    return said


def applies(rule: Rule, call: Call) -> bool:
    return rule.op == call.op and not any(complaint(check, call) for check in rule.when)


# Kinds ----------------------------------------------------------------------------------------------------------------


def soc(call: Call, *names: str) -> str:
    """The operator, or what the rule's `when` describes, is there only on these SoCs."""
    return "" if call.soc in names else f"it is not on {call.soc}, only on {', '.join(names)}"


def given(call: Call, name: str) -> str:
    return "" if call.arguments[name] is not None else f"{name} must be given"


def absent(call: Call, name: str) -> str:
    return "" if call.arguments[name] is None else f"{name} must not be given"


def value(call: Call, name: str, *allowed: Any) -> str:
    """An argument that is no tensor is one of these, None among them if it may be left out."""
    got = call.arguments[name]
    got = tuple(got) if isinstance(got, list) else got
    return "" if got in allowed else f"{name} must be {_either(allowed)}, not {got!r}"


def code(call: Call, name: str, *allowed: torch.dtype | None) -> str:
    """An integer argument that stands for a dtype stands for one of these, None among them if it may be left out."""
    got = call.arguments[name]
    known = dtype_of(got)
    if known in allowed and (got is None) == (known is None):
        return ""
    return f"{name} must be {_either(allowed)}, not {got}"


def at_least(call: Call, name: str, low: float) -> str:
    """An argument that is a number."""
    got = call.arguments[name]
    return "" if got is None or got >= low else f"{name} must be at least {low}, not {got}"


def dtype(call: Call, name: str, *allowed: torch.dtype) -> str:
    wrong = [t.dtype for t in call.tensors(name) if t.dtype not in allowed]
    return f"{name} must be {_either(allowed)}, not {wrong[0]}" if wrong else ""


def same_dtype(call: Call, name: str, other: str) -> str:
    found = {t.dtype for t in [*call.tensors(name), *call.tensors(other)]}
    return f"{name} and {other} must be of one dtype, not {_either(found)}" if len(found) > 1 else ""


def rank(call: Call, name: str, *allowed: int) -> str:
    wrong = [t.dim() for t in call.tensors(name) if t.dim() not in allowed]
    return f"{name} must have {_either(allowed)} dimensions, not {wrong[0]}" if wrong else ""


def size(call: Call, name: str, axis: int, *allowed: int) -> str:
    wrong = [n for n in _sizes(call, name, axis) if n not in allowed]
    return f"dimension {axis} of {name} must be {_either(allowed)}, not {wrong[0]}" if wrong else ""


def multiple(call: Call, name: str, axis: int, of: int) -> str:
    wrong = [n for n in _sizes(call, name, axis) if n % of]
    return f"dimension {axis} of {name} must be a multiple of {of}, not {wrong[0]}" if wrong else ""


def between(call: Call, name: str, axis: int, low: int, high: int) -> str:
    wrong = [n for n in _sizes(call, name, axis) if not low <= n <= high]
    return f"dimension {axis} of {name} must lie between {low} and {high}, not be {wrong[0]}" if wrong else ""


def same_size(call: Call, name: str, axis: int, other: str, other_axis: int, times: int = 1) -> str:
    """Dimension `axis` of one is `times` dimension `other_axis` of the other."""
    for here in _sizes(call, name, axis):
        for there in _sizes(call, other, other_axis):
            if here != times * there:
                factor = f"{times} times " if times != 1 else ""
                return f"dimension {axis} of {name} is {here}, not {factor}dimension {other_axis} of {other}, {there}"
    return ""


def one_or(call: Call, name: str, axis: int, other: str, other_axis: int, times: int = 1) -> str:
    """Dimension `axis` is 1, or as `same_size` says."""
    return "" if set(_sizes(call, name, axis)) <= {1} else same_size(call, name, axis, other, other_axis, times)


def blocks(call: Call, name: str, axis: int, other: str, other_axis: int, of: int, packed: int = 1) -> str:
    """Dimension `axis` of one counts the blocks of `of` elements along the other's, which holds `packed` in each."""
    for here in _sizes(call, name, axis):
        for there in _sizes(call, other, other_axis):
            if here != -(-there * packed // of):
                return (
                    f"dimension {axis} of {name} is {here}, not {-(-there * packed // of)}, one for {of} along "
                    f"dimension {other_axis} of {other}"
                )
    return ""


def tail(call: Call, name: str, other: str) -> str:
    """The shape of one is the end of the other's."""
    for here in call.tensors(name):
        for there in call.tensors(other):
            if not 0 < here.dim() <= there.dim() or here.shape != there.shape[-here.dim() :]:
                return f"{name} {list(here.shape)} must be the end of {other} {list(there.shape)}"
    return ""


def broadcasts(call: Call, name: str, other: str) -> str:
    """Every dimension of one is 1 or the other's, the last one the other's."""
    for here in call.tensors(name):
        for there in call.tensors(other):
            fits = here.dim() == there.dim() and here.shape[-1] == there.shape[-1]
            if not fits or any(a not in (1, b) for a, b in zip(here.shape, there.shape, strict=True)):
                return f"{name} {list(here.shape)} does not spread over {other} {list(there.shape)}"
    return ""


def one_wide(call: Call, name: str) -> str:
    """At most one dimension in front of the last is not 1."""
    wrong = [list(t.shape) for t in call.tensors(name) if sum(n != 1 for n in t.shape[:-1]) > 1]
    return f"{name} must not vary along two axes in front of the last, as {wrong[0]} does" if wrong else ""


def is_transposed(call: Call, name: str) -> str:
    """A matrix lies in memory column by column."""
    return "" if all(transposed(t) for t in call.tensors(name)) else f"{name} must be a transposed view"


def turned_alike(call: Call, name: str, matrix: str) -> str:
    """Scales in pairs [.., K / 64, N, 2] lie in memory as their matrix [.., K, N] does: both turned, or neither."""
    for scale, of in zip(call.tensors(name), call.tensors(matrix), strict=True):
        told = scale.dim() > 2 and 1 not in (*scale.shape[-3:-1], *of.shape[-2:])  # with one row nobody can tell
        if told and transposed(of) != (scale.stride(-3) < scale.stride(-2)):
            return f"{name} must be {'' if transposed(of) else 'no '}transposed view, as {matrix} is"
    return ""


def is_plain(call: Call, name: str) -> str:
    """A matrix lies in memory row by row."""
    return "" if all(t.is_contiguous() for t in call.tensors(name)) else f"{name} must not be transposed"


def partition(call: Call, name: str, kind: str, rows: str, all_of_them: bool) -> str:
    """Where groups of rows end (`kind` 0), or how long they are: they fill all rows, or at most these."""
    for groups in call.tensors(name):
        sizes = groups.diff(prepend=groups.new_zeros(1)) if call.arguments[kind] == 0 else groups
        used, there = int(sizes.sum()), call.tensors(rows)[0].shape[0]
        if bool((sizes < 0).any()):
            return f"{name} must not go down"
        if used > there or (all_of_them and used != there):
            return f"{name} must be of {'' if all_of_them else 'at most '}{there} rows, those of {rows}, not {used}"
    return ""


def within(call: Call, name: str, low: int, high: int) -> str:
    """Every element lies between the two."""
    wrong = [t for t in call.tensors(name) if t.numel() and not (low <= int(t.min()) and int(t.max()) <= high)]
    return f"{name} must lie between {low} and {high}" if wrong else ""


def below(call: Call, name: str, other: str, axis: int) -> str:
    """Every element is an index of dimension `axis` of the other."""
    return "".join(within(call, name, 0, n - 1) for n in _sizes(call, other, axis))


def scattered(call: Call, name: str, indices: str, target: str) -> str:
    """updates [.., rest] for indices [.., a] of a target whose first a dimensions they name: in it, and none twice."""
    (into,), (at,), (values,) = call.tensors(target), call.tensors(indices), call.tensors(name)
    depth = at.shape[-1] if at.dim() else 0
    if at.dim() < 2 or depth > into.dim():
        return f"{indices} {list(at.shape)} must end in at most {into.dim()}, and have two dimensions"
    if tuple(values.shape) != (*at.shape[:-1], *into.shape[depth:]):
        return f"{name} {list(values.shape)} must be {[*at.shape[:-1], *into.shape[depth:]]}"
    rows = at.reshape(-1, depth)
    if bool(((rows < 0) | (rows >= rows.new_tensor(into.shape[:depth]))).any()):
        return f"{indices} must lie inside {target}"
    return "" if len(rows.unique(dim=0)) == len(rows) else f"{indices} must not name a place twice"


def same_shape(call: Call, name: str, other: str) -> str:
    found = {tuple(t.shape) for t in [*call.tensors(name), *call.tensors(other)]}
    return f"{name} and {other} must be of one shape, not {_either(found)}" if len(found) > 1 else ""


def members(call: Call, name: str, count: int) -> str:
    """A list of tensors has so many."""
    got = call.arguments[name]
    return "" if got is None or len(got) == count else f"{name} must hold {count} tensors, not {len(got)}"


# Asking ---------------------------------------------------------------------------------------------------------------


def broken(table: tuple[Rule, ...], call: Call) -> Iterator[tuple[Rule, str]]:
    """The rules that a call breaks, and what is wrong."""
    for rule in table:
        if applies(rule, call):
            said = complaint(rule.check, call)
            if said:
                yield rule, said


def _sizes(call: Call, name: str, axis: int) -> list[int]:
    """Of every tensor that has such a dimension: `rank` is asked for it apart."""
    return [t.shape[axis] for t in call.tensors(name) if -t.dim() <= axis < t.dim()]


def _either(allowed: Any) -> str:
    return " or ".join(str(item).removeprefix("torch.") for item in allowed)
