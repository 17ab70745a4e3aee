"""What vllm-ascend's operators around streams and rotary embedding demand of a call."""

from __future__ import annotations

import torch

from dsv4_hal.backends.ascend.emulator.rules import (
    Call,
    dtype,
    rank,
    rules,
    same_dtype,
    same_shape,
    same_size,
    size,
    value,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SOURCE = "vllm-ascend 182b75ea, csrc/torch_binding.cpp"


def slice_width(call: Call, name: str, bounds: str) -> str:
    """The last dimension is as wide as the slice between two bounds, which lies within x."""
    first, last = call.arguments[bounds]
    width, tables = call.tensors("x")[0].shape[-1], call.tensors(name)[0].shape[-1]
    if not 0 <= first < last <= width or last - first != tables:
        return f"{bounds} [{first}, {last}] must lie within {width} channels, and {name} be as wide, not {tables}"
    return ""


RULES = (
    *rules(
        "_C_ascend::npu_hc_pre_v2",
        f"{SOURCE}: construct_hc_pre_output_tensor and its checks",
        (dtype, "x", BF16),
        (rank, "x", 3, 4),
        (size, "x", -2, 4),
        (size, "x", -1, 4096, 7168),
        (dtype, "hc_fn", FP32),
        (size, "hc_fn", 0, 24),
        (same_size, "hc_fn", 1, "x", -1, 4),
        (dtype, "hc_scale", FP32),
        (size, "hc_scale", 0, 3),
        (dtype, "hc_base", FP32),
        (size, "hc_base", 0, 24),
        (value, "hc_mult", 4),
    ),
    *rules(
        "_C_ascend::npu_hc_post",
        f"{SOURCE}: check_hc_post_shape_and_dtype",
        (dtype, "x", BF16, FP16, FP32),
        (rank, "x", 3),
        (rank, "residual", 4),
        (same_dtype, "x", "residual"),
        (same_size, "residual", 0, "x", 0),
        (same_size, "residual", 1, "x", 1),
        (same_size, "residual", 3, "x", 2),
        (dtype, "post", BF16, FP16, FP32),
        (rank, "post", 3),
        (same_size, "post", 2, "residual", 2),
        (rank, "comb", 4),
        (same_dtype, "comb", "post"),
        (same_size, "comb", 2, "residual", 2),
        (same_size, "comb", 3, "residual", 2),
    ),
    *rules(
        "_C_ascend::inplace_partial_rotary_mul",
        f"{SOURCE}; vllm_ascend/attention/dsa_v1.py",
        (dtype, "x", BF16, FP16, FP32),
        (rank, "x", 4),
        (dtype, "r1", FP32),
        (rank, "r1", 4),
        (same_dtype, "r1", "r2"),
        (same_shape, "r1", "r2"),
        (value, "rotary_mode", "interleave"),
        (slice_width, "r1", "partial_slice"),
    ),
)
