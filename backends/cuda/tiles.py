"""Tile sizes of kernels by architecture, as data: what fits its registers and its shared memory.

They may change which bits a result has, so that nothing else may choose them: not how many tokens come together.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsv4_hal.backends.cuda.devices import ARCHS

Tiles = Mapping[str, Mapping[str, int]]


def table(default: Mapping[str, int], **by_arch: Mapping[str, int]) -> Tiles:
    """Constants of a kernel for every architecture: the default, with what differs."""
    return MappingProxyType({name: {**default, **by_arch.get(name, {})} for name in ARCHS})


ATTENTION = table({"heads": 16, "keys": 32, "num_warps": 4, "num_stages": 1})
INDEX = table({"entries": 128, "num_warps": 4, "num_stages": 2})
