"""What must hold of a compiled kernel on a device, and which exceptions are allowed: all of it data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from dsv4_hal.backends.cuda.devices import ARCHS

DECODE_SPILL = 64  # bytes that a thread of a kernel of a decode step may spill, even where it is allowed
GRID = 65535  # of the second and third axis of a grid


class Checked(Protocol):
    """A kernel compiled for an architecture, with the largest figures of all its launches that run the same code.

    decode  whether a decode step launches it
    """

    kernel: str
    target: str
    shared: int
    tensor: int
    registers: int
    spilled: int
    dots: bool
    matrix: Sequence[str]
    grid: Sequence[int]
    decode: bool


@dataclass(frozen=True)
class Spill:
    """Bytes that a kernel may spill on an architecture, and why. One that no longer spills as much must go."""

    kernel: str
    target: str
    bytes: int
    reason: str


SPILLS: tuple[Spill, ...] = ()

# Kernel -> architecture -> matrix instruction that must be in it. A kernel that is not named needs some, if its source
# has a matrix product.
MATRIX: Mapping[str, Mapping[str, str]] = MappingProxyType({})

# Kernels whose products may be made of ordinary multiplications, and why.
WITHOUT_MATRIX: Mapping[str, str] = MappingProxyType(
    {"norm_rope.hadamard": "mode exact stores float32, which only AMD's matrix units multiply exactly"}
)


def problems(kernels: Iterable[Checked], whole: bool = True) -> list[str]:
    """What is wrong with `kernels`, and with the tables above; whole: whether they are all that there are."""
    found, spilled = [], {(s.kernel, s.target): 0 for s in SPILLS}
    allowed = {(s.kernel, s.target): s.bytes for s in SPILLS}
    targets = set()
    for k in kernels:
        arch, where = ARCHS[k.target], (k.kernel, k.target)
        targets.add(k.target)

        def fail(what: str, where: tuple[str, str] = where) -> None:
            found.append(f"{where[0]} on {where[1]}: {what}")

        if k.shared > arch.shared:
            fail(f"{k.shared} bytes of shared memory, of {arch.shared}")
        if k.tensor > arch.tensor:
            fail(f"{k.tensor} columns of tensor memory, of {arch.tensor}")
        if any(axis > GRID for axis in k.grid[1:]):
            fail(f"a grid of {tuple(k.grid)}, whose second and third axis end at {GRID}")
        if k.target.startswith("sm_") and k.spilled > 0:
            spilled[where] = max(spilled.get(where, 0), k.spilled)
            if k.spilled > allowed.get(where, 0):
                fail(f"spills {k.spilled} bytes, allowed are {allowed.get(where, 0)}")
            elif k.decode and k.spilled > DECODE_SPILL:
                fail(f"spills {k.spilled} bytes in a decode step, where at most {DECODE_SPILL} can be allowed")
        wanted = MATRIX.get(k.kernel, {}).get(k.target)
        if wanted is not None and wanted not in k.matrix:
            fail(f"needs {wanted}, has {', '.join(k.matrix) or 'no matrix instruction'}")
        if k.dots and not k.matrix and k.kernel not in WITHOUT_MATRIX:
            fail("has matrix products and no matrix instruction")
    if whole:
        for where, used in spilled.items():
            if where[1] in targets and where in allowed and used != allowed[where]:
                found.append(f"{where[0]} on {where[1]}: {allowed[where]} bytes of spills are allowed, it has {used}")
    return sorted(set(found))
