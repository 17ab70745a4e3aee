"""Converting a checkpoint: values, errors, what is kept, and being stopped anywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv4_hal.formats import FORMATS, Weight, dequantize, quantize
from dsv4_hal.model import convert as module
from dsv4_hal.model.checkpoint import INDEX, CheckpointError, load_weights, save_checkpoint, unstack
from dsv4_hal.model.config import ModelConfig, load_config
from dsv4_hal.model.convert import JOURNAL, REPORT, TABLE, TARGETS, WORK, convert, to_format
from dsv4_hal.model.weights import weight_table
from dsv4_hal.numerics import numerics_for


@pytest.fixture(scope="module")
def sharded(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in several files, with a file beside them."""
    out = tmp_path_factory.mktemp("a folder") / "sharded"
    cfg = load_config(tiny_dir)
    save_checkpoint(out, cfg, unstack(load_weights(tiny_dir, cfg), weight_table(cfg)), max_shard_bytes=2_000_000)
    (out / "generation_config.json").write_text('{"top_p": 0.9}')
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def stop(*args: object) -> None:
    raise KeyboardInterrupt


def matrices(folder: Path) -> dict[str, Weight]:
    cfg: ModelConfig = load_config(folder)
    return {name: w for name, w in load_weights(folder, cfg).items() if isinstance(w, Weight)}


@pytest.mark.parametrize("to", TARGETS)
def test_values_are_those_of_the_source_rounded_once(to: str, sharded: Path, tmp_path: Path) -> None:
    made = convert(sharded, tmp_path / "out", to)
    before, after = matrices(sharded), matrices(tmp_path / "out")
    for name, have in after.items():
        want = dequantize(before[name])
        if have.format.plain:
            want = want.to(have.data.dtype).float()
        else:
            flat = [to_format(rows, have.format) for rows in want.flatten(0, -2).split(64)]
            want = torch.cat([dequantize(rows) for rows in flat]).view_as(want)
        assert torch.equal(dequantize(have), want), name
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"top_p": 0.9}'
    assert sorted(p.name for p in (tmp_path / "out").glob("conversion*")) == [REPORT, TABLE]
    kinds = {w.format.name for w in after.values()}
    assert (
        kinds
        == {
            "bf16": {"bf16"},
            "ascend-a3-w8a8": {"bf16", "int8_channel"},
            "ascend-a3-w4a8": {"bf16", "int8_channel", "int4_channel"},
        }[to]
    )
    assert made.nbytes[1] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))


def test_what_stays_in_bf16() -> None:
    """Low-rank projections, wo_a, compressors, gate, embedding and head: as Ascend's own conversion leaves them."""
    from dsv4_hal.model.config import preset, stored_as

    table = weight_table(stored_as(preset("v4-flash"), "w4a8"))
    kinds = {
        name.removeprefix("layers.4."): spec.format for name, spec in table.items() if name.startswith("layers.4.")
    }
    assert {name for name, fmt in kinds.items() if fmt == "int8_channel"} == {
        "attn.wq_b", "attn.wo_b", "attn.indexer.wq_b", "ffn.shared_experts.w13", "ffn.shared_experts.w2",
    }  # fmt: skip
    assert {name for name, fmt in kinds.items() if fmt == "int4_channel"} == {"ffn.experts.w13", "ffn.experts.w2"}
    assert kinds["attn.wq_a"] == kinds["attn.wkv"] == kinds["attn.wo_a"] == kinds["ffn.gate"] == "bf16"
    assert table["mtp.0.e_proj"].format == table["mtp.0.h_proj"].format == "int8_channel"


def test_errors_are_told_for_every_tensor(sharded: Path, tmp_path: Path) -> None:
    made = convert(sharded, tmp_path / "out", "ascend-a3-w8a8")
    told = json.loads((tmp_path / "out" / REPORT).read_text())
    by_name = {change["name"]: change for change in told["changes"]}
    name = "layers.1.ffn.experts.3.w2.weight"
    want = dequantize(matrices(sharded)["layers.1.ffn.experts.w2"][3]).double()
    got = dequantize(matrices(tmp_path / "out")["layers.1.ffn.experts.w2"][3]).double()
    error, found = got - want, by_name[name]
    assert (found["source"], found["target"]) == ("mxfp4", "int8_channel")
    assert found["max_error"] == pytest.approx(float(error.abs().max() / want.abs().max()), rel=1e-5)
    assert found["rms_error"] == pytest.approx(float(error.norm() / want.norm()), rel=1e-5)
    rows = error.norm(dim=1) / want.norm(dim=1)
    assert found["worst_channel"] == int(rows.argmax()) and found["worst_error"] == pytest.approx(
        float(rows.max()), rel=1e-5
    )
    text = (tmp_path / "out" / TABLE).read_text()
    assert all(name in text for name in by_name) and len(by_name) == len(made.changes)
    assert f"{len(by_name)} tensors converted, {made.kept} kept as they were" in text


def test_the_scale_of_int4_rows_is_searched() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, 512, generator=generator)
    fmt = FORMATS["int4_channel"]
    plain = (dequantize(quantize(values, fmt)) - values).square().sum(-1)
    searched = (dequantize(to_format(values, fmt)) - values).square().sum(-1)
    assert bool((searched <= plain).all()) and float(searched.sum()) < 0.9 * float(plain.sum())
    zeros = torch.zeros(2, 4)
    assert torch.equal(dequantize(to_format(zeros, fmt)), zeros)


def test_it_goes_on_where_it_was_stopped(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(sharded, tmp_path / "whole", "ascend-a3-w4a8")
    out, saves = tmp_path / "out", []
    save = module._save

    def stop_at(file: int) -> Callable[..., None]:
        def saved(tensors: object, path: Path, *rest: object) -> None:
            saves.append(path.name)
            if len(saves) == file:
                for name in (path.name, ".tmpxyz"):  # safetensors writes under a name of its own first
                    (path.parent / WORK / name).write_bytes(b"half a file")
                raise KeyboardInterrupt
            save(tensors, path, *rest)  # type: ignore[arg-type]

        return saved

    monkeypatch.setattr(module, "_save", stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        convert(sharded, out, "ascend-a3-w4a8")
    assert len(list(out.glob("*.safetensors"))) == 2 and not (out / "config.json").exists()
    with pytest.raises(CheckpointError):  # it does not pass for a checkpoint
        load_weights(out, load_config(sharded))
    with (out / JOURNAL).open("a") as journal:
        journal.write('{"file": "model-00003')  # as a process that is killed leaves it
    monkeypatch.setattr(module, "_save", stop_at(-1))
    seen: list[int] = []
    convert(sharded, out, "ascend-a3-w4a8", lambda done, total: seen.append(done))
    assert saves.count("model-00001-of-00005.safetensors") == 1, saves
    assert seen == sorted(seen)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_every_file_is_opened_once(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each file that is written, however many tensors it holds: a published one holds more than a thousand."""
    opened: list[tuple[int, str]] = []
    written: list[str] = []
    save = module._save

    def counted(path: Path, framework: str) -> object:
        opened.append((len(written), path.name))
        return safe_open(path, framework)

    def saved(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata)
        written.append(path.name)

    monkeypatch.setattr(module, "safe_open", counted)
    monkeypatch.setattr(module, "_save", saved)
    convert(sharded, tmp_path / "out", "ascend-a3-w8a8")
    assert len(opened) == len(set(opened)) >= len(written) > 3


def test_another_conversion_is_not_gone_on_with(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "_save", stop)
        convert(sharded, out, "ascend-a3-w8a8")
    with pytest.raises(CheckpointError, match="holds a conversion to ascend-a3-w8a8, begun and not ended"):
        convert(sharded, out, "ascend-a3-w4a8")
    os.utime(sharded / "model-00001-of-00005.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="holds a conversion of another source, begun"):
        convert(sharded, out, "ascend-a3-w8a8")
    for damaged in (b"[1]\n3\n", b"[1]\n", b"\xff\n", b"[" * 100_000 + b"\n"):
        (out / JOURNAL).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{JOURNAL}: is no journal of a conversion"):
            convert(sharded, out, "ascend-a3-w8a8")


def test_what_a_machine_that_went_down_leaves(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal without a whole line is begun anew; a file that is shorter than was written is written again."""
    out = tmp_path / "out"
    out.mkdir()
    (out / JOURNAL).write_text('{"source": "0')
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module._Journal, "finish", stop)
        convert(sharded, out, "ascend-a3-w8a8")
    os.truncate(out / "model-00002-of-00005.safetensors", 100)
    convert(sharded, out, "ascend-a3-w8a8")
    load_weights(out, load_config(out))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / JOURNAL).touch()
    (tmp_path / "other" / "a file").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert(sharded, tmp_path / "other", "bf16")


def test_a_full_disk_leaves_the_journal(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *args: object, **options: object) -> int:
        path.write_bytes(b"")  # as opening it does
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module._Journal, "finish", stop)
        convert(sharded, tmp_path / "out", "bf16")
    journal = (tmp_path / "out" / JOURNAL).read_bytes()
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="No space left"):
        patched.setattr(Path, "write_text", full)
        convert(sharded, tmp_path / "out", "bf16")
    assert (tmp_path / "out" / JOURNAL).read_bytes() == journal


def test_a_journal_of_the_source_is_not_copied(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(sharded, tmp_path / "source")
    (source / JOURNAL).write_text("of another conversion")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module._Journal, "finish", stop)
        convert(source, tmp_path / "out", "bf16")
    convert(source, tmp_path / "out", "bf16")


def test_a_process_that_is_killed_leaves_nothing_behind(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is killed: safetensors itself writes to a file of another name first."""
    out, save_file = tmp_path / "out", module.save_file

    def killed(tensors: object, path: Path, metadata: object) -> None:
        (path.parent / ".tmpRjrqlm").write_bytes(b"half a file")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(module, "save_file", killed)
        convert(sharded, out, "bf16")
    monkeypatch.setattr(module, "save_file", save_file)
    convert(sharded, out, "bf16")
    assert {path.suffix for path in out.iterdir()} == {".safetensors", ".json", ".md"}, list(out.iterdir())


def test_files_have_the_usual_permissions(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "out", "bf16")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_what_cannot_be_converted(sharded: Path, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no target is called 'w8a8'; there are bf16, ascend-a3-w8a8, ascend-a3-w4a8"):
        convert(sharded, tmp_path / "out", "w8a8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert(sharded, tmp_path / "full", "bf16")
    convert(sharded, tmp_path / "bf16", "bf16")
    with pytest.raises(CheckpointError, match="is stored as bf16 already"):
        convert(tmp_path / "bf16", tmp_path / "again", "bf16")
    assert not (tmp_path / "again").exists()
    file = next(path for path in sorted((tmp_path / "bf16").glob("*.safetensors")))
    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if n.endswith("wq_b.weight"))
    tensors[name][2, 3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"{file.name}: tensor {name} holds NaN or infinity"):
        convert(tmp_path / "bf16", tmp_path / "poisoned", "ascend-a3-w8a8")
    save_file(tensors | {name: torch.full(tensors[name].shape, 3.4e38)}, file)
    config = tmp_path / "bf16" / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"float32"'))
    with pytest.raises(CheckpointError, match=f"{file.name}: tensor {name} holds values too large for bf16"):
        convert(tmp_path / "bf16", tmp_path / "large", "bf16")
    (tmp_path / "bf16" / INDEX).unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        convert(tmp_path / "bf16", tmp_path / "headless", "ascend-a3-w8a8")


@pytest.mark.parametrize("to", ["ascend-a3-w8a8", "ascend-a3-w4a8"])
def test_the_reference_runs_it_in_the_profile_of_the_device(to: str, sharded: Path, tmp_path: Path) -> None:
    """And what it says stays near the source's: INT4 of small random weights is coarse."""
    import dsv4_hal

    convert(sharded, tmp_path / "out", to)
    tokens = torch.arange(40)[None] * 7 % 512
    want, got = (dsv4_hal.load_model(f, "reference", m) for f, m in ((sharded, "deployed"), (tmp_path / "out", "a3")))
    assert got.ops.numerics == numerics_for("a3")
    a, b = (model(tokens, model.new_cache(1, 64)).float() for model in (want, got))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
    assert float(cosine) > (0.98 if to.endswith("w8a8") else 0.9)


def test_two_conversions_never_write_one_folder(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, told = module._save, []

    def meanwhile(*args: object) -> None:
        if not told:
            with pytest.raises(CheckpointError, match="another conversion is writing to it") as caught:
                convert(sharded, tmp_path / "out", "bf16")
            told.append(str(caught.value))
        save(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_save", meanwhile)
    convert(sharded, tmp_path / "out", "bf16")
    assert told and load_config(tmp_path / "out").quantization_config is None
