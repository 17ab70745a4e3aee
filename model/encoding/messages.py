"""OpenAI-style messages, checked and brought into the turns of which a prompt is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_hal.model.encoding.protocol import Protocol

# Keys that each role may have.
KEYS: Mapping[str, frozenset[str]] = {
    "system": frozenset({"content", "tools", "response_format"}),
    "developer": frozenset({"content", "tools", "response_format", "task"}),
    "user": frozenset({"content", "task"}),
    "assistant": frozenset({"content", "reasoning_content", "tool_calls", "task", "wo_eos"}),
    "tool": frozenset({"content", "tool_call_id"}),
    "latest_reminder": frozenset({"content"}),
}
SILENT = frozenset({"role", "id", "name", "mask"})  # keys that never change the prompt


@dataclass
class Turn:
    """One turn of a prompt: a message, or user and tool messages that follow one another.

    blocks   texts of the turn, each with the number of the call whose result it is (None: not a result)
    calls    tool calls: name and arguments
    """

    role: str
    blocks: list[tuple[int | None, str]]
    reasoning: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    response_format: str | None = None
    task: str | None = None
    wo_eos: bool = False


class _Bad(ValueError):
    """What is wrong with a message, without its place."""


def read_messages(messages: Sequence[Mapping[str, Any]], protocol: Protocol) -> list[Turn]:
    """The turns of a conversation; a user turn has its results in the order of the calls.

    ValueError names index, role and key of the first message that is wrong.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {_shown(messages)}")
    turns: list[Turn] = []
    call_ids: list[str | None] | None = None  # of the last assistant message with calls
    for index, message in enumerate(messages):
        try:
            turn, ids = _turn(message, protocol, call_ids)
        except _Bad as error:
            role = message.get("role") if isinstance(message, Mapping) else None
            raise ValueError(f"messages[{index}] (role {role}): {error}") from None
        call_ids = ids or call_ids
        before = turns[-1] if turns else None
        if before and before.role == "user" and before.task and turn.role not in ("assistant", "latest_reminder"):
            raise ValueError(f"messages[{index - 1}] (role user): task must be followed by its answer, or be the last")
        if before and before.role == turn.role == "user":
            before.blocks += turn.blocks
            before.task = turn.task
        else:
            turns.append(turn)
    for turn in turns:
        _sort_results(turn)
    return turns


def _turn(message: Any, protocol: Protocol, call_ids: list[str | None] | None) -> tuple[Turn, list[str | None]]:
    """One message as a turn, and the ids of its calls."""
    if not isinstance(message, Mapping):
        raise _Bad(f"a message must be an object, got {_shown(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        raise _Bad(f"role must be one of {', '.join(KEYS)}, got {_shown(role)}")
    for key, value in message.items():
        if key not in KEYS[role] | SILENT and value not in (None, [], {}):
            raise _Bad(f"unknown key {key}; a {role} message has {', '.join(sorted(KEYS[role]))}")
    calls, ids = _calls(message.get("tool_calls"))
    turn = Turn(role, [], _string(message, "reasoning_content"), calls)
    spoken = message.get("content") is not None or not (calls or turn.reasoning)
    text = _text(message.get("content"), protocol.block_separator) if spoken else ""
    if role == "developer" and not text:
        raise _Bad("content must not be empty")
    turn.blocks = [(_call_number(message, call_ids) if role == "tool" else None, text)]
    turn.role = "user" if role == "tool" else role
    turn.tools = [_tool(number, tool) for number, tool in enumerate(_list(message, "tools"))]
    turn.task = _string(message, "task") or None
    if turn.task is not None and turn.task not in protocol.tasks:
        raise _Bad(f"task must be one of {', '.join(protocol.tasks)}, got {_shown(turn.task)}")
    form = message.get("response_format")
    if form is not None:
        turn.response_format = _json(_mapping(form, "response_format"), "response_format")
    if message.get("wo_eos") not in (None, True, False):
        raise _Bad(f"wo_eos must be true or false, got {_shown(message['wo_eos'])}")
    turn.wo_eos = bool(message.get("wo_eos"))
    return turn, ids


def _text(content: Any, separator: str) -> str:
    """The text of a message's content: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if content is None:
        raise _Bad("content is missing")
    if not isinstance(content, list) or not content:
        raise _Bad(f"content must be a string or a list of text parts, got {_shown(content)}")
    for number, part in enumerate(content):
        if _mapping(part, f"content[{number}]").get("type") != "text":
            raise _Bad(f"content[{number}].type must be 'text', got {_shown(part.get('type'))}")
        if not isinstance(part.get("text"), str):
            raise _Bad(f"content[{number}].text must be a string, got {_shown(part.get('text'))}")
    return separator.join(part["text"] for part in content)


def _calls(value: Any) -> tuple[list[tuple[str, dict[str, Any]]], list[str | None]]:
    """Name and arguments of each tool call, and each call's id."""
    calls, ids = [], []
    for number, call in enumerate(_list({"tool_calls": value}, "tool_calls")):
        place = f"tool_calls[{number}]"
        name, function = _function(call, place)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            raise _Bad(f"{place}.function.arguments must be a string with a JSON object, got {_shown(arguments)}")
        try:
            values = json.loads(arguments, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise _Bad(f"{place}.function.arguments is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise _Bad(f"{place}.function.arguments must be a JSON object, got {_shown(arguments)}")
        _json(values, f"{place}.function.arguments")  # a number may be too large
        if not isinstance(call.get("id"), str | None):
            raise _Bad(f"{place}.id must be a string, got {_shown(call['id'])}")
        if call.get("id") is not None and call["id"] in ids:
            raise _Bad(f"{place}.id {call['id']!r} stands twice")
        calls.append((name, values))
        ids.append(call.get("id"))
    return calls, ids


def _call_number(message: Mapping[str, Any], call_ids: list[str | None] | None) -> int:
    """Which of the last calls a tool message answers; 0 where calls have no ids: results then stay as they come."""
    if call_ids is None:
        raise _Bad("no tool_calls come before this result")
    known = [call_id for call_id in call_ids if call_id is not None]
    wanted = message.get("tool_call_id")
    if known and wanted not in known:
        raise _Bad(f"tool_call_id must be one of the last tool_calls ({', '.join(known)}), got {_shown(wanted)}")
    return call_ids.index(wanted) if known else 0


def _sort_results(turn: Turn) -> None:
    """Put the results of a turn in the order of the calls; texts between them keep their places."""
    results = iter(sorted((block for block in turn.blocks if block[0] is not None), key=lambda block: block[0] or 0))
    turn.blocks = [block if block[0] is None else next(results) for block in turn.blocks]


def _tool(number: int, tool: Any) -> str:
    _, function = _function(tool, f"tools[{number}]")
    return _json(function, f"tools[{number}].function")


def _function(value: Any, place: str) -> tuple[str, Mapping[str, Any]]:
    """The function of a tool or tool call and its name."""
    if _mapping(value, place).get("type", "function") != "function":
        raise _Bad(f"{place}.type must be 'function', got {_shown(value['type'])}")
    function = _mapping(value.get("function"), f"{place}.function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise _Bad(f"{place}.function.name must be a string that is not empty, got {_shown(function.get('name'))}")
    return function["name"], function


def _json(value: Any, place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _Bad(f"{place} cannot be written as JSON: {error}") from None


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"{place} must be an object, got {_shown(value)}")
    return value


def _list(message: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(message.get(key), list | None):
        raise _Bad(f"{key} must be a list, got {_shown(message[key])}")
    return message.get(key) or []


def _string(message: Mapping[str, Any], key: str) -> str:
    if not isinstance(message.get(key), str | None):
        raise _Bad(f"{key} must be a string, got {_shown(message[key])}")
    return message.get(key) or ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object hook: of a key that stands twice, plain json would keep the last in silence."""
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in names if names.count(key) > 1)} stands twice")
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
