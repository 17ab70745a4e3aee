"""Where attention rounds probabilities, which the order of keys must not change. Interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.triton_kernels import attention
from dsv4_hal.backends.triton_kernels.rows import rows_of
from dsv4_hal.formats import plain_rows

TILE = {"heads": 16, "keys": 16, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_probabilities_are_rounded_relative_to_the_largest_of_all_scores(order):
    """With rising scores a running maximum would grow from block to block, and round other numbers."""
    generator, count, scale = torch.Generator().manual_seed(1), 90, 0.125
    rows = torch.randn(count, 64, generator=generator).bfloat16()
    q = torch.randn(1, 1, 64, generator=generator).bfloat16()
    rows = rows[(rows.float() @ q[0, 0].float()).argsort(descending=order == "falling")]
    out = torch.empty(1, 1, 64)
    attention.sparse_attention(
        q,
        rows_of(rows, plain_rows(64, 0, 1, count, torch.bfloat16), 0, torch.tensor([0]), False),
        None,
        None,
        torch.zeros(1),
        torch.tensor([0]),
        torch.tensor([count - 1]),
        out,
        None,
        scale=scale,
        span=count,
        ratio=1,
        longest=0,
        probs=torch.bfloat16,
        tile=TILE,
    )
    score = rows.double() @ q[0, 0].double() * scale
    p = (score - score.max()).exp()
    want = p.float().bfloat16().double() @ rows.double() / (p.sum() + (-score.max()).exp())
    error = (out[0, 0].double() - want).norm() / want.norm()
    assert error < 1e-5  # 1e-3 where other numbers are rounded
