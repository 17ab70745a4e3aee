"""FlashMLA's sparse attention: what it can do, as data, and its calls, from this project's tensors and back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backend import Verdict
from dsv4_hal.backends.cuda.vendor import layouts, probe

ARCHS = ("sm_90", "sm_100", "sm_103")
DIM, ROPE = 512, 64
HEADS = (64, 128)  # numbers of query heads; fewer are filled up
STEP = 128  # indices per token come in these: 64 is enough for most of its kernels, this for all
MOST_TOKENS = (1 << 16) - 1  # an axis of the grid
FUNCTIONS = ("flash_mla_with_kvcache", "flash_mla_sparse_fwd", "get_mla_metadata")


def able(arch: str) -> Verdict:
    """Whether the library is there, knows the architecture, and reads DeepSeek-V4's rows of 584 bytes."""
    if arch not in ARCHS:
        return Verdict(False, f"FlashMLA's sparse attention is for {', '.join(ARCHS)}, not for {arch}")
    found = probe.offers("flash_mla", *FUNCTIONS)
    return found and _reads_rows(found.reason)


def options() -> dict[str, bool]:
    """How a version that keeps these kernels beside newer ones is told to use them."""
    return {"use_legacy": True} if "use_legacy" in _parameters() else {}


def _parameters() -> set[str]:
    return set(inspect.signature(probe.load("flash_mla").flash_mla_with_kvcache).parameters)


def _reads_rows(version: str) -> Verdict:
    """Versions differ in the rows they read, and say so by their parameters: those before V4 know no second cache,
    those after V4.1 know batch invariance; SGLang's keeps V4's kernels as an option that may not have been built."""
    known = _parameters()
    if "extra_k_cache" not in known:
        return Verdict(False, f"{version} is older than DeepSeek-V4", "install a newer FlashMLA")
    if "use_legacy" in known:
        if probe.load("flash_mla").has_legacy():
            return Verdict(True, version)
        return Verdict(False, f"{version} was built without the kernels for DeepSeek-V4's rows")
    if "enable_batch_invariant" in known:
        return Verdict(False, f"{version} reads the rows of DeepSeek-V4.1 only", "install one of before October 2026")
    return Verdict(True, version)


def verdict(heads: int, dim: int, rope: int, tokens: int = 1) -> Verdict:
    """Whether these queries can be served."""
    if (dim, rope) != (DIM, ROPE):
        return Verdict(False, f"FlashMLA reads rows of {DIM} channels, {ROPE} of them rotary, not {dim} and {rope}")
    if heads > HEADS[-1]:
        return Verdict(False, f"FlashMLA has kernels for up to {HEADS[-1]} heads, not {heads}")
    if tokens > MOST_TOKENS:
        return Verdict(False, f"FlashMLA takes up to {MOST_TOKENS} tokens, not {tokens}")
    return Verdict(True, "within what FlashMLA documents")


@dataclass(frozen=True)
class Scope:
    """Rows to attend to: a pool of flashmla rows, its rows per block, and which of them a token reads: index int32
    [T, n STEP] of block * rows + row in the block, -1 for none."""

    pool: Tensor
    rows: int
    index: Tensor


def schedule() -> Any:
    """How work is spread over the GPU: the first call fills it in, and calls of equal shapes can share it."""
    return probe.load("flash_mla").get_mla_metadata()[0]


def paged_attention(
    q: Tensor, scopes: Sequence[Scope], sink: Tensor, scale: float, schedule: Any
) -> tuple[Tensor, Tensor]:
    """One softmax over the rows of one or two scopes: q [T, H, D] bfloat16 -> [T, H, D], and lse [T, H] float32.

    The tokens of a step are given as the positions of one sequence: nothing in the library's answer hangs on that. Its
    lse is of base e and leaves out the sink, as ours; where no key is seen it is +inf, and ours -inf.
    """
    heads = q.shape[1]
    window, *entries = scopes
    extra = {}
    for scope in entries:
        extra["extra_k_cache"] = layouts.attention_cache(scope.pool, scope.rows)
        extra["extra_indices_in_kvcache"] = scope.index[None]
    out, lse = probe.load("flash_mla").flash_mla_with_kvcache(
        layouts.more_heads(q, 1, HEADS)[None].contiguous(),
        layouts.attention_cache(window.pool, window.rows),
        block_table=None,
        cache_seqlens=None,
        head_dim_v=DIM,
        tile_scheduler_metadata=schedule,
        softmax_scale=scale,
        causal=False,
        is_fp8_kvcache=True,
        indices=window.index[None],
        attn_sink=layouts.more_heads(sink.to(torch.float32), 0, HEADS).contiguous(),
        **extra,
        **options(),
    )
    lse = lse[0, :heads].transpose(0, 1).contiguous()
    return out[0, :, :heads], lse.masked_fill(lse == float("inf"), float("-inf"))


def packed_attention(q: Tensor, rows: Tensor, index: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Attention over plain rows [N, D] bfloat16, index int32 [T, n STEP] -> [T, H, D]. Its lse, of base e or 2 by the
    version, is not asked for."""
    heads = q.shape[1]
    out = probe.load("flash_mla").flash_mla_sparse_fwd(
        layouts.more_heads(q, 1, HEADS).contiguous(),
        rows.unsqueeze(1).contiguous(),
        index.unsqueeze(1),
        scale,
        d_v=DIM,
        attn_sink=layouts.more_heads(sink.to(torch.float32), 0, HEADS).contiguous(),
        **options(),
    )[0]
    return out[:, :heads]
