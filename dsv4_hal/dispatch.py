"""From backends to one implementation per op: found by entry point, resolved once, explainable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dsv4_hal.backend import Backend, BackendError, Facts, Verdict
from dsv4_hal.formats import RowLayout, Weight
from dsv4_hal.ops import OPS, Ops

GROUP = "dsv4_hal.backends"


@dataclass(frozen=True)
class BackendInfo:
    """A registered backend: whether it can be used on this machine, and the reason."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Resolution:
    """Which implementation an op got.

    kind      "native", "inherited" or "composite", as in `dsv4_hal.backend.Origin`
    backend   whose code runs ("" for composite)
    rejected  (backend, reason) of every candidate that was preferred and passed over
    """

    op: str
    kind: str
    backend: str
    rejected: tuple[tuple[str, str], ...] = ()


class Resolved(Ops):
    """The ops a model runs on: every method checks the op's preconditions, then calls what was chosen for it."""

    resolutions: tuple[Resolution, ...]

    def __init__(self, primary: Backend) -> None:
        self.primary = primary
        self.numerics = primary.numerics
        self.device = primary.device

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        return self.primary.row_layout(kind, dim, rope, ratio, window)

    def repack(self, weight: Weight) -> Weight:
        return self.primary.repack(weight)


def resolve(
    backends: Sequence[Backend],
    facts: Facts | None = None,
    prefer: Mapping[str, Sequence[str]] | None = None,
    strict: bool = False,
) -> Resolved:
    """Choose one implementation per op.

    backends  in order of preference; the first gives profile, device, row layouts and weight arrangement
    facts     static facts of the model, for `Backend.supports`
    prefer    op -> names of backends in the order to try for it
    strict    raise BackendError where an op would not run as the first backend's own code or as a composite
    """
    facts, prefer = facts or {}, prefer or {}
    if not backends or not all(prefer.values()):
        raise BackendError(
            "no backend to choose from: " + ("an op's preference is empty" if backends else "none given")
        )
    for other in backends[1:]:
        if (other.numerics, other.device) != (backends[0].numerics, backends[0].device):
            raise BackendError(f"{other.name} has another numeric profile or device than {backends[0].name}")
    by_name = {b.name: b for b in backends}
    unknown = [op for op in prefer if op not in OPS] + [
        n for names in prefer.values() for n in names if n not in by_name
    ]
    if unknown:
        raise BackendError(f"preference names an op or backend that is not there: {', '.join(unknown)}")
    ops = Resolved(backends[0])
    resolutions = []
    for name, spec in OPS.items():
        candidates = [by_name[n] for n in prefer[name]] if name in prefer else list(backends)
        chosen, resolution = _choose(name, candidates, facts)
        if strict and resolution.kind != "composite" and resolution.backend != backends[0].name:
            why = "; ".join(f"{b}: {r}" for b, r in resolution.rejected) or "it has none of its own"
            raise BackendError(f"strict: {name} would run on {resolution.backend}, not on {backends[0].name} ({why})")
        if resolution.kind == "composite":
            run = spec.definition.__get__(ops)
        elif spec.composite:
            run = getattr(chosen, name)
        else:
            run = _checked(spec.definition, ops, getattr(chosen, name))
        setattr(ops, name, run)
        resolutions.append(resolution)
    ops.resolutions = tuple(resolutions)
    return ops


def _choose(op: str, candidates: Sequence[Backend], facts: Facts) -> tuple[Backend, Resolution]:
    rejected: list[tuple[str, str]] = []
    for backend in candidates:
        origin = backend.origin(op)
        verdict = Verdict(False, "not implemented") if origin.kind == "missing" else backend.supports(op, facts)
        if verdict:
            return backend, Resolution(op, origin.kind, origin.backend, tuple(rejected))
        rejected.append((backend.name, verdict.reason))
    if OPS[op].composite:  # its definition runs on whatever its parts were resolved to
        return candidates[0], Resolution(op, "composite", "", tuple(rejected))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise BackendError(f"no backend can run {op}: {reasons}")


def _checked(check: Callable[..., Any], ops: Ops, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        check(ops, *args, **kwargs)
        return run(*args, **kwargs)

    return call


def _registered() -> dict[str, list[EntryPoint]]:
    """Entry points by name: several where packages claim the same one."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        if entry.value not in [other.value for other in found.setdefault(entry.name, [])]:
            found[entry.name].append(entry)
    return found


def backend_class(name: str) -> type[Backend]:
    """The class of a registered backend. BackendError if the name is unknown or its module does not load."""
    registered = _registered()
    if name not in registered:
        raise BackendError(f"no backend is called {name!r}; registered: {', '.join(sorted(registered)) or 'none'}")
    entry, *others = registered[name]
    if others:
        claims = ", ".join(e.value for e in registered[name])
        raise BackendError(f"backend {name} is registered more than once: {claims}; uninstall all but one")
    try:
        cls = entry.load()
    except Exception as error:  # a vendor's package may fail in any way it likes
        raise BackendError(f"backend {name} does not load: {type(error).__name__}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise BackendError(f"backend {name}: {entry.value} is not a subclass of dsv4_hal.backend.Backend")
    return cls


def list_backends() -> list[BackendInfo]:
    """Every registered backend and whether this machine can run it. A broken one is listed with what broke."""
    out = []
    for name in sorted(_registered()):
        try:
            verdict = backend_class(name).available()
        except BackendError as error:
            verdict = Verdict(False, str(error))
        out.append(BackendInfo(name, verdict.ok, verdict.reason))
    return out
