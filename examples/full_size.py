"""DeepSeek-V4 at full size on any machine: what it takes and what it calls, without weights or arithmetic.

    python examples/full_size.py v4-flash

The `null` backend computes shapes: a prefill of 2,048 tokens and a decode step run in a second.
"""

from __future__ import annotations

import sys
import time

import torch
from rich.console import Console
from rich.table import Table

import dsv4_hal
from dsv4_hal.ops import OPS

SEQUENCES, CONTEXT, PROMPT = 2, 1 << 16, 2048


def main(preset: str) -> None:
    start = time.perf_counter()
    model = dsv4_hal.load_model(preset, backend="null")
    weights = sum(weight.nbytes for weight in model.weights.values())
    cache = model.new_cache(SEQUENCES, CONTEXT, max_chunk=PROMPT)
    calls = model.ops.count_calls()
    model(torch.zeros(SEQUENCES, PROMPT, dtype=torch.int64), cache, logits_to_keep=1)
    prefill = calls.copy()
    calls.clear()
    model(torch.zeros(SEQUENCES, 1, dtype=torch.int64), cache)
    table = Table(
        "op", "family", "prefill", "decode", title=f"{preset}: calls of each op, those by composites included"
    )
    for op in OPS:
        if prefill[op] or calls[op]:
            table.add_row(op, OPS[op].family, str(prefill[op]), str(calls[op]))
    console = Console()
    console.print(table)
    kinds = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in cache.breakdown().items())
    console.print(f"weights {weights / 1e9:.2f} GB")
    console.print(f"cache of {SEQUENCES} sequences of {CONTEXT} tokens: {cache.nbytes / 1e9:.2f} GB ({kinds})")
    console.print(f"took {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
