"""`dsv4-hal generate`: continue a text, or answer a conversation once."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4_hal.cli import common
from dsv4_hal.cli.common import notes
from dsv4_hal.config import Loaded

Temperature = Annotated[float | None, typer.Option(help="0 is greedy, the default.")]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability; default 1.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the draws; default 0.")]
Think = Annotated[str | None, typer.Option(help="none, high (the default) or max.")]
ProtocolTokens = Annotated[
    str | None, typer.Option(help="Protocol tokens inside a message: refuse (the default), or escape them.")
]
Clamp = Annotated[
    bool | None,
    typer.Option("--shared-expert-clamp/--no-shared-expert-clamp", help="swiglu_limit also in the shared expert."),
]


def generate(
    directory: Annotated[str | None, typer.Argument(help="Checkpoint in the official format.", metavar="DIR")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; '-' reads standard input.")] = None,
    messages: Annotated[
        str | None,
        typer.Option(help="JSON file with a conversation to answer; '-' reads standard input.", metavar="FILE"),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="At most so many new tokens; default 64, of an answer 1024.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    think: Think = None,
    protocol_tokens: ProtocolTokens = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --messages: print the answer as a message, and how it ended.")
    ] = False,
    config: common.Config = None,
    sets: common.Set = None,
    backend: common.Backend = None,
    mode: common.Mode = None,
    device: common.Device = None,
    strict: common.Strict = None,
    shared_expert_clamp: Clamp = None,
    show_config: common.ShowConfig = False,
) -> None:
    """Continue a text, or answer a conversation. The text goes to standard output, notes to standard error.

    --messages takes a list of messages in the OpenAI form, or an object with `messages` and `tools`. What the model
    thinks goes to standard error, on a terminal to standard output.
    """
    if (prompt is None) == (messages is None):
        raise ValueError("give one of --prompt and --messages")
    for flag, given in (("--think", think), ("--protocol-tokens", protocol_tokens), ("--json", as_json or None)):
        if given is not None and messages is None:
            raise ValueError(f"{flag} goes with --messages")
    loaded = common.configure(
        config,
        sets,
        show_config,
        DIR=("model", directory),
        max_new_tokens=("generate.max_new_tokens" if messages is None else "chat.max_new_tokens", max_new_tokens),
        temperature=("generate.temperature", temperature),
        top_p=("generate.top_p", top_p),
        seed=("generate.seed", seed),
        think=("chat.think", think),
        protocol_tokens=("chat.protocol_tokens", protocol_tokens),
        backend=("backend", backend),
        mode=("mode", mode),
        device=("device", device),
        strict=("strict", strict),
        shared_expert_clamp=("shared_expert_clamp", shared_expert_clamp),
    )
    if "-" in (prompt, messages) and sys.stdin is None:
        raise ValueError("standard input is closed")
    if prompt is not None:
        _continue(loaded, sys.stdin.read() if prompt == "-" else prompt)
    else:
        _answer(loaded, *read_messages(str(messages)), as_json)


def _continue(loaded: Loaded, prompt: str) -> None:
    from dsv4_hal.model.config import load_config
    from dsv4_hal.model.generate import generate as new_tokens
    from dsv4_hal.model.tokenizer import TextStream, encode, load_tokenizer

    directory, settings = common.directory_of(loaded.run), loaded.run.generate
    cfg = load_config(directory)
    tokenizer = load_tokenizer(directory, cfg.vocab_size)
    tokens = encode(tokenizer, prompt, cfg.bos_token_id)
    model = common.load(loaded)
    stream = TextStream(tokenizer)
    made, first, interrupted, start = 0, 0.0, False, time.perf_counter()
    try:
        for token in new_tokens(
            model,
            tokens,
            settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
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
    notes.print(_speed(len(tokens), made, (first or end) - start, end - (first or end), common.title(model)))
    if interrupted:
        raise typer.Exit(130)


def _answer(loaded: Loaded, messages: list[Any], tools: list[Any], as_json: bool) -> None:
    from dsv4_hal.cli.screen import Screen, tell
    from dsv4_hal.model.chat import Answer, Turn, guarded, render, with_tools
    from dsv4_hal.model.config import load_config
    from dsv4_hal.model.generate import generate as new_tokens
    from dsv4_hal.model.tokenizer import load_tokenizer, spelled, tokenize

    run, settings = loaded.run, loaded.run.generate
    directory = common.directory_of(run)
    if run.chat.system is not None:
        if messages[0].get("role") == "system":
            raise ValueError("the conversation has a system message, and so has the run (chat.system): leave one out")
        messages = [{"role": "system", "content": run.chat.system}, *messages]
    tokenizer = load_tokenizer(directory, load_config(directory).vocab_size)
    answer = Answer(run.chat.think, tokenizer)
    escape = run.chat.protocol_tokens == "escape"
    safe = [guarded(m, escape, f"messages[{i}]") for i, m in enumerate(with_tools(messages, tools))]
    prompt = tokenize(tokenizer, render(safe, run.chat.think))
    model = common.load(loaded)
    tokens = new_tokens(
        model,
        prompt,
        run.chat.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    screen, start, first = Screen(), time.perf_counter(), 0.0
    with contextlib.suppress(KeyboardInterrupt):
        for delta in answer.read(spelled(tokenizer, tokens)):
            first = first or time.perf_counter()
            if not as_json:
                screen.write(delta)
    screen.finish()
    if as_json:
        typer.echo(json.dumps({"message": answer.message, "end": answer.end}, ensure_ascii=False, indent=2))
    end = time.perf_counter()
    first = first or end
    tell(Turn(answer, 0, len(prompt), first - start, end - first), common.title(model))
    if answer.end == "interrupted":
        raise typer.Exit(130)


def read_tools(file: Path) -> list[Any]:
    """Tools in the OpenAI form, out of a JSON file: a list, or an object with `tools`."""
    found = _json(str(file))
    tools = found.get("tools") if isinstance(found, dict) else found
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{file}: must be a list of tools, or an object with tools")
    return tools


def read_messages(file: str) -> tuple[list[Any], list[Any]]:
    """Messages and tools out of a JSON file, or of standard input. ValueError names the file and what is wrong."""
    name = "standard input" if file == "-" else file
    found = _json(file)
    if isinstance(found, list):
        found = {"messages": found}
    if not isinstance(found, dict) or "messages" not in found:
        raise ValueError(f"{name}: must be a list of messages, or an object with messages and tools")
    unknown = sorted(found.keys() - {"messages", "tools"})
    if unknown:
        raise ValueError(f"{name}: unknown key {unknown[0]}; an object has messages and tools")
    messages, tools = found["messages"], found.get("tools", [])
    for key, value in (("messages", messages), ("tools", tools)):
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ValueError(f"{name}: {key} must be a list of objects")
    if not messages:
        raise ValueError(f"{name}: no messages")
    return messages, tools


def _json(file: str) -> Any:
    """The JSON in a file, or ("-") in standard input. ValueError names the file and what is wrong."""
    from dsv4_hal.model.config import no_duplicates

    name = "standard input" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=no_duplicates)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be read as JSON: {error}") from error


def _speed(prompt: int, made: int, before: float, after: float, about: str) -> str:
    out = f"{about}: {prompt} prompt tokens in {before:.2f} s ({prompt / max(before, 1e-9):.1f} tokens/s)"
    if made > 1 and after > 0:
        out += f", {made} new tokens, {(made - 1) / after:.1f} tokens/s"
    return out
