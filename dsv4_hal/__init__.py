"""DeepSeek-V4, written once against an abstract ops contract; backends chosen at run time and cross-checked.

>>> import dsv4_hal
>>> model = dsv4_hal.load_model("checkpoint", backend="reference", mode="deployed")
>>> cache = model.new_cache(batch_size=1, max_seq_len=512)
>>> logits = model(tokens, cache)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from dsv4_hal.backend import BackendError
from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import BackendInfo, backend_class, list_backends, resolve
from dsv4_hal.numerics import numerics_for

if TYPE_CHECKING:
    from dsv4_hal.model.transformer import Model

__version__ = "0.1.0"


def load_model(
    directory: str | os.PathLike[str],
    backend: str = "reference",
    mode: str = "deployed",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shared_expert_clamp: bool = True,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A checkpoint in the official format, ready to run.

    backend   registered name; see `list_backends`
    mode      "deployed": the published inference numerics; "exact": no quantisation of activations or cache rows,
              computed in `dtype` (default float32) whatever the checkpoint stores
    device    torch device, default the backend's
    shared_expert_clamp  whether swiglu_limit also holds for the shared expert
    strict    refuse a backend that would leave an op to another
    progress  called with (bytes placed, bytes in all) while weights are loaded

    BackendError if the backend cannot be used, `ConfigError` or `CheckpointError` (ValueErrors that name file and
    key or tensor) if the checkpoint is not sound. Weights stay in their stored form, mapped from the files where
    they can be.
    """
    from dsv4_hal.model.checkpoint import load_weights, read_metadata
    from dsv4_hal.model.config import load_config
    from dsv4_hal.model.transformer import Model

    cls = backend_class(backend)
    chosen = cls(numerics_for(mode, dtype), device)
    cfg = load_config(directory)
    ops = resolve([chosen], vars(cfg), strict=strict)
    weights = load_weights(directory, cfg, place=ops.repack, device=ops.device, progress=progress)
    return Model(cfg, ops, weights, shared_expert_clamp, read_metadata(directory))


__all__ = ["BackendError", "BackendInfo", "Batch", "list_backends", "load_model"]
