"""What DeepGEMM and FlashMLA want rearranged: pure functions from tensors to tensors, on any device, without a sync.

Source of every layout: the documentation and host checks of the two libraries, as public in 2026.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TMA_BYTES = 16  # a stride that a tensor memory access walks along is a multiple of this


def up(n: int, step: int) -> int:
    """n rounded up to a multiple of `step`."""
    return -(-n // step) * step


# Scale factors of a matrix [..., MN, K]


def mn_major(scales: Tensor) -> Tensor:
    """Scales [..., MN, S] of four bytes each -> the same values with strides (A * S, 1, A), where A is MN rounded up to
    whole TMA units: scales of one block of K lie side by side. What lies between is zero."""
    *lead, mn, count = scales.shape
    aligned = up(mn, TMA_BYTES // scales.element_size())
    made = scales.new_zeros(*lead, count, aligned)
    made[..., :mn] = scales.transpose(-1, -2)
    return made.transpose(-1, -2)[..., :mn, :]


def packed_e8m0(scales: Tensor) -> Tensor:
    """Scales e8m0 [..., S] -> int32 [..., ceil(S / 4)]: byte j of word c is scale 4 c + j, zero beyond the last."""
    codes = scales.view(torch.uint8)
    count = codes.shape[-1]
    padded = codes.new_zeros(*codes.shape[:-1], up(count, 4))
    padded[..., :count] = codes
    return padded.view(torch.int32)


def a_row_each(scales: Tensor, rows: int, block: int) -> Tensor:
    """Scales [..., ceil(rows / block), S] of blocks of rows -> [..., rows, S], a scale for every row."""
    of = torch.arange(rows, device=scales.device) // block
    return scales.view(torch.uint8).index_select(-2, of).view(scales.dtype)


# Rows of a grouped product


class Groups(NamedTuple):
    """Rows sorted by group, each group padded to a multiple of `align`; P padded rows, a number the host knows.

    source  [P] int64: the row that a padded row holds; any row where it holds none
    group   [P] int32: the group of a padded row, -1 where it holds none
    place   [M] int64: the padded row that holds row m
    """

    source: Tensor
    group: Tensor
    place: Tensor


def padded_groups(offsets: Tensor, rows: int, align: int) -> Groups:
    """offsets [G + 1] int64, on the device, rising from 0 to `rows`."""
    groups = len(offsets) - 1
    most = up(rows + min(groups, rows) * (align - 1), align)
    counts = offsets.diff()
    ends = ((counts + align - 1) // align * align).cumsum(0)
    starts = ends - (counts + align - 1) // align * align
    at = torch.arange(most, device=offsets.device)
    group = torch.searchsorted(ends, at, right=True)
    known = group.clamp(max=groups - 1)
    row = at - starts[known] + offsets[known]
    there = (group < groups) & (row < offsets[known + 1])
    every = torch.arange(rows, device=offsets.device)
    own = torch.searchsorted(offsets[1:], every, right=True)
    return Groups(
        row.clamp(max=max(0, rows - 1)),
        torch.where(there, group, -1).to(torch.int32),
        starts[own] + every - offsets[own],
    )


# float32 for TF32 units


def tf32_parts(x: Tensor) -> Tensor:
    """float32 [N, K] -> [3 N, K]: three matrices of TF32 values whose sum is x, exactly.

    A significand has 24 bits and TF32 keeps 11: what the first two parts leave has at most 2.
    """
    parts, rest = [], x
    for _ in range(2):
        parts.append((rest.view(torch.int32) & ~0x1FFF).view(torch.float32))
        rest = rest - parts[-1]
    return torch.cat([*parts, rest])


# Weights of the fused experts


def interleaved(gate_up: Tensor, rows: int = 8) -> Tensor:
    """[E, 2 I, ...], gate rows and then up rows -> 8 gate rows, 8 up rows, 8 gate rows, and so on."""
    both = gate_up.unflatten(1, (2, gate_up.shape[1] // 2 // rows, rows))
    return both.transpose(1, 2).flatten(1, 3).contiguous()


def utccp(scales: Tensor) -> Tensor:
    """Scales [E, MN, S] -> rows of every 128 seen as [4, 32] and transposed: row 4 l + w of the result is row 32 w + l.
    MN is a multiple of 128."""
    return scales.unflatten(1, (-1, 4, 32)).transpose(2, 3).flatten(1, 3)


# Pools


def index_cache(pool: Tensor, rows: int) -> Tensor:
    """A pool of index_fp8 or index_fp4 rows as DeepGEMM's cache: a view [blocks, rows, 1, bytes per row]. Of every
    block, codes of all rows come first, then scales of all rows: the last axis is nominal."""
    return pool.view(pool.shape[0], rows, 1, pool.shape[1] // rows)


def attention_cache(pool: Tensor, rows: int) -> Tensor:
    """A pool of flashmla rows as FlashMLA's cache: a view [blocks, rows, 1, 584] whose blocks keep their padding. Of
    every block, 576 bytes of all rows come first, then 8 of all rows: the last axis is nominal."""
    return pool[:, : rows * 584].unflatten(1, (rows, 1, 584))


def padded(index: Tensor, step: int) -> Tensor:
    """Indices [T, N] -> int32 [T, N'], N' the next positive multiple of `step`: -1 where there is none."""
    tokens, count = index.shape
    made = index.new_full((tokens, max(step, up(count, step))), -1, dtype=torch.int32)
    made[:, :count] = index
    return made


def more_heads(x: Tensor, axis: int, counts: tuple[int, ...]) -> Tensor:
    """x with zeros behind its heads, as many of them as the smallest of `counts` that holds them."""
    want = next(count for count in counts if count >= x.shape[axis])
    missing = list(x.shape)
    missing[axis] = want - x.shape[axis]
    if not missing[axis]:
        return x
    plain = x.view(torch.uint8) if x.element_size() == 1 else x  # not every device joins 8-bit floats
    return torch.cat([plain, plain.new_zeros(missing)], axis).view(x.dtype)
