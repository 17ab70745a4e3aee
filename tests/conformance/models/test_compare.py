"""Whole models compared part by part, and the first wrong op found, on the golden checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from dsv4_hal.backend import BackendError
from dsv4_hal.conformance.models import run as model_run
from dsv4_hal.conformance.models.compare import bisect_live, bisect_recorded, first_place, headline, live, recorded
from dsv4_hal.conformance.models.drift import Free, Part, Picks, _alike
from dsv4_hal.conformance.models.replay import KEPT, Script, kept_rows
from dsv4_hal.conformance.reports.model_report import junit, write
from dsv4_hal.conformance.workers import container
from dsv4_hal.conformance.workers.container import BundleError
from dsv4_hal.model.checkpoint import init_checkpoint
from dsv4_hal.model.config import preset
from dsv4_hal.numerics import deployed, exact

Install = Callable[[str], None]
Package = Callable[[str, str, str], None]

MODULE = """
from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.mutants import backend_of, mutants

class Vendor(Reference):
    name = "vendor"

"""

# Longer than a chunk, so that a state is carried over; longer than the window; more entries than are picked.
SCRIPT = Script((tuple(range(3, 143)), tuple(range(50, 91))), decode=2)


@pytest.fixture
def install(package: Package) -> Install:
    """install(body): the backend `vendor`, a subclass of the reference with this body."""
    return lambda body: package("vendor", MODULE + body, "Vendor")


def silent(what: str) -> Callable[[int, int], None]:
    return lambda done, total: None


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take place in this process: what is tested is what they find."""

    def run(backend: str, limit: float, progress: Any, task: Callable[..., None], *args: Any) -> None:
        with torch.inference_mode():
            task(progress or silent(""), *args)

    monkeypatch.setattr(model_run, "_in_process", run)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("mode", ["exact", "deployed"])
def test_the_reference_agrees_with_itself(tiny_dir: Path, install: Install, tmp_path: Path, mode: str) -> None:
    install("    pass\n")
    found = live(str(tiny_dir), ["reference", "vendor"], mode, SCRIPT, silent)
    parts = [row for row in found.rows if isinstance(row, Part)]
    assert [p.name for p in parts[:4]] == ["embed", "layers.0.streams", "layers.0.attn", "layers.0.ffn"]
    assert len(parts) == 2 + 3 * 5 and parts[-1].name == "head"
    # Not to the bit: a product may be cut into threads otherwise, by where its rows lie.
    assert all(p.verdict == "agrees" and (p.of_budget or 0) < 0.5 for p in parts)
    assert all(row.agreement == 1 for row in found.rows if isinstance(row, Picks))
    (free,) = [row for row in found.rows if isinstance(row, Free)]
    assert (
        free.top1 == 1
        and free.kl is not None
        and abs(free.kl) < 1e-9
        and free.diverges is None
        and free.greedy_tokens == 3
    )
    assert free.verdict == ("agrees" if mode == "exact" else "shown")
    assert not found.failed
    write(found, tmp_path / "out")
    head, *rows = [json.loads(line) for line in (tmp_path / "out" / "model.jsonl").read_text().splitlines()]
    assert head["kind"] == "model" and head["baseline"] == "reference" and head["backends"] == ["vendor"]
    assert head["steps"] == ["128+41", "12+0", "1+1", "1+1"] and head["profiles"]["vendor"]["mode"] == mode
    assert head["environment"]["vendor"]["packages"]["torch"] and len(rows) == len(found.rows)
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == (str(len(rows)), "0")
    assert suite.get("errors") == "0"
    assert "| layers.0.attn | " in (tmp_path / "out" / "report.md").read_text()


# Mutant -> the part, the op that is found in it, and the mode that shows it (bf16 hides a small fault in one step).
FAULTS = {
    "limit_lost": ("layers.0.ffn", "swiglu", "deployed"),
    "shared_expert_unclamped": ("layers.0.ffn", "mlp", "deployed"),
    "bias_in_weights": ("layers.1.ffn", "route", "deployed"),
    "comb_transposed": ("layers.0.streams", "hc_post", "exact"),
    "sinkhorn_short": ("layers.0.streams", "hc_pre", "exact"),
    "no_causal_mask": ("layers.1.attn", "index_topk", "deployed"),
    "one_base_for_all": ("layers.1.attn", "plan", "deployed"),
    "state_not_carried": ("layers.1.attn", "compress", "exact"),
    "sink_missing": ("layers.0.attn", "sparse_attention", "deployed"),
    "activation_unrounded": ("layers.0.attn", "linear", "deployed"),
    "expert_off_by_one": ("layers.0.ffn", "grouped_linear", "deployed"),
    "rows_unrounded": ("layers.0.attn", "kv_store", "deployed"),
    "head_scale_forgotten": ("head", "hc_head", "exact"),
}


# One of every part, and of both modes; all with `make full`.
QUICK = ("limit_lost", "sinkhorn_short", "state_not_carried", "head_scale_forgotten")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("fault", [f if f in QUICK else pytest.param(f, marks=pytest.mark.full) for f in FAULTS])
def test_a_fault_is_found_where_it_is(tiny_dir: Path, install: Install, fault: str) -> None:
    place, op, mode = FAULTS[fault]
    install(
        f"\nVendor = backend_of(next(m for m in mutants() if m.name == {fault!r}), Reference)\nVendor.name = 'vendor'\n"
    )
    found = bisect_live(str(tiny_dir), ["reference", "vendor"], mode, SCRIPT, silent)
    assert found.compared.failed and found.place == place
    assert found.first is not None and found.first.op == op
    assert found.first.of_budget > 1


@pytest.mark.usefixtures("here")
def test_an_op_that_raises_is_named_and_the_rest_is_judged(tiny_dir: Path, install: Install) -> None:
    install("    def sparse_attention(self, *args, **kwargs):\n        raise ZeroDivisionError('no keys')\n")
    found = bisect_live(str(tiny_dir), ["reference", "vendor"], "exact", SCRIPT, silent)
    verdicts = {row.name: row.verdict for row in found.compared.rows}
    assert verdicts["layers.0.attn"] == verdicts["free run"] == "error"
    assert verdicts["layers.0.ffn"] == verdicts["layers.4.streams"] == verdicts["head"] == "agrees"
    assert found.first is not None and found.first.op == "sparse_attention"
    assert "ZeroDivisionError: no keys" in found.first.message


@pytest.mark.usefixtures("here")
def test_results_that_are_not_finite_disagree(tiny_dir: Path, install: Install) -> None:
    install("    def swiglu(self, *args, **kwargs):\n        return super().swiglu(*args, **kwargs) * float('nan')\n")
    found = live(str(tiny_dir), ["reference", "vendor"], "deployed", SCRIPT, silent)
    verdicts = {row.name: row.verdict for row in found.rows}
    assert verdicts["layers.0.ffn"] == verdicts["free run"] == "disagrees"
    assert verdicts["layers.0.attn"] == verdicts["layers.1.attn"] == "agrees"


@pytest.mark.usefixtures("here")
def test_a_bundle_gives_the_verdicts_of_a_live_run(tiny_dir: Path, install: Install, tmp_path: Path) -> None:
    install(
        "    def sparse_attention(self, q, kv, sink, *args, **kwargs):\n"
        "        return super().sparse_attention(q, kv, sink + 1, *args, **kwargs)\n"
    )
    path, plain = tmp_path / "a.bundle", tmp_path / "plain"
    model_run.record(path, str(tiny_dir), "vendor", deployed(), SCRIPT, ops=True, progress=silent(""))
    model_run.record(plain, str(tiny_dir), "reference", deployed(), SCRIPT, progress=silent(""))
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / "b")
    found = recorded(str(tiny_dir), moved, "reference", silent)
    assert {row.name for row in found.failed} >= {f"layers.{i}.attn" for i in range(5)}
    assert not {row.name for row in found.failed} & {f"layers.{i}.ffn" for i in range(5)}
    assert found.head["baseline"] == "reference" and found.head["backends"] == ["vendor"]
    bisected = bisect_recorded(str(tiny_dir), moved, "reference", silent)
    assert bisected.place == "layers.0.attn"
    assert bisected.first is not None and bisected.first.op == "sparse_attention"
    assert not recorded(str(tiny_dir), plain, "reference", silent).failed
    with pytest.raises(ValueError, match="record it with --ops"):
        bisect_recorded(str(tiny_dir), plain, "reference", silent)
    with pytest.raises(FileExistsError):
        model_run.record(moved, str(tiny_dir), "reference", deployed(), SCRIPT, progress=silent(""))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("backend", ["reference", pytest.param("vendor", marks=pytest.mark.full)])
def test_a_bundle_is_not_its_own_baseline(tiny_dir: Path, install: Install, tmp_path: Path, backend: str) -> None:
    """Whoever recorded it, it is compared with a run made here."""
    install("    pass\n")
    good, short = tmp_path / "good", Script((tuple(range(3, 20)),), 1)
    model_run.record(good, str(tiny_dir), backend, deployed(), short, ops=True, progress=silent(""))

    def changed(*parts: str) -> Path:
        """The bundle with what a part made, or an op, made 10 % larger."""
        header, tensors = container.read(good)
        chosen = [name for name in tensors if all(part in name for part in parts)]
        assert chosen
        path = tmp_path / f"bad {len(list(tmp_path.iterdir()))}"
        about = {key: value for key, value in header.items() if key not in ("format", "kind")}
        container.write(path, "model", about, tensors | {name: tensors[name] * 1.1 for name in chosen})
        return path

    part, op = changed("0/layers.2.attn.out"), changed("layers.2.attn/", ":output_proj#")
    assert not recorded(str(tiny_dir), good, "reference", silent).failed
    assert not bisect_recorded(str(tiny_dir), good, "vendor", silent).place
    for here in ("reference", "vendor"):
        assert "layers.2.attn" in {row.name for row in recorded(str(tiny_dir), part, here, silent).failed}
        found = bisect_recorded(str(tiny_dir), op, here, silent)
        assert found.place == "layers.2.attn" and found.first is not None and found.first.op == "output_proj"


@pytest.mark.usefixtures("here")
def test_a_bundle_that_is_not_finite_is_judged_as_far_as_it_goes(
    tiny_dir: Path, install: Install, tmp_path: Path
) -> None:
    """Behind the fault the reference gets the bundle's NaN, too, and may refuse it."""
    install("    def swiglu(self, *args, **kwargs):\n        return super().swiglu(*args, **kwargs) * float('nan')\n")
    path, short = tmp_path / "a.bundle", Script((tuple(range(3, 40)),), 1)
    model_run.record(path, str(tiny_dir), "vendor", deployed(), short, ops=True, progress=silent(""))
    verdicts = {row.name: row.verdict for row in recorded(str(tiny_dir), path, "reference", silent).rows}
    assert verdicts["layers.0.attn"] == "agrees" and verdicts["layers.0.ffn"] == "disagrees"
    assert verdicts["layers.1.attn"] == verdicts["head"] == "error"
    found = bisect_recorded(str(tiny_dir), path, "reference", silent)
    assert found.first is not None and (found.place, found.first.op) == ("layers.0.ffn", "swiglu")


@pytest.mark.usefixtures("here")
def test_a_bundle_of_another_model_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "a.bundle", tmp_path / "other model"
    init_checkpoint(preset("v4-tiny"), other, dtype="fp8-fp4", seed=0)
    model_run.record(path, str(tiny_dir), "reference", exact(), Script(((5, 6, 7),), 0), progress=silent(""))
    with pytest.raises(ValueError, match=r"is not the model that a\.bundle was recorded with"):
        recorded(str(other), path, "reference", silent)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match="checksum does not fit"):
        recorded(str(tiny_dir), path, "reference", silent)


PLACES = {
    "plan": ("    def plan(self, *args):\n        raise ValueError('vboom')\n", "vendor, plan: ValueError: vboom"),
    "row_layout": (
        "    def row_layout(self, *args):\n        raise ValueError('vboom')\n",
        "vendor, row_layout: V",
    ),
    "repack": ("    def repack(self, weight):\n        raise ValueError('vboom')\n", "vendor, repack: ValueError"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("place", PLACES)
def test_a_backend_that_raises_outside_of_a_part_is_named_with_its_place(
    tiny_dir: Path, install: Install, place: str
) -> None:
    body, message = PLACES[place]
    install(body)
    short = Script(((5, 6, 7),), 0)
    (row,) = live(str(tiny_dir), ["reference", "vendor"], "exact", short, silent).failed
    assert (row.backend, row.name, row.verdict) == ("vendor", "process", "error") and message in row.message
    with pytest.raises(BackendError, match=message):
        live(str(tiny_dir), ["vendor", "reference"], "exact", short, silent)
    found = bisect_live(str(tiny_dir), ["reference", "vendor"], "exact", short, silent)
    assert [row.message for row in found.compared.failed] == [row.message] and not found.place


def test_a_step_that_hangs_is_given_up(tiny_dir: Path, install: Install, tmp_path: Path) -> None:
    install("    def hc_head(self, *args, **kwargs):\n        import time\n        time.sleep(600)\n")
    with pytest.raises(BackendError, match=r"backend vendor: no progress for 1\.\d s, after 0 steps"):
        model_run.record(tmp_path / "b", str(tiny_dir), "vendor", exact(), Script(((5, 6, 7),), 0), limit=1.0)


def test_a_process_that_is_lost_is_told(tiny_dir: Path, install: Install) -> None:
    install("    def hc_head(self, *args, **kwargs):\n        import os\n        os._exit(7)\n")
    found = live(str(tiny_dir), ["reference", "vendor"], "exact", Script(((5, 6, 7),), 0), silent)
    (row,) = found.failed
    assert row.name == "process" and "the process of backend vendor ended with exit code 7" in row.message
    assert list(headline(found)) == [f"vendor against reference: not compared: {row.message}"]
    suite = junit(found)
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == (str(len(found.rows)), "0", "1")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("judge", [live, bisect_live])
def test_a_backend_that_cannot_be_used_is_found_before_anything_runs(
    tiny_dir: Path, install: Install, monkeypatch: pytest.MonkeyPatch, judge: Callable[..., Any]
) -> None:
    install("    def __init__(self, *args):\n        raise OSError('no card')\n")
    monkeypatch.setattr(model_run, "record", None)
    for backend, why in (("nowhere", "no backend is called"), ("null", "computes shapes"), ("vendor", "no card")):
        with pytest.raises(BackendError, match=why):
            judge(str(tiny_dir), ["reference", backend], "exact", SCRIPT, silent)


def test_the_first_part_is_that_of_the_forward_pass() -> None:
    picks = Picks("b", 1, "index_picks", 0.5, 0.98, "disagrees")
    parts = [Part("b", i, 4, part, verdict="disagrees") for i, part in ((2, "streams"), (1, "ffn"))]
    assert first_place([*parts, picks]) == "layers.1.attn"
    assert first_place(parts) == "layers.1.ffn"
    assert first_place([Part("b", None, None, "head", verdict="error"), *parts]) == "layers.1.ffn"
    assert first_place([]) == ""


def test_scripts() -> None:
    script = Script(((1,) * 5, (2,) * 3), decode=1, chunk=4)
    assert script.steps == [[4, 3], [1, 0], [1, 1]] and script.room == 6
    assert kept_rows([KEPT + 2, 0, 1]).tolist() == [*range(2, KEPT + 2), KEPT + 2]
    for wrong in ({"prompts": ()}, {"prompts": ((),)}, {"prompts": ((1,),), "chunk": 0}):
        with pytest.raises(ValueError):
            Script(**wrong)  # type: ignore[arg-type]


def test_picks_agree_as_sets() -> None:
    a = torch.tensor([[3, 1, 2], [5, -1, -1]])
    assert _alike(a, torch.tensor([[1, 2, 3], [5, -1, -1]])) == 1
    assert _alike(a, torch.tensor([[1, 2, 4], [5, -1, -1]])) == 0.75
    assert _alike(a, torch.tensor([[1, 2, 3], [5, 0, -1]])) == pytest.approx(0.8)
