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
ATTENTION = table(_ATTENTION, sm_90={"heads": 64}, gfx942={"keys": 16})  # Hopper multiplies 64 rows or more
ATTENTION_FLOAT32 = table({**_ATTENTION, "keys": 16})
INDEX = table(_INDEX)
INDEX_FLOAT32 = table({**_INDEX, "entries": 32, "num_warps": 8, "num_stages": 1})


def _tile(rows: int, columns: int, inner: int, warps: int, stages: int) -> Mapping[str, int]:
    return {"BM": rows, "BN": columns, "BK": inner, "num_warps": warps, "num_stages": stages}


_SINGLE = _tile(64, 64, 32, 8, 2)
_AMPERE = {
    "plain": _tile(64, 128, 64, 4, 3),
    "widened": _tile(64, 128, 64, 8, 3),
    "float32": _SINGLE,
}
_BLACKWELL = {
    "plain": _tile(128, 128, 64, 8, 4),
    "float8": _tile(128, 128, 128, 8, 3),
    "widened": _tile(128, 128, 128, 8, 3),
    "scaled": _tile(128, 128, 128, 8, 3),
    "float32": _SINGLE,
}

# products, by kind of operand: see backends.triton_kernels.gemm.Units
GEMM: Mapping[str, Tiles] = {
    "sm_80": {**_AMPERE, "widened": _tile(64, 64, 64, 8, 3)},
    "sm_86": {**_AMPERE, "widened": _tile(64, 64, 64, 8, 3)},
    "sm_89": _AMPERE,
    "sm_90": {
        "plain": _tile(128, 128, 64, 8, 4),
        "widened": _tile(64, 128, 64, 4, 3),
        "float32": _SINGLE,
    },
    "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL,
    "sm_120": _AMPERE,
    "gfx942": {**_AMPERE, "plain": _tile(64, 128, 64, 4, 2), "widened": _tile(64, 128, 64, 8, 2)},
    "gfx950": {k: _tile(128, 128, 128, 8, 2) for k in ("plain", "float8", "widened", "scaled")} | {"float32": _SINGLE},
}

# the product with gate and up, which holds two sums; 128 columns, so that hidden rows are rounded where they are made
_PAIR = {
    "plain": _tile(64, 128, 64, 8, 3),
    "widened": _tile(64, 128, 32, 8, 3),
    "float32": _tile(32, 64, 32, 8, 2),
}
_BLACKWELL_PAIR = {
    **{kind: {**tile, "BM": 64} for kind, tile in _BLACKWELL.items()},
    "scaled": _tile(128, 64, 128, 8, 3),  # units multiply scaled blocks in tiles of 128 rows only
}
EXPERTS: Mapping[str, Tiles] = {
    "sm_80": _PAIR,
    "sm_86": _PAIR,
    "sm_89": _PAIR,
    "sm_90": {**_PAIR, "widened": _tile(64, 128, 64, 4, 3)},
    "sm_100": _BLACKWELL_PAIR,
    "sm_103": _BLACKWELL_PAIR,
    "sm_120": _PAIR,
    "gfx942": {**_PAIR, "plain": _tile(64, 128, 64, 8, 2), "widened": _tile(64, 128, 64, 8, 2)},
    "gfx950": {k: _tile(64, 128, 128, 8, 2) for k in ("plain", "float8", "widened", "scaled")} | {"float32": _SINGLE},
}
