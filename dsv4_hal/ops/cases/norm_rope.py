"""Cases of norms, rotary embedding and the Hadamard rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_hal.ops.cases.inputs import TOKENS, Results, angles, case, differentiated, nans, normal, yes

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.ops.spec import Cases


def rms_norm() -> Cases:
    for weighted in (True, False):
        for tokens in TOKENS:
            yield case("rms_norm", _norm, "interpreted", weighted=weighted, tokens=tokens, width=512)
        for scale in (0.0, 1e-4, 1e4):  # zero: eps alone; small: eps counts
            yield differentiated(case("rms_norm", _norm, weighted=weighted, tokens=3, width=128, scale=scale))
        yield case("rms_norm", _norm, "quick", weighted=weighted, tokens=128, width=64)
        yield case("rms_norm", _norm, "quick", weighted=weighted, tokens=129, width=500)
        for width in (1024, 1536, 4096, 7168):
            yield case("rms_norm", _norm, "full", weighted=weighted, tokens=64, width=width)
        yield case("rms_norm", _norm, weighted=weighted, tokens=3, width=100, how="strided")
        for strides in ("one", "row"):
            yield case("rms_norm", _norm, weighted=weighted, tokens=3, width=64, strides=strides)
        yield case("rms_norm", _norm, weighted=weighted, tokens=3, width=96, how="out")


def _norm(
    ops: Resolved,
    generator: torch.Generator,
    weighted: bool,
    tokens: int,
    width: int,
    scale: float = 1.0,
    how: str = "",
) -> Results:
    shape = (tokens, width) if weighted else (tokens, 4, width)
    weight = normal(ops, generator, width, dtype=torch.float32) if weighted else None
    if how == "strided":
        x = normal(ops, generator, *shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
        return {"y": ops.rms_norm(x, weight, 1e-6)}
    x = normal(ops, generator, *shape, scale=scale)
    if how == "out":
        out = nans(ops, *shape)
        y = ops.rms_norm(x, weight, 1e-6, out=out)
        return {"y": y, "written": out, "same": yes(ops, y is out)}
    return {"y": ops.rms_norm(x, weight, 1e-6)}


def rope() -> Cases:
    for inverse in (False, True):
        for tokens in TOKENS:
            yield case("rope", _rope, "interpreted", tokens=tokens, heads=4, width=512, channels=64, inverse=inverse)
        # rows without heads
        yield differentiated(case("rope", _rope, tokens=5, heads=0, width=128, channels=64, inverse=inverse))
        yield case("rope", _rope, tokens=5, heads=2, width=64, channels=64, inverse=inverse)  # every channel turns
        yield case("rope", _rope, "quick", tokens=128, heads=2, width=64, channels=32, inverse=inverse)
        yield case("rope", _rope, tokens=3, heads=2, width=33, channels=18, inverse=inverse)  # an odd number pass
        for heads in (64, 128):
            yield case("rope", _rope, "full", tokens=64, heads=heads, width=512, channels=64, inverse=inverse)
        yield case("rope", _rope, "full", tokens=64, heads=64, width=128, channels=64, inverse=inverse)  # indexer
    for strides in ("one", "row"):
        yield case("rope", _rope, tokens=3, heads=2, width=96, channels=32, inverse=False, strides=strides)
    for how in ("strided", "out", "far"):
        yield case("rope", _rope, tokens=5, heads=2, width=96, channels=32, inverse=False, how=how)


def _rope(
    ops: Resolved,
    generator: torch.Generator,
    tokens: int,
    heads: int,
    width: int,
    channels: int,
    inverse: bool,
    how: str = "",
) -> Results:
    positions = torch.randint(5000, (tokens,), generator=generator) + (1_000_000 if how == "far" else 0)
    tables = angles(ops, positions, channels)
    shape = (tokens, heads, width) if heads else (tokens, width)
    if how == "strided":
        x = normal(ops, generator, *shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
        return {"y": ops.rope(x, tables, inverse)}
    x = normal(ops, generator, *shape)
    if how == "out":
        out = nans(ops, *shape)
        y = ops.rope(x, tables, inverse, out=out)
        return {"y": y, "written": out, "same": yes(ops, y is out)}
    return {"y": ops.rope(x, tables, inverse)}


def hadamard() -> Cases:
    for tokens in TOKENS:
        yield case("hadamard", _hadamard, "interpreted", tokens=tokens, heads=4, width=128)
    for width in (1, 2, 64):
        yield differentiated(case("hadamard", _hadamard, tokens=3, heads=1, width=width))
    yield case("hadamard", _hadamard, "quick", tokens=128, heads=2, width=128)
    yield case("hadamard", _hadamard, "full", tokens=64, heads=64, width=128)
    for strides in ("one", "row"):
        yield case("hadamard", _hadamard, tokens=3, heads=2, width=32, strides=strides)


def _hadamard(ops: Resolved, generator: torch.Generator, tokens: int, heads: int, width: int) -> Results:
    return {"y": ops.hadamard(normal(ops, generator, tokens, heads, width))}


def q_norm_rope() -> Cases:
    for tokens in TOKENS:
        yield case("q_norm_rope", _q_norm_rope, "interpreted", tokens=tokens, heads=4, width=512, channels=64)
    yield differentiated(case("q_norm_rope", _q_norm_rope, tokens=5, heads=2, width=96, channels=32))
    yield case("q_norm_rope", _q_norm_rope, "quick", tokens=70, heads=2, width=96, channels=32)
    yield case("q_norm_rope", _q_norm_rope, "quick", tokens=128, heads=2, width=64, channels=32)
    for heads in (64, 128):
        yield case("q_norm_rope", _q_norm_rope, "full", tokens=64, heads=heads, width=512, channels=64)
    for strides in ("one", "row"):
        yield case("q_norm_rope", _q_norm_rope, tokens=3, heads=2, width=96, channels=32, strides=strides)


def _q_norm_rope(
    ops: Resolved, generator: torch.Generator, tokens: int, heads: int, width: int, channels: int
) -> Results:
    tables = angles(ops, torch.randint(5000, (tokens,), generator=generator), channels)
    return {"y": ops.q_norm_rope(normal(ops, generator, tokens, heads, width), 1e-6, tables)}
