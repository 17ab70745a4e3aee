"""`dsv4-hal info`: what a model weighs, and what a token costs, beside DeepSeek-V3.2."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "k": 10**3, "m": 10**6}
_PREFIXES = {  # least value, scale, unit
    "parameters": ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (0, 1e3, "k")),
    "bytes": ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (0, 1e3, "kB")),
    "flops": ((1e11, 1e12, "T"), (1e9, 1e9, "G"), (0, 1e6, "M")),
}


def info(
    model: Annotated[str, typer.Argument(help="Preset, or directory with a config.json.", metavar="PRESET_OR_DIR")],
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens of context: 4096, 128K and 1M (of 1024), 100k and 1m (of 1000). "
            "Default 1M, or the model's limit where that is less.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with exact numbers.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cache and FLOPs against context: an .svg, .png or .pdf file.")
    ] = None,
) -> None:
    """Parameters, bytes, and the cost of a token at a context, beside DeepSeek-V3.2."""
    from dsv4_hal.model.config import find_config
    from dsv4_hal.model.facts import facts

    cfg, directory = find_config(model)
    limit = cfg.max_position_embeddings
    tokens = min(_SUFFIXES["M"], limit) if context is None else parse_context(context, limit)
    found = facts(cfg, tokens)
    source = f"preset {model}" if directory is None else str(directory / "config.json")
    if plot is not None:
        from dsv4_hal.cli.plot import draw

        draw(plot, model if directory is None else directory.resolve().name, cfg, tokens)
        typer.echo(f"{plot}: written", err=True)
    if as_json:
        typer.echo(json.dumps({"model": model, "source": source, **found}, indent=2))
    else:
        _report(source, found)


def parse_context(text: str, limit: int) -> int:
    """Tokens that `text` stands for: digits, and K or M (1024, 1024²), k or m (1000, 1000²) as vLLM reads them.

    ValueError where it is anything else, less than 1, or more than `limit`.
    """
    match = re.fullmatch("([0-9]{1,18})([KMkm]?)", text)
    tokens = int(match[1]) * _SUFFIXES[match[2]] if match else 0
    if tokens < 1:
        raise ValueError(
            f"context must be tokens, at least 1, such as 4096, 128K (of 1024) or 100k (of 1000), got {text!r}"
        )
    if tokens > limit:
        raise ValueError(f"context {spaced(tokens)} exceeds the model's limit of {spaced(limit)} tokens")
    return tokens


def spaced(count: int) -> str:
    """A whole number with a space between thousands."""
    return f"{count:,}".replace(",", " ")


def amount(value: float, kind: str) -> str:
    """`value` with a prefix: kind is "parameters" (B = 1e9), "bytes" (GB = 1e9) or "flops" (T = 1e12)."""
    scale, unit = next((scale, unit) for least, scale, unit in _PREFIXES[kind] if value >= least)
    return f"{value / scale:.{3 if value / scale < 10 else 2}f} {unit}"


def _report(source: str, found: Mapping[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 80)  # a narrower terminal wraps lines; it must not shorten numbers
    console.print(f"{source}: all figures follow from it; no weights were read", soft_wrap=True)
    for table in (_weights(found), _costs(found)):
        console.print(table)
    console.print(*_notes(found), sep="\n")


def _weights(found: Mapping[str, Any]) -> Table:
    parameters = found["parameters"]
    table = _table("weights", "without MTP", "with MTP")
    table.add_row("parameters", *(amount(parameters[key], "parameters") for key in ("without_mtp", "with_mtp")))
    table.add_row("  activated per token", amount(parameters["activated"], "parameters"))
    table.add_row("  with input embedding too", amount(parameters["activated_with_embedding"], "parameters"))
    table.add_row("tensors of the checkpoint", *map(spaced, found["tensors"].values()))
    table.add_row("bytes of the checkpoint", *(amount(size, "bytes") for size in found["checkpoint_bytes"].values()))
    return table


def _costs(found: Mapping[str, Any]) -> Table:
    table = _table(f"at {spaced(found['context_tokens'])} tokens", "this model", "DeepSeek-V3.2", "V3.2 / this")
    ratios, other = found["ratios_v3_2_over_model"], found["deepseek_v3_2"]
    for key, label, kind, parts in (
        ("kv_cache_bytes", "KV cache", "bytes", ("window", "entries", "index")),
        ("fp8_equivalent_flops_per_token", "FLOPs per token", "flops", ("linear", "indexer", "attention")),
    ):
        table.add_row(label, *(amount(side[key]["total"], kind) for side in (found, other)), f"{ratios[key]:.2f}x")
        for part in parts:
            sides = (side[key].get(part, 0) for side in (found, other))
            table.add_row(f"  {part}", *(amount(value, kind) if value else "-" for value in sides))
    return table


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True, min_width=13 if i else 25)
    return table


def _notes(found: Mapping[str, Any]) -> list[str]:
    rows = ", ".join(
        f"{kind} {row['bytes']} bytes ({'plain bf16' if row['layout'] == 'plain' else row['layout']})"
        for kind, row in found["cache_rows"].items()
    )
    out = [
        "B = 1e9 parameters, GB = 1e9 bytes, T = 1e12 FLOPs; activated: with output head",
        f"cache rows assumed, as published where they fit: {rows}",
        f"the KV cache is {found['kv_cache_share_of_bf16_gqa8']:.2%} of BF16 GQA with 8 heads of 128",
        "FLOPs in FP8 equivalents: FP8 and FP4 weights x1; BF16 and fp32 weights, wo_a and attention x2; "
        "FP4 index scores x1/2; without embedding and output head",
    ]
    limit = found["deepseek_v3_2"]["max_context_tokens"]
    if found["context_tokens"] > limit:
        out.append(f"DeepSeek-V3.2 was made for {spaced(limit)} tokens; beyond, its formulas go on")
    return out
