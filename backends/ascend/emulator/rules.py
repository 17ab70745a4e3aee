"""What a rule is: a check of one call, as data, with the document that it is read from.

A check is a function of the call and of what the rule names, and returns what is wrong, or "". Arguments that are None
are not looked at, but by `given`; where an argument is a list of tensors, every one must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def same_shape(call: Call, name: str, other: str) -> str:
    found = {tuple(t.shape) for t in [*call.tensors(name), *call.tensors(other)]}
    return f"{name} and {other} must be of one shape, not {_either(found)}" if len(found) > 1 else ""


def contiguous(call: Call, name: str) -> str:
    return "" if all(t.is_contiguous() for t in call.tensors(name)) else f"{name} must be contiguous"


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
