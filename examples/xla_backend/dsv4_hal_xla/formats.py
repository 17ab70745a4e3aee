"""Stored values to numbers, and numbers to what a format can hold, in JAX; float32 throughout, which holds every code.

See dsv4_hal/formats for the same in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4_hal.formats import Format
from dsv4_hal_xla.bridge import jnp, lax

# element -> smallest normal magnitude, bits of mantissa
ROUNDED = {"e4m3": (2.0**-6, 3), "e2m1": (1.0, 1)}

MANTISSA, BIAS, INFINITY = 23, 127, 0x7F800000  # of a float32; INFINITY is also the mask of its exponent


def decode(codes: Any, scale: Any, fmt: Format) -> Any:
    """Values [..., rows, columns] of codes (8 bit floats as bytes) and scales; a ragged edge has a scale of its own."""
    if fmt.block is None:
        return codes.astype(jnp.float32)
    values = DECODE[fmt.element](codes)
    scale = from_e8m0(scale) if fmt.scale == "e8m0" else scale.astype(jnp.float32)
    for axis, block in zip((-2, -1), fmt.block, strict=True):
        if block != 1:  # 0: the whole axis
            size = values.shape[axis]
            scale = lax.slice_in_dim(jnp.repeat(scale, block or size, axis), 0, size, axis=axis)
    return values * scale


def from_e4m3(codes: Any) -> Any:
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def from_e8m0(codes: Any) -> Any:
    """Code c stands for 2^(c - 127), 255 for NaN. Code 0 is a subnormal float32, which XLA may take for zero."""
    bits = codes.astype(jnp.int32)
    power = jnp.where(bits == 0, 1 << (MANTISSA - 1), bits << MANTISSA)
    return jnp.where(bits == 255, jnp.nan, lax.bitcast_convert_type(power, jnp.float32))


def from_e2m1(packed: Any) -> Any:
    """0, .5, 1, 1.5, 2, 3, 4, 6: from code 2 on, the code is the top of a float32 whose bias is 126 higher."""
    nibbles = unpack(packed).astype(jnp.int32)
    code = nibbles & 7
    size = lax.bitcast_convert_type((code + 2 * (BIAS - 1)) << (MANTISSA - 1), jnp.float32)
    size = jnp.where(code < 2, 0.5 * code, size)
    return jnp.where(nibbles > 7, -size, size)


def from_int4(packed: Any) -> Any:
    return ((unpack(packed).astype(jnp.int8) ^ 8) - 8).astype(jnp.float32)


def from_int8(codes: Any) -> Any:
    return codes.astype(jnp.float32)


def unpack(packed: Any) -> Any:
    """Two codes a byte, the first in the low nibble."""
    both = lax.bitcast_convert_type(packed, jnp.uint8)
    return jnp.stack([both & 15, both >> 4], -1).reshape(*both.shape[:-1], 2 * both.shape[-1])


DECODE = {"e4m3": from_e4m3, "e2m1": from_e2m1, "int8": from_int8, "int4": from_int4}


def simulate(x: Any, fmt: Format) -> Any:
    """x [..., columns] rounded to an element of ROUNDED, a power of two as scale of every block of columns."""
    columns, width = x.shape[-1], fmt.block[1]
    blocks = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -columns % width)])
    blocks = blocks.reshape(*x.shape[:-1], -(-columns // width), width)
    scale = power_of_two_scale(jnp.abs(blocks).max(-1, keepdims=True), fmt)
    values = round_element(blocks / scale, fmt) * scale
    return values.reshape(*x.shape[:-1], -1)[..., :columns]


def power_of_two_scale(amax: Any, fmt: Format) -> Any:
    """The smallest power of two that is at least amax / top; NaN where amax is not finite.

    On bits: XLA divides by a constant as it multiplies with the reciprocal, and amax = top would get the next power.
    """
    amax = jnp.maximum(amax, fmt.floor)
    bits, top = (lax.bitcast_convert_type(jnp.asarray(v, jnp.float32), jnp.int32) for v in (amax, fmt.top))
    exponent = (bits - top + (1 << MANTISSA) - 1) >> MANTISSA
    scale = lax.bitcast_convert_type((exponent + BIAS) << MANTISSA, jnp.float32)
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def round_element(x: Any, fmt: Format) -> Any:
    """To nearest, ties to even, saturating."""
    smallest, mantissa = ROUNDED[fmt.element]
    x = jnp.clip(x, -fmt.top, fmt.top)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & INFINITY, jnp.float32)
    step = jnp.maximum(power, smallest) * 2.0**-mantissa
    return jnp.round(x / step) * step


def round_rows(rows: Any, fmt: Format | None, kept: int) -> Any:
    """Cache rows as they would be read back: the last `kept` channels are never rounded."""
    if fmt is None:
        return rows
    edge: Sequence[Any] = jnp.split(rows, [rows.shape[-1] - kept], -1)
    return jnp.concatenate([simulate(edge[0], fmt), edge[1]], -1)
