"""Why vllm-ascend's gate is refused: what its kernel computes, and where that is not the contract's function."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from dsv4_hal.backends.reference import Reference
from dsv4_hal.numerics import exact


@pytest.fixture(autouse=True)
def _loaded(torch_npu: ModuleType) -> None:
    """Operators are there once the emulator is."""


def gate(x: torch.Tensor, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    y, ids, _ = torch.ops._C_ascend.moe_gating_top_k_hash(x, 2, norm_type=2, routed_scaling_factor=1.5, **more)
    return ids, y


def test_small_logits_agree_with_the_contract() -> None:
    x = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 3.0, -2.0, 0.1]])
    ids, weights = Reference(exact()).route(x, 2, 1.5)
    found, got = gate(x)
    assert torch.equal(found.long(), ids)
    torch.testing.assert_close(got, weights)


def test_picks_of_a_hash_table_are_taken() -> None:
    x, table = torch.zeros(2, 4), torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    found, got = gate(x, input_ids=torch.tensor([1, 0]), tid2eid=table)
    assert found.tolist() == [[0, 2], [3, 1]]
    assert got.tolist() == [[0.75, 0.75], [0.75, 0.75]]


def test_large_logits_overflow() -> None:
    x = torch.tensor([[100.0, 1.0, 0.0, 0.0]])
    assert gate(x)[1].isnan().any()
    assert Reference(exact()).route(x, 2, 1.5)[1].isfinite().all()
