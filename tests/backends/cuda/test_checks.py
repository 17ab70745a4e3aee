"""What is wrong with a compiled kernel, by figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

pytest.importorskip("triton")

from dsv4_hal.backends.cuda import checks
from dsv4_hal.backends.cuda.checks import Matrix, Spill, problems
from dsv4_hal.backends.cuda.devices import ARCHS, DEVICES


@dataclass(frozen=True)
class Figures:
    kernel: str = "a"
    target: str = "sm_90"
    constants: Mapping[str, str] = field(default_factory=lambda: {"N": "64"})
    shared: int = 0
    tensor: int = 0
    spilled: int = 0
    dots: bool = False
    matrix: Sequence[str] = ()
    grid: Sequence[int] = (1,)
    decode: bool = False


FITS = Figures()


@pytest.mark.parametrize(
    ("figures", "what"),
    [
        (replace(FITS, shared=ARCHS["sm_90"].shared), None),
        (replace(FITS, shared=ARCHS["sm_90"].shared + 1), "232449 bytes of shared memory, of 232448"),
        (replace(FITS, target="sm_100", tensor=512), None),
        (replace(FITS, target="sm_100", tensor=576), "576 columns of tensor memory, of 512"),
        (replace(FITS, tensor=1), "1 columns of tensor memory, of 0"),
        (replace(FITS, grid=(1 << 20, 65535)), None),
        (replace(FITS, grid=(1, 65536)), "second and third axis"),
        (replace(FITS, spilled=4), "spills 4 bytes, allowed are 0"),
        (replace(FITS, target="gfx942", spilled=4), None),
        (replace(FITS, dots=True, matrix=("mma bf16",)), None),
        (replace(FITS, dots=True), "has matrix products and no matrix instruction"),
        (replace(FITS, kernel="gemm", dots=True, matrix=("wgmma e4m3",)), None),
        (replace(FITS, kernel="gemm", dots=True, matrix=("mma e4m3",)), "needs wgmma e4m3, has mma e4m3"),
        (replace(FITS, kernel="gemm", constants={"N": "32"}, dots=True, matrix=("mma e4m3",)), None),
        (replace(FITS, kernel="gemm", target="sm_80", dots=True, matrix=("mma bf16",)), None),
    ],
)
def test_limits(figures: Figures, what: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SPILLS", ())
    monkeypatch.setattr(checks, "MATRIX", (Matrix("gemm", {"N": "64"}, {"sm_90": "wgmma e4m3"}),))
    found = problems([figures, FITS])
    assert found == [] if what is None else len(found) == 1 and what in found[0]


@pytest.mark.parametrize(
    ("spilled", "decode", "what"),
    [
        (64, True, None),
        (40, False, "64 bytes of spills are allowed, it has 40"),
        (0, False, "64 bytes of spills are allowed, it has 0"),
        (65, False, "spills 65 bytes, allowed are 64"),
    ],
)
def test_an_allowance_is_exact(spilled: int, decode: bool, what: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SPILLS", (Spill("a", "sm_90", 64, "tests"), Spill("a", "sm_80", 8, "not compiled")))
    found = problems([replace(FITS, spilled=spilled, decode=decode)])
    assert found == [] if what is None else any(what in line for line in found)
    assert len(problems([replace(FITS, spilled=spilled)], whole=False)) == (spilled > 64)


def test_a_decode_step_spills_beyond_its_limit_only_where_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SPILLS", (Spill("a", "sm_90", 80, "tests"),))
    assert problems([replace(FITS, spilled=80)]) == []
    assert any("in a decode step" in line for line in problems([replace(FITS, spilled=80, decode=True)]))
    monkeypatch.setattr(checks, "SPILLS", (Spill("a", "sm_90", 80, "tests", measured=True),))
    assert problems([replace(FITS, spilled=80, decode=True)]) == []


def test_a_bound_takes_the_narrowest_unit_that_holds_the_operands() -> None:
    h100, b200, a100 = (DEVICES[name] for name in ("H100", "B200", "A100"))
    assert h100.rate("fp4") == h100.rates["fp8"]
    assert a100.rate("fp8") == a100.rates["bf16"]
    assert b200.rate("fp4") == 2 * b200.rates["fp8"]
    assert h100.bound({"bf16": 989.4e12, "fp32": 66.9e12}, 3.35e12) == pytest.approx(2.0)
    assert h100.bound({}, 6.7e12) == pytest.approx(2.0)
    assert all(device.arch in ARCHS for device in DEVICES.values())
