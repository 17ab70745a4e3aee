"""Prompts: the published vectors, what no vector shows, and what is refused in which words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.model.encoding import encode_messages, load_protocol

DATA = Path(__file__).parents[2] / "data" / "encoding"
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))["encode"]
P = load_protocol()

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "u"}


def call(name: str = "f", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **keys}


def result(content: Any = "r", **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_vectors(number: int) -> None:
    case = CASES[number]
    before = copy.deepcopy(case["messages"])
    out = encode_messages(case["messages"], case["thinking_mode"], case["drop_thinking"], case["reasoning_effort"])
    assert out == case["expected"]
    assert case["messages"] == before


@pytest.mark.parametrize(("number", "mode"), [(1, "thinking"), (2, "thinking"), (4, "chat")])
def test_vendor_files(number: int, mode: str) -> None:
    read = json.loads((DATA / f"test_input_{number}.json").read_text(encoding="utf-8"))
    messages = read if isinstance(read, list) else read["messages"]
    if isinstance(read, dict):
        messages[0]["tools"] = read["tools"]
    assert encode_messages(messages, mode) == (DATA / f"test_output_{number}.txt").read_text(encoding="utf-8")


def test_effort_is_a_prefix_in_thinking_mode_only() -> None:
    plain = encode_messages([USER])
    assert plain == f"{P.bos}{P.user}u{P.assistant}{P.think_start}"
    assert encode_messages([USER], reasoning_effort="none") == encode_messages([USER], reasoning_effort="high") == plain
    assert encode_messages([USER], reasoning_effort="max") == P.bos + P.reasoning_effort["max"] + plain[len(P.bos) :]
    assert encode_messages([USER], "chat", reasoning_effort="max") == encode_messages([USER], "chat")


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for role in ("system", "user", "developer"):
        whole = encode_messages([{"role": role, "content": "a\n\nb"}])
        assert encode_messages([{"role": role, "content": parts}]) == whole


def test_results_in_the_order_of_the_calls_texts_in_place() -> None:
    calls = answer(content=None, tool_calls=[call(id="x"), call(id="y"), call(id="z")])
    tail = [result("2", tool_call_id="y"), USER, result("3", tool_call_id="z"), result("1", tool_call_id="x")]
    out = encode_messages([USER, calls, *tail], "chat")
    end = "<tool_result>1</tool_result>\n\nu\n\n<tool_result>2</tool_result>\n\n<tool_result>3</tool_result>"
    assert out.endswith(f"{P.eos}{P.user}{end}{P.assistant}{P.think_end}")


def test_results_of_calls_without_ids_stay_as_they_come() -> None:
    calls = answer(tool_calls=[call(), call()])
    out = encode_messages([USER, calls, result("2"), result("1", tool_call_id="any")], "chat")
    assert "<tool_result>2</tool_result>\n\n<tool_result>1</tool_result>" in out


def test_results_follow_the_last_calls() -> None:
    first = [USER, answer(tool_calls=[call(id="x"), call(id="y")]), result(tool_call_id="y"), result(tool_call_id="x")]
    second = answer(tool_calls=[call(id="y"), call(id="x")])
    out = encode_messages([*first, second, result("X", tool_call_id="x"), result("Y", tool_call_id="y")], "chat")
    assert "<tool_result>Y</tool_result>\n\n<tool_result>X</tool_result>" in out


def test_task_of_a_merged_user_turn_is_kept() -> None:
    assert encode_messages([USER, USER | {"task": "query"}]) == f"{P.bos}{P.user}u\n\nu{P.tasks['query']}"


def test_a_task_is_answered_without_thinking() -> None:
    out = encode_messages([USER | {"task": "action"}, answer(reasoning_content="lost")])
    assert out == f"{P.bos}{P.user}u{P.assistant}{P.think_start}{P.tasks['action']}a{P.eos}"
    title = encode_messages([USER, answer(task="title"), answer(content="T")])
    assert title.endswith(f"a{P.eos}{P.tasks['title']}T{P.eos}")


def test_a_reminder_may_stand_before_the_answer() -> None:
    out = encode_messages([USER, {"role": "latest_reminder", "content": "l"}, answer(reasoning_content="r")])
    assert out == f"{P.bos}{P.user}u{P.assistant}{P.think_start}{P.latest_reminder}lr{P.think_end}a{P.eos}"


def test_wo_eos_leaves_the_turn_open() -> None:
    assert encode_messages([USER, answer(wo_eos=True)], "chat") + P.eos == encode_messages([USER, answer()], "chat")


def test_developer_messages_go_with_the_reasoning() -> None:
    developer = {"role": "developer", "content": "d"}
    talk = [developer, answer(reasoning_content="r"), USER]
    assert encode_messages(talk) == f"{P.bos}a{P.eos}{P.user}u{P.assistant}{P.think_start}"
    kept = f"{P.bos}{P.user}d{P.assistant}{P.think_start}r{P.think_end}a{P.eos}{P.user}u{P.assistant}{P.think_start}"
    assert encode_messages(talk, drop_thinking=False) == kept


@pytest.mark.parametrize("key", ["id", "name", "mask"])
def test_keys_that_change_nothing(key: str) -> None:
    assert encode_messages([USER | {key: "x"}]) == encode_messages([USER])
    assert encode_messages([USER | {"refusal": None, "annotations": []}]) == encode_messages([USER])


REFUSED: dict[str, tuple[list[Any], str]] = {
    "role": ([USER, {"role": "robot", "content": ""}], "[1] (role robot): role must be one of system, developer, user"),
    "no role": ([{"content": ""}], "[0] (role None): role must be one of"),
    "role of a wrong type": ([{"role": ["user"]}], "[0] (role ['user']): role must be one of"),
    "not an object": ([USER, "hello"], "[1] (role None): a message must be an object, got 'hello'"),
    "no content": ([{"role": "user"}], "[0] (role user): content is missing"),
    "null content": ([{"role": "system", "content": None}], "[0] (role system): content is missing"),
    "empty answer": ([USER, {"role": "assistant"}], "[1] (role assistant): content is missing"),
    "content type": ([{"role": "user", "content": 1}], "[0] (role user): content must be a string or a list"),
    "no parts": ([{"role": "user", "content": []}], "content must be a string or a list of text parts, got []"),
    "image": (
        [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {}}]}],
        "[0] (role user): content[1].type must be 'text', got 'image_url'",
    ),
    "part": ([{"role": "user", "content": ["x"]}], "content[0] must be an object, got 'x'"),
    "part's text": ([{"role": "user", "content": [{"type": "text"}]}], "content[0].text must be a string, got None"),
    "developer": ([{"role": "developer", "content": ""}], "[0] (role developer): content must not be empty"),
    "task": ([USER | {"task": "poem"}], "[0] (role user): task must be one of action, query, "),
    "task type": ([USER | {"task": 1}], "[0] (role user): task must be a string, got 1"),
    "task without answer": ([USER | {"task": "query"}, USER], "[0] (role user): task must be followed by its answer"),
    "unknown key": ([USER | {"images": [1]}], "[0] (role user): unknown key images; a user message has content, task"),
    "tools of a user": ([USER | {"tools": [1]}], "[0] (role user): unknown key tools"),
    "reasoning of a user": ([USER | {"reasoning_content": "x"}], "unknown key reasoning_content"),
    "reasoning type": ([USER, answer(reasoning_content=["x"])], "reasoning_content must be a string, got ['x']"),
    "tools type": ([SYSTEM | {"tools": {}}], "[0] (role system): tools must be a list, got {}"),
    "tool": ([SYSTEM | {"tools": [{"type": "function"}]}], "tools[0].function must be an object, got None"),
    "tool kind": ([SYSTEM | {"tools": [{"type": "web"}]}], "tools[0].type must be 'function', got 'web'"),
    "tool name": (
        [SYSTEM | {"tools": [{"function": {}}]}],
        "tools[0].function.name must be a string that is not empty",
    ),
    "schema": (
        [SYSTEM | {"tools": [{"function": {"name": "f", "x": float("nan")}}]}],
        "tools[0].function cannot be written as JSON",
    ),
    "format": ([SYSTEM | {"response_format": "json"}], "response_format must be an object, got 'json'"),
    "calls type": ([USER, answer(tool_calls="f()")], "[1] (role assistant): tool_calls must be a list, got 'f()'"),
    "arguments type": (
        [USER, answer(tool_calls=[call(), call(arguments={})])],
        "[1] (role assistant): tool_calls[1].function.arguments must be a string with a JSON object, got {}",
    ),
    "not JSON": ([USER, answer(tool_calls=[call(arguments="{")])], "tool_calls[0].function.arguments is not JSON: "),
    "not an argument object": ([USER, answer(tool_calls=[call(arguments="[]")])], "arguments must be a JSON object"),
    "key twice": ([USER, answer(tool_calls=[call(arguments='{"a":1,"a":2}')])], "key a stands twice"),
    "NaN": ([USER, answer(tool_calls=[call(arguments='{"a":NaN}')])], "NaN is not a JSON number"),
    "too large": ([USER, answer(tool_calls=[call(arguments='{"a":1e999}')])], "arguments cannot be written as JSON"),
    "deep": ([USER, answer(tool_calls=[call(arguments='{"a":' + "[" * 100000)])], "arguments is not JSON"),
    "id type": ([USER, answer(tool_calls=[call(id=1)])], "tool_calls[0].id must be a string, got 1"),
    "id twice": ([USER, answer(tool_calls=[call(id="x"), call(id="x")])], "tool_calls[1].id 'x' stands twice"),
    "result of nothing": ([USER, result(tool_call_id="x")], "[1] (role tool): no tool_calls come before this result"),
    "result of another": (
        [USER, answer(tool_calls=[call(id="x")]), result(tool_call_id="y")],
        "[2] (role tool): tool_call_id must be one of the last tool_calls (x), got 'y'",
    ),
    "wo_eos": ([USER, answer(wo_eos="yes")], "[1] (role assistant): wo_eos must be true or false, got 'yes'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    messages, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        encode_messages(messages)
    assert str(error.value).startswith("messages[")
    assert message in str(error.value)


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user", "content": ""}, None])
def test_not_a_conversation(messages: Any) -> None:
    with pytest.raises(ValueError, match="messages must be a list of at least one message"):
        encode_messages(messages)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="thinking_mode must be one of thinking, chat, got 'deep'"):
        encode_messages([USER], "deep")
    for effort in ("low", ["max"]):
        with pytest.raises(ValueError, match="reasoning_effort must be None or one of none, high, max, got"):
            encode_messages([USER], reasoning_effort=effort)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2025: no such version"):
        encode_messages([USER], version="2025")
