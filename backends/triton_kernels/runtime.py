"""How kernels are launched, and whether they are compiled for a device or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels import interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1; decided when triton is imported

on_meta: Callable[..., None] | None = None  # takes launches on the meta device, where nothing can run: see `ahead`

if INTERPRETED:
    interpreter.install()


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run `kernel` once per point of the grid, on the device of its first tensor; not at all where the grid is empty.

    options  constants of the kernel; and num_warps, num_stages, which only a compiler reads
    """
    for tell in _WATCHING:
        tell(f"{kernel.__name__}{tuple(grid)}({', '.join(map(_told, args))}; {options})")
    if not all(grid):
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "meta":
        if on_meta is None:
            raise RuntimeError("kernels cannot run on the meta device: it has shapes and no values")
        on_meta(kernel, grid, *args, **options)
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](*args, **options)


_WATCHING: list[Callable[[str], None]] = []


@contextmanager
def watching(tell: Callable[[str], None]) -> Iterator[None]:
    """Tells of every launch: kernel, grid, shapes and dtypes of tensors, and the numbers that a captured launch would
    keep."""
    _WATCHING.append(tell)
    try:
        yield
    finally:
        _WATCHING.remove(tell)


def _told(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')}{list(argument.shape)}"
    if isinstance(argument, tuple):
        return f"({', '.join(map(_told, argument))})"
    return str(argument)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: what a block of n columns is padded to."""
    return 1 << max(0, n - 1).bit_length()


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as rows [N, D] whose columns lie side by side: a view where its strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x[..., 0].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def result(shape: Sequence[int], dtype: torch.dtype, device: torch.device, out: Tensor | None) -> Tensor:
    """What a kernel writes to: the caller's `out` where it is contiguous, else a new tensor, which `emit` copies."""
    if out is not None and out.is_contiguous():
        return out
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def emit(made: Tensor, out: Tensor | None) -> Tensor:
    """The result of an op: the caller's `out` if there is one."""
    return made if out is None or out is made else out.copy_(made)
