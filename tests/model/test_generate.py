"""Tokens and text out of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dsv4_hal.model import generate as generation
from dsv4_hal.model.generate import generate
from dsv4_hal.model.tokenizer import TextStream, encode, load_tokenizer
from dsv4_hal.model.transformer import Model

VOCABULARY = 129280


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Model]) -> Model:
    return small_model()


def test_greedy_is_the_argmax_of_the_whole_text_each_time(model: Model) -> None:
    prompt = [0, 17, 5, 44, 9]
    got = list(generate(model, prompt, 8))
    text = list(prompt)
    for token in got:
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text.append(token)


def test_long_prompts_go_in_chunks(model: Model) -> None:
    prompt = torch.randint(96, (150,), generator=torch.Generator().manual_seed(4)).tolist()
    want = list(generate(model, prompt, 4))
    with patch.object(generation, "CHUNK", 64):
        assert list(generate(model, prompt, 4)) == want


def test_stop_ends_the_text_and_is_not_given_out(model: Model) -> None:
    free = list(generate(model, [0, 17], 10, temperature=1.0, seed=3))
    stop = free[4]
    assert list(generate(model, [0, 17], 10, temperature=1.0, seed=3, stop={stop})) == free[: free.index(stop)]


def test_seeds(model: Model) -> None:
    draws = [list(generate(model, [0], 12, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_refusals(model: Model) -> None:
    for prompt, count, text in (([], 1, "no tokens"), ([0], 0, "at least 1"), ([0] * 4000, 100, "4096 positions")):
        with pytest.raises(ValueError, match=text):
            list(generate(model, prompt, count))


def test_damaged_weights_do_not_become_text(model: Model) -> None:
    spoiled = dict(model.weights)
    head = spoiled["head"]
    spoiled["head"] = replace(head, data=head.data.clone().index_fill_(0, torch.tensor([3]), float("nan")))
    with pytest.raises(FloatingPointError, match="not finite after 1 tokens"):
        list(generate(Model(model.cfg, model.ops, spoiled), [0], 3))


def test_official_tokenizer_and_text_of_every_split(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, VOCABULARY)
    text = "naïve 海は深い 👩‍🚀 <think>x</think>"
    ids = encode(tokenizer, text, bos=0)
    assert ids[0] == 0
    assert encode(tokenizer, tokenizer.decode(ids, skip_special_tokens=False), bos=0) == ids
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids[1:]), stream.rest()]) == text
    cut = TextStream(tokenizer)
    emoji = encode(tokenizer, "👩‍🚀", bos=0)[1:]
    shown = "".join(map(cut.push, emoji[:1]))
    assert "�" not in shown
    assert shown + cut.rest() == tokenizer.decode(emoji[:1], skip_special_tokens=False)


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model's vocabulary 500"):
        load_tokenizer(tmp_path, 500)
    with (
        patch("dsv4_hal.model.tokenizer.find_spec", lambda _: None),
        pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist.*dsv4-hal\[tokenizer\]"),
    ):
        load_tokenizer(tmp_path, VOCABULARY)
    with pytest.raises(ValueError, match="not valid Unicode"):
        encode(load_tokenizer(tmp_path, VOCABULARY), "\ud800", bos=0)


def test_suspended_generators_leave_the_thread_alone(model: Model) -> None:
    pairs = list(zip(generate(model, [0, 1], 4), generate(model, [0, 2], 4), strict=True))
    assert len(pairs) == 4
    assert not torch.is_inference_mode_enabled()
    for _ in generate(model, [0, 1], 2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-300}])
def test_extreme_sampling_takes_the_likeliest(model: Model, options: dict[str, float]) -> None:
    assert list(generate(model, [0, 5], 4, **options)) == list(generate(model, [0, 5], 4))
