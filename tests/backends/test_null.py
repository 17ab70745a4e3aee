"""The null backend has the reference's shapes and dtypes, and nothing else."""

from functools import cache

import pytest
import torch

from dsv4_hal.backends.null import Null
from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance import run_case
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.formats import FORMATS, QTensor, Weight
from dsv4_hal.numerics import deployed, exact, numerics_for
from dsv4_hal.ops import OPS, SIZES, Case, ContractError

CASES = [
    pytest.param(case, id=case.id, marks=() if case.size in SIZES[:1] else pytest.mark.full)
    for spec in OPS.values()
    for case in spec.cases()
]


@cache
def backends(mode: str) -> tuple[Resolved, Resolved]:
    return resolve([Reference(numerics_for(mode))]), resolve([Null(numerics_for(mode))])


@pytest.mark.parametrize("mode", ["exact", "deployed"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes(case: Case, mode: str) -> None:
    reference, null = backends(mode)
    want, got = run_case(case, reference), run_case(case, null)
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == {n: (t.shape, t.dtype) for n, t in want.items()}
    assert {t.device.type for t in got.values()} <= {"meta"}


def test_it_needs_no_memory() -> None:
    """A linear layer of a petabyte."""
    null = Null(exact())
    w = torch.empty(1 << 24, 1 << 24, dtype=torch.float32, device="meta")
    y = null.linear(torch.empty(3, 1 << 24, device="meta"), Weight(w, None, FORMATS["fp32"]))
    assert y.device.type == "meta" and y.shape == (3, 1 << 24)
    codes = null.quantize(torch.empty(1 << 24, 1 << 24, device="meta"), FORMATS["e4m3_128x128"])
    assert isinstance(codes, QTensor) and codes.data.device.type == "meta"


def test_preconditions_hold_on_meta_tensors() -> None:
    with pytest.raises(ContractError, match="hadamard"):
        backends("exact")[1].hadamard(torch.empty(2, 3, device="meta"))


def test_it_is_a_backend() -> None:
    assert Null.available() and Null(deployed()).device.type == "meta"
