"""The run configuration: four places, one order, and errors that name key and place."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from dsv4_hal.config import Loaded, RunError, load_run, run_names
from dsv4_hal.dispatch import by_op, select
from dsv4_hal.numerics import numerics_for
from dsv4_hal.ops import OPS


def write(path: Path, text: str) -> Path:
    (path / "run.yaml").write_text(text, encoding="utf-8")
    return path / "run.yaml"


def load(path: Path, text: str) -> Loaded:
    return load_run(write(path, text), environ={})


def test_the_order_of_places(tmp_path: Path) -> None:
    file = write(tmp_path, "mode: exact\ngenerate:\n  seed: 1\n  top_p: 0.5\n  temperature: 0.1\n")
    environ = {"DSV4_HAL_GENERATE__SEED": "2", "DSV4_HAL_GENERATE__TOP_P": "0.6", "PATH": "/bin"}
    loaded = load_run(file, ["generate.seed=3"], {"--seed": ("generate.seed", None)}, environ)
    found = {s.key: (s.value, s.place) for s in loaded.settings()}
    assert found["generate.seed"] == (3, "--set generate.seed=3")
    assert found["generate.top_p"] == (0.6, "environment DSV4_HAL_GENERATE__TOP_P")
    assert found["generate.temperature"] == (0.1, f"{file}:5:3")
    assert found["mode"] == ("exact", f"{file}:1:1")
    assert found["strict"] == (False, "")
    flagged = load_run(file, ["generate.seed=3"], {"--seed": ("generate.seed", 4)}, environ)
    assert flagged.run.generate.seed == 4
    assert flagged.places["generate.seed"] == "--seed"


def test_every_default_is_shown_once() -> None:
    keys = [s.key for s in load_run(environ={}).settings()]
    assert len(keys) == len(set(keys))
    assert {"model", "backend", "ops", "mode", "strict", "generate.top_p", "chat.think"} <= set(keys)


def test_priority_lists(tmp_path: Path) -> None:
    text = "backend: cuda\nops:\n  sparse_attention: [cuda, reference]\n  moe: reference\n"
    run = load_run(write(tmp_path, text), ["ops.swiglu=cuda,reference"], environ={}).run
    assert run.backend == ("cuda",)
    found = by_op(run.ops)
    assert found["sparse_attention"] == found["swiglu"] == ("cuda", "reference")
    assert found["route"] == found["mlp"] == ("reference",)
    assert "linear" not in found


def test_values_given_as_text_have_the_type_of_their_key() -> None:
    sets = ["generate.temperature=1", "strict=true", "backend=null", "model=123", "chat.system=true", "chat.context=99"]
    run = load_run(None, [*sets, "generate.top_p=1e-1", "generate.seed=010"], environ={}).run
    assert (run.generate.temperature, run.generate.top_p, run.generate.seed) == (1.0, 0.1, 10)
    assert run.strict is True
    assert run.backend == ("null",)
    assert (run.model, run.chat.system, run.chat.context) == ("123", "true", 99)


def test_empty_files_and_sections_set_nothing(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "generate:\n#  seed: 1\nops: {}\n", "﻿mode: deployed\n"):
        assert load(tmp_path, text).run == load_run(environ={}).run


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("backnd: x", "1:1: unknown key backnd; did you mean backend?"),
        ("temperature: 1", "1:1: unknown key temperature; did you mean generate.temperature?"),
        ("generate:\n  temprature: 1", "2:3: unknown key generate.temprature; did you mean generate.temperature?"),
        ("a:\n  b:\n    c: 1", "3:5: unknown key a.b.c; there are model, backend"),
        ("backend: null", "1:1: backend: YAML reads null as nothing; write 'null', in quotes"),
        ("ops: {linear: [cuda, null]}", "1:7: ops.linear: YAML reads null as nothing"),
        (
            "ops: {sparse_attn: x}",
            "1:7: ops.sparse_attn: no op or family is called 'sparse_attn'; did you mean sparse_",
        ),
        ("ops: {linear: auto}", "1:7: ops.linear: linear: auto is not a backend; leave the op out"),
        ("ops: {linear: []}", "ops.linear: must name at least one backend"),
        ("backend: [reference, reference]", "must name at least one backend, and each once"),
        ("backend: [auto, reference]", "1:1: backend: auto stands alone"),
        ("mode: fast", "1:1: mode: must be exact, deployed"),
        ("strict: 1", "1:1: strict: must be a valid boolean, got 1"),
        ("generate: {seed: true}", "1:12: generate.seed: must be a valid integer, got True"),
        ("generate: {temperature: '1'}", "1:12: generate.temperature: must be a valid number, got '1'"),
        ("generate: {temperature: .inf}", "must be a finite number, got inf"),
        ("generate: {top_p: 0}", "1:12: generate.top_p: must be greater than 0, got 0"),
        ("generate: 3", "1:1: generate: must be a mapping of keys to values, got 3"),
        ("model: {}", "1:1: model is an empty mapping"),
        ("mode: exact\nmode: exact", "2:1: mode stands twice"),
        ("generate: {seed: 1}\ngenerate.seed: 2", "2:1: generate.seed stands twice"),
        ("x: &a 1\nmode: *a", "2:7: aliases (*a) are not read here"),
        ("1: 2", "1:1: a key must be text, got '1' in the file"),
        ("? [a]\n: 1", "a key must be text, got 'a list or mapping'"),
        ("- 1", "1:1: must be a mapping of keys to values"),
        ("[1", "1:3: not YAML: expected ',' or ']'"),
        ("a:\n\tb", "2:1: not YAML: found character '\\t'"),
        ("--- a\n--- b", "2:1: not YAML: but found another document"),
        ("device: 2001-99-99", "1:1: device: cannot be read: ValueError: month must be in 1..12"),
        ("model: !!python/object:os.system x", "1:1: model: cannot be read: could not determine a constructor"),
        ("generate: {temperature: 1e-1}", "got '1e-1'; YAML reads that as text, write 0.1"),
        ("generate: {seed: !!int ''}", "1:12: generate.seed: cannot be read: IndexError"),
        ("strict: !!bool x", "1:1: strict: cannot be read: KeyError"),
        ("chat: {system: !!timestamp x}", "1:8: chat.system: cannot be read: AttributeError"),
        ("\x00", "1:1: not YAML: character #x0000"),
        ("a: " + "[" * 9000, "1:23: nested too deeply"),
    ],
)
def test_errors_name_key_and_place(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(RunError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "run.yaml"))
    assert error in str(caught.value)


def test_only_the_first_problems_are_listed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="and 2990 more") as caught:
        load(tmp_path, "".join(f"key{n}: 1\n" for n in range(3000)))
    assert len(str(caught.value)) < 3000


def test_all_problems_are_listed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="several problems") as caught:
        load(tmp_path, "nope: 1\nstrict: 5\n")
    assert "run.yaml:1:1: unknown key nope" in str(caught.value)
    assert "run.yaml:2:1: strict: must be a valid boolean" in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "environ", "error"),
    [
        (["seed"], {}, "--set seed: write key=value"),
        (["=1"], {}, "write key=value"),
        (["generate.sede=1"], {}, "--set generate.sede=1: unknown key generate.sede; did you mean generate.seed?"),
        (["generate.seed=x"], {}, "--set generate.seed=x: generate.seed: must be a valid integer, got 'x'"),
        (["generate=1"], {}, "generate: must be a mapping of keys to values"),
        (["generate.seed=1", "generate.seed.x=1"], {}, "a key cannot be both a value and a section"),
        (["ops.linear.x=cuda"], {}, "ops.linear"),
        ([], {"DSV4_HAL_BACKNED": "x"}, "environment DSV4_HAL_BACKNED: unknown key backned; did you mean backend?"),
        ([], {"DSV4_HAL_GENERATE_TOP_P": "1"}, "unknown key generate_top_p; did you mean generate.top_p?"),
        ([], {"DSV4_HAL_mode": "exact"}, "environment DSV4_HAL_mode: write DSV4_HAL_MODE"),
        (["strict=!!bool x"], {}, "strict: must be a valid boolean, got '!!bool x'"),
        ([], {"DSV4_HAL_MODE": "slow"}, "environment DSV4_HAL_MODE: mode: must be exact, deployed"),
    ],
)
def test_errors_of_text(sets: list[str], environ: dict[str, str], error: str) -> None:
    with pytest.raises(RunError, match=re.escape(error)):
        load_run(None, sets, environ=environ)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"nowhere\.yaml: no such file; with the package come ascend-a3, ascend-a5, cpu, cpu-exact, cuda"
    ):
        load_run(tmp_path / "nowhere.yaml", environ={})
    with pytest.raises(RunError, match="cannot be read"):
        load_run(tmp_path, environ={})
    (tmp_path / "bytes.yaml").write_bytes(b"mode: \xff\xfe")
    with pytest.raises(RunError, match=r"bytes\.yaml: cannot be read"):
        load_run(tmp_path / "bytes.yaml", environ={})


@pytest.mark.parametrize("name", run_names())
def test_what_comes_with_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = {"cuda": "sm_90", "ascend-a3": "ascend910_93", "ascend-a5": "ascend950"}
    if name in machines:
        monkeypatch.setenv("DSV4_HAL_ASSUME", machines[name])
    run = load_run(name, environ={}).run
    ops = select(run.backend, numerics_for(run.mode), prefer=run.ops, strict=True)
    assert ops.primary.name == run.backend[0]


SOUND = """\
model: out/mine
backend: [reference]
ops:
  sparse_attention: [reference]
  moe: reference
mode: exact
dtype: float32
strict: false
generate:
  max_new_tokens: 7
  temperature: 0.5
  top_p: 0.9
  seed: 3
chat: {think: max, context: 512, system: "hello: you"}
"""


def test_200_fuzzed_files_load_or_say_key_and_place(tmp_path: Path) -> None:
    """Cut, doubled, swapped and garbled copies of a sound file: every one loads or names file, and line or key."""
    rng, loaded, refused = random.Random(0), 0, 0
    pieces = ["null", "~", "1e999", "-1", "!!binary x", "{", "]", ": ", "\t", "'", "&a", "*a", "? ", "é", "0x", "\x07"]
    for number in range(200):
        text = SOUND
        for _ in range(rng.choice([1, 1, 2])):
            lines = text.split("\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            at = rng.randrange(len(text) + 1)
            text = (
                rng.choice(
                    [
                        text[:at],
                        text + "# a comment\n",
                        text[:at] + rng.choice(pieces) + text[at:],
                        text[:at] + text[at + rng.randint(1, 9) :],
                        "\n".join([*lines[:i], lines[j], *lines[i:]]),
                        "\n".join([*lines[:i], lines[i].upper(), *lines[i + 1 :]]),
                        "\n".join([*lines[:i], " " + lines[i], *lines[i + 1 :]]),
                        re.sub(r"[0-9.]+", lambda m: rng.choice([m[0], "yes", "[]", "-3", "2.5"]), text),
                    ]
                )
                or "x: y"
            )
        try:
            load(tmp_path, text)
            loaded += 1
        except RunError as error:
            refused += 1
            places = re.findall(r"run\.yaml:(\d+):(\d+): (?:unknown key )?(\S+)", str(error))
            assert places, (number, text, str(error))
            for line, _, word in places:
                assert 1 <= int(line) <= text.count("\n") + 1, (number, str(error))
                assert word in ("not", "must", "aliases", "a") or word.strip(":;").split(".")[-1] in text, str(error)
    assert min(loaded, refused) > 20, (loaded, refused)
    load(tmp_path, SOUND)


def test_the_readme_shows_a_file_that_loads(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    run = load(tmp_path, shown).run
    assert set(by_op(run.ops)) == {"sparse_attention", *(n for n, spec in OPS.items() if spec.family == "moe")}
    select(run.backend, numerics_for(run.mode), prefer=run.ops, strict=run.strict)
