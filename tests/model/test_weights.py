"""The weight table against the published totals, and against a checkpoint in the official format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from dsv4_hal.formats.types import FORMATS
from dsv4_hal.model.config import ModelConfig, load_config, preset, stored_as
from dsv4_hal.model.weights import WeightSpec, checkpoint_tensors, parameter_count, stored_bytes, weight_table

TINY = Path(__file__).parents[1] / "data" / "tiny"


@pytest.mark.parametrize(
    ("name", "billions", "tensors", "gigabytes"),
    [
        ("v4-flash", ("284.33", "290.94"), (67_612, 69_187), "159.61"),
        ("v4-pro", ("1573.00", "1598.84"), (142_773, 145_116), "864.70"),
    ],
)
def test_published_totals(name: str, billions: tuple[str, str], tensors: tuple[int, int], gigabytes: str) -> None:
    cfg = preset(name)
    table = weight_table(cfg)
    files = checkpoint_tensors(table, cfg)
    assert (f"{parameter_count(table, mtp=False) / 1e9:.2f}", f"{parameter_count(table) / 1e9:.2f}") == billions
    assert (sum(not tensor.startswith("mtp.") for tensor in files), len(files)) == tensors
    assert f"{stored_bytes(table) / 1e9:.2f}" == gigabytes
    assert stored_bytes(table, mtp=False) < stored_bytes(table)


def test_tiny_preset_fits_under_80_mb() -> None:
    assert stored_bytes(weight_table(preset("v4-tiny"))) < 75e6


def test_table_names_exactly_the_tensors_of_an_official_file() -> None:
    cfg = load_config(TINY)
    expected = checkpoint_tensors(weight_table(cfg), cfg)
    with safe_open(TINY / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tuple(found[name].get_shape()) == tensor.shape, name
            assert (found[name].get_dtype(),) == tensor.dtypes, name
    total = (TINY / "model.safetensors").stat().st_size
    assert 0 < total - stored_bytes(weight_table(cfg)) < 100_000  # the rest is the header


def small(**changes: object) -> ModelConfig:
    return replace(preset("v4-tiny"), **changes)  # type: ignore[arg-type]


def test_order_and_names() -> None:
    names = list(weight_table(small()))
    assert names[0] == "embed" and names[1] == "layers.0.attn_norm"
    start = names.index("norm")
    assert names[start : start + 5] == ["norm", "head", "hc_head_fn", "hc_head_base", "hc_head_scale"]
    assert all(name.startswith("mtp.0.") for name in names[start + 5 :])
    assert {"mtp.0.e_proj", "mtp.0.h_proj", "mtp.0.enorm", "mtp.0.hnorm", "mtp.0.norm", "mtp.0.hc_head_fn"} < set(names)
    assert not [name for name in names if name.endswith(".weight")]


def test_what_depends_on_the_layer() -> None:
    table = weight_table(small())  # ratios 0, 4, 128, 4; one hash layer

    def has(name: str) -> list[int]:
        return [i for i in range(4) if f"layers.{i}.{name}" in table]

    assert has("attn.compressor.ape") == [1, 2, 3] and has("attn.indexer.wq_b") == [1, 3]
    assert has("ffn.gate.tid2eid") == [0] and has("ffn.gate.bias") == [1, 2, 3] and has("ffn.gate") == [0, 1, 2, 3]
    assert "mtp.0.ffn.gate.bias" in table and "mtp.0.attn.compressor.ape" not in table
    assert table["layers.1.attn.compressor.ape"].shape == (4, 256)
    assert table["layers.2.attn.compressor.ape"].shape == (128, 128)


def test_rows_of_the_table() -> None:
    table = weight_table(small())
    experts = table["layers.2.ffn.experts.w13"]
    assert experts.shape == (8, 256, 128) and experts.format == "mxfp4" and experts.shard == "expert"
    assert experts.sources[3] == ("layers.2.ffn.experts.3.w1.weight", "layers.2.ffn.experts.3.w3.weight")
    assert experts.part_shape == (128, 128) and experts.is_stack and experts.is_matrix
    assert experts.nbytes == 8 * 256 * (64 + 4)
    shared = table["layers.2.ffn.shared_experts.w13"]
    assert shared.shape == (256, 128) and not shared.is_stack and shared.part_shape == (128, 128)
    assert table["layers.0.attn.wo_a"].shape == (256, 256)
    assert table["layers.0.ffn.gate.tid2eid"].nbytes == 129280 * 2 * 8
    plain = {"layers.0.ffn.gate.tid2eid", "layers.1.attn.compressor.ape", "layers.0.hc_attn_fn", "hc_head_fn"}
    assert not any(table[name].is_matrix for name in plain)
    assert not any(spec.is_matrix for spec in table.values() if len(spec.shape) == 1)
    assert table["layers.0.ffn.gate"].is_matrix and table["embed"].is_matrix and table["head"].is_matrix


def test_no_mtp_stage() -> None:
    table = weight_table(small(num_nextn_predict_layers=0))
    assert not [name for name in table if name.startswith("mtp.")]
    assert parameter_count(table) == parameter_count(weight_table(small()), mtp=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_checkpoints_hold_either_float(dtype: str) -> None:
    cfg = stored_as(small(), dtype)
    table = weight_table(cfg)
    usual = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    assert table["embed"].format == table["layers.1.ffn.experts.w2"].format == usual
    assert table["layers.1.hc_attn_fn"].format == table["layers.1.attn.attn_sink"].format == "fp32"
    files = checkpoint_tensors(table, cfg)
    assert not [name for name in files if name.endswith(".scale")]
    assert {frozenset(tensor.dtypes) for tensor in files.values()} == {frozenset({"F32", "BF16"}), frozenset({"I64"})}


def test_base_checkpoints() -> None:
    cfg = small(expert_dtype="fp8")
    table = weight_table(cfg)
    assert table["layers.1.ffn.experts.w2"].format == "e4m3_128x128_fp32"
    files = checkpoint_tensors(table, cfg)
    assert files["layers.1.ffn.experts.0.w1.weight"].dtypes == ("F8_E4M3",)
    assert files["layers.1.ffn.experts.0.w1.scale"].dtypes == ("F32", "F8_E8M0")
    assert files["layers.1.ffn.experts.0.w1.scale"].shape == (1, 1)
    assert files.keys() == checkpoint_tensors(weight_table(small()), small()).keys()


def test_every_matrix_has_a_format_and_a_known_shard() -> None:
    for spec in weight_table(preset("v4-flash")).values():
        assert isinstance(spec, WeightSpec)
        assert spec.format in FORMATS or spec.format == "int64"
        assert spec.shard in ("out", "in", "expert", "vocab", None)
        assert spec.shard is None or spec.is_matrix or spec.name.endswith("attn_sink")
