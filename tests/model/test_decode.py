"""Steps of one shape give the logits of ordinary steps, from the same addresses every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dsv4_hal
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.decode import ALIGNMENT, Decoder, tensors
from dsv4_hal.model.transformer import Model

PROMPTS = (126, 3, 61)  # the next steps complete entries of ratio 128 and of ratio 4, each sequence at its own time


@pytest.fixture(params=["exact", "deployed"])
def model(request: pytest.FixtureRequest, small_model: Callable[..., Model], tiny_dir: Path) -> Model:
    return small_model() if request.param == "exact" else dsv4_hal.load_model(tiny_dir, "reference", mode="deployed")


def prefilled(model: Model) -> Cache:
    cache = model.new_cache(len(PROMPTS), 256, max_chunk=128)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.vocab_size, (sum(PROMPTS),), generator=generator)
    with torch.inference_mode():
        model.step(tokens, cache.batch(PROMPTS), cache)
    return cache


def test_logits_are_those_of_ordinary_steps(model: Model) -> None:
    ordinary, steady = prefilled(model), prefilled(model)
    decoder, tokens = Decoder(model, steady), torch.tensor([5, 6, 7])
    for _ in range(6):
        with torch.inference_mode():
            want = model.step(tokens, ordinary.batch([1, 1, 1]), ordinary)
        got = decoder(tokens)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        tokens = got.argmax(-1)
    assert ordinary.lengths == steady.lengths == tuple(n + 6 for n in PROMPTS)
    for one, other in zip(ordinary.layers, steady.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(vars(one)), tensors(vars(other)), strict=True))


def test_some_sequences_decode_and_the_others_stay(small_model: Callable[..., Model]) -> None:
    model = small_model()
    cache, apart = prefilled(model), prefilled(model)
    decoder = Decoder(model, cache, [2, 0])
    for token in range(4):
        got = decoder(torch.tensor([token, token + 1]))
        with torch.inference_mode():
            want = model.step(torch.tensor([token]), apart.batch([1], [2]), apart)
        torch.testing.assert_close(got[:1], want, rtol=1e-5, atol=1e-5)
    assert cache.lengths == (130, 3, 65)


def test_what_a_step_reads_stays_where_it_is(model: Model) -> None:
    decoder = Decoder(model, prefilled(model))
    decoder(torch.tensor([5, 6, 7]))
    places = [(t.data_ptr(), t.shape, t.dtype) for t in tensors([decoder.batch, decoder.batch.plan])]
    assert len(places) > 20 and all(place % ALIGNMENT == 0 for place, _, _ in places)
    for _ in range(5):
        decoder(torch.tensor([5, 6, 7]))
        assert places == [(t.data_ptr(), t.shape, t.dtype) for t in tensors([decoder.batch, decoder.batch.plan])]


def test_room_for_an_entry_is_not_an_entry(model: Model) -> None:
    """Nothing is written for an entry that a step might have completed: neither its row nor any other."""
    decoder = Decoder(model, prefilled(model), [1])  # of 3 tokens: the next completes an entry, the one after does not
    decoder(torch.tensor([5]))
    layer = next(layer for layer in decoder.cache.layers if layer.keys is not None)
    before = layer.entries.data.clone(), layer.keys.data.clone()
    decoder(torch.tensor([5]))
    assert decoder.batch.plan.entries[4].index.tolist() == [-1] and decoder.batch.plan.write[4][1].tolist() == [-1]
    assert torch.equal(layer.entries.data, before[0]) and torch.equal(layer.keys.data, before[1])


def test_bad_input(small_model: Callable[..., Model]) -> None:
    model = small_model()
    cache = model.new_cache(2, 8)
    decoder = Decoder(model, cache)
    with pytest.raises(ValueError, match=r"tokens \(3,\) for a batch of 2"):
        decoder(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"token ids 1..96 outside the vocabulary of 96"):
        decoder(torch.tensor([1, 96]))
    for _ in range(8):
        decoder(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="more tokens than the cache's max_seq_len=8"):
        decoder(torch.tensor([1, 2]))
    assert cache.lengths == (8, 8)
