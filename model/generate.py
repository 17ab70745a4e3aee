"""Tokens out of a model: prefill the prompt in chunks, then one token a step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from dsv4_hal.model.transformer import Model

CHUNK = 512  # prompt tokens per step: long enough for full products, short enough to bound scratch and window ring


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
    ops = model.ops
    if ops.device.type == "meta":
        raise ValueError("this backend computes shapes, not values: it cannot generate text")
    generator = torch.Generator(device=ops.device).manual_seed(seed)
    with torch.inference_mode():
        cache = model.new_cache(1, total, max_chunk=CHUNK)
        tokens = torch.tensor([prompt])
        for chunk in tokens.split(CHUNK, dim=1):
            logits = model(chunk, cache, logits_to_keep=1)
        for made in range(max_new_tokens):
            if not torch.isfinite(logits).all():
                raise FloatingPointError(f"logits are not finite after {len(prompt) + made} tokens: damaged weights?")
            token = int(ops.sample(logits[:, -1], temperature, top_p, generator))
            if token in stop:
                return
            yield token
            if made + 1 < max_new_tokens:
                logits = model(torch.tensor([[token]]), cache)
