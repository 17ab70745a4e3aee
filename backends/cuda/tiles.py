"""Tiles of kernels by architecture, as data.

One configuration for an architecture and a kind of operand, whatever the number of rows: a row's result must not hang
on how many come with it.
"""

from __future__ import annotations

from collections.abc import Mapping

Tile = Mapping[str, int]


def _tile(rows: int, columns: int, inner: int, warps: int, stages: int) -> Tile:
    return {"BM": rows, "BN": columns, "BK": inner, "num_warps": warps, "num_stages": stages}


_SINGLE = _tile(64, 64, 32, 4, 2)

# kinds of operands: see backends.triton_kernels.gemm.Units
GEMM: Mapping[str, Mapping[str, Tile]] = {
    "sm_90": {
        "plain": _tile(64, 128, 128, 4, 4),
        "float8": _tile(64, 128, 128, 4, 4),
        "widened": _tile(64, 128, 128, 4, 3),
        "scaled": _tile(64, 128, 128, 4, 3),
        "float32": _SINGLE,
    },
}

# the same for the product with gate and up, which holds two sums
EXPERTS: Mapping[str, Mapping[str, Tile]] = GEMM
