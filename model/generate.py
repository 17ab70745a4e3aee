"""Tokens out of a model: prefill the prompt in chunks, then one token a step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_hal.model.cache import Cache
from dsv4_hal.model.transformer import Model

CHUNK = 512  # prompt tokens per step: long enough for full products, short enough to bound scratch and window ring

SHAPES_ONLY = "this backend computes shapes, not values: it cannot generate text"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; otherwise with a generator of this seed, from the likeliest tokens
    up to probability `top_p`. ValueError unless 0 <= temperature < infinity and 0 < top_p <= 1."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be zero or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


def generate(
    model: Model,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """New tokens, as they are made; a token of `stop` ends the text and is not given out.

    temperature 0 is greedy; otherwise drawn with a generator of this seed. ValueError for an empty prompt, or where
    prompt and new tokens exceed the model's positions; FloatingPointError if the model's logits are not finite.
    """
    sampling = Sampling(temperature, top_p, seed)
    prompt = [int(token) for token in prompt]
    if not prompt:
        raise ValueError("the prompt has no tokens")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    total = len(prompt) + max_new_tokens
    if total > model.cfg.max_position_embeddings:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{model.cfg.max_position_embeddings} positions"
        )
    cache = model.new_cache(1, total, max_chunk=CHUNK)
    logits = prefill(model, cache, prompt)
    for token in decode(model, cache, logits, max_new_tokens, sampling):
        if token in stop:
            return
        yield token


def prefill(model: Model, cache: Cache, tokens: Sequence[int], sequence: int = 0) -> Tensor:
    """Append tokens (at least one) to a sequence of the cache, in chunks; logits [1, V] of the last."""
    if model.ops.device.type == "meta":
        raise ValueError(SHAPES_ONLY)
    logits = torch.empty(0)
    for chunk in torch.tensor(tokens, dtype=torch.int64).split(min(CHUNK, cache.max_chunk)):
        logits = _append(model, cache, chunk, sequence)
    return logits


def decode(
    model: Model, cache: Cache, logits: Tensor, max_new_tokens: int, sampling: Sampling, sequence: int = 0
) -> Iterator[int]:
    """Tokens drawn from `logits` [1, V] and onwards, at most max_new_tokens.

    The cache holds a token once the next one is asked for: never the last one given out.
    FloatingPointError if logits are not finite.
    """
    generator = torch.Generator(device=model.ops.device).manual_seed(sampling.seed)
    drawn = torch.empty(0, dtype=torch.int64)
    for made in range(max_new_tokens):
        if made:
            logits = _append(model, cache, drawn, sequence)
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"logits are not finite after {cache.lengths[sequence]} tokens: damaged weights?")
        drawn = model.ops.sample(logits, sampling.temperature, sampling.top_p, generator).cpu()
        yield int(drawn)


@torch.inference_mode()  # around each step only: a generator that is suspended must not hold a mode of the thread
def _append(model: Model, cache: Cache, tokens: Tensor, sequence: int) -> Tensor:
    """Append tokens [S] to a sequence; logits [1, V] of the last."""
    last = None if len(tokens) == 1 else torch.tensor([len(tokens) - 1])
    return model.step(tokens, cache.batch([len(tokens)], [sequence]), cache, rows=last)
