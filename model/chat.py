"""A conversation: messages, rendered into one prompt a turn, and answers parsed as they are generated."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer

from dsv4_hal.model.encoding import (
    CompletionError,
    CompletionParser,
    Delta,
    encode_messages,
    escape_protocol_tokens,
    find_protocol_token,
    load_protocol,
)
from dsv4_hal.model.generate import Sampling
from dsv4_hal.model.prompt_cache import PromptCache
from dsv4_hal.model.transformer import Model

Message = dict[str, Any]
THINK = ("none", "high", "max")  # answer at once; think first; think first, asked for the greatest effort


class Answer:
    """An answer as its tokens come.

    end      "stop": it ended itself; "length": no more tokens were allowed; "context": no more fit; "interrupted"; or
             "malformed: ..." with the place where it left the protocol
    made     tokens
    """

    def __init__(self, think: str, tokenizer: Tokenizer) -> None:
        self.parser = CompletionParser(_mode(think))
        self.end_token = end_token(tokenizer)
        self.end, self.made = "interrupted", 0

    def read(self, tokens: Iterable[tuple[int | None, str]]) -> Iterator[Delta]:
        """Deltas out of (token, text), up to the token that ends the answer or the place where it is malformed."""
        try:
            for token, text in tokens:
                self.made += token is not None
                yield from self.parser.feed(text)
                if token == self.end_token:
                    self.end = f"malformed: {self._refused}" if self._refused else "stop"
                    return
            self.end = "length"
            self.parser.close()  # gives out what was held back
        except CompletionError as error:
            yield from error.deltas
            if self.end != "length":
                self.end = f"malformed: {error}"

    @property
    def message(self) -> Message:
        """Without tool calls that did not come to their end, or that the encoding would not send back."""
        message = self.parser.message
        calls = message["tool_calls"][: self.parser.complete_calls]
        return {**message, "tool_calls": list(takewhile(lambda call: not _refusal(call), calls))}

    @property
    def _refused(self) -> str:
        """Why the first tool call that is not sound is none."""
        return next(filter(None, map(_refusal, self.parser.message["tool_calls"])), "")


def _refusal(call: Mapping[str, Any]) -> str:
    """Why a tool call cannot be part of a conversation; "" if it can."""
    try:
        encode_messages([{"role": "user", "content": ""}, {"role": "assistant", "tool_calls": [call]}])
    except ValueError as error:
        return str(error).partition(": ")[2]
    return ""


@dataclass
class Turn:
    """How a turn went: its answer; prompt tokens that were in the cache (reused) or not (computed); seconds."""

    answer: Answer
    reused: int
    computed: int
    reading: float
    writing: float


class Conversation:
    """Messages in the OpenAI form, and a model that answers.

    context  tokens that prompt and answer may have together
    think    one of THINK; may be set between turns
    opening  messages it starts with: a system message, tools
    escape   whether protocol tokens inside a message are escaped; otherwise they are refused (see `guarded`)
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        context: int,
        *,
        think: str = "high",
        opening: Sequence[Message] = (),
        escape: bool = False,
    ) -> None:
        # what asks for an answer ends the prompt; a later prompt may have other such tokens in its place
        self._tail = re.compile(f"(?:{'|'.join(map(re.escape, load_protocol().tokens))})+$")
        self.opening = [guarded(m, escape, _named(m)) for m in opening]
        self.messages = list(self.opening)
        self.tokenizer, self.think, self.escape, self.turns = tokenizer, think, escape, 0
        self.prompts = PromptCache(model, tokenizer, min(context, model.cfg.max_position_embeddings))
        self.turn: Turn | None = None

    def say(self, messages: Sequence[Message], max_new_tokens: int, sampling: Sampling) -> Generator[Delta]:
        """Append messages (a user's, or results of tools) and generate the answer: its deltas, as they come.

        `turn` then says how it went. An answer that is cut short, by the limit, by an interrupt, or because it left the
        protocol, stays in the conversation as far as it came; where nothing came, the messages are taken back.
        ValueError, and nothing changes, for a message that cannot be sent or does not fit the context.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        asked = [*self.messages, *(guarded(m, self.escape, _named(m)) for m in messages)]
        answer = Answer(self.think, self.tokenizer)
        prompt = render(asked, self.think)
        start = time.perf_counter()
        rest = self._tail.search(prompt)
        seam = rest.start() if rest else len(prompt)
        self.prompts.read(prompt[:seam], prompt[seam:])
        first = time.perf_counter()
        tokens = self.prompts.answer(max_new_tokens, replace(sampling, seed=(sampling.seed + self.turns) % 2**63))
        try:
            yield from answer.read(tokens)
        finally:
            tokens.close()
            if answer.made:
                self.messages = [*asked, self._numbered(answer.message)]
                self.turns += 1
            if answer.end == "length" and answer.made < max_new_tokens:
                answer.end = "context"
            writing = time.perf_counter() - first
            self.turn = Turn(answer, self.prompts.reused, self.prompts.computed, first - start, writing)

    def clear(self) -> None:
        """Start over: forget all messages but the opening ones."""
        self.messages = list(self.opening)
        self.prompts.clear()

    def _numbered(self, message: Message) -> Message:
        """The message with an id for each tool call, which results refer to."""
        calls = [{"id": f"call_{self.turns}_{i}", **call} for i, call in enumerate(message["tool_calls"])]
        return {**message, "tool_calls": calls}


def render(messages: Sequence[Message], think: str) -> str:
    """The prompt of a conversation that awaits an answer. ValueError names the message that cannot be rendered, or says
    that two texts make a protocol token where they meet: nothing but one of them could be changed to prevent it."""
    if not messages:
        raise ValueError("the conversation has no messages")
    prompt = encode_messages(messages, _mode(think), reasoning_effort=think)
    last = messages[-1]
    asks = last["role"] in ("user", "tool", "developer") or (last["role"] == "assistant" and last.get("task"))
    if not asks:
        raise ValueError("the conversation awaits no answer: its last message must be a user's or a tool's")
    marked = encode_messages([_marked(m) for m in messages], _mode(think), reasoning_effort=think)
    joined, seams = "", set[int]()
    for piece in _SEAM.split(marked):
        seams.add(len(joined))
        joined += piece.replace(_START, "").replace(_END, "")
    for match in load_protocol().in_user_text.finditer(joined):
        if any(match.start() < seam < match.end() for seam in seams):
            raise ValueError(f"two messages, one after the other, make the protocol token {match.group()}")
    return prompt


_START, _END = "\ufdd0", "\ufdd1"  # noncharacters: around each text, to see where two of them meet
_SEAM = re.compile(f"{_END}(?:{_START}{_END})*{_START}")


def _marked(message: Message) -> Message:
    """The message with its texts between marks."""

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return f"{_START}{value}{_END}"
        return [{**part, "text": mark(part["text"])} for part in value] if isinstance(value, list) else value

    return {key: mark(value) if key in ("content", "reasoning_content") else value for key, value in message.items()}


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages, with tools on the first one if it is the system's or a developer's, else on one of their own."""
    if not tools:
        return list(messages)
    if messages and messages[0].get("role") in ("system", "developer"):
        if "tools" in messages[0]:
            raise ValueError("the first message has tools of its own: give them there or beside the messages, not both")
        return [{**messages[0], "tools": list(tools)}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": list(tools)}, *messages]


def guarded(message: Message, escape: bool, name: str = "message") -> Message:
    """The message with no protocol token in its texts: refused with ValueError, or escaped.

    A text that holds one would not be read as text: it could end its own turn and speak as somebody else. Escaping
    puts a zero width space behind the token's first character, so that it reads the same and is none.
    """
    protocol = load_protocol()

    def text(value: str, key: str) -> str:
        if (lone := re.search(r"[\ud800-\udfff]", value)) is not None:
            raise ValueError(f"{name}: {key} is not valid Unicode at character {lone.start()}")
        found = find_protocol_token(value, protocol)
        if found and not escape:
            token, place = found
            raise ValueError(
                f"{name}: {key} holds the protocol token {token} at character {place}; with "
                "--protocol-tokens escape it is sent as text, by a zero width space behind its first character"
            )
        return escape_protocol_tokens(value, protocol)[0] if found else value

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, str):
            if not _ARGUMENTS.fullmatch(key):
                return text(value, key)
            inside = json.loads(value)  # its escapes could hide a token
            safe = walk(inside, f"{key}:")
            return text(value, key) if inside == safe else json.dumps(safe)
        if isinstance(value, Mapping):
            return {text(str(k), f"a name in {key}"): walk(v, f"{key}.{k}") for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{key}[{i}]") for i, v in enumerate(value)]
        return value

    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be an object with role and content, got {type(message).__name__}")
    try:
        return {key: value if key == "role" else walk(value, key) for key, value in message.items()}
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: arguments of a tool call are not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error


_ARGUMENTS = re.compile(r"tool_calls\[\d+\]\.function\.arguments")


def end_token(tokenizer: Tokenizer) -> int:
    """Id of the token that ends an answer. ValueError if the tokenizer does not know it: it is of another model."""
    eos = load_protocol().eos
    found = tokenizer.token_to_id(eos)
    if found is None:
        raise ValueError(f"the tokenizer has no token {eos}: it is not DeepSeek-V4's")
    return int(found)


def _named(message: Message) -> str:
    return f"the {message['role']}'s message" if isinstance(message, Mapping) and "role" in message else "a message"


def _mode(think: str) -> str:
    if think not in THINK:
        raise ValueError(f"think must be {', '.join(THINK)}, got {think!r}")
    return "chat" if think == "none" else "thinking"
