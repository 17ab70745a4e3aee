"""Numeric profiles as data: the process that judges does not import the module of a package that declares one.

That module is the package's own code, and could change how results are judged, or what the reference computes. So a
process of its own imports it and tells what it found there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dsv4_hal.backend import described
from dsv4_hal.conformance.workers.process import STARTING, Child, Line, Lost
from dsv4_hal.conformance.workers.transport import Foreign
from dsv4_hal.numerics import MODES, Numerics, mode_names, numerics_for


@cache
def told(mode: str) -> Numerics:
    """The profile of a mode of this project, or that an installed package declares. ValueError where there is none."""
    if mode in MODES or mode not in mode_names():
        return numerics_for(mode)  # loads nothing
    child = Child(_tell, mode)
    try:
        found = child.receive(STARTING)
    except Lost as lost:
        why = "did not load in time" if lost.code is None else f"ended its process with exit code {lost.code}"
        raise ValueError(f"mode {mode}: the module that declares it {why}") from None
    except Foreign as error:
        raise ValueError(f"mode {mode}: {error}") from error
    finally:
        child.end()
    if isinstance(found, str):
        raise ValueError(found)
    return agreed(mode, found)


def _tell(line: Line, mode: str) -> None:
    try:
        line.send(numerics_for(mode).to_dict())
    except ValueError as error:
        line.send(str(error))
    except BaseException as error:
        line.send(f"mode {mode} does not load: {described(error)}")


def agreed(mode: str, plain: Mapping[str, object]) -> Numerics:
    """The profile that somebody tells of a mode, as `Numerics.to_dict`. ValueError where it is none of that mode."""
    found = Numerics.from_dict(plain)
    if found.mode != mode:
        raise ValueError(f"the profile of mode {mode} is called {found.mode!r}")
    return found


def known(mode: str, plain: Mapping[str, object]) -> Numerics:
    """The same, which must be that of this machine if it has the mode."""
    found = agreed(mode, plain)
    if mode in mode_names() and found != (here := told(mode)):
        mine, theirs = here.to_dict(), found.to_dict()
        differ = ", ".join(f"{name} {theirs[name]}, here {mine[name]}" for name in mine if mine[name] != theirs[name])
        raise ValueError(f"mode {mode} is not what it is here: {differ}")
    return found
