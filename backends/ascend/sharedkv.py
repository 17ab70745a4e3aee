"""The operators for attention over shared key and value rows: what they take, as data, and their calls.

They read rows by block tables and lengths, and know the window, the ratio and the sink; a schedule comes first, from an
operator of its own, once for a step, a ratio and a number of picks. Sources: vllm-ascend 182b75ea, the README.md of
csrc/attention/sparse_attn_sharedkv and kv_quant_sparse_attn_sharedkv. Read, never run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_hal.backends.ascend.cache import packed
from dsv4_hal.backends.reference.cache import physical_rows
from dsv4_hal.batch import Batch, upload
from dsv4_hal.ops import KV

DIM, WINDOW, RATIOS = 512, 128, (1, 4, 128)
ROWS, MOST_ROWS = 16, 1024  # rows of a block: a multiple of one, at most the other


@dataclass(frozen=True)
class Kernel:
    """One of the operators.

    name     in torch.ops._C_ascend; the one that schedules it is called the same, with _metadata behind
    layout   name of the row layout that it reads
    heads    numbers of query heads that it takes, ascending
    picks    numbers of picks a token that it takes, ascending
    options  what it and its scheduler are told beside
    """

    name: str
    layout: str
    heads: tuple[int, ...]
    picks: tuple[int, ...]
    options: Mapping[str, int] = field(default_factory=dict)

    @property
    def calls(self) -> tuple[str, str]:
        return f"_C_ascend::{self.name}", f"_C_ascend::{self.name}_metadata"


PLAIN = Kernel("npu_sparse_attn_sharedkv", "plain", (64,), (512,))
FP8 = Kernel(
    "npu_kv_quant_sparse_attn_sharedkv",
    "ascend950",
    (64, 128),
    (512, 1024),
    MappingProxyType({"kv_quant_mode": 1, "tile_size": 64, "rope_head_dim": 64}),
)
KERNELS: Mapping[str, Kernel] = MappingProxyType({kernel.calls[0]: kernel for kernel in (PLAIN, FP8)})


def attend(
    kernel: Kernel,
    q: Tensor,
    window: KV,
    sink: Tensor,
    scale: float,
    batch: Batch,
    entries: KV | None,
    picks: Tensor | None,
) -> Tensor:
    """q [n, H, 512] bfloat16 of every token that belongs to a sequence, at least one -> the same.

    Heads are filled up, or taken in parts; so are picks, with -1, which must come last.
    """
    given: dict[str, Any] = {"cmp_ratio": 1}
    given["ori_kv"], given["ori_block_table"] = blocks(window, batch)
    if entries is not None and int(batch.lengths.max()) >= entries.layout.ratio:
        given["cmp_ratio"] = entries.layout.ratio
        given["cmp_kv"], given["cmp_block_table"] = blocks(entries, batch)
        if picks is not None:
            given["cmp_sparse_indices"] = filled(picks, kernel.picks).unsqueeze(1)
    given |= lengths(batch) | _told(kernel)
    width = next((n for n in kernel.heads if n >= q.shape[1]), kernel.heads[-1])
    metadata = _schedule(kernel, batch, given, width)
    call, parts = getattr(torch.ops._C_ascend, kernel.name), []
    for start in range(0, q.shape[1], width):
        part, sinks = q[:, start : start + width], sink[start : start + width].to(torch.float32)
        missing = width - part.shape[1]
        out, _ = call(
            F.pad(part, (0, 0, 0, missing)).contiguous(),
            sinks=F.pad(sinks, (0, missing)).contiguous(),
            metadata=metadata,
            softmax_scale=scale,
            **given,
        )
        parts.append(out[:, : part.shape[1]])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def filled(picks: Tensor, allowed: tuple[int, ...]) -> Tensor:
    """Picks [n, K] int64 in any order -> int32 [n, an allowed number], -1 behind all others."""
    width = next(n for n in allowed if n >= picks.shape[1])
    ordered = picks.to(torch.int32).sort(-1, descending=True).values
    return F.pad(ordered, (0, width - picks.shape[1]), value=-1)


def blocks(kv: KV, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cache rows as blocks [n, rows, 1, ...], and the table int32 [R, m] of which a sequence's are.

    A pool's own blocks, where the operators take their size; a ring is written out to the length of the sequence, whose
    rows outside of the window nothing reads. Else rows are copied to blocks of 16, zero where a sequence has none.
    """
    ratio, share = kv.layout.ratio, kv.layout.row_bytes
    dtype = kv.layout.values if kv.layout.plain else torch.float8_e4m3fn
    key = ("sharedkv", ratio, kv.rows)
    if kv.paged and kv.rows % ROWS == 0 and kv.rows <= MOST_ROWS:
        table = once_a_step(batch, key, lambda: _written_out(batch, ratio, kv.rows))
        return kv.data.view(dtype).view(len(kv.data), kv.rows, 1, -1), table
    index, table = once_a_step(batch, key, lambda: _collected(kv, batch))
    rows = (kv.data if kv.paged else packed(kv.data, kv.layout)).view(-1, share)
    rows = rows.index_select(0, index.clamp(min=0)).masked_fill_((index < 0)[:, None], 0)
    return rows.view(dtype).view(-1, ROWS, 1, share // dtype.itemsize), table


def lengths(batch: Batch) -> dict[str, Tensor]:
    """Sums of the tokens of sequences, from 0, and how many each has after this step: int32."""

    def make() -> dict[str, Tensor]:
        sums = np.concatenate([[0], np.cumsum(batch.q_lens)])
        found = {"cu_seqlens_q": sums, "seqused_kv": batch.lengths}
        return {name: upload(values, batch.device).to(torch.int32) for name, values in found.items()}

    return once_a_step(batch, ("sharedkv", "lengths"), make)


T = TypeVar("T")


def once_a_step(batch: Batch, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What every layer of a step needs. A fixed batch's plan outlives the step: there it is made for every layer."""
    plan = batch.require_plan().vendor
    if batch.fixed:
        return make()
    if key not in plan:
        plan[key] = make()
    found: T = plan[key]
    return found


def _written_out(batch: Batch, ratio: int, rows: int) -> Tensor:
    table = batch.require_plan().tables[ratio]
    count = -(-(int(batch.lengths.max()) // ratio) // rows)
    column = torch.arange(count, device=table.device) % table.shape[1]
    return table[:, column].to(torch.int32).contiguous()


def _collected(kv: KV, batch: Batch) -> tuple[Tensor, Tensor]:
    """Physical rows [R * m * 16] that blocks of 16 take, -1 none; the table [R, m] of these blocks."""
    held = batch.lengths // kv.layout.ratio
    width = -(-int(held.max()) // ROWS)
    row = torch.arange(width * ROWS, device=batch.device)
    index = torch.where(row < upload(held, batch.device)[:, None], row, -1)
    index = physical_rows(kv, batch, torch.arange(len(held), device=batch.device), index)
    table = torch.arange(len(held) * width, dtype=torch.int32, device=batch.device).view(-1, width)
    return index.flatten(), table


def _told(kernel: Kernel) -> dict[str, Any]:
    return {
        "ori_mask_mode": 4,
        "cmp_mask_mode": 3,
        "ori_win_left": WINDOW - 1,
        "ori_win_right": 0,
        "layout_q": "TND",
        "layout_kv": "PA_ND",
        **kernel.options,
    }


def _schedule(kernel: Kernel, batch: Batch, given: Mapping[str, Any], heads: int) -> Tensor:
    picks = given.get("cmp_sparse_indices")
    count = 0 if picks is None else picks.shape[-1]

    def make() -> Tensor:
        call = getattr(torch.ops._C_ascend, f"{kernel.name}_metadata")
        found: Tensor = call(
            num_heads_q=heads,
            num_heads_kv=1,
            head_dim=DIM,
            batch_size=len(batch.q_lens),
            max_seqlen_q=int(batch.q_lens.max()),
            max_seqlen_kv=int(batch.lengths.max()),
            cmp_topk=count,
            cmp_ratio=given["cmp_ratio"],
            has_ori_kv=True,
            has_cmp_kv="cmp_kv" in given,
            device=str(batch.device),
            **lengths(batch),
            **_told(kernel),
        )
        return found

    return once_a_step(batch, ("sharedkv", "metadata", heads, given["cmp_ratio"], count), make)
