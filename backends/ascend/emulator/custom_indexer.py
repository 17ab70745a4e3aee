"""vllm-ascend's lightning indexer: the entries that matter most to each token.

Schemas: vllm-ascend csrc/torch_binding.cpp, commit 182b75ea. Arithmetic: csrc/attention/vllm_quant_lightning_indexer/
README.md. It does not say which of equal scores wins; here it is the later entry, since the kernel's merge of sorted
parts names the later part first. None of it was run on a device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator import custom_rules
from dsv4_hal.backends.ascend.emulator.call import NO_META, emulated
from dsv4_hal.backends.ascend.emulator.custom_rules import FOREVER
from dsv4_hal.backends.ascend.emulator.schedule import picks_asked, schedule


@emulated(
    "_C_ascend::npu_vllm_quant_lightning_indexer",
    schema="(Tensor query, Tensor key, Tensor weights, Tensor query_dequant_scale, Tensor key_dequant_scale, "
    "int query_quant_mode=0, int key_quant_mode=0, Tensor? actual_seq_lengths_query=None, "
    "Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, Tensor? metadata=None, "
    'str layout_query="BSND", str layout_key="BSND", int sparse_count=2048, int sparse_mode=3, '
    f"int pre_tokens={FOREVER}, int next_tokens={FOREVER}, int cmp_ratio=1, bool return_value=False) "
    "-> (Tensor sparse_indices, Tensor sparse_values)",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::npu_vllm_quant_lightning_indexer"),
)
def npu_vllm_quant_lightning_indexer(**given: Any) -> tuple[Tensor, Tensor]:
    """Query [T, 64, 128] -> int32 [T, 1, sparse_count], best first, -1 from where nothing is left.

    The weight of a head and the scale of its query are multiplied in their own dtype, float16 on the A3: a product
    beyond it is infinite. Lengths of keys are counted in tokens, of which cmp_ratio make one key.
    """
    query, key, ratio, k = given["query"], given["key"], given["cmp_ratio"], given["sparse_count"]
    weights = (given["weights"] * given["query_dequant_scale"]).to(torch.float32)
    bounds = [0, *given["actual_seq_lengths_query"].tolist()]
    out = torch.full((len(query), 1, k), -1, dtype=torch.int32)
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        length = int(given["actual_seq_lengths_key"][sequence])
        count = length // ratio
        if start == stop or not count:
            continue
        index = torch.arange(count)
        block = given["block_table"][sequence, index // key.shape[1]]
        keys = key[block, index % key.shape[1], 0].to(torch.float32)
        scales = given["key_dequant_scale"][block, index % key.shape[1], 0].to(torch.float32)
        product = (query[start:stop].to(torch.float32) @ keys.T).relu()
        score = (product * weights[start:stop, :, None]).sum(1) * scales
        if given["sparse_mode"] == 3:
            visible = (torch.arange(length - (stop - start), length) + 1) // ratio
            score = score.masked_fill(index >= visible[:, None], float("-inf"))
        best, order = score.flip(-1).sort(dim=-1, descending=True, stable=True)
        picks = (count - 1 - order).masked_fill(best == float("-inf"), -1)[:, :k]
        out[start:stop, 0, : picks.shape[1]] = picks.to(torch.int32)
    return out, torch.empty(0)


@emulated(
    "_C_ascend::npu_vllm_quant_lightning_indexer_metadata",
    schema="(int num_heads_q, int num_heads_k, int head_dim, int query_quant_mode, int key_quant_mode, "
    "Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None, int batch_size=0, "
    'int max_seqlen_q=0, int max_seqlen_k=0, str layout_query="BSND", str layout_key="BSND", '
    f"int sparse_count=2048, int sparse_mode=3, int pre_tokens={FOREVER}, int next_tokens={FOREVER}, "
    'int cmp_ratio=1, str device="npu") -> (Tensor metadata)',
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::npu_vllm_quant_lightning_indexer_metadata"),
)
def npu_vllm_quant_lightning_indexer_metadata(**given: Any) -> Tensor:
    return schedule(picks_asked(given))
