"""The prompt of a conversation, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_hal.model.encoding.messages import Turn, read_messages
from dsv4_hal.model.encoding.protocol import Protocol, load_protocol

THINKING_MODES = ("thinking", "chat")


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    thinking_mode: str = "thinking",
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    *,
    version: str = "2026-04",
) -> str:
    """OpenAI-style messages -> the text that the model continues (or, where an assistant message is the last, has
    written). What users and tools wrote stands in it as it is: see `escape_protocol_tokens`.

    messages          roles system, developer, user, assistant, tool and latest_reminder; `content` is a string or a
                      list of {"type": "text", "text": ...}, which are joined by an empty line. An assistant message
                      may lack it if it has `reasoning_content` or `tool_calls`. Results of tools (`tool_call_id`: one
                      of the last calls; calls without ids have their results as they come) and user messages that
                      follow one another are one turn. System and developer messages may have `tools` and
                      `response_format`; user, developer and assistant messages a `task`, which asks for a short
                      answer without thinking; assistant messages `wo_eos`, which leaves the turn open. The keys id,
                      name and mask change nothing; any other key that is not empty is an error.
    thinking_mode     "thinking": the answer begins with reasoning; "chat": it has none
    drop_thinking     leave out, in thinking mode, what was reasoned before the last user message, and developer
                      messages before it; has no effect where a message has tools
    reasoning_effort  text before the conversation, in thinking mode; in chat mode there never is one. In 2026-04: "max"
                      asks for the longest reasoning; None, "high" and "none" add nothing: whether the model thinks is
                      thinking_mode's to say, not effort's.
    version           of the protocol: see `protocol_versions`
    ValueError where an argument or a message is wrong; it names the message's index, role and key.
    """
    protocol = load_protocol(version)
    if thinking_mode not in THINKING_MODES:
        raise ValueError(f"thinking_mode must be one of {', '.join(THINKING_MODES)}, got {thinking_mode!r}")
    efforts = protocol.reasoning_effort
    if reasoning_effort is not None and reasoning_effort not in list(efforts):
        raise ValueError(f"reasoning_effort must be None or one of {', '.join(efforts)}, got {reasoning_effort!r}")
    turns = read_messages(messages, protocol)
    thinking = thinking_mode == "thinking"
    thinks_from = 0  # the first turn whose reasoning is kept, and after which the model thinks
    if thinking and drop_thinking and not any(turn.tools for turn in turns):
        last = _last_question(turns)
        turns = [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last]
        thinks_from = _last_question(turns)
    effort = efforts[reasoning_effort] if thinking and reasoning_effort is not None else ""
    out = [protocol.bos, effort]
    for i, turn in enumerate(turns):
        thinks = thinking and i >= thinks_from
        answers_task = i > 0 and turns[i - 1].task is not None
        out.append(_RENDER[turn.role](turn, protocol, thinks and not answers_task))
        if i + 1 == len(turns) or turns[i + 1].role in ("assistant", "latest_reminder"):
            out.append(_transition(turn, protocol, thinks, thinking))
    return "".join(out)


def _last_question(turns: list[Turn]) -> int:
    """Index of the last turn that asks the model; 0 if there is none."""
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=0)


def _system(turn: Turn, protocol: Protocol, thinks: bool) -> str:
    tools = protocol.tools.replace("{schemas}", "\n".join(turn.tools)) if turn.tools else ""
    form = turn.response_format
    return turn.blocks[0][1] + tools + (protocol.response_format.replace("{schema}", form) if form else "")


def _developer(turn: Turn, protocol: Protocol, thinks: bool) -> str:
    return protocol.user + _system(turn, protocol, thinks)


def _user(turn: Turn, protocol: Protocol, thinks: bool) -> str:
    texts = (
        text if call is None else f"{protocol.result_start}{text}{protocol.result_end}" for call, text in turn.blocks
    )
    return protocol.user + protocol.block_separator.join(texts)


def _reminder(turn: Turn, protocol: Protocol, thinks: bool) -> str:
    return protocol.latest_reminder + turn.blocks[0][1]


def _assistant(turn: Turn, protocol: Protocol, thinks: bool) -> str:
    """Behind the token that `_transition` wrote: reasoning if it `thinks`, content, calls and the end."""
    reasoning = turn.reasoning + protocol.think_end if thinks else ""
    calls = "".join(_call(name, arguments, protocol) for name, arguments in turn.calls)
    block = f"{protocol.calls_start}{calls}{protocol.calls_end}" if calls else ""
    return reasoning + turn.blocks[0][1] + block + ("" if turn.wo_eos else protocol.eos)


def _call(name: str, arguments: Mapping[str, Any], protocol: Protocol) -> str:
    parameters = "".join(
        f"{protocol.parameter_start}{key}{protocol.parameter_name_end}{_value(value, protocol)}{protocol.parameter_end}"
        for key, value in arguments.items()
    )
    inner = parameters or protocol.no_parameters
    return f"{protocol.call_start}{name}{protocol.call_name_end}{inner}{protocol.call_end}"


def _value(value: Any, protocol: Protocol) -> str:
    if isinstance(value, str):
        return protocol.parameter_string + value
    return protocol.parameter_json + json.dumps(value, ensure_ascii=False)


def _transition(turn: Turn, protocol: Protocol, thinks: bool, thinking: bool) -> str:
    """From a turn to the answer: the task's token, or the assistant's and whether it thinks."""
    token = protocol.tasks[turn.task] if turn.task else ""
    if turn.task and turn.task != "action":
        return token
    if turn.task:  # an action's answer is announced as any other
        return protocol.assistant + (protocol.think_start if thinking else protocol.think_end) + token
    if turn.role in ("user", "developer"):
        return protocol.assistant + (protocol.think_start if thinks else protocol.think_end)
    return ""


_RENDER = {
    "system": _system,
    "developer": _developer,
    "user": _user,
    "latest_reminder": _reminder,
    "assistant": _assistant,
}
