"""Copies: into a cache, into the matrix unit's order, into packed INT4."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import emulated, no_meta
from dsv4_hal.backends.ascend.emulator.numbers import pack_int4

_NONE = no_meta("torch_npu 2.13.0 has none for it")


@emulated("npu::npu_scatter_nd_update_")
def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices[i]] = updates[i], in place: the last axis of indices [.., a] names the first a axes of input.

    Which of two equal indices wins is not documented: a rule refuses them.
    """
    input[tuple(indices.long().unbind(-1))] = updates
    return input


@emulated("npu::npu_format_cast", meta=_NONE)
def npu_format_cast(input: Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> Tensor:
    """The same values in another order in memory, which no other operator shows: here nothing moves."""
    return input.clone()


@emulated("npu::npu_convert_weight_to_int4pack", meta=_NONE)
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int) -> Tensor:
    """int32 [.., n] of values between -8 and 7 -> int32 [.., n / 8], the first in the lowest bits."""
    return pack_int4(weight)
