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


# In float32 matrix units are not used: products of many columns at once would not fit the registers.
_ATTENTION = {"heads": 16, "keys": 32, "num_warps": 8, "num_stages": 1}
_INDEX = {"entries": 128, "num_warps": 4, "num_stages": 2}
ATTENTION = table(_ATTENTION, gfx942={"keys": 16})
ATTENTION_FLOAT32 = table({**_ATTENTION, "keys": 16})
INDEX = table(_INDEX)
INDEX_FLOAT32 = table({**_INDEX, "entries": 32, "num_warps": 8, "num_stages": 1})


def _tile(rows: int, columns: int, inner: int, warps: int, stages: int) -> Mapping[str, int]:
    return {"BM": rows, "BN": columns, "BK": inner, "num_warps": warps, "num_stages": stages}


_SINGLE = _tile(64, 64, 32, 4, 2)

# kinds of operands: see backends.triton_kernels.gemm.Units
GEMM: Mapping[str, Tiles] = {
    "sm_90": {
        "plain": _tile(64, 128, 128, 4, 4),
        "float8": _tile(64, 128, 128, 4, 4),
        "widened": _tile(64, 128, 128, 4, 3),
        "scaled": _tile(64, 128, 128, 4, 3),
        "float32": _SINGLE,
    },
}

# the same for the product with gate and up, which holds two sums
EXPERTS: Mapping[str, Tiles] = GEMM
