"""Random lives of a cache (steps, failures, truncation, forks) against one shot, with rings of exactly the size needed.

Blocks of one row leave no slack for a ring that is too short, a high-water mark that forgets, or a fork that loses it.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dsv4_hal.model import cache as caches
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.transformer import Model
from dsv4_hal.ops import KV

SEQUENCES, STEPS = 3, 40


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Model]) -> Model:
    return small_model()


def poisoned(cache: Cache, rng: np.random.Generator) -> Cache:
    for name in ("window_table", "token_table"):
        table = getattr(cache, name)
        setattr(cache, name, rng.permutation(table.size).reshape(table.shape))
    for layer in cache.layers:
        for held in vars(layer).values():
            if held is not None:
                data = held.data if isinstance(held, KV) else held
                data.fill_(255 if data.dtype == torch.uint8 else float("nan"))
    return cache


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(s, marks=pytest.mark.full) for s in range(4, 60))])
@patch.object(caches, "WINDOW_BLOCK", 1)
def test_a_random_life(model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    room, chunk, rollback = (int(rng.choice(c)) for c in ([60, 200, 330], [5, 20, 60], [0, 1, 3, 17, 40, 150]))
    cache = poisoned(model.new_cache(SEQUENCES, room, max_chunk=chunk, rollback=rollback), rng)
    lives: list[list[int]] = [[] for _ in range(SEQUENCES)]
    checked = 0
    with torch.inference_mode():
        for _ in range(STEPS):
            kind = rng.choice(["step", "truncate", "fork", "fail"], p=[0.65, 0.2, 0.08, 0.07])
            one, other = (int(s) for s in rng.integers(SEQUENCES, size=2))
            if kind == "truncate":
                least = int(max(0, cache._written[one] - rollback))
                if least <= len(lives[one]):
                    length = int(rng.integers(least, len(lives[one]) + 1))
                    cache.truncate(length, one)
                    lives[one] = lives[one][:length]
            elif kind == "fork":
                cache.fork(one, other)
                lives[other] = list(lives[one])
            else:
                chosen = [int(s) for s in rng.permutation(SEQUENCES)[: int(rng.integers(1, SEQUENCES + 1))]]
                new = [rng.integers(96, size=min(int(rng.integers(chunk + 1)), room - len(lives[s]))) for s in chosen]
                try:
                    batch = cache.batch([len(t) for t in new], chosen)
                except ValueError as error:
                    assert "left in the middle" in str(error)
                    for s in chosen:
                        cache.truncate(0, s)
                        lives[s] = []
                    continue
                flat = torch.from_numpy(np.concatenate(new))
                if kind == "fail":
                    with patch.object(model.layers[2], "ffn", None), pytest.raises(TypeError):
                        model.step(flat, batch, cache)
                    continue
                logits = model.step(flat, batch, cache)
                for s, tokens, start in zip(chosen, new, batch.starts, strict=True):
                    lives[s] += tokens.tolist()
                    if len(tokens):
                        want = model(torch.tensor([lives[s]]))[0, -len(tokens) :]
                        got = logits[start : start + len(tokens)]
                        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
                        checked += 1
    assert checked > 5
    assert cache.lengths == tuple(map(len, lives))
