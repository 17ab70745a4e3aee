"""Compilation ahead of time finds what a kernel takes, and what is wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dsv4_hal.backends.cuda import checks
from dsv4_hal.backends.triton_kernels import runtime
from dsv4_hal.backends.triton_kernels.ahead import compile_only

TARGETS = ("sm_90", "gfx942")


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], dict[str, Any]]:
    """(target, number of the launch) -> what was compiled, in a process that does not interpret."""
    script = str(Path(__file__).with_name("ahead_kernels.py"))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, script, *TARGETS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4 * len(TARGETS)  # a launch with an empty grid is none
    return {(k["target"], i % 4): k for i, k in enumerate(found)}


class Figures:
    """A compiled kernel as `checks` wants it."""

    decode = False

    def __init__(self, figures: dict[str, Any]) -> None:
        self.__dict__.update(figures)


def wrong(figures: dict[str, Any]) -> list[str]:
    return checks.problems([Figures(figures)], whole=False)  # type: ignore[list-item]


def test_a_kernel_that_fits(compiled: dict[tuple[str, int], dict[str, Any]]) -> None:
    hopper, amd = (compiled[target, 0] for target in TARGETS)
    assert wrong(hopper) == wrong(amd) == []
    assert (hopper["matrix"], amd["matrix"]) == (["wgmma bf16"], ["mfma bf16"])
    assert hopper["shared"] == 2 * 2 * (128 + 128) * 64  # two stages of two operands
    assert (hopper["kernel"], hopper["warps"], hopper["grid"]) == ("__main__.product", 8, [2, 3])
    assert hopper["constants"] == {"M": "128", "N": "128", "K": "64"}
    assert hopper["types"] == {"a": "*bf16", "b": "*bf16", "c": "*fp32", "steps": "i32"}


def test_too_much_shared_memory_is_found(compiled: dict[tuple[str, int], dict[str, Any]]) -> None:
    taken = compiled["sm_90", 1]["shared"]
    assert f"__main__.product on sm_90: {taken} bytes of shared memory, of 232448" in wrong(compiled["sm_90", 1])
    assert any("of shared memory, of 65536" in line for line in wrong(compiled["gfx942", 1]))


def test_a_missing_matrix_instruction_is_found(
    compiled: dict[tuple[str, int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = compiled["sm_90", 2]  # float32, which no matrix unit of NVIDIA multiplies exactly
    assert (wide["dots"], wide["matrix"], wrong(wide)) == (False, [], [])
    assert compiled["gfx942", 2]["matrix"] == ["mfma f32"]
    assert wrong({**wide, "dots": True}) == ["__main__.product on sm_90: has matrix products and no matrix instruction"]
    wanted = checks.Matrix("__main__.product", {"K": "64"}, {"sm_90": "wgmma e4m3"})
    monkeypatch.setattr(checks, "MATRIX", (wanted,))
    assert wrong(compiled["sm_90", 0]) == ["__main__.product on sm_90: needs wgmma e4m3, has wgmma bf16"]


def test_spills_are_found(compiled: dict[tuple[str, int], dict[str, Any]]) -> None:
    spilled = compiled["sm_90", 3]["spilled"]
    assert spilled > 0
    assert wrong(compiled["sm_90", 3]) == [f"__main__.crowded on sm_90: spills {spilled} bytes, allowed are 0"]


def test_nothing_runs_or_compiles_unasked() -> None:
    x = torch.empty(2, 4, device="meta")
    with pytest.raises(RuntimeError, match="meta device"):
        runtime.launch(None, (1,), x)
    if runtime.INTERPRETED:
        with pytest.raises(RuntimeError, match="interpreted"), compile_only("sm_90"):
            pass
