"""What a backend is: an implementation of the ops, and what it says about itself.

A new accelerator subclasses a backend that works (the reference runs on any torch device), names its device, and
overrides op by op. Differences inside one vendor are data that its `supports` and `row_layout` consult.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import CodeType, MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from dsv4_hal.formats import RowLayout, plain_rows
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import OPS, Ops

Facts = Mapping[str, Any]
"""Static facts of a model that a backend may refuse an op for: widths, head counts, ratios, formats, by the names of
config.json. Of a case of the contract only those that its arguments tell; none where there is no model."""


UNRESTRICTED = "no restriction"
"""Reason of a verdict that has nothing to say."""


ASSUME = "DSV4_HAL_ASSUME"
"""Environment variable, and key `assume` of a run: the device to choose kernels for, without having it."""

T = TypeVar("T")


def assumed(known: Mapping[str, T], kind: str) -> T | None:
    """Which of a backend's devices, by name, is assumed; None where none is. kind: what they are, in the ValueError
    that names the nearest one for a name that is not known."""
    name = os.environ.get(ASSUME)
    if name is None or name in known:
        return None if name is None else known[name]
    near = get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{ASSUME}={name}: no such {kind}; known are {', '.join(known)}{hint}")


class BackendError(RuntimeError):
    """A backend that was asked for cannot be used. The message says which and why."""


def described(error: BaseException) -> str:
    """Kind and text of an exception, whose text may be code of a backend that fails as well."""
    try:
        text = str(error)
    except BaseException as worse:
        text = f"(its text raises {type(worse).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Verdict:
    """Whether something can be used, why or why not, and what would make it usable ("" where nothing would)."""

    ok: bool
    reason: str
    remedy: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Origin:
    """Where a backend's implementation of an op comes from.

    kind     "native": the backend's own, or another's with a helper that is its own; "inherited": another backend's,
             through subclassing; "composite": the contract's definition in other ops; "missing": a primitive it does
             not have
    backend  name of the backend whose code it is ("" for composite and missing)
    """

    kind: str
    backend: str = ""


class Backend(Ops):
    """Base class of backends: ops (see `dsv4_hal.ops`), device, numeric profile, and verdicts.

    name            what the user calls it
    device_type     torch device it computes on by default
    automatic       whether `backend: auto` may choose it where it is available
    affords         the largest size class of cases that it gets through in reasonable time (`dsv4_hal.ops.SIZES`):
                    "interpreted" for kernels under an interpreter
    differentiable  whether its ops have gradients; False for a backend that is for inference only
    collectives     name under which torch.distributed knows the collectives of its devices
    adopts          op -> why another backend's code, inherited or behind it, is what its devices should run: there is
                    no kernel to write. `strict` accepts it, and nothing counts it as the backend's own
    """

    name: ClassVar[str] = ""
    device_type: ClassVar[str] = "cpu"
    automatic: ClassVar[bool] = True
    affords: ClassVar[str] = "full"
    differentiable: ClassVar[bool] = True
    collectives: str = "gloo"
    adopts: Mapping[str, str] = MappingProxyType({})

    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        verdict = self.available()
        if not verdict:
            raise BackendError(f"backend {self.name} cannot be used here: {verdict.reason}")
        self.numerics = numerics
        try:
            self.device = torch.device(device or self.device_type)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            why = str(error).partition("\n")[0]
            raise BackendError(f"backend {self.name}: device {device!r} cannot be used: {why}") from error

    @classmethod
    def available(cls) -> Verdict:
        """Whether this machine can run it, and if not, what to install. Cheap; imports nothing that can break."""
        return Verdict(True, "always available")

    @classmethod
    def deployed(cls) -> str:
        """The mode that serves a model on its devices here, where the user names none."""
        return "deployed"

    @classmethod
    def environment(cls) -> dict[str, str]:
        """What a bug report should say about its devices, drivers and libraries. Called only where it is available.

        "emulated", where results are not those of the device: what stands for it. Every headline repeats it.
        """
        return {}

    def supports(self, op: str, facts: Facts) -> Verdict:
        """Whether `op` can serve a model with these facts. Asked once, at load, and in `conform` for every case; cheap
        and deterministic."""
        return Verdict(True, UNRESTRICTED)

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        """Plain values, rounded as the profile says; a backend whose kernels read another layout returns that."""
        if kind not in ("window", "entries", "index"):
            raise ValueError(f"unknown kind of cache row {kind!r}: window, entries or index")
        rounding, kept = (self.numerics.index, 0) if kind == "index" else (self.numerics.kv, rope)
        return plain_rows(dim, kept, ratio, window, self.numerics.storage, rounding)

    @classmethod
    def origin(cls, op: str) -> Origin:
        """Where this backend's implementation of an op comes from."""
        definer = next(c for c in cls.__mro__ if op in vars(c))
        if getattr(definer, op) is OPS[op].definition:
            return Origin("composite" if OPS[op].composite else "missing")
        owner = cls.name if cls.replaced(op) else cls.owner(definer)
        return Origin("native" if owner == cls.name else "inherited", owner)

    @classmethod
    def owner(cls, definer: type) -> str:
        """The backend that a class in this one's order of bases belongs to."""
        owners = [c for c in cls.__mro__ if issubclass(c, definer) and "name" in vars(c)]
        return owners[-1].__dict__["name"] if owners else cls.name

    @classmethod
    def replaced(cls, op: str) -> list[str]:
        """Helpers that another backend's code of an op calls on itself, and that are this backend's own instead.
        Methods of every backend are no helpers."""
        definer = next(c for c in cls.__mro__ if op in vars(c))
        if cls.owner(definer) == cls.name:
            return []
        found, seen, todo = list[str](), set[str](), names_in(vars(definer)[op])
        while todo:
            name = todo.pop()
            definers = [c for c in cls.__mro__ if name in vars(c)]
            if name in seen or name in OPS or hasattr(Backend, name) or not definers:
                continue
            seen.add(name)
            if cls.owner(definers[0]) == cls.name != cls.owner(definers[-1]):
                found.append(name)
            todo |= names_in(vars(definers[0])[name])
        return sorted(found)


def names_in(member: object) -> set[str]:
    """Names that a function, or what wraps one, reads: of its globals, and of attributes of whatever it has."""
    function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))  # type: ignore[arg-type]
    todo, found = [getattr(function, "__code__", None)], set[str]()
    while todo:
        code = todo.pop()
        if code is not None:
            found |= set(code.co_names)
            todo += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return found
