"""Which situations the backend can be used in, what it says in the others, and what it explains for a SoC that is not
here. Neither torch_npu nor an NPU is needed: a package of that name is made up where one is looked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsv4_hal.backend import ASSUME, BackendError
from dsv4_hal.backends.ascend import Ascend, runtime
from dsv4_hal.backends.ascend.devices import DEFAULT, EMULATE, SOCS
from dsv4_hal.dispatch import Resolution, Resolved, select
from dsv4_hal.model.config import find_config
from dsv4_hal.numerics import deployed, exact, numerics_for

Package = Callable[[str], None]
HERE = """
__version__ = "2.13.0"
class npu:
    @staticmethod
    def device_count(): return {count}
    @staticmethod
    def get_device_name(index): return {name!r}
    class utils:
        @staticmethod
        def get_cann_version(): return "9.1.0"
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No switch is set, and nothing is remembered of other tests, nor of these by others."""
    asked = (runtime.package, runtime.device_name, runtime.custom)
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torch_npu"}
    for variable in (ASSUME, EMULATE):
        monkeypatch.delenv(variable, raising=False)
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    for question in asked:
        question.cache_clear()
    yield
    sys.modules.pop("torch_npu", None)
    for question in asked:
        question.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """package(source): a torch_npu of this source is installed."""

    def install(source: str) -> None:
        folder = tmp_path / "torch_npu"
        folder.mkdir()
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    verdict = Ascend.available()
    assert (verdict.ok, verdict.reason) == (False, "torch_npu is not installed")
    assert verdict.remedy.startswith("install CANN, then pip install --no-deps torch_npu==2.")
    with pytest.raises(BackendError, match="torch_npu is not installed"):
        Ascend(numerics_for("a3"))


@pytest.mark.parametrize(
    ("source", "reason", "remedy"),
    [
        (
            "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')",
            "CANN is missing, or not on the library path: ImportError: libhccl.so",
            "set_env.sh",
        ),
        ("raise OSError('libascendcl.so: cannot open')", "CANN is missing", "set_env.sh"),
        (
            "try:\n    raise ImportError('libge_runner.so: no such file')\n"
            "except ImportError as error:\n    raise RuntimeError('cannot be initialised') from error",
            "CANN is missing, or not on the library path: RuntimeError: cannot be initialised",
            "set_env.sh",
        ),
        (
            "raise ImportError('undefined symbol: _ZN3c10')",
            "torch_npu does not load: ImportError: undefined symbol: _ZN3c10",
            "built for torch",
        ),
        ("raise SystemExit(3)", "torch_npu does not load: SystemExit: 3", "built for torch"),
        ("", "torch_npu does not load: AttributeError: module 'torch_npu' has no attribute '__version__'", "torch_npu"),
        ("__version__ = '2'", "torch_npu 2 cannot say which NPU this is: AttributeError", "set_env.sh"),
    ],
)
def test_a_torch_npu_that_does_not_load(package: Package, source: str, reason: str, remedy: str) -> None:
    package(source)
    verdict = Ascend.available()
    assert not verdict.ok
    assert reason in verdict.reason
    assert remedy in verdict.remedy


def test_no_npu(package: Package) -> None:
    package(HERE.format(count=0, name=""))
    verdict = Ascend.available()
    assert (verdict.ok, verdict.reason) == (False, "torch_npu 2.13.0 finds no NPU")
    assert "npu-smi info" in verdict.remedy


@pytest.mark.parametrize("name", ["Ascend310P3", "Ascend1000"])
def test_a_soc_that_is_refused(package: Package, name: str) -> None:
    package(HERE.format(count=1, name=name))
    verdict = Ascend.available()
    assert not verdict.ok
    assert name in verdict.reason


def test_a_runtime_that_fails(package: Package) -> None:
    package(HERE.format(count=1, name="").replace("return ''", "raise RuntimeError('error 507033')"))
    assert "cannot say which NPU this is: RuntimeError: error 507033" in Ascend.available().reason


def test_an_npu(package: Package) -> None:
    package(HERE.format(count=8, name="Ascend910_9382"))
    assert Ascend.available().reason == "Ascend910_9382, Ascend 910C (A3)"
    found = Ascend.environment()
    assert (found["npu"], found["CANN"]) == ("Ascend910_9382", "9.1.0")
    assert "emulated" not in found


def test_switches_that_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASSUME, "sm_90")
    assert "DSV4_HAL_ASSUME=sm_90: no such SoC" in Ascend.available().reason
    monkeypatch.delenv(ASSUME)
    monkeypatch.setenv(EMULATE, "perhaps")
    assert "DSV4_HAL_EMULATE=perhaps: must be true or false" in Ascend.available().reason


def test_emulation_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMULATE, "true")
    monkeypatch.setattr("dsv4_hal.backends.ascend._version", lambda name: "2.13.0" * (name == "torch_npu"))
    monkeypatch.setenv(ASSUME, "ascend950")
    verdict = Ascend.available()
    how = "emulated on the CPU, as an Ascend 950 (A5), by torch_npu 2.13.0 on stub libraries"
    assert (verdict.ok, verdict.reason) == (True, f"{how}: to check calls, not to serve")
    assert Ascend.environment()["emulated"] == how
    monkeypatch.setattr("dsv4_hal.backends.ascend._version", lambda name: "")
    assert "needs the package torch_npu" in Ascend.available().reason


@pytest.mark.parametrize("name", list(SOCS))
def test_a_mode_of_another_generation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(ASSUME, name)
    wrong = [numerics_for(mode) for mode in DEFAULT if mode != SOCS[name].mode]
    for numerics in (*wrong, deployed(), exact(torch.bfloat16)):
        with pytest.raises(BackendError, match=f"not {numerics.mode}: --mode {SOCS[name].mode}"):
            Ascend(numerics)


def explained(name: str, model: str = "v4-flash") -> dict[str, Resolution]:
    found: Resolved = select(["ascend"], numerics_for(SOCS[name].mode), vars(find_config(model)[0]))
    assert found.device.type == "meta"
    return {resolution.op: resolution for resolution in found.resolutions}


NATIVE = ("block_diagonal_linear", "rms_norm", "rope", "hc_pre", "hc_post", "permute", "swiglu")


@pytest.mark.parametrize("name", list(SOCS))
def test_explain_for_a_soc_that_is_not_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda package: None)
    monkeypatch.setenv(ASSUME, name)
    assert f"this machine is taken for an {SOCS[name].title}" in Ascend.available().reason
    found = explained(name)
    assert {op: found[op].runs_as for op in NATIVE} == dict.fromkeys(NATIVE, "native")
    assert found["route"].runs_as == "reference"
    assert "not npu_moe_gating_top_k: its scores are softmax or sigmoid" in found["route"].reason
    assert not found["route"].fallback, "refused for what they compute: nothing for strict to complain about"
    assert found["embedding"].adopted
    assert found["moe_experts"].kind == "composite"
    assert "not npu_grouped_matmul_swiglu_quant_v2: it has no clamp" in found["moe_experts"].reason


def test_widths_of_v4_pro(monkeypatch: pytest.MonkeyPatch) -> None:
    """65536 channels of queries: documents bound a last dimension to 65535 on the 910s, not on the 950."""
    monkeypatch.setattr(runtime, "find_spec", lambda package: None)
    monkeypatch.setenv(ASSUME, "ascend950")
    found = explained("ascend950", "v4-pro")
    assert found["linear"].runs_as == found["block_diagonal_linear"].runs_as == "native"
    monkeypatch.setenv(ASSUME, "ascend910_93")
    assert (
        "flat inputs 65536, not at most 65535" in explained("ascend910_93", "v4-pro")["block_diagonal_linear"].fallback
    )


def test_explain_names_each_generations_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda package: None)
    monkeypatch.setenv(ASSUME, "ascend950")
    a5 = explained("ascend950")
    monkeypatch.setenv(ASSUME, "ascend910_93")
    a3 = explained("ascend910_93")
    assert a5["hc_pre"].reason.startswith("npu_mhc_pre + npu_mhc_sinkhorn")
    assert "its product is in HF32, the profile's in float32" in a5["hc_pre"].reason
    assert a3["hc_pre"].reason.startswith("_C_ascend::npu_hc_pre_v2 (product in HF32")
    assert a5["linear"].reason.startswith("npu_dynamic_mx_quant + npu_quant_matmul; aten::linear")
    assert a5["swiglu"].reason.startswith("npu_swiglu")
    assert a3["swiglu"].reason.startswith("npu_clipped_swiglu")


def test_fp8_on_the_910_is_no_native_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASSUME, "ascend910b")
    monkeypatch.setattr(runtime, "find_spec", lambda package: None)
    found = explained("ascend910b")
    for op, stored in (("linear", "e4m3_128x128"), ("grouped_linear", "mxfp4")):
        assert found[op].runs_as == "reference"
        assert f"Ascend 910B (A2) multiplies no {stored}: see dsv4-hal convert" in found[op].rejected[0][1]
        assert f"format {stored}, not int8_channel" in found[op].rejected[0][1]
        assert found[op].fallback


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_converted_models_are_multiplied_natively(monkeypatch: pytest.MonkeyPatch, experts: str) -> None:
    monkeypatch.setenv(ASSUME, "ascend910_93")
    monkeypatch.setattr(runtime, "find_spec", lambda package: None)
    facts = vars(find_config("v4-flash")[0]) | {"expert_dtype": experts}
    found = {r.op: r for r in select(["ascend"], numerics_for("a3"), facts).resolutions}
    assert (found["linear"].runs_as, found["grouped_linear"].runs_as) == ("native", "native")


def test_a_vendor_package_that_breaks_torch_does_not_break_this_one(tmp_path: Path) -> None:
    """An installed torch_npu without CANN: torch loads it with itself, and fails."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    folder = tmp_path / "torch_npu-2.13.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (folder / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    before = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    environment = before | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    assert run("import torch").returncode, "the case is none: torch does not look for packages to load"
    done = run(
        "import os, dsv4_hal\n"
        "assert 'TORCH_DEVICE_BACKEND_AUTOLOAD' not in os.environ\n"
        "print([b.reason for b in dsv4_hal.list_backends() if b.name == 'ascend'][0])"
    )
    assert done.returncode == 0, done.stderr
    assert "CANN is missing" in done.stdout
