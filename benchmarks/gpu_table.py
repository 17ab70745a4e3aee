"""docs/gpu.md: what every op of a step took on a GPU, from the lines that `gpu.py --out` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PREAMBLE = """# Measured on a GPU

Written by `python benchmarks/gpu.py --write docs/gpu.md`; do not edit. One {device}, torch {torch}, triton {triton},
mode {mode}, sources of commit {commit}. The model has the widths of the preset and one layer of each kind; weights and
what the cache holds are random.

- time: median, in microseconds, of one call in a captured graph, with the device's cache overwritten in front of it
- bound: what [kernels.md](kernels.md) derives from FLOPs, bytes and the device's published figures; share: of the time
- torch: the same call by the reference's torch ops, on the same GPU and in the same run, launched one by one; and how
  many times as long it took
- apart: distance of the results from the reference's, as a share of their norm, the largest over all results (of
  whole numbers, the share that differs); none where a call only writes to a cache: `conform` compares that
- calls: how often the step makes the call
"""
_HEAD = "| op | arguments | calls | time | bound | share | torch | times | apart |"


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """The first line says where it ran; others are timings of ops, or of whole steps."""
    about, rest = lines[0], lines[1:]
    text = [_PREAMBLE.format(**about)]
    for model, step in dict.fromkeys((line["model"], line["step"]) for line in rest):
        mine = [line for line in rest if (line["model"], line["step"]) == (model, step)]
        text.append(f"## {model}, {mine[0]['about']}\n")
        text += [_HEAD, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        text += [_row(line) for line in mine if "op" in line]
        text += ["", *_whole(line for line in mine if "op" not in line), ""]
    return "\n".join(text)


def _row(line: Mapping[str, Any]) -> str:
    time, bound, torch = line["seconds"], line["bound"], line["reference"]
    shown = [_microseconds(time) + (" (eager)" if line["how"] == "eager" else ""), _microseconds(bound)]
    shown += [f"{bound / time:.0%}" if time > 0 else "", _microseconds(torch)]
    shown += [f"{torch / time:.1f}" if time > 0 and torch == torch else ""]
    apart = "" if math.isnan(line["apart"]) else f"{line['apart']:.1e}" if line["apart"] else "0"
    return f"| {line['op']} | {line['shape']} | {line['count']} | {' | '.join(shown)} | {apart} |"


def _microseconds(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds * 1e6:.1f}"


def _whole(lines: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for line in lines:
        told = f"The whole step, {line['layers']} layers and the head: {line['eager'] * 1e3:.1f} ms launched one by one"
        yield told + (f", {line['captured'] * 1e3:.1f} ms as a captured graph." if "captured" in line else ".")
