"""The reference backend beside HF transformers on the CPU, float32, same weights, run alternately.

    python benchmarks/against_transformers.py [--pairs 9] [--model v4-cmp]

Prints, for prefill (512 tokens, logits of the last) and decode (64 tokens), the median of the paired ratios
dsv4-hal / transformers in tokens per second; above 1 dsv4-hal is faster. Ratios, since a shared machine's speed swings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peer_transformers import hf_model, transformers

import dsv4_hal
from dsv4_hal.model.checkpoint import init_checkpoint
from dsv4_hal.model.config import preset

PROMPT, NEW = 512, 64
Run = Callable[[torch.Tensor], tuple[float, float, torch.Tensor]]


def ours(model: dsv4_hal.model.transformer.Model) -> Run:
    def run(prompt: torch.Tensor) -> tuple[float, float, torch.Tensor]:
        cache = model.new_cache(1, PROMPT + NEW)
        start = time.perf_counter()
        logits = model(prompt, cache, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(NEW):
            logits = model(logits[:, -1:].argmax(-1), cache)
        return middle - start, time.perf_counter() - middle, logits

    return run


def theirs(model: torch.nn.Module) -> Run:
    def run(prompt: torch.Tensor) -> tuple[float, float, torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        start = time.perf_counter()
        logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        middle = time.perf_counter()
        for _ in range(NEW):
            logits = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True).logits
        return middle - start, time.perf_counter() - middle, logits

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--model", default="v4-cmp")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        directory = Path(scratch) / "model"
        init_checkpoint(preset(options.model), directory, dtype="float32")
        model = dsv4_hal.load_model(directory, mode="exact")
        runs = {"dsv4-hal": ours(model), "transformers": theirs(hf_model(model))}
        prompt = torch.randint(2, model.cfg.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        for run in runs.values():  # warm up
            run(prompt)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(options.pairs):
            for name, run in runs.items():
                prefill, decode, _logits = run(prompt)
                times[name].append((prefill, decode))
    report = {
        "model": options.model,
        "machine": f"{_processor()}, {options.threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pairs": options.pairs,
        "load": [round(x, 2) for x in os.getloadavg()],
    }
    for i, (phase, tokens) in enumerate((("prefill", PROMPT), ("decode", NEW))):
        a, b = ([t[i] for t in times[name]] for name in ("dsv4-hal", "transformers"))
        ratios = [y / x for x, y in zip(a, b, strict=True)]
        report[phase] = {
            "median ratio": round(statistics.median(ratios), 2),
            "ratios": [round(r, 2) for r in ratios],
            "dsv4-hal tokens/s": round(tokens / min(a), 1),
            "transformers tokens/s": round(tokens / min(b), 1),
        }
    print(json.dumps(report, indent=1))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
