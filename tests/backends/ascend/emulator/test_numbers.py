"""Packed values and scales in pairs."""

from __future__ import annotations

import torch

from dsv4_hal.backends.ascend.emulator.numbers import (
    in_pairs,
    pack_int4,
    power_of_two,
    spread,
    transposed,
    undefined,
    unpack_fp4,
    unpack_int4,
)


def test_int4_survives_packing() -> None:
    values = torch.randint(-8, 8, (3, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert torch.equal(unpack_int4(pack_int4(values), -1), values)


def test_fp4_low_half_first_along_either_axis() -> None:
    packed = torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)
    assert unpack_fp4(packed, -1).tolist() == [[0.5, 1, 6, -6]]
    assert unpack_fp4(packed.T, 0).tolist() == [[0.5], [1], [6], [-6]]


def test_scales_in_pairs_and_spread() -> None:
    scale = torch.arange(1, 7, dtype=torch.uint8).reshape(2, 3)
    pairs = in_pairs(scale, -1)
    assert pairs.tolist() == [[[1, 2], [3, 0]], [[4, 5], [6, 0]]]
    assert spread(pairs, -1, 5, block=2).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    upright = in_pairs(scale.T, 0)
    assert upright.shape == (2, 2, 2) and upright[:, 0].tolist() == [[1, 2], [3, 0]]
    assert spread(upright, 0, 3, block=1)[:, 1].tolist() == [4, 5, 6]


def test_powers_of_two() -> None:
    values = power_of_two(torch.tensor([127, 126, 130, 255], dtype=torch.uint8))
    assert values[:3].tolist() == [1, 0.5, 8] and values[3].isnan()


def test_transposed_views() -> None:
    matrix = torch.zeros(2, 3, 4)
    assert transposed(matrix.mT) and not transposed(matrix) and not transposed(matrix.mT.contiguous())


def test_undefined_values_are_poison() -> None:
    assert undefined((2,), torch.bfloat16).isnan().all()
    assert undefined((2,), torch.float8_e4m3fn).isnan().all()
    assert undefined((2,), torch.int32).tolist() == [-(2**31)] * 2
