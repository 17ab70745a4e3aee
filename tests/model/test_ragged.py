"""Chunked, mixed and ragged steps give what one shot gives, whatever lies in the pools and however blocks are dealt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_hal import Batch
from dsv4_hal.backends.reference import attention
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.transformer import Model
from dsv4_hal.ops import KV

LENGTHS = (300, 131, 5, 260)


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Model]) -> Model:
    return small_model()


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randint(96, (n,), generator=g) for n in LENGTHS]


@pytest.fixture(scope="module")
def one_shot(model: Model, tokens: list[Tensor]) -> list[Tensor]:
    """Logits of each sequence on its own."""
    with torch.inference_mode():
        return [model(t[None])[0] for t in tokens]


def poisoned(cache: Cache, seed: int = 0) -> Cache:
    """Pools and states full of NaN bytes, blocks dealt in random order."""
    rng = np.random.default_rng(seed)
    for name in ("window_table", "token_table"):
        table = getattr(cache, name)
        setattr(cache, name, rng.permutation(table.size).reshape(table.shape))
    for layer in cache.layers:
        for held in (layer.window, layer.entries, layer.keys):
            if isinstance(held, KV):
                held.data.fill_(255)
        for state in (layer.state, layer.index_state):
            if state is not None:
                state.fill_(float("nan"))
    return cache


def run(model: Model, cache: Cache, steps: list[dict[int, Tensor]], padding: int = 0) -> dict[int, Tensor]:
    """Feed each step's tokens by sequence; logits of all tokens by sequence."""
    out: dict[int, list[Tensor]] = {}
    with torch.inference_mode():
        for step in steps:
            batch = cache.batch([len(t) for t in step.values()], list(step), padding)
            flat = torch.cat([*step.values(), torch.zeros(padding, dtype=torch.int64)])
            logits = model.step(flat, batch, cache)
            for s, start, count in zip(step, batch.starts, batch.q_lens, strict=True):
                out.setdefault(s, []).append(logits[start : start + count])
    return {s: torch.cat(parts) for s, parts in out.items()}


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_packed_sequences_do_not_see_each_other(model: Model, tokens: list[Tensor], one_shot: list[Tensor]) -> None:
    with torch.inference_mode():
        logits = model.step(torch.cat(tokens), Batch.packed(LENGTHS))
    close(logits, torch.cat(one_shot))


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 64, 127, 128, 129, 300])
def test_chunks_of_any_size(model: Model, tokens: list[Tensor], one_shot: list[Tensor], chunk: int) -> None:
    cache = poisoned(model.new_cache(1, 300, max_chunk=chunk))
    got = run(model, cache, [{0: part} for part in tokens[0].split(chunk)])
    close(got[0], one_shot[0])


@pytest.mark.parametrize("seed", [3, *(pytest.param(s, marks=pytest.mark.full) for s in range(4, 40))])
def test_mixed_prefill_and_decode_with_padding(
    model: Model, tokens: list[Tensor], one_shot: list[Tensor], seed: int
) -> None:
    """Every step mixes sequences that decode, prefill a chunk, or rest; slots and order change from step to step."""
    rng = np.random.default_rng(seed)
    cache = poisoned(model.new_cache(4, 512, max_chunk=100, rollback=2))
    left, steps = dict(enumerate(tokens)), []
    while any(len(t) for t in left.values()):
        step = {}
        for s in rng.permutation(4):
            count = int(rng.choice([0, 1, 1, 2, 9, 37, 100]))
            step[int(s)], left[int(s)] = left[int(s)][:count], left[int(s)][count:]
        steps.append(step)
    got = run(model, cache, steps, padding=3)
    for s, want in enumerate(one_shot):
        close(got[s], want)


def test_a_reused_slot_sees_nothing_of_what_was_there(
    model: Model, tokens: list[Tensor], one_shot: list[Tensor]
) -> None:
    cache = poisoned(model.new_cache(2, 300))
    run(model, cache, [{0: tokens[3], 1: tokens[0]}])
    cache.truncate(0, 0)
    got = run(model, cache, [{0: part} for part in tokens[1].split(50)])
    close(got[0], one_shot[1])
    assert cache.lengths == (131, 300)


@pytest.mark.parametrize("back", [1, 4, 6])
def test_truncate_then_other_tokens(model: Model, tokens: list[Tensor], one_shot: list[Tensor], back: int) -> None:
    """As in speculative decoding: rejected drafts are cut off and other tokens take their place."""
    drafts = (tokens[0] + 1) % 96
    cache = poisoned(model.new_cache(1, 300 + 6, max_chunk=150, rollback=6))
    want, done, got = one_shot[0], 0, []
    sizes = [125, 1, 1, 1, 3, 120, 2, 47]
    for size in sizes:
        accepted = run(model, cache, [{0: tokens[0][done : done + size]}])[0]
        got.append(accepted)
        done += size
        run(model, cache, [{0: drafts[:back]}])
        cache.truncate(done)
    assert done == 300
    close(torch.cat(got), want)


def test_fork_goes_its_own_way(model: Model, tokens: list[Tensor], one_shot: list[Tensor]) -> None:
    cache = poisoned(model.new_cache(3, 320))
    run(model, cache, [{1: tokens[0][:141]}])
    cache.fork(1, 2)
    run(model, cache, [{1: tokens[3][:20]}])
    got = run(model, cache, [{2: tokens[0][141:]}])
    close(got[2], one_shot[0][141:])
    assert cache.lengths == (0, 161, 300)


def test_rectangular_call_appends_to_the_cache(model: Model, tokens: list[Tensor]) -> None:
    both = torch.stack([tokens[0][:200], tokens[3][:200]])
    with torch.inference_mode():
        want = model(both)
        cache = model.new_cache(2, 200)
        got = torch.cat([model(part, cache) for part in both.split([77, 1, 122], dim=1)], 1)
        close(got, want)
        close(model(both, logits_to_keep=1), want[:, -1:])
    assert cache.lengths == (200, 200)


@pytest.mark.parametrize(("scratch", "dense"), [(1, 4), (10_000, 4), (1 << 24, 10**9), (10_000, 10**9)])
def test_however_attention_cuts_its_work(
    model: Model,
    tokens: list[Tensor],
    one_shot: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    scratch: int,
    dense: int,
) -> None:
    """Blocks of one token or of 64, picked entries gathered or masked: the same definition."""
    monkeypatch.setattr(attention, "SCRATCH", scratch)
    monkeypatch.setattr(attention, "DENSE", dense)
    with torch.inference_mode():
        logits = model.step(torch.cat(tokens), Batch.packed(LENGTHS))
    close(logits, torch.cat(one_shot))


def test_empty_steps(model: Model) -> None:
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 96)
    assert model(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 96)
    cache = model.new_cache(2, 10)
    assert model.step(torch.zeros(0, dtype=torch.int64), cache.batch([0, 0]), cache).shape == (0, 96)
    assert cache.lengths == (0, 0)


@pytest.mark.parametrize(
    ("tokens_", "error", "text"),
    [
        (torch.tensor([[96]]), ValueError, "96 outside the vocabulary of 96"),
        (torch.tensor([[-1]]), ValueError, "outside the vocabulary"),
        (torch.tensor([1]), ValueError, r"must be a tensor \[B, S\]"),
        (torch.tensor([[1.0]]), TypeError, "must be int64"),
        (torch.tensor([[1, 2], [3, 4]]), ValueError, "2 rows of tokens for a cache of 1"),
        (torch.zeros(1, 11, dtype=torch.int64), ValueError, "max_chunk=10"),
    ],
)
def test_bad_input_leaves_the_cache_as_it_was(model: Model, tokens_: Tensor, error: type, text: str) -> None:
    cache = model.new_cache(1, 20, max_chunk=10)
    model(torch.tensor([[5, 6, 7]]), cache)
    with pytest.raises(error, match=text):
        model(tokens_, cache)
    assert cache.lengths == (3,)
    assert model(torch.tensor([[8]]), cache).isfinite().all()
