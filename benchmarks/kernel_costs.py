"""What a call of an op must compute and move at least, whatever kernel serves it: FLOPs and bytes.

FLOPs count a multiplication and an addition each as one, sorted by the format of the operands, since that decides
which unit can compute them. Bytes are those of every input read once and every result written once; of pools, states
and stacks of experts only what the call touches. Intermediate results of a composite are not moved at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.formats import QTensor, Weight
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import KV


@dataclass(frozen=True)
class Cost:
    """flops by the format of their operands ("fp4", "fp8", "bf16", "fp32"); bytes moved."""

    flops: Mapping[str, float]
    moved: float


def cost(op: str, inputs: Mapping[str, Any], result: Any, numerics: Numerics) -> Cost:
    """Of one call: the op's arguments by name, and what it returns."""
    flops: dict[str, float] = {}
    for kind, count in _FLOPS[op](_Inputs(inputs), numerics):
        flops[kind] = flops.get(kind, 0) + count
    moved = sum(_touched(name, value, inputs) for name, value in inputs.items())
    moved += _bytes(result) if not _is_pool(result) else 0
    if op in ("kv_store", "kv_norm_rope_store", "compress_store") and inputs["pool"] is not None:
        moved += _stored_rows(inputs) * inputs["layout"].row_bytes
    if op == "kv_load":
        moved += (inputs["stop"] - inputs["start"]) * inputs["kv"].layout.row_bytes
    return Cost(flops, moved)


class _Inputs:
    """Arguments as attributes."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.__dict__.update(inputs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


# --- bytes -----------------------------------------------------------------------------------------------------------


def _bytes(value: Any) -> float:
    if isinstance(value, Tensor | QTensor):
        return value.nbytes
    if isinstance(value, KV):
        return value.data.nbytes
    if isinstance(value, tuple):
        return sum(_bytes(item) for item in value)
    return 0


def _is_pool(value: Any) -> bool:
    return isinstance(value, KV) and value.paged


def _touched(name: str, value: Any, inputs: Mapping[str, Any]) -> float:
    """Bytes of an argument that are read or written."""
    if name == "out":
        return 0  # counted as the result
    if name == "pool" or (name == "kv" and isinstance(value, KV)):
        return 0  # counted by rows, by the caller
    if isinstance(value, KV):
        return _seen_rows(name, value, inputs) * (value.layout.row_bytes if value.paged else _row(value.data))
    if isinstance(value, Weight) and value.data.dim() == 3 and "ids" in inputs:
        return value.nbytes * hit(inputs["ids"].numel(), value.data.shape[0]) / value.data.shape[0]
    if isinstance(value, Weight) and "offsets" in inputs:
        return value.nbytes * hit(len(inputs["rows"]), value.data.shape[0]) / value.data.shape[0]
    if isinstance(value, Weight) and "ids" in inputs and name == "w":  # embedding
        return len(inputs["ids"]) * value.data.shape[1] * value.data.element_size()
    if name == "state" and value is not None and "batch" in inputs:
        return _state_slots(inputs) * value[0].nbytes
    if name == "state" and value is not None:  # a slot is reset, or copied
        return value[0].nbytes * (2 if "source" in inputs else 1)
    return _bytes(value)


def hit(rows: int, experts: int) -> float:
    """Experts that have a row, where `rows` fall on experts evenly by chance."""
    return experts * (1 - (1 - 1 / experts) ** rows)


def _row(data: Tensor) -> float:
    return data.shape[1] * data.element_size()


def _seen_rows(name: str, kv: KV, inputs: Mapping[str, Any]) -> float:
    """Rows that some token of the step sees: each is read once."""
    batch, picks = inputs["batch"], inputs.get("picks")
    active = batch.q_lens > 0
    if kv.layout.ratio == 1:
        rows = (batch.q_lens + kv.layout.window - 1).clip(max=batch.lengths)
    else:
        rows = batch.lengths // kv.layout.ratio
        if picks is not None:
            rows = rows.clip(max=batch.q_lens * picks.shape[1])
    return float(rows[active].sum())


def _stored_rows(inputs: Mapping[str, Any]) -> float:
    batch, ratio = inputs["batch"], inputs["layout"].ratio
    return batch.tokens - batch.padding if ratio == 1 else batch.require_plan().entries[ratio].count


def _state_slots(inputs: Mapping[str, Any]) -> float:
    """Slots' worth of state rows that are written, and of those that completed entries need of earlier steps."""
    ratio = inputs["layout"].ratio if "layout" in inputs else inputs["ratio"]
    entries = inputs["batch"].require_plan().entries[ratio]
    in_step = int((inputs["batch"].lengths % ratio).clip(max=inputs["batch"].q_lens).sum())
    return (len(entries.keep_source) + max(0, entries.source.numel() - in_step)) / entries.ring


# --- FLOPs -----------------------------------------------------------------------------------------------------------

_Counted = list[tuple[str, float]]


def _format(value: Weight | QTensor, numerics: Numerics) -> str:
    """The format that products with a weight have: codes as they are, where activations are quantised too."""
    if not value.format.plain and numerics.activation is not None:
        return "fp8"  # e4m3 times e4m3 or e2m1
    return _dtype(numerics)


def _dtype(numerics: Numerics) -> str:
    return "fp32" if numerics.storage.itemsize > 2 else "bf16"


def _linear(x: Any, w: Weight, numerics: Numerics, rows: float | None = None) -> _Counted:
    n, k = w.shape[-2:]
    return [(_format(w, numerics), 2.0 * (x.shape[0] if rows is None else rows) * n * k)]


def _plain(count: float) -> _Counted:
    return [("fp32", count)]


def _norm(x: Tensor) -> _Counted:
    return _plain(4 * x.numel())


def _rope(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> _Counted:
    return _plain(6 * (x.numel() // x.shape[-1]) * cos_sin[0].shape[1])


def _keys(i: Any) -> float:
    """Keys that tokens see, over all tokens."""
    batch: Batch = i.batch
    position = batch.positions_host[batch.seq_host >= 0] + 1
    seen = position.clip(max=i.window_kv.layout.window)
    if i.entries is not None:
        entries = position // i.entries.layout.ratio
        seen = seen + (entries if i.picks is None else entries.clip(max=i.picks.shape[1]))
    return float(seen.sum())


def _index(i: Any, numerics: Numerics) -> _Counted:
    batch: Batch = i.batch
    seen = float(((batch.positions_host[batch.seq_host >= 0] + 1) // i.keys.layout.ratio).sum())
    _, heads, dim = i.q.shape
    kind = "fp4" if numerics.index is not None and numerics.index.element == "e2m1" else _dtype(numerics)
    return [(kind, 2 * seen * heads * dim), ("fp32", 3 * seen * heads)]


def _compress(count: int, span: int, channels: int) -> _Counted:
    return _plain(5.0 * count * span * channels)  # gate + ape, exponential, two products and sums


def _compressor(i: Any, numerics: Numerics, ratio: int) -> _Counted:
    w, entries = i.weights, i.batch.require_plan().entries[ratio]
    width = w.norm.shape[0]
    out = _linear(i.x, w.wkv, numerics) + _linear(i.x, w.wgate, numerics)
    out += _compress(entries.count, ratio * (2 if i.overlap else 1), width)
    return out + _plain(4.0 * entries.count * width + 6.0 * entries.count * i.cos_sin[0].shape[1])


def _experts(rows: float, i: Any, numerics: Numerics) -> _Counted:
    out = _linear(i.x, i.w13, numerics, rows) + _linear(i.x, i.w2, numerics, rows)
    return out + _plain(8.0 * rows * i.w2.shape[-1])


def _mix(i: Any, out: int) -> _Counted:
    """Projection of the streams to `out` numbers, their square sum, and the sum of the streams."""
    return _plain(2.0 * i.streams.numel() * (out + 2))


def _hc_pre(i: Any) -> _Counted:
    t, n, _ = i.streams.shape
    return _mix(i, 2 * n + n * n) + _plain(4.0 * i.iters * t * n * n)


def _rounded(elements: float, rounding: Any) -> _Counted:
    return _plain(0.0 if rounding is None else 3.0 * elements)


def _output(i: Any, numerics: Numerics) -> _Counted:
    groups = [(_dtype(numerics), 2.0 * len(i.x) * math.prod(i.wo_a.shape))]
    return _rope(i.x, i.cos_sin) + groups + _linear(i.x, i.wo_b, numerics)


_FLOPS: Mapping[str, Callable[[Any, Numerics], _Counted]] = {
    "quantize": lambda i, n: _plain(3.0 * i.x.numel()),
    "dequantize": lambda i, n: _plain(float(math.prod(i.w.shape))),
    "embedding": lambda i, n: [],
    "linear": lambda i, n: _linear(i.x, i.w, n),
    "grouped_linear": lambda i, n: _linear(i.rows, i.w, n),
    "block_diagonal_linear": lambda i, n: [(_dtype(n), 2.0 * len(i.x) * math.prod(i.w.shape))],
    "rms_norm": lambda i, n: _norm(i.x),
    "rope": lambda i, n: _rope(i.x, i.cos_sin),
    "hadamard": lambda i, n: _plain(i.x.numel() * (1 + math.log2(i.x.shape[-1]))),
    "q_norm_rope": lambda i, n: _norm(i.q) + _rope(i.q, i.cos_sin),
    "kv_store": lambda i, n: _rounded(i.rows.numel(), i.layout.rounding),
    "kv_load": lambda i, n: _plain(1.0 * (i.stop - i.start) * i.kv.layout.dim),
    "kv_norm_rope_store": lambda i, n: _norm(i.kv) + _rope(i.kv, i.cos_sin) + _rounded(i.kv.numel(), i.layout.rounding),
    "state_new": lambda i, n: [],
    "state_reset": lambda i, n: [],
    "state_copy": lambda i, n: [],
    "compress": lambda i, n: _compress(
        i.batch.require_plan().entries[i.ratio].count,
        i.ratio * (2 if i.overlap else 1),
        i.kv.shape[1] // (2 if i.overlap else 1),
    ),
    "compressor": lambda i, n: _compressor(i, n, i.ratio),
    "compress_store": lambda i, n: _compressor(i, n, i.layout.ratio),
    "index_topk": _index,
    "sparse_attention": lambda i, n: [(_dtype(n), 4 * _keys(i) * i.q.shape[1] * i.q.shape[2])],
    "output_proj": _output,
    "route": lambda i, n: _plain(10.0 * i.logits.numel()),
    "permute": lambda i, n: [],
    "unpermute": lambda i, n: _plain(1.0 * i.rows.numel()),
    "swiglu": lambda i, n: _plain(4.0 * i.gate_up.numel()),
    "moe_experts": lambda i, n: _experts(i.ids.numel(), i, n),
    "mlp": lambda i, n: _experts(len(i.x), i, n),
    "hc_pre": lambda i, n: _hc_pre(i),
    "hc_pre_norm": lambda i, n: _hc_pre(i) + _plain(4.0 * len(i.streams) * i.streams.shape[2]),
    "hc_post": lambda i, n: _plain(2.0 * i.streams.numel() * (1 + i.streams.shape[1])),
    "hc_head": lambda i, n: _mix(i, i.streams.shape[1]),
    "sample": lambda i, n: _plain(4.0 * i.logits.numel()),
}
