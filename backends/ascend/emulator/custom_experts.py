"""vllm-ascend's operators for experts that the backend refuses, so that tests can show why. Commit 182b75ea.

Schemas: csrc/torch_binding.cpp; arithmetic: csrc/moe/moe_gating_top_k_hash/op_kernel, read, never run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import NO_META, emulated


@emulated(
    "_C_ascend::moe_gating_top_k_hash",
    schema="(Tensor x, int k, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, int k_group=1, "
    "int group_count=1, float routed_scaling_factor=1.0, float eps=1e-20, int group_select_mode=0, int renorm=0, "
    "int norm_type=0, bool out_flag=False) -> (Tensor y, Tensor expert_idx, Tensor out)",
    meta=NO_META,
)
def moe_gating_top_k_hash(
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    routed_scaling_factor: float,
    eps: float,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, E] -> weights [T, k], ids int32 [T, k], scores [T, E]; one group. ids from tid2eid[input_ids], if given.

    norm_type 2: scores sqrt(ln(1 + exp x)), without another form for large x; weights divided by their sum.
    """
    scores = {0: lambda v: v.softmax(-1), 1: torch.sigmoid, 2: lambda v: torch.sqrt(torch.log(1 + torch.exp(v)))}[
        norm_type
    ](x.to(torch.float32))
    if tid2eid is not None and input_ids is not None:
        ids = tid2eid[input_ids].to(torch.int64)
    else:
        ids = (scores if bias is None else scores + bias).topk(k, -1).indices
    chosen = scores.gather(-1, ids)
    if norm_type:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + eps)
    return (chosen * routed_scaling_factor).to(x.dtype), ids.to(torch.int32), scores
