"""Whether a step can be captured and run again: it never waits for its device, and is the same work every time.

    with Steady() as first:
        decoder(tokens)
    with Steady() as second:
        decoder(tokens)
    second.require(first)

A captured step replays the kernels it was captured with, on the same addresses, with the same numbers in their
arguments: what a host computes anew is silently frozen. So every torch operation must come again, with the same shapes,
dtypes and numbers; then the memory that a capture sets aside for results serves every later step, and nothing is
allocated. Kernels that a backend launches past torch are its own to watch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
WAITS = {  # their result, or its shape, is known to the host only once the device is done
    _ATEN._local_scalar_dense: "item()",
    _ATEN.nonzero: "nonzero()",
    _ATEN.masked_select: "masked_select()",
    _ATEN.equal: "equal()",
    _ATEN._unique2: "unique()",
    _ATEN.bincount: "bincount()",
    _ATEN.repeat_interleave: "repeat_interleave() by a tensor",
}
_INDEXED = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_)


class NotSteady(RuntimeError):
    """A step cannot be captured. The message names the operation."""


class Steady(TorchDispatchMode):
    """Watches the torch operations of a step; NotSteady at the first that waits for the device.

    seen  every operation in order, with shapes and dtypes of its tensors and with its numbers
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        told = f"{func}({_told([args, kwargs or {}])})"
        packet = func.overloadpacket
        if packet in WAITS:
            raise NotSteady(f"{WAITS[packet]} waits for the device: {told}")
        if packet in _INDEXED and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            raise NotSteady(f"an index of booleans waits for the device, which knows how many are true: {told}")
        self.seen.append(told)
        return func(*args, **(kwargs or {}))

    def require(self, before: Steady) -> None:
        """NotSteady unless this step consists of the same operations as the one before it."""
        for number, (was, now) in enumerate(zip(before.seen, self.seen, strict=False)):
            if was != now:
                raise NotSteady(f"operation {number} is {now}, and was {was} in the step before")
        if len(before.seen) != len(self.seen):
            raise NotSteady(f"{len(self.seen)} operations, and {len(before.seen)} in the step before")


def _told(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"{str(thing.dtype).removeprefix('torch.')}{list(thing.shape)}"
    if isinstance(thing, list | tuple):
        return "[" + ", ".join(map(_told, thing)) + "]"
    if isinstance(thing, dict):
        return "{" + ", ".join(f"{name}: {_told(value)}" for name, value in thing.items()) + "}"
    return type(thing).__name__ if isinstance(thing, torch.UntypedStorage) else str(thing)
