"""Tokens out of a model: prefill the prompt in chunks, then one token a step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from dsv4_hal.model.cache import Cache
from dsv4_hal.model.transformer import Model

CHUNK = 512  # prompt tokens per step: long enough for full products, short enough to bound scratch and window ring

SHAPES_ONLY = "this backend computes shapes, not values: it cannot generate text"


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
    check_sampling(temperature, top_p)
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
    if model.ops.device.type == "meta":
        raise ValueError(SHAPES_ONLY)
    generator = torch.Generator(device=model.ops.device).manual_seed(seed)
    cache = model.new_cache(1, total, max_chunk=CHUNK)
    *chunks, last = torch.tensor([prompt]).split(CHUNK, dim=1)
    for chunk in chunks:
        _forward(model, chunk, cache)
    step = last
    for made in range(max_new_tokens):
        logits = _forward(model, step, cache)
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"logits are not finite after {len(prompt) + made} tokens: damaged weights?")
        token = int(model.ops.sample(logits, temperature, top_p, generator))
        if token in stop:
            return
        yield token
        step = torch.tensor([[token]])


def check_sampling(temperature: float, top_p: float) -> None:
    """ValueError unless 0 <= temperature < infinity and 0 < top_p <= 1."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be zero or positive, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


@torch.inference_mode()  # around each step only: a generator that is suspended must not hold a mode of the thread
def _forward(model: Model, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Append tokens [1, S]; logits [1, V] of the last."""
    logits = model(tokens, cache, logits_to_keep=1)[:, -1]
    if logits.is_meta:
        raise ValueError(SHAPES_ONLY)
    return logits
