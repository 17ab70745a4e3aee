"""What passes from the process that runs a backend to the one that judges it: data, and results as plain bytes."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

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


class Foreign(Exception):
    """A message that is more than data: of classes whose modules it would load."""


def plain(message: bytes) -> Any:
    """What was sent: values of Python's own types, dtypes of torch, exceptions, and this package's dataclasses. Foreign
    for anything else: to unpickle it would load the module of whoever sent it, and run its code here."""
    try:
        return _Plain(io.BytesIO(message)).load()
    except Exception as error:
        raise Foreign(f"it sent what is no plain data: {type(error).__name__}: {error}") from error


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what is loaded here already, of the kinds that `plain` names."""
        found = getattr(sys.modules.get(module), name, None)
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        ours = module == "builtins" or module.partition(".")[0] == "dsv4_hal"
        if ours and isinstance(found, type) and (issubclass(found, Exception) or is_dataclass(found)):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


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


def octets(t: Tensor) -> Tensor:
    """The bytes of a tensor's elements in order, uint8 [elements, bytes of one], on its device."""
    # A lone element counts as contiguous whatever its stride, and `view` wants 1: so the last axis is a new one.
    return t.contiguous().reshape(-1).unsqueeze(-1).view(torch.uint8)


def _bytes(t: Tensor) -> bytes:
    if t.is_meta or not t.numel():
        return b""
    return octets(t.detach().cpu()).numpy().tobytes()


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
    memory[places.flatten()] = octets(plain)
    return memory.view(-1).view(plain.dtype).as_strided(plain.shape, strides)
