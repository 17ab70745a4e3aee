"""Inverse frequencies of the two rotary embeddings.

"short" turns the layers that only have a window: base rope_theta, never stretched. "long" turns everything in layers
with compressed entries (queries, window rows, entries, indexer): base compress_rope_theta, stretched by YaRN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_hal.model.config import ModelConfig


def rope_name(ratio: int) -> str:
    return "long" if ratio else "short"


def inverse_frequencies(cfg: ModelConfig) -> dict[str, Tensor]:
    """Name -> [qk_rope_head_dim / 2] float32. Source: the published configuration; YaRN (arXiv 2309.00071)."""
    n = cfg.qk_rope_head_dim
    exponent = torch.arange(0, n, 2, dtype=torch.float32) / n
    short, long = cfg.rope_theta**-exponent, cfg.compress_rope_theta**-exponent
    yarn = cfg.rope_scaling
    if yarn is not None:

        def channel(rotations: float) -> float:
            """The channel that turns this often within the original context."""
            original = yarn.original_max_position_embeddings
            return n * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(cfg.compress_rope_theta))

        low = max(math.floor(channel(yarn.beta_fast)), 0)
        high = min(math.ceil(channel(yarn.beta_slow)), n - 1)
        ramp = ((torch.arange(n // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
        long = long / yarn.factor * ramp + long * (1 - ramp)
    return {"short": short, "long": long}
