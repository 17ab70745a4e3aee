"""Cases of the plan, of cache rows, and of the compressor.

What a state holds is its backend's own business: a case looks at it through what `compress` makes of it later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.ops.cases.inputs import (
    PLAIN_FORMATS,
    RAGGED,
    RATIOS,
    Results,
    angles,
    case,
    differentiated,
    filled,
    held,
    nans,
    normal,
    place,
    pool_for,
    ragged_of,
    size_of,
    steps,
    token_rows,
    used_pool,
    weight,
)

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.formats import RowLayout
    from dsv4_hal.ops.cache import CompressorWeights
    from dsv4_hal.ops.spec import Cases

KINDS = ("window", "csa", "hca", "index")
RATIO = {"window": 1, "csa": 4, "hca": 128, "index": 4}


def row_layout(ops: Resolved, kind: str, small: bool = False, window: int = 8) -> RowLayout:
    """Rows of the published widths, or small ones that only general kernels take."""
    dim, rope = (128, 64) if kind == "index" else (96, 32) if small else (512, 64)
    name = {"window": "window", "index": "index"}.get(kind, "entries")
    return ops.row_layout(name, dim, 0 if kind == "index" else rope, RATIO[kind], window if kind == "window" else 0)


def plan() -> Cases:
    for ragged in RAGGED:
        yield case("plan", _plan, size_of(ragged), ragged=ragged)
    for ragged in ("few", "mixed"):
        yield case("plan", _plan, size_of(ragged), ragged=ragged, fixed=True)
    yield case("plan", _plan_far, position=1_000_003)


def frequencies(channels: int, base: float) -> Tensor:
    return base ** -(torch.arange(0, channels, 2, dtype=torch.float32) / channels)


def _plan(ops: Resolved, generator: torch.Generator, ragged: str, fixed: bool = False) -> Results:
    ropes = {"window": frequencies(64, 1e4), "compressed": frequencies(64, 1.6e5)}
    return _planned(steps(ops, generator, ragged, ropes=ropes, fixed=fixed)[-1])


def _plan_far(ops: Resolved, generator: torch.Generator, position: int) -> Results:
    batch = Batch(np.array([8]), np.array([position]), ops.device, slots=np.array([1]))
    return _planned(ops.plan(batch, RATIOS, {"window": frequencies(64, 1e4)}))


def _planned(batch: Batch) -> Results:
    """What every backend's plan has: RoPE tables, and the entries that are completed."""
    done = batch.require_plan()
    out: Results = {}
    for (name, ratio), (cos, sin) in done.rope.items():
        out |= {f"cos_{name}_{ratio}": cos, f"sin_{name}_{ratio}": sin}
    for ratio, entries in done.entries.items():
        out |= {f"sequence_{ratio}": entries.seq, f"entry_{ratio}": entries.index}
        out[f"position_{ratio}"] = entries.positions
    return out


def kv_store() -> Cases:
    for kind in KINDS:
        for ragged in RAGGED:
            yield case("kv_store", _kv_store, size_of(ragged, real=True), kind=kind, ragged=ragged)
    for kind in KINDS:
        yield differentiated(case("kv_store", _kv_store, kind=kind, ragged="5.0.2.p1", small=True))
    for ragged in ("few", "mixed"):
        yield case("kv_store", _kv_store, size_of(ragged), kind="window", ragged=ragged, small=True)
        yield case("kv_store", _kv_store, size_of(ragged), kind="csa", ragged=ragged, small=True)
    yield case("kv_store", _kv_store, "quick", kind="csa", ragged="chunked", block_tokens=128)
    for kind in KINDS:
        for ragged in ("few", "chunked"):
            yield case("kv_store", _kv_store, size_of(ragged, real=True), kind=kind, ragged=ragged, reused=True)
        for ragged in ("3at2303.1at1000", "60at30.p2"):
            yield case("kv_store", _kv_store, "full", kind=kind, ragged=ragged)
    for kind in ("csa", "index"):
        for ragged in ("few", "mixed"):
            yield case("kv_store", _kv_store, size_of(ragged, real=True), kind=kind, ragged=ragged, fixed=True)
    for strides in ("one", "row"):
        yield case("kv_store", _kv_store, kind="window", ragged="few", small=True, strides=strides)


def _kv_store(
    ops: Resolved,
    generator: torch.Generator,
    kind: str,
    ragged: str,
    small: bool = False,
    block_tokens: int = 256,
    reused: bool = False,
    fixed: bool = False,
) -> Results:
    batches = steps(ops, generator, ragged, block_tokens=block_tokens, fixed=fixed)
    kv = filled(ops, generator, row_layout(ops, kind, small), batches, reused)
    return held(ops, kind if kind == "index" else "kv", kv, batches[-1])


def kv_load() -> Cases:
    for kind in KINDS:
        for ragged in ("packed", "none", "decode", "chunked", "padded", "empty", "edges", "few"):
            yield case("kv_load", _kv_load, size_of(ragged, real=True), kind=kind, ragged=ragged)
        yield case("kv_load", _kv_load, "quick", kind=kind, ragged="chunked", reused=True)
        yield case("kv_load", _kv_load, "full", kind=kind, ragged="3at2303.1at1000")


def _kv_load(ops: Resolved, generator: torch.Generator, kind: str, ragged: str, reused: bool = False) -> Results:
    batches = steps(ops, generator, ragged)
    layout = row_layout(ops, kind)
    kv = filled(ops, generator, layout, batches, reused)
    out = {}
    for sequence, length in enumerate(batches[-1].lengths // layout.ratio):
        stop, name = int(length), "index" if kind == "index" else "kv"
        out[f"{name}_nothing_{sequence}"] = ops.kv_load(kv, batches[-1], sequence, stop, stop)
        out[f"{name}_last_{sequence}"] = ops.kv_load(kv, batches[-1], sequence, max(0, stop - 1), stop)
        out[f"{name}_tail_{sequence}"] = ops.kv_load(kv, batches[-1], sequence, max(0, stop - 5), max(0, stop - 1))
    return out


def chunks(ops: Resolved, cuts: tuple[tuple[int, int], ...], slot: int = 0, rollback: int = 0) -> list[Batch]:
    """Steps of one sequence: (context, tokens) each, planned. A context below what was seen before cuts tokens back."""
    return [
        ops.plan(
            Batch(np.array([n]), np.array([context]), ops.device, slots=np.array([slot]), rollback=rollback), RATIOS, {}
        )
        for context, n in cuts
    ]


def _compress_all(
    ops: Resolved,
    generator: torch.Generator,
    batches: list[Batch],
    ratio: int,
    state: Tensor | None,
    width: int = 16,
    scale: float = 1.0,
) -> Results:
    """What every step completes; `width` channels an entry."""
    overlap = RATIOS[ratio]
    channels, wide = width * (2 if overlap else 1), ops.numerics.accumulate
    ape = normal(ops, generator, ratio, channels, dtype=torch.float32)
    out = {}
    for number, batch in enumerate(batches):
        kv = token_rows(ops, generator, batch, channels).to(wide)
        gate = token_rows(ops, generator, batch, channels, scale=scale).to(wide)
        made = ops.compress(kv, gate, ape, batch, ratio, overlap, state)
        out[f"entries_{number}"] = completed_only(made, batch, ratio)
    return out


def completed_only(entries: Tensor, batch: Batch, ratio: int) -> Tensor:
    """Zeros in place of entries that a fixed batch only makes room for."""
    return entries.masked_fill(batch.require_plan().entries[ratio].index[:, None] < 0, 0)


def _width(ratio: int, width: int = 16) -> int:
    return width * (2 if RATIOS[ratio] else 1)


def stale_state(ops: Resolved, slots: int, ratio: int, width: int = 16, rollback: int = 0) -> Tensor:
    """A state in which every slot was used before, by a sequence of nothing but NaN."""
    overlap, channels = RATIOS[ratio], _width(ratio, width)
    state = ops.state_new(slots, ratio, overlap, channels, rollback)
    long = np.full(slots, 2 * ratio + rollback)
    batch = Batch(long, np.zeros_like(long), ops.device, slots=np.arange(slots), rollback=rollback)
    rows = nans(ops, batch.tokens, channels, dtype=ops.numerics.accumulate)
    ape = place(ops, torch.zeros(ratio, channels), torch.float32)
    ops.compress(rows, rows, ape, ops.plan(batch, RATIOS, {}), ratio, overlap, state)
    return state


def state_new() -> Cases:
    for ratio in RATIOS:
        for rollback in (0, 3):
            yield case("state_new", _state_new, ratio=ratio, rollback=rollback)
        yield case("state_new", _state_new, "full", ratio=ratio, rollback=3, width=512)


def _state_new(ops: Resolved, generator: torch.Generator, ratio: int, rollback: int, width: int = 16) -> Results:
    state = ops.state_new(2, ratio, RATIOS[ratio], _width(ratio, width), rollback)
    batches = chunks(ops, ((0, ratio + 1), (ratio + 1, ratio), (2 * ratio + 1, 1)), slot=1, rollback=rollback)
    return _compress_all(ops, generator, batches, ratio, state, width)


def state_copy() -> Cases:
    for ratio in RATIOS:
        yield case("state_copy", _state_copy, ratio=ratio, source=2, target=0)
    yield case("state_copy", _state_copy, ratio=4, source=0, target=1)


def _state_copy(ops: Resolved, generator: torch.Generator, ratio: int, source: int, target: int) -> Results:
    """A sequence goes on in the copy, then in the original as well."""
    if source == target:
        raise ValueError("a copy onto itself could not go on twice")
    state = stale_state(ops, 3, ratio)
    before = _compress_all(ops, generator, chunks(ops, ((0, 2 * ratio - 1),), source), ratio, state)
    ops.state_copy(state, source, target)
    twin = _compress_all(ops, generator, chunks(ops, ((2 * ratio - 1, 2),), target), ratio, state)
    again = _compress_all(ops, generator, chunks(ops, ((2 * ratio - 1, 2),), source), ratio, state)
    return {"before": before["entries_0"], "twin": twin["entries_0"], "original": again["entries_0"]}


def state_reset() -> Cases:
    for ratio in RATIOS:
        yield case("state_reset", _state_reset, ratio=ratio, slot=1)
    yield case("state_reset", _state_reset, ratio=4, slot=0)


def _state_reset(ops: Resolved, generator: torch.Generator, ratio: int, slot: int) -> Results:
    """A new sequence in the slot that was reset, while the other slot's sequence goes on."""
    state, other = stale_state(ops, 2, ratio), 1 - slot
    before = _compress_all(ops, generator, chunks(ops, ((0, 2 * ratio - 1),), other), ratio, state)
    ops.state_reset(state, slot)
    new = _compress_all(ops, generator, chunks(ops, ((0, ratio - 1), (ratio - 1, 2)), slot), ratio, state)
    after = _compress_all(ops, generator, chunks(ops, ((2 * ratio - 1, 1),), other), ratio, state)
    return {"before": before["entries_0"], "new": new["entries_1"], "after": after["entries_0"]}


def compress() -> Cases:
    for ratio in RATIOS:
        for ragged in RAGGED:
            yield case("compress", _compress, size_of(ragged), ratio=ratio, ragged=ragged)
        for ragged in ("few", "chunked"):  # exponentials that overflow
            yield case("compress", _compress, size_of(ragged), ratio=ratio, ragged=ragged, scale=40.0)
        for ragged in ("few", "mixed"):
            yield case("compress", _compress, size_of(ragged), ratio=ratio, ragged=ragged, fixed=True)
        for ragged in ("3at2303.1at127", "60at70.p2"):
            yield case("compress", _compress, "full", ratio=ratio, ragged=ragged, width=512)
        for strides in ("one", "row"):
            yield case("compress", _compress, ratio=ratio, ragged="few", strides=strides)
    yield case("compress", _compress, "full", ratio=4, ragged="3at2303.1at127", width=128)  # of the indexer
    for ratio, ragged in ((4, "few_packed"), (128, "packed")):
        yield differentiated(case("compress", _compress, size_of(ragged), ratio=ratio, ragged=ragged, scale=2.0))
    for ratio, first in ((4, 9), (128, 126)):  # cut back by two tokens, over the edge of a block
        size = "tiny" if ratio <= 8 else "quick"
        yield case("compress", _compress_rollback, size, ratio=ratio, first=first)


def _compress(
    ops: Resolved,
    generator: torch.Generator,
    ratio: int,
    ragged: str,
    scale: float = 1.0,
    width: int = 16,
    fixed: bool = False,
) -> Results:
    batches = steps(ops, generator, ragged, fixed=fixed)
    state = stale_state(ops, len(ragged_of(ragged).q_lens) + 3, ratio, width) if batches[0].cached else None
    return _compress_all(ops, generator, batches, ratio, state, width, scale)


def _compress_rollback(ops: Resolved, generator: torch.Generator, ratio: int, first: int) -> Results:
    batches = chunks(ops, ((0, first), (first, 4), (first + 2, 3), (first + 5, ratio)), slot=1, rollback=3)
    return _compress_all(ops, generator, batches, ratio, stale_state(ops, 2, ratio, rollback=3))


def compressor_weights(
    ops: Resolved, generator: torch.Generator, ratio: int, width: int, inputs: int, format: str
) -> CompressorWeights:
    from dsv4_hal.ops.cache import CompressorWeights

    channels = _width(ratio, width)
    return CompressorWeights(
        weight(ops, generator, format, channels, inputs),
        weight(ops, generator, format, channels, inputs),
        normal(ops, generator, ratio, channels, dtype=torch.float32),
        normal(ops, generator, width, dtype=torch.float32),
    )


def compressor() -> Cases:
    for ratio in RATIOS:
        for ragged in ("packed", "packed_none", "decode", "chunked", "padded", "none", "few", "edges"):
            yield case("compressor", _compressor, size_of(ragged), ratio=ratio, ragged=ragged, format="bf16")
    yield case("compressor", _compressor, "quick", ratio=4, ragged="mixed", format="fp32")
    for strides in ("one", "row"):
        yield case("compressor", _compressor, ratio=4, ragged="few", format="bf16", strides=strides)
    for ratio, inputs in ((4, 4096), (128, 4096), (4, 7168), (128, 7168)):
        given = {"ratio": ratio, "ragged": "60at70.p2", "format": "bf16", "width": 512, "inputs": inputs}
        yield case("compressor", _compressor, "full", **given)
    for format in PLAIN_FORMATS:
        yield differentiated(case("compressor", _compressor, ratio=4, ragged="5.0.2", format=format))


def _compressor(
    ops: Resolved,
    generator: torch.Generator,
    ratio: int,
    ragged: str,
    format: str,
    width: int = 64,
    inputs: int = 32,
) -> Results:
    batches = steps(ops, generator, ragged)
    weights = compressor_weights(ops, generator, ratio, width, inputs, format)
    state = stale_state(ops, len(ragged_of(ragged).q_lens) + 3, ratio, width) if batches[0].cached else None
    out = {}
    for number, batch in enumerate(batches):
        tables = angles(ops, batch.require_plan().entries[ratio].positions, 32)
        x = token_rows(ops, generator, batch, inputs)
        out[f"entries_{number}"] = ops.compressor(x, weights, batch, ratio, RATIOS[ratio], state, tables, 1e-6)
    return out


def compress_store() -> Cases:
    for kind in ("csa", "hca", "index"):
        for ragged in ("packed", "packed_none", "mixed", "chunked", "padded", "edges", "none", "few", "few_packed"):
            # a state of 128 wide rows for every sequence is much for an interpreter
            size = "quick" if kind == "hca" and ragged in ("none", "few") else size_of(ragged, real=True)
            yield case("compress_store", _compress_store, size, kind=kind, ragged=ragged)
        yield case("compress_store", _compress_store, "quick", kind=kind, ragged="chunked", reused=True)
        for inputs in (4096, 7168):
            yield case("compress_store", _compress_store, "full", kind=kind, ragged="60at70.p2", inputs=inputs)
    for kind in ("csa", "index"):
        for ragged in ("few", "mixed"):
            size = size_of(ragged, real=True)
            yield case("compress_store", _compress_store, size, kind=kind, ragged=ragged, fixed=True)
    yield case("compress_store", _compress_store, "interpreted", kind="csa", ragged="5.0.2.p1", strides="row")
    yield case("compress_store", _compress_store, "quick", kind="csa", ragged="few", strides="one")
    for kind in ("csa", "index"):
        yield differentiated(case("compress_store", _compress_store, "interpreted", kind=kind, ragged="5.0.2"))


def _compress_store(
    ops: Resolved,
    generator: torch.Generator,
    kind: str,
    ragged: str,
    inputs: int = 32,
    reused: bool = False,
    fixed: bool = False,
) -> Results:
    layout = row_layout(ops, kind)
    ratio, batches = layout.ratio, steps(ops, generator, ragged, fixed=fixed)
    weights = compressor_weights(ops, generator, ratio, layout.dim, inputs, "bf16")
    state = stale_state(ops, len(ragged_of(ragged).q_lens) + 3, ratio, layout.dim) if batches[0].cached else None
    kv = used_pool(ops, generator, layout, batches[0]) if reused else pool_for(ops, layout, batches[0])
    for batch in batches:
        tables = angles(ops, batch.require_plan().entries[ratio].positions, 64)
        x = token_rows(ops, generator, batch, inputs)
        kv = ops.compress_store(
            x, weights, layout, batch, RATIOS[ratio], state, tables, 1e-6, kv, rotate=kind == "index"
        )
    assert kv is not None
    return held(ops, "index" if kind == "index" else "kv", kv, batches[-1])


def kv_norm_rope_store() -> Cases:
    for ragged in RAGGED:
        yield case("kv_norm_rope_store", _kv_norm_rope_store, size_of(ragged, real=True), ragged=ragged)
    for ragged in ("few", "mixed"):
        yield case("kv_norm_rope_store", _kv_norm_rope_store, size_of(ragged), ragged=ragged, small=True)
    for ragged in ("few", "chunked"):
        given = {"ragged": ragged, "small": True, "reused": True}
        yield case("kv_norm_rope_store", _kv_norm_rope_store, size_of(ragged), **given)
    for strides in ("one", "row"):
        yield case("kv_norm_rope_store", _kv_norm_rope_store, ragged="few", small=True, strides=strides)
    for ragged in ("3at2303.1at1000", "60at30.p2"):
        yield case("kv_norm_rope_store", _kv_norm_rope_store, "full", ragged=ragged)
    yield differentiated(case("kv_norm_rope_store", _kv_norm_rope_store, ragged="5.0.2", small=True))


def _kv_norm_rope_store(
    ops: Resolved, generator: torch.Generator, ragged: str, small: bool = False, reused: bool = False
) -> Results:
    layout, batches = row_layout(ops, "window", small), steps(ops, generator, ragged)
    gain = normal(ops, generator, layout.dim, dtype=torch.float32)
    kv = used_pool(ops, generator, layout, batches[0]) if reused else pool_for(ops, layout, batches[0])
    for batch in batches:
        tables = angles(ops, batch.positions, 32 if small else 64)
        rows = token_rows(ops, generator, batch, layout.dim)
        kv = ops.kv_norm_rope_store(rows, gain, 1e-6, tables, layout, batch, kv)
    assert kv is not None
    return held(ops, "kv", kv, batches[-1])
