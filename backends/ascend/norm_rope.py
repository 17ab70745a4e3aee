"""RMS norm and rotary embedding, both in float32 around the operators: what these round in between is not the contract.

The per-head query norm is the reference's: the contract rounds each of its steps. So is the Hadamard rotation: the
vendors multiply by a stored matrix in bfloat16, whose sums nothing describes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend import runtime
from dsv4_hal.backends.ascend.common import Base
from dsv4_hal.backends.ascend.providers import ALL, VLLM_ASCEND, Limit, Provider, documented
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.batch import CosSin

PARTIAL = "_C_ascend::inplace_partial_rotary_mul"

PROVIDERS = (
    Provider(
        "rms_norm",
        ("npu::npu_rms_norm",),
        ALL,
        documented("npu_rms_norm") + "; hicann/ops-nn 2ed368e0, norm/rms_norm/README.md",
        note="in float32, with a weight; the query norm, which has none, is rounded at every step and is torch's",
    ),
    Provider(
        "rope",
        (PARTIAL,),
        ALL,
        VLLM_ASCEND + ", vllm_ascend/attention/dsa_v1.py",
        note="bfloat16 rows, float32 tables",
        limits={"rotary": Limit(multiple=2, most=896), "storage": Limit(among=(torch.bfloat16,))},
    ),
    Provider(
        "rope",
        ("npu::npu_rotary_mul",),
        ALL,
        documented("npu_rotary_mul") + "; hicann/ops-transformer 0eb0312c, posembedding/rotary_position_embedding",
        note="in float32: tables of bfloat16 are a known fault",
        limits={"heads": Limit(most=999), "rotary": Limit(multiple=2, most=894)},
    ),
    Provider(
        "hadamard",
        ("aten::linear",),
        ALL,
        "vllm-ascend 182b75ea, vllm_ascend/device/device_op.py",
        refused="a product with a stored matrix in bfloat16 rounds where the contract does not",
    ),
)


class NormRope(Base):
    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        if weight is None or not x.numel() or self.provider("rms_norm") is None:
            return super().rms_norm(x, weight, eps, out=out)
        wide = self.numerics.accumulate
        y, _ = runtime.load().npu_rms_norm(x.to(wide), weight.to(wide), eps)
        return emit(y.to(x.dtype), out)

    def rope(self, x: Tensor, cos_sin: CosSin, inverse: bool = False, *, out: Tensor | None = None) -> Tensor:
        heads = x.shape[1:-1].numel()
        sizes = {"heads": heads, "rotary": 2 * cos_sin[0].shape[1], "storage": x.dtype}
        provider = self.provider("rope", **sizes) if x.numel() else None
        if provider is None:
            return super().rope(x, cos_sin, inverse, out=out)
        rows = x.reshape(len(x), 1, heads, x.shape[-1])
        cos, sin = (table.repeat_interleave(2, -1)[:, None, None] for table in cos_sin)  # [N, 1, 1, R]
        sin = -sin if inverse else sin
        kept = x.shape[-1] - cos.shape[-1]
        if PARTIAL in provider.calls:
            y = rows.clone(memory_format=torch.contiguous_format)
            torch.ops._C_ascend.inplace_partial_rotary_mul(y, cos, sin, "interleave", [kept, x.shape[-1]])
        else:  # rows as the sequence of a batch of one: [S, B, N, D], tables [S, 1, 1, D]
            turned = runtime.load().npu_rotary_mul(
                rows[..., kept:].to(self.numerics.accumulate), cos, sin, rotary_mode="interleave"
            )
            y = torch.cat([rows[..., :kept], turned.to(x.dtype)], -1)
        return emit(y.view(x.shape), out)
