"""Number formats and cache rows: what stored values are, as data, and the arithmetic that makes them.

`types` says which formats there are, and carries stored values (QTensor, Weight). `elements` rounds one value to what a
code can hold. `quantize` adds the scales: a tensor to codes and back, the same at the level of values for the rounding
points of a step, and FP4 weights to FP8 without loss. `kv_rows` lays quantised rows out in the blocks of a cache, the
way each vendor's attention kernels read them. Nothing here knows a model, an op or a device.
"""

from dsv4_hal.formats.elements import (
    cut_hf32,
    decode_e2m1,
    decode_int4,
    encode_e2m1,
    encode_int4,
    pack_nibbles,
    power_of_two_ceil,
    round_e2m1,
    round_e4m3,
    unpack_nibbles,
)
from dsv4_hal.formats.kv_rows import (
    Field,
    RowLayout,
    ascend950_rows,
    flashmla_rows,
    index_fp4_rows,
    index_fp8_rows,
    index_int8_rows,
    load,
    new_pool,
    pack,
    plain_rows,
    regions,
    round_rows,
    store,
    unpack,
    views,
)
from dsv4_hal.formats.quantize import dequantize, encode, mxfp4_to_e4m3, quantize, simulate
from dsv4_hal.formats.types import FORMATS, Format, QTensor, Weight, plain_format

__all__ = [
    "FORMATS",
    "Field",
    "Format",
    "QTensor",
    "RowLayout",
    "Weight",
    "ascend950_rows",
    "cut_hf32",
    "decode_e2m1",
    "decode_int4",
    "dequantize",
    "encode",
    "encode_e2m1",
    "encode_int4",
    "flashmla_rows",
    "index_fp4_rows",
    "index_fp8_rows",
    "index_int8_rows",
    "load",
    "mxfp4_to_e4m3",
    "new_pool",
    "pack",
    "pack_nibbles",
    "plain_format",
    "plain_rows",
    "power_of_two_ceil",
    "quantize",
    "regions",
    "round_e2m1",
    "round_e4m3",
    "round_rows",
    "simulate",
    "store",
    "unpack",
    "unpack_nibbles",
    "views",
]
