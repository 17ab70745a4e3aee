"""What travels through the layers beside the streams: tokens, batch, cache, and what to record or replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.model.cache import Cache, LayerCache


@dataclass
class Trace:
    """Values seen on the way, by name, and choices to repeat.

    record  keep every named value in `seen`: layers.i.in and head.in (residual streams), layers.i.attn.{in, out,
            index_picks, index_scores}, layers.i.ffn.{in, out, experts}, and the last two under mtp.0
    replay  name -> experts [T, k] or index_picks [T, k] to use instead of the model's own choice; the own choice is
            still made and seen where `record` is set
    """

    record: bool = False
    replay: Mapping[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)

    def see(self, name: str, value: Tensor) -> Tensor:
        if self.record:
            self.seen[name] = value
        return value


@dataclass
class Step:
    """One pass over the flat tokens [T] of a planned batch."""

    tokens: Tensor
    batch: Batch
    cache: Cache | None = None
    trace: Trace = field(default_factory=Trace)

    def layer(self, index: int) -> LayerCache:
        """The layer's pools; all None without a cache."""
        return LayerCache() if self.cache is None else self.cache.layers[index]
