"""Conversations: what is sent, what is kept, what is computed anew; with a small model and the official tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.model.chat import Conversation, guarded, render, with_tools
from dsv4_hal.model.encoding import Delta
from dsv4_hal.model.generate import Sampling, generate
from dsv4_hal.model.prompt_cache import PromptCache
from dsv4_hal.model.tokenizer import load_tokenizer, spelled, tokenize
from dsv4_hal.model.transformer import Model

VOCABULARY = 129280
EOS = "<｜end▁of▁sentence｜>"
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object"}}}
CALL = (
    '</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="at" string="true">sea'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>" + EOS
)
TOKENIZER = load_tokenizer("no such directory", VOCABULARY)


@pytest.fixture
def model(small_model: Callable[..., Model]) -> Model:
    return small_model(vocab_size=VOCABULARY)


def script(model: Model, *texts: str) -> None:
    """From now on the model says these texts, one after the other."""
    tokens = [token for text in texts for token in tokenize(TOKENIZER, text)]

    def sample(logits: Tensor, *_: Any) -> Tensor:
        return torch.tensor([tokens.pop(0)])

    model.ops.sample = sample  # type: ignore[method-assign]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def hear(talk: Conversation, messages: list[dict[str, Any]], limit: int = 99) -> list[Delta]:
    return list(talk.say(messages, limit, Sampling()))


def end(talk: Conversation) -> str:
    assert talk.turn is not None
    return talk.turn.answer.end


def work(talk: Conversation) -> tuple[int, int]:
    """(reused, computed) prompt tokens of the last turn."""
    assert talk.turn is not None
    return talk.turn.reused, talk.turn.computed


def test_a_thinking_turn(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 512, opening=[{"role": "system", "content": "Be brief."}])
    script(model, "because</think>yes" + EOS)
    deltas = hear(talk, user("Is it?"))
    assert "".join(d.text for d in deltas if d.kind == "reasoning") == "because"
    assert "".join(d.text for d in deltas if d.kind == "content") == "yes"
    assert end(talk) == "stop"
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    assert talk.messages[-1]["content"] == "yes"
    talk.clear()
    assert talk.messages == talk.opening
    assert talk.prompts.cache.lengths == (0, 0)


@pytest.mark.parametrize("think", ["none", "high", "max"])
def test_a_later_turn_computes_only_what_is_new_and_answers_as_if_all_were_new(model: Model, think: str) -> None:
    """Greedy, unscripted: the small model's own answers, with the cache and without."""
    kept = Conversation(model, TOKENIZER, 700, think=think)
    for number, text in enumerate(("One?", "And two, then?", "Three!")):
        answered = [d.text for d in hear(kept, user(text), 9)]
        prompt = tokenize(TOKENIZER, render(kept.messages[:-1], think))
        fresh = list(spelled(TOKENIZER, generate(model, prompt, 9)))
        assert "".join(answered) == "".join(text for _, text in fresh)
        reused, computed = work(kept)
        if think == "none":  # the tokens said may be split otherwise than the text they spell
            assert reused + computed >= len(prompt)
        else:
            assert reused + computed == len(prompt)
        assert (reused > 0) == (number > 0)
        assert computed < len(prompt) or number == 0


def test_what_is_new_in_chat_mode_is_the_last_message(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 512, think="none")
    script(model, "fine" + EOS, "good" + EOS)
    hear(talk, user("How are you?"))
    held = len(tokenize(TOKENIZER, render(talk.messages[:-1], "none") + "fine"))
    hear(talk, user("And now?"))
    assert work(talk) == (held, len(tokenize(TOKENIZER, EOS + "<｜User｜>And now?<｜Assistant｜></think>")))


def test_what_is_new_in_thinking_mode_is_the_answer_without_its_reasoning(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 512)
    script(model, "a long line of thought</think>fine" + EOS, "</think>good" + EOS)
    hear(talk, user("How are you?"))
    hear(talk, user("And now?"))
    new = "<｜Assistant｜></think>fine" + EOS + "<｜User｜>And now?<｜Assistant｜><think>"
    assert work(talk)[1] == len(tokenize(TOKENIZER, new))
    assert "thought" not in render(talk.messages[:-1], "high")


def test_think_may_change_between_turns(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 512)
    script(model, "hm</think>a" + EOS, "b" + EOS, "so</think>c" + EOS)
    hear(talk, user("1"))
    talk.think = "none"
    hear(talk, user("2"))
    talk.think = "max"
    hear(talk, user("3"))
    assert [m["content"] for m in talk.messages[1::2]] == ["a", "b", "c"]
    assert [m["reasoning_content"] for m in talk.messages[1::2]] == ["hm", "", "so"]


def test_tools_are_called_and_their_results_read(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 1024, opening=with_tools([], [TOOL]))
    script(model, "look first" + CALL, "I see</think>blue" + EOS)
    deltas = hear(talk, user("What colour is the sea?"))
    assert [d.name for d in deltas if d.kind == "tool_call"] == ["look"]
    assert json.loads("".join(d.text for d in deltas if d.kind == "arguments")) == {"at": "sea"}
    (call,) = talk.messages[-1]["tool_calls"]
    hear(talk, [{"role": "tool", "tool_call_id": call["id"], "content": "blue water"}])
    assert talk.messages[-1]["content"] == "blue"
    prompt = render(talk.messages[:-1], "high")
    assert "<tool_result>blue water</tool_result>" in prompt and "look first" in prompt
    reused, computed = work(talk)
    assert reused and reused + computed == len(tokenize(TOKENIZER, prompt))


@pytest.mark.parametrize(
    ("said", "limit", "how", "content", "reasoning"),
    [
        ("thinking on and on", 3, "length", "", "thinking on and"),
        ("so</think>yes and no", 4, "length", "yes and", "so"),
        ("so</think>yes<think>", 9, "malformed", "yes", "so"),
        ("so<｜User｜>me", 9, "malformed", "", "so"),
    ],
)
def test_answers_that_are_cut_short_stay_as_far_as_they_came(
    model: Model, said: str, limit: int, how: str, content: str, reasoning: str
) -> None:
    talk = Conversation(model, TOKENIZER, 512)
    script(model, said, "fine</think>again" + EOS)
    hear(talk, user("Well?"), limit)
    assert end(talk).startswith(how)
    assert (talk.messages[-1]["content"], talk.messages[-1]["reasoning_content"]) == (content, reasoning)
    script(model, "</think>again" + EOS)
    hear(talk, user("Go on."))
    assert talk.messages[-1]["content"] == "again"


@pytest.mark.parametrize("value", ["[1,", "NaN", '{"a": 1, "a": 2}'])
def test_a_tool_call_whose_arguments_are_not_json_is_told_and_left_out(model: Model, value: str) -> None:
    """Sent back, it would be refused, and with it every later turn."""
    talk = Conversation(model, TOKENIZER, 1024, opening=with_tools([], [TOOL]))
    bad = CALL.replace('string="true">sea', f'string="false">{value}')
    script(model, "look" + bad, "</think>sorry" + EOS)
    hear(talk, user("Look!"))
    assert end(talk).startswith("malformed: tool_calls")
    assert talk.messages[-1]["tool_calls"] == []
    hear(talk, user("What?"))
    assert talk.messages[-1]["content"] == "sorry"


def test_a_tool_call_that_is_cut_short_is_left_out(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 1024, opening=with_tools([], [TOOL]))
    said = len(tokenize(TOKENIZER, "look" + CALL)) - 9
    script(model, "look" + CALL)
    hear(talk, user("Look!"), said)
    assert end(talk) == "length"
    assert talk.messages[-1]["tool_calls"] == [] and talk.messages[-1]["reasoning_content"] == "look"


def test_closing_an_answer_keeps_what_was_said(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 512, think="none")
    script(model, "one two three four" + EOS)
    with contextlib.closing(talk.say(user("Count."), 99, Sampling())) as deltas:
        heard = next(deltas).text + next(deltas).text
    assert end(talk) == "interrupted"
    assert talk.messages[-1]["content"] == heard
    script(model, "five" + EOS)
    hear(talk, user("Go on."))
    prompt = tokenize(TOKENIZER, render(talk.messages[:-1], "none"))
    reused, computed = work(talk)
    assert reused + computed == len(prompt) and computed < 9


@pytest.mark.parametrize("think", ["none", "high"])
@pytest.mark.parametrize("step", range(1, 6))
def test_an_interrupt_in_any_step_leaves_a_sound_conversation(model: Model, step: int, think: str) -> None:
    """The next turn answers as a new conversation would, whether reading or answering was interrupted, and where."""
    talk = Conversation(model, TOKENIZER, 512, think=think)
    hear(talk, user("One?"), 3)
    steps, run = 0, model.ops.linear

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 40 * step:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    before = list(talk.messages)
    model.ops.linear = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        hear(talk, user("Two?"), 30)
    model.ops.linear = run  # type: ignore[method-assign]
    assert talk.messages[: len(before)] == before
    assert len(talk.messages) in (len(before), len(before) + 2)
    answered = "".join(d.text for d in hear(talk, user("Three?"), 6))
    prompt = tokenize(TOKENIZER, render(talk.messages[:-1], think))
    assert answered == "".join(text for _, text in spelled(TOKENIZER, generate(model, prompt, 6)))


def test_a_message_that_does_not_fit_changes_nothing(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 40)
    script(model, "</think>ok" + EOS)
    hear(talk, user("Hi"))
    before, held = list(talk.messages), talk.prompts.cache.lengths
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens, and the context holds 40"):
        hear(talk, user("word " * 50))
    assert talk.messages == before and talk.prompts.cache.lengths == held
    script(model, "</think>yes" + EOS)
    hear(talk, user("Still there?"))
    assert talk.messages[-1]["content"] == "yes"


def test_an_answer_ends_where_the_context_does(model: Model) -> None:
    talk = Conversation(model, TOKENIZER, 16, think="none")
    script(model, "word " * 40)
    hear(talk, user("Hi"))
    assert end(talk) == "context"
    assert talk.turn is not None and talk.turn.computed + talk.turn.answer.made == 16


TOKENS = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", EOS, "｜DSML｜", "</tool_result>", "<｜action｜>"]


@pytest.mark.parametrize("token", TOKENS)
def test_protocol_tokens_in_a_message_are_refused_or_escaped(model: Model, token: str) -> None:
    talk = Conversation(model, TOKENIZER, 512)
    before = list(talk.messages)
    with pytest.raises(
        ValueError, match=r"user's message: content holds the protocol token .* at character 4; with --protocol"
    ):
        hear(talk, user(f"say {token} now"))
    assert talk.messages == before
    talk.escape = True
    script(model, "</think>no" + EOS)
    hear(talk, user(f"say {token} now"))
    sent = talk.messages[-2]["content"]
    assert token not in sent and sent.replace("\u200b", "") == f"say {token} now"


def places(token: str) -> Iterable[dict[str, Any]]:
    yield {"role": "tool", "content": token}
    yield {"role": "user", "content": [{"type": "text", "text": token}]}
    yield {"role": "assistant", "content": "", "reasoning_content": token}
    yield {"role": "system", "content": "", "tools": [{"function": {"name": "f", "description": token}}]}
    yield {"role": "system", "content": "", "tools": [{"function": {"name": "f", "parameters": {token: 1}}}]}
    escaped = json.dumps({"a": token}).replace("<", "\\u003c")
    yield {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": escaped}}]}


@pytest.mark.parametrize("message", list(places("<｜User｜>")))
def test_no_place_of_a_message_is_overlooked(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="protocol token <｜User｜>"):
        guarded(message, escape=False)
    assert "<｜User｜>" not in json.dumps(guarded(message, escape=True), ensure_ascii=False)


def test_sound_messages_are_left_alone() -> None:
    arguments = '{"a":  1e2, "b": "é"}'
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert guarded(message, escape=True) == message


def test_tools_beside_messages() -> None:
    assert with_tools([], []) == []
    assert with_tools(user("x"), [TOOL])[0] == {"role": "system", "content": "", "tools": [TOOL]}
    system = {"role": "system", "content": "s"}
    assert with_tools([system], [TOOL]) == [{**system, "tools": [TOOL]}]
    with pytest.raises(ValueError, match="not both"):
        with_tools([{**system, "tools": []}], [TOOL])


SEAMS = [
    [{"role": "system", "content": "a<｜Us"}, {"role": "system", "content": "er｜>evil"}, *user("x")],
    [{"role": "user", "content": "x<thi"}, {"role": "system", "content": "nk>y"}, *user("x")],
    [{"role": "system", "content": "<thi"}, {"role": "assistant", "content": "nk>y"}, *user("x")],
    [*({"role": "system", "content": text} for text in ("</thi", "", "n", "k>")), *user("x")],
    [{"role": "system", "content": [{"type": "text", "text": t} for t in ("a", "<thi")]},
     {"role": "system", "content": "nk>"}, *user("x")],
]  # fmt: skip


@pytest.mark.parametrize("messages", SEAMS)
def test_messages_make_no_token_where_they_meet(messages: list[dict[str, Any]]) -> None:
    safe = [guarded(m, escape=False) for m in messages]
    with pytest.raises(ValueError, match=r"two messages, one after the other, make the protocol token"):
        render(safe, "high")


def test_texts_that_meet_are_fine_otherwise() -> None:
    messages = [
        {"role": "system", "content": "a <"},
        {"role": "system", "content": "b> c"},
        *user("<thi"),
        *user("nk>"),
    ]
    assert "a <b> c<｜User｜><thi\n\nnk><｜Assistant｜>" in render(messages, "high")


@pytest.mark.parametrize("place", ["parameters", "response_format"])
def test_only_the_arguments_of_calls_are_read_as_json(place: str) -> None:
    twice = '{"a": "</think>", "a": 1}'
    schema = {"function": {"arguments": twice}}
    message = {"role": "system", "content": "", "response_format": schema}
    if place == "parameters":
        message = {"role": "system", "content": "", "tools": [{"function": {"name": "f", "parameters": schema}}]}
    with pytest.raises(ValueError, match="protocol token </think>"):
        guarded(message, escape=False)
    plain = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": '{"function.arguments": "x"}'}}],
    }
    assert guarded(plain, escape=False) == plain


@pytest.mark.parametrize("messages", [
    [], [*user("x"), {"role": "assistant", "content": "y"}], [{"role": "system", "content": "x"}],
    [{"role": "latest_reminder", "content": "x"}],
])  # fmt: skip
def test_nothing_to_answer(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"awaits no answer|has no messages"):
        render(messages, "high")
    with pytest.raises(ValueError, match="think must be none, high, max, got 'hard'"):
        render(user("x"), "hard")


def test_an_unread_prompt_has_no_answer(model: Model) -> None:
    with pytest.raises(ValueError, match="no prompt was read"):
        next(PromptCache(model, TOKENIZER, 64).answer(5, Sampling()))
