"""Routing of tokens to experts: the choice, the order, and the sum. Read from documents, not run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dsv4_hal.backends.ascend.emulator.call import emulated
from dsv4_hal.backends.ascend.emulator.numbers import undefined

FP32 = torch.float32


@emulated("npu::npu_moe_gating_top_k")
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T, k] of x's dtype, experts [T, k] int32, and with out_flag the scores [T, E] float32, else undefined.

    Scores are the softmax (norm_type 0), the sigmoid (1) or the root of the softplus (2) of x. The k largest of score +
    bias are chosen, equal ones by their number, or with input_ids those of tid2eid. Weights are scores without bias,
    divided by their sum + eps (norm_type 1 and 2, or renorm), times routed_scaling_factor. ops-transformer,
    aclnnMoeGatingTopKV2.md, commit 0d62d46d; torch_npu's own document knows norm_type 0 and 1 only. Groups of experts
    are refused by a rule. Computed in float32; what the documents do not say is how a large softplus is kept finite.
    """
    wide = x.to(FP32)
    scores = (wide.softmax(-1), wide.sigmoid(), softplus(wide).sqrt())[norm_type]
    if input_ids is not None and tid2eid is not None:
        chosen = tid2eid[input_ids.long()].long()
    else:
        ranked = scores if bias is None else scores + bias.to(FP32)
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    y = scores.gather(-1, chosen)
    if norm_type or renorm:
        y = y / (y.sum(-1, keepdim=True) + eps)
    y = (y * routed_scaling_factor).to(x.dtype)
    return y, chosen.to(torch.int32), scores if out_flag else undefined(scores.shape, FP32)


@emulated("npu::npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: Sequence[int],
    row_idx_type: int,
    x_dtype: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens x [T, H], once for each of their experts [T, K], ordered by expert: rows [T * K, H], and their places.

    The second result says of flat choice i = token * K + choice in which row it is, -1 if its expert is not active
    (row_idx_type 0), or of a row which choice it holds (1). The third counts the rows of each active expert, int64. The
    fourth is the scale of a row: of its token, if given, or of its quantisation (quant_mode 1: INT8, as
    npu_dynamic_quant). What is undefined is NaN or the lowest integer. Choices of one expert keep their order, which
    documents imply (ops-transformer, aclnnMoeInitRoutingV3.md, commit 062bb6e2: a sort by key).
    """
    tokens, k = expert_idx.shape
    first, last = active_expert_range if active_expert_range else (0, expert_num)
    flat = expert_idx.flatten().long()
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, last).sort(stable=True).indices[: int(active.sum())]
    used = len(order)

    position = undefined((tokens * k,), torch.int32)
    if row_idx_type == 0:
        position.fill_(-1)
        position[order] = torch.arange(used, dtype=torch.int32)
    else:
        position[:used] = order.to(torch.int32)
    counts = torch.bincount(flat[active] - first, minlength=last - first)

    moved, scales = x[order // k], undefined((tokens * k,), FP32)
    if quant_mode == 1:
        size = moved.to(FP32).abs().amax(-1) / 127
        moved = (moved.to(FP32) / size.unsqueeze(-1)).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
        scales[:used] = size
    elif scale is not None:
        scales[:used] = scale[order // k]
    rows = undefined((tokens * k, x.shape[1]), moved.dtype)
    rows[:used] = moved
    return rows, position, counts, scales


@emulated("npu::npu_moe_finalize_routing")
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None,
    k: int | None,
) -> Tensor:
    """For each token the sum over its choices of scale * (row + bias of the expert), plus skip1 and skip2: [T, H].

    expanded_src_to_dst_row names the row of a choice: of choice j of token i at [j * T + i] (drop_pad_mode 0), which is
    not the order of npu_moe_init_routing_v2, or at [i * K + j] (2), which is. ops-transformer,
    aclnnMoeFinalizeRoutingV2.md, commit 307cfaf2. Summed in float32, choice by choice; the documents give no dtype.
    """
    tokens = expanded_src_to_dst_row.shape[0] // (scales.shape[1] if scales is not None else k or 1)
    where = expanded_src_to_dst_row.long()
    where = where.unflatten(0, (-1, tokens)).T if drop_pad_mode == 0 else where.unflatten(0, (tokens, -1))
    total = torch.zeros(tokens, expanded_permuted_rows.shape[-1])
    for skip in (skip1, skip2):
        total = total if skip is None else total + skip.to(FP32)
    for choice in range(where.shape[1]):
        rows = expanded_permuted_rows[where[:, choice]].to(FP32)
        if bias is not None and export_for_source_row is not None:
            rows = rows + bias[export_for_source_row[:, choice].long()].to(FP32)
        total = total + (rows if scales is None else rows * scales[:, choice, None].to(FP32))
    return total.to(expanded_permuted_rows.dtype)
