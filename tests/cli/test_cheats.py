"""Cheats, played: whoever is judged changes no verdict, and claims no agreement that was not found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal import numerics

Tool = Callable[..., Any]
Install = Callable[..., Path]
FEW = ("-p", "hadamard[tokens=5,heads=4,width=128]")
SHORT = ("--tokens", "9", "--decode", "0")

# What a module does where it is imported: every case agrees, and the reference makes the same mistake.
PATCH = """
import dsv4_hal.conformance.judging.compare as compare
import dsv4_hal.conformance.judging.verdict as verdict
from dsv4_hal.backends.reference import Reference, norm_rope
from dsv4_hal.conformance.judging.results import Outcome

def fine(backend, job, *rest):
    return Outcome(backend, job.op, job.case, job.mode, "native", "agrees", against=("reference",))

def alike(got, want, *rest):
    return {name: compare.Comparison(True, {}) for name in want}

verdict.judge, verdict.compare, compare.compare = fine, alike, alike
_right = norm_rope.NormRope.rms_norm
norm_rope.NormRope.rms_norm = lambda self, x, *args, **kwargs: _right(self, x, *args, **kwargs) * 1.01
"""
CHEAT = """
from dsv4_hal.backends.reference import Reference

class Cheat(Reference):
    name = "cheat"

    def hadamard(self, x):
        return super().hadamard(x) * 1.01

    def rms_norm(self, x, *args, **kwargs):
        return super().rms_norm(x, *args, **kwargs) * 1.01
"""
PROFILE = """
from dataclasses import replace
from dsv4_hal.numerics import deployed
CHIP = replace(deployed(), mode="chip", kv=None)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(backend, profile): a package of a backend `cheat` and a profile `chip`, of modules with this code, which
    are never imported here."""
    site = tmp_path / "site packages"

    def make(backend: str = CHEAT, profile: str = PROFILE) -> Path:
        facts = site / "third_vendor-1.0.dist-info"
        facts.mkdir(parents=True)
        (site / "cheat_backend.py").write_text(backend)
        (site / "cheat_profile.py").write_text(profile)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third-vendor\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(
            "[dsv4_hal.backends]\ncheat = cheat_backend:Cheat\n[dsv4_hal.profiles]\nchip = cheat_profile:CHIP\n"
        )
        monkeypatch.syspath_prepend(str(site))
        forget()
        return site

    yield make
    assert not {"cheat_backend", "cheat_profile"} & sys.modules.keys()
    forget()


def forget() -> None:
    """Which profiles are declared, and what they are."""
    from dsv4_hal.conformance.judging import profiles

    numerics._declared.cache_clear()
    profiles.told.cache_clear()


@pytest.mark.parametrize("mode", ["exact", "chip"])
@pytest.mark.parametrize("live", [True, False])
def test_modules_that_patch_the_judge_are_not_imported_by_it(
    tool: Tool, install: Install, tmp_path: Path, mode: str, live: bool
) -> None:
    install(PATCH + CHEAT, PATCH + PROFILE)
    assert mode in tool("conform", "--mode", "none").err  # the names of modes load nothing
    some = ("--backend", "cheat", *FEW, "--mode", mode)
    if live:
        done = tool("conform", *some)
    else:
        assert tool("record", *some, "--out", tmp_path / "a.bundle").code == 0
        done = tool("compare", "--against", tmp_path / "a.bundle")
    assert done.code == 1, done.err
    assert "cheat: 1 native op of the 1 that ran; 1 case: 1 disagrees" in done.out


def test_the_reference_of_a_model_does_not_import_them_either(tool: Tool, install: Install, tiny_dir: Path) -> None:
    install(CHEAT, PATCH + PROFILE)
    done = tool("compare", "--backends", "reference,cheat", "--model", tiny_dir, "--mode", "chip", *SHORT)
    assert done.code == 1 and "cheat: layers.0.attn: disagrees" in done.out, done.err


def test_a_profile_travels_as_data(tool: Tool, install: Install, tmp_path: Path, monkeypatch: Any) -> None:
    """Where the bundle is judged the package is not installed; where it is, with another profile, that is refused."""
    site = install()
    made = tool(
        "record", "--backend", "cheat", "-o", "swiglu", "-p", "tokens=5", "--mode", "chip", "--out", tmp_path / "b"
    )
    assert made.code == 0, made.err
    (site / "cheat_profile.py").write_text(PROFILE.replace("kv=None", "hf32=True"))
    forget()
    done = tool("compare", "--against", tmp_path / "b")
    assert done.code == 2 and "profiles.chip: mode chip is not what it is here: kv None, here e4m3_1x64" in done.err
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if entry != str(site)])
        forget()
        done = tool("compare", "--against", tmp_path / "b")
        assert done.code == 0 and " agrees; " in done.out, done.err


@pytest.mark.parametrize("mode", ["exact", "chip"])
def test_a_backend_does_not_say_what_a_mode_is(tool: Tool, install: Install, mode: str) -> None:
    lie = """
import torch
import dsv4_hal.conformance.judging.worker as worker
from dataclasses import replace
_profile = worker.profile
worker.profile = lambda mode: replace(_profile(mode), accumulate=torch.bfloat16)
"""
    install(lie + CHEAT)
    done = tool("conform", "--backend", "cheat", *FEW, "--mode", mode)
    assert done.code == 3, done.out
    assert f"mode {mode} is not what it is here: accumulate bfloat16, here float32" in done.err


SENDS = """
import sys
from dsv4_hal.conformance.judging.results import Produced

class Text(str):
    pass

class Made:
    def __reduce__(self):
        return Text, ("made",)

def answer(told):
    frame = sys._getframe()
    while not {"line", "number"} <= frame.f_locals.keys():
        frame = frame.f_back
    frame.f_locals["line"].send((frame.f_locals["number"], told))
"""


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ('Produced("native", "cpu", None, "agrees")', "it has no results, and 'agrees' does not say why"),
        ('Produced("native", "cpu", {}, "agrees")', "it has results, and a verdict 'agrees'"),
        ("Made()", "it sent what is no plain data: UnpicklingError: cheat_backend.Text"),
        ('Produced("native", "cpu", None, Text("error"))', "it sent what is no plain data"),
        ("sys.exit", "it sent what is no plain data: UnpicklingError: sys.exit"),
        ("None", "answered for another case"),
    ],
)
def test_an_answer_is_data_and_no_verdict(tool: Tool, install: Install, told: str, message: str) -> None:
    install(SENDS + CHEAT.replace("return super().hadamard(x) * 1.01", f"answer({told})"))
    done = tool("conform", "--backend", "cheat", "-p", "hadamard[tokens=5,heads=4,width=128]@exact")
    assert done.code == 1 and ": misconduct: " in done.out and message in done.out, done.err


def test_a_case_is_not_computed_elsewhere_where_only_shapes_count(tool: Tool, install: Install) -> None:
    packed = 'Packed(b"", x.dtype, tuple(x.shape), tuple(x.stride()), "meta")'
    shapes = f'answer(Produced("native", "meta", {{"y": {packed}}})) if x.shape[0] == 5 else None'
    code = SENDS + CHEAT.replace("return super().hadamard(x) * 1.01", f"{shapes}\n        return super().hadamard(x)")
    install("from dsv4_hal.conformance.workers.transport import Packed\n" + code)
    done = tool("conform", "--backend", "cheat", "-o", "hadamard", "--mode", "exact")
    assert done.code == 1 and "backend cheat computed on meta, and on cpu before" in done.out, done.err


def test_what_a_backend_says_of_itself_is_data(tool: Tool, install: Install) -> None:
    install(SENDS + CHEAT + '\n    affords = Text("full")\n')
    done = tool("conform", "--backend", "cheat", *FEW)
    assert done.code == 3 and "backend cheat: it sent what is no plain data" in done.err


NOTHING = """
from dsv4_hal.backend import Verdict
from dsv4_hal.backends.reference import Reference

class Cheat(Reference):
    name = "cheat"

    def supports(self, op, facts):
        return Verdict(False, "not today")

    def hadamard(self, x):
        return x
"""


def test_refusing_everything_is_no_agreement(tool: Tool, install: Install, tmp_path: Path, tiny_dir: Path) -> None:
    install(NOTHING)
    done = tool("conform", "--backend", "cheat", *FEW)
    assert done.code == 5, done.err
    assert "hadamard is refused: not today" in done.out
    assert "cheat: 0 native ops of the 1 that ran; 2 cases: 2 agrees; nothing of it was judged" in done.out
    assert tool("record", "--backend", "cheat", *FEW, "--out", tmp_path / "a.bundle").code == 0
    done = tool("compare", "--against", tmp_path / "a.bundle")
    assert done.code == 5 and "nothing of it was judged; 2 of " in done.out
    done = tool("compare", "--backends", "reference,cheat", "--model", tiny_dir, *SHORT, "--out", tmp_path / "out")
    assert done.code == 5 and "; nothing was judged: cheat refused every op" in done.out, done.err
    done = tool("record", "--backend", "cheat", "--model", tiny_dir, *SHORT, "--out", tmp_path / "m.bundle")
    assert done.code == 0, done.err
    assert tool("compare", "--against", tmp_path / "m.bundle", "--model", tiny_dir).code == 5


def test_an_op_that_a_backend_lacks_is_not_judged(tool: Tool, install: Install) -> None:
    """Code that it inherits is what it offers; code that runs behind it is not."""
    bare = CHEAT.replace("from dsv4_hal.backends.reference import Reference", "from dsv4_hal.backend import Backend")
    install(bare.replace("(Reference)", "(Backend)"))
    done = tool("conform", "--backend", "cheat", "-o", "swiglu", "-p", "tokens=5", "--mode", "exact")
    assert done.code == 5 and " agrees; nothing of it was judged" in done.out, done.err


ODD = """
from dsv4_hal import ops
from dsv4_hal.backends.reference import Reference

class Hidden(ops.NormRope):
    def hadamard(self, x):
        return x

class Cheat(Reference, Hidden):
    name = "cheat"

    def kv_stores(self, *args):
        return None

    def _project(self, *args):
        return super()._project(*args) * 1.01
"""


def test_what_is_odd_about_a_backend_is_told_by_name(tool: Tool, install: Install, tmp_path: Path) -> None:
    install(ODD)
    done = tool("conform", "--backend", "cheat", "-p", "hc_head[tokens=3", "--mode", "exact", "--out", tmp_path / "out")
    assert done.code == 1, done.err
    assert "cheat: 1 native op of the 1 that ran" in done.out  # the helper is its own
    told = (
        "kv_stores is no op, and nothing calls it as one: is kv_store meant?",
        "hadamard of cheat_backend.Hidden is not used: dsv4_hal.backends.reference.norm_rope.NormRope, before it among "
        "the bases, has one too",
        "_project replaces a helper of dsv4_hal.backends.reference.hyper_connection.HyperConnection: its own code runs "
        "in hc_pre, hc_head",
    )
    for line in told:
        assert f"remark: {line}\n" in done.out
        assert f"- {line}\n" in (tmp_path / "out" / "report.md").read_text()
    assert tool("record", "--backend", "cheat", *FEW, "--out", tmp_path / "a.bundle").code == 0
    assert f"remark: {told[0]}" in tool("compare", "--against", tmp_path / "a.bundle").out
