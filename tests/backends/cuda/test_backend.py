"""What the CUDA backend says of itself: where it can run, what stands for a GPU, and what is wrong where it cannot."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dsv4_hal.registry import list_backends


def told(code: str, *paths: object, **environ: str) -> str:
    """What a program prints in a process of its own, in which kernels are not interpreted unless it says so."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "DSV4_HAL"))}
    path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": path} | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


WHO = """
import json
from dsv4_hal.registry import list_backends
from dsv4_hal.numerics import deployed
from dsv4_hal.dispatch import select
cuda = next(info for info in list_backends() if info.name == "cuda")
chosen = select(["auto"], deployed()).primary.name
print(json.dumps([cuda.available, cuda.reason, cuda.remedy, cuda.automatic, chosen]))
"""


@pytest.mark.parametrize(
    "broken", ["raise OSError('libtriton.so: cannot open shared object file')", "import sys; sys.exit(1)"]
)
def test_a_broken_triton_leaves_everything_else_working(tmp_path, broken):
    (tmp_path / "triton.py").write_text(broken + "\n")
    available, reason, _, _, chosen = json.loads(told(WHO, tmp_path))
    assert not available and reason.startswith("backend cuda does not load: ") and chosen == "reference"
    assert ("OSError: libtriton.so" in reason) == ("OSError" in broken)


def test_without_triton_it_says_what_to_install(tmp_path):
    hide = "import sys; sys.modules['triton'] = None\n"  # what `import` makes of a package that is not there
    available, reason, remedy, _, chosen = json.loads(told(hide + WHO, tmp_path))
    assert not available and "triton" in reason and chosen == "reference"
    assert remedy == "install the package that provides the Python module triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_how_to_check_kernels():
    pytest.importorskip("triton")
    available, reason, remedy, _, _ = json.loads(told(WHO))
    assert not available and reason == "torch finds no NVIDIA GPU" and "TRITON_INTERPRET=1" in remedy


EXPLAINED = """
from dsv4_hal.cli import main
import sys
chosen = ["--backend", "cuda", "--model", "v4-flash", "--assume", "sm_100", "--mode", MODE]
sys.argv = ["dsv4-hal", "explain", *chosen, "--json"]
main()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("mode", ["deployed", "exact"])
def test_what_would_run_elsewhere_is_explained(mode):
    pytest.importorskip("triton")
    found = json.loads(told(EXPLAINED.replace("MODE", repr(mode))))
    assert found["device"] == "meta" and found["assumed"] == "sm_100"
    assert found["counts"]["native"] >= 25


class TestInterpreted:
    """In this process, as tests/conftest.py sets it up."""

    @pytest.fixture(autouse=True)
    def interpreted(self):
        pytest.importorskip("triton")
        from dsv4_hal.backends.triton_kernels.runtime import INTERPRETED

        if not INTERPRETED:
            pytest.skip("kernels are compiled here: TRITON_INTERPRET is not set")

    def test_it_is_used_only_by_name_and_says_that_it_is_interpreted(self):
        (info,) = list_backends(["cuda"])
        assert info.available and not info.automatic and info.device == "cpu"
        assert info.reason.startswith("interpreted on the CPU by triton 3.9.")

    def test_every_headline_says_so(self):
        from dsv4_hal.conformance.judging.results import About
        from dsv4_hal.conformance.reports.report import Run
        from dsv4_hal.environment import environment

        run = Run("cuda", [], About("", {}, environment(["cuda"])))
        assert run.headline.startswith("cuda (interpreted on the CPU by triton 3.9.")
        assert ", as for sm_90): 0 native ops" in run.headline

    def test_an_architecture_can_be_assumed(self, monkeypatch):
        from dsv4_hal.backend import BackendError
        from dsv4_hal.backends.cuda import Cuda
        from dsv4_hal.numerics import deployed

        assert Cuda(deployed()).arch.name == "sm_90"
        monkeypatch.setenv("DSV4_HAL_ASSUME", "sm_100")
        assert Cuda(deployed()).arch.scaled and "as for sm_100" in Cuda.environment()["emulated"]
        monkeypatch.setenv("DSV4_HAL_ASSUME", "sm_91")
        with pytest.raises(BackendError, match=r"DSV4_HAL_ASSUME=sm_91: no such architecture.*did you mean sm_90\?"):
            Cuda(deployed())

    def test_it_refuses_other_devices_and_float64(self):
        from dsv4_hal.backend import BackendError
        from dsv4_hal.backends.cuda import Cuda
        from dsv4_hal.numerics import deployed, exact

        with pytest.raises(BackendError, match="device 'nonsense' cannot be used"):
            Cuda(deployed(), "nonsense")
        verdict = Cuda(exact(torch.float64)).supports("linear", {})
        assert not verdict and "sum in float32, the profile in torch.float64" in verdict.reason
