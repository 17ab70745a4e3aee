"""Kernels that must be found wanting, compiled ahead of time by test_ahead.py in a process that does not interpret."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from dsv4_hal.backends.triton_kernels import runtime
from dsv4_hal.backends.triton_kernels.ahead import compile_only


@triton.jit
def product(a, b, c, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c [M, N] = a [M, steps * K] times b [N, steps * K] transposed."""
    total = tl.zeros((M, N), tl.float32)
    row, column, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None], tl.arange(0, K)
    for step in range(steps):
        k = step * K + inner
        left = tl.load(a + row * steps * K + k[None])
        right = tl.load(b + column * steps * K + k[:, None])
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(c + row * N + column, total)


@triton.jit
def crowded(x, out, N: tl.constexpr):
    """Each element times the sum of all: N of them wait in registers for it."""
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(out + at, value * tl.sum(value))


def main() -> None:
    found = []
    for target in sys.argv[1:]:
        with compile_only(target) as compiled:
            half, wide = (torch.empty(256, 4096, dtype=d, device="meta") for d in (torch.bfloat16, torch.float32))
            runtime.launch(product, (2, 3), half, half, wide, 64, M=128, N=128, K=64, num_warps=8, num_stages=2)
            runtime.launch(product, (1,), half, half, wide, 64, M=128, N=256, K=128, num_warps=8, num_stages=4)
            runtime.launch(product, (1,), wide, wide, wide, 64, M=16, N=16, K=16, num_warps=4)
            runtime.launch(crowded, (1,), wide, wide, N=16384, num_warps=1)
            runtime.launch(product, (0,), half, half, wide, 64, M=128, N=128, K=64)
        own = ("kernel", "target", "constants", "types", "warps", "grid")
        found += [{n: getattr(c, n) for n in own} | asdict(c.resources) for c in compiled]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
