"""`record` and `compare`: verdicts of a run, in another process and another place."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv4_hal.conformance.reports import bundle as bundles
from dsv4_hal.conformance.workers import container

Tool = Callable[..., Any]
FEW = ("-o", "swiglu", "-o", "index_topk", "-o", "quantize", "-p", "5", "--mode", "deployed")
DAYS = "date: {}, expires: {}".format(*(datetime.date.today() + datetime.timedelta(days) for days in (-4, 30)))
WRONG = """
import torch
from dsv4_hal.backends.reference import Reference

class Third(Reference):
    name = "third"

    def swiglu(self, *args, out=None, **kwargs):
        y = super().swiglu(*args, out=out, **kwargs) * 1.01
        return y.T.contiguous().T  # right values would still be wrong: strides

    def index_topk(self, *args, **kwargs):
        raise ZeroDivisionError("no keys")
"""


def lines(report: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (report / "results.jsonl").read_text().splitlines()[1:]]
    for line in found:
        del line["seconds"]
    return found


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("backend", ["third", "reference", "null"])
def test_a_moved_bundle_gives_the_verdicts_of_a_live_run_to_the_bit(tool: Tool, tmp_path: Path, backend: str) -> None:
    (tmp_path / "site packages" / "third_vendor.py").write_text(WRONG)
    (tmp_path / "site packages" / "waivers.yaml").write_text(
        f'- {{case: "index_topk[", reason: not yet, {DAYS}, backend: third}}\n'
    )
    live = tool("conform", "--backend", backend, *FEW, "--out", tmp_path / "live")
    made = tool("record", "--backend", backend, *FEW, "--out", tmp_path / "new" / "a.bundle")
    assert made.code == 0, made.err
    (tmp_path / "else where").mkdir()
    shutil.move(tmp_path / "new" / "a.bundle", tmp_path / "else where" / "b")
    done = tool("compare", "--against", tmp_path / "else where" / "b", "--out", tmp_path / "moved")
    assert lines(tmp_path / "moved") == lines(tmp_path / "live")
    told = "not asked: closed forms and golden vectors: a bundle holds the cases of the contract"
    assert (told in done.out) == (backend == "reference")
    assert done.code == live.code
    moved = re.sub(r"; \d+ of \d+ cases recorded|not recorded: .*\n", "", done.out)
    assert moved != done.out and [line for line in moved.splitlines() if told not in line] == live.out.splitlines()
    assert "recorded with dsv4-hal" in done.err and sys.executable not in done.err
    assert live.code == {"third": 1, "null": 5, "reference": 0}[backend]


@pytest.fixture
def bundle(tool: Tool, tmp_path: Path) -> Path:
    path = tmp_path / "a.bundle"
    assert tool("record", *FEW[:2], *FEW[6:], "--out", path).code == 0
    return path


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """A copy with a changed header or changed tensors."""
    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path.with_name("changed"), metadata)
    return path.with_name("changed")


def test_a_bundle_is_not_written_over(tool: Tool, bundle: Path) -> None:
    before = bundle.read_bytes()
    done = tool("record", "--out", bundle)
    assert done.code == 2 and "exists, and a bundle is not written over it" in done.err
    assert bundle.read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == ["a.bundle"]


def test_a_bundle_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(container, "save_file", full)
    with pytest.raises(container.BundleError, match=r"a\.bundle: cannot be written: .*No space left on device"):
        container.write(tmp_path / "a.bundle", "ops", {}, {})
    assert not list(tmp_path.iterdir())


def test_bundles_that_cannot_be_judged(tool: Tool, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        done = tool("compare", "--against", path)
        assert done.code == 2
        return str(done.err)

    assert "nowhere: no such file" in refused(bundle.with_name("nowhere"))
    whole = bundle.read_bytes()
    bundle.with_name("cut").write_bytes(whole[:-100])
    assert "cut: damaged, or no bundle" in refused(bundle.with_name("cut"))
    bundle.with_name("flipped").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "its checksum does not fit" in refused(bundle.with_name("flipped"))
    assert "its checksum does not fit" in refused(changed(bundle, lambda t, m: t.popitem()))
    assert "a safetensors file, but no bundle" in refused(changed(bundle, lambda t, m: m.clear()))
    lied = changed(
        bundle, lambda t, m: m.update(dsv4_hal=m["dsv4_hal"].replace("agrees", "x").replace("swiglu", "y", 1))
    )
    assert "its checksum does not fit" in refused(lied)
    with monkeypatch.context() as patch:
        patch.setattr("dsv4_hal.conformance.reports.bundle.contract", lambda: "other")
        assert "whose cases are others than those here" in refused(bundle)
    with monkeypatch.context() as patch:
        patch.setattr("dsv4_hal.conformance.reports.bundle.inputs", lambda: "other")
        assert "drew other inputs there" in refused(bundle)
    with monkeypatch.context() as patch:
        patch.setattr("dsv4_hal.conformance.workers.container.FORMAT", "5")
        assert "of format 4; this version reads format 5" in refused(bundle)
    assert tool("compare", "--against", bundle).code == 0


def test_a_bundle_that_does_not_hold_together(tool: Tool, bundle: Path) -> None:
    """Its sum is right: whoever made it made it so."""
    header, tensors = container.read(bundle, "ops")
    first = header["cases"][0]
    name = f"{first['case']}@{first['mode']}"

    def refused(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> str:
        changed, others = copy.deepcopy(header), dict(tensors)
        change(changed, others)
        path = bundle.with_name("changed")
        path.unlink(missing_ok=True)
        container.write(path, "ops", {k: v for k, v in changed.items() if k not in ("format", "kind")}, others)
        with pytest.raises(container.BundleError) as caught:
            bundles.read_bundle(path)
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value).removeprefix(f"{path}: ")

    def result(**facts: object) -> Callable[[dict[str, Any], dict[str, Any]], object]:
        return lambda h, t: h["cases"][0]["results"]["y"].update(facts)

    assert refused(lambda h, t: h.pop("contract")) == "contract: Field required"
    assert refused(lambda h, t: h["cases"][0].pop("verdict")) == "cases.0.verdict: Field required"
    assert refused(lambda h, t: h["environment"].pop("machine")) == "environment.machine.python: Field required"
    assert refused(lambda h, t: h["extent"].update(size="huge")).startswith("extent: a size class must be")
    assert refused(lambda h, t: h["cases"].clear()) == "cases: there are none"
    assert refused(lambda h, t: h["cases"].append(first)) == f"{name}: it is there twice"
    assert refused(lambda h, t: h["cases"][0].update(op="rope")) == f"{name}: it is no case of rope"
    assert "is no id of a case" in refused(lambda h, t: h["cases"][0].update(case="x"))
    assert "'fast' is no mode" in refused(lambda h, t: h["cases"][0].update(mode="fast"))
    told = refused(lambda h, t: h["cases"][0].update(results=None, verdict="agrees"))
    assert told == f"{name}: it has no results, and 'agrees' does not say why"
    assert refused(lambda h, t: h["suite"]["missing"].clear()).startswith("suite: it says ")
    assert refused(lambda h, t: h["profiles"]["deployed"].update(score="float32")) == (
        "profiles.deployed: mode deployed is not what it is here: score float32, here bfloat16"
    )
    assert refused(lambda h, t: h["profiles"]["deployed"].update(kv="e9m9")).startswith(
        "profiles.deployed: a numeric profile's kv must be fp64, fp32, "
    )
    assert refused(lambda h, t: h["profiles"]["deployed"].pop("kv")).startswith(
        "profiles.deployed: a numeric profile has"
    )
    waiver = {"case": "l", "reason": "why", "date": "2026-11-25", "expires": "2026-11-25", "mode": "", "backend": ""}
    assert refused(lambda h, t: h["waivers"].append(waiver)).startswith("waivers.0: case must be a case id, or begin")
    assert "it has results, and a verdict" in refused(lambda h, t: h["cases"][0].update(verdict="crash"))
    assert refused(result(dtype="float33")) == f"{name}/y: 'float33' is no dtype"
    assert "do not fit shape" in refused(result(strides=[1]))
    assert "bytes, and" in refused(result(shape=[9, 9], strides=[9, 1]))
    assert refused(lambda h, t: t.pop(f"{name}/y")) == f"{name}/y: its bytes are missing"
    os.mkfifo(bundle.with_name("pipe"))
    done = tool("compare", "--against", bundle.with_name("pipe"))
    assert done.code == 2 and "pipe: not a regular file" in done.err


def test_the_contract_is_the_text_of_its_cases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bundles.contract()
    bundles.contract.cache_clear()
    shutil.copytree(Path(bundles.cases.__file__).parent, tmp_path / "cases")
    with (tmp_path / "cases" / "moe.py").open("a") as file:
        file.write("# other inputs\n")
    with monkeypatch.context() as patch:
        patch.setattr(bundles.cases, "__file__", str(tmp_path / "cases" / "__init__.py"))
        assert bundles.contract() != before
    bundles.contract.cache_clear()
    assert bundles.contract() == before
