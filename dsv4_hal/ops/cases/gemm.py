"""Cases of matrix products and formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_hal.formats import FORMATS, QTensor
from dsv4_hal.ops.cases.inputs import (
    PLAIN_FORMATS,
    TOKENS,
    WEIGHT_FORMATS,
    Results,
    case,
    nans,
    normal,
    place,
    quantised,
    weight,
    yes,
)

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.ops.spec import Cases

BLOCK_FORMATS = tuple(name for name, fmt in FORMATS.items() if not fmt.plain)


def codes(q: QTensor) -> Results:
    return {"codes": q.data} if q.scale is None else {"codes": q.data, "scales": q.scale}


def quantize() -> Cases:
    for name in BLOCK_FORMATS:
        for values in ("normal", "ties", "edges"):
            yield case("quantize", _quantize, "quick", format=name, rows=130, columns=288, values=values)
            yield case("quantize", _quantize, format=name, rows=6, columns=288, values=values)
        yield case("quantize", _quantize, format=name, rows=5, columns=40, values="normal")  # less than one block
        yield case("quantize", _quantize, format=name, rows=0, columns=64, values="normal")
    yield case("quantize", _quantize_strided, format="e4m3_1x128", rows=6, columns=128)


def _quantize(ops: Resolved, generator: torch.Generator, format: str, rows: int, columns: int, values: str) -> Results:
    x = torch.randn(rows, columns, generator=generator)
    if values == "ties":  # halfway between two codes once scaled by the power of two that the largest value brings
        x = torch.randint(-24, 25, (rows, columns), generator=generator) / 4
    if values == "edges":  # zeros, tiny blocks under the floor, one large value in the last block
        x[0] = 0
        x[1] *= 1e-30
        x[2] *= 1e-6
        x[-1, -1] = 3e4
    return codes(ops.quantize(place(ops, x), FORMATS[format]))


def _quantize_strided(ops: Resolved, generator: torch.Generator, format: str, rows: int, columns: int) -> Results:
    return codes(ops.quantize(normal(ops, generator, columns, rows).T, FORMATS[format]))


def dequantize() -> Cases:
    for name in BLOCK_FORMATS:
        for dtype in ("float32", "bfloat16"):
            yield case("dequantize", _dequantize, "quick", format=name, rows=130, columns=288, dtype=dtype)
        yield case("dequantize", _dequantize, format=name, rows=6, columns=288, dtype="bfloat16")
    yield case("dequantize", _dequantize, format="mxfp4", rows=0, columns=64, dtype="float32")
    yield case("dequantize", _dequantize, format="fp32", rows=4, columns=64, dtype="bfloat16")


def _dequantize(ops: Resolved, generator: torch.Generator, format: str, rows: int, columns: int, dtype: str) -> Results:
    return {"y": ops.dequantize(quantised(ops, generator, format, rows, columns), getattr(torch, dtype))}


def linear() -> Cases:
    for name in WEIGHT_FORMATS:
        for tokens in TOKENS:
            yield case("linear", _linear, format=name, tokens=tokens, inputs=256, outputs=384)
        yield case("linear", _linear, format=name, tokens=3, inputs=160, outputs=200)  # blocks with a ragged edge
    for name in ("bf16", "e4m3_128x128"):
        for how in ("quantised", "strided", "out", "wide"):
            yield case("linear", _linear_other, format=name, how=how)


def _linear(ops: Resolved, generator: torch.Generator, format: str, tokens: int, inputs: int, outputs: int) -> Results:
    w = weight(ops, generator, format, outputs, inputs)
    return {"y": ops.linear(normal(ops, generator, tokens, inputs), w)}


def _linear_other(ops: Resolved, generator: torch.Generator, format: str, how: str) -> Results:
    w = weight(ops, generator, format, 128, 256)
    if how == "quantised":
        return {"y": ops.linear(quantised(ops, generator, "e4m3_1x128", 5, 256), w)}
    if how == "strided":
        return {"y": ops.linear(normal(ops, generator, 256, 5).T, w)}
    if how == "wide":
        return {"y": ops.linear(normal(ops, generator, 5, 256), w, ops.numerics.accumulate)}
    out = nans(ops, 5, 128)
    y = ops.linear(normal(ops, generator, 5, 256), w, out=out)
    return {"y": y, "written": out, "same": yes(ops, y is out)}


def grouped_linear() -> Cases:
    for name in WEIGHT_FORMATS:
        yield case("grouped_linear", _grouped, format=name, rows="3.0.5.1.0", inputs=128, outputs=96)
    yield case("grouped_linear", _grouped, format="mxfp4", rows="0.0.0", inputs=128, outputs=96)
    yield case("grouped_linear", _grouped, "quick", format="mxfp4", rows="0.130.0", inputs=64, outputs=32)
    yield case("grouped_linear", _grouped, format="e4m3_128x128", rows="2.0.1", inputs=160, outputs=200)
    yield case("grouped_linear", _grouped, format="bf16", rows="1.2", inputs=64, outputs=32, out=True)
    yield case("grouped_linear", _grouped, format="mxfp4", rows="1.2", inputs=64, outputs=32, wide=True)


def _grouped(
    ops: Resolved,
    generator: torch.Generator,
    format: str,
    rows: str,
    inputs: int,
    outputs: int,
    out: bool = False,
    wide: bool = False,
) -> Results:
    counts = [int(n) for n in rows.split(".")]
    w = weight(ops, generator, format, len(counts), outputs, inputs)
    x = normal(ops, generator, sum(counts), inputs)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(ops.device)
    if wide:
        return {"y": ops.grouped_linear(x, w, offsets, ops.numerics.accumulate)}
    if not out:
        return {"y": ops.grouped_linear(x, w, offsets)}
    target = nans(ops, sum(counts), outputs)
    y = ops.grouped_linear(x, w, offsets, out=target)
    return {"y": y, "written": target, "same": yes(ops, y is target)}


def block_diagonal_linear() -> Cases:
    for name in WEIGHT_FORMATS:
        yield case("block_diagonal_linear", _diagonal, format=name, tokens=5, groups=3, inputs=128, outputs=128)
    for tokens in (0, 1):
        yield case("block_diagonal_linear", _diagonal, format="bf16", tokens=tokens, groups=2, inputs=64, outputs=48)
    yield case("block_diagonal_linear", _diagonal, format="bf16", tokens=4, groups=2, inputs=64, outputs=48, out=True)


def _diagonal(
    ops: Resolved,
    generator: torch.Generator,
    format: str,
    tokens: int,
    groups: int,
    inputs: int,
    outputs: int,
    out: bool = False,
) -> Results:
    w = weight(ops, generator, format, groups, outputs, inputs)
    x = normal(ops, generator, tokens, groups, inputs)
    if not out:
        return {"y": ops.block_diagonal_linear(x, w)}
    target = nans(ops, tokens, groups, outputs)
    y = ops.block_diagonal_linear(x, w, out=target)
    return {"y": y, "written": target, "same": yes(ops, y is target)}


def embedding() -> Cases:
    for name in PLAIN_FORMATS:
        for tokens in TOKENS:
            yield case("embedding", _embedding, format=name, tokens=tokens, vocabulary=37, width=64)


def _embedding(
    ops: Resolved, generator: torch.Generator, format: str, tokens: int, vocabulary: int, width: int
) -> Results:
    token_ids = torch.randint(vocabulary, (tokens,), generator=generator)
    token_ids[2:4] = vocabulary - 1  # the last row, and one id twice
    return {"y": ops.embedding(token_ids.to(ops.device), weight(ops, generator, format, vocabulary, width))}
