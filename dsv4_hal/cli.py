"""The command line: `dsv4-hal VERB`. Each verb is a typed function; the work is done elsewhere.

Exit codes: 0 done, 2 usage or bad input, 3 backend unavailable, 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import dsv4_hal

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="DeepSeek-V4 on any backend.", pretty_exceptions_enable=False
)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"dsv4-hal {dsv4_hal.__version__}")
        raise typer.Exit


@app.command()
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


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="Checkpoint in the official format.", metavar="DIR")],
    prompt: Annotated[str, typer.Option(help="Text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0, max=2**63 - 1)] = 0,
    backend: Annotated[str, typer.Option(help="Registered backend.")] = "reference",
    mode: Annotated[str, typer.Option(help="deployed (published numerics) or exact (float32).")] = "deployed",
    device: Annotated[str | None, typer.Option(help="Torch device; default the backend's.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse ops of another backend.")] = False,
    shared_expert_clamp: Annotated[bool, typer.Option(help="swiglu_limit also in the shared expert.")] = True,
) -> None:
    """Continue a text. The text goes to standard output, everything else to standard error."""
    from dsv4_hal.model.checkpoint import weights_are_random
    from dsv4_hal.model.config import load_config
    from dsv4_hal.model.generate import check_sampling
    from dsv4_hal.model.generate import generate as new_tokens
    from dsv4_hal.model.tokenizer import TextStream, encode, load_tokenizer

    if sys.stdin is None or sys.stdout is None:
        raise ValueError("standard input and standard output must be open")
    check_sampling(temperature, top_p)  # whatever can be wrong is found before the weights are read
    cfg = load_config(directory)
    tokenizer = load_tokenizer(directory, cfg.vocab_size)
    tokens = encode(tokenizer, sys.stdin.read() if prompt == "-" else prompt, cfg.bos_token_id)
    with _loading() as progress:
        model = dsv4_hal.load_model(
            directory,
            backend,
            mode,
            device=device,
            strict=strict,
            shared_expert_clamp=shared_expert_clamp,
            progress=progress,
        )
    if weights_are_random(directory):
        notes.print("[yellow]The weights are random: expect noise, not language.[/]")
    stream = TextStream(tokenizer)
    made, first, interrupted, start = 0, 0.0, False, time.perf_counter()
    try:
        for token in new_tokens(
            model,
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop={cfg.eos_token_id},
        ):
            made += 1
            first = first or time.perf_counter()
            sys.stdout.write(stream.push(token))
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
        notes.print("\n[yellow]interrupted[/]")
    end = time.perf_counter()
    sys.stdout.write(stream.rest() + "\n")
    notes.print(_speed(len(tokens), made, (first or end) - start, end - (first or end), backend, mode))
    if interrupted:
        raise typer.Exit(130)


def _speed(prompt: int, made: int, before: float, after: float, backend: str, mode: str) -> str:
    out = f"{backend}, {mode}: {prompt} prompt tokens in {before:.2f} s ({prompt / before:.1f} tokens/s)"
    if made > 1 and after > 0:
        out += f", {made} new tokens, {(made - 1) / after:.1f} tokens/s"
    return out


class _loading:
    """A progress bar on standard error while weights are loaded, where there is a terminal to see it."""

    def __enter__(self):  # type: ignore[no-untyped-def]
        self.bar = Progress(
            TextColumn("loading"),
            BarColumn(),
            DownloadColumn(),
            console=notes,
            transient=True,
            disable=not notes.is_terminal,
        )
        self.bar.start()
        self.task = self.bar.add_task("loading", total=None)
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def main() -> None:
    """Run a verb; errors of input and environment become one line and an exit code."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        app()
    except dsv4_hal.BackendError as error:
        _fail(error, 3)
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: Exception, code: int) -> None:
    notes.print("[red]error:[/] " + escape(str(error) or type(error).__name__))
    sys.exit(code)
