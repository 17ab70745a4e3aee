"""Number formats as data, and the two carriers of stored values: QTensor and Weight.

A format says which element codes are stored, how many share a scale, and how the scale itself is stored.
Arithmetic on formats lives beside this file: `elements.py` (one element), `quantize.py` (a tensor),
`kv_rows.py` (a cache row).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """How the values of a tensor are stored.

    element  name of the element code: fp64, fp32, fp16, bf16, e4m3, e2m1, int8, int4
    block    (rows, columns) of the last two axes that share one scale; None: no scale; 0 stands for the whole axis.
             A block at a ragged edge is smaller; its scale covers what is there.
    scale    how a scale is stored: e8m0 (a power of two), fp32, fp16; None: no scale
    top      largest magnitude an element can hold; a scale is amax / top (rounded up to a power of two for e8m0)
    floor    the smallest amax a scale is computed from
    """

    name: str
    element: str
    storage: torch.dtype
    block: tuple[int, int] | None = None
    scale: str | None = None
    top: float = 0.0
    floor: float = 0.0
    pack: int = 1  # elements per stored item along the last axis; element 0 in the low bits

    @property
    def plain(self) -> bool:
        return self.block is None

    @property
    def scale_dtype(self) -> torch.dtype | None:
        return None if self.scale is None else SCALE_DTYPES[self.scale]

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored codes of a tensor with logical `shape`."""
        return (*shape[:-1], shape[-1] // self.pack)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the stored scales of a tensor with logical `shape` (at least 2-D for blocks of several rows)."""
        if self.block is None:
            return None
        rows, cols = self.block
        last = 1 if cols == 0 else -(-shape[-1] // cols)
        if rows == 1:
            return (*shape[:-1], last)
        return (*shape[:-2], -(-shape[-2] // rows), last)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor of logical `shape` takes, scales included."""
        total = _count(self.data_shape(shape)) * self.storage.itemsize
        scales = self.scale_shape(shape)
        return total if scales is None else total + _count(scales) * SCALE_DTYPES[str(self.scale)].itemsize


SCALE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"e8m0": torch.float8_e8m0fnu, "fp32": torch.float32, "fp16": torch.float16}
)

_E4M3_FLOOR = 1e-4  # amax floor of the published FP8 kernels
_E2M1_FLOOR = 6 * 2.0**-126  # so that the scale of an all-zero block is the smallest normal power of two


def _e4m3(name: str, block: tuple[int, int], scale: str = "e8m0") -> Format:
    return Format(name, "e4m3", torch.float8_e4m3fn, block, scale, top=448.0, floor=_E4M3_FLOOR)


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            Format("fp64", "fp64", torch.float64),
            Format("fp32", "fp32", torch.float32),
            Format("fp16", "fp16", torch.float16),
            Format("bf16", "bf16", torch.bfloat16),
            _e4m3("e4m3_128x128", (128, 128)),  # FP8 weights
            _e4m3("e4m3_128x128_fp32", (128, 128), "fp32"),  # FP8 weights of the Base checkpoints
            _e4m3("e4m3_1x128", (1, 128)),  # activations in front of a quantised weight
            _e4m3("e4m3_1x64", (1, 64)),  # KV rows
            _e4m3("e4m3_row_fp32", (1, 0), "fp32"),  # FP8 indexer keys: one scale a row
            _e4m3("mxfp8", (1, 32)),
            Format("mxfp4", "e2m1", torch.int8, (1, 32), "e8m0", top=6.0, floor=_E2M1_FLOOR, pack=2),
            Format("int8_channel", "int8", torch.int8, (1, 0), "fp32", top=127.0, floor=1e-12),
            Format("int4_channel", "int4", torch.int8, (1, 0), "fp32", top=7.0, floor=1e-12, pack=2),
            # fp16 scales hold down to 2^-24: the floor keeps amax / 127 above that
            Format("int8_row_fp16", "int8", torch.int8, (1, 0), "fp16", top=127.0, floor=127 * 2.0**-24),
        )
    }
)

_PLAIN = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def plain_format(dtype: torch.dtype) -> Format:
    """The plain format of a floating dtype; ValueError for any other dtype."""
    if dtype not in _PLAIN:
        raise ValueError(f"{dtype} is not a plain floating dtype: {', '.join(map(str, _PLAIN))}")
    return FORMATS[_PLAIN[dtype]]


@dataclass(frozen=True)
class QTensor:
    """Values in a stored format.

    data   codes [..., rows, columns / format.pack] in `format.storage`
    scale  [..., rows / block rows, columns / block columns] in `format.scale_dtype`; None for a plain format
    shape  logical shape: what `dequantize` returns
    """

    data: Tensor
    scale: Tensor | None
    format: Format
    shape: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole = (*self.data.shape[:-1], self.data.shape[-1] * self.format.pack)
        object.__setattr__(self, "shape", whole)  # kept: every op's preconditions ask for it
        if self.data.dtype != self.format.storage:
            raise ValueError(f"{self.format.name} stores {self.format.storage}, got codes of {self.data.dtype}")
        want = self.format.scale_shape(self.shape)
        if want is None:
            if self.scale is not None:
                raise ValueError(f"{self.format.name} has no scale, got one of shape {tuple(self.scale.shape)}")
        elif self.scale is None:
            raise ValueError(f"{self.format.name} needs a scale of shape {want}, got none")
        elif tuple(self.scale.shape) != want or self.scale.dtype != self.format.scale_dtype:
            raise ValueError(
                f"{self.format.name} of shape {self.shape} needs a scale {want} of {self.format.scale_dtype}, "
                f"got {tuple(self.scale.shape)} of {self.scale.dtype}"
            )

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


@dataclass(frozen=True)
class Weight(QTensor):
    """A weight matrix [..., out, in] in a stored format: what `Backend.repack` takes and returns.

    name    its name in the model's table, for error messages
    layout  physical arrangement; "checkpoint" is row-major codes and scales as in the file. A backend whose kernels
            want another arrangement returns it from `repack` under a name of its own.
    op      of the contract that reads it, for `repack` to arrange it for; "": not said
    """

    name: str = ""
    layout: str = "checkpoint"
    op: str = ""

    def ordered(self) -> Weight:
        """The weight in the checkpoint's order. ValueError if it is arranged otherwise; a backend's own kind of weight
        may know the way back."""
        if self.layout != "checkpoint":
            raise ValueError(f"{self.name or 'weight'} is arranged as {self.layout}, not in checkpoint order")
        return self

    def to(self, device: torch.device | str) -> Weight:
        return replace(self, data=self.data.to(device), scale=None if self.scale is None else self.scale.to(device))

    def __getitem__(self, index: int) -> Weight:
        """One matrix of a stack [E, out, in]."""
        if self.data.dim() != 3:
            raise ValueError(
                f"{self.name or 'weight'}: only a stack [E, out, in] can be indexed, shape is {self.shape}"
            )
        scale = None if self.scale is None else self.scale[index]
        return Weight(self.data[index], scale, self.format, self.name, self.layout, self.op)

    def split_rows(self, groups: int) -> Weight:
        """[groups * out, in] seen as [groups, out, in], without a copy. ValueError where a group cuts a scale block."""
        out = self.shape[-2] // groups
        rows = 1 if self.format.block is None else self.format.block[0]
        if out * groups != self.shape[-2] or (rows > 1 and out % rows):
            raise ValueError(
                f"{self.name or 'weight'}: {self.shape[-2]} rows cannot be split into {groups} whole groups"
            )
        scale = None if self.scale is None else self.scale.unflatten(-2, (groups, -1))
        return replace(self, data=self.data.unflatten(-2, (groups, out)), scale=scale)


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n
