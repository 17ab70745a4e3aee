"""Results arrive as they left: values, dtype, strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_hal.conformance.workers.transport import pack, unpack

X = torch.arange(24.0).view(2, 3, 4)


@pytest.mark.parametrize(
    "t",
    [
        X,
        X.transpose(0, 2),
        X[:, ::2, 1:],
        X[:1].expand(5, 3, 4),
        X.bfloat16()[:, :1].expand(2, 7, 4),
        X.to(torch.float8_e4m3fn).transpose(0, 1),
        torch.tensor(3.0).expand(2, 2),
        X.as_strided((3, 3), (1, 1)),
        X[:0].expand(0, 3, 4),
        (X > 3).T,
    ],
)
def test_a_tensor_arrives_with_its_strides(t: Tensor) -> None:
    (there,) = unpack(pack({"y": t})).values()
    assert (there.dtype, there.shape, there.stride()) == (t.dtype, t.shape, t.stride())
    assert torch.equal(there.float(), t.float())


@pytest.mark.parametrize(("value", "told"), [(None, "None"), (3.0, "a float"), ((X,), "a tuple")])
def test_what_is_no_tensor_is_told(value: object, told: str) -> None:
    with pytest.raises(TypeError, match=f"y: returned {told}, expected a tensor"):
        pack({"y": value})  # type: ignore[dict-item]
