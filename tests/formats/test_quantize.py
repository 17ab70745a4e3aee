"""Whole tensors against a quantiser written here in numpy, block by block, never with the code under test."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4_hal.formats import (
    FORMATS,
    Format,
    QTensor,
    Weight,
    dequantize,
    encode,
    mxfp4_to_e4m3,
    quantize,
    simulate,
)

SCALED = [name for name, f in FORMATS.items() if f.block is not None]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

_E4M3 = np.array([m / 8 / 64 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])
GRID = {
    "e4m3": _E4M3,
    "e2m1": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "int8": np.arange(128.0),
    "int4": np.arange(8.0),
}


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """To nearest, ties to the even code, saturating; magnitudes only."""
    size = np.minimum(np.abs(x).astype(np.float64), grid[-1])
    high = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    low = high - 1
    middle = (grid[low] + grid[high]) / 2  # exact in fp64
    up = (size > middle) | ((size == middle) & (high % 2 == 0))
    return np.where(up, grid[high], grid[low])


def power_of_two(amax: float, top: float) -> float:
    """Smallest 2^k with top * 2^k >= amax, by exact comparison."""
    need = Fraction(amax) / Fraction(top)
    k = need.numerator.bit_length() - need.denominator.bit_length() - 1
    while Fraction(2) ** k < need:
        k += 1
    return 2.0**k


def oracle(x: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [rows, cols] fp32 or fp64 -> signed codes as values, scales, and codes * scales, each in x's dtype."""
    assert fmt.block is not None
    rows, cols = fmt.block[0], fmt.block[1] or x.shape[1]
    wide = x.dtype.type
    codes, values = np.zeros_like(x), np.zeros_like(x)
    scales = np.zeros((math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / cols)), dtype=x.dtype)
    for i, j in np.ndindex(scales.shape):
        at = np.s_[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        amax = max(wide(np.abs(x[at]).max()), wide(fmt.floor))
        if fmt.scale == "e8m0":
            scale = wide(power_of_two(float(amax), fmt.top))
        else:
            scale = wide(np.dtype("f4" if fmt.scale == "fp32" else "f2").type(amax / wide(fmt.top)))
        quotient = x[at] / scale
        codes[at] = np.copysign(nearest(quotient, GRID[fmt.element]), quotient)
        if fmt.element.startswith("int"):
            codes[at] += 0.0
        scales[i, j] = scale
        values[at] = codes[at] * scale
    return codes, scales, values


def stored_codes(q: QTensor) -> np.ndarray:
    """The stored bytes as values, decoded here."""
    data = q.data.contiguous().view(torch.uint8).numpy().astype(np.int64)
    if q.format.pack == 2:
        data = np.stack([data & 15, data >> 4], -1).reshape(q.shape)
    if q.format.element == "int8":
        return np.where(data < 128, data, data - 256).astype(np.float64)
    if q.format.element == "int4":
        return np.where(data < 8, data, data - 16).astype(np.float64)
    half = 128 if q.format.element == "e4m3" else 8
    grid = GRID[q.format.element]
    return np.copysign(np.append(grid, math.nan)[data % half], np.where(data < half, 1.0, -1.0))


def stored_scales(q: QTensor) -> np.ndarray:
    assert q.scale is not None
    if q.format.scale == "e8m0":
        return 2.0 ** (q.scale.view(torch.uint8).numpy().astype(np.float64) - 127)
    return q.scale.double().numpy()


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def sample(shape: tuple[int, ...], fmt: Format, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values spread over magnitudes; a third of them on ties and grid points of a scale of about one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-9, 4, shape, generator=g).float())
    grid = torch.from_numpy(GRID[fmt.element]).float()
    ties = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    ties = torch.cat([ties, -ties])[torch.randint(0, 2 * len(ties), shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.3, ties, x).to(dtype)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(4, 256), (130, 200), (129, 32), (3, 72), (1, 2), (256, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_oracle(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    fmt = FORMATS[name]
    x = sample(shape, fmt, sum(shape), dtype)
    codes, scales, values = oracle(x.numpy(), fmt)
    q = quantize(x, fmt)
    assert (q.shape == shape and not q.data.is_floating_point()) or q.data.dtype == torch.float8_e4m3fn
    assert np.array_equal(stored_scales(q), scales.astype(np.float64))
    got = stored_codes(q)
    assert np.array_equal(got, codes) and np.array_equal(np.signbit(got), np.signbit(codes))
    assert torch.equal(bits(dequantize(q, dtype)), bits(torch.from_numpy(values)))
    assert torch.equal(bits(simulate(x, fmt)), bits(torch.from_numpy(values)))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_simulate_is_dequantize_of_quantize(name: str, dtype: torch.dtype) -> None:
    fmt = FORMATS[name]
    for shape in [(5, 128), (1, 2, 130, 66), (1, 129, 136), (3, 0, 64)]:
        x = sample(shape, fmt, 7, dtype)
        q = quantize(x, fmt)
        out = simulate(x, fmt)
        assert out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
        assert torch.equal(bits(out), bits(dequantize(q, dtype)))
        for wide in FLOATS:  # one cast, at the end
            exact = dequantize(q, torch.float64 if wide == torch.float64 else torch.float32)
            assert torch.equal(bits(dequantize(q, wide)), bits(exact.to(wide)))


@pytest.mark.parametrize("name", SCALED)
def test_bf16_is_computed_as_fp32(name: str) -> None:
    """The whole range of bf16, subnormals included: where bf16 arithmetic is used, it must give the bits of fp32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    g = torch.Generator().manual_seed(3)
    # one format's scale is fp16, which cannot hold more than 65504
    every = every[every.abs() < (1e6 if FORMATS[name].scale == "fp16" else math.inf)]
    x = every[torch.randperm(len(every), generator=g)][: len(every) // 1024 * 1024].view(-1, 1024)
    narrow = x * torch.exp2(-torch.linspace(0, 200, 1024)).bfloat16()  # blocks of several magnitudes
    for part in (*x.split(16), *narrow.split(16)):
        assert torch.equal(bits(simulate(part, FORMATS[name])), bits(simulate(part.float(), FORMATS[name]).bfloat16()))


@given(
    name=st.sampled_from(SCALED),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70).map(lambda n: 2 * n)),
    seed=st.integers(0, 2**30),
    exponent=st.integers(-20, 10),
)
@settings(derandomize=True, max_examples=120, deadline=None)
def test_random_shapes(name: str, shape: tuple[int, int], seed: int, exponent: int) -> None:
    fmt = FORMATS[name]
    x = sample(shape, fmt, seed) * 2.0**exponent
    codes, scales, values = oracle(x.numpy(), fmt)
    q = quantize(x, fmt)
    assert np.array_equal(stored_codes(q), codes) and np.array_equal(stored_scales(q), scales.astype(np.float64))
    assert torch.equal(bits(dequantize(q)), bits(torch.from_numpy(values)))


def test_stacks_are_quantised_matrix_by_matrix() -> None:
    for name in SCALED:
        fmt = FORMATS[name]
        x = sample((3, 129, 66), fmt, 1)
        q = quantize(x, fmt)
        for e in range(3):
            one = quantize(x[e], fmt)
            assert q.scale is not None and one.scale is not None
            assert torch.equal(q.data[e].view(torch.uint8), one.data.view(torch.uint8))
            assert torch.equal(q.scale[e].float(), one.scale.float())
            assert torch.equal(dequantize(q)[e], dequantize(one))


def test_one_row_and_strided_input() -> None:
    x = sample((6, 512), FORMATS["e4m3_1x64"], 2, torch.bfloat16)
    whole = simulate(x[:, :448].contiguous(), FORMATS["e4m3_1x64"])
    assert torch.equal(simulate(x[:, :448], FORMATS["e4m3_1x64"]), whole)
    assert torch.equal(simulate(x[0, :448], FORMATS["e4m3_1x64"]), whole[0])
    assert torch.equal(dequantize(quantize(x[:, :448], FORMATS["e4m3_1x64"]), x.dtype), whole)
    assert torch.equal(simulate(x.t(), FORMATS["mxfp8"]), simulate(x.t().contiguous(), FORMATS["mxfp8"]))


@pytest.mark.parametrize("name", SCALED)
def test_no_rows(name: str) -> None:
    x = torch.zeros(0, 128)
    q = quantize(x, FORMATS[name])
    assert dequantize(q).shape == (0, 128) and simulate(x, FORMATS[name]).shape == (0, 128)


@pytest.mark.parametrize("name", SCALED)
def test_zero_blocks(name: str) -> None:
    fmt = FORMATS[name]
    q = quantize(torch.zeros(2, 256), fmt)
    ratio = float(np.float32(fmt.floor) / np.float32(fmt.top))
    want = {"e8m0": power_of_two(fmt.floor, fmt.top), "fp32": ratio, "fp16": 2.0**-24}[str(fmt.scale)]
    assert (stored_scales(q) == want).all() and want > 0
    assert torch.equal(bits(dequantize(q)), torch.zeros(2, 256, dtype=torch.int32))
    assert torch.equal(bits(simulate(torch.zeros(2, 256), fmt)), torch.zeros(2, 256, dtype=torch.int32))


def test_scales_that_are_known() -> None:
    """448 fills e4m3 with a scale of one, the next bf16 value needs two; floors as in the official kernels."""
    x = torch.tensor([[448.0], [450.0], [224.0], [1e-9], [3.0e38]]).expand(5, 128).bfloat16()
    scale = quantize(x, FORMATS["e4m3_1x128"]).scale
    assert scale is not None and scale.flatten().tolist() == [1.0, 2.0, 0.5, 2.0**-22, 2.0**120]
    y = torch.tensor([[6.0], [6.03125], [3.0], [1e-40], [2.0**-126 * 6]]).expand(5, 32)
    scale = quantize(y, FORMATS["mxfp4"]).scale
    assert scale is not None and scale.flatten().tolist() == [1.0, 2.0, 0.5, 2.0**-126, 2.0**-126]


def test_int8_with_fp16_scale_saturates() -> None:
    """Near the smallest fp16 the rounded scale is too small by up to a third: the quotient exceeds 127."""
    x = torch.full((1, 128), 127 * 1.4 * 2.0**-24)
    q = quantize(x, FORMATS["int8_row_fp16"])
    assert stored_scales(q).item() == 2.0**-24 and (stored_codes(q) == 127).all()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(name: str, bad: float) -> None:
    fmt = FORMATS[name]
    x = torch.ones(2, 256)
    x[1, 200] = bad
    out = simulate(x, fmt)
    assert out[1, 200].isnan() and out[1, 201].isnan()  # the whole block
    if fmt.block is not None and fmt.block[0] == 1:
        assert torch.equal(out[0], simulate(x[:1], fmt)[0])
    if fmt.element == "e4m3":
        assert torch.equal(dequantize(quantize(x, fmt)).isnan(), out.isnan())
    else:
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(x, fmt)
        assert not dequantize(encode(x, fmt))[1, 200].isfinite()


@pytest.mark.parametrize("name", ["fp64", "fp32", "fp16", "bf16"])
def test_plain_formats_are_casts(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q = quantize(x, fmt)
    assert q.scale is None and torch.equal(q.data, x.to(fmt.storage))
    assert torch.equal(dequantize(q, torch.float64), x.to(fmt.storage).double())
    assert torch.equal(simulate(x, fmt), x.to(fmt.storage).float())
    dequantize(q).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3, 5))


def test_gradient_is_straight_through() -> None:
    for name in SCALED:
        x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
        weight = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
        out = simulate(x, FORMATS[name])
        assert torch.equal(out.detach(), simulate(x.detach(), FORMATS[name])) and not torch.equal(out, x)
        (out * weight).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, weight)
        with torch.no_grad():
            assert not simulate(x, FORMATS[name]).requires_grad


def test_input_is_left_alone() -> None:
    for name in SCALED:
        x = sample((3, 256), FORMATS[name], 5)
        before = x.clone()
        q = quantize(x, FORMATS[name])
        dequantize(q)
        simulate(x, FORMATS[name])
        assert torch.equal(x, before) and torch.equal(dequantize(q), simulate(x, FORMATS[name]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="floating"):
        quantize(torch.ones(2, 32, dtype=torch.int32), FORMATS["mxfp8"])
    with pytest.raises(ValueError, match="floating"):
        simulate(torch.ones(2, 32, dtype=torch.int32), FORMATS["mxfp8"])
    with pytest.raises(ValueError, match="2 columns in a byte"):
        quantize(torch.ones(2, 33), FORMATS["mxfp4"])
    with pytest.raises(ValueError, match="too few axes"):
        quantize(torch.ones(128), FORMATS["e4m3_128x128"])
    with pytest.raises(ValueError, match="no columns"):
        simulate(torch.ones(3, 0), FORMATS["int8_channel"])
    with pytest.raises(ValueError, match="floating"):
        dequantize(quantize(torch.ones(2, 32), FORMATS["mxfp8"]), torch.int32)


def mxfp4(shape: tuple[int, ...], seed: int, low: int, span: int) -> Weight:
    """Every byte equally likely; scales 2^(low - 127) .. 2^(low + span - 127), both ends in every 128x128 block."""
    g = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=g).to(torch.uint8).view(torch.int8)
    scale = torch.randint(low, low + span + 1, (*shape[:-1], math.ceil(shape[-1] / 32)), generator=g).to(torch.uint8)
    scale[..., ::128, ::4] = low + span
    return Weight(data, scale.view(torch.float8_e8m0fnu), FORMATS["mxfp4"], "layers.0.ffn.experts.w1")


def written_out(q: QTensor) -> np.ndarray:
    """Values in fp64: no power of two of these formats overflows it."""
    rows, cols = q.format.block or (1, 1)
    scales = stored_scales(q).repeat(rows, -2).repeat(cols, -1)[..., : q.shape[-2], : q.shape[-1]]
    return stored_codes(q) * scales


@pytest.mark.parametrize("shape", [(256, 384), (130, 160), (2, 128, 256), (3, 48), (0, 64)])
@pytest.mark.parametrize(("low", "span"), [(100, 11), (0, 6), (240, 11), (243, 11), (120, 0)])
def test_fp4_to_fp8_is_exact(shape: tuple[int, ...], low: int, span: int) -> None:
    w = mxfp4(shape, low, low, span)
    out = mxfp4_to_e4m3(w)
    assert isinstance(out, Weight) and out.name == w.name and out.format == FORMATS["e4m3_128x128"]
    assert np.array_equal(written_out(out), written_out(w))
    assert (stored_scales(out) == max(2.0 ** (low + span - 127 - 6), 2.0**-127)).all()


def test_fp4_to_fp8_through_subnormals() -> None:
    """2^14 apart: 0.5 * 2^-8 is the smallest e4m3, 1.5 * 2^-8 still fits, and nothing below does."""
    w = mxfp4((128, 128), 1, 100, 14)
    with pytest.raises(ValueError, match="not exact"):
        mxfp4_to_e4m3(mxfp4((128, 128), 1, 100, 15))
    assert np.array_equal(written_out(mxfp4_to_e4m3(w)), written_out(w))


def test_fp4_to_fp8_refused() -> None:
    w = mxfp4((2, 256, 384), 4, 110, 3)
    assert w.scale is not None
    w.data[1, 130, 64 : 64 + 16] = 0x11  # 0.5 twice
    w.scale.view(torch.uint8)[1, 130, 4] = 113 - 15
    with pytest.raises(ValueError, match=r"block \(1, 1, 1\) at offset \(1, 128, 128\)"):
        mxfp4_to_e4m3(w)
    w.data[1, 130, 64 : 64 + 16] = 0  # zeros have any scale
    assert np.array_equal(written_out(mxfp4_to_e4m3(w)), written_out(w))
    w.scale.view(torch.uint8)[0, 0, 1] = 255
    with pytest.raises(ValueError, match=r"block \(0, 0, 0\)"):
        mxfp4_to_e4m3(w)
    with pytest.raises(ValueError, match="only mxfp4"):
        mxfp4_to_e4m3(quantize(torch.ones(2, 32), FORMATS["mxfp8"]))


def test_fp4_to_fp8_of_scales_too_far_apart_for_fp32() -> None:
    """Their ratio underflows to zero: still noticed."""
    w = mxfp4((128, 128), 2, 254, 0)
    assert w.scale is not None
    w.data[5] = 0x11
    w.scale.view(torch.uint8)[5] = 0
    with pytest.raises(ValueError, match="not exact"):
        mxfp4_to_e4m3(w)


def test_fp4_to_fp8_of_zero_blocks() -> None:
    w = quantize(torch.zeros(128, 256), FORMATS["mxfp4"])
    out = mxfp4_to_e4m3(w)
    assert (dequantize(out) == 0).all() and (stored_scales(out) == 2.0**-127).all()
