"""The picture of `dsv4-hal info`: KV cache and FLOPs per token against context. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4_hal.cli.info import amount, spaced
from dsv4_hal.model.config import ModelConfig
from dsv4_hal.model.facts import flops_per_token, kv_bytes, v32_flops_per_token, v32_kv_bytes
from dsv4_hal.model.weights import weight_table

_POINTS = 64
_DOUBLINGS = 10  # how far below the model's limit the axis begins
_BLUE, _VERMILION = "#0072B2", "#D55E00"  # of Okabe and Ito: told apart by colour-blind readers
_METADATA = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}  # the same bytes every time


def draw(path: Path, name: str, cfg: ModelConfig, context: int) -> None:
    """Write the picture of the model called `name`, marked at `context` tokens, to `path`.

    ValueError for a suffix other than .svg, .png and .pdf, or where `path` is there and no regular file; OSError where
    it cannot be written; RuntimeError where matplotlib is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise ValueError(f"{path}: a plot is written as {', '.join(_METADATA)}")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent}: no such directory")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is there and is not a regular file")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"a plot needs matplotlib: pip install matplotlib ({error})") from error

    limit, table = cfg.max_position_embeddings, weight_table(cfg)
    first = min(max(1, limit >> _DOUBLINGS), context)
    contexts = sorted({context, *(round(first * (limit / first) ** (i / _POINTS)) for i in range(_POINTS + 1))})
    panels = (
        ("KV cache of a sequence", "bytes (GB = 1e9)", "bytes", lambda n: kv_bytes(cfg, n), v32_kv_bytes),
        (
            "FLOPs per token",
            "FLOPs in FP8 equivalents (T = 1e12)",
            "flops",
            lambda n: flops_per_token(table, cfg, n),
            v32_flops_per_token,
        ),
    )
    style: dict[Any, Any] = {"svg.hashsalt": "dsv4-hal", "svg.fonttype": "none", "text.parse_math": False}
    with rc_context(style):
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        for axes, (title, unit, kind, ours, theirs) in zip(figure.subplots(1, 2), panels, strict=True):
            curves = [[sum(cost(n).values()) for n in contexts] for cost in (ours, theirs)]
            here, there = (amount(curve[contexts.index(context)], kind) for curve in curves)
            axes.set_title(f"{title}\nat {spaced(context)} tokens: {here}, DeepSeek-V3.2 {there}", fontsize="medium")
            axes.set(xlabel="context (tokens, K = 1024)", ylabel=unit)
            _panel(axes, kind, contexts, curves, contexts.index(context))
        figure.legend(axes.lines[:2], [name, "DeepSeek-V3.2"], loc="outside lower center", ncols=2, frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format=suffix[1:], metadata=_METADATA[suffix], dpi=150)
    path.write_bytes(image.getvalue())


def _panel(axes: Any, kind: str, contexts: list[int], curves: Sequence[Sequence[int]], at: int) -> None:
    """One cost of this model (curves[0]) and of DeepSeek-V3.2 (curves[1]), and their ratio at contexts[at]."""
    from matplotlib.ticker import LogLocator

    for curve, colour, dashes in zip(curves, (_BLUE, _VERMILION), ("-", "--"), strict=True):
        axes.plot(contexts, curve, dashes, color=colour, linewidth=2)
    x, here, there = contexts[at], curves[0][at], curves[1][at]
    axes.vlines(x, here, there, color="0.35", linestyle=":")
    axes.scatter([x, x], [here, there], color=[_BLUE, _VERMILION], zorder=3)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    axes.text(x, (here * there) ** 0.5, f"{there / here:.2f}x", ha="center", va="center", bbox=white)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    wide = max(map(max, curves)) > 1000 * min(map(min, curves))
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value, kind))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    ticks = [n for n in (contexts[-1] >> 2 * i for i in range(16)) if n >= contexts[0]]
    axes.set_xticks(ticks, [_binary(n) for n in ticks])
    axes.margins(x=0.1)
    axes.grid(color="0.9")


def _tick(value: float, kind: str) -> str:
    number, unit = amount(value, kind).split()
    return f"{float(number):g} {unit}"


def _binary(tokens: int) -> str:
    """1048576 -> 1M, 2560 -> 2.5K."""
    scale, letter = next(s for s in ((1 << 20, "M"), (1 << 10, "K"), (1, "")) if tokens >= s[0])
    return f"{tokens / scale:.3g}{letter}"
