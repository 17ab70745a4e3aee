"""The message in a completion: whole, or as its text comes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dsv4_hal.model.encoding.grammar import START, grammar
from dsv4_hal.model.encoding.protocol import load_protocol

_JSON = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each piece


@dataclass(frozen=True, slots=True)
class Delta:
    """What a message grows by.

    kind   "reasoning", "content", "tool_call": a call begins, or "arguments" of a call
    text   of a tool_call: nothing; of arguments: a piece of a string that is JSON if the values of the model are
    index  number of the call
    name   of the function, with tool_call
    """

    kind: str
    text: str = ""
    index: int | None = None
    name: str | None = None


class CompletionError(ValueError):
    """A completion that is not one, or ends early.

    position      offset of what is wrong; at an early end, the length of the text
    line, column  the same, counted from 1
    deltas        what the failing call had read before it
    """

    def __init__(self, message: str, position: int, line: int, column: int, deltas: list[Delta]) -> None:
        super().__init__(message)
        self.position, self.line, self.column, self.deltas = position, line, column, deltas


class CompletionParser:
    """Reads a completion piece by piece. Text is passed on as soon as it cannot be a marker's; any split of the text
    gives the same message, or the same error.

    finished        whether the end-of-sentence token was read
    complete_calls  number of tool calls that were read to their end

    ValueError for an unknown thinking mode or version.
    """

    def __init__(self, thinking_mode: str = "thinking", *, version: str = "2026-04") -> None:
        if not isinstance(thinking_mode, str) or thinking_mode not in START:
            raise ValueError(f"thinking_mode must be one of {', '.join(START)}, got {thinking_mode!r}")
        self._protocol = load_protocol(version)
        self._grammar = grammar(self._protocol)
        self._state = START[thinking_mode]
        self._seen: list[str] = []  # all text, for the place of an error
        self._held = ""  # its end, which may become a marker
        self._offset = 0  # of _held
        self._deltas: list[Delta] = []  # of this call
        self._error: CompletionError | None = None
        self._text: dict[str, list[str]] = {"reasoning": [], "content": [], "name": []}
        self._calls: list[tuple[str, list[str]]] = []
        self._parameters: set[str] = set()  # names, of the last call
        self.complete_calls = 0

    @property
    def finished(self) -> bool:
        return self._state == "done"

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message so far; after an error, what stands before it: arguments of the last call may then
        be incomplete (see complete_calls). Each access joins all text anew."""
        calls = [
            {"type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
            for name, arguments in self._calls
        ]
        text = {kind: "".join(self._text[kind]) for kind in ("content", "reasoning")}
        return {
            "role": "assistant",
            "content": text["content"],
            "reasoning_content": text["reasoning"],
            "tool_calls": calls,
        }

    def feed(self, text: str) -> list[Delta]:
        """What the message grows by with the next text. CompletionError where it is wrong, and for any text after."""
        if self._error is not None:
            raise self._error
        self._deltas = []
        self._seen.append(text)
        buffer, at, start = self._held + text, 0, self._offset
        while True:
            state = self._grammar[self._state]
            match = state.pattern.search(buffer, at)
            end = match.start() if match else len(buffer)
            self._offset = start + at
            if end > at:
                self._take(buffer[at:end] if state.takes else buffer[at:])
            self._offset = start + end
            if match is None or match.lastindex is None:
                self._held = buffer[end:]
                return self._deltas
            marker, follows = state.markers[match.lastindex - 1]
            if follows is None:
                raise self._fail(f"expected {state.expected}, got {marker!r}")
            self._end(marker, follows)
            at = match.end()

    def close(self) -> list[Delta]:
        """Say that no text follows. CompletionError if the completion is not finished; what is held back is then text
        of the message, unless it begins a tag of a tool call."""
        if self._error is not None:
            raise self._error
        self._deltas = []
        state = self._grammar[self._state]
        if self.finished:
            return self._deltas
        if self._held and state.takes and self._protocol.dsml not in self._held:
            self._take(self._held)
        self._offset += len(self._held)
        raise self._fail(f"the text ends where {state.expected} is expected")

    def _take(self, text: str) -> None:
        """Text of this state, which no marker can change any more."""
        kind = self._grammar[self._state].takes
        if kind == "string":
            self._arguments(_JSON(text)[1:-1])
        elif kind == "json":
            self._arguments(text)
        elif kind:
            self._text[kind].append(text)
            if kind != "name":
                self._deltas.append(Delta(kind, text))
        else:
            raise self._fail(f"expected {self._grammar[self._state].expected}, got {self._unexpected(text)!r}")

    def _end(self, marker: str, follows: str) -> None:
        """A state ends with a marker: what stands in the message for it."""
        p, name = self._protocol, "".join(self._text["name"])
        if self._state == "call name":
            if not name:
                raise self._fail("expected the name of a function")
            self._text["name"], self._parameters = [], set()
            self._calls.append((name, []))
            self._deltas.append(Delta("tool_call", index=len(self._calls) - 1, name=name))
            self._arguments("{")
        elif self._state == "parameter name" and name in self._parameters:
            self._offset -= len(name)
            raise self._fail(f"expected a parameter that the call does not have yet, got {name!r}")
        elif self._state == "parameter kind":
            separator = ", " if self._parameters else ""
            quote = '"' if follows == "string" else ""
            self._arguments(f"{separator}{_JSON(name)}: {quote}")
            self._parameters.add(name)
            self._text["name"] = []
        elif self._state == "string":
            self._arguments('"')
        elif marker in (p.call_end, p.no_parameters + p.call_end):
            self._arguments("}")
            self.complete_calls += 1
        self._state = follows

    def _arguments(self, text: str) -> None:
        self._calls[-1][1].append(text)
        self._deltas.append(Delta("arguments", text, len(self._calls) - 1))

    def _unexpected(self, text: str) -> str:
        """`text` up to the character with which it stops being the beginning of a marker."""
        markers = [marker for marker, _ in self._grammar[self._state].markers]
        same = max((_same(text, marker) for marker in markers), default=0)
        return text[: same + 1]

    def _fail(self, what: str) -> CompletionError:
        """The error at this offset."""
        before = "".join(self._seen)[: self._offset]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        excerpt = f" after {before[-30:]!r}" if before else ""
        place = f"offset {len(before)} (line {line}, column {column})"
        self._error = CompletionError(f"{place}: {what}{excerpt}", len(before), line, column, self._deltas)
        return self._error


def parse_completion(text: str, thinking_mode: str = "thinking", *, version: str = "2026-04") -> dict[str, Any]:
    """The text that the model wrote behind a prompt of `encode_messages` -> the assistant's message, with role,
    content, reasoning_content and tool_calls. A task's answer is read with "chat", as it has no reasoning.

    Arguments are a JSON object if the values that the model marked as JSON are: these are not looked into.
    CompletionError, a ValueError with the place, where the text is not a whole completion up to the end-of-sentence
    token and no further. ValueError for an unknown thinking mode or version.
    """
    parser = CompletionParser(thinking_mode, version=version)
    parser.feed(text)
    parser.close()
    return parser.message


def _same(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
