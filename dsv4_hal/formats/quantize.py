"""A tensor into a stored format and back, the same thing at the level of values, and FP4 weights as FP8 weights.

A scale is computed per block: amax = max(largest magnitude, format.floor), scale = amax / format.top, rounded up to a
power of two for an e8m0 scale (the official inference kernel) and to nearest for fp32 and fp16. A block at a ragged
edge is what is there. A block that holds NaN or infinity, or whose scale is beyond the scale's dtype, has a scale that
is not finite, and becomes NaN throughout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_hal.formats.elements import ELEMENTS, power_of_two_ceil
from dsv4_hal.formats.types import FORMATS, Format, QTensor

Q = TypeVar("Q", bound=QTensor)


def quantize(x: Tensor, fmt: Format) -> QTensor:
    """x [..., rows, columns] of any float dtype -> its codes and scales. Not differentiable: see `simulate`.

    Arithmetic is fp32 (fp64 for fp64 x): codes = x / scale to nearest, ties to even, saturating at the largest
    magnitude; the scale is rounded before it divides, so a quotient may exceed the top a little (int8 with an fp16
    scale) and saturates. A plain format is a cast (from fp64 to bf16 or fp16 PyTorch rounds through fp32), and stays
    differentiable.
    ValueError: x is not floating; columns do not fill whole bytes; blocks of rows need a matrix; NaN or infinity where
    the element has no code for it (e2m1, int8, int4). The last check waits for the device: weights and tests come
    here, the rows of a step go through `encode`.
    """
    if not fmt.plain and fmt.element != "e4m3" and not bool(x.isfinite().all()):
        raise ValueError(f"{fmt.name} has no code for NaN or infinity, which a tensor {tuple(x.shape)} holds")
    return encode(x, fmt)


def encode(x: Tensor, fmt: Format) -> QTensor:
    """`quantize` without the check for NaN and infinity: such a block gets a scale of NaN or infinity, which
    `dequantize` turns into NaN, and codes that mean nothing."""
    _check(x, fmt)
    if x.shape[-1] % fmt.pack:
        raise ValueError(
            f"{fmt.name} stores {fmt.pack} columns in a byte, a tensor {tuple(x.shape)} does not fill them"
        )
    if fmt.plain:
        return QTensor(x.to(fmt.storage), None, fmt)
    x = x.detach()
    blocks, axes = _blocks(x, fmt)
    scale = _scale(blocks, axes, fmt)
    work = torch.promote_types(x.dtype, torch.float32)
    quotients = _whole(blocks.to(work) / scale.to(work), x.shape, fmt)
    return QTensor(ELEMENTS[fmt.element].encode(quotients), scale.squeeze(axes), fmt)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., rows, columns] in `dtype`: code * scale in fp32 (fp64 for fp64), one cast at the end.

    A plain format is a cast, differentiable. ValueError if `dtype` is not floating.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"values are floating, not {dtype}")
    if q.scale is None:
        return q.data.to(dtype)
    work = _work_dtype(dtype, q.format)
    blocks, axes = _blocks(ELEMENTS[q.format.element].decode(q.data, work), q.format)
    scale = q.scale.to(work)
    for axis in axes:
        scale = scale.unsqueeze(axis)
    return _whole(blocks.mul_(scale), q.shape, q.format).to(dtype)


def simulate(x: Tensor, fmt: Format, dtype: torch.dtype | None = None) -> Tensor:
    """Quantise and dequantise at the level of values; same shape as x [..., rows, columns], in `dtype` (default x's).

    Bit for bit dequantize(quantize(x, fmt), dtype) where x is finite and `dtype` no wider than float32; a block with
    NaN or infinity becomes NaN. The gradient is the identity (straight through). ValueError as in `quantize`, except
    that bytes need not be filled.
    """
    _check(x, fmt)
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, fmt, dtype or x.dtype)
    return _simulate(x, fmt, dtype or x.dtype)


def mxfp4_to_e4m3(q: Q) -> Q:
    """MXFP4 [..., rows, columns] -> the same values in e4m3_128x128, without rounding (the official conversion).

    The scale of a 128x128 block is the largest FP4 scale in it / 2^6, at least 2^-127; codes are multiplied by what
    remains. It is exact while the FP4 scales of nonzero values within a block span at most 2^11, and a little further
    where subnormals suffice. ValueError names the first block where it is not exact, or whose scale is NaN.
    """
    source, target = FORMATS["mxfp4"], FORMATS["e4m3_128x128"]
    if q.format != source or q.scale is None:
        raise ValueError(f"only {source.name} is converted to {target.name}, not {q.format.name}")
    rows, cols = target.block or (1, 1)
    small = q.scale.float()
    per_block = replace(target, block=(rows, cols // 32))  # the same blocks, counted in FP4 scales
    split, axes = _blocks(small, per_block)
    large = (split.amax(axes, keepdim=True) * 2.0**-6).clamp(min=2.0**-127)
    ratio = _whole(split / large, small.shape, per_block)
    codes, _ = _blocks(ELEMENTS["e2m1"].decode(q.data, torch.float32), source)
    values = _whole(codes.mul_(ratio.unsqueeze(-1)), q.shape, source)
    out = replace(
        q,
        data=ELEMENTS["e4m3"].encode(values),
        scale=large.squeeze(axes).to(torch.float8_e8m0fnu),
        format=target,
    )
    wrong = (dequantize(out) != dequantize(q)).nonzero()
    if len(wrong):
        *lead, row, col = wrong[0].tolist()
        block = (*lead, row // rows, col // cols)
        offset = (*lead, row // rows * rows, col // cols * cols)
        raise ValueError(
            f"{source.name} {q.shape} is not exact in {target.name}: block {block} at offset {offset} holds FP4 scales "
            f"too far apart, or a scale that is not a number"
        )
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
        return _simulate(x, fmt, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.dtype), None, None


def _simulate(x: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    if fmt.plain:
        return x.to(fmt.storage).to(dtype)
    blocks, axes = _blocks(x, fmt)
    work = _work_dtype(x.dtype, fmt)
    scale = _scale(blocks, axes, fmt).to(work)
    values = ELEMENTS[fmt.element].round(blocks.to(work) / scale).mul_(scale)
    return _whole(values, x.shape, fmt).to(dtype)


def _check(x: Tensor, fmt: Format) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{fmt.name} is computed from floating values, not {x.dtype}")
    if fmt.block is not None and x.dim() < (1 if fmt.block[0] == 1 else 2):
        raise ValueError(f"{fmt.name} has blocks of {fmt.block}, a tensor {tuple(x.shape)} has too few axes")
    if fmt.block is not None and fmt.block[1] == 0 and x.shape[-1] == 0:
        raise ValueError(f"{fmt.name} has a scale per row, a tensor {tuple(x.shape)} has no columns")


def _work_dtype(dtype: torch.dtype, fmt: Format) -> torch.dtype:
    """fp32 or wider, except where bf16 gives the same bits at half the traffic: dividing and multiplying by a power of
    two is exact in it, since it has the exponents of fp32, and every code fits its significand."""
    if dtype == torch.bfloat16 and fmt.scale == "e8m0":
        return dtype
    return torch.promote_types(dtype, torch.float32)


def _blocks(x: Tensor, fmt: Format) -> tuple[Tensor, tuple[int, ...]]:
    """x [..., rows, columns] seen as [..., row blocks, rows of a block, column blocks, columns of a block], and the
    axes inside a block. Blocks of one row keep the rows as they are: [..., rows, column blocks, columns of a block].
    Ragged edges are filled with zeros (a copy): they change no amax.
    """
    assert fmt.block is not None
    rows, cols = fmt.block[0], fmt.block[1] or x.shape[-1]
    missing = [0, -x.shape[-1] % cols]
    if rows > 1:
        missing += [0, -x.shape[-2] % rows]
    if any(missing):
        x = F.pad(x, missing)
    x = x.unflatten(-1, (x.shape[-1] // cols, cols))
    if rows == 1:
        return x, (-1,)
    return x.unflatten(-3, (x.shape[-3] // rows, rows)), (-1, -3)


def _whole(blocks: Tensor, shape: tuple[int, ...], fmt: Format) -> Tensor:
    """The inverse of `_blocks`: a tensor of `shape`, contiguous."""
    assert fmt.block is not None
    x = blocks.flatten(-2)
    if fmt.block[0] > 1:
        x = x.flatten(-3, -2)[..., : shape[-2], :]
    return x[..., : shape[-1]].contiguous()


def _scale(blocks: Tensor, axes: tuple[int, ...], fmt: Format) -> Tensor:
    """The stored scale of every block, in the scale's dtype, with axes of size one inside the block."""
    wide = torch.promote_types(blocks.dtype, torch.float32)
    amax = blocks.abs().to(wide).amax(axes, keepdim=True)  # NaN stays; PyTorch's maximum is three times slower in bf16
    scale = amax.clamp_(min=fmt.floor) / fmt.top
    if fmt.scale == "e8m0":
        scale = power_of_two_ceil(scale)
    assert fmt.scale_dtype is not None
    return scale.to(fmt.scale_dtype)
