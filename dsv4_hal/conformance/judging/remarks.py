"""What is odd about a backend's class, and a reader of its report should know: it is no fault by itself."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from dsv4_hal.backend import Backend
from dsv4_hal.ops import OPS

NEAR = 0.85  # of 1: kv_stores is as near to kv_store as 0.94, router to route as 0.91


def remarks(cls: type[Backend]) -> list[str]:
    """Names that are nearly an op's, ops of its own that another base hides, and helpers of others that it replaces."""
    return [*_nearly(cls), *_hidden(cls), *_replaced(cls)]


def _nearly(cls: type[Backend]) -> Iterator[str]:
    mine = {name: c for c in reversed(cls.__mro__) if cls.owner(c) == cls.name for name in vars(c)}
    for name in mine:
        if name in OPS or name.startswith("_") or hasattr(Backend, name) or not callable(getattr(cls, name)):
            continue
        if near := get_close_matches(name, OPS, 1, NEAR):
            yield f"{name} is no op, and nothing calls it as one: is {near[0]} meant?"


def _hidden(cls: type[Backend]) -> Iterator[str]:
    for op, spec in OPS.items():
        definers = [c for c in cls.__mro__ if op in vars(c) and vars(c)[op] is not spec.definition]
        mine = [c for c in definers if cls.owner(c) == cls.name]
        if mine and definers[0] not in mine:
            first = definers[0]
            yield f"{op} of {_name(mine[0])} is not used: {_name(first)}, before it among the bases, has one too"


def _replaced(cls: type[Backend]) -> Iterator[str]:
    users: dict[str, list[str]] = {}
    for op in OPS:
        for helper in cls.replaced(op):
            users.setdefault(helper, []).append(op)
    for helper, ops in users.items():
        definer = next(c for c in cls.__mro__ if helper in vars(c) and cls.owner(c) != cls.name)
        yield f"{helper} replaces a helper of {_name(definer)}: its own code runs in {', '.join(ops)}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
