"""The fused experts are their definition, bit for bit where sums are exact. Interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal import ops
from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.formats import FORMATS, Weight, quantize
from dsv4_hal.numerics import deployed, exact
from dsv4_hal.ops.spec import ContractError


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape) / 8


def weight(fmt: str, *shape: int) -> Weight:
    q = quantize(whole(*shape), FORMATS[fmt])
    return Weight(q.data, q.scale, q.format, "w")


@pytest.mark.parametrize("formats", [("mxfp4", "mxfp4"), ("e4m3_128x128", "bf16"), ("fp32", "mxfp4")])
def test_fused_is_the_definition(formats):
    backend, ids = Cuda(deployed()), torch.rand(3, 4).argsort(-1)[:, :2]
    x, weights = whole(3, 64).bfloat16(), torch.rand(3, 2)
    w13, w2 = weight(formats[0], 4, 144, 64), weight(formats[1], 4, 48, 72)  # halves cut blocks of 128
    want = ops.Moe.moe_experts(backend, x, ids, weights, w13, w2, 1.0)
    torch.testing.assert_close(backend.moe_experts(x, ids, weights, w13, w2, 1.0), want, rtol=1e-6, atol=1e-6)


def test_a_token_is_served_alike_alone_and_in_a_batch():
    backend, ids = Cuda(deployed()), torch.rand(4, 5).argsort(-1)[:, :2]
    x, weights = torch.randn(4, 64).bfloat16(), torch.rand(4, 2)
    w13, w2 = weight("mxfp4", 5, 128, 64), weight("mxfp4", 5, 48, 64)
    many = backend.moe_experts(x, ids, weights, w13, w2, None)
    alone = backend.moe_experts(x[3:4], ids[3:4], weights[3:4], w13, w2, None)
    assert torch.equal(alone[0], many[3])


def test_preconditions_are_those_of_the_parts():
    backend = Cuda(exact())
    x, ids, weights = torch.zeros(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    w13, w2 = weight("fp32", 2, 64, 32), weight("fp32", 2, 32, 32)
    with pytest.raises(ContractError, match="limit must be positive"):
        backend.moe_experts(x, ids, weights, w13, w2, 0.0)
    with pytest.raises(ContractError, match="do not fit"):
        backend.moe_experts(x, ids, weights, w13, weight("fp32", 2, 32, 16), 1.0)
    with pytest.raises(ContractError, match="rows must be"):
        backend.moe_experts(x.bfloat16(), ids, weights, w13, w2, 1.0)
    with pytest.raises(ContractError, match="row_weight"):
        backend.moe_experts(x, ids, weights[:2], w13, w2, 1.0)
