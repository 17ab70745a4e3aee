"""The contract table: what operators demand of a call that neither schema nor meta kernel looks at.

Every row names the document that it is read from. Rejection tests are made from this table, so that no row is idle.
Where documents disagree the stricter one stands here. `HERE` is no document: the operator takes more than the emulator
computes.
"""

from __future__ import annotations

import torch

from dsv4_hal.backends.ascend.emulator.numbers import E4M3, E5M2, E8M0, FP4
from dsv4_hal.backends.ascend.emulator.rules import (
    absent,
    at_least,
    below,
    between,
    blocks,
    broadcasts,
    code,
    dtype,
    given,
    is_plain,
    is_transposed,
    members,
    multiple,
    one_or,
    one_wide,
    partition,
    rank,
    rules,
    same_dtype,
    same_shape,
    same_size,
    scattered,
    size,
    soc,
    tail,
    turned_alike,
    value,
    within,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I8, I32, I64, U8 = torch.int8, torch.int32, torch.int64, torch.uint8
FLOATS = (BF16, FP16, FP32)
A23, A5 = (soc, "ascend910b", "ascend910_93"), (soc, "ascend950")
INNER = 65535  # largest last dimension that the 910s' matrix units address
SOME = 1 << 62  # at least one, and no other bound
HERE = "the emulator: documented, but not computed here"


def doc(op: str) -> str:
    return f"torch_npu 2.13.0, _op_plugin_docs.py: {op}"


_QUANT = "ops-nn 060fbfdd, quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md"
_GROUPED = "ops-transformer 0dd10d2d, grouped_matmul/docs/aclnnGroupedMatmulV5.md"
_GROUPED_NPU = "op-plugin 02ea4757, torch_npu-npu_grouped_matmul.md"
_MX = "ops-nn 0c8fd4c8, dynamic_mx_quant/docs/aclnnDynamicMxQuantV3.md"
_ROPE = "ops-transformer 04193abe, aclnnRotaryPositionEmbedding.md"
_GATING = "ops-transformer 0d62d46d, aclnnMoeGatingTopKV2.md"
_INIT = "ops-transformer 062bb6e2, aclnnMoeInitRoutingV3.md"
_FINALIZE = "ops-transformer 307cfaf2, aclnnMoeFinalizeRoutingV2.md"
_BATCH = "ops-nn 305dad69, transpose_batch_mat_mul/README.md"
_PARAM = "ops-nn 3605f5c0, trans_quant_param_v2/README.md"
_INT4 = "ops-nn 5657d0a9, aclnn_convert_weight_to_int4_pack.cpp"
_W4A8 = "vllm-ascend 0618b314, quantization/methods/w4a8/w4a8.py"
_MHC_PRE = "ops-transformer 37b9e45d, mhc/mhc_pre/README.md"
_SINKHORN = "ops-transformer 2f8255ac, aclnnMhcSinkhorn.md"

_IS_INT8 = ((dtype, "x1", I8),)
_IS_MX = ((code, "scale_dtype", E8M0),)
_MXFP8 = (*_IS_MX, (dtype, "x1", E4M3), (dtype, "x2", E4M3))
_MXFP4 = (*_IS_MX, (code, "x1_dtype", FP4))
_MXFP84 = (*_IS_MX, (dtype, "x1", E4M3), (code, "x2_dtype", FP4))

QUANT_MATMUL = (
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        (rank, "x1", 2, 3, 4, 5, 6),
        (rank, "x2", 2, 3, 4, 5, 6),
    ),
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        (dtype, "x1", I8),
        (between, "x1", -2, 1, SOME),  # no empty tensor; on 950 it may be
        (between, "x1", -1, 1, INNER),
        (between, "x2", -1, 1, INNER),
        when=(A23,),
    ),
    *rules("npu::npu_quant_matmul", _QUANT, (dtype, "x1", I8, E4M3, U8), (between, "x1", -1, 1, SOME), when=(A5,)),
    *rules("npu::npu_quant_matmul", HERE, (rank, "x2", 2), (absent, "y_scale")),
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        (dtype, "x2", I8),
        (same_size, "x1", -1, "x2", -2),
        (dtype, "scale", FP32, BF16, I64),
        (rank, "scale", 1),
        (one_or, "scale", 0, "x2", -1),
        (dtype, "pertoken_scale", FP32),
        (rank, "pertoken_scale", 1),
        (same_size, "pertoken_scale", 0, "x1", -2),
        (dtype, "bias", I32, BF16, FP16, FP32),
        (same_size, "bias", -1, "x2", -1),
        (code, "output_dtype", None, I8, FP16, BF16, I32),
        when=_IS_INT8,
    ),
    *rules(
        "npu::npu_quant_matmul",
        doc("npu_quant_matmul"),
        (dtype, "scale", FP32, BF16),
        (absent, "offset"),
        when=(*_IS_INT8, (code, "output_dtype", BF16)),
    ),
    *rules(
        "npu::npu_quant_matmul",
        doc("npu_quant_matmul"),
        (dtype, "scale", FP32),
        when=(*_IS_INT8, (code, "output_dtype", FP16), (given, "pertoken_scale")),
    ),
    *rules(
        "npu::npu_quant_matmul",
        doc("npu_quant_matmul"),
        (absent, "pertoken_scale"),
        (dtype, "offset", FP32),
        when=(*_IS_INT8, (code, "output_dtype", None, I8)),
    ),
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        (dtype, "x2", E4M3),
        (same_size, "x1", -1, "x2", -2),
        (dtype, "scale", FP32),
        (one_or, "scale", 0, "x2", -1),
        (given, "pertoken_scale"),
        (dtype, "pertoken_scale", FP32),
        (same_size, "pertoken_scale", 0, "x1", -2),
        (dtype, "bias", FP32),
        (code, "output_dtype", FP16, BF16, FP32),
        when=((dtype, "x1", E4M3), (code, "scale_dtype", None)),
    ),
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        A5,
        (code, "pertoken_scale_dtype", E8M0),
        (given, "pertoken_scale"),
        (dtype, "scale", U8, E8M0),
        (dtype, "pertoken_scale", U8, E8M0),
        (rank, "scale", 3),
        (rank, "pertoken_scale", 3),
        (size, "scale", -1, 2),
        (size, "pertoken_scale", -1, 2),
        (same_size, "scale", -2, "x2", -1),
        (same_size, "pertoken_scale", -3, "x1", -2),
        (turned_alike, "scale", "x2"),
        (code, "output_dtype", FP16, BF16, FP32),
        when=_IS_MX,
    ),
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        (same_size, "x1", -1, "x2", -2),
        (blocks, "scale", -3, "x1", -1, 64),
        (blocks, "pertoken_scale", -2, "x1", -1, 64),
        (value, "group_sizes", (1, 1, 32)),
        (dtype, "bias", FP32),
        when=_MXFP8,
    ),
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        (code, "x2_dtype", FP4),
        (dtype, "x1", U8),
        (is_transposed, "x2"),
        (same_size, "x1", -1, "x2", -2),
        (blocks, "scale", -3, "x1", -1, 64, 2),
        (blocks, "pertoken_scale", -2, "x1", -1, 64, 2),
        (value, "group_sizes", (1, 1, 32)),
        (dtype, "bias", FP32),
        when=_MXFP4,
    ),
    *rules(
        "npu::npu_quant_matmul",
        _QUANT,
        (is_transposed, "x2"),
        (same_size, "x1", -1, "x2", -2, 2),
        (multiple, "x1", -1, 64),
        (blocks, "scale", -3, "x1", -1, 64),
        (blocks, "pertoken_scale", -2, "x1", -1, 64),
        (value, "group_sizes", (1, 1, 32), (0, 0, 32)),
        (dtype, "bias", BF16),
        (code, "output_dtype", BF16),
        when=_MXFP84,
    ),
)

_G = "npu::npu_grouped_matmul"
_G_FLOAT = ((dtype, "x", *FLOATS),)
_G_INT8 = ((dtype, "x", I8), (dtype, "weight", I8))
_G_INT4 = ((dtype, "x", I8), (dtype, "weight", I32))
_G_FP8 = ((dtype, "x", E4M3), (dtype, "weight", E4M3))
_G_FP84 = ((dtype, "x", E4M3), (dtype, "weight", U8))

GROUPED_MATMUL = (
    *rules(
        _G,
        HERE,
        (members, "x", 1),
        (members, "weight", 1),
        (rank, "weight", 3),
        (value, "group_type", 0),
        (value, "group_list_type", 0, 1),
        (value, "act_type", 0),
        (absent, "offset"),
        (absent, "antiquant_offset"),
    ),
    *rules(
        _G,
        _GROUPED,
        (rank, "x", 2),
        (is_plain, "x"),
        (value, "split_item", 2, 3),
        (given, "group_list"),
        (dtype, "group_list", I64),
        (rank, "group_list", 1),
        (same_size, "group_list", 0, "weight", 0),
        (between, "group_list", 0, 1, 1024),
        (absent, "activation_input"),
        (absent, "activation_quant_scale"),
        (absent, "activation_quant_offset"),
    ),
    *rules(
        _G,
        _GROUPED,
        (dtype, "x", *FLOATS, I8),
        (dtype, "weight", *FLOATS, I8, I32),
        (between, "x", -1, 1, INNER),
        (between, "weight", -1, 1, INNER),
        when=(A23,),
    ),
    *rules(_G, doc("npu_grouped_matmul"), (partition, "group_list", "group_list_type", "x", True), when=(A23,)),
    *rules(
        _G,
        _GROUPED,
        (dtype, "x", *FLOATS, I8, E4M3),
        (dtype, "weight", *FLOATS, I8, I32, E4M3, U8),
        (partition, "group_list", "group_list_type", "x", False),
        when=(A5,),
    ),
    *rules(
        _G,
        _GROUPED,
        (same_dtype, "x", "weight"),
        (same_size, "x", -1, "weight", -2),
        (absent, "scale"),
        (absent, "per_token_scale"),
        (absent, "antiquant_scale"),
        when=_G_FLOAT,
    ),
    *rules(_G, _GROUPED, (code, "output_dtype", None, BF16), when=((dtype, "x", BF16),)),
    *rules(_G, _GROUPED, (code, "output_dtype", None, FP16), (dtype, "bias", FP16), when=((dtype, "x", FP16), A23)),
    *rules(_G, _GROUPED, (code, "output_dtype", None, FP32), (dtype, "bias", FP32), when=((dtype, "x", FP32),)),
    *rules(_G, _GROUPED, (dtype, "bias", FP32), when=((dtype, "x", BF16), A23)),
    *rules(_G, _GROUPED, (dtype, "bias", BF16, FP32), when=((dtype, "x", BF16), A5)),
    *rules(
        _G,
        _GROUPED,
        (same_size, "x", -1, "weight", -2),
        (rank, "scale", 2),
        (same_size, "scale", 0, "weight", 0),
        (same_size, "scale", 1, "weight", -1),
        (dtype, "scale", BF16, FP32),
        (dtype, "per_token_scale", FP32),
        (rank, "per_token_scale", 1),
        (same_size, "per_token_scale", 0, "x", 0),
        (code, "output_dtype", FP16, BF16, I32),
        (absent, "antiquant_scale"),
        when=_G_INT8,
    ),
    *rules(_G, HERE, (dtype, "bias", I32), when=_G_INT8),
    *rules(_G, _GROUPED, (given, "scale"), (dtype, "scale", FP32), when=(*_G_INT8, (code, "output_dtype", FP16))),
    *rules(
        _G,
        _GROUPED,
        (given, "scale"),
        (dtype, "scale", BF16),
        when=(*_G_INT8, (code, "output_dtype", BF16), A23),
    ),
    *rules(_G, _GROUPED, (given, "scale"), when=(*_G_INT8, (code, "output_dtype", BF16), A5)),
    *rules(
        _G,
        _GROUPED,
        (absent, "scale"),
        (absent, "per_token_scale"),
        when=(*_G_INT8, (code, "output_dtype", I32)),
    ),
    *rules(
        _G,
        _GROUPED,
        (same_size, "x", -1, "weight", -2),
        (between, "x", -1, 1, 18432),
        (is_plain, "weight"),
        (given, "scale"),
        (given, "bias"),
        (given, "per_token_scale"),
        (dtype, "scale", I64),
        (dtype, "bias", FP32),
        (dtype, "per_token_scale", FP32),
        (rank, "scale", 3),
        (same_size, "scale", -1, "weight", -1, 8),
        (rank, "bias", 2),
        (same_size, "bias", 0, "weight", 0),
        (same_size, "bias", 1, "weight", -1, 8),
        (rank, "per_token_scale", 1),
        (same_size, "per_token_scale", 0, "x", 0),
        (code, "output_dtype", FP16, BF16),
        (value, "group_list_type", 1),
        (absent, "antiquant_scale"),
        when=_G_INT4,
    ),
    *rules(_G, _W4A8, (size, "scale", 1, 1), when=_G_INT4),  # a scale a channel: one for 256 of K is refused there
    *rules(
        _G,
        _GROUPED,
        A5,
        (same_size, "x", -1, "weight", -2),
        (code, "scale_dtype", E8M0),
        (code, "per_token_scale_dtype", E8M0),
        (given, "scale"),
        (given, "per_token_scale"),
        (dtype, "scale", U8, E8M0),
        (dtype, "per_token_scale", U8, E8M0),
        (rank, "scale", 4),
        (rank, "per_token_scale", 3),
        (size, "scale", -1, 2),
        (size, "per_token_scale", -1, 2),
        (blocks, "scale", 1, "x", -1, 64),
        (same_size, "scale", 2, "weight", -1),
        (turned_alike, "scale", "weight"),
        (blocks, "per_token_scale", 1, "x", -1, 64),
        (same_size, "per_token_scale", 0, "x", 0),
        (absent, "bias"),
        (code, "output_dtype", FP16, BF16, FP32),
        when=_G_FP8,
    ),
    *rules(
        _G,
        _GROUPED_NPU,
        A5,
        (code, "weight_dtype", FP4),
        (code, "per_token_scale_dtype", E8M0),
        (is_transposed, "weight"),
        (same_size, "x", -1, "weight", -2, 2),
        (multiple, "x", -1, 64),
        (multiple, "weight", -1, 32),
        (absent, "scale"),
        (given, "antiquant_scale"),
        (given, "per_token_scale"),
        (dtype, "antiquant_scale", U8, E8M0),
        (dtype, "per_token_scale", U8, E8M0),
        (rank, "antiquant_scale", 4),
        (rank, "per_token_scale", 3),
        (size, "antiquant_scale", -1, 2),
        (size, "per_token_scale", -1, 2),
        (blocks, "antiquant_scale", 1, "x", -1, 64),
        (same_size, "antiquant_scale", 2, "weight", -1),
        (blocks, "per_token_scale", 1, "x", -1, 64),
        (same_size, "per_token_scale", 0, "x", 0),
        (code, "output_dtype", FP16, BF16),
        when=_G_FP84,
    ),
    *rules(_G, HERE, (absent, "bias"), when=_G_FP84),
)

BATCH_MATMUL = (
    *rules(
        "npu::npu_transpose_batchmatmul",
        _BATCH,
        (rank, "input", 3),
        (rank, "weight", 3),
        (same_dtype, "input", "weight"),
        (absent, "bias"),
    ),
    *rules(
        "npu::npu_transpose_batchmatmul",
        _BATCH,
        (between, "input", 0, 1, INNER),
        (between, "input", 1, 1, INNER),
        (between, "input", 2, 1, INNER),
        (between, "weight", 2, 1, INNER),
        when=(A23,),
    ),
    *rules(
        "npu::npu_transpose_batchmatmul",
        _BATCH,
        (between, "input", 0, 1, SOME),
        (between, "input", 1, 1, SOME),
        (between, "input", 2, 1, SOME),
        (between, "weight", 2, 1, SOME),
        when=(A5,),
    ),
    *rules(
        "npu::npu_transpose_batchmatmul",
        HERE,
        (value, "perm_x2", None, (0, 1, 2)),
        (absent, "scale"),
        (value, "batch_split_factor", 1),
    ),
    *rules("npu::npu_transpose_batchmatmul", _BATCH, (same_size, "input", 2, "weight", 1)),
    *rules(
        "npu::npu_transpose_batchmatmul",
        _BATCH,
        (same_size, "input", 1, "weight", 0),
        when=((value, "perm_x1", (1, 0, 2)),),
    ),
    *rules(
        "npu::npu_transpose_batchmatmul",
        _BATCH,
        (same_size, "input", 0, "weight", 0),
        when=((value, "perm_x1", None, (0, 1, 2)),),
    ),
)

QUANTIZE = (
    *rules(
        "npu::npu_dynamic_quant",
        doc("npu_dynamic_quant"),
        (dtype, "input", FP16, BF16),
        (rank, "input", 2, 3, 4, 5, 6, 7, 8),
        (same_dtype, "smooth_scales", "input"),
        (same_size, "smooth_scales", -1, "input", -1),
    ),
    *rules(
        "npu::npu_dynamic_quant",
        HERE,
        (rank, "smooth_scales", 1),
        (absent, "group_index"),
        (code, "dst_type", None, I8, E4M3, E5M2),
        (value, "quant_mode", "pertoken"),
        (value, "dst_type_max", 0.0),
    ),
    *rules("npu::npu_dynamic_quant", doc("npu_dynamic_quant"), (code, "dst_type", None, I8), when=(A23,)),
    *rules(
        "npu::npu_dynamic_mx_quant",
        _MX,
        A5,
        (dtype, "input", *FLOATS),
        (rank, "input", 1, 2, 3, 4, 5, 6, 7),
        (at_least, "max_low_bound", 0.0),
    ),
    *rules("npu::npu_dynamic_mx_quant", _MX, (value, "block_size", 32), when=((dtype, "input", FP32),)),
    *rules("npu::npu_dynamic_mx_quant", _MX, (value, "max_low_bound", 0.0), when=((value, "scale_alg", 0, 2, None),)),
    *rules(
        "npu::npu_dynamic_mx_quant",
        _MX,
        (value, "round_mode", "rint"),
        (value, "scale_alg", 0, 1),
        (value, "dst_type_max", 0.0),
        when=((code, "dst_type", E4M3, E5M2),),
    ),
    *rules(
        "npu::npu_dynamic_mx_quant",
        _MX,
        (value, "round_mode", "rint", "floor", "round"),
        when=((code, "dst_type", FP4),),
    ),
    *rules(
        "npu::npu_dynamic_mx_quant",
        HERE,
        (code, "dst_type", E4M3, E5M2, FP4),
        (value, "scale_alg", 0, 1),
        (value, "dst_type_max", 0.0),
    ),
    *rules("npu::npu_dynamic_mx_quant", HERE, (value, "scale_alg", 0), when=((code, "dst_type", FP4),)),
    *rules(
        "npu::npu_trans_quant_param",
        _PARAM,
        (dtype, "scale", FP32),
        (dtype, "offset", FP32),
    ),
)

NORM_ROPE = (
    *rules(
        "npu::npu_rms_norm",
        doc("npu_rms_norm"),
        (dtype, "input", *FLOATS),
        (same_dtype, "gamma", "input"),
        (tail, "gamma", "input"),
    ),
    *rules(
        "npu::npu_rotary_mul",
        doc("npu_rotary_mul"),
        (dtype, "input", *FLOATS),
        (rank, "input", 4),
        (rank, "r1", 4),
        (rank, "r2", 4),
        (value, "rotary_mode", "half", "interleave"),
        (multiple, "input", -1, 2),
        (between, "input", -1, 2, 895),
    ),
    *rules(
        "npu::npu_rotary_mul",
        _ROPE,
        (same_dtype, "r1", "input"),
        (same_dtype, "r2", "input"),
        (same_shape, "r1", "r2"),
        (broadcasts, "r1", "input"),
    ),
    *rules("npu::npu_rotary_mul", _ROPE, (one_wide, "r1"), when=((value, "rotary_mode", "interleave"), A23)),
    *rules("npu::npu_rotary_mul", HERE, (absent, "rotate")),
)

ACTIVATION = (
    *rules("npu::npu_swiglu", doc("npu_swiglu"), (dtype, "input", *FLOATS)),
    *rules("npu::npu_swiglu", doc("npu_swiglu"), (multiple, "input", -1, 2), when=((value, "dim", -1),)),
    *rules("npu::npu_clipped_swiglu", doc("npu_clipped_swiglu"), (dtype, "x", *FLOATS), (is_plain, "x")),
    *rules("npu::npu_clipped_swiglu", doc("npu_clipped_swiglu"), (rank, "x", 2, 3, 4, 5, 6, 7, 8)),
    *rules("npu::npu_clipped_swiglu", doc("npu_clipped_swiglu"), (multiple, "x", -1, 2), when=((value, "dim", -1),)),
    *rules("npu::npu_clipped_swiglu", HERE, (absent, "group_index")),
)

ROUTING = (
    *rules(
        "npu::npu_moe_gating_top_k",
        _GATING,
        (dtype, "x", *FLOATS),
        (between, "x", -1, 1, 2048),
        (same_dtype, "bias", "x"),
        (same_size, "bias", 0, "x", 1),
        (at_least, "k", 1),
        (value, "norm_type", 0, 1, 2),
        (dtype, "input_ids", I32, I64),
        (dtype, "tid2eid", I32, I64),
        (between, "tid2eid", 1, 1, 64),
        (below, "input_ids", "tid2eid", 0),
        (below, "tid2eid", "x", 1),
    ),
    *rules("npu::npu_moe_gating_top_k", _GATING, (value, "renorm", 0, 1), when=((value, "norm_type", 0),)),
    *rules("npu::npu_moe_gating_top_k", HERE, (value, "k_group", 1), (value, "group_count", 1)),
    *rules(
        "npu::npu_moe_init_routing_v2",
        doc("npu_moe_init_routing_v2"),
        (dtype, "x", *FLOATS, I8),
        (dtype, "expert_idx", I32),
        (dtype, "scale", FP32),
        (absent, "offset"),
        (value, "drop_pad_mode", 0),
        (value, "expert_tokens_num_type", 1, 2),
        (value, "expert_tokens_num_flag", True),
        (at_least, "expert_num", 1),
        (value, "quant_mode", -1, 1),
    ),
    *rules(
        "npu::npu_moe_init_routing_v2",
        HERE,
        (value, "expert_tokens_num_type", 1),
        (value, "active_num", -1, 0),
        (value, "x_dtype", None),
    ),
    *rules("npu::npu_moe_init_routing_v2", _INIT, (dtype, "x", *FLOATS), when=((value, "quant_mode", 1),)),
    *rules("npu::npu_moe_init_routing_v2", HERE, (absent, "scale"), when=((value, "quant_mode", 1),)),
    *rules(
        "npu::npu_moe_finalize_routing",
        doc("npu_moe_finalize_routing"),
        (dtype, "expanded_permuted_rows", *FLOATS),
        (rank, "expanded_permuted_rows", 2),
        (same_dtype, "skip1", "expanded_permuted_rows"),
        (same_dtype, "skip2", "expanded_permuted_rows"),
        (same_dtype, "bias", "expanded_permuted_rows"),
        (same_dtype, "scales", "expanded_permuted_rows"),
        (dtype, "expanded_src_to_dst_row", I32),
        (rank, "expanded_src_to_dst_row", 1),
        (below, "expanded_src_to_dst_row", "expanded_permuted_rows", 0),
        (dtype, "export_for_source_row", I32),
        (below, "export_for_source_row", "bias", 0),
        (same_shape, "export_for_source_row", "scales"),
    ),
    *rules("npu::npu_moe_finalize_routing", _FINALIZE, (value, "drop_pad_mode", 0, 1, 2, 3)),
    *rules("npu::npu_moe_finalize_routing", HERE, (value, "drop_pad_mode", 0, 2)),
    *rules("npu::npu_moe_finalize_routing", _FINALIZE, (given, "export_for_source_row"), when=((given, "bias"),)),
    *rules("npu::npu_moe_finalize_routing", _FINALIZE, (given, "skip1"), when=((given, "skip2"),)),
)

STREAMS = (
    *rules(
        "npu::npu_mhc_pre",
        doc("npu_mhc_pre"),
        A5,
        (dtype, "x", BF16, FP16),
        (dtype, "phi", FP32),
        (dtype, "alpha", FP32),
        (dtype, "bias", FP32),
        (dtype, "gamma", FP32),
        (rank, "phi", 2),
        (rank, "bias", 1),
        (same_size, "bias", 0, "phi", 0),
        (tail, "gamma", "x"),
    ),
    *(
        rule
        for n in (4, 6, 8)
        for rule in rules(
            "npu::npu_mhc_pre",
            doc("npu_mhc_pre"),
            (size, "phi", 0, n * n + 2 * n),
            (same_size, "phi", 1, "x", -1, n),
            when=((size, "x", -2, n),),
        )
    ),
    *rules(
        "npu::npu_mhc_pre",
        _MHC_PRE,
        (size, "x", -2, 4, 6, 8),
        (between, "x", -1, 1, 16384),
        (multiple, "x", -1, 16),
    ),
    *rules("npu::npu_mhc_pre", HERE, (size, "alpha", 0, 3)),
    *rules("npu::npu_mhc_sinkhorn", _SINKHORN, A5, (dtype, "x", FP32), (same_size, "x", -1, "x", -2)),
    *rules("npu::npu_mhc_sinkhorn", HERE, (value, "out_flag", 0)),
    *rules(
        "npu::npu_mhc_post",
        doc("npu_mhc_post"),
        A5,
        (dtype, "x", BF16, FP16),
        (rank, "x", 3, 4),
        (same_dtype, "h_out", "x"),
        (dtype, "h_res", FP32),
        (dtype, "h_post", FP32),
        (same_size, "h_out", 0, "x", 0),
        (same_size, "h_out", -1, "x", -1),
        (same_size, "h_post", 0, "x", 0),
        (same_size, "h_post", -1, "x", -2),
        (same_size, "h_res", 0, "x", 0),
        (same_size, "h_res", -1, "x", -2),
        (same_size, "h_res", -2, "x", -2),
        (size, "x", -2, 4, 6, 8),
    ),
)

STORAGE = (
    *rules(
        "npu::npu_scatter_nd_update_",
        doc("npu_scatter_nd_update_"),
        (dtype, "input", *FLOATS, torch.bool, I64, I8),
        (same_dtype, "updates", "input"),
        (dtype, "indices", I32, I64),
        (scattered, "updates", "indices", "input"),
    ),
    *rules(
        "npu::npu_convert_weight_to_int4pack",
        doc("npu_convert_weight_to_int4pack"),
        (dtype, "weight", I32),
        (is_plain, "weight"),
        (multiple, "weight", -1, 8),
        (within, "weight", -8, 7),
    ),
    *rules("npu::npu_convert_weight_to_int4pack", _INT4, (rank, "weight", 2, 3)),
    *rules("npu::npu_format_cast", doc("npu_format_cast"), (value, "acl_format", 2, 29)),
)

RULES = (
    *QUANT_MATMUL,
    *GROUPED_MATMUL,
    *BATCH_MATMUL,
    *QUANTIZE,
    *NORM_ROPE,
    *ACTIVATION,
    *ROUTING,
    *STREAMS,
    *STORAGE,
)
