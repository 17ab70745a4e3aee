"""How an operator is declared, and what a call goes through."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
import torch

from dsv4_hal.backends.ascend.emulator import call
from dsv4_hal.backends.ascend.emulator.call import NO_META, OPS, Op, emulated, meta_differs, no_meta


@pytest.fixture
def nothing_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "OPS", {})


def test_a_name_is_declared_once(nothing_declared: None) -> None:
    emulated("npu::npu_swiglu")(lambda x: x)
    with pytest.raises(ValueError, match="npu::npu_swiglu is declared twice"):
        emulated("npu::npu_swiglu")(lambda x: x)


def test_an_operator_of_ones_own_has_no_meta_kernel(nothing_declared: None) -> None:
    with pytest.raises(ValueError, match="npu::own has no meta kernel"):
        emulated("npu::own", schema="(Tensor x) -> Tensor")(lambda x: x)
    emulated("npu::own", schema="(Tensor x) -> Tensor", meta=NO_META)(lambda x: x)


def test_a_result_must_be_what_the_meta_kernel_says() -> None:
    def difference(made: object, said: object, meta: call.Meta | None = None) -> str:
        return call._difference(Op("npu::op", lambda: None, meta=meta), made, said)

    here, there = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
    assert difference(here, there) == ""
    assert "float32[2, 3], the meta kernel says bfloat16[2, 3]" in difference(here, there.bfloat16())
    assert "result 1 is float32[2, 3], the meta kernel says None" in difference((here, here), (there, None))
    assert difference((here, None), (there, there), meta_differs("so it is", results=(1,))) == ""
    assert difference((here, None), (there[0], there), meta_differs("so it is", results=(1,)))
    assert difference(here, None, no_meta("none")) == ""


def test_where_a_meta_kernel_is_not_asked_there_is_none(torch_npu: ModuleType) -> None:
    for op in OPS.values():
        there = torch._C._dispatch_has_kernel_for_dispatch_key(op.name, "Meta")
        assert there == (op.meta is None or op.meta.asked), op.name


def test_mhc_pre_still_names_results_that_are_not_returned(torch_npu: ModuleType) -> None:
    """Else its exception is to go."""
    x, phi = torch.zeros(3, 4, 32, device="meta", dtype=torch.bfloat16), torch.zeros(24, 128, device="meta")
    said = torch_npu.npu_mhc_pre(x, phi, phi[0, :3], phi[:, 0])
    assert all(result is not None for result in said)


def test_every_operator_is_callable(torch_npu: ModuleType) -> None:
    for op in OPS.values():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name, "CPU"), op.name


def test_results_lie_row_by_row(torch_npu: ModuleType) -> None:
    x = torch.randn(8, 6).bfloat16().T
    for result in (*torch_npu.npu_dynamic_quant(x), torch_npu.npu_swiglu(x), *torch_npu.npu_rms_norm(x, x[0])):
        assert result.is_contiguous()


OWN = """
    import torch
    from dsv4_hal.backends.ascend.devices import SOCS
    from dsv4_hal.backends.ascend.emulator.call import NO_META, emulated
    from dsv4_hal.backends.ascend.emulator.load import load

    @emulated("own_ops::double", schema="(Tensor x, int? times=2) -> Tensor", meta=NO_META)
    def double(x, times):
        return x * times

    @emulated("own_ops::count", schema="(int n, Tensor? like=None) -> Tensor", meta=NO_META)
    def count(n, like):
        return torch.arange(n)

    load(SOCS["ascend950"])
    assert torch.ops.own_ops.double(torch.ones(2)).tolist() == [2, 2]
    assert torch.ops.own_ops.double(torch.ones(2), times=3).tolist() == [3, 3]
    assert torch.ops.own_ops.count(3).tolist() == [0, 1, 2]
    assert torch.ops.own_ops.count(3, torch.ones(1)).tolist() == [0, 1, 2]
"""


def test_operators_of_another_package_get_their_schemas(torch_npu: ModuleType) -> None:
    """Those without a tensor among their arguments too: metadata is made of numbers."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OWN)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
