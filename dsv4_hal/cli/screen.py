"""Answers on a terminal or in a pipe: reasoning, text and tool calls, as they come."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from rich.markup import escape

from dsv4_hal.cli.common import notes

if TYPE_CHECKING:
    from dsv4_hal.model.chat import Turn
    from dsv4_hal.model.encoding import Delta

DIM, TOOL, PLAIN = "\x1b[2m", "\x1b[36m", "\x1b[0m"

# What a model writes must not steer the terminal: control characters are shown as pictures of themselves.
_PICTURES = (
    {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
)


def visible(text: str) -> str:
    """`text` with its control characters made visible."""
    return text.translate(_PICTURES)


class Screen:
    """Writes the deltas of answers.

    On a terminal all of it goes to standard output, reasoning dimmed. Elsewhere standard output gets text and tool
    calls only, and reasoning goes to standard error.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.colors = self.terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.kind = ""  # of what was written last
        self.call = False  # whether a tool call is open

    def write(self, delta: Delta) -> None:
        self._turn_to(delta.kind if delta.kind != "arguments" else "tool_call")
        out = sys.stderr if delta.kind == "reasoning" and not self.terminal else sys.stdout
        if delta.kind == "tool_call":
            self._put(out, f"{')' + chr(10) if self.call else ''}call {delta.name}(")
            self.call = True
        else:
            self._put(out, delta.text)

    def finish(self) -> None:
        """Close what is open, at the end of an answer."""
        self._turn_to("")
        sys.stdout.flush()

    def _turn_to(self, kind: str) -> None:
        """End the part before: close its brackets, its line and its colour, and start that of `kind`."""
        if kind == self.kind:
            return
        if self.kind:
            out = sys.stderr if self.kind == "reasoning" and not self.terminal else sys.stdout
            self._put(out, (")" if self.call else "") + (PLAIN if self.colors else "") + "\n", raw=True)
        self.kind, self.call = kind, False
        if self.colors and kind in ("reasoning", "tool_call"):
            self._put(sys.stdout, DIM if kind == "reasoning" else TOOL, raw=True)
        elif self.terminal and kind == "reasoning":
            self._put(sys.stdout, "(thinking) ")

    def _put(self, out: TextIO, text: str, raw: bool = False) -> None:
        out.write(text if raw or not out.isatty() else visible(text))
        out.flush()


def tell(turn: Turn, about: str) -> None:
    """How a turn went, on standard error. about: what ran it."""
    answer = turn.answer
    if answer.end == "length":
        notes.print(f"[yellow]cut off after {answer.made} tokens[/]: --max-new-tokens allows no more")
    elif answer.end == "context":
        notes.print(f"[yellow]cut off after {answer.made} tokens[/]: the context is full; --context makes it larger")
    elif answer.end == "interrupted":
        notes.print("[yellow]interrupted[/]")
    elif answer.end != "stop":
        notes.print(f"[yellow]the answer leaves the protocol[/]; what came before is kept. {escape(answer.end)}")
    parts = [f"{turn.computed} prompt tokens", f" ({turn.reused} more reused)" if turn.reused else ""]
    parts += [f" in {turn.reading:.2f} s, {answer.made} new tokens"]
    if answer.made > 1 and turn.writing > 0:
        parts.append(f", {(answer.made - 1) / turn.writing:.1f} tokens/s")
    notes.print(f"[dim]{escape(about)}: {''.join(parts)}[/]")
