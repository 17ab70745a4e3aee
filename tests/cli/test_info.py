"""`dsv4-hal info` as a user meets it: tables, JSON, pictures, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner, Result

from dsv4_hal.cli.info import amount, info, parse_context
from dsv4_hal.model.config import preset, preset_names
from dsv4_hal.model.facts import facts

TINY = Path(__file__).parents[1] / "data" / "tiny"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(info)


def call(*arguments: object, columns: int = 80) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": str(columns)})


def printed(*arguments: object, columns: int = 80) -> str:
    done = call(*arguments, columns=columns)
    assert done.exit_code == 0, done.exception
    return done.stdout


def refused(*arguments: object) -> str:
    done = call(*arguments)
    assert done.exit_code == 1 and done.exception is not None and not done.stdout
    assert isinstance(done.exception, ValueError | OSError | RuntimeError)
    return str(done.exception)


def row(text: str, label: str) -> list[str]:
    """Cells of the first line that starts with `label`."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return [cell.strip() for cell in line.strip().removeprefix(label).split("  ") if cell.strip()]


@pytest.mark.parametrize("columns", [20, 80, 120])
def test_flash(columns: int) -> None:
    text = printed("v4-flash", columns=columns)
    assert row(text, "parameters") == ["284.33 B", "290.94 B"]
    assert row(text, "activated per token") == ["13.27 B"]
    assert row(text, "with input embedding too") == ["13.80 B"]
    assert row(text, "tensors of the checkpoint") == ["67 612", "69 187"]
    assert row(text, "bytes of the checkpoint") == ["156.02 GB", "159.61 GB"]
    assert row(text, "KV cache") == ["3.688 GB", "50.40 GB", "13.67x"]
    assert row(text, "FLOPs per token") == ["0.121 T", "1.193 T", "9.82x"]
    assert row(text, "window") == ["3.214 MB", "-"]
    assert row(text, "indexer") == ["45.10 G", "1.048 T"]
    assert "at 1 048 576 tokens" in text and "preset v4-flash" in text
    flat = " ".join(text.split())
    assert "window 584 bytes (flashmla), entries 584 bytes (flashmla), index 68 bytes (index_fp4)" in flat
    assert "2.00% of BF16 GQA" in flat and "made for 163 840 tokens" in flat
    assert "…" not in text and max(map(len, text.splitlines())) <= max(columns, 80)


def test_pro() -> None:
    text = printed("v4-pro", "--context", "1048576")
    assert row(text, "parameters") == ["1573.00 B", "1598.84 B"]
    assert row(text, "activated per token") == ["48.85 B"]
    assert row(text, "with input embedding too") == ["49.78 B"]
    assert row(text, "tensors of the checkpoint") == ["142 773", "145 116"]
    assert row(text, "bytes of the checkpoint")[1] == "864.70 GB"
    assert row(text, "KV cache") == ["5.280 GB", "50.40 GB", "9.55x"]
    assert row(text, "FLOPs per token") == ["0.324 T", "1.193 T", "3.68x"]


def test_json_is_the_facts_and_nothing_else() -> None:
    found = json.loads(printed("v4-flash", "--json", "--context", "128K"))
    assert found.pop("model") == "v4-flash" and found.pop("source") == "preset v4-flash"
    assert found == facts(preset("v4-flash"), 131_072)
    assert found["parameters"]["with_mtp"] == 290_942_289_362


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_by_default_within_its_limit(name: str) -> None:
    found = json.loads(printed(name, "--json"))
    assert found["context_tokens"] == found["max_context_tokens"] == preset(name).max_position_embeddings


def test_a_directory_of_which_only_the_config_is_read(tmp_path: Path) -> None:
    bare = tmp_path / "[bold]bare model[" / "]"  # a path that would be markup
    bare.mkdir(parents=True)
    shutil.copy(TINY / "config.json", bare)
    text = printed(bare)
    assert f"{bare / 'config.json'}: all figures follow from it; no weights were read" in text
    assert "at 1 024 tokens" in text and "made for 163 840" not in text
    whole, alone = (json.loads(printed(directory, "--json")) for directory in (TINY, bare))
    assert whole.pop("source") == str(TINY / "config.json") and alone.pop("source") == str(bare / "config.json")
    del whole["model"], alone["model"]
    assert whole == alone


def test_rows_of_other_widths_are_said_to_be_plain(tmp_path: Path) -> None:
    values = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"head_dim": 96}))
    flat = " ".join(printed(tmp_path).split())
    assert "window 192 bytes (plain bf16), entries 192 bytes (plain bf16), index 68 bytes (index_fp4)" in flat


@pytest.mark.parametrize(
    ("text", "tokens"), [("1", 1), ("4096", 4096), ("128K", 131_072), ("1M", 1 << 20), ("100k", 10**5), ("1m", 10**6)]
)
def test_contexts(text: str, tokens: int) -> None:
    assert parse_context(text, 1 << 20) == tokens


@pytest.mark.parametrize("text", ["0", "0K", "-1", "", "K", "1.5K", "1G", "1 K", "1_000", "٣", "1M\n", "9" * 30, "all"])
def test_contexts_that_are_none(text: str) -> None:
    assert "at least 1, such as 4096" in refused("v4-flash", "--context", text)


def test_a_context_beyond_the_model() -> None:
    message = refused("v4-tiny", "--context", "65537")
    assert message == "context 65 537 exceeds the model's limit of 65 536 tokens"
    assert printed("v4-tiny", "--context", "64K")


def test_models_that_are_none(tmp_path: Path) -> None:
    assert "did you mean v4-flash" in refused("v4-flush")
    assert "config.json: no such file" in refused(tmp_path)
    assert "no such directory" in refused(tmp_path / "absent")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (284_332_240_471, "parameters", "284.33 B"),
        (999_999, "parameters", "1000.00 k"),
        (9_994_999_999, "bytes", "9.995 GB"),
        (584, "bytes", "0.584 kB"),
        (1e11, "flops", "0.100 T"),
        (99_000_000_000, "flops", "99.00 G"),
    ],
)
def test_amounts(value: float, kind: str, text: str) -> None:
    assert amount(value, kind) == text


def test_plot(tmp_path: Path) -> None:
    out, again = tmp_path / "a.svg", tmp_path / "b.SVG"
    out.write_text("an old file")
    assert "written" in call("v4-flash", "--plot", out).stderr
    json.loads(printed("v4-flash", "--json", "--plot", again))
    assert out.read_bytes() == again.read_bytes()
    texts = ["".join(e.itertext()).strip() for e in ElementTree.parse(out).iter("{http://www.w3.org/2000/svg}text")]
    for text in (
        "KV cache of a sequence",
        "FLOPs per token",
        "at 1 048 576 tokens: 3.688 GB, DeepSeek-V3.2 50.40 GB",
        "at 1 048 576 tokens: 0.121 T, DeepSeek-V3.2 1.193 T",
        "context (tokens, K = 1024)",
        "bytes (GB = 1e9)",
        "FLOPs in FP8 equivalents (T = 1e12)",
        "13.67x",
        "9.82x",
        "v4-flash",
        "DeepSeek-V3.2",
        "256K",
        "10 GB",
    ):
        assert text in texts, text


def test_plots_of_other_kinds(tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        assert printed(TINY, "--context", 7, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert b"CreationDate" not in (tmp_path / "a.pdf").read_bytes()  # the same bytes tomorrow


def test_plots_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.svg").mkdir()
    assert "folder.svg: is there and is not a regular file" in refused("v4-tiny", "--plot", tmp_path / "folder.svg")
    assert "plot.jpg: a plot is written as .svg, .pdf, .png" in refused("v4-tiny", "--plot", tmp_path / "plot.jpg")
    assert "absent: no such directory" in refused("v4-tiny", "--plot", tmp_path / "absent" / "plot.svg")
    assert "/proc" in refused("v4-tiny", "--plot", "/proc/plot.svg")  # which even root cannot write
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused("v4-tiny", "--plot", tmp_path / "plot.svg")
    assert not (tmp_path / "plot.svg").exists()
    assert printed("v4-tiny")
