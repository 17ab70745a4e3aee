"""Results arrive as they left: values, dtype, strides."""

from __future__ import annotations

import os
import sys
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_hal.conformance.judging.results import Extent
from dsv4_hal.conformance.workers.transport import Foreign, pack, plain, unpack

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
        X.bfloat16()[0, 0, :1].as_strided((1,), (2,)),
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


def test_what_is_sent_is_data() -> None:
    sent = (3, "text", [None, {"a": (1.5, True)}], torch.bfloat16, pack({"y": X}), Extent("tiny"), ValueError("no"))
    *data, error = plain(bytes(ForkingPickler.dumps(sent)))
    assert data == list(sent[:-1]) and repr(error) == "ValueError('no')"


@pytest.mark.parametrize("sent", [os.system, Path("a"), torch.Size((1,)), torch.ones(2), Extent.__init__, Counter("a")])
def test_what_is_more_than_data_is_foreign(sent: object) -> None:
    with pytest.raises(Foreign, match="it sent what is no plain data: UnpicklingError: "):
        plain(bytes(ForkingPickler.dumps(sent)))


def test_no_module_is_loaded_for_what_is_sent() -> None:
    assert "this" not in sys.modules
    with pytest.raises(Foreign, match=r"this\.s"):
        plain(b"cthis\ns\n.")
    assert "this" not in sys.modules
