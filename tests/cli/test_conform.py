"""`conform`: verdicts, files and exit codes."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.conformance import mutants
from dsv4_hal.conformance.judging import results, verdict

Tool = Callable[..., Any]
FEW = ("-o", "swiglu", "-p", "tokens=5", "--mode", "exact")


def test_the_reference_against_the_oracle(tool: Tool, tmp_path: Path) -> None:
    done = tool("conform", "--backend", "reference", *FEW, "--out", tmp_path / "report")
    assert done.code == 0, done.err
    told = "reference: the reference, against the naive float64 oracle (8), transformers 5.23.0 (8); 8 cases: 8 agrees"
    assert told in done.out
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"results.jsonl", "junit.xml", "report.md", "report.html"}


def test_answers_that_are_known_beforehand(tool: Tool) -> None:
    forms = tool("conform", "-o", "route", "-p", "form=")
    assert forms.code == 0 and "against closed forms (3); 3 cases: 3 agrees" in forms.out, forms.err
    golden = tool("conform", "-p", "model[golden=layers.0.ffn]@deployed")
    assert golden.code == 0 and "against golden vectors (1); 1 case: 1 agrees" in golden.out, golden.err


def test_answers_are_listed(tool: Tool) -> None:
    assert tool("conform", "-p", "rope[form=", "--list").out.split() == [
        "rope[form=turned_points]",
        "rope[form=turned_back]",
    ]
    assert "model[golden=layers.4.ffn]" in tool("conform", "--list").out.split()


def test_null_makes_no_claim_of_agreement(tool: Tool) -> None:
    done = tool("conform", "--backend", "null", *FEW)
    assert done.code == 5, done.err
    assert "8 cases: 8 shapes; nothing of it was judged" in done.out and "agrees" not in done.out


MINIMAL = """
from dsv4_hal.backends.reference import Reference

class MyChip(Reference):
    name = "third"
    device_type = "cpu"
"""
WRONG = """
    def swiglu(self, *args, **kwargs):
        return super().swiglu(*args, **kwargs) * 1.001
"""


@pytest.mark.usefixtures("third")
def test_a_minimal_backend_passes_and_claims_nothing(tool: Tool, tmp_path: Path) -> None:
    site = tmp_path / "site packages"
    (site / "third_vendor.py").write_text(MINIMAL.replace("MyChip", "Third"))
    done = tool("conform", "--backend", "third", *FEW)
    assert done.code == 0, done.err
    assert "third: 0 native ops of the 1 that ran; 8 cases: 8 agrees" in done.out


@pytest.mark.usefixtures("third")
def test_waivers_and_exit_codes(tool: Tool, tmp_path: Path) -> None:
    site = tmp_path / "site packages"
    (site / "third_vendor.py").write_text(MINIMAL.replace("MyChip", "Third") + WRONG)
    arguments = ("conform", "--backend", "third", *FEW)
    wrong = tool(*arguments, "--out", tmp_path / "report")
    assert wrong.code == 1
    assert "third: 1 native op of the 1 that ran; 8 cases: 8 disagrees" in wrong.out
    assert "swiglu[tokens=5,width=96,limit=None,weighted=True]@exact: disagrees: y: nmse" in wrong.out
    lines = (tmp_path / "report" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["verdict"] for line in lines[1:]] == ["disagrees"] * 8
    waivers = site / "waivers.yaml"
    day, last = (datetime.date.today() + datetime.timedelta(days) for days in (-4, 30))
    some = f"{{case: 'swiglu[tokens=5', mode: exact, reason: off by a thousandth, date: {day}, expires: {last}}}"
    waivers.write_text(f"- {some}\n")
    waived = tool(*arguments)
    assert waived.code == 0 and "8 waived" in waived.out and "off by a thousandth" in waived.out
    (site / "third_vendor.py").write_text(MINIMAL.replace("MyChip", "Third"))
    stale = tool(*arguments)
    assert stale.code == 4 and f"stale waiver: swiglu[tokens=5 of {day}: no case of it fails" in stale.out
    assert tool(*arguments, "-p", "tokens=5,width=96").code == 0  # the waiver's other cases did not run
    waivers.write_text(f"- {some}\n".replace(str(last), str(day)))
    expired = tool(*arguments)
    assert expired.code == 4 and f"stale waiver: swiglu[tokens=5 of {day}: it expired on {day}" in expired.out
    waivers.write_text("- 3\n")
    broken = tool(*arguments)
    assert broken.code == 2 and "waivers.yaml: waiver 1" in broken.err


RAISES = """
    def swiglu(self, *args, **kwargs):
        return torch.ones(2) @ torch.ones(3)
"""
LONG = """
    def swiglu(self, gate_up, *args, **kwargs):
        time.sleep(60 if gate_up.shape[0] == 5 else 0)
        return super().swiglu(gate_up, *args, **kwargs)
"""


@pytest.mark.usefixtures("third")
def test_where_a_backend_raises_is_shown(tool: Tool, tmp_path: Path) -> None:
    module = tmp_path / "site packages" / "third_vendor.py"
    module.write_text("import torch" + MINIMAL.replace("MyChip", "Third") + RAISES)
    done = tool("conform", "--backend", "third", *FEW, "--out", tmp_path / "report")
    place = f'  File "{module}", line 9, in swiglu\n    return torch.ones(2) @ torch.ones(3)\n'
    assert done.code == 1 and done.out.count(place) == 1 and "worker.py" not in done.out  # of eight cases
    suite = (tmp_path / "report" / "junit.xml").read_text()
    assert suite.count(place.replace('"', "&quot;").split("\n")[1]) == 8 and "worker.py" not in suite


@pytest.mark.usefixtures("third")
def test_three_hangs_of_an_op_end_it(tool: Tool, tmp_path: Path) -> None:
    code = "import time" + MINIMAL.replace("MyChip", "Third") + LONG
    (tmp_path / "site packages" / "third_vendor.py").write_text(code)
    done = tool("conform", "--backend", "third", *FEW, "--limit", "1")
    assert done.code == 1 and "8 cases: 5 error, 3 timeout" in done.out
    assert done.out.count("@exact: error: not run, after 3 hangs or crashes of swiglu") == 5
    again = tool("conform", "--backend", "third", "-o", "swiglu", "-o", "hadamard", "-p", "tokens=5", "--limit", "1")
    assert re.search(r"\d+ agrees", again.out)  # other ops go on


def test_a_backend_that_kills_its_process_on_import(tool: Tool, third: None, tmp_path: Path) -> None:
    (tmp_path / "site packages" / "third_vendor.py").write_text("import os\nos._exit(5)\n")
    done = tool("conform", "--backend", "third", *FEW)
    assert done.code == 3
    assert "backend third killed its process (exit code 5)" in done.err


def test_cases_can_be_listed_and_pasted_back(tool: Tool) -> None:
    listed = tool("conform", "--list", "-o", "moe").out.split("\n")
    assert len(listed) > 20 and listed[0].startswith("route[")
    done = tool("conform", "-p", listed[0], "--mode", "exact")
    assert done.code == 0 and "1 case: 1 agrees" in done.out
    again = tool("conform", "-p", f"{listed[0]}@deployed")  # as a failure is shown
    assert "1 case: 1 agrees" in again.out


@pytest.mark.usefixtures("third")
def test_size_classes(tool: Tool, tmp_path: Path) -> None:
    site = tmp_path / "site packages"
    (site / "third_vendor.py").write_text(MINIMAL.replace("MyChip", "Third") + '    affords = "tiny"\n')
    some = ("-o", "hc_post", "--mode", "exact")
    all_of_it = tool("conform", *some)
    assert all_of_it.code == 0 and "size classes tiny, interpreted, quick" in all_of_it.out
    assert "quick" not in tool("conform", *some, "--size", "interpreted").out
    modest = tool("conform", "--backend", "third", *some)
    assert modest.code == 0
    assert "size classes tiny; 3 larger cases not run, since the backend affords tiny at most" in modest.out
    made = tool("record", "--backend", "third", *some, "--out", tmp_path / "a.bundle")
    compared = tool("compare", "--against", tmp_path / "a.bundle")
    assert "3 larger cases not run" in made.out and unrecorded(compared.out) == modest.out
    none = tool("conform", "--backend", "third", *some, "-p", "tokens=70")
    assert none.code == 2 and "third affords tiny cases at most, and all 1 chosen are larger" in none.err


def unrecorded(text: str) -> str:
    """What is printed, but for what says that it was recorded, and how much of the suite."""
    return re.sub(r"; \d+ of \d+ cases recorded|not recorded: .*\n", "", text)


def test_gradients(tool: Tool, tmp_path: Path) -> None:
    some = ("-o", "hadamard", "--grad")
    done = tool("conform", *some)
    assert done.code == 0 and "3 cases: 3 agrees" in done.out, done.err
    made = tool("record", *some, "--out", tmp_path / "a.bundle")
    compared = tool("compare", "--against", tmp_path / "a.bundle")
    assert made.code == compared.code == 0
    assert unrecorded(compared.out).splitlines()[-1] == done.out.splitlines()[-1]
    assert "not asked: closed forms and golden vectors: a bundle holds the cases" in compared.out
    null = tool("conform", "--backend", "null", *some)
    assert null.code == 3 and "backend null has no gradients" in null.err


def test_drawn_cases_can_be_pasted_back(tool: Tool, tmp_path: Path) -> None:
    done = tool("conform", "-o", "rope", "--generate", "3", "--seed", "5", "--out", tmp_path)
    told = "6 cases: 6 agrees; drawn with seed 5, as for size classes tiny, interpreted, quick\n"
    assert done.code == 0 and told in done.out, done.err
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    pasted = tool("conform", "-p", f"{lines[-1]['case']}@{lines[-1]['mode']}")
    assert pasted.code == 0 and "1 case: 1 agrees" in pasted.out, pasted.err


def test_an_interrupted_run_says_so_and_replaces_no_other(tool: Tool, tmp_path: Path, monkeypatch: Any) -> None:
    some = ("conform", *FEW, "--out", tmp_path)
    judge, seen = verdict.judge, list[str]()

    def interrupted(backend: str, job: results.Job, *rest: Any) -> results.Outcome:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(job.id)
        return judge(backend, job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(verdict, "judge", interrupted)
        done = tool(*some)
    assert done.code == 130 and "interrupted after 3 of 8 cases; reference: " in done.out, done.err
    assert "interrupted after 3 of 8 cases" in (tmp_path / "report.html").read_text()
    assert tool(*some).code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    seen.clear()
    monkeypatch.setattr(verdict, "judge", interrupted)
    done = tool(*some)
    assert done.code == 130 and "not written: " in done.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_mutants(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {m.name: m for m in mutants.mutants()}
    right = mutants.Mutant("right", "nothing", "hadamard", lambda right, self, x: right.hadamard(self, x))
    chosen = [some["comb_transposed"], some["ties_cut"]]
    monkeypatch.setattr(mutants, "mutants", lambda: tuple(chosen))
    done = tool("conform", "--mutants")
    assert done.code == 0
    assert "budgets by hc_post[tokens=1,streams=4,width=128]@deployed" in done.out
    assert "rounded down: exactly by quantize[" in done.out
    assert "2 of 2 mutants caught" in done.out
    chosen.append(right)
    done = tool("conform", "--mutants")
    assert done.code == 1 and "nothing: not caught" in done.out and "2 of 3 mutants caught" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("-o", "linaer"), 2, "no op or family is called 'linaer'; did you mean linear?"),
        (("-p", "nothing[like=this]"), 2, "'nothing[like=this]' is no id of a case"),
        (("--mutants", "-o", "rope"), 2, "it goes with no other option"),
        (("--mutants", "--limit", "5"), 2, "it goes with no other option"),
        (("--mutants", "--seed", "0"), 2, "it goes with no other option"),
        (("--seed", "3"), 2, "--seed goes with --generate"),
        (("--out", "/dev/null/x"), 2, "Not a directory: '/dev/null/x'"),
        (("-p", "like-this"), 2, "no case has 'like-this' in its id"),
        (("--limit", "inf"), 2, "--limit"),
        (("-p", "model[golden=layers.9"), 2, "no case has 'model[golden=layers.9' in its id"),
        (("-p", "rope[form=turned_back]", "--size", "huge"), 2, "--size must be tiny, interpreted, quick or full"),
        (("--golden", "nowhere", "-o", "rope"), 2, "--golden does not go with -o"),
        (("--golden", "nowhere"), 2, "nowhere has no expected.safetensors: --golden DIR names a folder that has"),
        (("--golden", "nowhere", "--backend", "null"), 2, "--golden goes with --backend reference"),
        (("--grad", "--mode", "deployed"), 2, "mode deployed rounds, and has no gradients"),
        (("--grad", "-o", "quantize"), 2, "no case of quantize has gradients"),
        (("--grad", "-p", "plan[ratio=4]"), 2, "no case of plan has just the parameters ratio"),
        (("--generate", "3", "--list"), 2, "it does not go with -p, --grad or --list"),
        (
            ("-p", "hadamard[tokens=3,heads=1,width=64]@fast"),
            2,
            "a case runs in mode exact, deployed, a3, a5, deepgemm or exact.grad",
        ),
        (("-p", "hadamard[tokens=3,heads=1,width=3]"), 2, "cannot be run: ContractError: hadamard: width must be"),
        (
            ("-o", "rope", "-p", "hadamard[tokens=3,heads=1,width=64]"),
            2,
            "is a case of hadamard, and -o chooses others",
        ),
        (("--size", "huge"), 2, "--size must be tiny, interpreted, quick or full, got 'huge'"),
        (("--size", "tiny", "-p", "hc_post[tokens=70"), 2, "is larger than --size tiny: it needs --size quick"),
        (("--mode", "fast"), 2, "--mode must be exact, deployed"),
        (
            ("--backend", "refrence"),
            3,
            "no backend is called 'refrence'",
        ),
    ],
)
def test_bad_input(tool: Tool, arguments: tuple[str, ...], code: int, error: str) -> None:
    done = tool("conform", *arguments)
    assert done.code == code
    assert error in " ".join(done.err.split())


@pytest.mark.usefixtures("third")
def test_a_backend_whose_import_explodes(tool: Tool) -> None:
    done = tool("conform", "--backend", "broken", *FEW)
    assert done.code == 3
    assert "backend broken does not load: OSError" in done.err
