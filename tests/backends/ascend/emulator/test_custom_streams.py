"""vllm-ascend's operators, emulated, against float64 arithmetic written here, token by token."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.rules import Refused


@pytest.fixture(autouse=True)
def _loaded(torch_npu: ModuleType) -> None:
    """Operators are there once the emulator is."""


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cut(value: Tensor) -> Tensor:
    """To 10 bits of mantissa, towards zero, in float64: by division, not by bits."""
    mantissa, exponent = torch.frexp(value.double())
    return torch.ldexp((mantissa * 2048).trunc() / 2048, exponent)


def test_hc_pre_v2() -> None:
    x, fn = draw(2, 4, 4096, dtype=torch.bfloat16), draw(24, 4 * 4096, seed=1) / 128
    base, scale = draw(24, seed=2), draw(3, seed=3)
    y, post, comb = torch.ops._C_ascend.npu_hc_pre_v2(x, fn, scale, base, 4, 20, 1e-6, 1e-5)
    for t in range(2):
        flat = x[t].double().flatten()
        mix = cut(fn) @ cut(flat) / math.sqrt(float(flat.square().mean()) + 1e-6)
        pre = torch.sigmoid(mix[:4] * scale[0] + base[:4]) + 1e-5
        torch.testing.assert_close(y[t].double(), (pre[:, None] * x[t].double()).sum(0), rtol=2**-8, atol=1e-6)
        wanted = 2 * torch.sigmoid(mix[4:8] * scale[1] + base[4:8])
        torch.testing.assert_close(post[t].double(), wanted, rtol=1e-5, atol=1e-6)
        m = (mix[8:] * scale[2] + base[8:]).view(4, 4).softmax(1) + 1e-5
        for step in range(39):
            m = m / (m.sum(0 if step % 2 == 0 else 1, keepdim=True) + 1e-5)
        torch.testing.assert_close(comb[t].double(), m, rtol=1e-5, atol=1e-6)


def test_hc_pre_v2_multiplies_in_hf32() -> None:
    """A value whose lowest bits are lost: the float32 product would differ."""
    x = torch.ones(1, 4, 4096, dtype=torch.bfloat16)
    fn = torch.full((24, 4 * 4096), (1 + 2.0**-11) / 4096)
    one = torch.ones(3)
    _, post, _ = torch.ops._C_ascend.npu_hc_pre_v2(x, fn, one, torch.zeros(24), 4, 1, 0.0, 0.0)
    assert float(post[0, 0]) == pytest.approx(2 / (1 + math.exp(-4)), rel=1e-6)


def test_hc_post() -> None:
    y, x = draw(1, 3, 256, dtype=torch.bfloat16), draw(1, 3, 4, 256, dtype=torch.bfloat16, seed=1)
    post, comb = draw(1, 3, 4, seed=2), draw(1, 3, 4, 4, seed=3)
    out = torch.ops._C_ascend.npu_hc_post(y, x, post, comb)
    for t in range(3):
        for k in range(4):
            wanted = post[0, t, k].double() * y[0, t].double()
            for j in range(4):
                wanted = wanted + comb[0, t, j, k].double() * x[0, t, j].double()
            torch.testing.assert_close(out[0, t, k].double(), wanted, rtol=2**-8, atol=1e-5)


def test_inplace_partial_rotary_mul() -> None:
    x = draw(2, 1, 3, 96, dtype=torch.bfloat16)
    angles = torch.tensor([[0.3, 1.1], [2.0, -0.7]]).double()
    r1, r2 = (f(angles).float().repeat_interleave(2, 1)[:, None, None] for f in (torch.cos, torch.sin))
    got = x.clone()
    torch.ops._C_ascend.inplace_partial_rotary_mul(got, r1, r2, "interleave", [92, 96])
    assert torch.equal(got[..., :92], x[..., :92])
    for b in range(2):
        for n in range(3):
            for i in range(2):
                turn = complex(math.cos(angles[b, i]), math.sin(angles[b, i]))
                pair = x[b, 0, n, 92 + 2 * i : 94 + 2 * i].double()
                turned = complex(*pair.tolist()) * turn
                wanted = torch.tensor([turned.real, turned.imag]).bfloat16()
                torch.testing.assert_close(got[b, 0, n, 92 + 2 * i : 94 + 2 * i], wanted)


def pre(**changed: object) -> None:
    given: dict[str, object] = {
        "x": draw(2, 4, 4096, dtype=torch.bfloat16), "hc_fn": draw(24, 4 * 4096), "hc_scale": draw(3),
        "hc_base": draw(24), "hc_mult": 4, "hc_sinkhorn_iters": 20, "norm_eps": 1e-6, "hc_eps": 1e-6,
    }  # fmt: skip
    torch.ops._C_ascend.npu_hc_pre_v2(**(given | changed))


def post(**changed: object) -> None:
    given = {"x": draw(1, 3, 256), "residual": draw(1, 3, 4, 256), "post": draw(1, 3, 4), "comb": draw(1, 3, 4, 4)}
    torch.ops._C_ascend.npu_hc_post(**(given | changed))


def turn(**changed: object) -> None:
    given: dict[str, object] = {
        "x": draw(2, 1, 3, 96), "r1": draw(2, 1, 1, 64), "r2": draw(2, 1, 1, 64), "rotary_mode": "interleave",
        "partial_slice": [32, 96],
    }  # fmt: skip
    torch.ops._C_ascend.inplace_partial_rotary_mul(**(given | changed))


@pytest.mark.parametrize("call", [pre, post, turn])
def test_calls_that_are_taken(call: object) -> None:
    call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "changed", "said"),
    [
        (pre, {"x": draw(2, 4, 4096)}, "x must be bfloat16, not"),
        (pre, {"x": draw(8, 4096, dtype=torch.bfloat16)}, "x must have 3 or 4 dimensions"),
        (pre, {"x": draw(2, 4, 512, dtype=torch.bfloat16), "hc_fn": draw(24, 2048)}, "must be 4096 or 7168, not 512"),
        (pre, {"x": draw(2, 2, 4096, dtype=torch.bfloat16)}, "dimension -2 of x must be 4, not 2"),
        (pre, {"hc_fn": draw(24, 4096)}, "dimension 1 of hc_fn is 4096"),
        (pre, {"hc_fn": draw(24, 4 * 4096, dtype=torch.bfloat16)}, "hc_fn must be float32"),
        (pre, {"hc_base": draw(8)}, "dimension 0 of hc_base must be 24"),
        (pre, {"hc_scale": draw(1)}, "dimension 0 of hc_scale must be 3"),
        (pre, {"hc_mult": 2}, "hc_mult must be 4"),
        (post, {"x": draw(3, 256)}, "x must have 3 dimensions, not 2"),
        (post, {"residual": draw(3, 4, 256)}, "residual must have 4 dimensions"),
        (post, {"x": draw(1, 3, 256, dtype=torch.bfloat16)}, "x and residual must be of one dtype"),
        (post, {"x": draw(1, 2, 256)}, "dimension 1 of residual is 3"),
        (post, {"comb": draw(1, 3, 4, 4, dtype=torch.bfloat16)}, "comb and post must be of one dtype"),
        (post, {"comb": draw(1, 3, 4, 3)}, "dimension 3 of comb is 3"),
        (turn, {"x": draw(2, 3, 96)}, "x must have 4 dimensions"),
        (turn, {"r1": draw(2, 1, 1, 64, dtype=torch.bfloat16)}, "r1 must be float32, not"),
        (turn, {"r2": draw(2, 1, 3, 64)}, "r1 and r2 must be of one shape"),
        (turn, {"rotary_mode": "half"}, "rotary_mode must be interleave"),
        (turn, {"partial_slice": [0, 32]}, "and r1 be as wide, not 64"),
        (turn, {"partial_slice": [64, 128]}, "must lie within 96 channels"),
    ],
)
def test_calls_that_are_refused(call: object, changed: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said) as found:
        call(**changed)  # type: ignore[operator]
    assert found.value.rule is not None
    assert "vllm-ascend 182b75ea" in found.value.rule.source
