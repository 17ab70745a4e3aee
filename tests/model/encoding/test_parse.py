"""Completions: the published vectors, when text is passed on, what is refused, and round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_hal.model.encoding import (
    CompletionError,
    CompletionParser,
    Delta,
    encode_messages,
    find_protocol_token,
    load_protocol,
    parse_completion,
)

DATA = Path(__file__).parents[2] / "data" / "encoding"
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))["parse"]
P = load_protocol()
USER = {"role": "user", "content": "u"}
CALL = f"{P.calls_start}{P.call_start}"
HEAD = f"{CALL}f{P.call_name_end}{P.parameter_start}p{P.parameter_name_end}"
TAIL = f"{P.call_end}{P.calls_end}{P.eos}"


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_vectors(case: dict[str, Any]) -> None:
    if "ok" in case:
        assert parse_completion(case["text"], case["thinking_mode"]) == case["ok"]
    else:
        with pytest.raises(CompletionError):
            parse_completion(case["text"], case["thinking_mode"])


# --- what is passed on, and when ------------------------------------------------------------------------------------


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = CompletionParser("thinking")
    steps = [
        ("abc<", [Delta("reasoning", "abc")]),
        ("/t", []),
        ("x\n\n", [Delta("reasoning", "</tx\n\n")]),
        ("</think>\n", []),
        ("\n<｜DSML｜", []),
        (f"tool_calls>\n{P.call_start}f", []),
        ('">\n', [Delta("tool_call", index=0, name="f"), Delta("arguments", "{", 0)]),
        (f"{P.parameter_start}p", []),
        ('" string="true">a', [Delta("arguments", '"p": "', 0), Delta("arguments", "a", 0)]),
        ('"</｜', [Delta("arguments", '\\"', 0)]),
        ("DSML｜parameter>\n", [Delta("arguments", '"', 0)]),
        (P.call_end, [Delta("arguments", "}", 0)]),
        (P.calls_end, []),
        (P.eos, []),
    ]
    for text, deltas in steps:
        assert parser.feed(text) == deltas, text
        assert parser.complete_calls == (text in (P.call_end, P.calls_end, P.eos))
    assert parser.finished and parser.close() == []
    assert parser.message["tool_calls"][0]["function"]["arguments"] == '{"p": "a\\""}'


def test_what_was_said_before_an_early_end() -> None:
    parser = CompletionParser("chat")
    assert parser.feed("Hello.\n\n") == [Delta("content", "Hello.")]
    with pytest.raises(CompletionError) as error:
        parser.close()
    assert error.value.deltas == [Delta("content", "\n\n")] and error.value.position == 8
    assert parser.message["content"] == "Hello.\n\n" and not parser.finished
    parser = CompletionParser("chat")
    parser.feed(f'Hi{HEAD}true">text</｜DSML｜par')
    with pytest.raises(CompletionError):
        parser.close()
    assert parser.message["tool_calls"][0]["function"]["arguments"] == '{"p": "text' and parser.complete_calls == 0


def test_an_error_stays() -> None:
    parser = CompletionParser("chat")
    with pytest.raises(CompletionError) as first:
        parser.feed("fine<think>no")
    assert first.value.deltas == [Delta("content", "fine")] and parser.message["content"] == "fine"
    for again in (lambda: parser.feed("more"), parser.close):
        with pytest.raises(CompletionError) as error:
            again()
        assert error.value is first.value
    assert parser.message["content"] == "fine"


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, str, int]] = {
    "no end": ("chat", "abc", "the text ends where ", 3),
    "no end of thinking": ("thinking", f"a\nb{P.eos}", "(line 2, column 2): expected '</think>', got '<｜end▁of", 3),
    "thinking in chat": ("chat", f"a</think>b{P.eos}", "got '</think>' after 'a'", 1),
    "next turn": ("chat", f"a{P.user}b{P.eos}", "got '<｜User｜>' after 'a'", 1),
    "task token": ("chat", f"a{P.tasks['query']}{P.eos}", "got '<｜query｜>'", 1),
    "after the end": ("chat", f"a{P.eos}\n", "expected nothing more, got '\\n' after", 1 + len(P.eos)),
    "two ends": ("chat", P.eos * 2, "expected nothing more, got '<'", len(P.eos)),
    "calls without empty line": ("chat", f"a{P.calls_start[1:]}", "got '<｜DSML｜' after 'a\\n'", 2),
    "calls while thinking": ("thinking", f"a{HEAD}", "expected '</think>', got '<｜DSML｜'", 3),
    "no calls": ("chat", f"{P.calls_start}{P.calls_end}", "invoke name=\"', got '</'", len(P.calls_start)),
    "no name": ("chat", f"{CALL}{P.call_name_end}", "expected the name of a function", len(CALL)),
    "tag in a name": ("chat", f"{CALL}f{P.call_end}", "expected '\">\\n', got '</｜DSML｜'", len(CALL) + 1),
    "string=maybe": ("chat", f'{HEAD}maybe">', "expected 'false\">' or 'true\">', got 'm'", len(HEAD)),
    "unclosed value": ("chat", f'{HEAD}true">v\n{TAIL}', "parameter>\\n', got '</｜DSML｜'", len(HEAD) + 8),
    "end in a value": ("chat", f'{HEAD}true">v{P.eos}', "parameter>\\n', got '<｜end▁of▁s", len(HEAD) + 7),
    "text between": ("chat", f'{HEAD}true">{P.parameter_end}\n', "got '\\n'", len(HEAD) + 6 + len(P.parameter_end)),
    "text after calls": ("chat", f"{CALL}f{P.call_name_end}{TAIL[: -len(P.eos)]}.", "sentence｜>', got '.'", 80),
    "parameter twice": (
        "chat",
        f'{HEAD}false">1{P.parameter_end}{P.parameter_start}p{P.parameter_name_end}',
        "expected a parameter that the call does not have yet, got 'p' after",
        len(HEAD) + 8 + len(P.parameter_end) + len(P.parameter_start),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    mode, text, message, position = REFUSED[case]
    with pytest.raises(CompletionError) as error:
        parse_completion(text, mode)
    assert message in str(error.value)
    assert error.value.position == position
    assert str(error.value).startswith(f"offset {position} (line ")


def test_a_call_without_parameters_may_lack_its_empty_line() -> None:
    for nothing in ("", P.no_parameters):
        out = parse_completion(f"{CALL}f{P.call_name_end}{nothing}{TAIL}", "chat")
        assert out["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="thinking_mode must be one of thinking, chat, got 'deep'"):
        parse_completion(P.eos, "deep")
    with pytest.raises(ValueError, match="2025: no such version"):
        CompletionParser(version="2025")


# --- round trips ----------------------------------------------------------------------------------------------------

PIECES = [
    "a",
    "é",
    "🚀",
    " ",
    "\n",
    "\n\n",
    "<",
    "</",
    ">",
    "｜",
    "DSML",
    "think",
    '"',
    '" string=',
    "\\",
    "/",
    "{",
    "\u2028",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)
plain = texts.filter(lambda text: find_protocol_token(text, P) is None)
keys = plain.filter(lambda key: f"{key}{P.parameter_name_end}".find(P.parameter_name_end) == len(key))
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
calls = st.lists(st.tuples(names, st.dictionaries(keys, values, max_size=4)), max_size=3)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(st.sampled_from(["thinking", "chat"]), plain, plain, calls)
def test_round_trip(mode: str, reasoning: str, content: str, made: list[tuple[str, dict[str, Any]]]) -> None:
    turn = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning if mode == "thinking" else "",
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}}
            for name, given in made
        ],
    }
    prompt = encode_messages([USER], mode)
    completion = encode_messages([USER, turn], mode).removeprefix(prompt)
    assert parse_completion(completion, mode) == turn
