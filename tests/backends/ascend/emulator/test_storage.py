"""Emulated copies."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_scatter_nd_update(torch_npu: ModuleType, dtype: torch.dtype) -> None:
    pool = torch.zeros(4, 3, 2).to(dtype)
    where = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    rows = torch.tensor([[1, 2], [3, 4]]).to(dtype)
    back = torch_npu.npu_scatter_nd_update_(pool, where, rows)
    wanted = torch.zeros(4, 3, 2).to(dtype)
    wanted[1, 2], wanted[3, 0] = rows[0], rows[1]
    assert torch.equal(pool, wanted) and back.data_ptr() == pool.data_ptr()


def test_int4_pack(torch_npu: ModuleType) -> None:
    """The first of eight in the lowest bits, negative ones in two's complement."""
    weight = torch.tensor([[0, 1, -1, 7, -8, 2, 3, -4], [-1] * 8], dtype=torch.int32)
    packed = torch_npu.npu_convert_weight_to_int4pack(weight)
    assert packed.shape == (2, 1)
    for row, word in zip(weight.tolist(), packed[:, 0].tolist(), strict=True):
        assert word % (1 << 32) == sum((value % 16) << (4 * place) for place, value in enumerate(row))


def test_format_cast_moves_nothing(torch_npu: ModuleType) -> None:
    weight = torch.arange(12).reshape(3, 4)
    cast = torch_npu.npu_format_cast(weight, 29)
    assert torch.equal(cast, weight) and cast.data_ptr() != weight.data_ptr()
