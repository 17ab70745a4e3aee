"""The table of providers: what it names is there, and how one is chosen."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from dsv4_hal.backends.ascend import TABLE, Ascend
from dsv4_hal.backends.ascend.devices import SOCS
from dsv4_hal.backends.ascend.providers import ALL, MX, Limit, Provider, choose, operators
from dsv4_hal.ops import OPS

A3, A5 = SOCS["ascend910_93"], SOCS["ascend950"]
FIRST = Provider("rope", ("npu::first",), MX, "a document", limits={"width": Limit(among=(4, 6))})
SECOND = Provider("rope", ("npu::second", "npu::third"), ALL, "a document", limits={"width": Limit(multiple=2, most=8)})
OTHER = Provider("rope", ("npu::other",), ALL, "a document", refused="it turns the wrong way")
ROWS = (FIRST, SECOND, OTHER)


def test_limits() -> None:
    assert [value for value in range(12) if Limit(multiple=2, most=8).allows(value)] == [2, 4, 6, 8]
    assert [value for value in ("a", "b") if Limit(among=("b", "c")).allows(value)] == ["b"]
    assert str(Limit(multiple=16, most=64)) == "a multiple of 16, at most 64"
    assert (str(Limit(multiple=16)), str(Limit(most=9)), str(Limit(among=(4, 6)))) == (
        "a multiple of 16",
        "at most 9",
        "4 or 6",
    )


def test_the_first_that_fits_serves() -> None:
    choice = choose(ROWS, "rope", A5, {})
    assert choice.used == (FIRST, SECOND)
    assert choice.for_call({"width": 4}) is FIRST
    assert choice.for_call({"width": 8}) is SECOND
    assert choice.for_call({"width": 5}) is None
    assert choice.why_not({"width": 5}) == (
        "other: it turns the wrong way; first: width 5, not 4 or 6; "
        "second + third: width 5, not a multiple of 2, at most 8"
    )
    assert choose((OTHER, OTHER), "rope", A5, {}).why_not({}) == "other: it turns the wrong way"


def test_what_a_soc_lacks_or_cannot_be_called_is_passed_over() -> None:
    assert choose(ROWS, "rope", A3, {}).passed[0] == (FIRST, "it is not for Ascend 910C (A3)")
    elsewhere = Provider("rope", SECOND.calls, MX, "a document")
    assert choose((SECOND, elsewhere), "rope", A3, {}).passed == ()
    choice = choose(ROWS, "rope", A5, {"npu::third": "npu::third has a schema, and no kernel for CPU"})
    assert choice.used == (FIRST,)
    assert (SECOND, "npu::third has a schema, and no kernel for CPU") in choice.passed
    assert not choose(ROWS, "hadamard", A5, {}).used


def test_numbers_of_another_profile() -> None:
    hf32 = Provider("hc_pre", ("npu::x",), ALL, "a document", alien={"a5": "its product is in HF32"})
    assert hf32.lacks(A5) == "its product is in HF32"
    assert hf32.lacks(A3) == ""


def test_every_row_names_an_op_and_where_it_was_read() -> None:
    for row in TABLE:
        assert row.op in OPS
        assert row.source
        assert row.calls
        assert row.socs <= ALL
    native = {op for op in OPS if Ascend.origin(op).kind == "native"}
    assert native <= {row.op for row in TABLE if not row.refused}, "an op of its own that no provider serves"


@pytest.mark.parametrize("name", list(SOCS))
def test_every_op_that_is_computed_natively_has_a_provider_on_every_soc(name: str) -> None:
    for op in {op for op in OPS if Ascend.origin(op).kind == "native"} - {"quantize"}:
        assert choose(TABLE, op, SOCS[name], {}).used, op


def test_every_operator_is_in_the_real_package(torch_npu: ModuleType) -> None:
    for call in {call for row in TABLE for call in row.calls if call.startswith("npu::")}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(call, "PrivateUse1"), call
        assert callable(getattr(torch_npu, call.partition("::")[2])), call


def test_every_operator_that_is_used_is_emulated(torch_npu: ModuleType) -> None:
    from dsv4_hal.backends.ascend import runtime
    from dsv4_hal.backends.ascend.emulator.call import current

    soc = current()
    assert soc is not None
    assert {call: runtime.missing(call) for call in operators(TABLE, soc) if runtime.missing(call)} == {}


def test_hccl_is_the_npus_collectives(torch_npu: ModuleType) -> None:
    """As torch_npu registers it with torch.distributed."""
    assert torch.distributed.Backend.default_device_backend_map["npu"] == Ascend.collectives == "hccl"
    assert "hccl" in torch.distributed.Backend.backend_list
