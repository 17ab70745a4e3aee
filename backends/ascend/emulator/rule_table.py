"""The contract table: what operators demand of a call that neither schema nor meta kernel looks at.

Every row names the document that it is read from. Rejection tests are made from this table, so that no row can be idle.
Where a document and the host code of op-plugin disagree, the stricter one stands here.
"""

from __future__ import annotations

import torch

from dsv4_hal.backends.ascend.emulator.custom_rules import RULES as CUSTOM
from dsv4_hal.backends.ascend.emulator.rules import dtype, rank, rules, same_dtype, same_size

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def doc(op: str) -> str:
    return f"torch_npu 2.13.0, _op_plugin_docs.py: {op}"


RULES = (
    *rules(
        "npu::npu_rms_norm",
        doc("npu_rms_norm"),
        (dtype, "input", BF16, FP16, FP32),
        (same_dtype, "input", "gamma"),
        (rank, "gamma", 1),
        (same_size, "gamma", -1, "input", -1),
    ),
    *CUSTOM,
)
