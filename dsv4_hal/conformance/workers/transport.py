"""Results as plain bytes, from the process that made them to the one that judges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A tensor: its bytes in order (none on the meta device), dtype, shape, strides, and device type."""

    data: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str


def pack(results: Mapping[str, Tensor]) -> dict[str, Packed]:
    """TypeError where one is no tensor."""
    for name, t in results.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: returned {_told(t)}, expected a tensor")
    return {
        name: Packed(_bytes(t), t.dtype, tuple(t.shape), tuple(t.stride()), t.device.type)
        for name, t in results.items()
    }


def unpack(results: Mapping[str, Packed]) -> dict[str, Tensor]:
    """The tensors, with the strides they had; on the CPU, but for those of the meta device."""
    return {name: _tensor(packed) for name, packed in results.items()}


def _told(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _bytes(t: Tensor) -> bytes:
    if t.is_meta or not t.numel():
        return b""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(packed: Packed) -> Tensor:
    if packed.device == "meta":
        return torch.empty_strided(packed.shape, packed.strides, dtype=packed.dtype, device="meta")
    plain = torch.tensor(np.frombuffer(packed.data, np.uint8)).view(packed.dtype).view(packed.shape)
    if packed.strides == plain.stride():
        return plain
    return _strided(plain, packed.strides)


def _strided(plain: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values with these strides, by which elements may share memory, as those of `expand` do."""
    if not plain.numel():
        return torch.empty_strided(plain.shape, strides, dtype=plain.dtype)
    places = torch.zeros(plain.shape, dtype=torch.int64)
    for dim, (length, stride) in enumerate(zip(plain.shape, strides, strict=True)):
        places += (torch.arange(length) * stride).view(-1, *[1] * (plain.dim() - dim - 1))
    memory = torch.zeros(int(places.max()) + 1, plain.itemsize, dtype=torch.uint8)
    memory[places.flatten()] = plain.reshape(-1).view(torch.uint8).view(-1, plain.itemsize)
    return memory.view(-1).view(plain.dtype).as_strided(plain.shape, strides)
