"""DeepSeek-V4, written once against an abstract ops contract; backends chosen at run time and cross-checked.

>>> import dsv4_hal
>>> model = dsv4_hal.load_model("checkpoint", backend="reference", mode="deployed")
>>> cache = model.new_cache(batch_size=1, max_seq_len=512)
>>> logits = model(tokens, cache)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if "torch" not in sys.modules:
    # A vendor's package that torch would load with itself may be broken, and torch would not import then. Backends
    # import theirs when they are asked for.
    _autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    import torch

    if _autoload is None:
        del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    else:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload

import torch

from dsv4_hal.backend import BackendError
from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import resolve, select
from dsv4_hal.numerics import numerics_for
from dsv4_hal.registry import BackendInfo, backend_class, list_backends

if TYPE_CHECKING:
    from dsv4_hal.model.transformer import Model

__version__ = "0.1.0"


def load_model(
    model: str | os.PathLike[str],
    backend: str | Sequence[str] = "auto",
    mode: str = "deployed",
    *,
    ops: Mapping[str, str | Sequence[str]] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shared_expert_clamp: bool = True,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A checkpoint in the official format, ready to run.

    model     checkpoint directory; or the name of a preset, whose shapes run on the backend `null`
    backend   registered name, or several in order of preference; "auto": the first that can be used here (see
              `list_backends`). Ops that they leave open run on the reference
    mode      "deployed": the published inference numerics; "exact": no quantisation of activations or cache rows,
              computed in `dtype` (default float32) whatever the checkpoint stores
    ops       op or family of ops -> backends in the order to try for it, and no others
    device    torch device, default the backend's
    shared_expert_clamp  whether swiglu_limit also holds for the shared expert
    strict    refuse to run an op on another backend than the one asked for
    progress  called with (bytes placed, bytes in all) while weights are loaded

    BackendError if a backend that is named cannot be used, `ConfigError` or `CheckpointError` (ValueErrors that name
    file and key or tensor) if the checkpoint is not sound. Weights stay in their stored form, mapped from the files
    where they can be. `model.ops.resolutions` says what runs where, and why.
    """
    from dsv4_hal.model.checkpoint import load_weights, read_metadata
    from dsv4_hal.model.config import find_config
    from dsv4_hal.model.transformer import Model
    from dsv4_hal.model.weights import shapes_only

    cfg, directory = find_config(model)
    names = [backend] if isinstance(backend, str) else backend
    chosen = select(names, numerics_for(mode, dtype), vars(cfg), prefer=ops, device=device, strict=strict)
    if directory is not None:
        weights = load_weights(directory, cfg, place=chosen.repack, device=chosen.device, progress=progress)
        return Model(cfg, chosen, weights, shared_expert_clamp, read_metadata(directory))
    if chosen.device.type != "meta":
        raise ValueError(
            f"{model} is a preset: it has shapes but no weights, and {chosen.primary.name} needs some. Write random "
            f"ones with `dsv4-hal init --preset {model} --out DIR`, or use the backend null"
        )
    return Model(cfg, chosen, shapes_only(cfg, place=chosen.repack), shared_expert_clamp)


__all__ = ["BackendError", "BackendInfo", "Batch", "backend_class", "list_backends", "load_model", "resolve", "select"]
