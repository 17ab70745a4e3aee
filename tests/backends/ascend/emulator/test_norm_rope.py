"""Emulated norms and rotary embeddings, against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def close(got: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    """To one rounding of got's dtype, and a few of float32 in between."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=eps, atol=2e-6 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [1, 2])
def test_rms_norm(torch_npu: ModuleType, dtype: torch.dtype, axes: int) -> None:
    g = torch.Generator().manual_seed(1)
    x, gamma = torch.randn(3, 5, 64, generator=g).to(dtype), torch.rand(5, 64, generator=g).to(dtype)
    gamma = gamma[0] if axes == 1 else gamma
    y, rstd = torch_npu.npu_rms_norm(x, gamma, 1e-3)
    wide = x.double().flatten(-axes)
    true = (1 / ((wide * wide).sum(-1) / wide.shape[-1] + 1e-3) ** 0.5).reshape(rstd.shape)
    close(rstd, true)
    close(y, x.double() * true * gamma.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul(torch_npu: ModuleType, dtype: torch.dtype, mode: str) -> None:
    """A rotation of pairs of channels: (i, i + D / 2), or neighbours."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 3, 8, generator=g).to(dtype)
    angles = torch.rand(4, 4, generator=g).double() * 6
    pairs = [(i, i + 4) for i in range(4)] if mode == "half" else [(2 * i, 2 * i + 1) for i in range(4)]
    cos, sin, wanted = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(x.shape, dtype=torch.float64)
    for i, (a, b) in enumerate(pairs):
        cos[:, [a, b]], sin[:, [a, b]] = angles[:, i, None].cos().float(), angles[:, i, None].sin().float()
    cos, sin = cos.to(dtype), sin.to(dtype)
    for a, b in pairs:
        c, s = cos[None, :, None, a].double(), sin[None, :, None, a].double()
        wanted[..., a] = x[..., a].double() * c - x[..., b].double() * s
        wanted[..., b] = x[..., b].double() * c + x[..., a].double() * s
    got = torch_npu.npu_rotary_mul(x, cos[None, :, None], sin[None, :, None], mode)
    close(got, wanted)
