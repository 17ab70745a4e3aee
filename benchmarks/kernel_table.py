"""docs/kernels.md: what compiled kernels take, and how fast a device could be at most. Sections, each by its heading:
one for each target, and one for each model and step; a run on some targets compares theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import triton

from dsv4_hal.backends.cuda.checks import SPILLS
from dsv4_hal.backends.cuda.devices import ARCHS, DEVICES

STEPS = ("decode", "prefill", "alone")  # those whose kernels are shown; others differ in how arguments are aligned

_PREAMBLE = """# Kernels

Written by `python benchmarks/kernels.py --write docs/kernels.md` (`--part full`: for more targets); do not edit.

**No figure here is a measurement**; those are in [gpu.md](gpu.md). Kernels were compiled ahead of time by triton
{triton}, through the backend's own host code, for every call that DeepSeek-V4-Flash and -Pro make at full size. What a
kernel takes is what the assembler says; times are bounds that follow from published figures of the devices.

Figures of a kernel are the largest over its variants (constants, dtypes, alignments) in a decode step of 64 sequences,
in a prefill of 4096 tokens, and in what no step calls; those of other steps are checked, and not shown. Shared memory
is in bytes, tensor memory in columns; the heading of a column says how much of it a block may use.

FLOPs and bytes are what an op must compute and move at least: each input read once, each result written once, and
nothing between the parts of a composite. A bound is the larger of two times: FLOPs over the peak rate of the narrowest
format of the device that holds the operands exactly, and bytes over the bandwidth of its memory, as if the model lay
on one device. `count` is how often the step makes the call, over all layers. Calls that only the body of a composite
makes are not listed where the backend has the composite as one.
"""


def page(kernels: Sequence[Any], results: Sequence[Mapping[str, Any]]) -> str:
    sections = _sections(kernels, results)
    return _PREAMBLE.format(triton=triton.__version__) + "".join(f"\n{h}\n\n{body}" for h, body in sections.items())


def differences(text: str, kernels: Sequence[Any], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the sections made from these results that the page does not have so."""
    if f"triton {triton.__version__}" not in " ".join(text.split()):
        return [f"the table was written with another triton than {triton.__version__}"]
    written, wrong = _written(text), []
    for heading, body in _sections(kernels, results).items():
        there = written.get(heading)
        if there is None:
            wrong.append(f"the table has no section {heading!r}")
            continue
        new, old = body.strip().splitlines(), there.strip().splitlines()
        wrong += [f"the table lacks, in {heading!r}: {line}" for line in new if line not in old]
        wrong += [f"the table has, in {heading!r}, and should not: {line}" for line in old if line not in new]
    return wrong


def _written(text: str) -> dict[str, str]:
    parts = re.split(r"^(## .+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _sections(kernels: Sequence[Any], results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    out = {}
    for target in ARCHS:
        for mode in dict.fromkeys(r["task"]["mode"] for r in results):
            found = [k for k in kernels if k.target == target and any(_shown(used, mode) for used in k.used)]
            if found:
                out[f"## {target}, mode {mode}"] = _of_target(target, mode, found)
    for model in dict.fromkeys(r["task"]["model"] for r in results):
        for step in ("decode", "prefill"):
            # what is called is the same for every target; how it is split into kernels may not be
            made = next((r["calls"] for r in results if _makes(r["task"], model, step)), None)
            if made is not None:
                calls = [c for c in made if c["step"] == step and not c["part"]]
                out[f"## Bounds: {model}, {step}"] = _of_step(calls)
    return out


def _makes(task: Mapping[str, Any], model: str, step: str) -> bool:
    return task["model"] == model and task["mode"] == "deployed" and step in task["steps"]


def _shown(used: Sequence[str], mode: str) -> bool:
    """Whether the table of a mode has a kernel for this use of it: (model, mode, step, op)."""
    return used[1] == mode and used[2] in STEPS


def _of_target(target: str, mode: str, kernels: Sequence[Any]) -> str:
    arch, rows = ARCHS[target], []
    for name in dict.fromkeys(k.kernel for k in kernels):
        same = [k for k in kernels if k.kernel == name]
        matrix = sorted({m for k in same for m in k.matrix})
        ops = sorted({used[-1] for k in same for used in k.used if _shown(used, mode)})
        largest = [max(getattr(k, field) for k in same) for field in ("registers", "shared", "tensor", "spilled")]
        rows.append([f"`{name}`", ", ".join(ops), len(same), *largest, ", ".join(matrix)])
    head = ["kernel", "ops", "variants", "registers", f"shared of {arch.shared}", f"tensor of {arch.tensor}"]
    text = _table([*head, "spilled bytes", "matrix instructions"], rows)
    notes = [f"- `{s.kernel}` may spill {s.bytes} bytes: {s.reason}" for s in SPILLS if s.target == target]
    return text + "".join(f"\n{note}" for note in notes) + "\n" * bool(notes)


def _of_step(calls: Sequence[Mapping[str, Any]]) -> str:
    rows, total = [], [0.0] * len(DEVICES)
    for call in calls:
        bounds = [device.bound(call["flops"], call["bytes"]) for device in DEVICES.values()]
        total = [t + call["count"] * b for t, b in zip(total, bounds, strict=True)]
        times = [_micro(bound) for bound in bounds]
        flops = _scaled(sum(call["flops"].values()))
        served = ", ".join(f"`{kernel}`" for kernel in call["kernels"]) or "none"
        rows.append([call["op"], call["shape"], served, call["count"], flops, _scaled(call["bytes"]), *times])
    rows.append(["all calls", "", "", sum(c["count"] for c in calls), "", "", *(_micro(t) for t in total)])
    head = ["op", "on", "kernels", "count", "FLOPs", "bytes", *(f"{name} µs" for name in DEVICES)]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def _scaled(value: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"
