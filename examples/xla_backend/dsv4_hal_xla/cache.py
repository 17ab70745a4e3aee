"""Reading cache rows: the step's addresses, made once a step, and a gather in JAX.

Rows are stored by the reference's ops, in plain values (`Backend.row_layout`), and read here where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.ops import KV, ContractError
from dsv4_hal_xla.bridge import bucket, jnp, padded


def tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Sequence (-1: none) and position of each token of the step, int32, in a bucket."""
    kept = batch.require_plan().vendor
    if "xla" not in kept:
        rows = bucket(batch.tokens)
        kept["xla"] = padded(batch.seq.int(), rows, -1), padded(batch.positions.int(), rows)
    return kept["xla"]


def rows_of(kv: KV, batch: Batch) -> tuple[Tensor, Tensor]:
    """Values [N, dim] of all rows, a pool's in place; and where each sequence's rows are, for `load`: its block table,
    or, packed, its first row."""
    if not kv.layout.plain:
        raise ContractError(f"backend xla reads plain rows, not {kv.layout.name}")
    plan, key = batch.require_plan(), ("xla", kv.layout.ratio, kv.paged)
    if key not in plan.vendor:
        table = plan.tables[kv.layout.ratio] if kv.paged else plan.base[kv.layout.ratio][:, None]
        plan.vendor[key] = padded(table.to(torch.int32), bucket(len(table)))
    data = kv.data.view(kv.layout.values).view(-1, kv.layout.dim) if kv.paged else padded(kv.data, bucket(len(kv.data)))
    return data, plan.vendor[key]


def load(data: Any, table: Any, rows: int, seq: Any, index: Any, seen: Any) -> Any:
    """Logical rows `index` [c, k] of sequences `seq` [c] -> [c, k, dim]; zeros where not `seen`: what lies in such a
    row may be NaN, and zero times NaN would poison a sum. rows: per block; 0: packed."""
    index = jnp.where(seen, index, 0)
    first = table[seq[:, None], index // rows % table.shape[1]] * rows if rows else table[seq]
    place = first + (index % rows if rows else index)
    return jnp.where(seen[..., None], data[jnp.where(seen, place, 0)], 0)
