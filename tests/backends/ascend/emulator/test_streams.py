"""Emulated hyper-connections, against float64."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import Soc


@pytest.fixture(autouse=True)
def _on_950(soc: Soc) -> None:
    if soc.name != "ascend950":
        pytest.skip("hyper-connections of torch_npu are of Ascend 950")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def inputs(n: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    width = n * n + 2 * n
    return {
        "x": torch.randn(3, n, 32, generator=g).bfloat16(),
        "phi": torch.randn(width, n * 32, generator=g) * 0.2,
        "alpha": torch.tensor([0.7, 1.3, 0.9]),
        "bias": torch.randn(width, generator=g),
    }


@pytest.mark.parametrize("n", [4, 6, 8])
@pytest.mark.parametrize("gamma", [False, True])
def test_pre(torch_npu: ModuleType, n: int, gamma: bool) -> None:
    given = inputs(n)
    scale = torch.linspace(0.5, 1.5, n * 32).reshape(n, 32) if gamma else None
    h_in, h_post, h_res, *rest = torch_npu.npu_mhc_pre(**given, gamma=scale, norm_eps=1e-3, hc_eps=1e-2, out_flag=1)
    x, phi, bias = given["x"].double(), given["phi"].double(), given["bias"].tolist()
    for token in range(3):
        flat = x[token].flatten()
        inverse = 1 / math.sqrt(float((flat * flat).sum()) / len(flat) + 1e-3)
        left = flat * scale.flatten().double() if scale is not None else flat
        mix = [float((left * phi[i]).sum()) * inverse for i in range(len(phi))]
        pre = [sigmoid(mix[i] * 0.7 + bias[i]) + 1e-2 for i in range(n)]
        post = [2 * sigmoid(mix[n + i] * 1.3 + bias[n + i]) for i in range(n)]
        res = [mix[2 * n + i] * 0.9 + bias[2 * n + i] for i in range(n * n)]
        wanted_in = sum(p * x[token, i] for i, p in enumerate(pre))
        torch.testing.assert_close(h_in[token].double(), wanted_in, rtol=2**-8, atol=1e-4)
        torch.testing.assert_close(h_post[token].tolist(), post, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(h_res[token].flatten().tolist(), res, rtol=1e-4, atol=1e-5)
        assert math.isclose(float(rest[0][token]), inverse, rel_tol=1e-6)
        torch.testing.assert_close(rest[2][token].tolist(), pre, rtol=1e-5, atol=1e-5)


def test_pre_in_hf32_differs_by_as_much_as_ten_bits_do(torch_npu: ModuleType) -> None:
    given = inputs()
    exact, cut = (torch_npu.npu_mhc_pre(**given, inner_precise=i)[2].double() for i in (0, 1))
    wanted = given["phi"].double()
    step = 2.0 ** (wanted.abs().log2().floor() - 10)
    phi = (wanted / step).trunc() * step
    flat = given["x"].double().flatten(1)
    inverse = (flat.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    true = ((flat @ phi.T) * inverse)[:, 8:] * 0.9 + given["bias"][8:].double()
    torch.testing.assert_close(cut.flatten(1), true, rtol=1e-5, atol=1e-5)
    assert (cut - exact).abs().max() > 1e-4


def test_pre_returns_no_extras_unless_asked(torch_npu: ModuleType) -> None:
    assert torch_npu.npu_mhc_pre(**inputs())[3:] == (None, None, None)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn(torch_npu: ModuleType, iterations: int) -> None:
    x = 5 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(6))
    got = torch_npu.npu_mhc_sinkhorn(x, eps=1e-3, num_iters=iterations)[0]
    for token in range(3):
        m = [[math.exp(v) / sum(math.exp(u) for u in row) + 1e-3 for v in row] for row in x[token].tolist()]
        for step in range(iterations):
            if step:
                m = [[v / (sum(row) + 1e-3) for v in row] for row in m]
            sums = [sum(row[j] for row in m) + 1e-3 for j in range(4)]
            m = [[v / s for v, s in zip(row, sums, strict=True)] for row in m]
        torch.testing.assert_close(got[token].double(), torch.tensor(m, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixed", [True, False])
def test_post(torch_npu: ModuleType, mixed: bool) -> None:
    """h_res is not symmetric: its transpose is what mixes."""
    g = torch.Generator().manual_seed(7)
    x, out = torch.randn(3, 4, 16, generator=g).bfloat16(), torch.randn(3, 16, generator=g).bfloat16()
    res, post = torch.rand(3, 4, 4, generator=g), torch.rand(3, 4, generator=g)
    got = torch_npu.npu_mhc_post(x, res if mixed else None, out, post)
    for token in range(3):
        for i in range(4):
            carried = (
                sum(res[token, j, i].double() * x[token, j].double() for j in range(4))
                if mixed
                else x[token, i].double()
            )
            wanted = carried + post[token, i].double() * out[token].double()
            torch.testing.assert_close(got[token, i].double(), wanted, rtol=2**-8, atol=1e-6)
