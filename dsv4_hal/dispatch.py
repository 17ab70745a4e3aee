"""From backends to one implementation per op: resolved once, explainable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

import torch

from dsv4_hal.backend import UNRESTRICTED, Backend, BackendError, Facts, Origin, Verdict, described
from dsv4_hal.formats import RowLayout, Weight
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import FAMILIES, OPS, Ops
from dsv4_hal.registry import FALLBACK, Passed, choose, well_formed

LACKING = "not implemented"
"""Why a backend is passed over that does not have an op."""


@dataclass(frozen=True)
class Resolution:
    """Which implementation an op got.

    kind      "native", "inherited" or "composite", as in `dsv4_hal.backend.Origin`
    backend   whose code runs ("" for composite)
    rejected  (backend, reason) of every candidate that was preferred and passed over
    wanted    the backend that was to run it: the first of its candidates
    adopted   why that backend runs another's code on purpose ("" where it does not)
    reason    what the backend said when it accepted the op, where that says more than "no restriction"
    """

    op: str
    kind: str
    backend: str
    rejected: tuple[tuple[str, str], ...] = ()
    wanted: str = ""
    adopted: str = ""
    reason: str = ""

    @property
    def runs_as(self) -> str:
        """What a user should read: "reference" for the reference's code, whoever inherits it; else the kind."""
        return FALLBACK if self.backend == FALLBACK else self.kind

    @property
    def fallback(self) -> str:
        """Why `strict` refuses it: the op runs as neither code nor composite of the backend that was wanted, which has
        not adopted it either."""
        if self.kind == "composite" or self.backend == self.wanted or self.adopted:
            return ""
        why = "; ".join(f"{b}: {r}" for b, r in self.rejected) or f"{self.wanted} has none of its own"
        return f"{self.op} would run on {self.backend}, not on {self.wanted} ({why})"


class Resolved(Ops):
    """The ops a model runs on: every method checks the op's preconditions, then calls what was chosen for it.

    resolutions  what every op got, in the order of OPS
    passed       backends that an automatic choice passed over, and why
    watch        what watches the operations below the ops, where something does
    """

    resolutions: tuple[Resolution, ...]
    passed: Passed
    watch: AbstractContextManager[Any] = nullcontext()

    def __init__(self, primary: Backend) -> None:
        self.primary = primary
        self.numerics = primary.numerics
        self.device = primary.device
        self.passed = {}

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        return _hook(self.primary, "row_layout", RowLayout, kind, dim, rope, ratio, window)

    def repack(self, weight: Weight) -> Weight:
        return _hook(self.primary, "repack", Weight, weight)

    def count_calls(self) -> Counter[str]:
        """A counter that from now on counts every op called, those that a composite calls included."""
        calls: Counter[str] = Counter()

        def counted(op: str, run: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(run)
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[op] += 1
                return run(*args, **kwargs)

            return call

        for op in OPS:
            setattr(self, op, counted(op, getattr(self, op)))
        return calls


def select(
    backends: Sequence[str],
    numerics: Numerics,
    facts: Facts | None = None,
    *,
    prefer: Mapping[str, str | Sequence[str]] | None = None,
    device: torch.device | str | None = None,
    strict: bool = False,
) -> Resolved:
    """Ops resolved from names: the backends asked for, those that `prefer` names, and the reference behind them.

    backends  names in order of preference; ("auto",): the first that can be used here
    prefer    as for `by_op`
    facts, strict as in `resolve`; BackendError also where a backend that is named cannot be used
    """
    prefer = by_op(prefer or {})
    chosen, passed = choose(backends, numerics, device)
    first = chosen[0]
    everywhere = list(dict.fromkeys([*(b.name for b in chosen), FALLBACK]))
    for name in dict.fromkeys([*everywhere, *(n for names in prefer.values() for n in names)]):
        if name not in [b.name for b in chosen]:
            chosen += choose([name], first.numerics, first.device)[0]
    order = {op: prefer.get(op, everywhere) for op in OPS}
    ops = resolve(chosen, facts, order, strict)
    ops.passed = passed
    return ops


def by_op(prefer: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Backends to try for each op, in order and no others, out of op or family -> one or several names.

    A family stands for each of its ops; an op's own entry wins over its family's. BackendError for an unknown name.
    """
    if not isinstance(prefer, Mapping):
        raise BackendError(f"preferences must be a mapping of ops to backends, got {prefer!r}")
    for name in prefer:
        if name not in OPS and name not in FAMILIES:
            near = get_close_matches(str(name), [*OPS, *FAMILIES], 1)
            raise BackendError(f"no op or family is called {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    found = {name: prefer.get(name, prefer.get(spec.family)) for name, spec in OPS.items()}
    return {n: (names,) if isinstance(names, str) else tuple(names) for n, names in found.items() if names is not None}


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
    strict    raise BackendError where an op would run neither as the code of the first backend of its order, nor as a
              composite, nor as what that backend adopts
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
    for name in OPS:
        candidates = [by_name[n] for n in prefer[name]] if name in prefer else list(backends)
        run, resolution = implementation(ops, name, candidates, facts)
        setattr(ops, name, run)
        resolutions.append(resolution)
    refused = [r.fallback for r in resolutions if r.fallback]
    if strict and refused:
        raise BackendError("strict: " + "\n  ".join(refused))
    ops.resolutions = tuple(resolutions)
    return ops


def implementation(
    ops: Ops, op: str, candidates: Sequence[Backend], facts: Facts
) -> tuple[Callable[..., Any], Resolution]:
    """What runs an op on `ops`, the first of the candidates that serves it with these facts, and why. A composite that
    none of them has runs on the other ops of `ops`."""
    chosen, resolution = _choose(op, candidates, facts)
    spec = OPS[op]
    if resolution.kind == "composite":
        return spec.definition.__get__(ops), resolution
    if spec.composite:
        return getattr(chosen, op), resolution
    return _checked(spec.definition, ops, getattr(chosen, op)), resolution


def _choose(op: str, candidates: Sequence[Backend], facts: Facts) -> tuple[Backend, Resolution]:
    rejected: list[tuple[str, str]] = []
    wanted = candidates[0].name
    for backend in candidates:
        origin = _hook(backend, "origin", Origin, op)
        if origin.kind == "missing":
            verdict = Verdict(False, LACKING)
        elif not callable(getattr(backend, op)):
            verdict = Verdict(False, f"{op} is {getattr(backend, op)!r}, which cannot be called")
        else:
            verdict = _supports(backend, op, facts)
        if verdict:
            adopted = candidates[0].adopts.get(op, "") if origin.backend not in ("", wanted) else ""
            reason = verdict.reason if verdict.reason != UNRESTRICTED else ""
            return backend, Resolution(op, origin.kind, origin.backend, tuple(rejected), wanted, adopted, reason)
        rejected.append((backend.name, verdict.reason))
    if OPS[op].composite:  # its definition runs on whatever its parts were resolved to
        return candidates[0], Resolution(op, "composite", "", tuple(rejected), wanted)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise BackendError(f"no backend can run {op}: {reasons}")


def _supports(backend: Backend, op: str, facts: Facts) -> Verdict:
    """`backend.supports`, where an exception is a reason too: one broken question must not hide all other answers."""
    try:
        verdict = backend.supports(op, facts)
    except (Exception, SystemExit) as error:
        return Verdict(False, f"supports() failed: {described(error)}")
    return verdict if well_formed(verdict) else Verdict(False, f"supports() returned {verdict!r}, no Verdict")


T = TypeVar("T")


def _hook(backend: Backend, name: str, kind: type[T], *args: Any) -> T:
    """What a backend answers. BackendError where it fails, or answers with something else; a refusal (ValueError) is
    passed on as it is."""
    try:
        found = getattr(backend, name)(*args)
    except (BackendError, ValueError):
        raise
    except (Exception, SystemExit) as error:
        raise BackendError(f"backend {backend.name}: {name}() failed: {described(error)}") from error
    if not isinstance(found, kind):
        raise BackendError(f"backend {backend.name}: {name}() returned {found!r}, not a {kind.__name__}")
    return found


def _checked(check: Callable[..., Any], ops: Ops, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        check(ops, *args, **kwargs)
        return run(*args, **kwargs)

    return call
