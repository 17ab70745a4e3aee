"""The real torch_npu on stub libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsv4_hal.backends.ascend.devices import SOCS, Soc, soc_of
from dsv4_hal.backends.ascend.emulator import build, call
from dsv4_hal.backends.ascend.emulator.load import CANN, DEVICE, load


def test_every_soc_has_a_device_name() -> None:
    assert set(DEVICE) == set(SOCS)
    for name, device in DEVICE.items():
        assert soc_of(device) == SOCS[name]


def test_loading_again_gives_the_same(torch_npu: ModuleType, soc: Soc) -> None:
    assert load(soc) is torch_npu


def test_another_soc_needs_another_process(torch_npu: ModuleType, soc: Soc) -> None:
    other = next(s for s in SOCS.values() if s != soc)
    with pytest.raises(RuntimeError, match=f"emulates {soc.title.split('(')[0]}.*{other.title.split('(')[0]}"):
        load(other)


def test_a_torch_npu_that_is_there_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_STATE", call._State())
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    with pytest.raises(RuntimeError, match="TORCH_DEVICE_BACKEND_AUTOLOAD=0"):
        load(SOCS["ascend950"])


def test_it_believes_to_be_on_the_soc(torch_npu: ModuleType, soc: Soc) -> None:
    assert torch.npu.get_device_name(0) == DEVICE[soc.name] and torch.npu.device_count() == 1
    assert torch_npu.npu.utils.get_cann_version() == CANN


def test_collectives_of_npu_are_hccl(torch_npu: ModuleType) -> None:
    assert torch.distributed.Backend.default_device_backend_map["npu"] == "hccl"


def test_torch_on_the_cpu_is_as_it_was(torch_npu: ModuleType) -> None:
    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    (x @ x.T).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[6, 10, 14], [6, 10, 14]]


def test_stubs_are_made_once(torch_npu: ModuleType, tmp_path: Path) -> None:
    made = build.build(tmp_path)
    assert sorted(p.name for p in made.glob("*.so")) == sorted(f"lib{name}.so" for name in build.LIBRARIES)
    before = (made / "libhccl.so").stat().st_mtime_ns
    assert build.build(tmp_path) == made and (made / "libhccl.so").stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [made]


def test_stubs_are_made_anew_for_another_stub(
    torch_npu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build.build(tmp_path)
    other = tmp_path / "stub.c"
    other.write_text(build.STUB.read_text(encoding="utf-8") + "\n/* another */\n", encoding="utf-8")
    monkeypatch.setattr(build, "STUB", other)
    assert build.build(tmp_path) != made


def test_what_does_not_compile_is_told(torch_npu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "stub.c"
    broken.write_text("int aclInit(void) { return nothing; }\n", encoding="utf-8")
    monkeypatch.setattr(build, "STUB", broken)
    with pytest.raises(build.BuildError, match="gcc failed") as error:
        build.build(tmp_path / "stubs")
    assert "nothing" in str(error.value)
    assert not list((tmp_path / "stubs").iterdir())


@pytest.mark.parametrize(("tool", "package"), [("gcc", "gcc libc6-dev"), ("nm", "binutils")])
def test_a_missing_tool_is_told(tool: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=f"{tool} is needed.*apt-get install {package}"):
        build._run(tool)


def test_a_missing_wheel_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="torch_npu is not installed: pip install"):
        build.build(tmp_path)
