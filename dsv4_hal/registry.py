"""Which backends are registered, which of them can run here, and the ones that a user's choice stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

import torch

from dsv4_hal.backend import Backend, BackendError, Verdict, described
from dsv4_hal.numerics import Numerics

GROUP = "dsv4_hal.backends"
FALLBACK = "reference"  # runs every op on any torch device: what is left to it is said, never hidden


@dataclass(frozen=True)
class BackendInfo:
    """A registered backend.

    available  whether this machine can run it, and the `reason`
    remedy     what would make it available; "" where nothing would, or nothing has to
    source     the class, as registered: "module:Class", several where packages claim the same name
    package    the distribution that registers it, with its version
    device     torch device it computes on; "" where the class does not load
    automatic  whether `backend: auto` may choose it
    """

    name: str
    available: bool
    reason: str
    remedy: str = ""
    source: str = ""
    package: str = ""
    device: str = ""
    automatic: bool = False


def list_backends(names: Sequence[str] | None = None) -> list[BackendInfo]:
    """Every registered backend, or those named, and whether this machine can run it. A broken one is listed with what
    broke."""
    found = sorted(_registered().items())
    return [_info(name, entries) for name, entries in found if names is None or name in names]


def registered(name: str) -> EntryPoint:
    """Where a backend is, whose module is not loaded. BackendError if the name is unknown, or claimed twice."""
    found = _registered()
    if name not in found:
        near = get_close_matches(name, found, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BackendError(f"no backend is called {name!r}; registered: {', '.join(sorted(found)) or 'none'}{hint}")
    entry, *others = found[name]
    if others:
        claims = ", ".join(e.value for e in found[name])
        raise BackendError(f"backend {name} is registered more than once: {claims}; uninstall all but one")
    return entry


def backend_class(name: str) -> type[Backend]:
    """The class of a registered backend. BackendError if the name is unknown or its module does not load."""
    entry = registered(name)
    try:
        cls = entry.load()
    except (Exception, SystemExit) as error:  # a vendor's package may fail in any way it likes
        raise BackendError(f"backend {name} does not load: {described(error)}") from error
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise BackendError(f"backend {name}: {entry.value} is not a subclass of dsv4_hal.backend.Backend")
    if cls.name != name:
        raise BackendError(f"backend {name}: {entry.value} calls itself {cls.name!r}; the two names must be one")
    return cls


def available(cls: type[Backend]) -> Verdict:
    """`cls.available()`, where an exception is a reason too."""
    try:
        verdict = cls.available()
    except (Exception, SystemExit) as error:
        return Verdict(False, f"its probe failed: {described(error)}")
    if not well_formed(verdict):
        return Verdict(False, f"its probe returned {verdict!r}, not a Verdict with a reason")
    return verdict


def well_formed(verdict: object) -> bool:
    """Whether a backend's answer is a Verdict of True or False, with texts."""
    kinds = {"ok": bool, "reason": str, "remedy": str}
    return isinstance(verdict, Verdict) and all(isinstance(getattr(verdict, name), kinds[name]) for name in kinds)


def choose(names: Sequence[str], numerics: Numerics, device: torch.device | str | None) -> tuple[list[Backend], Passed]:
    """The backends that `names` stand for, first the one that gives device and layouts, and those passed over.

    names   registered names; ("auto",) stands for the first that can be used here, by name, the fallback last
    device  default that of the first backend; all share it
    A backend that is named must be usable: BackendError says why it is not. `auto` passes over with a reason.
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise BackendError(f"backends are given by one or more names, got {names!r}")
    if tuple(names) == ("auto",):
        return _automatic(numerics, device)
    first = _build(names[0], numerics, device)
    return [first, *(_build(name, numerics, first.device) for name in names[1:])], {}


Passed = Mapping[str, str]
"""Backend -> why automatic choice passed over it."""


def _automatic(numerics: Numerics, device: torch.device | str | None) -> tuple[list[Backend], Passed]:
    passed: dict[str, str] = {}
    chosen: list[Backend] = []
    for info in sorted(list_backends(), key=lambda info: (info.name == FALLBACK, info.name)):
        if chosen:
            passed[info.name] = f"{chosen[0].name} comes first"
        elif not info.available:
            passed[info.name] = info.reason
        elif not info.automatic:
            passed[info.name] = "used only where it is named"
        else:
            try:
                chosen.append(_build(info.name, numerics, device))
            except BackendError as error:
                passed[info.name] = str(error)
    if not chosen:
        raise BackendError("no backend can be used here: " + "; ".join(f"{n}: {why}" for n, why in passed.items()))
    return chosen, passed


def _build(name: str, numerics: Numerics, device: torch.device | str | None) -> Backend:
    cls = backend_class(name)
    verdict = available(cls)
    if not verdict:
        hint = f" ({verdict.remedy})" if verdict.remedy else ""
        raise BackendError(f"backend {name} cannot be used here: {verdict.reason}{hint}")
    try:
        made = cls(numerics, device)
        if not isinstance(made.device, torch.device) or not isinstance(made.numerics, Numerics):
            raise TypeError("it has no device, or no numeric profile")
        return made
    except BackendError:
        raise
    except (Exception, SystemExit) as error:
        raise BackendError(f"backend {name} cannot be made: {described(error)}") from error


def _registered() -> dict[str, list[EntryPoint]]:
    """Entry points by name: several where packages claim the same one."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        if entry.value not in [other.value for other in found.setdefault(entry.name, [])]:
            found[entry.name].append(entry)
    return found


def _info(name: str, entries: Sequence[EntryPoint]) -> BackendInfo:
    source, package = ", ".join(entry.value for entry in entries), ", ".join(_packages(entries))
    try:
        cls = backend_class(name)
    except BackendError as error:
        return BackendInfo(name, False, str(error), _install_hint(error.__cause__), source, package)
    verdict = available(cls)
    return BackendInfo(
        name, verdict.ok, verdict.reason, verdict.remedy, source, package, cls.device_type, cls.automatic
    )


def _packages(entries: Sequence[EntryPoint]) -> Iterator[str]:
    for entry in entries:
        if entry.dist is not None:
            yield f"{entry.dist.name} {entry.dist.version}"


def _install_hint(cause: BaseException | None) -> str:
    missing = isinstance(cause, ModuleNotFoundError) and cause.name
    return f"install the package that provides the Python module {cause.name}" if missing else ""  # type: ignore[union-attr]
