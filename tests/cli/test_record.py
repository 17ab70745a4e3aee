"""`record` and `compare`: verdicts of a run, in another process and another place."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

Tool = Callable[..., Any]
FEW = ("-o", "swiglu", "-o", "index_topk", "-o", "quantize", "-p", "5", "--mode", "deployed")
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
        '- {case: "index_topk[", reason: not yet, date: 2026-11-25, backend: third}\n'
    )
    live = tool("conform", "--backend", backend, *FEW, "--out", tmp_path / "live")
    made = tool("record", "--backend", backend, *FEW, "--out", tmp_path / "new" / "a.bundle")
    assert made.code == 0, made.err
    (tmp_path / "else where").mkdir()
    shutil.move(tmp_path / "new" / "a.bundle", tmp_path / "else where" / "b")
    done = tool("compare", "--against", tmp_path / "else where" / "b", "--out", tmp_path / "moved")
    assert lines(tmp_path / "moved") == lines(tmp_path / "live")
    assert (done.code, done.out) == (live.code, live.out)
    assert "recorded with dsv4-hal" in done.err and sys.executable not in done.err
    assert live.code == (1 if backend == "third" else 0)


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
        patch.setattr("dsv4_hal.conformance.bundle.contract", lambda: "other")
        assert "whose cases are others than those here" in refused(bundle)
    with monkeypatch.context() as patch:
        patch.setattr("dsv4_hal.conformance.bundle.inputs", lambda: "other")
        assert "drew other inputs there" in refused(bundle)
    with monkeypatch.context() as patch:
        patch.setattr("dsv4_hal.conformance.container.FORMAT", "4")
        assert "of format 3; this version reads format 4" in refused(bundle)
    assert tool("compare", "--against", bundle).code == 0
