"""Sparse attention by vllm-ascend's operators on shared key and value rows; the indexer by torch's own ops.

What the operators do otherwise than the contract: probabilities are rounded to bfloat16 relative to the largest score
so far, the sink among them, not to the largest of all keys. The log of the sum they do not return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend import sharedkv
from dsv4_hal.backends.ascend.common import Base
from dsv4_hal.backends.ascend.providers import ALL, INT8, MX, VLLM_ASCEND, Limit, Provider, documented
from dsv4_hal.backends.ascend.sharedkv import DIM, FP8, KERNELS, PLAIN, RATIOS, WINDOW, Kernel
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.batch import Batch
from dsv4_hal.ops import KV


def _shared(kernel: Kernel, socs: frozenset[str], folder: str) -> Provider:
    return Provider(
        "sparse_attention",
        kernel.calls,
        socs,
        f"{VLLM_ASCEND}, csrc/attention/{folder}/README.md",
        note=f"heads and picks filled up to {' or '.join(map(str, kernel.heads))} and "
        f"{' or '.join(map(str, kernel.picks))}; blocks that are no multiple of {sharedkv.ROWS} rows copied",
        limits={
            "dim": Limit(among=(DIM,)),
            "window": Limit(among=(WINDOW,)),
            "ratio": Limit(among=RATIOS),
            "picks": Limit(most=kernel.picks[-1]),
            "rows": Limit(among=(kernel.layout,)),
            "queries": Limit(among=(torch.bfloat16,)),
            "probabilities": Limit(among=(torch.bfloat16,)),
            "lse": Limit(among=(False,)),
        },
    )


PROVIDERS = (
    _shared(PLAIN, INT8, "sparse_attn_sharedkv"),
    _shared(FP8, MX, "kv_quant_sparse_attn_sharedkv"),
    Provider(
        "sparse_attention",
        ("npu::npu_sparse_flash_attention",),
        ALL,
        documented("npu_sparse_flash_attention"),
        refused="it attends to picks of one cache, where there are a window and entries in caches of their own",
    ),
    Provider(
        "sparse_attention",
        ("npu::npu_kv_quant_sparse_flash_attention",),
        ALL,
        documented("npu_kv_quant_sparse_flash_attention"),
        refused="it attends to picks of one cache, and reads INT8 rows with float32 scales of 128 channels",
    ),
    Provider(
        "index_topk",
        ("_C_ascend::npu_vllm_quant_lightning_indexer", "_C_ascend::npu_vllm_quant_lightning_indexer_metadata"),
        ALL,
        VLLM_ASCEND + ", csrc/attention/vllm_quant_lightning_indexer/README.md",
        refused="which of equal scores it picks is not said, nor in which order; it does not round scores to bfloat16, "
        "returns none, and on the A3 multiplies weight and query scale in float16",
    ),
    Provider(
        "index_topk",
        ("npu::npu_quant_lightning_indexer",),
        ALL,
        documented("npu_quant_lightning_indexer"),
        refused="it knows no ratio: a token would see entries that are not complete; ties are not said",
    ),
    Provider(
        "index_topk",
        ("npu::npu_lightning_indexer",),
        ALL,
        documented("npu_lightning_indexer"),
        refused="it knows no ratio and reads keys in bfloat16 or float16, not in the profile's format",
    ),
)


class Attention(Base):
    def sparse_attention(
        self,
        q: Tensor,
        window_kv: KV,
        sink: Tensor,
        scale: float,
        batch: Batch,
        entries: KV | None = None,
        picks: Tensor | None = None,
        *,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        sizes = {
            "dim": q.shape[-1],
            "window": window_kv.layout.window,
            "ratio": 1 if entries is None else entries.layout.ratio,
            "rows": window_kv.layout.name,
            "queries": q.dtype,
            "probabilities": self.numerics.probs,
            "lse": return_lse,
        }
        if picks is not None and picks.shape[1]:
            sizes["picks"] = picks.shape[1]
        provider = self.provider("sparse_attention", **sizes) if batch.q_lens.any() else None
        if provider is None:
            return super().sparse_attention(
                q, window_kv, sink, scale, batch, entries, picks, return_lse=return_lse, out=out
            )
        tokens = len(q) - batch.padding
        if picks is not None:
            picks = picks[:tokens]
        kernel = KERNELS[provider.calls[0]]
        y = torch.zeros_like(q)
        y[:tokens] = sharedkv.attend(kernel, q[:tokens], window_kv, sink, scale, batch, entries, picks)
        return emit(y, out), None
