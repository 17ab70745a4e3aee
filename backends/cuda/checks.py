"""What must hold of a compiled kernel on a device, and which exceptions are allowed: all of it data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
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
    """Bytes that a kernel's variants with these constants may spill on an architecture, and why. One that no longer
    spills as much must go.

    measured  whether the reason is what a device took
    """

    kernel: str
    target: str
    bytes: int
    reason: str
    measured: bool = False
    constants: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


_FLOAT32 = (
    "mode exact: no matrix unit multiplies float32 exactly, so sums and operands of whole rows share the registers of "
    "ordinary units; the mode is for comparing, not for serving"
)
_SUMS = "many rows: the sum of the splits beside that of one"

SPILLS: tuple[Spill, ...] = (
    Spill(
        "attention.attend",
        "sm_90",
        2332,
        "tiles of 64 heads, the fewest rows that Hopper's units multiply at their rate: with 16 heads, which spill "
        "nothing, an H200 took 2.9 times as long in a decode step and 3.4 times in a prefill (layers of ratio 4)",
        measured=True,
        constants={"HEADS": "64"},
    ),
    Spill("attention.attend", "sm_90", 16, _FLOAT32, constants={"HEADS": "16"}),
    Spill("attention.combine", "sm_90", 4, "one word of a thread, with as many heads"),
    Spill("attention.peaks", "sm_90", 4, _FLOAT32),
    Spill(
        "experts.hidden",
        "sm_90",
        300,
        "four warps: with eight, which spill nothing, the experts of a layer took 14 % longer on an H200",
        measured=True,
    ),
    Spill(
        "gemm.matmul",
        "sm_90",
        136,
        "many rows: the sum of the splits beside that of one, in four warps; with eight, which spill less, products of "
        "a prefill took 1.5 times as long on an H200",
        measured=True,
    ),
    Spill("gemm.matmul", "sm_100", 52, _SUMS),
    Spill("gemm.matmul", "sm_120", 8, _SUMS),
    Spill("gemm.matmul", "sm_80", 16, "a few words of a thread, of codes that are widened in registers"),
    Spill("attention.attend", "sm_100", 20, _FLOAT32),
    Spill("attention.attend", "sm_120", 40, _FLOAT32),
    Spill("experts.hidden", "sm_100", 20, _FLOAT32),
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
            *(({"OPERAND": "bf16", "SCALES": scales}, _BFLOAT16) for scales in ("none", "fold", "tile", "block")),
            ({"OPERAND": "fp8e4nv"}, _FLOAT8),
            ({"SCALES": "mx"}, _SCALED),
        )
    ),
    Matrix("indexer.score", {"NARROW": "bf16"}, _BFLOAT16),
)


def problems(kernels: Iterable[Checked], whole: bool = True) -> list[str]:
    """What is wrong with `kernels`, and with the tables above; whole: whether they are all that there are."""
    found, targets = [], set()
    used = dict.fromkeys(range(len(SPILLS)), 0)  # by place in the table
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
            place = next((i for i, s in enumerate(SPILLS) if s.target == k.target and _meant(s, k)), None)
            allowed = 0 if place is None else SPILLS[place].bytes
            if place is not None:
                used[place] = max(used[place], k.spilled)
            if place is None or k.spilled > allowed:
                fail(f"spills {k.spilled} bytes, allowed are {allowed}")
            elif k.decode and k.spilled > DECODE_SPILL and not SPILLS[place].measured:
                fail(f"spills {k.spilled} bytes in a decode step, where at most {DECODE_SPILL} can be allowed")
        has = ", ".join(k.matrix) or "no matrix instruction"
        for wanted in (m.instructions.get(k.target) for m in MATRIX if _meant(m, k)):
            if wanted is not None and wanted not in k.matrix:
                fail(f"needs {wanted}, has {has}")
        if k.dots and not k.matrix:
            fail("has matrix products and no matrix instruction")
    if whole:
        for place, allowance in enumerate(SPILLS):
            if allowance.target in targets and used[place] != allowance.bytes:
                about = f"{allowance.bytes} bytes of spills are allowed, it has {used[place]}"
                found.append(f"{allowance.kernel} on {allowance.target}: {about}")
    return sorted(set(found))


def _meant(row: Matrix | Spill, kernel: Checked) -> bool:
    return row.kernel == kernel.kernel and row.constants.items() <= kernel.constants.items()
