"""`dsv4-hal chat`: a conversation, typed or piped."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dsv4_hal.cli import common
from dsv4_hal.cli.common import notes
from dsv4_hal.cli.generate import Clamp, ProtocolTokens, Seed, Temperature, Think, TopP, read_tools

if TYPE_CHECKING:
    from dsv4_hal.cli.screen import Screen
    from dsv4_hal.model.chat import Conversation, Message
    from dsv4_hal.model.generate import Sampling

HELP = """\
/clear                  forget the conversation
/think none|high|max    answer at once, think first, or think as hard as it can
/history                show the conversation
/help                   this
/exit                   leave; so does Ctrl-D
Ctrl-C stops an answer; what it said so far stays. Twice, it breaks off at once.
A line that starts with a space is sent, whatever follows."""


def chat(
    directory: Annotated[str | None, typer.Argument(help="Checkpoint in the official format.", metavar="DIR")] = None,
    think: Think = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file with tools, in the OpenAI form.", metavar="FILE")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens the conversation may hold; default 8192.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; default 1024 tokens.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    protocol_tokens: ProtocolTokens = None,
    config: common.Config = None,
    sets: common.Set = None,
    backend: common.Backend = None,
    mode: common.Mode = None,
    device: common.Device = None,
    strict: common.Strict = None,
    shared_expert_clamp: Clamp = None,
    show_config: common.ShowConfig = False,
) -> None:
    """Talk with a model. On a terminal, type; in a pipe, each line is a message or a command (/help).

    A later turn computes only what is new. Answers go to standard output, notes to standard error.
    """
    loaded = common.configure(
        config,
        sets,
        show_config,
        DIR=("model", directory),
        think=("chat.think", think),
        system=("chat.system", system),
        context=("chat.context", context),
        max_new_tokens=("chat.max_new_tokens", max_new_tokens),
        temperature=("generate.temperature", temperature),
        top_p=("generate.top_p", top_p),
        seed=("generate.seed", seed),
        protocol_tokens=("chat.protocol_tokens", protocol_tokens),
        backend=("backend", backend),
        mode=("mode", mode),
        device=("device", device),
        strict=("strict", strict),
        shared_expert_clamp=("shared_expert_clamp", shared_expert_clamp),
    )
    run = loaded.run
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    from dsv4_hal.cli.screen import Screen
    from dsv4_hal.model.chat import Conversation, with_tools
    from dsv4_hal.model.config import load_config
    from dsv4_hal.model.generate import Sampling
    from dsv4_hal.model.tokenizer import load_tokenizer

    path = common.directory_of(run)
    tokenizer = load_tokenizer(path, load_config(path).vocab_size)
    opening = [] if run.chat.system is None else [{"role": "system", "content": run.chat.system}]
    opening = with_tools(opening, [] if tools is None else read_tools(tools))
    talk = Conversation(
        common.load(loaded),
        tokenizer,
        run.chat.context,
        think=run.chat.think,
        opening=opening,
        escape=run.chat.protocol_tokens == "escape",
    )
    sampling = Sampling(run.generate.temperature, run.generate.top_p, run.generate.seed)
    Session(talk, Screen(), run.chat.max_new_tokens, sampling).hold()


class Session:
    """A person, or a pipe, and a conversation."""

    def __init__(self, talk: Conversation, screen: Screen, longest: int, sampling: Sampling) -> None:
        self.talk, self.screen, self.longest, self.sampling = talk, screen, longest, sampling
        self.typed = sys.stdin.isatty()
        self.asking = self.stop = False  # whether a line is being typed; whether Ctrl-C came since then
        if self.typed:
            signal.signal(signal.SIGINT, self._ctrl_c)
            with contextlib.suppress(ImportError):
                import readline  # input() then edits lines and recalls earlier ones

                readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message

    def hold(self) -> None:
        """Until the end of input or /exit. In a pipe the first error ends it."""
        if self.typed:
            prompts = self.talk.prompts
            size = f"{prompts.context} tokens of context take {prompts.cache.nbytes / 1e6:.1f} MB"
            notes.print(f"[dim]{escape(common.title(prompts.model))}; {size}. /help lists commands.[/]")
        while (line := self._ask("> ")) is not None:
            if line.startswith("/"):
                if not self._command(line.split()):
                    return
            elif line.strip():
                self._turn([{"role": "user", "content": line.removeprefix(" ")}])

    def _ctrl_c(self, *_: object) -> None:
        """Once, in an answer: the step that is being computed ends, and stays in the cache. Twice, or in a line that is
        being typed: KeyboardInterrupt."""
        if self.asking or self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def _ask(self, prompt: str) -> str | None:
        """A line without its end; None at the end of input. Ctrl-C starts the line anew."""
        while True:
            self.stop = False
            try:
                self.asking = self.typed
                if self.typed and self.screen.terminal:
                    return input(prompt)
                if self.typed:
                    notes.print(escape(prompt), end="")
                line = sys.stdin.readline()
                return line.rstrip("\r\n") if line else None
            except EOFError:
                notes.print()
                return None
            except KeyboardInterrupt:
                self.asking = False
                if not self.typed:
                    raise
                notes.print("\n[dim]/exit or Ctrl-D leaves[/]")
            finally:
                self.asking = False

    def _turn(self, messages: list[Message]) -> None:
        """One answer, and as many more as it takes to give it the results of the tools it calls."""
        while messages:
            if not self._answer(messages):
                return
            messages = self._results(self.talk.messages[-1].get("tool_calls") or [])

    def _answer(self, messages: list[Message]) -> bool:
        """Whether the answer came to an end by itself."""
        self.talk.turn = None
        try:
            with contextlib.closing(self.talk.say(messages, self.longest, self.sampling)) as deltas:
                for delta in deltas:
                    self.screen.write(delta)
                    if self.stop:
                        break
        except KeyboardInterrupt:
            self.stop = True
        except ValueError as error:
            if not self.typed:
                raise
            notes.print(f"[red]not sent:[/] {escape(str(error))}")
            return False
        self.screen.finish()
        self._tell()
        if self.stop and not self.typed:
            raise KeyboardInterrupt
        return self.talk.turn is not None and self.talk.turn.answer.end == "stop"

    def _tell(self) -> None:
        from dsv4_hal.cli.screen import tell

        if self.talk.turn is None:
            notes.print("[yellow]interrupted[/] before the answer began; your message is not part of the conversation")
        else:
            tell(self.talk.turn, common.title(self.talk.prompts.model))

    def _results(self, calls: list[dict[str, Any]]) -> list[Message]:
        """What the tools returned, asked for one by one; none where one is not given."""
        from dsv4_hal.cli.screen import visible

        results: list[Message] = []
        for call in calls:
            line = self._ask(visible(f"result of {call['function']['name']} (empty: none)> "))
            if not line:
                notes.print("[dim]no result: the tools are not answered[/]")
                return []
            results.append({"role": "tool", "tool_call_id": call["id"], "content": line})
        return results

    def _command(self, words: list[str]) -> bool:
        """Run a command; whether to go on."""
        match words:
            case ["/exit" | "/quit"]:
                return False
            case ["/clear"]:
                self.talk.clear()
                notes.print("[dim]cleared[/]")
            case ["/think", ("none" | "high" | "max") as level]:
                self.talk.think = level
                notes.print(f"[dim]think: {level}[/]")
            case ["/think"]:
                notes.print(f"think: {self.talk.think}; /think none|high|max changes it")
            case ["/history"]:
                for message in self.talk.messages:
                    _show(message, notes.print)
                if not self.talk.messages:
                    notes.print("[dim]nothing yet[/]")
            case ["/help"]:
                notes.print(HELP)
            case _ if not self.typed:
                raise ValueError(f"no such command: {' '.join(words)}; a line that starts with a space is a message")
            case _:
                notes.print(f"[yellow]no such command:[/] {escape(' '.join(words))}; /help lists them")
        return True


def _show(message: Message, write: Callable[[str], Any]) -> None:
    from dsv4_hal.cli.screen import visible

    for key, value in message.items():
        if key != "role" and value:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            write(f"[bold]{message['role']}[/] [dim]{key}[/] {escape(visible(text))}")
