"""Kernels compiled for GPUs that are not here, through the host code that launches them; and what they take there.

    with compile_only("sm_90") as compiled:
        norm_rope(torch.empty(64, 4096, dtype=torch.bfloat16, device="meta"), ...)

Host code runs as it is, on tensors without memory, at any size. Every launch becomes a compilation for the target, down
to machine code, with the dtypes, constants and divisibilities of that launch; nothing is executed. Compilers and
disassemblers come with triton: neither driver nor toolkit is needed. Triton must not be interpreted in this process.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from dsv4_hal.backends.triton_kernels import runtime


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes on its device.

    shared     bytes of shared memory (AMD: LDS) of a block
    tensor     columns of tensor memory
    registers  of a thread (AMD: vector and accumulation registers)
    spilled    bytes that a thread stores to memory for want of registers; for AMD four of each register spilled
    stack      bytes of a thread's stack (AMD: scratch)
    dots       whether its source has matrix products of operands narrower than float32, which matrix units round
    matrix     matrix instructions in the machine code, as "wgmma e4m3"
    """

    shared: int
    tensor: int
    registers: int
    spilled: int
    stack: int
    dots: bool
    matrix: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """One launch, compiled.

    kernel     its file and its name, as "gemm.matmul"
    key        hash of everything that machine code depends on: launches with equal keys run the same code
    constants  of the kernel, by name: those given, and integers that were 1
    types      of the other arguments, by name
    grid       of the launch
    seconds    that it took to compile, or to find again
    """

    kernel: str
    target: str
    key: str
    constants: dict[str, str]
    types: dict[str, str]
    warps: int
    stages: int
    grid: tuple[int, ...]
    seconds: float
    binary: Any

    @cached_property
    def resources(self) -> Resources:
        return (_nvidia if "ptx" in self.binary.asm else _amd)(self.binary)


@contextmanager
def compile_only(target: str) -> Iterator[list[Compiled]]:
    """Within, launches on the meta device are compiled for `target` ("sm_90", "gfx942"), and listed."""
    if runtime.INTERPRETED:
        raise RuntimeError("triton is interpreted in this process (TRITON_INTERPRET): its kernels cannot be compiled")
    compiled: list[Compiled] = []

    def compile_(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        start = time.perf_counter()
        binary = kernel.warmup(*args, grid=tuple(grid), **options)
        took = time.perf_counter() - start
        names, meta = kernel.arg_names, binary.metadata
        constants = {names[at[0]]: str(value) for at, value in binary.src.constants.items()}
        types = {name: str(kind) for name, kind in binary.src.signature.items() if name not in constants}
        shape = meta.num_warps, meta.num_stages, tuple(grid)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__.lstrip('_')}"
        compiled.append(Compiled(name, target, binary.hash, constants, types, *shape, took, binary))

    before, watched = driver._active, runtime.on_meta
    driver.set_active(_Driver(target))
    runtime.on_meta = compile_
    try:
        yield compiled
    finally:
        driver._active, runtime.on_meta = before, watched


class _Driver(DriverBase):
    """What triton asks of a device in order to compile for it."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = (
            GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
        )

    @classmethod
    def is_active(cls) -> bool:
        return False  # only where it is set

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # triton keeps what it has compiled by device: a device for each target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")


# --- reading what the compilers say ----------------------------------------------------------------------------------

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_PRODUCT = re.compile(r"\btt\.dot(?:_scaled)? .*: tensor<[\dx]+x(\w+)[,>]")  # and what its left operand consists of
_PTX_MATRIX = re.compile(
    r"\b(?:(mma)\.sync\.[\w.:]*?\.(?:f32|f16|s32)\.(\w+)\."
    r"|(wgmma)\.mma_async\.[\w.:]*?\.(?:f32|f16|s32)\.(\w+)\."
    r"|(tcgen05)\.mma\.[\w.:]*?kind::(\w+))"
)
_AMD_MATRIX = re.compile(r"\bv_(mfma(?:_scale)?)_(?:f32|i32)_\d+x\d+x\d+_?(\w+)")


def _nvidia(binary: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _USAGE.search(_tool(os.path.join(_TOOLS, "cuobjdump"), "--dump-resource-usage", file.name))
    if usage is None:
        raise RuntimeError(f"{binary.name}: cuobjdump does not say what it takes")
    registers, stack = int(usage[1]), int(usage[2])
    return Resources(
        shared=binary.metadata.shared,
        tensor=getattr(binary.metadata, "tmem_size", None) or 0,
        registers=registers,
        spilled=_nvidia_spills(binary) if stack else 0,  # registers are spilled to the stack
        stack=stack,
        dots=_narrow_products(binary),
        matrix=_matrix(_PTX_MATRIX, binary.asm["ptx"]),
    )


def _nvidia_spills(binary: Any) -> int:
    """What ptxas says when it assembles the kernel once more, as triton had it do."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    meta = binary.metadata
    options = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(meta.target.arch)}"]
    options += [] if meta.enable_fp_fusion else ["--fmad=false"]
    options += meta.ptx_options.split() if meta.ptx_options else []
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        said = _tool(get_ptxas(meta.target.arch).path, *options, file.name, "-o", os.devnull)
    found = _SPILLS.search(said)
    if found is None:
        raise RuntimeError(f"{binary.name}: ptxas does not say what it spills")
    return max(int(found[1]), int(found[2]))


def _amd(binary: Any) -> Resources:
    text = binary.asm["amdgcn"]

    def told(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"{binary.name}: its metadata has no {name}")
        return int(found[1])

    return Resources(
        shared=max(binary.metadata.shared, told("group_segment_fixed_size")),
        tensor=0,
        registers=told("vgpr_count"),  # of one file, accumulation registers included
        spilled=4 * told("vgpr_spill_count"),
        stack=told("private_segment_fixed_size"),
        dots=_narrow_products(binary),
        matrix=_matrix(_AMD_MATRIX, text),
    )


def _narrow_products(binary: Any) -> bool:
    return any(element != "f32" for element in _PRODUCT.findall(binary.asm["ttir"]))


def _matrix(pattern: re.Pattern[str], code: str) -> tuple[str, ...]:
    found = {tuple(group for group in groups if group) for groups in pattern.findall(code)}
    return tuple(sorted(" ".join(parts) for parts in found))


def _tool(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{os.path.basename(command[0])} exits {done.returncode}:\n{done.stdout}")
    return done.stdout
