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
    differentiated,
    drawn,
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
        yield case("quantize", _quantize, format=name, rows=6, columns=288, values="edges")
        yield case("quantize", _quantize, "quick", format=name, rows=128, columns=256, values="normal")  # whole blocks
        yield case("quantize", _quantize, "quick", format=name, rows=5, columns=40, values="normal")  # less than one
        yield case("quantize", _quantize, format=name, rows=0, columns=64, values="normal")
        yield case("quantize", _quantize_strided, "quick", format=name, rows=6, columns=128)
        yield case("quantize", _quantize, "quick", format=name, rows=6, columns=96, values="ties", strides="row")
        yield case("quantize", _quantize, "full", format=name, rows=64, columns=7168, values="edges")
    yield case("quantize", _quantize, format="e4m3_1x128", rows=6, columns=128, values="ties")
    yield case("quantize", _quantize, format="mxfp4", rows=6, columns=128, values="ties")


def _quantize(ops: Resolved, generator: torch.Generator, format: str, rows: int, columns: int, values: str) -> Results:
    x = drawn(generator, (rows, columns))
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
        yield case("dequantize", _dequantize, "quick", format=name, rows=128, columns=256, dtype="float32")
        yield case("dequantize", _dequantize, "full", format=name, rows=64, columns=7168, dtype="bfloat16")
    yield case("dequantize", _dequantize, format="mxfp4", rows=0, columns=64, dtype="float32")
    yield case("dequantize", _dequantize, format="fp32", rows=4, columns=64, dtype="bfloat16")


def _dequantize(ops: Resolved, generator: torch.Generator, format: str, rows: int, columns: int, dtype: str) -> Results:
    return {"y": ops.dequantize(quantised(ops, generator, format, rows, columns), getattr(torch, dtype))}


# Matrices of V4-Flash and V4-Pro, [inputs, outputs] and the format they are stored in. "share": of a device of eight.
MATRICES = (
    ("e4m3_128x128", 4096, 1024),  # wq_a
    ("e4m3_128x128", 7168, 1536),
    ("e4m3_128x128", 1024, 32768),  # wq_b
    ("e4m3_128x128", 1536, 8192),  # a share; and, of the indexer, all of it
    ("e4m3_128x128", 4096, 512),  # wkv
    ("e4m3_128x128", 7168, 512),
    ("e4m3_128x128", 8192, 4096),  # wo_b
    ("e4m3_128x128", 2048, 7168),  # a share
    ("bf16", 4096, 64),  # the indexer's head weights
    ("bf16", 7168, 64),
    ("bf16", 4096, 256),  # router
    ("bf16", 7168, 384),
    ("bf16", 7168, 1024),  # compressor
    ("bf16", 4096, 16160),  # output head, a share
    ("mxfp4", 4096, 4096),  # an expert
    ("mxfp4", 2048, 4096),
    ("mxfp4", 7168, 6144),
    ("mxfp4", 3072, 7168),
)


def linear() -> Cases:
    for name in WEIGHT_FORMATS:
        few = "tiny" if name in ("bf16", "e4m3_128x128", "mxfp4") else "quick"
        for tokens in (0, 1):
            yield case("linear", _linear, few, format=name, tokens=tokens, inputs=256, outputs=384)
        yield case("linear", _linear, format=name, tokens=5, inputs=256, outputs=384)
        # blocks with a ragged edge
        yield differentiated(case("linear", _linear, format=name, tokens=3, inputs=160, outputs=200))
        for tokens in (64, 128, 129):
            yield case("linear", _linear, "quick", format=name, tokens=tokens, inputs=128, outputs=130)
        yield case("linear", _linear, few, format=name, tokens=5, inputs=128, outputs=96, strides="row")
        yield case("linear", _linear, "full", format=name, tokens=17, inputs=4096, outputs=1024)
    yield case("linear", _linear, "quick", format="e4m3_128x128", tokens=4, inputs=4096, outputs=512)
    for name, inputs, outputs in MATRICES:
        yield case("linear", _linear, "full", format=name, tokens=5, inputs=inputs, outputs=outputs)
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
        yield differentiated(case("grouped_linear", _grouped, format=name, rows="3.0.5.1.0", inputs=128, outputs=96))
        yield case("grouped_linear", _grouped, "quick", format=name, rows="0.128.1.127", inputs=64, outputs=34)
    yield case("grouped_linear", _grouped, format="mxfp4", rows="0.0.0", inputs=128, outputs=96)
    yield case("grouped_linear", _grouped, "quick", format="mxfp4", rows="0.130.0", inputs=64, outputs=32)
    yield case("grouped_linear", _grouped, format="e4m3_128x128", rows="2.0.1", inputs=160, outputs=200)
    yield case("grouped_linear", _grouped, format="bf16", rows="1.2", inputs=64, outputs=32, out=True)
    yield case("grouped_linear", _grouped, format="mxfp4", rows="1.2", inputs=64, outputs=32, wide=True)
    for strides in ("one", "row"):
        yield case("grouped_linear", _grouped, format="mxfp4", rows="1.2", inputs=64, outputs=32, strides=strides)
    for name, rows, inputs, outputs in (
        ("mxfp4", "5.0.12", 4096, 4096),
        ("mxfp4", "5.0.12", 2048, 4096),
        ("e4m3_128x128_fp32", "5.0.12", 2048, 4096),
        ("mxfp4", "3.1", 7168, 6144),
        ("mxfp4", "3.1", 3072, 7168),
        ("mxfp4", "64.0.1.31.0.32.127.129", 512, 512),
    ):
        yield case("grouped_linear", _grouped, "full", format=name, rows=rows, inputs=inputs, outputs=outputs)


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
        yield differentiated(
            case("block_diagonal_linear", _diagonal, format=name, tokens=5, groups=3, inputs=128, outputs=128)
        )
    for tokens in (0, 1):
        yield case("block_diagonal_linear", _diagonal, format="bf16", tokens=tokens, groups=2, inputs=64, outputs=48)
    for tokens in (64, 128, 129):
        yield case(
            "block_diagonal_linear", _diagonal, "quick", format="bf16", tokens=tokens, groups=2, inputs=64, outputs=48
        )
    yield case("block_diagonal_linear", _diagonal, format="bf16", tokens=4, groups=2, inputs=64, outputs=48, out=True)
    for strides in ("one", "row"):
        yield case(
            "block_diagonal_linear",
            _diagonal,
            format="bf16",
            tokens=4,
            groups=2,
            inputs=64,
            outputs=48,
            strides=strides,
        )
    for name, groups in (("bf16", 8), ("e4m3_128x128", 8), ("e4m3_128x128", 16)):
        yield case(
            "block_diagonal_linear", _diagonal, "full", format=name, tokens=6, groups=groups, inputs=4096, outputs=1024
        )


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
        yield case("embedding", _embedding, "quick", format=name, tokens=128, vocabulary=37, width=64)
        yield differentiated(case("embedding", _embedding, format=name, tokens=8, vocabulary=5, width=24))  # ids repeat
        for width in (4096, 7168):
            yield case("embedding", _embedding, "full", format=name, tokens=64, vocabulary=1000, width=width)


def _embedding(
    ops: Resolved, generator: torch.Generator, format: str, tokens: int, vocabulary: int, width: int
) -> Results:
    token_ids = torch.randint(vocabulary, (tokens,), generator=generator)
    token_ids[2:4] = vocabulary - 1  # the last row, and one id twice
    return {"y": ops.embedding(token_ids.to(ops.device), weight(ops, generator, format, vocabulary, width))}
