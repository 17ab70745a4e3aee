"""The texts of the chat protocol, one file of configs/encoding per version, and where they stand in a user's text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

ZERO_WIDTH_SPACE = "\u200b"


@dataclass(frozen=True, eq=False)
class Protocol:
    """One version of the protocol: the literal texts, under the names of its file."""

    version: str
    bos: str
    eos: str
    user: str  # starts a user or developer turn
    assistant: str  # starts an assistant turn
    latest_reminder: str  # starts a reminder
    think_start: str
    think_end: str
    dsml: str  # what makes a tag of a tool call a tag
    tasks: Mapping[str, str]  # token of each task
    calls_start: str
    call_start: str  # the function's name follows
    call_name_end: str
    parameter_start: str  # the parameter's name follows
    parameter_name_end: str
    parameter_string: str  # the value follows, as it is
    parameter_json: str  # the value follows, as JSON
    parameter_end: str
    no_parameters: str  # stands where a call has none
    call_end: str
    calls_end: str
    result_start: str
    result_end: str
    block_separator: str  # between the results and texts of a user turn
    reserved: tuple[str, ...]  # regular expressions: tokens of the tokenizer without a meaning here
    reasoning_effort: Mapping[str, str]  # text before the conversation, by level
    tools: str  # {schemas}: one JSON schema a line
    response_format: str  # {schema}: its JSON

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The tokens that have a meaning in a prompt; a completion's text holds none of them."""
        turns = (self.bos, self.eos, self.user, self.assistant, self.latest_reminder)
        return (*turns, self.think_start, self.think_end, self.dsml, *self.tasks.values())

    @cached_property
    def in_user_text(self) -> re.Pattern[str]:
        """Finds what a user's text must not say."""
        literal = (*self.tokens, self.result_start, self.result_end)
        return re.compile("|".join([*map(re.escape, literal), *self.reserved]))


def protocol_versions() -> list[str]:
    """Versions that `load_protocol` takes, the oldest first."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _files().iterdir() if entry.name.endswith(".yaml"))


@cache
def load_protocol(version: str = "2026-04") -> Protocol:
    """The protocol in configs/encoding/`version`.yaml. ValueError for a version that does not exist."""
    if version not in protocol_versions():
        raise ValueError(f"{version}: no such version of the encoding; there are {', '.join(protocol_versions())}")
    return Protocol(**_frozen(yaml.safe_load(_files().joinpath(f"{version}.yaml").read_text(encoding="utf-8"))))


def find_protocol_token(text: str, protocol: Protocol) -> tuple[str, int] | None:
    """The first token in a user's text that the protocol or the tokenizer reads as more than text, and its offset.

    These are the protocol's tokens, the tags of a tool's result, and whatever looks like another added token of the
    tokenizer. None: the text is only text.
    """
    match = protocol.in_user_text.search(text)
    return (match.group(), match.start()) if match else None


def escape_protocol_tokens(text: str, protocol: Protocol) -> tuple[str, int]:
    """`text` with each token of `find_protocol_token` made text, by a zero width space behind its first character.

    Returns it and how many tokens there were, overlapping ones included.
    """
    every = re.compile(f"(?=(?:{protocol.in_user_text.pattern})).")  # looks ahead: a token may start inside another
    return every.subn(lambda match: match.group() + ZERO_WIDTH_SPACE, text)


def _files() -> Any:
    return files("dsv4_hal") / "configs" / "encoding"


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[type, Any] = {dict: MappingProxyType, list: tuple}
    return {key: kinds.get(type(value), str)(value) for key, value in values.items()}
