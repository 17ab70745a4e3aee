"""Peak resident memory of loading a checkpoint, against the bound: stored bytes plus one layer's experts.

    python benchmarks/load_memory.py [--shard-mb 100] [--directory DIR]

Without a directory, a random checkpoint of about 400 MB is made and removed. The load runs in a process of its own;
figures are VmHWM of that process less what it had resident before (Python, torch). The second peak is after every
byte of every weight has been read once, as a forward pass would. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from dsv4_hal.formats.types import Weight
from dsv4_hal.model.checkpoint import init_checkpoint, load_weights
from dsv4_hal.model.config import load_config, preset
from dsv4_hal.model.weights import stored_bytes, weight_table


def measure(directory: Path, shard_bytes: int) -> dict[str, float]:
    """Sizes in bytes and seconds of loading `directory`; a random checkpoint is written there if it is empty."""
    if not (directory / "config.json").exists():
        wide = replace(
            preset("v4-tiny"), vocab_size=8192, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=80
        )
        init_checkpoint(wide, directory, max_shard_bytes=shard_bytes)
    table = weight_table(load_config(directory))
    experts: dict[str, int] = {}
    for name, spec in table.items():
        if ".experts." in name:
            layer = name.split(".ffn.")[0]
            experts[layer] = experts.get(layer, 0) + spec.nbytes
    child = subprocess.run(
        [sys.executable, __file__, "--child", str(directory)], check=True, capture_output=True, text=True
    )
    return {
        "files": len(list(directory.glob("*.safetensors"))),
        "stored": stored_bytes(table),
        "layer": max(experts.values()),
        **json.loads(child.stdout),
    }


def load(directory: Path) -> dict[str, float]:
    """In a process of its own: load, then read every byte."""
    torch.ones(1 << 20).sum().item()  # threads and allocator are there before the count starts
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, start = peak(), time.perf_counter()
    weights = load_weights(directory, load_config(directory))
    seconds, loaded = time.perf_counter() - start, peak()
    for value in weights.values():
        for tensor in (value.data, value.scale) if isinstance(value, Weight) else (value,):
            if tensor is not None:
                tensor.view(torch.uint8).max()
    return {"seconds": seconds, "peak_loaded": loaded - before, "peak_read": peak() - before}


def peak() -> int:
    """Highest resident size of this process, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--shard-mb", type=int, default=100)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(args.child)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args.directory or Path(scratch), args.shard_mb * 1_000_000)
    bound = found["stored"] + found["layer"]
    print(
        f"files {found['files']}, torch {torch.__version__}, {os.cpu_count()} CPUs, loaded in {found['seconds']:.2f} s"
    )
    rows = {
        "stored bytes": found["stored"],
        "one layer's experts": found["layer"],
        "bound": bound,
        "peak, loaded": found["peak_loaded"],
        "peak, every byte read": found["peak_read"],
    }
    for name, nbytes in rows.items():
        print(f"{name:24}{nbytes / 1e6:10.1f} MB")
    if max(found["peak_loaded"], found["peak_read"]) > bound:
        sys.exit("over the bound")


if __name__ == "__main__":
    main()
