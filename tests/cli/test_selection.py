"""`backends` and `explain`, with a third party's backend beside the project's own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.config import load_run
from dsv4_hal.ops import OPS

Tool = Callable[..., Any]
COMPOSITES = sum(spec.composite for spec in OPS.values())


def rows(text: str) -> dict[str, list[str]]:
    """A table's rows by their first cell."""
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")
    ]
    return {row[0]: row[1:] for row in cells if row[0]}


def test_backends(tool: Tool) -> None:
    done = tool("backends")
    assert done.code == 0
    assert rows(done.out)["reference"][:2] == ["yes", "always available"]
    assert rows(done.out)["null"][0] == "yes, by name"


@pytest.mark.usefixtures("third")
def test_backends_of_a_third_party(tool: Tool) -> None:
    found = rows(tool("backends").out)
    assert found["third"] == ["yes", "always available", "third-vendor 3.0"]
    usable, reason, by = found["broken"]
    assert (usable, by) == ("no", "third-vendor 3.0")
    assert "does not load: OSError: libthird.so: cannot open shared object file" in reason
    listed = {info["name"]: info for info in json.loads(tool("backends", "--json").out)}
    assert listed["third"]["source"] == "third_vendor:Third"
    assert not listed["broken"]["available"]


def test_explain_without_a_model(tool: Tool) -> None:
    done = tool("explain", "--backend", "reference")
    assert done.code == 0
    assert f"0 native, 0 inherited, {COMPOSITES} composite, {len(OPS) - COMPOSITES} reference" in done.out
    assert "for no model in particular" in done.out
    assert "passed over: null (not named in this run)" in done.out
    assert list(rows(done.out)) == list(OPS)


@pytest.mark.usefixtures("third")
def test_explain_a_lenient_run(tool: Tool) -> None:
    """One op its own, one refused, the rest inherited from the reference; the broken one passed over by auto."""
    done = tool("explain", "--model", "v4-tiny")
    assert done.code == 0, done.err
    found = rows(done.out)
    assert found["hadamard"] == ["native", "third", ""]
    assert found["hc_pre"] == ["reference", "reference", "not third: hidden_size 128 is above 64"]
    assert found["linear"] == ["reference", "reference", ""]
    assert found["mlp"] == ["composite", "its parts", ""]
    assert f"third on cpu, deployed, for v4-tiny: 1 native, 0 inherited, {COMPOSITES} composite" in done.out
    assert "passed over: broken (backend broken does not load: OSError: libthird.so" in done.out
    narrow = rows(tool("explain", "--backend", "third").out)
    assert narrow["hc_pre"] == ["native", "third", ""]


@pytest.mark.usefixtures("third")
def test_explain_a_strict_run(tool: Tool) -> None:
    done = tool("explain", "--model", "v4-tiny", "--backend", "third", "--strict")
    assert done.code == 3
    assert "hc_pre would run on reference, not on third (third: hidden_size 128 is above 64)" in done.err
    assert "linear would run on reference, not on third (third has none of its own)" in done.err
    assert "hadamard would" not in done.err
    assert rows(done.out)["hadamard"][0] == "native"  # the table is shown all the same


@pytest.mark.usefixtures("third")
def test_explain_as_json(tool: Tool) -> None:
    done = tool("explain", "--model", "v4-tiny", "--set", "ops.hadamard=reference,third", "--json")
    found = json.loads(done.out)
    ops = {row["op"]: row for row in found["ops"]}
    assert list(ops) == list(OPS)
    assert (found["backend"], found["device"], found["mode"], found["model"]) == ("third", "cpu", "deployed", "v4-tiny")
    assert (ops["hadamard"]["backend"], ops["hadamard"]["wanted"]) == ("reference", "reference")
    assert ops["hc_pre"]["rejected"] == [{"backend": "third", "reason": "hidden_size 128 is above 64"}]
    assert ops["mlp"] == {
        "op": "mlp", "family": "moe", "runs_as": "composite", "backend": None, "wanted": "third", "rejected": [],
        "adopted": None, "reason": None,
    }  # fmt: skip
    assert sum(found["counts"].values()) == len(OPS)
    assert found["counts"]["native"] == 0
    assert "libthird.so" in found["passed_over"]["broken"]


def test_backends_read_in_the_environment_what_a_run_assumes_and_emulates(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("DSV4_HAL_ASSUME", "DSV4_HAL_EMULATE"):  # what is set to is undone with the test
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    done = tool("explain", "--backend", "reference", "--assume", "ascend950", "--set", "emulate=yes")
    assert done.code == 0, done.err
    assert (os.environ["DSV4_HAL_ASSUME"], os.environ["DSV4_HAL_EMULATE"]) == ("ascend950", "true")
    assert tool("explain", "--backend", "reference", "--set", "emulate=no").code == 0
    assert os.environ["DSV4_HAL_EMULATE"] == "false"


@pytest.mark.usefixtures("third")
def test_a_run_with_a_third_party_backend(tool: Tool, checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "--prompt", "x", "--max-new-tokens", 2)
    lenient = tool(*arguments)
    assert lenient.code == 0, lenient.err
    assert "hc_pre runs as reference (third: hidden_size 128 is above 64)" in lenient.err
    assert f"third: 1 native, 0 inherited, {COMPOSITES} composite, {len(OPS) - COMPOSITES - 1} reference" in lenient.err
    assert "auto passed over broken: backend broken does not load: OSError: libthird.so" in lenient.err
    assert "third, deployed: 2 prompt tokens" in lenient.err
    assert lenient.out == tool(*arguments, "--backend", "reference").out
    strict = tool(*arguments, "--strict")
    assert strict.code == 3
    assert "strict: " in strict.err and "hc_pre would run on reference" in strict.err
    named = tool(*arguments, "--backend", "broken")
    assert named.code == 3
    assert "backend broken does not load: OSError: libthird.so" in named.err
    chosen = tool(*arguments, "--strict", "--backend", "reference", "--set", "ops.hadamard=third")
    assert chosen.code == 0, chosen.err


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (
            ("--backend", "refrence"),
            3,
            "--backend: backend: no backend is called 'refrence'; registered: ascend, cuda, cuda-vendor, null,",
        ),
        (("--backend", "reference,nope"), 3, "no backend is called 'nope'"),
        (("--model", "v4-flsh"), 2, "did you mean v4-flash?"),
        (("--model", "no/such/dir"), 2, "no/such/dir/config.json: no such directory"),
        (("--set", "ops.linaer=reference"), 2, "no op or family is called 'linaer'; did you mean linear?"),
        (("--set", "ops.linear=nope"), 3, "--set ops.linear=nope: ops.linear: no backend is called 'nope'"),
        (("--set", "ops.linear=null"), 3, "backend null makes shapes"),
        (
            ("--config", "nope.yaml"),
            2,
            "nope.yaml: no such file; with the package come ascend-a3, ascend-a5, cpu, cpu-exact, cuda",
        ),
        (("--mode", "fast"), 2, "--mode: mode: must be exact, deployed, a3, a5 or deepgemm, got 'fast'"),
        (("--set", "dtype=float32"), 2, "mode deployed stores activations in bfloat16"),
        (("--device", "nonsense"), 3, "device 'nonsense' cannot be used"),
    ],
)
def test_bad_input(tool: Tool, arguments: tuple[str, ...], code: int, error: str) -> None:
    done = tool("explain", *arguments)
    assert done.code == code, done.err
    assert error in " ".join(done.err.split())


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("columns", ["20", "80", "120"])
def test_nothing_is_cut_off(tool: Tool, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """What stands in a table can be pasted, whatever the terminal's width; a pipe has 80 columns."""
    monkeypatch.setenv("COLUMNS", columns)
    for verb in (("backends",), ("explain", "--model", "v4-tiny"), ("env",)):
        done = tool(*verb)
        assert "…" not in done.out
        assert "".join(done.out.split()).count("third") or verb == ("env",)
    assert set(OPS) <= set(rows(tool("explain").out))


def test_names_and_paths_are_text_not_markup(tool: Tool, tmp_path: Path) -> None:
    odd = tmp_path / "q[/]x[red]"
    odd.mkdir(parents=True)  # the slash cuts it in two
    (odd / "config.json").write_text((Path(__file__).parents[1] / "data" / "tiny" / "config.json").read_text())
    done = tool("explain", "--model", odd)
    assert done.code == 0, done.err
    assert f"for {odd}: " in done.out


def test_a_configuration_file_and_its_origins(tool: Tool, tmp_path: Path) -> None:
    file = tmp_path / "my run.yaml"
    file.write_text("model: v4-pro\nbackend: 'null'\nops:\n  moe: ['null']\n")
    done = tool("explain", "--config", file, "--set", "mode=exact", "--show-config")
    assert done.code == 0, done.err
    assert "null on meta, exact, for v4-pro: 26 native" in done.out
    lines = dict(line.split("#") for line in done.err.splitlines())
    found = {line.strip(): place.strip() for line, place in lines.items()}
    assert found['ops.moe: ["null"]'] == f"{file}:4:3"
    assert found['mode: "exact"'] == "--set mode=exact"
    assert found["strict: false"] == "default"


def test_what_show_config_prints_is_a_configuration_file(tool: Tool, tmp_path: Path) -> None:
    arguments = ("explain", "--set", "ops.moe=reference", "--set", "generate.top_p=0.5", "--set", "chat.system=a: #b")
    (tmp_path / "again.yaml").write_text(tool(*arguments, "--show-config").err)
    again = load_run(tmp_path / "again.yaml", environ={})
    assert again.run == load_run(None, [a for a in arguments if "=" in a], environ={}).run
