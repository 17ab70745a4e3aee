"""Cases of the mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_hal.ops.cases.inputs import (
    TOKENS,
    WEIGHT_FORMATS,
    Results,
    case,
    differentiated,
    drawn,
    ids,
    nans,
    normal,
    place,
    weight,
    whole,
    yes,
)

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.ops.spec import Cases


def route() -> Cases:
    for bias in (False, True):
        for tokens in TOKENS:
            yield case("route", _route, tokens=tokens, experts=32, k=6, bias=bias)
        for tokens in (70, 128):
            yield case("route", _route, "quick", tokens=tokens, experts=32, k=6, bias=bias)
        for experts in (256, 384):
            yield case("route", _route, "full", tokens=64, experts=experts, k=6, bias=bias)
            yield case("route", _route_ties, "full", tokens=64, experts=experts, k=6, bias=bias, scores="whole")
    yield case("route", _route, "quick", tokens=5, experts=256, k=6, bias=True)
    for strides in ("one", "row"):
        yield case("route", _route, tokens=5, experts=8, k=2, bias=True, strides=strides)
    yield case("route", _route, tokens=5, experts=32, k=6, bias=False, spread=40.0)  # softplus beyond its threshold
    yield differentiated(case("route", _route, tokens=5, experts=8, k=8, bias=True))
    yield case("route", _route, tokens=5, experts=8, k=1, bias=True)
    yield differentiated(case("route", _route_given, tokens=5, experts=32, k=6))
    for bias in (False, True):
        yield case("route", _route_ties, tokens=8, experts=32, k=6, bias=bias, scores="whole")
        yield case("route", _route_ties, "quick", tokens=20, experts=32, k=6, bias=bias, scores="whole")


def _logits(ops: Resolved, generator: torch.Generator, tokens: int, experts: int, spread: float = 3.0) -> Tensor:
    values = (drawn(generator, (tokens, experts)) * spread).clamp(min=-80)
    return place(ops, values, ops.numerics.accumulate)


def _route(
    ops: Resolved, generator: torch.Generator, tokens: int, experts: int, k: int, bias: bool, spread: float = 3.0
) -> Results:
    logits = _logits(ops, generator, tokens, experts, spread)
    added = None
    if bias:  # large enough to change most picks; a weight that contains it is far off
        added = normal(ops, generator, experts, dtype=torch.float32, scale=4.0)
    picks, weights = ops.route(logits, k, 1.5, added)
    with ops.watch:  # as an op is: what it reckons is as far off as what an op does
        score = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
        candidates = score if added is None else score + added
    return {"picks": picks, "weights": weights, "candidates": candidates}


def _route_given(ops: Resolved, generator: torch.Generator, tokens: int, experts: int, k: int) -> Results:
    """Picks from outside (hash routing, replay) are taken as they are, in their order."""
    given = ids(ops, generator, tokens, k, experts)
    order, weights = ops.route(_logits(ops, generator, tokens, experts), k, 2.5, picks=given)
    return {"order": order, "weights": weights}


def _route_ties(
    ops: Resolved, generator: torch.Generator, tokens: int, experts: int, k: int, bias: bool, scores: str
) -> Results:
    """Logits are few whole numbers: among equals the lower id comes first."""
    logits = whole(ops, generator, 0, 2, tokens, experts, dtype=ops.numerics.accumulate)
    added = whole(ops, generator, 0, 1, experts, dtype=torch.float32) if bias else None
    order, weights = ops.route(logits, k, 1.0, added)
    return {"order": order, "weights": weights}


def permute() -> Cases:
    for tokens in TOKENS:
        yield case("permute", _permute, tokens=tokens, experts=16, k=6)
    yield case("permute", _permute, "quick", tokens=70, experts=3, k=2)
    yield differentiated(case("permute", _permute, tokens=8, experts=40, k=1))  # most experts get nothing
    yield differentiated(case("permute", _permute, tokens=5, experts=7, k=3))
    yield case("permute", _permute, "quick", tokens=128, experts=8, k=6)
    for experts, width in ((256, 4096), (384, 7168)):
        yield case("permute", _permute, "full", tokens=64, experts=experts, k=6, width=width)
    for strides in ("one", "row"):
        yield case("permute", _permute, tokens=5, experts=4, k=2, strides=strides)


def _permute(ops: Resolved, generator: torch.Generator, tokens: int, experts: int, k: int, width: int = 32) -> Results:
    x = normal(ops, generator, tokens, width)
    rows, offsets, order = ops.permute(x, ids(ops, generator, tokens, k, experts), experts)
    return {"rows": rows, "offsets": offsets, "order": order}


def unpermute() -> Cases:
    for tokens in TOKENS:
        yield case("unpermute", _unpermute, tokens=tokens, k=6)
    yield differentiated(case("unpermute", _unpermute, tokens=8, k=1))
    yield differentiated(case("unpermute", _unpermute, tokens=3, k=6))
    yield case("unpermute", _unpermute, "quick", tokens=128, k=6)
    for width in (4096, 7168):
        yield case("unpermute", _unpermute, "full", tokens=64, k=6, width=width)
    for strides in ("one", "row"):
        yield case("unpermute", _unpermute, tokens=5, k=2, strides=strides)


def _unpermute(ops: Resolved, generator: torch.Generator, tokens: int, k: int, width: int = 32) -> Results:
    order = torch.randperm(tokens * k, generator=generator).to(ops.device)
    return {"y": ops.unpermute(normal(ops, generator, tokens * k, width), order, (tokens, k))}


def swiglu() -> Cases:
    for tokens in TOKENS:
        for limit in (None, 10.0):
            yield differentiated(case("swiglu", _swiglu, tokens=tokens, width=96, limit=limit, weighted=True))
    yield case("swiglu", _swiglu, tokens=5, width=96, limit=10.0, weighted=False)
    yield differentiated(case("swiglu", _swiglu, tokens=5, width=96, limit=0.5, weighted=False))
    yield case("swiglu", _swiglu, "quick", tokens=128, width=96, limit=10.0, weighted=True)
    yield case("swiglu", _swiglu, "quick", tokens=129, width=100, limit=10.0, weighted=True)
    for width in (2048, 3072):
        yield case("swiglu", _swiglu, "full", tokens=64, width=width, limit=10.0, weighted=True)
    for strides in ("one", "row"):
        yield case("swiglu", _swiglu, tokens=5, width=32, limit=10.0, weighted=True, strides=strides)
    for how in ("out", "strided"):
        yield case("swiglu", _swiglu, tokens=5, width=96, limit=10.0, weighted=True, how=how)


def _swiglu(
    ops: Resolved,
    generator: torch.Generator,
    tokens: int,
    width: int,
    limit: float | None,
    weighted: bool,
    how: str = "",
) -> Results:
    row_weight = place(ops, torch.rand(tokens, generator=generator), ops.numerics.accumulate) if weighted else None
    # Far beyond the limit on both sides: gate below -limit must pass, up must not.
    if how == "strided":
        return {"y": ops.swiglu(normal(ops, generator, 2 * width, tokens, scale=12.0).T, limit, row_weight)}
    gate_up = normal(ops, generator, tokens, 2 * width, scale=12.0)
    if how == "out":
        out = nans(ops, tokens, width)
        y = ops.swiglu(gate_up, limit, row_weight, out=out)
        return {"y": y, "written": out, "same": yes(ops, y is out)}
    return {"y": ops.swiglu(gate_up, limit, row_weight)}


def moe_experts() -> Cases:
    for format in WEIGHT_FORMATS:
        if format in ("bf16", "e4m3_128x128", "mxfp4"):
            yield case("moe_experts", _moe_experts, format=format, tokens=0, experts=8, k=3)
            for tokens in (1, 5):
                yield differentiated(case("moe_experts", _moe_experts, format=format, tokens=tokens, experts=8, k=3))
            yield case("moe_experts", _moe_experts, "quick", format=format, tokens=70, experts=12, k=3)
        else:
            yield case("moe_experts", _moe_experts, "quick", format=format, tokens=5, experts=8, k=3)
    yield case("moe_experts", _moe_experts, "quick", format="mxfp4", tokens=128, experts=8, k=6)
    for strides in ("one", "row"):
        yield case("moe_experts", _moe_experts, format="mxfp4", tokens=3, experts=4, k=2, strides=strides)
    for format, experts, inner, width in (
        ("mxfp4", 4, 2048, 4096),
        ("e4m3_128x128_fp32", 2, 2048, 4096),
        ("mxfp4", 2, 3072, 7168),
    ):
        given = {"format": format, "tokens": 9, "experts": experts, "k": 2, "inner": inner, "width": width}
        yield case("moe_experts", _moe_experts, "full", **given)


def _moe_experts(
    ops: Resolved,
    generator: torch.Generator,
    format: str,
    tokens: int,
    experts: int,
    k: int,
    inner: int = 128,
    width: int = 256,
) -> Results:
    x = normal(ops, generator, tokens, width)
    chosen = ids(ops, generator, tokens, k, experts)
    weights = place(ops, torch.rand(tokens, k, generator=generator), ops.numerics.accumulate)
    w13 = weight(ops, generator, format, experts, 2 * inner, width)
    w2 = weight(ops, generator, format, experts, width, inner)
    return {"y": ops.moe_experts(x, chosen, weights, w13, w2, 2.0)}


def mlp() -> Cases:
    for format in WEIGHT_FORMATS:
        if format in ("bf16", "e4m3_128x128", "mxfp4"):
            yield case("mlp", _mlp, format=format, tokens=0, limit=2.0)
            for tokens in (1, 5):
                yield differentiated(case("mlp", _mlp, format=format, tokens=tokens, limit=2.0))
        else:
            yield case("mlp", _mlp, "quick", format=format, tokens=5, limit=2.0)
    yield case("mlp", _mlp, format="bf16", tokens=5, limit=None)
    yield case("mlp", _mlp, "quick", format="e4m3_128x128", tokens=128, limit=2.0)
    for strides in ("one", "row"):
        yield case("mlp", _mlp, format="e4m3_128x128", tokens=3, limit=2.0, strides=strides)
    for inner, width in ((2048, 4096), (3072, 7168)):
        yield case("mlp", _mlp, "full", format="e4m3_128x128", tokens=9, limit=10.0, inner=inner, width=width)


def _mlp(
    ops: Resolved,
    generator: torch.Generator,
    format: str,
    tokens: int,
    limit: float | None,
    inner: int = 128,
    width: int = 256,
) -> Results:
    w13 = weight(ops, generator, format, 2 * inner, width)
    w2 = weight(ops, generator, format, width, inner)
    return {"y": ops.mlp(normal(ops, generator, tokens, width), w13, w2, limit)}
