"""vllm-ascend's writes into caches: rows as they are, and rows that it quantises on the way.

Schemas: vllm-ascend csrc/torch_binding.cpp, commit 182b75ea. The two that quantise have no document; their arithmetic
is read in the kernels' sources (csrc/attention/kv_compress_epilog and indexer_compress_epilog_v2, op_kernel). None of
it was run on a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator import custom_rules
from dsv4_hal.backends.ascend.emulator.call import NO_META, emulated

ROPE = 64  # channels at the end of a row that are copied as they are
ROW = 128  # bytes that a row of kv_compress_epilog is padded to a multiple of
TOP, FLOOR = 448.0, 1e-4
_INVERSE = 0x3B124925  # 1 / 448 as the kernels hold it, in the bits of a float32


@emulated(
    "_C_ascend::npu_scatter_nd_update_v2",
    schema="(Tensor(a!) var, Tensor indices, Tensor update) -> ()",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::npu_scatter_nd_update_v2"),
)
def npu_scatter_nd_update_v2(var: Tensor, indices: Tensor, update: Tensor) -> None:
    """var[indices] = update, indices [N, a] over the first a dimensions of var."""
    var[indices.long().unbind(-1)] = update.view(len(indices), *var.shape[indices.shape[-1] :])


@emulated(
    "_C_ascend::kv_compress_epilog",
    schema="(Tensor(a!) kv_compress_cache, Tensor x, Tensor slot_mapping, int quant_group_size, int quant_mode, "
    "bool round_scale_flag, int layout) -> ()",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::kv_compress_epilog"),
)
def kv_compress_epilog(
    kv_compress_cache: Tensor, x: Tensor, slot_mapping: Tensor, quant_group_size: int, **_: Any
) -> None:
    """Rows [N, d] bfloat16 into rows [n, 1, bytes] that slot_mapping [N] names, -1 for none: 64 bfloat16, then e4m3,
    then an e8m0 scale for each group, then zeros.

    The scale is the power of two above amax / 448, also where that is a power of two itself: the kernel asks the
    exponent, and not the mantissa, whether anything is left to round up.
    """
    kept = x[:, :-ROPE].to(torch.float32).unflatten(1, (-1, quant_group_size))
    amax = kept.abs().amax(-1, keepdim=True).clamp(min=FLOOR)
    exponent = torch.frexp(amax * _inverse()).exponent  # the power of two above
    codes = torch.ldexp(kept, -exponent).clamp(-TOP, TOP).to(torch.float8_e4m3fn).flatten(1)
    scales = (exponent + 127).to(torch.uint8).flatten(1)
    rope = x[:, -ROPE:].contiguous().view(torch.uint8)
    row = torch.cat([rope, codes.view(torch.uint8), scales], 1)
    row = torch.nn.functional.pad(row, (0, -row.shape[1] % ROW))
    there = slot_mapping >= 0
    kv_compress_cache.view(torch.uint8)[slot_mapping[there].long(), 0, : row.shape[1]] = row[there]


@emulated(
    "_C_ascend::indexer_compress_epilog_v2",
    schema="(Tensor(a!) indexer_compress_cache, Tensor x, Tensor slot_mapping, int layout=2) -> ()",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::indexer_compress_epilog_v2"),
)
def indexer_compress_epilog_v2(indexer_compress_cache: Tensor, x: Tensor, slot_mapping: Tensor, **_: Any) -> None:
    """Rows [N, d] into slots of blocks [blocks, rows, 1, d + 4] bytes: e4m3 of every row, then a float32 scale of every
    row. The scale is amax times the float32 nearest to 1 / 448, without a floor; 0 for a row of zeros."""
    values = x.to(torch.float32)
    scale = values.abs().amax(-1, keepdim=True) * _inverse()
    codes = torch.where(scale > 0, values / scale, values).clamp(-TOP, TOP).to(torch.float8_e4m3fn)
    blocks, rows, d = len(indexer_compress_cache), indexer_compress_cache.shape[1], x.shape[1]
    flat = indexer_compress_cache.view(blocks, -1)
    there = slot_mapping >= 0
    slot = slot_mapping[there].long()
    flat[:, : rows * d].view(blocks, rows, d)[slot // rows, slot % rows] = codes[there].view(torch.uint8)
    flat[:, rows * d :].view(blocks, rows, 4)[slot // rows, slot % rows] = scale[there].view(torch.uint8)


def _inverse() -> Tensor:
    return torch.tensor(_INVERSE, dtype=torch.int32).view(torch.float32)
