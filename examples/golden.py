"""Compare this project with numbers that the published DeepSeek-V4 code computed on a small checkpoint.

    python examples/golden.py tests/data/tiny

In `exact` mode logits must agree; in `deployed` mode every block is run from its recorded input, since a model with
random weights amplifies the last bit of a bf16 value.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import dsv4_hal
from dsv4_hal.batch import Batch
from dsv4_hal.model.step import Step


def exact(directory: Path) -> Table:
    """Logits of prefill, of decode token by token through the cache, and of MTP."""
    want = load_file(directory / "expected_exact.safetensors")
    tokens = load_file(directory / "expected.safetensors")["tokens"]
    model = dsv4_hal.load_model(directory, mode="exact")
    prefill = want["prefill.logits"].shape[1]
    cache = model.new_cache(len(tokens), max_seq_len=512)
    got = {"prefill": model(tokens[:, :prefill], cache)}
    got["decode"] = torch.cat([model(t, cache) for t in tokens[:, prefill:].split(1, dim=1)], 1)
    got["MTP"] = model.mtp_logits(tokens[:, :prefill], tokens[:, 1 : prefill + 1])
    names = {"prefill": "prefill.logits", "decode": "decode.logits", "MTP": "prefill.mtp_logits"}
    table = Table("exact mode", "tokens", "max |logit|", "max error", title="logits against the published code")
    for name, logits in got.items():
        expected = want[names[name]]
        count, largest = f"{logits.shape[0]} x {logits.shape[1]}", f"{expected.abs().max():.2f}"
        table.add_row(name, count, largest, f"{(logits - expected).abs().max():.1e}")
    return table


def deployed(directory: Path) -> Table:
    """Every block from its recorded input, prefill and decode tokens together."""
    want = load_file(directory / "expected.safetensors")
    tokens = want["tokens"]
    model = dsv4_hal.load_model(directory, mode="deployed")
    step = Step(tokens.flatten(), model.plan(Batch.packed([tokens.shape[1]] * len(tokens))))
    table = Table("deployed mode", "ratio", "block", "relative error", "median token", "worst token")
    for i, layer in enumerate(model.layers):
        for part, run in (("attn", layer.attn), ("ffn", layer.ffn)):
            both = (
                torch.cat([want[f"{s}.layers.{i}.{part}.{end}"] for s in ("prefill", "decode")], 1)
                for end in ("in", "out")
            )
            given, expected = (t.flatten(0, 1) for t in both)
            total, median, worst = errors(run(given, step), expected)
            table.add_row(
                f"layer {i}", str(model.cfg.compress_ratios[i]), part, f"{total:.1e}", f"{median:.1e}", f"{worst:.1e}"
            )
    return table


def errors(got: Tensor, want: Tensor) -> tuple[float, float, float]:
    """Relative Frobenius error: of all tokens, of the median token, of the worst."""
    difference, scale = (got - want).float(), want.float()
    token = difference.norm(dim=-1) / scale.norm(dim=-1)
    return float(difference.norm() / scale.norm()), float(token.median()), float(token.max())


if __name__ == "__main__":
    with torch.inference_mode():
        for build in (exact, deployed):
            Console().print(build(Path(sys.argv[1])))
