"""Emulated gated activations, against float64."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gated(a: float, b: float, alpha: float, limit: float, bias: float) -> float:
    a, b = min(a, limit), max(-limit, min(b, limit))
    return a / (1 + math.exp(-alpha * a)) * (b + bias)


def check(got: Tensor, wanted: list[list[float]]) -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=eps, atol=1e-6)


def numbers(dtype: torch.dtype) -> Tensor:
    return (4 * torch.randn(5, 32, generator=torch.Generator().manual_seed(3))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(torch_npu: ModuleType, dtype: torch.dtype) -> None:
    x = numbers(dtype)
    wanted = [[gated(row[i], row[16 + i], 1, 1e9, 0) for i in range(16)] for row in x.tolist()]
    check(torch_npu.npu_swiglu(x), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_clipped_swiglu(torch_npu: ModuleType, dtype: torch.dtype, interleaved: bool) -> None:
    """The limit binds: a is cut above only, b on both sides."""
    x = numbers(dtype)
    place = (lambda i: (2 * i, 2 * i + 1)) if interleaved else (lambda i: (i, 16 + i))
    wanted = [[gated(row[place(i)[0]], row[place(i)[1]], 1.7, 2.5, 0.5) for i in range(16)] for row in x.tolist()]
    got = torch_npu.npu_clipped_swiglu(x, alpha=1.7, limit=2.5, bias=0.5, interleaved=interleaved)
    check(got, wanted)


def test_clipped_swiglu_is_swiglu_without_a_limit(torch_npu: ModuleType) -> None:
    x = numbers(torch.float32)
    clipped = torch_npu.npu_clipped_swiglu(x, alpha=1.0, limit=1e30, bias=0.0, interleaved=False)
    torch.testing.assert_close(clipped, torch_npu.npu_swiglu(x), rtol=1e-6, atol=1e-7)
