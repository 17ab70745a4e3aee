"""Arrangements of weights: what is changed is exact, and can be undone."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import SOCS, Soc
from dsv4_hal.backends.ascend.weights import Arranged, arranged, mx_weight
from dsv4_hal.formats import FORMATS, Weight, dequantize, quantize

A3, A5, BF16 = SOCS["ascend910_93"], SOCS["ascend950"], torch.bfloat16


def weight(format: str, *shape: int, name: str = "w") -> Weight:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.arange(shape[-1]) % 5.0)
    q = quantize(values, FORMATS[format])
    return Weight(q.data, q.scale, q.format, name)


@pytest.mark.parametrize("shape", [(128, 128), (200, 192), (3, 130, 320)])
def test_fp8_becomes_mxfp8_exactly(shape: tuple[int, ...]) -> None:
    before = weight("e4m3_128x128", *shape)
    after = arranged(before, A5, BF16)
    assert after.format.name == "mxfp8"
    assert after.data is before.data
    assert torch.equal(dequantize(after), dequantize(before))


def test_float32_scales_that_are_powers_of_two_become_mxfp8() -> None:
    codes = weight("e4m3_128x128", 256, 128)
    assert codes.scale is not None
    before = Weight(codes.data, codes.scale.float(), FORMATS["e4m3_128x128_fp32"], "w")
    assert torch.equal(dequantize(arranged(before, A5, BF16)), dequantize(codes))


def test_other_float32_scales_stay_and_are_named() -> None:
    before = weight("e4m3_128x128_fp32", 256, 128, name="layers.0.ffn.shared_experts.w2")
    assert arranged(before, A5, BF16) is before
    assert before.scale is not None
    before.scale[0] = 0.5
    with pytest.raises(ValueError, match=r"layers.0.ffn.shared_experts.w2: the scale of block \(1, 0\) is .*no power"):
        mx_weight(before)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 2.0**-130])
def test_scales_that_mx_has_not(scale: float) -> None:
    before = weight("e4m3_128x128_fp32", 128, 128)
    assert before.scale is not None
    before.scale[:] = scale
    with pytest.raises(ValueError, match="no power of two"):
        mx_weight(before)


def test_rows_that_fill_no_pair_of_blocks_stay() -> None:
    before = weight("e4m3_128x128", 128, 160)
    assert arranged(before, A5, BF16) is before


@pytest.mark.parametrize("shape", [(96, 64), (2, 96, 64)])
def test_int8_stands_with_its_outputs_along_a_row(shape: tuple[int, ...]) -> None:
    before = weight("int8_channel", *shape)
    after = arranged(before, A3, BF16)
    assert after.data.mT.is_contiguous()
    assert torch.equal(after.data, before.data)
    ordered = after.ordered()
    assert ordered.layout == "checkpoint"
    assert torch.equal(dequantize(ordered), dequantize(before))


def test_int4_is_packed_along_the_outputs() -> None:
    before = weight("int4_channel", 2, 16, 6)
    after = arranged(before, A3, BF16)
    assert isinstance(after, Arranged)
    packed, bits, bias = after.operands
    assert (packed.dtype, packed.shape) == (torch.int32, (2, 6, 2))
    values = dequantize(before)
    assert before.scale is not None
    for e in range(2):
        for k in range(6):
            for n in range(16):
                code = int(packed[e, k, n // 8]) >> 4 * (n % 8) & 15
                code -= 16 if code > 7 else 0
                assert float(code * before.scale[e, n, 0]) == float(values[e, n, k])
    assert (bits.dtype, bits.shape) == (torch.int64, (2, 1, 16))
    assert torch.equal(bits.to(torch.int32).view(torch.float32)[:, 0], before.scale[:, :, 0])
    assert (bits >= 0).all()
    torch.testing.assert_close(bias, 8 * values.sum(-1), rtol=1e-5, atol=1e-6)
    assert (after.shape, after.device.type, after.nbytes) == (before.shape, "cpu", before.nbytes)
    assert torch.equal(after.ordered().data, before.data)


def test_mxfp4_in_the_fractal_layout(torch_npu: ModuleType) -> None:
    before = weight("mxfp4", 2, 32, 64)
    after = arranged(before, A5, BF16)
    assert isinstance(after, Arranged)
    assert (after.operands[0].dtype, after.operands[0].shape) == (torch.uint8, (2, 32, 32))
    assert after.data.is_meta
    assert torch.equal(after.ordered().data, before.data)


@pytest.mark.parametrize(
    ("before", "soc"),
    [
        (weight("mxfp4", 32, 64), A5),  # no stack: the grouped product takes only these
        (weight("mxfp4", 2, 34, 64), A5),
        (weight("int4_channel", 2, 34, 64), A3),
        (weight("e4m3_128x128", 128, 128), A3),
        (weight("mxfp4", 2, 32, 64), A3),
        (Weight(torch.ones(4, 4, dtype=BF16), None, FORMATS["bf16"], "w", op="block_diagonal_linear"), A5),
    ],
)
def test_what_no_operator_reads_stays(before: Weight, soc: Soc) -> None:
    assert arranged(before, soc, BF16) is before


def test_the_output_projection_is_rounded_once_when_it_is_loaded() -> None:
    before = replace(weight("int8_channel", 128, 64), op="block_diagonal_linear")
    after = arranged(before, A3, BF16)
    assert (after.format.name, after.scale) == ("bf16", None)
    assert torch.equal(after.data, dequantize(before, BF16))


def test_shapes_alone_are_not_arranged() -> None:
    data = torch.empty(128, 128, dtype=torch.float8_e4m3fn, device="meta")
    scale: Tensor = torch.empty(1, 1, dtype=torch.float32, device="meta")
    before = Weight(data, scale, FORMATS["e4m3_128x128_fp32"], "w")
    assert arranged(before, A5, BF16) is before
