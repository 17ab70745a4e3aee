"""The texts of the protocol, and what a user's text must not say."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from random import Random

import pytest
import yaml
from tokenizers import Tokenizer

from dsv4_hal.model.encoding import (
    encode_messages,
    escape_protocol_tokens,
    find_protocol_token,
    load_protocol,
    protocol,
    protocol_versions,
)
from dsv4_hal.model.tokenizer import load_tokenizer

DATA = Path(__file__).parents[2] / "data" / "encoding"
P = load_protocol()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("empty"), 129280)


def test_texts_are_the_published_ones() -> None:
    published = json.loads((DATA / "protocol_strings.json").read_text())
    assert P.version == "2026-04" and set(P.reasoning_effort) == {"none", "high", "max"}
    assert P.reasoning_effort["max"] == published["reasoning_effort_max_prefix"]
    assert P.reasoning_effort["high"] == P.reasoning_effort["none"] == ""
    assert dict(P.tasks) == published["task_tokens"]
    tools = published["tools_block_template"].replace("{dsml_token}", P.dsml).replace("{tool_schemas}", "{schemas}")
    tools = tools.replace("{thinking_start_token}", P.think_start).replace("{thinking_end_token}", P.think_end)
    assert P.tools == "\n\n" + tools
    assert P.response_format == "\n\n" + published["response_format_template"]


def test_every_field_is_in_the_file() -> None:
    assert all(getattr(P, field.name) for field in fields(P))


def test_unknown_version() -> None:
    with pytest.raises(ValueError, match="2026-05: no such version of the encoding; there are 2026-04"):
        load_protocol("2026-05")


def test_another_version_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load((Path(protocol._files()) / "2026-04.yaml").read_text(encoding="utf-8"))
    levels = {"low": "", "high": "Think. ", "max": "Think more. "}
    text = yaml.safe_dump(values | {"version": "9999-01", "reasoning_effort": levels}, sort_keys=False)
    (tmp_path / "9999-01.yaml").write_text(text)
    monkeypatch.setattr(protocol, "_files", lambda: tmp_path)
    assert protocol_versions() == ["9999-01"]
    say = [{"role": "user", "content": "x"}]
    prompt = encode_messages(say, reasoning_effort="max", version="9999-01")
    assert prompt == f"{P.bos}Think more. {P.user}x{P.assistant}{P.think_start}"
    with pytest.raises(ValueError, match="reasoning_effort must be None or one of low, high, max, got 'none'"):
        encode_messages(say, reasoning_effort="none", version="9999-01")


def test_tokens_are_tokens(tokenizer: Tokenizer) -> None:
    for token in P.tokens:
        assert tokenizer.token_to_id(token) is not None, token


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a < b <| c |> d <b> | ｜x｜ <think >", None),
        ("a</think>b<think>", ("</think>", 1)),
        ("<<｜User｜>", ("<｜User｜>", 1)),
        ("say ｜DSML｜", ("｜DSML｜", 4)),
        ("a</tool_result>", ("</tool_result>", 1)),
        ("<tool_result>", ("<tool_result>", 0)),
        ("x<｜fim▁hole｜>", ("<｜fim▁hole｜>", 1)),
        ("x<｜no such｜>", ("<｜no such｜>", 1)),
        ("<|EOT|>", ("<|EOT|>", 0)),
    ],
)
def test_find(text: str, found: tuple[str, int] | None) -> None:
    assert find_protocol_token(text, P) == found


def test_escape() -> None:
    assert escape_protocol_tokens("1 < 2 ｜ </ think>", P) == ("1 < 2 ｜ </ think>", 0)
    assert escape_protocol_tokens("a<think>b</think>", P) == ("a<\u200bthink>b<\u200b/think>", 2)
    # one inside another: <｜DSML｜> and ｜DSML｜
    assert escape_protocol_tokens("<｜DSML｜>", P) == ("<\u200b｜\u200bDSML｜>", 2)


def test_every_added_token_is_found_and_escaped(tokenizer: Tokenizer) -> None:
    added = tokenizer.get_added_tokens_decoder()
    assert len(added) == 1283
    for token in added.values():
        assert find_protocol_token(f"x{token.content}", P) == (token.content, 1)
    text = " ".join(token.content for token in added.values())
    assert set(tokenizer.encode(text).ids) >= set(added)
    escaped, count = escape_protocol_tokens(text, P)
    assert count == len(added)
    assert find_protocol_token(escaped, P) is None
    assert not set(tokenizer.encode(escaped).ids) & set(added)


def test_escaped_soup_has_no_added_token(tokenizer: Tokenizer) -> None:
    random, added = Random(1), set(tokenizer.get_added_tokens_decoder())
    pieces = [
        *P.tokens,
        P.result_start,
        P.result_end,
        "<",
        ">",
        "｜",
        "</",
        "|",
        "<｜",
        "｜>",
        "DSML",
        "a",
        "\u200b",
        "\n",
    ]
    seen = 0
    for _ in range(300):
        text = "".join(random.choices(pieces, k=12))
        escaped, count = escape_protocol_tokens(text, P)
        assert find_protocol_token(escaped, P) is None
        assert not set(tokenizer.encode(escaped).ids) & added, text
        assert (count == 0) == (find_protocol_token(text, P) is None)
        assert escaped.replace("\u200b", "") == text.replace("\u200b", "")
        seen += count
    assert seen > 300
