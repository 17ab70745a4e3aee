"""What the probe says of libraries that are there, absent, broken or old; and that nothing imports them before it."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backend import Origin
from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.cuda.vendor import flash_mla, probe
from dsv4_hal.backends.cuda.vendor.backend import CudaVendor
from dsv4_hal.backends.cuda.vendor.profiles import DEEPGEMM
from dsv4_hal.dispatch import resolve
from dsv4_hal.model.config import find_config
from dsv4_hal.numerics import deployed, exact, numerics_for
from dsv4_hal.ops import OPS


def broken(path: Path, monkeypatch: pytest.MonkeyPatch, raising: str) -> None:
    """Both libraries, on the path, raising when they are imported."""
    for library in probe.LIBRARIES:
        (path / f"{library}.py").write_text(raising)
        monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.syspath_prepend(str(path))


def test_importing_the_backend_imports_no_library() -> None:
    code = (
        "import sys, dsv4_hal.backends.cuda.vendor.backend as b; b.CudaVendor.available(); b.CudaVendor.environment();"
        "assert not {'deep_gemm', 'flash_mla'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_device_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(tmp_path, monkeypatch, "raise SystemExit('imported')")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.verdict("deep_gemm").reason == "torch finds no NVIDIA GPU"
    assert Cuda.environment()["FlashMLA"] == "not usable: torch finds no NVIDIA GPU"
    assert "DeepGEMM: torch finds no NVIDIA GPU; FlashMLA: " in CudaVendor.available().reason


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((9, 0), None, "sm_90"), ((8, 0), None, "this GPU is sm_80"), ((12, 0), None, "sm_120"), ((9, 4), "6.0", "AMD")],
)
def test_devices(capability: tuple[int, int], hip: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = probe.device()
    assert found.ok == (reason == "sm_90") and reason in found.reason


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("raising", "reason"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("raise ImportError('libcudart.so.13')", "ImportError: libcudart.so.13"),
        (
            "raise OSError('Could not load: _C.so\\nand more')",
            "OSError: Could not load: _C.so",
        ),
        ("assert False, 'CUDA_HOME'", "AssertionError: CUDA_HOME"),
        ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_whatever_they_raise_is_a_reason(
    raising: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(tmp_path, monkeypatch, raising)
    for library, (title, package) in probe.LIBRARIES.items():
        found = probe.verdict(library)
        assert not found and found.reason == f"it does not load: {reason}"
        assert "built for this torch" in found.remedy and package in found.remedy
        assert probe.offers(library, "anything").reason == f"{title}: {found.reason}"
        assert probe.environment()[title] == f"not usable: {found.reason}"
    available = CudaVendor.available()
    assert not available and reason in available.reason and "sgl-flash-mla" in available.remedy


@pytest.mark.usefixtures("gpu")
def test_absent_libraries_are_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "deep_gemm":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    assert probe.verdict("deep_gemm").remedy == "install DeepGEMM (on PyPI: sgl-deep-gemm)"


def test_it_is_asked_once(vendor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vendor()
    assert probe.verdict("deep_gemm").reason == "DeepGEMM 0.0 (a stand-in)"
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    assert probe.verdict("deep_gemm")


def test_what_an_older_version_lacks_is_named(vendor: Callable[..., Any], stand_ins: Any) -> None:
    old = stand_ins.deep_gemm("sm_100")
    del old.fp8_fp4_mqa_logits
    old.get_num_sms = "132"
    backend = vendor("sm_100", deep_gemm=old)
    found = backend.supports("index_topk", {})
    assert found.reason == "DeepGEMM 0.0 (a stand-in) has no fp8_fp4_mqa_logits, get_num_sms"
    assert backend.supports("linear", {})


def test_versions_of_flash_mla_differ_in_rows(vendor: Callable[..., Any], stand_ins: Any) -> None:
    vendor("sm_90")
    assert flash_mla.able("sm_90") and flash_mla.options() == {}
    sgl = stand_ins.flash_mla(legacy=True)
    vendor("sm_90", flash_mla=sgl)
    assert flash_mla.able("sm_90") and flash_mla.options() == {"use_legacy": True}
    sgl.has_legacy = lambda: False
    assert "built without" in flash_mla.able("sm_90").reason
    sgl.flash_mla_with_kvcache = lambda q, extra_k_cache=None, enable_batch_invariant=False: None
    assert "V4.1 only" in flash_mla.able("sm_90").reason
    sgl.flash_mla_with_kvcache = lambda q, k_cache: None
    assert "older than DeepSeek-V4" in flash_mla.able("sm_90").reason
    assert "not for sm_120" in flash_mla.able("sm_120").reason


def test_one_library_is_enough(vendor: Callable[..., Any]) -> None:
    backend = vendor("sm_90", flash_mla=None)
    assert backend.available().reason.endswith("with DeepGEMM 0.0 (a stand-in)")
    ops = resolve([backend, Cuda(deployed(), "cpu")])
    by_op = {r.op: r for r in ops.resolutions}
    assert (by_op["linear"].kind, by_op["linear"].backend) == ("native", "cuda-vendor")
    assert by_op["sparse_attention"].backend != "cuda-vendor"
    assert by_op["sparse_attention"].rejected[0][0] == "cuda-vendor"
    assert "FlashMLA: it does not load" in by_op["sparse_attention"].rejected[0][1]


REFUSED = {
    ("sm_90", "v4-flash"): {"index_topk": "e4m3_row_fp32", "grouped_linear": "mxfp4", "moe_experts": "sm_90"},
    ("sm_100", "v4-flash"): {"moe_experts": "round inputs to mxfp8, this profile to e4m3_1x128"},
    ("sm_100", "v4-pro"): {"moe_experts": "mxfp8"},
}
SERVED = ("linear", "grouped_linear", "index_topk", "sparse_attention", "hc_pre", "hc_head", "moe_experts")


@pytest.mark.parametrize(("arch", "model"), REFUSED)
def test_published_models(arch: str, model: str, vendor: Callable[..., Any]) -> None:
    """What of the published models each architecture serves, and why not the rest."""
    backend, facts = vendor(arch, DEEPGEMM), vars(find_config(model)[0])
    if arch == "sm_100":
        assert "mode deployed rounds them: mode deepgemm does not" in vendor(arch).supports("index_topk", facts).reason
    for op in SERVED:
        found, refused = backend.supports(op, facts), REFUSED[arch, model].get(op)
        assert found.ok == (refused is None), (op, found)
        assert refused is None or refused in found.reason
    assert backend.supports("rms_norm", facts).reason == "no restriction"


def test_what_is_the_librarys_what_cudas_and_what_is_made_of_both() -> None:
    kinds = {op: CudaVendor.origin(op) for op in OPS}
    assert {op for op, of in kinds.items() if of.backend == "cuda-vendor"} == {*SERVED, "hc_pre_norm"}
    assert kinds["mlp"].kind == kinds["output_proj"].kind == "composite"  # so that their products reach the library
    assert kinds["rms_norm"] == Origin("inherited", "cuda")


def test_the_profile_is_a_mode() -> None:
    assert numerics_for("deepgemm") == DEEPGEMM


def test_other_profiles_are_refused(vendor: Callable[..., Any]) -> None:
    backend = vendor("sm_100", exact())
    for op in SERVED:
        assert not backend.supports(op, {}), op
    assert backend.row_layout("window", 512, 64, 1, 128).name == "plain"


def test_only_who_names_it_gets_it() -> None:
    assert not CudaVendor.automatic and CudaVendor.name == "cuda-vendor"
    assert isinstance(probe.LIBRARIES, types.MappingProxyType)
