"""Cases of hyper-connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_hal.ops.cases.inputs import TOKENS, Results, case, differentiated, normal

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.ops.spec import Cases

EPS = 1e-6


def _mixing(
    ops: Resolved, generator: torch.Generator, rows: int, inputs: int, scales: int, spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base, scale; `spread` is about the size of the logits."""
    fn = normal(ops, generator, rows, inputs, dtype=torch.float32, scale=inputs**-0.5)
    base = normal(ops, generator, rows, dtype=torch.float32, scale=spread)
    return fn, base, normal(ops, generator, scales, dtype=torch.float32, scale=spread)


def hc_pre() -> Cases:
    for tokens in TOKENS:
        yield case("hc_pre", _hc_pre, tokens=tokens, streams=4, width=128, iters=20)
    yield differentiated(case("hc_pre", _hc_pre, tokens=5, streams=2, width=64, iters=1))
    for iters in (3, 20):  # large logits: the iteration has not settled, and each of its steps shows
        yield differentiated(case("hc_pre", _hc_pre, tokens=5, streams=4, width=128, iters=iters, spread=12.0))
    yield case("hc_pre", _hc_pre, "quick", tokens=128, streams=4, width=32, iters=3)
    yield case("hc_pre", _hc_pre, "quick", tokens=3, streams=4, width=4096, iters=20)
    for width in (4096, 7168):
        yield case("hc_pre", _hc_pre, "full", tokens=64, streams=4, width=width, iters=20)
    for strides in ("one", "row"):
        yield case("hc_pre", _hc_pre, tokens=3, streams=4, width=40, iters=3, strides=strides)


def _hc_pre(
    ops: Resolved,
    generator: torch.Generator,
    tokens: int,
    streams: int,
    width: int,
    iters: int,
    spread: float = 1.0,
) -> Results:
    x = normal(ops, generator, tokens, streams, width)
    mixing = _mixing(ops, generator, 2 * streams + streams**2, streams * width, 3, spread)
    y, post, comb = ops.hc_pre(x, *mixing, iters, EPS, EPS)
    return {"x": y, "post": post, "comb": comb}


def hc_post() -> Cases:
    for tokens in TOKENS:
        yield case("hc_post", _hc_post, tokens=tokens, streams=4, width=128)
    yield differentiated(case("hc_post", _hc_post, tokens=3, streams=4, width=40))
    yield case("hc_post", _hc_post, "quick", tokens=70, streams=2, width=64)
    yield case("hc_post", _hc_post, "quick", tokens=128, streams=4, width=32)
    yield case("hc_post", _hc_post, "quick", tokens=3, streams=4, width=4096)
    for width in (4096, 7168):
        yield case("hc_post", _hc_post, "full", tokens=64, streams=4, width=width)
    for strides in ("one", "row"):
        yield case("hc_post", _hc_post, tokens=3, streams=4, width=40, strides=strides)


def _hc_post(ops: Resolved, generator: torch.Generator, tokens: int, streams: int, width: int) -> Results:
    wide = ops.numerics.accumulate
    y, x = normal(ops, generator, tokens, width), normal(ops, generator, tokens, streams, width)
    post = normal(ops, generator, tokens, streams, dtype=wide)
    comb = normal(ops, generator, tokens, streams, streams, dtype=wide)
    return {"streams": ops.hc_post(y, x, post, comb)}


def hc_head() -> Cases:
    for tokens in TOKENS:
        yield case("hc_head", _hc_head, tokens=tokens, streams=4, width=128)
    yield differentiated(case("hc_head", _hc_head, tokens=3, streams=2, width=64, spread=12.0))
    yield case("hc_head", _hc_head, "quick", tokens=128, streams=4, width=32)
    yield case("hc_head", _hc_head, "quick", tokens=3, streams=4, width=4096)
    for width in (4096, 7168):
        yield case("hc_head", _hc_head, "full", tokens=64, streams=4, width=width)
    for strides in ("one", "row"):
        yield case("hc_head", _hc_head, tokens=3, streams=4, width=40, strides=strides)


def _hc_head(
    ops: Resolved, generator: torch.Generator, tokens: int, streams: int, width: int, spread: float = 1.0
) -> Results:
    x = normal(ops, generator, tokens, streams, width)
    return {"y": ops.hc_head(x, *_mixing(ops, generator, streams, streams * width, 1, spread), EPS, EPS)}


def hc_pre_norm() -> Cases:
    for tokens in TOKENS:
        yield case("hc_pre_norm", _hc_pre_norm, tokens=tokens, streams=4, width=128, iters=20)
    yield case("hc_pre_norm", _hc_pre_norm, tokens=5, streams=4, width=128, iters=20, spread=12.0)
    yield differentiated(case("hc_pre_norm", _hc_pre_norm, tokens=3, streams=4, width=40, iters=3))
    yield case("hc_pre_norm", _hc_pre_norm, "quick", tokens=128, streams=4, width=32, iters=3)
    yield case("hc_pre_norm", _hc_pre_norm, "quick", tokens=3, streams=4, width=4096, iters=20)
    for width in (4096, 7168):
        yield case("hc_pre_norm", _hc_pre_norm, "full", tokens=64, streams=4, width=width, iters=20)
    for strides in ("one", "row"):
        yield case("hc_pre_norm", _hc_pre_norm, tokens=3, streams=4, width=40, iters=3, strides=strides)


def _hc_pre_norm(
    ops: Resolved,
    generator: torch.Generator,
    tokens: int,
    streams: int,
    width: int,
    iters: int,
    spread: float = 1.0,
) -> Results:
    x = normal(ops, generator, tokens, streams, width)
    mixing = _mixing(ops, generator, 2 * streams + streams**2, streams * width, 3, spread)
    gain = normal(ops, generator, width, dtype=torch.float32)
    y, post, comb = ops.hc_pre_norm(x, *mixing, iters, EPS, EPS, gain)
    return {"x": y, "post": post, "comb": comb}
