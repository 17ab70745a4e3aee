"""`dsv4-hal init`: a checkpoint with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist, or be empty.")],
    preset: Annotated[str | None, typer.Option(help="v4-tiny, v4-cmp, v4-flash or v4-pro.")] = None,
    config: Annotated[Path | None, typer.Option(help="Directory whose config.json gives the shape.")] = None,
    dtype: Annotated[str, typer.Option(help="fp8-fp4 (as published), bfloat16 or float32.")] = "fp8-fp4",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a checkpoint with random weights, in the official format."""
    from dsv4_hal.model.checkpoint import init_checkpoint
    from dsv4_hal.model.config import load_config
    from dsv4_hal.model.config import preset as named_preset

    if (preset is None) == (config is None):
        raise ValueError("give one of --preset and --config")
    cfg = named_preset(preset) if preset is not None else load_config(config or Path())
    out = out.absolute()
    init_checkpoint(cfg, out, dtype=dtype, seed=seed)
    size = sum(f.stat().st_size for f in out.iterdir())
    typer.echo(f"{out}: random weights (seed {seed}), {dtype}, {size / 1e6:.1f} MB")
