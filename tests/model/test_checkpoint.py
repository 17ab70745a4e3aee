"""Checkpoints: loaded as stored, saved byte for byte, and every kind of damage named by file and tensor."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_hal.formats.types import QTensor, Weight
from dsv4_hal.model.checkpoint import (
    INDEX,
    SINGLE,
    CheckpointError,
    init_checkpoint,
    load_weights,
    read_metadata,
    save_checkpoint,
    unstack,
    weights_are_random,
)
from dsv4_hal.model.config import ModelConfig, load_config, preset, stored_as
from dsv4_hal.model.weights import stored_bytes, weight_table

TINY = Path(__file__).parents[1] / "data" / "tiny"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def original() -> Tensors:
    return load_file(TINY / SINGLE)


def small(**changes: object) -> ModelConfig:
    """Two layers (ratios 0 and 4) and an MTP stage: 130 kB of FP8 and FP4."""
    narrow = {"vocab_size": 64, "num_hidden_layers": 2, "compress_ratios": (0, 4, 0), "n_routed_experts": 4}
    return replace(preset("v4-tiny"), **(narrow | changes))  # type: ignore[arg-type]


def write(directory: Path, cfg: ModelConfig, files: dict[str, Tensors], index: bool = False) -> Path:
    """A checkpoint as it comes: no check of what is in it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(cfg.to_dict()))
    for name, tensors in files.items():
        save_file(tensors, directory / name, {"format": "pt"})
    if index:
        write_index(directory, {tensor: name for name, tensors in files.items() for tensor in tensors})
    return directory


def write_index(directory: Path, placed: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": placed}))


def split(tensors: Tensors, files: int) -> dict[str, Tensors]:
    """The tensors dealt over shards, so that parts of one weight lie in different files."""
    names = sorted(tensors)
    return {
        f"model-{i + 1:05d}-of-{files:05d}.safetensors": {name: tensors[name] for name in names[i::files]}
        for i in range(files)
    }


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_tensors(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def same_weights(a: dict[str, Weight | Tensor], b: dict[str, Weight | Tensor], cfg: ModelConfig) -> bool:
    table = weight_table(cfg)
    return list(a) == list(b) and same_tensors(dict(unstack(a, table)), dict(unstack(b, table)))


def matrix(weights: dict[str, Weight | Tensor], name: str) -> Weight:
    value = weights[name]
    assert isinstance(value, Weight)
    return value


def mapped(path: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that are the file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [(int(line[0].split("-")[0], 16), int(line[0].split("-")[1], 16)) for line in lines]


# --- loading --------------------------------------------------------------------------------------------------------


def test_weights_are_what_the_file_holds(original: Tensors) -> None:
    cfg = load_config(TINY)
    weights = load_weights(TINY, cfg)
    table = weight_table(cfg)
    assert list(weights) == list(table)
    for name, spec in table.items():
        value = weights[name]
        assert isinstance(value, Weight) == spec.is_matrix
        assert tuple(value.shape) == spec.shape
        if isinstance(value, Weight):
            assert (value.name, value.layout, value.format.name) == (name, "checkpoint", spec.format)
        else:
            assert not value.requires_grad
    assert same(matrix(weights, "embed").data, original["embed.weight"])
    stack = matrix(weights, "layers.3.ffn.experts.w13")
    assert stack.data.dtype == torch.int8 and stack.scale is not None
    assert same(stack.data[5, :128], original["layers.3.ffn.experts.5.w1.weight"])
    assert same(stack.data[5, 128:], original["layers.3.ffn.experts.5.w3.weight"])
    assert same(stack.scale[5, 128:], original["layers.3.ffn.experts.5.w3.scale"])
    shared = matrix(weights, "mtp.0.ffn.shared_experts.w13")
    assert shared.scale is not None and same(shared.scale[1:], original["mtp.0.ffn.shared_experts.w3.scale"])
    assert same(matrix(weights, "layers.1.ffn.experts.w2").data[7], original["layers.1.ffn.experts.7.w2.weight"])


def test_load_and_save_give_the_same_bytes(original: Tensors, tmp_path: Path) -> None:
    cfg = load_config(TINY)
    out = tmp_path / "a path with spaces" / "out"
    save_checkpoint(out, cfg, unstack(load_weights(TINY, cfg), weight_table(cfg)))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", SINGLE]
    written = load_file(out / SINGLE)
    assert len(written) == 508 and same_tensors(written, original)
    assert load_config(out) == cfg
    assert same_weights(load_weights(out, cfg), load_weights(TINY, cfg), cfg)


def test_sharded(original: Tensors, tmp_path: Path) -> None:
    cfg = load_config(TINY)
    plain = load_weights(TINY, cfg)
    dealt = write(tmp_path / "dealt", cfg, split(original, 3), index=True)
    assert same_weights(load_weights(dealt, cfg), plain, cfg)

    saved = tmp_path / "saved"
    save_checkpoint(saved, cfg, original.items(), max_shard_bytes=1_000_000, metadata={"origin": "a test"})
    shards = sorted(path.name for path in saved.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 7
    assert not (saved / SINGLE).exists()
    assert all((saved / shard).stat().st_size < 1_100_000 for shard in shards)
    index = json.loads((saved / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    assert index["weight_map"].keys() == original.keys() and set(index["weight_map"].values()) == set(shards)
    assert same_weights(load_weights(saved, cfg), plain, cfg)
    assert read_metadata(saved) == {"format": "pt", "origin": "a test"}


def test_an_index_that_names_the_single_file(original: Tensors, tmp_path: Path) -> None:
    cfg = load_config(TINY)
    write(tmp_path, cfg, {SINGLE: original}, index=True)
    assert same_weights(load_weights(tmp_path, cfg), load_weights(TINY, cfg), cfg)


def test_place_and_progress() -> None:
    cfg = load_config(TINY)
    seen: list[str] = []
    steps: list[tuple[int, int]] = []

    def place(weight: Weight) -> Weight:
        seen.append(weight.name)
        return replace(weight, layout="moved")

    weights = load_weights(TINY, cfg, place=place, progress=lambda done, total: steps.append((done, total)))
    assert seen == [name for name, spec in weight_table(cfg).items() if spec.is_matrix]
    assert all(value.layout == "moved" for value in weights.values() if isinstance(value, Weight))
    assert len(steps) == len(weights) and steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] == sum(value.nbytes for value in weights.values())
    with pytest.raises(CheckpointError, match="embed: layout 'moved' cannot be saved"):
        dict(unstack(weights, weight_table(cfg)))


def test_another_device() -> None:
    cfg = load_config(TINY)
    for value in load_weights(TINY, cfg, device="meta").values():
        assert value.device.type == "meta"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_views_of_the_mapped_file(original: Tensors, tmp_path: Path) -> None:
    cfg = load_config(TINY)
    write(tmp_path, cfg, split(original, 2), index=True)
    weights = load_weights(tmp_path, cfg)
    spans = [span for path in tmp_path.glob("*.safetensors") for span in mapped(path)]
    assert len(spans) == 2  # one mapping a file, and none left over from copying

    def in_file(tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < stop for start, stop in spans)

    for name, value in weights.items():
        tensors = [value.data, value.scale] if isinstance(value, Weight) else [value]
        joined = "experts" in name and not name.endswith("shared_experts.w2")
        assert all(in_file(tensor) != joined for tensor in tensors if tensor is not None), name
    del weights, value, tensors
    assert not [span for path in tmp_path.glob("*.safetensors") for span in mapped(path)]


def test_base_checkpoint_with_fp8_experts_and_fp32_scales(tmp_path: Path) -> None:
    cfg = small(expert_dtype="fp8")
    init_checkpoint(small(), tmp_path / "instruct")
    tensors = load_file(tmp_path / "instruct" / SINGLE)
    for name, tensor in list(tensors.items()):
        if name.endswith(".scale"):
            source = name.replace(".scale", ".weight")
            if tensors[source].dtype == torch.int8:
                shape = (tensors[source].shape[0], tensors[source].shape[1] * 2)
                tensors[source] = torch.randn(shape).to(torch.float8_e4m3fn)
            blocks = tuple(-(-n // 128) for n in tensors[source].shape)
            tensors[name] = torch.rand(blocks)
        del tensor
    weights = load_weights(write(tmp_path / "base", cfg, {SINGLE: tensors}), cfg)
    assert matrix(weights, "layers.0.attn.wq_b").format.name == "e4m3_128x128_fp32"
    stack = matrix(weights, "layers.1.ffn.experts.w13")
    assert stack.format.name == "e4m3_128x128_fp32" and stack.scale is not None
    assert stack.scale.shape == (4, 2, 1) and stack.scale.dtype == torch.float32
    assert same_tensors(dict(unstack(weights, weight_table(cfg))), tensors)

    powers = {n: t.to(torch.float8_e8m0fnu) if n.endswith(".scale") else t for n, t in tensors.items()}
    weights = load_weights(write(tmp_path / "powers", cfg, {SINGLE: powers}), cfg)
    assert matrix(weights, "layers.1.ffn.experts.w13").format.name == "e4m3_128x128"

    one = "layers.1.ffn.experts.2.w3.scale"
    mixed = tensors | {one: powers[one]}
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: tensor {one} is F8_E8M0, but .*w\d.scale, part of the same"):
        load_weights(write(tmp_path / "mixed", cfg, {SINGLE: mixed}), cfg)


def test_fp4_checkpoints_have_no_fp32_scales(original: Tensors, tmp_path: Path) -> None:
    name = "layers.0.attn.wq_a.scale"
    write(tmp_path, load_config(TINY), {SINGLE: original | {name: original[name].float()}})
    with pytest.raises(CheckpointError, match=rf"tensor {name} is F32 \[1, 2\], expected F8_E8M0 \[1, 2\]"):
        load_weights(tmp_path, load_config(TINY))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_checkpoints_are_kept_as_stored(dtype: str, tmp_path: Path) -> None:
    cfg = init_checkpoint(small(), tmp_path / "plain", dtype)
    weights = load_weights(tmp_path / "plain", load_config(tmp_path / "plain"))
    want = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    assert {value.data.dtype for value in weights.values() if isinstance(value, Weight)} == {want}
    tensors = load_file(tmp_path / "plain" / SINGLE)
    norm = "layers.0.attn_norm.weight"  # a file may mix the two
    other = torch.bfloat16 if want == torch.float32 else torch.float32
    write(tmp_path / "mixed", cfg, {SINGLE: tensors | {norm: tensors[norm].to(other)}})
    value = load_weights(tmp_path / "mixed", cfg)["layers.0.attn_norm"]
    assert isinstance(value, Tensor) and value.dtype == other
    part = "layers.0.ffn.experts.1.w3.weight"  # but not within one weight
    write(tmp_path / "torn", cfg, {SINGLE: tensors | {part: tensors[part].to(other)}})
    with pytest.raises(CheckpointError, match=rf"tensor {part} is \w+, but .*\.weight, part of the same weight, is"):
        load_weights(tmp_path / "torn", cfg)


# --- the July family ------------------------------------------------------------------------------------------------

DSPARK = (("dspark_block_size", 5), ("dspark_markov_rank", 256))


def july() -> ModelConfig:
    return replace(load_config(TINY), dspark=DSPARK, compress_ratios=(0, 4, 128, 4, 128, 0, 0, 0))


def test_unknown_draft_tensors_are_skipped_with_one_line(
    original: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"mtp.1.norm.weight": torch.ones(256), "mtp.0.markov.weight": torch.zeros(1000, 500, dtype=torch.int8)}
    write(tmp_path, july(), {SINGLE: original | more})
    with caplog.at_level(logging.WARNING, "dsv4_hal"):
        weights = load_weights(tmp_path, load_config(tmp_path))
    assert list(weights) == list(weight_table(july()))
    [record] = caplog.records
    message = record.getMessage()
    assert "skipped 2 tensors (0.001 GB) under mtp." in message and message.endswith("MTP stage, which is loaded")
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: tensor mtp\.1\.norm\.weight is unexpected \(F32 \[256\]\)"):
        load_weights(tmp_path, load_config(TINY))


@pytest.mark.parametrize("other", [None, torch.zeros(256, 768, dtype=torch.bfloat16)])
def test_a_draft_stage_that_is_not_v4s_is_left_out(
    other: Tensor | None, original: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {name: tensor for name, tensor in original.items() if not name.startswith("mtp.0.e_proj")}
    if other is not None:
        tensors["mtp.0.e_proj.weight"] = other
    write(tmp_path, july(), {SINGLE: tensors})
    cfg = load_config(tmp_path)
    with caplog.at_level(logging.WARNING, "dsv4_hal"):
        weights = load_weights(tmp_path, cfg)
    assert list(weights) == [name for name in weight_table(cfg) if not name.startswith("mtp.")]
    assert [record.getMessage().rsplit(", ", 1)[1] for record in caplog.records] == ["which is not loaded"]
    save_checkpoint(tmp_path / "again", cfg, unstack(weights, weight_table(cfg)))
    assert same_weights(load_weights(tmp_path / "again", cfg), weights, cfg)


def test_other_unknown_tensors_of_the_july_family_are_errors(original: Tensors, tmp_path: Path) -> None:
    write(tmp_path, july(), {SINGLE: original | {"extra.weight": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=r"tensor extra\.weight is unexpected"):
        load_weights(tmp_path, july())


# --- damage ---------------------------------------------------------------------------------------------------------

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GATE = "layers.2.ffn.gate.bias"


def no_tensor(d: Path, t: Tensors) -> None:
    write(d, load_config(TINY), {SINGLE: {name: tensor for name, tensor in t.items() if name != GATE}})


def no_scale(d: Path, t: Tensors) -> None:
    name = "layers.2.ffn.experts.4.w2.scale"
    write(d, load_config(TINY), {SINGLE: {key: tensor for key, tensor in t.items() if key != name}})


def no_expert(d: Path, t: Tensors) -> None:
    write(d, load_config(TINY), {SINGLE: {key: tensor for key, tensor in t.items() if ".experts.7." not in key}})


def extra_expert(d: Path, t: Tensors) -> None:
    more = {"layers.0.ffn.experts.8.w1.weight": torch.zeros(128, 128, dtype=torch.int8)}
    write(d, load_config(TINY), {SINGLE: t | more})


def wrong_shape(d: Path, t: Tensors) -> None:
    write(d, load_config(TINY), {SINGLE: t | {"layers.1.attn.wq_a.weight": t["layers.1.attn.wq_a.weight"][:64]}})


def wrong_scale_shape(d: Path, t: Tensors) -> None:
    name = "layers.0.attn.wo_a.scale"
    write(d, load_config(TINY), {SINGLE: t | {name: t[name][:1]}})


def wrong_dtype(d: Path, t: Tensors) -> None:
    write(d, load_config(TINY), {SINGLE: t | {"norm.weight": t["norm.weight"].float()}})


def odd_dtype(d: Path, t: Tensors) -> None:
    write(d, load_config(TINY), {SINGLE: t | {"norm.weight": t["norm.weight"].double()}})


def quantised_without_saying_so(d: Path, t: Tensors) -> None:
    write(d, stored_as(load_config(TINY), "bfloat16"), {SINGLE: t})


def shards(d: Path, t: Tensors) -> None:
    write(d, load_config(TINY), split(t, 2), index=True)


def shard_is_missing(d: Path, t: Tensors) -> None:
    shards(d, t)
    (d / SECOND).unlink()


def shard_is_truncated(d: Path, t: Tensors) -> None:
    shards(d, t)
    os.truncate(d / SECOND, (d / SECOND).stat().st_size - 1)


def header_is_truncated(d: Path, t: Tensors) -> None:
    shards(d, t)
    os.truncate(d / SECOND, 1000)


def shard_is_empty(d: Path, t: Tensors) -> None:
    shards(d, t)
    os.truncate(d / FIRST, 0)


def shard_has_a_tail(d: Path, t: Tensors) -> None:
    shards(d, t)
    with (d / FIRST).open("ab") as file:
        file.write(b"tail")


def header_is_garbage(d: Path, t: Tensors) -> None:
    shards(d, t)
    with (d / FIRST).open("r+b") as file:
        file.seek(8)
        file.write(b"garbage!")


def shard_is_a_pickle(d: Path, t: Tensors) -> None:
    shards(d, t)
    (d / FIRST).write_bytes(pickle.dumps(Bomb(), protocol=4))


def shard_is_a_zip(d: Path, t: Tensors) -> None:
    shards(d, t)
    torch.save({"norm.weight": t["norm.weight"]}, d / FIRST)


def index_points_to_the_wrong_file(d: Path, t: Tensors) -> None:
    shards(d, t)
    placed = json.loads((d / INDEX).read_text())["weight_map"]
    write_index(d, placed | {"embed.weight": SECOND})


def index_lacks_a_tensor(d: Path, t: Tensors) -> None:
    shards(d, t)
    placed = json.loads((d / INDEX).read_text())["weight_map"]
    write_index(d, {name: file for name, file in placed.items() if name != "embed.weight"})


def tensor_in_two_shards(d: Path, t: Tensors) -> None:
    files = split(t, 2)
    files[SECOND] = files[SECOND] | {"embed.weight": t["embed.weight"]}
    write(d, load_config(TINY), files, index=True)


def index_leaves_the_directory(d: Path, t: Tensors) -> None:
    shards(d, t)
    placed = json.loads((d / INDEX).read_text())["weight_map"]
    write_index(d, placed | {"embed.weight": "../other.safetensors"})


def index_is_no_json(d: Path, t: Tensors) -> None:
    shards(d, t)
    (d / INDEX).write_text("{")


def index_has_no_map(d: Path, t: Tensors) -> None:
    shards(d, t)
    (d / INDEX).write_text("{}")


def index_is_empty(d: Path, t: Tensors) -> None:
    shards(d, t)
    write_index(d, {})


def index_beside_another_single_file(d: Path, t: Tensors) -> None:
    shards(d, t)
    save_file(t, d / SINGLE)


def no_index(d: Path, t: Tensors) -> None:
    shards(d, t)
    (d / INDEX).unlink()


def only_a_pickle(d: Path, t: Tensors) -> None:
    (d / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def nothing(d: Path, t: Tensors) -> None:
    d.mkdir(exist_ok=True)


def expert_id_too_large(d: Path, t: Tensors) -> None:
    ids = t["layers.0.ffn.gate.tid2eid"].clone()
    ids[17, 1] = 8
    write(d, load_config(TINY), {SINGLE: t | {"layers.0.ffn.gate.tid2eid": ids}})


def expert_id_negative(d: Path, t: Tensors) -> None:
    ids = t["layers.0.ffn.gate.tid2eid"].clone()
    ids[17, 1] = -1
    write(d, load_config(TINY), {SINGLE: t | {"layers.0.ffn.gate.tid2eid": ids}})


class Bomb:
    """What a pickle can do, if it is opened."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (66,)


DAMAGE: list[tuple[Callable[[Path, Tensors], None], str]] = [
    (no_tensor, f"{SINGLE}: tensor {GATE} is missing (expected F32 [8])"),
    (no_scale, f"{SINGLE}: tensor layers.2.ffn.experts.4.w2.scale is missing (expected F8_E8M0 [256, 4])"),
    (no_expert, f"{SINGLE}: tensor layers.0.ffn.experts.7.w1.weight is missing (expected I8 [128, 128])"),
    (extra_expert, f"{SINGLE}: tensor layers.0.ffn.experts.8.w1.weight is unexpected (I8 [128, 128])"),
    (
        wrong_shape,
        f"{SINGLE}: tensor layers.1.attn.wq_a.weight is F8_E4M3 [64, 256], expected F8_E4M3 [128, 256]",
    ),
    (wrong_scale_shape, f"{SINGLE}: tensor layers.0.attn.wo_a.scale is F8_E8M0 [1, 2], expected F8_E8M0 [2, 2]"),
    (wrong_dtype, f"{SINGLE}: tensor norm.weight is F32 [256], expected BF16 [256]"),
    (odd_dtype, f"{SINGLE}: tensor norm.weight is F64 [256], expected BF16 [256]"),
    (quantised_without_saying_so, "tensor layers.0.attn.wq_a.weight is F8_E4M3 [128, 256], expected BF16 or F32"),
    (shard_is_missing, f"{SECOND}: no such file, but {INDEX} places"),
    (shard_is_truncated, f"{SECOND}: truncated: "),
    (header_is_truncated, f"{SECOND}: truncated: 1000 bytes, the header alone takes"),
    (shard_is_empty, f"{FIRST}: not a readable safetensors file"),
    (shard_has_a_tail, f"{FIRST}: not a readable safetensors file"),
    (header_is_garbage, f"{FIRST}: not a readable safetensors file"),
    (shard_is_a_pickle, f"{FIRST}: looks like a pickle (torch.save), which is never opened"),
    (shard_is_a_zip, f"{FIRST}: looks like a pickle (torch.save), which is never opened"),
    (index_points_to_the_wrong_file, f"{SECOND}: tensor embed.weight is not there, but {INDEX} places it there"),
    (index_lacks_a_tensor, f"{FIRST}: tensor embed.weight is not in {INDEX}"),
    (tensor_in_two_shards, f"{SECOND}: tensor embed.weight is also in {FIRST}"),
    (index_leaves_the_directory, f"{INDEX}: not an index with a weight_map: ValueError"),
    (index_leaves_the_directory, "tensor embed.weight must be in a file of this directory"),
    (index_is_no_json, f"{INDEX}: not an index with a weight_map"),
    (index_has_no_map, f"{INDEX}: not an index with a weight_map"),
    (index_is_empty, f"{INDEX}: its weight_map is empty"),
    (index_beside_another_single_file, f"{SINGLE}: contradicts {INDEX}, which names {FIRST}"),
    (no_index, f"holds neither {SINGLE} nor {INDEX} (but {FIRST}, {SECOND}; pickled files are never read)"),
    (only_a_pickle, f"holds neither {SINGLE} nor {INDEX} (but pytorch_model.bin; pickled files are never read)"),
    (nothing, f"holds neither {SINGLE} nor {INDEX}"),
    (expert_id_too_large, f"{SINGLE}: tensor layers.0.ffn.gate.tid2eid names experts 0..8, n_routed_experts is 8"),
    (expert_id_negative, f"{SINGLE}: tensor layers.0.ffn.gate.tid2eid names experts -1..7, n_routed_experts is 8"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage(damage: Callable[[Path, Tensors], None], message: str, original: Tensors, tmp_path: Path) -> None:
    damage(tmp_path, original)
    cfg = load_config(tmp_path) if (tmp_path / "config.json").exists() else load_config(TINY)
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path, cfg)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_truncated_shard_names_the_tensors_it_cuts(original: Tensors, tmp_path: Path) -> None:
    shard_is_truncated(tmp_path, original)
    with (tmp_path / SECOND).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    with pytest.raises(CheckpointError, match=rf"1 tensors are cut off, the first is {last}$"):
        load_weights(tmp_path, load_config(TINY))


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load_weights(tmp_path / "nowhere", load_config(TINY))
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        weights_are_random(tmp_path / "nowhere")


def test_ten_problems_are_listed_and_the_rest_counted(original: Tensors, tmp_path: Path) -> None:
    no_expert(tmp_path, original)  # 6 layers of 6 tensors
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path, load_config(TINY))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}: 36 problems" and len(lines) == 12 and lines[-1].strip() == "and 26 more"


def test_headers_are_checked_before_data_is_read(original: Tensors, tmp_path: Path) -> None:
    write(tmp_path, load_config(TINY), {SINGLE: {n: t for n, t in original.items() if n != "mtp.0.hc_head_scale"}})
    placed: list[str] = []
    with pytest.raises(CheckpointError, match=r"tensor mtp\.0\.hc_head_scale is missing"):
        load_weights(tmp_path, load_config(TINY), place=lambda weight: placed.append(weight.name) or weight)  # type: ignore[func-returns-value]
    assert not placed


# --- saving ---------------------------------------------------------------------------------------------------------


def leftovers(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.__delitem__(GATE), f"tensor {GATE} was not given"),
        (lambda t: t.update(extra=torch.ones(1)), r"tensor extra is unexpected \(F32 \[1\]\)"),
        (lambda t: t.update({GATE: torch.ones(9)}), rf"tensor {GATE} is F32 \[9\], expected F32 \[8\]"),
        (lambda t: t.update({GATE: t[GATE].double()}), rf"tensor {GATE} is torch.float64 \[8\], expected F32 \[8\]"),
    ],
)
def test_only_whole_checkpoints_are_saved(
    change: Callable[[Tensors], None], message: str, original: Tensors, tmp_path: Path
) -> None:
    tensors = dict(original)
    change(tensors)
    with pytest.raises(CheckpointError, match=rf"out: .*{message}"):
        save_checkpoint(tmp_path / "out", load_config(TINY), tensors.items())
    assert leftovers(tmp_path) == []


def test_a_tensor_given_twice(original: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor norm\.weight is unexpected"):
        save_checkpoint(
            tmp_path / "out", load_config(TINY), [*original.items(), ("norm.weight", original["norm.weight"])]
        )


def test_nothing_is_overwritten(original: Tensors, tmp_path: Path) -> None:
    cfg = load_config(TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=f"{name}: exists and is not an empty directory"):
            save_checkpoint(tmp_path / name, cfg, original.items())
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", cfg, original.items())
    assert same_tensors(load_file(tmp_path / "empty" / SINGLE), original)
    assert leftovers(tmp_path) == ["empty", "file", "full"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_nothing(error: type[BaseException], original: Tensors, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        for i, item in enumerate(original.items()):
            if i == 400:
                assert len(list(tmp_path.rglob("*.safetensors"))) > 3  # some files are written by now
                raise error("stop")
            yield item

    with pytest.raises(error, match="stop"):
        save_checkpoint(tmp_path / "out", load_config(TINY), broken(), max_shard_bytes=1_000_000)
    assert leftovers(tmp_path) == []


def test_a_killed_save_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from dsv4_hal.model.checkpoint import load_weights, save_checkpoint, unstack
from dsv4_hal.model.config import load_config
from dsv4_hal.model.weights import stored_bytes, weight_table
cfg = load_config(sys.argv[1])
def slow():
    for i, item in enumerate(unstack(load_weights(sys.argv[1], cfg), weight_table(cfg))):
        if i == 400:
            print("half", flush=True)
            time.sleep(60)
        yield item
save_checkpoint(sys.argv[2], cfg, slow(), max_shard_bytes=1_000_000)
"""
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", script, str(TINY), str(out)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert [name.startswith(".out.partial-") for name in leftovers(tmp_path)] == [True]
    save_checkpoint(out, load_config(TINY), load_file(TINY / SINGLE).items())  # and the next one succeeds


def test_the_disk_refuses(original: Tensors, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/out: cannot be written: "):
        save_checkpoint(tmp_path / "file" / "out", load_config(TINY), original.items())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))  # as if the disk were full after 2 MB
    try:
        with pytest.raises(CheckpointError, match=r"out: cannot be written: .*File too large"):
            save_checkpoint(tmp_path / "out", load_config(TINY), original.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == ["file"]


# --- random weights -------------------------------------------------------------------------------------------------


def test_tiny_preset_is_small_and_quick(tmp_path: Path) -> None:
    start = time.perf_counter()
    cfg = init_checkpoint(preset("v4-tiny"), tmp_path / "tiny")
    assert time.perf_counter() - start < 20
    assert sum(path.stat().st_size for path in (tmp_path / "tiny").iterdir()) < 80e6
    assert cfg == load_config(tmp_path / "tiny") == preset("v4-tiny")
    weights = load_weights(tmp_path / "tiny", cfg)
    assert matrix(weights, "embed").format.name == "bf16" and matrix(weights, "embed").shape == (129280, 128)
    assert weights_are_random(tmp_path / "tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8-fp4"])
def test_random_weights(dtype: str, tmp_path: Path) -> None:
    cfg = init_checkpoint(small(), tmp_path / "out", dtype, seed=7)
    assert load_config(tmp_path / "out") == cfg == stored_as(small(), dtype)
    assert read_metadata(tmp_path / "out") == {"format": "pt", "dsv4_hal.weights": "random, seed 7"}
    weights = load_weights(tmp_path / "out", cfg)
    formats = {value.format.name for value in weights.values() if isinstance(value, Weight)}
    assert formats == {"float32": {"fp32"}, "bfloat16": {"bf16"}, "fp8-fp4": {"bf16", "e4m3_128x128", "mxfp4"}}[dtype]
    ids = weights["layers.0.ffn.gate.tid2eid"]
    assert isinstance(ids, Tensor) and ids.dtype == torch.int64 and (ids[:, 0] != ids[:, 1]).all()
    assert set(ids.flatten().tolist()) == set(range(4))
    for name, mean, deviation in [
        ("embed", 0.0, 0.02),
        ("layers.1.attn_norm", 1.0, 0.02),
        ("layers.0.hc_attn_fn", 0.0, 0.02),
        ("layers.1.attn.compressor.ape", 0.0, 0.02),
    ]:
        values = weights[name].data.float()
        assert abs(values.mean() - mean) < 0.01 and abs(values.std() / deviation - 1) < 0.2, name
    for name in ("layers.0.hc_attn_scale", "layers.1.ffn.gate.bias", "layers.0.attn.attn_sink"):
        values = weights[name].data
        assert values.dtype == torch.float32 and 0 < values.abs().max() < 0.5


def test_quantised_values_are_the_plain_ones_rounded(tmp_path: Path) -> None:
    from dsv4_hal.formats.quantize import dequantize

    exact = load_weights(tmp_path / "a", init_checkpoint(small(), tmp_path / "a", "float32"))
    rounded = load_weights(tmp_path / "b", init_checkpoint(small(), tmp_path / "b"))
    for name, step in [("layers.0.attn.wq_b", 0.05), ("layers.1.ffn.experts.w13", 0.2), ("head", 0.005)]:
        values, stored = matrix(exact, name).data, matrix(rounded, name)
        got = dequantize(QTensor(stored.data, stored.scale, stored.format), torch.float32)
        assert 0 < (got - values).norm() / values.norm() < step, name


def test_a_tensor_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    init_checkpoint(small(), tmp_path / "a", seed=1)
    init_checkpoint(small(), tmp_path / "sharded", seed=1, max_shard_bytes=50_000)
    deeper = small(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0))
    init_checkpoint(deeper, tmp_path / "deeper", seed=1)
    init_checkpoint(small(), tmp_path / "other", seed=2)
    first = load_file(tmp_path / "a" / SINGLE)
    assert first.items() and len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    sharded = {n: t for path in (tmp_path / "sharded").glob("*.safetensors") for n, t in load_file(path).items()}
    assert same_tensors(sharded, first)
    longer = load_file(tmp_path / "deeper" / SINGLE)
    assert all(same(longer[name], tensor) for name, tensor in first.items())
    other = load_file(tmp_path / "other" / SINGLE)
    assert not same(other["embed.weight"], first["embed.weight"])
    assert not same(first["layers.0.attn.wq_b.weight"], first["layers.1.attn.wq_b.weight"])


def test_only_our_own_files_are_random() -> None:
    assert not weights_are_random(TINY)
    with safe_open(TINY / SINGLE, "pt") as file:
        assert read_metadata(TINY) == file.metadata()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_within_the_bound(tmp_path: Path) -> None:
    """At 64 MB, of which a layer's experts are a third: a mapping kept open would hold all of them twice."""
    wide = small(vocab_size=1024, hidden_size=512, moe_intermediate_size=256, n_routed_experts=24)
    table = weight_table(init_checkpoint(wide, tmp_path, "bfloat16", max_shard_bytes=30_000_000))
    layer = sum(spec.nbytes for name, spec in table.items() if name.startswith("layers.1.ffn.experts."))
    script = Path(__file__).parents[2] / "benchmarks" / "load_memory.py"
    child = subprocess.run([sys.executable, script, "--child", tmp_path], check=True, capture_output=True, text=True)
    found = json.loads(child.stdout)
    assert stored_bytes(table) * 0.9 < found["peak_read"] < stored_bytes(table) + layer + 5_000_000
    assert found["peak_loaded"] < stored_bytes(table) + layer + 5_000_000


def test_targets_that_cannot_be_renamed_onto_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("nothing may be written")
        yield

    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for target in (tmp_path / "link", Path(".")):
        with pytest.raises(CheckpointError, match="name a new directory in it"):
            save_checkpoint(target, load_config(TINY), never())


def test_files_are_readable_as_the_umask_says(original: Tensors, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "out", load_config(TINY), original.items())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes[SINGLE] == modes["config.json"] != 0o600


def test_a_vector_with_nan_is_refused(original: Tensors, tmp_path: Path) -> None:
    spoiled = {**original, "layers.3.ffn.gate.bias": torch.full_like(original["layers.3.ffn.gate.bias"], float("nan"))}
    save_checkpoint(tmp_path / "out", load_config(TINY), spoiled.items())
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: tensor layers.3.ffn.gate.bias holds NaN or infinity"
    ):
        load_weights(tmp_path / "out", load_config(TINY))
