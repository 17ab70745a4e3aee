"""Backends that remember too much: what they keep belongs to an earlier call."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant
from dsv4_hal.formats import Weight
from dsv4_hal.ops import KV


def first_of_plan(batch: Any, name: str, kv: KV) -> KV:
    """The rows that the first call on a plan saw, whose layer it was."""
    kept: KV = batch.plan.vendor.setdefault((name, kv.data.shape, kv.layout), replace(kv, data=kv.data.clone()))
    return kept


@mutant("attention: window rows are kept in the plan, and the next layer reads them", "sparse_attention")
def window_kept(
    right: Any, self: Any, q: Tensor, kv: KV, sink: Any, scale: float, batch: Any, *a: Any, **k: Any
) -> Any:
    kept = first_of_plan(batch, "kept window", kv)
    return right.sparse_attention(self, q, kept, sink, scale, batch, *a, **k)


@mutant("attention: compressed entries are kept in the plan, and the next layer reads them", "sparse_attention")
def entries_kept(
    right: Any, self: Any, q: Tensor, kv: KV, sink: Any, scale: float, batch: Any, entries: KV | None = None,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    kept = None if entries is None else first_of_plan(batch, "kept entries", entries)
    return right.sparse_attention(self, q, kv, sink, scale, batch, kept, *args, **kwargs)


@mutant("indexer: keys are kept in the plan, and the next layer reads them", "index_topk")
def keys_kept(right: Any, self: Any, q: Tensor, weights: Tensor, keys: KV, batch: Any, *a: Any, **k: Any) -> Any:
    return right.index_topk(self, q, weights, first_of_plan(batch, "kept keys", keys), batch, *a, **k)


_BY_OBJECT: dict[int, tuple[Weight, Weight]] = {}
_BY_ADDRESS: dict[Any, Weight] = {}


def copied(w: Weight) -> Weight:
    return replace(w, data=w.data.clone(), scale=None if w.scale is None else w.scale.clone())


@mutant("weights: read once for every object, and stale once they change in place", "linear")
def weight_kept_by_object(right: Any, self: Any, x: Any, w: Weight, *args: Any, **kwargs: Any) -> Tensor:
    _, kept = _BY_OBJECT.setdefault(id(w), (w, copied(w)))
    return right.linear(self, x, kept, *args, **kwargs)


@mutant("weights: read once for every address, and stale once they change in place", "grouped_linear")
def weight_kept_by_address(right: Any, self: Any, rows: Tensor, w: Weight, *args: Any, **kwargs: Any) -> Tensor:
    key = w.data.data_ptr(), w.data.shape, w.format.name
    return right.grouped_linear(self, rows, _BY_ADDRESS.setdefault(key, copied(w)), *args, **kwargs)


_RINGS: dict[Any, list[Tensor]] = {}
_CALLS = count()


def from_ring(y: Tensor, size: int) -> Tensor:
    """The same values in one of a few buffers of their shape."""
    ring = _RINGS.setdefault((size, y.shape, y.dtype), [])
    if len(ring) < size:
        ring.append(y)
        return y
    ring.append(ring.pop(0))
    return ring[-1].copy_(y)


@mutant("buffers: results come from a ring of eight", "hadamard")
def ring_of_eight(right: Any, self: Any, x: Tensor) -> Tensor:
    return from_ring(right.hadamard(self, x), 8)


@mutant("buffers: results come from a ring of forty", "hadamard")
def ring_of_forty(right: Any, self: Any, x: Tensor) -> Tensor:
    return from_ring(right.hadamard(self, x), 40)


_LATE: list[Tensor] = []


@mutant("buffers: a result changes twenty calls later", "rope")
def changed_late(right: Any, self: Any, *args: Any, **kwargs: Any) -> Tensor:
    y: Tensor = right.rope(self, *args, **kwargs)
    _LATE.append(y.view(-1))
    if len(_LATE) > 20 and (old := _LATE.pop(0)).numel():
        old[0] += 1
    return y


@mutant("race: one call in 3,001 is wrong", "hadamard", soak=10_000)
def rarely_wrong(right: Any, self: Any, x: Tensor) -> Tensor:
    y: Tensor = right.hadamard(self, x)
    return y + 1 if next(_CALLS) % 3001 == 3000 else y
