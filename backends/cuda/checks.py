"""What must hold of a compiled kernel on a device, and which exceptions are allowed: all of it data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dsv4_hal.backends.cuda.devices import ARCHS

DECODE_SPILL = 64  # bytes that a thread of a kernel of a decode step may spill where no device showed that it pays
GRID = 65535  # of the second and third axis of a grid


class Checked(Protocol):
    """A kernel compiled for an architecture, with the largest figures of all its launches that run the same code.

    decode  whether a decode step launches it
    """

    kernel: str
    target: str
    constants: Mapping[str, str]
    shared: int
    tensor: int
    spilled: int
    dots: bool
    matrix: Sequence[str]
    grid: Sequence[int]
    decode: bool


@dataclass(frozen=True)
class Spill:
    """Bytes that a kernel may spill on an architecture, and why. One that no longer spills as much must go.

    measured  whether the reason is what a device took
    """

    kernel: str
    target: str
    bytes: int
    reason: str
    measured: bool = False


_FLOAT32 = (
    "mode exact: no matrix unit multiplies float32 exactly, so sums and operands of whole rows share the registers of "
    "ordinary units; the mode is for comparing, not for serving"
)
SPILLS: tuple[Spill, ...] = (
    Spill(
        "attention.attend",
        "sm_90",
        2272,
        "tiles of 64 heads, the fewest rows that Hopper's units multiply at their rate: with 16 heads, which spill "
        "nothing, an H200 took 2.9 times as long in a decode step and 3.4 times in a prefill (layers of ratio 4)",
        measured=True,
    ),
    Spill("attention.combine", "sm_90", 4, "one word of a thread, with as many heads"),
    Spill("attention.peaks", "sm_90", 4, _FLOAT32),
    Spill(
        "experts.hidden",
        "sm_90",
        300,
        "four warps: with eight, which spill nothing, the experts of a layer took 14 % longer on an H200",
        measured=True,
    ),
    Spill("attention.attend", "sm_100", 20, _FLOAT32),
    Spill("attention.attend", "sm_120", 40, _FLOAT32),
    Spill("experts.hidden", "sm_100", 28, _FLOAT32),
    Spill("attention.peaks", "sm_100", 4, "one word of a thread, of the packed rows of training and of mode exact"),
)


@dataclass(frozen=True)
class Matrix:
    """The matrix instruction, by architecture, that a kernel's variants with these constants must have. Architectures
    that are not named, and other kernels, need any, if operands are narrower than float32."""

    kernel: str
    constants: Mapping[str, str]
    instructions: Mapping[str, str]


_BFLOAT16 = {"sm_80": "mma bf16", "sm_90": "wgmma bf16", "sm_100": "tcgen05 f16", "sm_120": "mma bf16"}
_BFLOAT16 |= dict.fromkeys(("gfx942", "gfx950"), "mfma bf16")
_FLOAT8 = {"sm_100": "tcgen05 f8f6f4"}
_SCALED = {"sm_100": "tcgen05 mxf8f6f4", "gfx950": "mfma_scale f8f6f4"}

MATRIX: tuple[Matrix, ...] = (
    *(
        Matrix(kernel, constants, instructions)
        for kernel in ("gemm.matmul", "experts.hidden")
        for constants, instructions in (
            ({"OPERAND": "bf16"}, _BFLOAT16),
            ({"OPERAND": "fp8e4nv"}, _FLOAT8),
            ({"SCALES": "mx"}, _SCALED),
        )
    ),
    Matrix("indexer.score", {"NARROW": "bf16"}, _BFLOAT16),
)


def problems(kernels: Iterable[Checked], whole: bool = True) -> list[str]:
    """What is wrong with `kernels`, and with the tables above; whole: whether they are all that there are."""
    found, spilled = [], {(s.kernel, s.target): 0 for s in SPILLS}
    allowed = {(s.kernel, s.target): s.bytes for s in SPILLS}
    measured = {(s.kernel, s.target) for s in SPILLS if s.measured}
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
            elif k.decode and k.spilled > DECODE_SPILL and where not in measured:
                fail(f"spills {k.spilled} bytes in a decode step, where at most {DECODE_SPILL} can be allowed")
        has = ", ".join(k.matrix) or "no matrix instruction"
        for wanted in (m.instructions.get(k.target) for m in MATRIX if _meant(m, k)):
            if wanted is not None and wanted not in k.matrix:
                fail(f"needs {wanted}, has {has}")
        if k.dots and not k.matrix:
            fail("has matrix products and no matrix instruction")
    if whole:
        for where, used in spilled.items():
            if where[1] in targets and where in allowed and used != allowed[where]:
                found.append(f"{where[0]} on {where[1]}: {allowed[where]} bytes of spills are allowed, it has {used}")
    return sorted(set(found))


def _meant(matrix: Matrix, kernel: Checked) -> bool:
    return matrix.kernel == kernel.kernel and matrix.constants.items() <= kernel.constants.items()
