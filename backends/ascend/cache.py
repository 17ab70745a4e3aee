"""Cache rows as the SoC's attention operators read them, and the writes that put them there.

Rows are rounded by torch's own ops, so that every bit is the contract's, and scattered as bytes. The operators that
round on the way round otherwise; the table says how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backends.ascend import runtime
from dsv4_hal.backends.ascend.common import Base
from dsv4_hal.backends.ascend.providers import ALL, INT8, MX, VLLM_ASCEND, Provider, documented
from dsv4_hal.batch import Batch
from dsv4_hal.formats import FORMATS, RowLayout, ascend950_rows, index_fp8_rows, index_int8_rows
from dsv4_hal.ops import KV

SCATTER, SCATTER_V2 = "npu::npu_scatter_nd_update_", "_C_ascend::npu_scatter_nd_update_v2"

PROVIDERS = (
    Provider(
        "kv_store",
        (SCATTER,),
        ALL,
        documented("npu_scatter_nd_update_") + "; vllm-ascend 9391e44c, vllm_ascend/attention/dsa_attn_kv_plan.py, "
        "which calls it on the 950",
        note="rows rounded by torch's own ops, written as int8",
    ),
    Provider(
        "kv_store",
        (SCATTER_V2,),
        INT8,
        VLLM_ASCEND + ", vllm_ascend/device/device_op.py",
        note="rows rounded by torch's own ops, written as int8",
    ),
    Provider(
        "kv_store",
        ("_C_ascend::kv_compress_epilog",),
        MX,
        VLLM_ASCEND + ", csrc/attention/kv_compress_epilog/op_kernel/kv_compress_epilog_common.h",
        refused="its scale is twice the contract's where the largest value is 448 times a power of two: small values "
        "beside it lose a bit",
    ),
    Provider(
        "kv_store",
        ("_C_ascend::indexer_compress_epilog_v2",),
        MX,
        VLLM_ASCEND + ", csrc/attention/indexer_compress_epilog_v2/op_kernel/indexer_compress_epilog_v2_base.h",
        refused="it multiplies by 1 / 448 where the contract divides, so that scales differ in their last bit, and has "
        "no floor",
    ),
    Provider(
        "kv_store",
        ("npu::npu_dynamic_quant",),
        ALL,
        documented("npu_dynamic_quant") + "; vllm-ascend 182b75ea, vllm_ascend/device/device_op.py",
        refused="it divides by the float32 scale that vllm-ascend rounds to float16 afterwards, the contract by the "
        "rounded one",
    ),
    Provider(
        "compressor",
        ("_C_ascend::compressor",),
        ALL,
        VLLM_ASCEND + ", csrc/attention/compressor/README.md",
        refused="nothing rounds between its pooling and its norm, where the contract rounds; a later version has other "
        "arguments",
    ),
)


class Cache(Base):
    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        """The 950's rows of 640 bytes where the profile rounds them to FP8 and they fill its groups; coded indexer keys
        with a scale a row; else plain values."""
        fp8, index = self.numerics.kv == FORMATS["e4m3_1x64"], self.numerics.index
        if kind in ("window", "entries") and fp8 and dim > rope and (dim - rope) % 64 == 0:
            return ascend950_rows(ratio, window, dim, rope)
        if kind == "index" and index == FORMATS["int8_row_fp16"]:
            return index_int8_rows(ratio, dim)
        if kind == "index" and index == FORMATS["e4m3_row_fp32"]:
            return index_fp8_rows(ratio, dim)
        return super().row_layout(kind, dim, rope, ratio, window)

    def kv_store(self, rows: Tensor, layout: RowLayout, batch: Batch, pool: KV | None = None) -> KV:
        """Padding bytes of a row in a pool become zero."""
        provider = None if pool is None else self.provider("kv_store")
        if pool is None or provider is None:
            return super().kv_store(rows, layout, batch, pool)
        source, target = batch.require_plan().write[layout.ratio]
        if batch.fixed and layout.ratio > 1:
            source, target = source[target >= 0], target[target >= 0]
        if not len(target):
            return pool
        made = packed(rows if len(source) == len(rows) else rows[source], layout)
        at = torch.stack([target // pool.rows, target % pool.rows], 1).to(torch.int32)
        for there, new in zip(
            formats.regions(pool.data, layout, pool.rows), formats.regions(made, layout, len(target)), strict=True
        ):
            if SCATTER in provider.calls:
                runtime.load().npu_scatter_nd_update_(there.view(torch.int8), at, new[0].view(torch.int8))
            else:
                torch.ops._C_ascend.npu_scatter_nd_update_v2(there.view(torch.int8), at, new[0].view(torch.int8))
        return pool


def packed(rows: Tensor, layout: RowLayout) -> Tensor:
    """Rows [N, dim] in layout.values, rounded, as one block of a pool: uint8 [1, bytes]."""
    block = formats.new_pool(layout, 1, len(rows), rows.device)
    fields = formats.pack(rows.detach(), layout)
    for name, view in formats.views(block, layout, len(rows)).items():
        view[0].view(torch.uint8).copy_(fields[name].contiguous().view(torch.uint8))
    return block
