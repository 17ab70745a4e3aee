"""Number formats inside a kernel: codes to float32 and back, by integer arithmetic, on every target alike.

Bit for bit what `dsv4_hal.formats` computes: to nearest, ties to even, saturating. Hardware casts would differ between
targets: sm_80 has none for float8, and only some saturate.
"""

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """Whole number nearest to float32 x, ties to even, sign of zero kept, for |x| < 2^22: what is lost in adding
    1.5 * 2^23 is the rest."""
    whole = (x + 12582912.0) - 12582912.0
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two_ceil(x):
    """2^ceil(log2 x) of a normal float32 x > 0: the exponent, one more where the mantissa is not zero."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def decode_e8m0(code):
    """uint8 -> 2^(code - 127), float32; 0 is a subnormal number, 255 NaN."""
    wide = code.to(tl.int32)
    bits = tl.where(wide == 0, 0x00400000, tl.where(wide == 255, 0x7FC00000, wide << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode_e8m0(scale):
    """A power of two, float32 -> uint8."""
    return (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """uint8 -> float32; 0x7F and 0xFF are NaN. No subnormal float32 on the way, which a target may flush."""
    wide = code.to(tl.int32)
    exponent, mantissa = (wide >> 3) & 15, wide & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)  # 2^-9
    size = tl.where((wide & 0x7F) == 0x7F, float("nan"), size)
    # a minus is 0 - x to some versions of triton, and would lose the sign of zero
    return (size.to(tl.int32, bitcast=True) | ((wide & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def round_e4m3(x):
    """Nearest e4m3 value of float32 x, saturating at 448, as float32; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    clamped = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    exponent = tl.minimum(tl.maximum((bits >> 23) & 0xFF, 121), 135)  # 2^-6 .. 2^8: subnormals share a step
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    inverse = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    return nearest(clamped * inverse) * step


@triton.jit
def encode_e4m3(x):
    """Float32 -> code of the nearest e4m3 value, uint8; NaN is 0x7F."""
    value = round_e4m3(x)
    size = tl.abs(value)
    normal = ((size.to(tl.int32, bitcast=True) >> 20) - (120 << 3)) & 0x7F
    code = tl.where(size < 0.015625, (size * 512.0).to(tl.int32), normal)  # below 2^-6: steps of 2^-9
    code = code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return tl.where(x != x, 0x7F, code).to(tl.uint8)


@triton.jit
def decode_e2m1(code):
    """Codes 0..15 -> 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, float32.

    Its bits, put where a float32 has the same ones, are the value times 2^-126: subnormal for 0 and .5, which every
    target multiplies exactly unless a kernel asks for the contrary.
    """
    wide = code.to(tl.int32)
    bits = ((wide << 22) & (7 << 22)) | ((wide << 28) & -2147483648)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def round_e2m1(x):
    """Nearest e2m1 value of float32 x, saturating at 6, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    clamped = tl.where(x > 6.0, 6.0, tl.where(x < -6.0, -6.0, x))
    exponent = tl.minimum(tl.maximum((bits >> 23) & 0xFF, 127), 129)  # 1 .. 4
    step = ((exponent - 1) << 23).to(tl.float32, bitcast=True)
    inverse = ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    return nearest(clamped * inverse) * step


@triton.jit
def encode_e2m1(x):
    """Float32 -> code 0..15 of the nearest e2m1 value, uint8; NaN has none."""
    value = round_e2m1(x)
    size = tl.abs(value)
    # steps of a half up to 2, of one up to 4, of two up to 6
    code = (
        tl.minimum(size, 2.0) * 2.0 + tl.minimum(tl.maximum(size - 2.0, 0.0), 2.0) + tl.maximum(size - 4.0, 0.0) * 0.5
    )
    return (code.to(tl.int32) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)).to(tl.uint8)


@triton.jit
def exponential(x):
    """exp of float32 x to a few units in the last place, x below -87 taken as -87; infinite from 88.4. A hardware
    exponential is off by a share of x."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 89.0, 89.0, x))
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # ln 2 in two parts, the first of few bits
    power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.exp(rest) * power


@triton.jit
def area_tangent(z):
    """atanh of float32 z, |z| <= 1/3, to a few units in the last place."""
    z2 = z * z
    tail = 1.0 / 11 + z2 * (1.0 / 13 + z2 * (1.0 / 15 + z2 * (1.0 / 17)))
    tail = 1.0 / 3 + z2 * (1.0 / 5 + z2 * (1.0 / 7 + z2 * (1.0 / 9 + z2 * tail)))
    return z + z * z2 * tail


@triton.jit
def logarithm(x):
    """Natural logarithm of a normal float32 x > 0 to a few units in the last place; infinity and NaN stay. A hardware
    logarithm is off by as much near 1 as anywhere."""
    bits = x.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F3504F3) >> 23  # so that what is left lies between the roots of 1/2 and of 2
    left = (bits - (whole << 23)).to(tl.float32, bitcast=True)
    rest = 2.0 * area_tangent(tl.div_rn(left - 1.0, left + 1.0))
    whole = whole.to(tl.float32)
    return tl.where(x < float("inf"), whole * 0.693359375 + (rest - whole * 2.12194440e-4), x)
