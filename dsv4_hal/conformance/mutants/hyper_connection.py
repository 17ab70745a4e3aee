"""Wrong hyper-connections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant


@mutant("mHC: comb is transposed", "hc_post")
def comb_transposed(right: Any, self: Any, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return right.hc_post(self, y, streams, post, comb.transpose(1, 2))


@mutant("mHC: Sinkhorn stops one iteration short", "hc_pre")
def sinkhorn_short(
    right: Any, self: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, *args: Any
) -> Any:
    return right.hc_pre(self, streams, fn, base, scale, max(1, iters - 1), *args)


@mutant("mHC: post lacks its factor 2", "hc_pre")
def post_without_two(right: Any, self: Any, *args: Any) -> Any:
    x, post, comb = right.hc_pre(self, *args)
    return x, post / 2, comb


@mutant("mHC: the scale of the head's logits is forgotten", "hc_head")
def head_scale_forgotten(
    right: Any, self: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *args: Any
) -> Tensor:
    return right.hc_head(self, streams, fn, base, torch.ones_like(scale), *args)
