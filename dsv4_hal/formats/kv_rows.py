"""Cache rows: how one is rounded, and which byte of a block holds what.

A pool is uint8 [blocks, block bytes]. A block holds `rows` rows; it is cut into regions that follow one another, and
in every region each row has a share of `region_bytes`, in which the layout's fields lie at fixed offsets. All of it is
data: packing, unpacking, storing and loading are the same few lines for every layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from dsv4_hal.formats.quantize import dequantize, encode, simulate
from dsv4_hal.formats.types import FORMATS, Format, QTensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Field:
    """One part of a row.

    name    values: the whole row, plain; codes and scales: the quantised channels; rope: the last channels, plain
    region  which region of the block it lies in
    offset  bytes from the start of the row's share of that region
    count   stored items
    dtype   dtype of an item
    """

    name: str
    region: int
    offset: int
    count: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + self.count * self.dtype.itemsize


@dataclass(frozen=True)
class RowLayout:
    """What a cache row is, and how rows lie in a block.

    dim, rope     channels of a row; the last `rope` of them are rotated, and never rounded
    ratio         tokens per row; 1: window rows
    window        keys a token attends, itself included, for ratio 1; else 0
    rounding      format of the first dim - rope channels; None: they are not rounded
    fields        either `values` alone, or `codes` and `scales`, and `rope` where rope > 0
    region_bytes  bytes per row of each region; a row's share may end in padding, which is never written
    block_align   a block is padded to a multiple of this
    values        dtype of a row outside the cache
    ValueError where a field does not lie on a multiple of its item size in every block, or leaves its region.
    """

    name: str
    dim: int
    rope: int
    ratio: int
    window: int
    rounding: Format | None
    fields: tuple[Field, ...]
    region_bytes: tuple[int, ...]
    block_align: int
    values: torch.dtype

    def __post_init__(self) -> None:
        if not 0 <= self.rope <= self.dim or self.dim < 1:
            raise ValueError(f"{self.name}: {self.rope} rotary channels of {self.dim}")
        if self.ratio < 1 or (self.ratio == 1) != (self.window > 0):
            raise ValueError(
                f"{self.name}: ratio {self.ratio}, window {self.window}: ratio 1, and only it, has a window"
            )
        if self.plain and (self.row_bytes != self.dim * self.values.itemsize or self.block_align != 1):
            raise ValueError(f"{self.name}: plain rows have no padding, {self.row_bytes} bytes hold {self.dim} values")
        for field in self.fields:
            share, before = self.region_bytes[field.region], sum(self.region_bytes[: field.region])
            steps = (field.offset, share, before, self.row_bytes if self.block_align == 1 else self.block_align)
            if field.end > share or any(step % field.dtype.itemsize for step in steps):
                raise ValueError(f"{self.name} of dim {self.dim}, rope {self.rope}: no aligned place for {field}")

    @property
    def plain(self) -> bool:
        """Whether a row is its values and nothing else, so that rows follow one another without padding."""
        return self.fields[0].name == "values"

    @property
    def row_bytes(self) -> int:
        return sum(self.region_bytes)

    def block_bytes(self, rows: int) -> int:
        """Bytes of a block of `rows` rows, padding included."""
        return -(-rows * self.row_bytes // self.block_align) * self.block_align


def plain_rows(
    dim: int, rope: int, ratio: int, window: int, dtype: torch.dtype, rounding: Format | None = None
) -> RowLayout:
    """Rows stored as plain values of `dtype`, after rounding: reading them back costs nothing."""
    fields = (Field("values", 0, 0, dim, dtype),)
    return RowLayout("plain", dim, rope, ratio, window, rounding, fields, (dim * dtype.itemsize,), 1, dtype)


def flashmla_rows(ratio: int, window: int, dim: int = 512, rope: int = 64) -> RowLayout:
    """FlashMLA's FP8 rows for DeepSeek-V4: [448 e4m3 | 64 bf16] of every row of the block, then [7 e8m0 | 1 pad] of
    every row; 584 bytes a row, a block padded to a multiple of 576. ValueError unless dim - rope is a multiple of 64.
    """
    rounding = FORMATS["e4m3_1x64"]
    kept = dim - rope
    data = kept + 2 * rope
    fields = (
        *_quantised("flashmla", kept, rounding, codes=(0, 0), scales=(1, 0)),
        *_rotary(kept, rope),
    )
    regions = (data, _round_up(fields[1].end, 8))
    return RowLayout("flashmla", dim, rope, ratio, window, rounding, fields, regions, data, torch.bfloat16)


def ascend950_rows(ratio: int, window: int, dim: int = 512, rope: int = 64) -> RowLayout:
    """FP8 rows of the Ascend 950 operators: [64 bf16 | 448 e4m3 | 7 e8m0 | pad], 640 bytes a row (a multiple of 128).
    ValueError unless dim - rope is a multiple of 64."""
    rounding = FORMATS["e4m3_1x64"]
    kept = dim - rope
    fields = (
        *_quantised("ascend950", kept, rounding, codes=(0, 2 * rope), scales=(0, 2 * rope + kept)),
        *_rotary(0, rope),
    )
    regions = (_round_up(fields[1].end, 128),)
    return RowLayout("ascend950", dim, rope, ratio, window, rounding, fields, regions, 1, torch.bfloat16)


def index_int8_rows(ratio: int, dim: int = 128) -> RowLayout:
    """Indexer keys of Ascend A2 and A3: int8 of every row, then an fp16 scale of every row; 130 bytes a row."""
    return _index_rows("index_int8", ratio, dim, FORMATS["int8_row_fp16"])


def index_fp8_rows(ratio: int, dim: int = 128) -> RowLayout:
    """Indexer keys of DeepGEMM's FP8 paged logits: e4m3 of every row, then an fp32 scale of every row; 132 bytes."""
    return _index_rows("index_fp8", ratio, dim, FORMATS["e4m3_row_fp32"])


def index_fp4_rows(ratio: int, dim: int = 128) -> RowLayout:
    """Indexer keys in MXFP4: packed e2m1 of every row, then 4 e8m0 of every row; 68 bytes a row."""
    return _index_rows("index_fp4", ratio, dim, FORMATS["mxfp4"])


def round_rows(rows: Tensor, layout: RowLayout) -> Tensor:
    """Rows [N, dim] in layout.values -> what reading them back from the cache would give, same shape and dtype.

    Rounds the first dim - rope channels, straight-through for gradients. ValueError for another width or dtype.
    """
    _check_rows(rows, layout)
    if layout.rounding is None:
        return rows
    if layout.rope == 0:
        return simulate(rows, layout.rounding)
    kept, rope = rows.split((layout.dim - layout.rope, layout.rope), -1)
    return torch.cat([simulate(kept, layout.rounding), rope], -1)


def pack(rows: Tensor, layout: RowLayout) -> dict[str, Tensor]:
    """Rows [N, dim] in layout.values -> the fields that are stored, [N, count] each. Rounds as `round_rows` does."""
    if layout.plain:
        return {"values": round_rows(rows, layout)}
    _check_rows(rows, layout)
    assert layout.rounding is not None
    kept, rope = rows.split((layout.dim - layout.rope, layout.rope), -1)
    q = encode(kept, layout.rounding)
    assert q.scale is not None
    return {"codes": q.data, "scales": q.scale, "rope": rope} if layout.rope else {"codes": q.data, "scales": q.scale}


def unpack(fields: Mapping[str, Tensor], layout: RowLayout) -> Tensor:
    """The fields that `pack` returns -> rows [N, dim] in layout.values: bit for bit round_rows of what was packed."""
    if layout.plain:
        return fields["values"]
    assert layout.rounding is not None
    kept = dequantize(QTensor(fields["codes"], fields["scales"], layout.rounding), layout.values)
    return torch.cat([kept, fields["rope"]], -1) if layout.rope else kept


def new_pool(layout: RowLayout, blocks: int, rows: int, device: torch.device | str = "cpu") -> Tensor:
    """A pool of `blocks` blocks of `rows` rows: uint8 [blocks, block bytes], zero."""
    return torch.zeros(blocks, layout.block_bytes(rows), dtype=torch.uint8, device=device)


def views(pool: Tensor, layout: RowLayout, rows: int) -> dict[str, Tensor]:
    """The fields of every row of a pool, [blocks, rows, count] each: typed views, writing to them writes the pool.

    ValueError if the pool is not uint8 [blocks, layout.block_bytes(rows)].
    """
    _check_pool(pool, layout, rows)
    return {
        field.name: _region(pool, layout, rows, field.region)[..., field.offset : field.end].view(field.dtype)
        for field in layout.fields
    }


def regions(pool: Tensor, layout: RowLayout, rows: int) -> tuple[Tensor, ...]:
    """The regions of a pool, uint8 [blocks, rows, bytes] each: views, writing to them writes the pool.

    ValueError as for `views`.
    """
    _check_pool(pool, layout, rows)
    return tuple(_region(pool, layout, rows, i) for i in range(len(layout.region_bytes)))


def store(pool: Tensor, layout: RowLayout, rows: int, index: Tensor, values: Tensor) -> None:
    """Round `values` [N, dim] and write them to physical rows `index` [N] int64; padding bytes stay as they are.

    rows   rows per block; index = block * rows + row in the block, never negative (not checked: it would wait for the
           device) and without repetition, or which row wins is undefined
    ValueError if shapes or dtypes do not fit pool and layout.
    """
    if layout.plain:  # the general way below, in fewer steps
        _check_pool(pool, layout, rows)
        _plain(pool, layout)[index] = round_rows(values.detach(), layout)
        return
    fields = pack(values.detach(), layout)
    for name, view in views(pool, layout, rows).items():
        word = _WORDS[view.dtype.itemsize]  # bytes are copied: not every device indexes 8-bit floats
        target, at = _locate(view.view(word), index)
        target[at] = fields[name].view(word)


def load(pool: Tensor, layout: RowLayout, rows: int, index: Tensor, gaps: bool = True) -> Tensor:
    """Physical rows `index` [...] int64 -> values [..., dim] in layout.values.

    rows   rows per block; index = block * rows + row in the block. -1 gives a row of zeros whatever the pool holds;
           the pool must have a row all the same.
    gaps   whether index may hold -1; False spares a pass over the result
    ValueError if the pool does not fit the layout.
    """
    _check_pool(pool, layout, rows)
    flat = index.flatten()
    safe = flat.clamp(min=0) if gaps else flat
    if layout.plain:  # the general way below, in fewer steps
        out = _plain(pool, layout).index_select(0, safe)
        if gaps:
            out.masked_fill_((flat < 0).unsqueeze(-1), 0)
        return out.view(*index.shape, layout.dim)
    # whole shares of a region are copied in the widest words they allow, and taken apart afterwards
    shares = []
    for i, share in enumerate(layout.region_bytes):
        word = _WORDS[gcd(8, share, rows * sum(layout.region_bytes[:i]), pool.shape[1])]
        source, at = _locate(_region(pool, layout, rows, i).view(word), safe)
        shares.append(source.index_select(0, safe) if len(at) == 1 else source[at])
    fields = {
        field.name: shares[field.region].view(torch.uint8)[:, field.offset : field.end].view(field.dtype)
        for field in layout.fields
    }
    out = unpack(fields, layout)
    if gaps:
        out.masked_fill_((flat < 0).unsqueeze(-1), 0)  # a product would keep NaN
    return out.view(*index.shape, layout.dim)


def _plain(pool: Tensor, layout: RowLayout) -> Tensor:
    """All rows of a pool of plain rows, one after another: a view [blocks * rows, dim]."""
    return pool.view(layout.values).view(-1, layout.dim)


def _index_rows(name: str, ratio: int, dim: int, rounding: Format) -> RowLayout:
    codes, scales = _quantised(name, dim, rounding, codes=(0, 0), scales=(1, 0))
    regions = (codes.end, scales.end)
    return RowLayout(name, dim, 0, ratio, 0, rounding, (codes, scales), regions, 1, torch.bfloat16)


def _quantised(
    name: str, channels: int, fmt: Format, codes: tuple[int, int], scales: tuple[int, int]
) -> tuple[Field, Field]:
    """Codes and scales of `channels` channels, each at (region, offset); ValueError unless they fill whole blocks."""
    assert fmt.block is not None and fmt.scale_dtype is not None
    block = fmt.block[1] or channels
    if channels < 1 or channels % block or channels % fmt.pack:
        raise ValueError(f"{name}: {channels} channels do not fill blocks of {max(block, fmt.pack)}")
    return (
        Field("codes", *codes, channels // fmt.pack, fmt.storage),
        Field("scales", *scales, channels // block, fmt.scale_dtype),
    )


def _rotary(offset: int, rope: int) -> tuple[Field, ...]:
    """The plain channels of a row, where it has any."""
    return (Field("rope", 0, offset, rope, torch.bfloat16),) if rope else ()


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _region(pool: Tensor, layout: RowLayout, rows: int, i: int) -> Tensor:
    """Bytes of region i: a view [blocks, rows, region bytes]."""
    share = layout.region_bytes[i]
    start = rows * sum(layout.region_bytes[:i])
    return pool[:, start : start + rows * share].unflatten(1, (rows, share))


def _locate(view: Tensor, index: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Where rows `index` of a view [blocks, rows, ...] are: one subscript where rows follow one another across blocks
    (no second region, no padding), else block and row."""
    rows = view.shape[1]
    if view.stride(0) == rows * view.stride(1):
        return view.flatten(0, 1), (index,)
    return view, (index // rows, index % rows)


def _check_rows(rows: Tensor, layout: RowLayout) -> None:
    if rows.shape[-1] != layout.dim or rows.dtype != layout.values:
        raise ValueError(
            f"{layout.name}: rows are [N, {layout.dim}] {layout.values}, not {tuple(rows.shape)} {rows.dtype}"
        )


def _check_pool(pool: Tensor, layout: RowLayout, rows: int) -> None:
    want = layout.block_bytes(rows)
    if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.shape[1] != want:
        raise ValueError(
            f"{layout.name}: a pool with {rows} rows a block is uint8 [blocks, {want}], "
            f"not {pool.dtype} {tuple(pool.shape)}"
        )
