"""Cases of the indexer and of sparse attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.ops.cases.cache import row_layout
from dsv4_hal.ops.cases.inputs import (
    RAGGED,
    TOKENS,
    WEIGHT_FORMATS,
    Results,
    angles,
    case,
    count_rows,
    differentiated,
    filled,
    nans,
    normal,
    pool_for,
    size_of,
    steps,
    token_rows,
    weight,
    whole,
    yes,
)

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.ops.spec import Cases

INDEX_HEADS, SCALE = 4, 512**-0.5


def index_topk() -> Cases:
    for ragged in RAGGED:
        size = size_of(ragged, real=True)
        yield case("index_topk", _index_topk, size, ragged=ragged, k=8)
    yield differentiated(case("index_topk", _index_topk, "interpreted", ragged="few_packed", k=2))
    for ragged in RAGGED:
        size = size_of(ragged, real=True)
        yield case("index_topk", _index_ties, size, ragged=ragged, k=8, scores="whole")
    yield case("index_topk", _index_topk, "quick", ragged="chunked", k=1)
    for ragged in ("few", "chunked"):
        size = size_of(ragged, real=True)
        yield case("index_topk", _index_topk, size, ragged=ragged, k=8, reused=True)
        yield case("index_topk", _index_topk, size, ragged=ragged, k=8, q_scale=30.0)
        yield case("index_topk", _index_topk, size, ragged=ragged, k=8, fixed=True)
    for strides in ("one", "row"):
        yield case("index_topk", _index_topk, "interpreted", ragged="few", k=3, strides=strides)
    yield case("index_topk", _index_topk, "full", ragged="64at0", k=512, heads=64)
    for k, ragged in ((512, "3at2303.1at1000"), (1024, "1at5000")):
        yield case("index_topk", _index_topk, "full", ragged=ragged, k=k, heads=64)
        yield case("index_topk", _index_ties, "full", ragged=ragged, k=k, scores="whole")
    yield case("index_topk", _index_topk, "quick", ragged="mixed", k=512)  # far more than anyone sees


def _longest(batch: Batch, ratio: int) -> int:
    return int(batch.lengths.max(initial=0)) // ratio


def _index_topk(
    ops: Resolved,
    generator: torch.Generator,
    ragged: str,
    k: int,
    heads: int = 4,
    reused: bool = False,
    q_scale: float = 1.0,
    fixed: bool = False,
) -> Results:
    batches = steps(ops, generator, ragged, fixed=fixed)
    batch = batches[-1]
    keys = filled(ops, generator, row_layout(ops, "index"), batches, reused)
    q = token_rows(ops, generator, batch, heads, keys.layout.dim, scale=q_scale)
    weights = token_rows(ops, generator, batch, heads)
    picks, _ = ops.index_topk(q, weights, keys, batch, k)
    count = max(1, _longest(batch, keys.layout.ratio))
    every, score = ops.index_topk(q, weights, keys, batch, count, with_scores=True)
    assert score is not None
    # One more column takes what belongs to no entry.
    candidates = torch.full((batch.tokens, count + 1), float("-inf"), dtype=score.dtype, device=ops.device)
    candidates = candidates.scatter(1, every.masked_fill(every < 0, count), score)[:, :count]
    return {"picks": picks, "candidates": candidates.contiguous()}


def _index_ties(ops: Resolved, generator: torch.Generator, ragged: str, k: int, scores: str) -> Results:
    """Scores are small whole numbers, many of them equal: the order has one right answer.

    A row of +-1 and zeros is exact in every row format, and so are its products.
    """
    batches = steps(ops, generator, ragged)
    layout, batch = row_layout(ops, "index"), batches[-1]
    keys = pool_for(ops, layout, batch)
    for step in batches:
        rows = whole(ops, generator, -1, 1, count_rows(step, layout.ratio), layout.dim)
        rows[:, 8:] = 0
        rows[:, 8::32] = 1  # the largest value of every block of 32 is 1
        keys = ops.kv_store(rows, layout, step, keys)
    assert keys is not None
    q = whole(ops, generator, 0, 1, batch.tokens, INDEX_HEADS, layout.dim)
    q[:, :, 8:] = 0
    q[:, :, 9::32] = 1
    weights = whole(ops, generator, -1, 2, batch.tokens, INDEX_HEADS)
    order, score = ops.index_topk(q, weights, keys, batch, k, with_scores=True)
    assert score is not None
    return {"order": order, "scores": score}


def sparse_attention() -> Cases:
    for ragged in RAGGED:
        for entries in ("none", "csa", "picks", "hca"):
            trivial = ragged in ("packed_none", "empty", "none") and entries != "picks"
            size = "quick" if trivial else size_of(ragged, real=True)
            yield case("sparse_attention", _attention, size, ragged=ragged, entries=entries)
    for ragged, changes in (
        ("chunked", {"entries": "hca", "window": 128}),
        ("mixed", {"entries": "none", "window": 1}),
        ("mixed", {"entries": "picks", "k": 40}),  # more than most tokens see
        ("mixed", {"entries": "csa", "small": True}),
        ("few", {"entries": "csa", "small": True}),
        ("few_packed", {"entries": "picks", "small": True}),
        ("few", {"entries": "picks", "small": True, "k": 40}),
        ("decode", {"entries": "picks", "sink": 12.0}),  # outweighs every key
        ("few", {"entries": "picks", "small": True, "sink": 12.0}),
        ("chunked", {"entries": "picks", "q_scale": 30.0}),  # one key takes all
        ("padded", {"entries": "picks", "out": True}),
        ("few", {"entries": "picks", "small": True, "out": True}),
        ("padded", {"entries": "none", "lse": False}),
        ("few", {"entries": "csa", "small": True, "reused": True}),
        ("few", {"entries": "csa", "small": True, "fixed": True}),
        ("few", {"entries": "picks", "small": True, "fixed": True}),
        ("decode", {"entries": "hca", "fixed": True}),
        ("chunked", {"entries": "picks", "reused": True}),
        ("decode", {"entries": "hca", "reused": True}),
    ):
        yield case("sparse_attention", _attention, size_of(ragged), ragged=ragged, **changes)
    for entries in ("none", "csa", "picks", "hca"):  # as models ask: the published window, and no lse
        given = {"entries": entries, "window": 128, "lse": False}
        yield case("sparse_attention", _attention, "quick", ragged="decode", **given)
        yield case("sparse_attention", _attention, "quick", ragged="few_packed", **given)
        yield case("sparse_attention", _attention, "quick", ragged="1at130.20at0.3at125.p2", **given, heads=64)
    for strides in ("one", "row"):
        yield case("sparse_attention", _attention, ragged="few", entries="picks", small=True, strides=strides)
    for heads, k, ragged in ((64, 512, "3at2303.1at1000"), (128, 1024, "1at5000"), (128, 1024, "60at30.p2")):
        for entries in ("none", "csa", "picks", "hca"):
            given = {"ragged": ragged, "entries": entries, "window": 128, "k": k, "heads": heads}
            yield case("sparse_attention", _attention, "full", **given)
    for entries in ("none", "csa", "picks"):
        yield differentiated(
            case("sparse_attention", _attention, ragged="few_packed", entries=entries, window=3, small=True)
        )


def _attention(
    ops: Resolved,
    generator: torch.Generator,
    ragged: str,
    entries: str,
    window: int = 8,
    small: bool = False,
    k: int = 5,
    sink: float = 0.0,
    q_scale: float = 2.0,
    out: bool = False,
    lse: bool = True,
    heads: int = 4,
    reused: bool = False,
    fixed: bool = False,
) -> Results:
    batches = steps(ops, generator, ragged, window, fixed=fixed)
    batch, kind = batches[-1], "csa" if entries == "picks" else entries
    window_kv = filled(ops, generator, row_layout(ops, "window", small, window), batches, reused)
    dim = window_kv.layout.dim
    compressed = None if kind == "none" else filled(ops, generator, row_layout(ops, kind, small), batches, reused)
    picks = random_picks(ops, generator, batch, k) if entries == "picks" else None
    q = token_rows(ops, generator, batch, heads, dim, scale=q_scale)
    sinks = normal(ops, generator, heads, dtype=torch.float32) + sink
    target = nans(ops, batch.tokens, heads, dim) if out else None
    y, log_sum = ops.sparse_attention(q, window_kv, sinks, SCALE, batch, compressed, picks, return_lse=lse, out=target)
    if log_sum is None:
        return {"y": y}
    if target is None:
        return {"y": y, "lse": log_sum}
    return {"y": y, "lse": log_sum, "written": target, "same": yes(ops, y is target)}


def random_picks(ops: Resolved, generator: torch.Generator, batch: Batch, k: int, ratio: int = 4) -> Tensor:
    """[T, k] distinct visible entries in any order, with -1 between them; padding tokens pick nothing."""
    visible = torch.from_numpy((batch.positions_host + 1) // ratio * (batch.seq_host >= 0))
    rank = torch.rand(batch.tokens, max(_longest(batch, ratio), k), generator=generator).argsort(-1)
    picks = rank[:, :k]
    return torch.where(picks < visible[:, None], picks, -1).to(ops.device)


def output_proj() -> Cases:
    for format in WEIGHT_FORMATS:
        if format in ("bf16", "e4m3_128x128"):
            for tokens in TOKENS:
                yield differentiated(case("output_proj", _output_proj, format=format, tokens=tokens))
        else:
            yield case("output_proj", _output_proj, "quick", format=format, tokens=5)
    yield case("output_proj", _output_proj, "quick", format="e4m3_128x128", tokens=128)
    for strides in ("one", "row"):
        yield case("output_proj", _output_proj, format="bf16", tokens=3, strides=strides)
    for heads, groups, width in ((64, 8, 4096), (32, 4, 7168)):  # Flash; a quarter of Pro
        given = {"tokens": 7, "heads": heads, "dim": 512, "groups": groups, "rank": 1024, "width": width}
        yield case("output_proj", _output_proj, "full", format="e4m3_128x128", **given)


def _output_proj(
    ops: Resolved,
    generator: torch.Generator,
    format: str,
    tokens: int,
    heads: int = 4,
    dim: int = 256,
    groups: int = 2,
    rank: int = 128,
    width: int = 192,
) -> Results:
    tables = angles(ops, torch.randint(5000, (tokens,), generator=generator), 64)
    wo_a = weight(ops, generator, format, groups, rank, heads * dim // groups)
    wo_b = weight(ops, generator, format, width, groups * rank)
    return {"y": ops.output_proj(normal(ops, generator, tokens, heads, dim), tables, wo_a, wo_b)}
