"""Every op of a DeepSeek-V4 step on the GPU of this machine: how long it takes, and what bounds it.

    python benchmarks/gpu.py                        V4-Flash: a decode step of 64 sequences, a prefill of 4096 tokens
    python benchmarks/gpu.py --model v4-pro --steps decode,single --out out/gpu.jsonl
    python benchmarks/gpu.py --read out/gpu.jsonl --write docs/gpu.md

The model is real in every width, and has one layer of each kind; weights and what the cache holds are random. Each
kind of call is timed alone, in a captured graph, with the cache of the device overwritten in front of it, as the
weights of other layers would; the bound is that of docs/kernels.md. The reference then makes the same call, with
torch's ops on the same GPU: it takes its own time, and says how far the results lie apart. Last, whole steps.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import gpu_table
import torch
from kernel_calls import STEPS, filled, kind, label
from kernel_costs import cost
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.cuda.devices import DEVICES, Device
from dsv4_hal.backends.reference import Reference
from dsv4_hal.dispatch import resolve
from dsv4_hal.environment import environment
from dsv4_hal.formats import FORMATS, QTensor, Weight
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.config import ModelConfig, preset
from dsv4_hal.model.decode import Decoder
from dsv4_hal.model.transformer import Model
from dsv4_hal.model.weights import weight_table
from dsv4_hal.numerics import numerics_for
from dsv4_hal.ops import KV, OPS, Ops

REPEATS = 10  # calls in a captured graph
RUNS = 7  # replays of it; the median counts
SPOILED = 256 * 2**20  # bytes written in front of every call: more than any device's cache holds
SLOW = 2.0  # seconds; a reference that takes longer is run once


@dataclass
class Timing:
    """One kind of call. Times in seconds; nan: not measured.

    apart  largest distance of a result from the reference's, as a share of the reference's norm; of whole numbers the
           share that differs; nan where there is nothing but what was written to a cache
    how    "graph"; "eager", launches of the host included, where a call cannot be captured
    """

    model: str
    step: str
    about: str
    op: str
    shape: str
    count: int
    bound: float
    seconds: float
    how: str
    reference: float
    apart: float


def cut(cfg: ModelConfig) -> ModelConfig:
    """One layer of each ratio, the first with experts by token id."""
    ratios = tuple(sorted(set(cfg.layer_ratios) | {0}))
    layers = len(ratios)
    return replace(cfg, num_hidden_layers=layers, compress_ratios=ratios, num_hash_layers=1, num_nextn_predict_layers=0)


def random_weights(cfg: ModelConfig, device: torch.device) -> dict[str, Weight | Tensor]:
    """Of the scale that keeps a row's size, in the formats of the published checkpoints."""
    torch.manual_seed(0)
    made: dict[str, Weight | Tensor] = {}
    for name, spec in weight_table(cfg).items():
        if spec.format == "int64":
            scores = torch.rand(spec.shape[0], cfg.n_routed_experts, device=device)
            made[name] = scores.topk(spec.shape[1]).indices
            continue
        fmt = FORMATS[spec.format]
        if not spec.is_matrix:
            value = torch.randn(spec.shape, device=device) * 0.1 + (1.0 if name.endswith("norm") else 0.0)
            made[name] = value.to(fmt.storage)
            continue
        data = torch.empty(fmt.data_shape(spec.shape), dtype=fmt.storage, device=device)
        scales = fmt.scale_shape(spec.shape)
        scale = None if scales is None else torch.empty(scales, dtype=fmt.scale_dtype, device=device)
        parts = [QTensor(data, scale, fmt)]
        if spec.is_stack:  # expert by expert: a whole stack in float32 takes many times its codes
            parts = [QTensor(data[i], None if scale is None else scale[i], fmt) for i in range(len(data))]
        for part in parts:
            value = torch.randn(spec.shape[-2:], device=device) * spec.shape[-1] ** -0.5
            q = formats.quantize(value, fmt)
            part.data.copy_(q.data)
            if part.scale is not None and q.scale is not None:
                part.scale.copy_(q.scale)
        made[name] = Weight(data, scale, fmt, name, op=spec.read_by)
    return made


def randomly_filled(model: Model, context: Sequence[int], room: int) -> Cache:
    """A cache that holds `context` random tokens of each sequence, with room for as many as `room` more in one step."""
    cache = filled(model, context, room)
    for layer in cache.layers:
        for held in vars(layer).values():
            if isinstance(held, KV):
                count = len(held.data) * held.rows
                for rows in torch.arange(count, device=held.data.device).split(2**16):
                    values = torch.randn(len(rows), held.layout.dim, device=rows.device).to(held.layout.values)
                    formats.store(held.data, held.layout, held.rows, rows, values)
            elif held is not None:
                held.normal_()
    return cache


class Watch:
    """Times an op the first time that a step calls it with such arguments; every call is made as it would be."""

    def __init__(self, model: str, device: Device, ops: Ops, reference: Ops) -> None:
        self.model, self.device, self.ops, self.reference = model, device, ops, reference
        self.step, self.within = "", False
        self.made: dict[Any, Timing] = {}
        self.spoiled = torch.empty(SPOILED, dtype=torch.uint8, device=ops.device)
        self.spoiling = captured(lambda: None, self.spoiled)

    def __call__(self, op: str) -> Callable[..., Any]:
        run, other = getattr(self.ops, op), getattr(self.reference, op)
        signature = inspect.signature(OPS[op].definition)

        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.within or not self.step or op in ("plan", "state_new"):
                return run(*args, **kwargs)
            bound = signature.bind(None, *args, **kwargs)
            bound.apply_defaults()
            inputs = dict(list(bound.arguments.items())[1:])
            key = self.step, op, tuple(kind(value) for value in inputs.values())
            self.within = True
            try:
                if key not in self.made:
                    again = (lambda: run(*args, **kwargs)), (lambda: other(*args, **kwargs))
                    self.made[key] = self._time(op, inputs, *again)
                    print(row(self.made[key]), flush=True)
                self.made[key].count += 1
                return run(*args, **kwargs)
            finally:
                self.within = False

        return call

    def _time(self, op: str, inputs: Mapping[str, Any], run: Callable[[], Any], other: Callable[[], Any]) -> Timing:
        result = run()  # compiles
        spent = cost(op, inputs, result, self.ops.numerics)
        try:
            seconds, how = (captured(run, self.spoiled) - self.spoiling) / REPEATS, "graph"
        except RuntimeError as error:
            print(f"{op} is not captured: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
            seconds, how = eager(run, self.spoiled), "eager"
        try:
            reference = eager(other, self.spoiled)
            distance = apart(result, other())
        except torch.OutOfMemoryError:
            reference = distance = float("nan")
        torch.cuda.empty_cache()
        named = (self.model, self.step, about(self.step), op, label(inputs))
        return Timing(*named, 0, self.device.bound(spent.flops, spent.moved), seconds, how, reference, distance)


def about(step: str) -> str:
    """In words."""
    new, context = STEPS[step].new, STEPS[step].context
    held = "nothing" if not any(context) else f"{min(context)} to {max(context)} tokens"
    return f"step {step}: {sum(new)} tokens of {len(new)} sequences, which hold {held}"


def captured(run: Callable[[], Any], spoiled: Tensor) -> float:
    """Seconds of REPEATS calls in one graph, and of spoiling the device's cache in front of each."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            spoiled.zero_()
            run()
    graph.replay()
    times = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def eager(run: Callable[[], Any], spoiled: Tensor) -> float:
    """Seconds of one call, launched from the host."""
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    slow = time.perf_counter() - start > SLOW
    for _ in range(1 if slow else 5):
        spoiled.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return median(times)


def apart(one: Any, other: Any) -> float:
    """See `Timing.apart`."""
    found = [float("nan")]
    for a, b in zip(values(one), values(other), strict=True):
        if not a.numel():
            continue
        if a.is_floating_point():
            finite = torch.where(b.isfinite(), b.float(), 0)
            gap = torch.where(a == b, 0, a.float() - b.float())
            found.append(float(gap.norm() / finite.norm().clamp(min=1e-30)))
        else:
            found.append(float((a != b).float().mean()))
    measured = [value for value in found if value == value]
    return max(measured, default=float("nan"))


def values(made: Any) -> Iterator[Tensor]:
    if isinstance(made, QTensor):
        yield formats.dequantize(made, torch.float32)
    elif isinstance(made, Tensor):
        yield made
    elif isinstance(made, KV):
        if not made.paged:
            yield made.data
    elif isinstance(made, tuple | list):
        for one in made:
            yield from values(one)


def whole_steps(model: Model, name: str, step: str) -> dict[str, Any]:
    """Seconds of the step, over all layers there are; and of decoding, in a captured graph."""
    new, context = list(STEPS[step].new), list(STEPS[step].context)
    tokens = torch.randint(model.cfg.vocab_size, (sum(new),))
    cache, times = randomly_filled(model, context, max(new) * 4), []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.step(tokens, cache.batch(new), cache)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    found: dict[str, Any] = {"model": name, "step": step, "about": about(step), "layers": len(model.layers)}
    found["eager"] = min(times)
    if set(new) == {1}:
        decoder, times = Decoder(model, randomly_filled(model, context, 64)), []
        decoder(tokens)
        for _ in range(20):
            start = time.perf_counter()
            decoder(tokens)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found["captured"] = median(times)
    return found


def device_here() -> Device:
    """Its row in DEVICES. SystemExit where there is none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found = next((device for known, device in DEVICES.items() if known in name), None)
    if found is None:
        raise SystemExit(f"this machine has {name}; bounds are known for {', '.join(DEVICES)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="v4-flash")
    parser.add_argument("--mode", default="deployed")
    parser.add_argument("--steps", default="decode,prefill", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--commit", default="not given", help="of the sources, for the page")
    parser.add_argument("--out", type=Path, help="results, a line of JSON each")
    parser.add_argument("--read", type=Path, help="results of another run, in place of a run")
    parser.add_argument("--write", type=Path, help="write the page")
    args = parser.parse_args(arguments)
    lines = [json.loads(line) for line in args.read.read_text().splitlines()] if args.read else measured(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if args.write:
        args.write.write_text(gpu_table.page(lines))
    return 0


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Where it ran, then a line for each kind of call and each step; told as they come."""
    device, numerics = device_here(), numerics_for(args.mode)
    cfg = cut(preset(args.model))
    ops, reference = resolve([Cuda(numerics)], vars(cfg)), resolve([Reference(numerics, "cuda")], vars(cfg))
    weights = random_weights(cfg, ops.device)
    model = Model(cfg, ops, weights)
    watch = Watch(args.model, device, ops, reference)
    plain = {op: getattr(ops, op) for op in OPS}
    packages = environment()["packages"]
    where = {"device": torch.cuda.get_device_name(), "mode": args.mode, "commit": args.commit}
    lines: list[dict[str, Any]] = [{**where, **{name: packages[name] for name in ("torch", "triton")}}]
    with torch.inference_mode():
        for op in OPS:
            setattr(ops, op, watch(op))
        for step in args.steps.split(","):
            new, context = STEPS[step].new, STEPS[step].context
            cache = randomly_filled(model, context, max(new))
            tokens = torch.randint(cfg.vocab_size, (sum(new) + STEPS[step].padding,))
            batch = cache.batch(new, padding=STEPS[step].padding)
            watch.step = step
            model.step(tokens, batch, cache)
            watch.step = ""
            del cache
        for op, run in plain.items():
            setattr(ops, op, run)
        lines += [asdict(timing) for timing in watch.made.values()]
        for step in args.steps.split(","):
            lines.append(whole_steps(model, args.model, step))
            print(json.dumps(lines[-1]))
    return lines


def row(timing: Timing) -> str:
    t, us = timing, 1e6
    taken = t.seconds if t.seconds > 0 else float("nan")  # less than the timer tells apart
    return (
        f"{t.step:8} {t.op:20} {t.seconds * us:9.1f} us, bound {t.bound * us:8.1f} ({t.bound / taken:4.0%}); torch "
        f"{t.reference * us:9.1f} ({t.reference / taken:6.1f}x); apart {t.apart:.1e} {t.how}  {t.shape}"
    )


if __name__ == "__main__":
    sys.exit(main())
