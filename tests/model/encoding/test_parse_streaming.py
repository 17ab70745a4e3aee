"""A completion in pieces: every split reads as the whole text does, broken texts included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_hal.model.encoding import CompletionError, CompletionParser, Delta, load_protocol
from dsv4_hal.model.encoding.grammar import grammar

DATA = Path(__file__).parents[2] / "data" / "encoding"
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))["parse"]
P = load_protocol()


def merged(deltas: list[Delta]) -> list[tuple[Any, ...]]:
    """Deltas with neighbours of one kind made one: the same for every split."""
    groups = groupby(deltas, lambda delta: (delta.kind, delta.index, delta.name))
    return [(*key, "".join(delta.text for delta in group)) for key, group in groups]


def read(pieces: Sequence[str], mode: str) -> tuple[Any, ...]:
    """All that a parser says of a text that comes in pieces."""
    parser, deltas, failed = CompletionParser(mode), [], None
    try:
        for piece in pieces:
            deltas += parser.feed(piece)
        deltas += parser.close()
    except CompletionError as error:
        deltas += error.deltas
        failed = (str(error), error.position, error.line, error.column)
    return merged(deltas), parser.message, failed, parser.finished, parser.complete_calls


def grown(deltas: list[tuple[Any, ...]]) -> dict[str, Any]:
    """The message that merged deltas make."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for kind, index, name, text in deltas:
        if kind == "tool_call":
            message["tool_calls"].append({"type": "function", "function": {"name": name, "arguments": ""}})
        elif kind == "arguments":
            message["tool_calls"][index]["function"]["arguments"] += text
        else:
            message["content" if kind == "content" else "reasoning_content"] += text
    return message


def cut(text: str, places: Sequence[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *sorted(places), len(text)])]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_split_reads_the_same(case: dict[str, Any]) -> None:
    text, mode = case["text"], case["thinking_mode"]
    whole = read([text], mode)
    assert grown(whole[0]) == whole[1]
    assert read(list(text), mode) == whole
    for place in range(len(text) + 1):
        assert read(cut(text, [place]), mode) == whole


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(st.data())
def test_any_split_reads_the_same(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    places = data.draw(st.lists(st.integers(0, len(case["text"])), max_size=30))
    assert read(cut(case["text"], places), case["thinking_mode"]) == read([case["text"]], case["thinking_mode"])


def test_each_character_is_read_a_bounded_number_of_times() -> None:
    # what is held back, and so read again with the next text, is only the beginning of a marker
    longest = max(len(marker) for state in grammar(P).values() for marker, _ in state.markers)
    for case in CASES:
        parser = CompletionParser(case["thinking_mode"])
        with suppress(CompletionError):
            for character in case["text"]:
                parser.feed(character)
                assert len(parser._held) < longest


MARKS = [P.eos, P.think_end, P.calls_start, P.call_start, P.call_name_end, P.parameter_start, P.parameter_name_end]
MARKS += [
    P.parameter_string,
    P.parameter_json,
    P.parameter_end,
    P.call_end,
    P.calls_end,
    *P.tokens,
    "a",
    "\n",
    "<",
    "1",
]


def broken(random: Random) -> str:
    """A vector with a few pieces lost, doubled, moved or put in; or nothing but markers."""
    if random.random() < 0.3:
        return "".join(random.choices(MARKS, k=random.randint(0, 12)))
    text: str = random.choice(CASES)["text"]
    for _ in range(random.randint(1, 3)):
        a, b = sorted(random.randint(0, len(text)) for _ in range(2))
        b = min(b, a + 40)
        lost, doubled, put = text[:a] + text[b:], text[:b] + text[a:], text[:a] + random.choice(MARKS) + text[a:]
        text = random.choice([lost, doubled, put, text[:b]])
    return text


@pytest.mark.parametrize("mode", ["thinking", "chat"])
def test_broken_text_is_read_or_refused_with_a_place(mode: str) -> None:
    random, refused = Random(mode), 0
    for _ in range(1500):
        text = broken(random)
        whole = read([text], mode)
        assert grown(whole[0]) == whole[1]
        assert read(list(text), mode) == whole
        if whole[2] is None:
            assert whole[3] and text.endswith(P.eos)
            continue
        _, position, line, column = whole[2]
        refused += 1
        assert 0 <= position <= len(text) and not (whole[3] and position == len(text))
        assert [len(row) for row in text[:position].split("\n")][-1] == column - 1
        assert text[:position].count("\n") == line - 1
        # all that stands before the place is in the message
        assert read([text[:position]], mode)[1] == whole[1]
    assert 1000 < refused < 1500
