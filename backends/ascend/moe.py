"""Mixture of experts: the permutation to expert order, and the clamped SwiGLU in float32.

Routing and the sum over experts are torch's own: what the operators for them compute is another function, or not said.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend import runtime
from dsv4_hal.backends.ascend.common import Base
from dsv4_hal.backends.ascend.providers import ALL, INT8, MX, VLLM_ASCEND, Limit, Provider, documented
from dsv4_hal.backends.reference.gemm import emit

CLIPPED = "npu::npu_clipped_swiglu"

PROVIDERS = (
    Provider(
        "swiglu",
        (CLIPPED,),
        INT8,
        documented("npu_clipped_swiglu") + "; hicann/ops-nn 07bd16b8, activation/clipped_swiglu/README.md",
        note="in float32, alpha 1 and bias 0, then the routing weight",
        limits={"clamp": Limit(among=(True,))},
    ),
    Provider("swiglu", ("npu::npu_swiglu",), ALL, documented("npu_swiglu"), note="in float32, after torch's own clamp"),
    Provider(
        "swiglu",
        ("_C_ascend::npu_swiglu_group_quant",),
        MX,
        VLLM_ASCEND,
        refused="it quantises its result, and takes 0 for no clamp",
    ),
    Provider(
        "permute",
        ("npu::npu_moe_init_routing_v2",),
        ALL,
        documented("npu_moe_init_routing_v2") + "; hicann/ops-transformer 062bb6e2, moe/moe_init_routing_v3/README.md",
        note="not quantised; that equal ids keep their order was read, not run",
        limits={"experts": Limit(most=10240)},
    ),
    Provider(
        "unpermute",
        ("npu::npu_moe_finalize_routing",),
        ALL,
        documented("npu_moe_finalize_routing"),
        refused="it sums in a dtype that it does not name and returns that of the rows, the contract float32",
    ),
    Provider(
        "unpermute",
        ("npu::npu_moe_token_unpermute",),
        ALL,
        documented("npu_moe_token_unpermute"),
        refused="it returns the dtype of the rows, the contract float32",
    ),
    Provider(
        "route",
        ("npu::npu_moe_gating_top_k",),
        ALL,
        documented("npu_moe_gating_top_k"),
        refused="its scores are softmax or sigmoid, not sqrt(softplus), and nothing says whether they are normalised",
    ),
    Provider(
        "route",
        ("_C_ascend::moe_gating_top_k_hash",),
        ALL,
        VLLM_ASCEND + ", csrc/moe/moe_gating_top_k_hash/op_kernel",
        refused="it takes exp(x) as it is, which overflows above 88 where the contract is linear; which of equal "
        "scores comes first is not said",
    ),
    Provider(
        "moe_experts",
        ("npu::npu_grouped_matmul_swiglu_quant_v2",),
        ALL,
        documented("npu_grouped_matmul_swiglu_quant_v2"),
        refused="it has no clamp, and no routing weight in front of the rounding",
    ),
)


class Moe(Base):
    def permute(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        if not ids.numel() or self.provider("permute", experts=experts) is None:
            return super().permute(x, ids, experts)
        rows, order, counts, _ = runtime.load().npu_moe_init_routing_v2(
            x,
            ids.to(torch.int32),
            active_num=-1,
            expert_num=experts,
            expert_tokens_num_type=1,  # counts
            expert_tokens_num_flag=True,
            quant_mode=-1,
            active_expert_range=[0, experts],
            row_idx_type=1,  # where each row came from
        )
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return rows, offsets, order.to(torch.int64)

    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        provider = self.provider("swiglu", clamp=limit is not None) if gate_up.numel() else None
        if provider is None:
            return super().swiglu(gate_up, limit, row_weight, out=out)
        npu, x = runtime.load(), gate_up.to(self.numerics.accumulate).contiguous()
        if CLIPPED in provider.calls:
            hidden = npu.npu_clipped_swiglu(x, dim=-1, alpha=1.0, limit=limit, bias=0.0, interleaved=False)
        else:
            if limit is not None:
                gate, up = x.chunk(2, -1)
                x = torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], -1)
            hidden = npu.npu_swiglu(x, dim=-1)
        if row_weight is not None:
            hidden = hidden * row_weight[:, None]
        return emit(hidden.to(self.numerics.storage), out)
