"""Weights in the arrangements that the operators read. Every change is exact, and undone by `ordered`.

FP8 with a power of two for 128 x 128 values becomes MXFP8: the same codes, the same powers for 1 x 32. MXFP4 stacks go
into the fractal layout of the 950's grouped product, INT8 stands with its outputs along a row, INT4 is packed along the
outputs with what the 910s' grouped product must be given to correct for its splitting of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4_hal.backends.ascend import runtime
from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.widths import kept_format
from dsv4_hal.formats import FORMATS, Weight, dequantize, pack_nibbles, unpack_nibbles

ND, FRACTAL_NZ = 2, 29  # numbers of CANN's formats


@dataclass(frozen=True)
class Arranged(Weight):
    """A weight as its operator reads it.

    int8_channel  `data` as ever, but column by column in memory
    int4_channel  of a stack [E, N, K], `data` without memory; operands int32 [E, K, N / 8], eight codes an item along
                  N, the first in the low bits; int64 [E, 1, N], the bits of the float32 scales; float32 [E, N], the sum
                  over K of 8 * code * scale
    mxfp4         of a stack [E, N, K], `data` without memory; one operand, uint8 [E, N, K / 2] in FRACTAL_NZ
    """

    operands: tuple[Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.operands[0].device if self.operands else self.data.device

    def ordered(self) -> Weight:
        if not self.operands:
            data = self.data
        elif self.format.name == "int4_channel":
            packed = self.operands[0].contiguous().view(torch.int8)
            data = pack_nibbles(unpack_nibbles(packed).mT.contiguous())
        else:
            data = runtime.load().npu_format_cast(self.operands[0], ND).view(torch.int8)
        return Weight(data, self.scale, self.format, self.name, op=self.op)


def arranged(w: Weight, soc: Soc, storage: torch.dtype) -> Weight:
    """A checkpoint's weight as the operators of a SoC read it; as it is, where they read that, or none reads it, and on
    the meta device."""
    if w.data.is_meta or w.format.plain:
        return w
    if w.op == "block_diagonal_linear":  # which reads its values, rounded once
        return replace(w, data=dequantize(w, storage), scale=None, format=FORMATS["bf16"])
    stack, (rows, columns) = w.data.dim() == 3, w.shape[-2:]
    if w.format.name != "mxfp8" and kept_format(w.format.name, soc) == "mxfp8" and columns % 64 == 0:
        return mx_weight(w) if w.format.scale == "e8m0" or powers_of_two(w) else w
    if w.format.name not in soc.formats:
        return w
    if w.format.name == "int8_channel":
        return Arranged(w.data.mT.contiguous().mT, w.scale, w.format, w.name, "columns", w.op)
    if w.format.name == "int4_channel" and stack and rows % 8 == 0:
        return _int4(w)
    if w.format.name == "mxfp4" and stack and rows % 16 == 0 and columns % 64 == 0:
        return _mxfp4(w)
    return w


def powers_of_two(w: Weight) -> bool:
    """Whether every float32 scale is a power of two that e8m0 holds. Waits for the device."""
    assert w.scale is not None
    return not _no_power(w.scale).any()


def mx_weight(w: Weight) -> Weight:
    """FP8 [..., N, K] with one scale for 128 x 128 values, K a multiple of 64 -> the same values in mxfp8.

    ValueError names the weight and the first block whose scale is no power of two: MX has no other scales.
    """
    assert w.scale is not None
    scale = w.scale
    if w.format.scale != "e8m0":
        wrong = _no_power(scale).nonzero()
        if len(wrong):
            block = tuple(wrong[0].tolist())
            raise ValueError(
                f"{w.name or 'weight'}: the scale of block {block} is {scale[block].item()}, no power of two from "
                "2^-127 to 2^127: MXFP8 holds nothing else"
            )
        scale = scale.to(torch.float8_e8m0fnu)
    rows, columns = w.shape[-2:]
    small = scale.view(torch.uint8).repeat_interleave(128, -2)[..., :rows, :]
    small = small.repeat_interleave(4, -1)[..., : columns // 32].contiguous()
    return replace(w, scale=small.view(torch.float8_e8m0fnu), format=FORMATS["mxfp8"])


def _no_power(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    return (mantissa != 0.5) | (exponent < -126) | (exponent > 128)


def _int4(w: Weight) -> Weight:
    """Packed along the outputs. Source: vllm-ascend 182b75ea, vllm_ascend/quantization/methods/w4a8.py."""
    assert w.scale is not None
    codes = unpack_nibbles(w.data).mT.contiguous()  # [E, K, N], 0 .. 15
    packed = pack_nibbles(codes).view(torch.int32)
    scale = w.scale.mT.contiguous()  # [E, 1, N]
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    values = ((codes.to(torch.int8) ^ 8) - 8).to(torch.float32)
    bias = 8 * values.sum(1) * scale[:, 0]
    return _bare(w, (packed, bits, bias))


def _mxfp4(w: Weight) -> Weight:
    """In FRACTAL_NZ. Source: vllm-ascend 182b75ea, vllm_ascend/quantization/methods/w4a8_mxfp4.py."""
    npu = runtime.load()
    codes = npu.npu_format_cast(
        w.data.view(torch.uint8),
        FRACTAL_NZ,
        customize_dtype=torch.float8_e4m3fn,
        input_dtype=npu.float4_e2m1fn_x2,
    )
    return _bare(w, (codes,))


def _bare(w: Weight, operands: tuple[Tensor, ...]) -> Weight:
    empty = torch.empty_like(w.data, device="meta")
    return Arranged(empty, w.scale, w.format, w.name, "operands", w.op, operands)
