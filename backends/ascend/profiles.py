"""The numeric profiles of Ascend NPUs: modes `a3` and `a5`, for the reference as well.

Read from the documents of torch_npu 2.13.0 and the sources of vllm-ascend (commit 182b75ea), never measured on a
device.
"""

from __future__ import annotations

from dataclasses import replace

from dsv4_hal.formats import FORMATS
from dsv4_hal.numerics import deployed

# 910B and 910C: weights of INT8 and INT4 by output channel, activations of INT8 by token, rows of bfloat16, indexer
# keys of INT8 with a float16 scale; the projection of the streams in HF32.
A3 = replace(
    deployed(),
    mode="a3",
    activation=FORMATS["int8_channel"],
    kv=None,
    index=FORMATS["int8_row_fp16"],
    hf32=True,
)

# 950: MX formats, with a power of two for 32 channels, of weights and activations; FP8 rows as published, FP8 indexer
# keys with one float32 scale.
A5 = replace(deployed(), mode="a5", activation=FORMATS["mxfp8"], index=FORMATS["e4m3_row_fp32"])
