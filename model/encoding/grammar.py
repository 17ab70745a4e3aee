"""The grammar of a completion, as a table of states.

    completion  = [reasoning think_end] content [calls] eos         reasoning: in thinking mode
    calls       = calls_start call+ calls_end
    call        = call_start name call_name_end (parameter+ | no_parameters | nothing) call_end
    parameter   = parameter_start name parameter_name_end (parameter_string | parameter_json) value parameter_end

The words are those of `Protocol`. A state reads text up to one of its markers, which leads to the next state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from dsv4_hal.model.encoding.protocol import Protocol

START = {"thinking": "reasoning", "chat": "content"}  # first state, by thinking mode


@dataclass(frozen=True)
class State:
    """One state of the grammar.

    takes     what its text is: reasoning, content, name, string or json (a value); empty: no text may stand here
    markers   text that ends it, and the state that follows; None: text that must not stand here
    pattern   finds the first marker, and says which by the group that matched, counted from 1; or, at the end of the
              text and without a group, what may become one
    """

    takes: str
    markers: tuple[tuple[str, str | None], ...]
    pattern: re.Pattern[str]

    @property
    def expected(self) -> str:
        """What may end this state, for messages."""
        ends = [repr(marker) for marker, follows in self.markers if follows is not None]
        return " or ".join(ends) or "nothing more"


@cache
def grammar(protocol: Protocol) -> Mapping[str, State]:
    """The states by name; "done" is the last."""
    p = protocol
    tags = (f"<{p.dsml}", f"</{p.dsml}")
    text = (*p.tokens, *tags)  # not in reasoning, content or names
    value = (p.bos, p.eos, f"</{p.dsml}", f"/{p.dsml}")  # a tag that opens may stand in a value
    call_ends = {p.call_end: "calls", p.no_parameters + p.call_end: "calls"}
    return {
        "reasoning": _state("reasoning", {p.think_end: "content"}, text),
        "content": _state("content", {p.eos: "done", p.calls_start: "first call"}, text),
        "first call": _state("", {p.call_start: "call name"}),
        "call name": _state("name", {p.call_name_end: "first parameter"}, text),
        "first parameter": _state("", {p.parameter_start: "parameter name"} | call_ends),
        "parameter name": _state("name", {p.parameter_name_end: "parameter kind"}, text),
        "parameter kind": _state("", {p.parameter_string: "string", p.parameter_json: "json"}),
        "string": _state("string", {p.parameter_end: "parameters"}, value),
        "json": _state("json", {p.parameter_end: "parameters"}, value),
        "parameters": _state("", {p.parameter_start: "parameter name", p.call_end: "calls"}),
        "calls": _state("", {p.call_start: "call name", p.calls_end: "end"}),
        "end": _state("", {p.eos: "done"}),
        "done": _state("", {}),
    }


def _state(takes: str, follows: Mapping[str, str], forbidden: tuple[str, ...] = ()) -> State:
    ends: dict[str, str | None] = dict.fromkeys(forbidden) | dict(follows)
    # the longest first: one that may still come goes before a shorter one with which it begins
    markers = tuple(sorted(ends.items(), key=lambda marker: -len(marker[0])))
    # groups are empty and last: choices that begin with a plain character let the search skip all others
    choices = [f"{re.escape(marker)}()|{_beginning(marker)}" for marker, _ in markers]
    return State(takes, markers, re.compile("|".join(choices) or "(?!)"))


def _beginning(marker: str) -> str:
    """A pattern for any beginning of a marker at the end of the text: ab(?:c(?:d)?)? and the end."""
    pattern = ""
    for character in reversed(marker[:-1]):
        pattern = re.escape(character) + (f"(?:{pattern})?" if pattern else "")
    return rf"{pattern}\Z" if pattern else "(?!)"
