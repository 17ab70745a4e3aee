"""Emulated norms and rotary embeddings, against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm(torch_npu: ModuleType, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    x, gamma = torch.randn(3, 5, 64, generator=g).to(dtype), torch.rand(64, generator=g).to(dtype)
    y, rstd = torch_npu.npu_rms_norm(x, gamma, 1e-6)
    true = 1 / (x.double().pow(2).sum(-1, keepdim=True) / 64 + 1e-6) ** 0.5
    torch.testing.assert_close(rstd.double(), true, rtol=1e-6, atol=0)
    wanted = x.double() * true * gamma.double()
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
