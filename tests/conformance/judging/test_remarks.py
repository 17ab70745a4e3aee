"""What is odd about a backend's class is told by name, and what is not odd is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backend import Backend, Origin
from dsv4_hal.backends.null import Null
from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.judging.remarks import remarks


class Norms(ops.NormRope):
    def rms_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class Right(Norms, Reference):
    """Nothing is odd: its own ops come first, and its helpers are its own."""

    name = "right"
    tile = 64

    def linear_fp8(self, x: Tensor) -> Tensor:
        return x

    def _kv_store(self) -> None: ...

    def supports(self, *args: Any) -> Any:
        return super().supports(*args)


class Derived(Right):
    name = "derived"

    def _attend(self, *args: Any) -> Any:
        return super()._attend(*args)


class Hidden(Reference, Norms):
    name = "hidden"


class Misspelt(Reference):
    name = "misspelt"

    def kv_stores(self) -> None: ...

    def rmsnorm(self) -> None: ...


class Helped(Reference):
    name = "helped"

    def _input(self, x: Any, w: Any) -> Tensor:
        return torch.zeros(())

    def linear(self, *args: Any, **kwargs: Any) -> Tensor:  # its own already
        return super().linear(*args, **kwargs)


@pytest.mark.parametrize("cls", [Reference, Null, Right])
def test_what_is_not_odd_is_not_told(cls: type[Backend]) -> None:
    assert remarks(cls) == []


def test_names_that_are_nearly_an_op_s() -> None:
    assert remarks(Misspelt) == [
        "kv_stores is no op, and nothing calls it as one: is kv_store meant?",
        "rmsnorm is no op, and nothing calls it as one: is rms_norm meant?",
    ]


def test_an_op_that_another_base_hides() -> None:
    assert Hidden.origin("rms_norm") == Origin("inherited", "reference")
    (told,) = remarks(Hidden)
    assert told.startswith("rms_norm of ") and "Norms is not used: dsv4_hal.backends.reference.norm_rope" in told


def test_a_helper_that_is_replaced_makes_an_op_its_own() -> None:
    assert remarks(Helped) == [
        "_input replaces a helper of dsv4_hal.backends.reference.gemm.Gemm: its own code runs in grouped_linear"
    ]
    assert Helped.origin("grouped_linear") == Origin("native", "helped")
    assert Helped.origin("block_diagonal_linear") == Origin("inherited", "reference")
    assert Derived.origin("sparse_attention") == Origin("native", "derived")
    assert Derived.origin("rms_norm") == Origin("inherited", "right")
    assert len(remarks(Derived)) == 1
