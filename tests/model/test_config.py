"""config.json: what is read, what is refused and in which words, and the three presets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.model.config import (
    QUANTIZATION,
    STORED_AS,
    ConfigError,
    ModelConfig,
    load_config,
    preset,
    preset_names,
    stored_as,
)

TINY = Path(__file__).parents[1] / "data" / "tiny"
GONE = object()


def official() -> dict[str, Any]:
    values = json.loads((TINY / "config.json").read_text())
    assert isinstance(values, dict)
    return values


def changed(**changes: Any) -> dict[str, Any]:
    values = official() | changes
    return {key: value for key, value in values.items() if value is not GONE}


def nested(key: str, **changes: Any) -> dict[str, Any]:
    inner = official()[key] | changes
    return changed(**{key: {name: value for name, value in inner.items() if value is not GONE}})


def plain(**changes: Any) -> dict[str, Any]:
    return changed(**({"quantization_config": GONE, "expert_dtype": GONE} | changes))


def test_official_config_comes_back_as_it_was() -> None:
    values = official()
    cfg = load_config(TINY)
    assert cfg.compress_ratios == (0, 4, 128, 4, 128, 0) and cfg.layer_ratios == (0, 4, 128, 4, 128)
    assert cfg.rope_scaling is not None and cfg.rope_scaling.factor == 16.0
    assert isinstance(cfg.rope_theta, float) and cfg.swiglu_limit == 2.0
    written = json.loads(json.dumps(cfg.to_dict()))
    assert written == {key: value for key, value in values.items() if key != "use_cache"}
    assert ModelConfig.from_dict(written, "again") == cfg
    assert hash(cfg) == hash(load_config(TINY))


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_presets_are_the_published_configs(name: str) -> None:
    flash = name == "v4-flash"
    published = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "index_head_dim": 128,
        "index_n_heads": 64,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "vocab_size": 129280,
        "expert_dtype": "fp4",
        "hidden_size": 4096 if flash else 7168,
        "num_hidden_layers": 43 if flash else 61,
        "num_attention_heads": 64 if flash else 128,
        "moe_intermediate_size": 2048 if flash else 3072,
        "n_routed_experts": 256 if flash else 384,
        "q_lora_rank": 1024 if flash else 1536,
        "o_groups": 8 if flash else 16,
        "index_topk": 512 if flash else 1024,
        "routed_scaling_factor": 1.5 if flash else 2.5,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0] if flash else [128, 128, *[4, 128] * 29, 4, 0],
    }
    assert preset(name).to_dict() == published


def test_preset_names() -> None:
    assert {"v4-flash", "v4-pro", "v4-tiny"} <= set(preset_names())
    for name in preset_names():
        assert ModelConfig.from_dict(preset(name).to_dict(), name) == preset(name)
    with pytest.raises(ConfigError, match=f"v4-huge: no such preset; there are {', '.join(preset_names())}"):
        preset("v4-huge")


def test_what_an_official_config_may_lack() -> None:
    assert ModelConfig.from_dict(changed(expert_dtype=GONE), "x").expert_dtype == "fp4"
    assert ModelConfig.from_dict(changed(rope_scaling=GONE), "x").rope_scaling is None
    assert ModelConfig.from_dict(changed(swiglu_limit=None), "x").swiglu_limit is None
    assert ModelConfig.from_dict(plain(), "x").quantization_config is None
    assert ModelConfig.from_dict(plain(torch_dtype="float32"), "x").expert_dtype is None
    base = ModelConfig.from_dict(nested("quantization_config", scale_fmt=GONE) | {"expert_dtype": "fp8"}, "x")
    assert base.quantization_config == replace(QUANTIZATION, scale_fmt=None)
    assert "scale_fmt" not in base.to_dict()["quantization_config"]


def test_null_clamp_survives_a_round_trip() -> None:
    cfg = ModelConfig.from_dict(changed(swiglu_limit=None), "x")
    assert ModelConfig.from_dict(cfg.to_dict(), "y") == cfg


def test_bookkeeping_is_ignored_and_dtype_is_an_alias() -> None:
    cfg = load_config(TINY)
    extra = {"transformers_version": "4.57.1", "_name_or_path": "somewhere", "auto_map": {"AutoModel": "evil.Model"}}
    assert ModelConfig.from_dict(changed(**extra), "x") == cfg
    assert ModelConfig.from_dict(changed(torch_dtype=GONE, dtype="bfloat16"), "x") == cfg
    assert ModelConfig.from_dict(changed(dtype="bfloat16"), "x") == cfg
    bare = ("attention_bias", "attention_dropout", "hidden_act", "norm_topk_prob", "num_key_value_heads")
    assert ModelConfig.from_dict(changed(**dict.fromkeys(bare, GONE)), "x") == cfg


def test_later_checkpoints_keep_their_dspark_keys() -> None:
    keys = {"dspark_block_size": 5, "dspark_target_layer_ids": [2, 3, 4], "dspark_markov_rank": 256}
    cfg = ModelConfig.from_dict(changed(**keys, compress_ratios=[0, 4, 128, 4, 128, 0, 0, 0]), "x")
    assert dict(cfg.dspark)["dspark_target_layer_ids"] == (2, 3, 4)
    written = json.loads(json.dumps(cfg.to_dict()))
    assert keys.items() <= written.items() and written["compress_ratios"][5:] == [0, 0, 0]
    assert ModelConfig.from_dict(written, "y") == cfg


@pytest.mark.parametrize("dtype", STORED_AS)
def test_stored_as(dtype: str) -> None:
    cfg = stored_as(load_config(TINY), dtype)
    assert (cfg.quantization_config is None) == (dtype in ("bfloat16", "float32"))
    assert ModelConfig.from_dict(cfg.to_dict(), "x") == cfg


def test_stored_as_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, fp8-fp4, w8a8, w4a8, got 'int8'"):
        stored_as(load_config(TINY), "int8")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # keys
    "unknown": (changed(hiden_size=256), "unknown key hiden_size; did you mean hidden_size?"),
    "unknown, nothing near": (changed(zzz=1), "unknown key zzz"),
    "unknown nested": (nested("rope_scaling", beta_fst=32), "unknown key rope_scaling.beta_fst; did you mean"),
    "rope_parameters": (changed(rope_parameters={}), "unknown key rope_parameters"),
    "missing": (changed(hc_mult=GONE), "hc_mult is missing"),
    "missing clamp": (changed(swiglu_limit=GONE), "swiglu_limit is missing"),
    "missing nested": (nested("quantization_config", fmt=GONE), "quantization_config.fmt is missing"),
    "missing rope type": (nested("rope_scaling", type=GONE), "rope_scaling.type is missing"),
    "dspark is no key": (changed(dspark=[]), "unknown key dspark"),
    # another model
    "v4.1": (changed(model_type="deepseek_v41"), "model_type deepseek_v41 is not supported"),
    "v3": (changed(model_type="deepseek_v3"), "model_type must be 'deepseek_v4', got 'deepseek_v3'"),
    "no type": (changed(model_type=GONE), "model_type must be 'deepseek_v4', got None"),
    "vision": (changed(vision_dim=1024), "vision checkpoints are not supported (vision_dim)"),
    "dropout": (changed(attention_dropout=0.1), "attention_dropout must be 0.0, got 0.1"),
    "attention bias": (changed(attention_bias=True), "attention_bias must be False, got True"),
    "activation": (changed(hidden_act="gelu"), "hidden_act must be 'silu', got 'gelu'"),
    "unnormalised": (changed(norm_topk_prob=False), "norm_topk_prob must be True, got False"),
    "one is not true": (changed(norm_topk_prob=1), "norm_topk_prob must be True, got 1"),
    "sigmoid": (changed(scoring_func="sigmoid"), "scoring_func must be 'sqrtsoftplus', got 'sigmoid'"),
    "groups": (changed(topk_method="greedy"), "topk_method must be 'noaux_tc', got 'greedy'"),
    "kv heads": (changed(num_key_value_heads=8), "num_key_value_heads must be 1, got 8"),
    "shared experts": (changed(n_shared_experts=2), "n_shared_experts must be 1, got 2"),
    "tied": (changed(tie_word_embeddings=True), "tie_word_embeddings must be False, got True"),
    "rope type": (nested("rope_scaling", type="linear"), "rope_scaling.type must be 'yarn', got 'linear'"),
    # types and ranges
    "string for int": (changed(head_dim="128"), "head_dim must be an integer, got '128'"),
    "bool for int": (changed(hc_mult=True), "hc_mult must be an integer, got True"),
    "float for int": (changed(vocab_size=512.0), "vocab_size must be an integer, got 512.0"),
    "bool for float": (changed(rope_theta=True), "rope_theta must be a finite number, got True"),
    "NaN": (changed(hc_eps=float("nan")), "hc_eps must be a finite number, got nan"),
    "infinite": (changed(swiglu_limit=float("inf")), "swiglu_limit must be a finite number, got inf"),
    "huge integer": (changed(rope_theta=10**400), "rope_theta must be a finite number, got 1000"),
    "null": (changed(hidden_size=None), "hidden_size must be an integer, got None"),
    "negative": (changed(sliding_window=-1), "sliding_window must be at least 1, got -1"),
    "negative hash layers": (changed(num_hash_layers=-1), "num_hash_layers must be at least 0, got -1"),
    "zero epsilon": (changed(rms_norm_eps=0), "rms_norm_eps must be positive, got 0.0"),
    "zero clamp": (changed(swiglu_limit=0), "swiglu_limit must be positive (null: no clamp), got 0.0"),
    "zero factor": (nested("rope_scaling", factor=0), "rope_scaling.factor must be positive, got 0.0"),
    "ratios not a list": (changed(compress_ratios="0,4"), "compress_ratios must be a list of integers, got '0,4'"),
    "ratio a string": (changed(compress_ratios=[0, "4", 0, 0, 0]), "compress_ratios must be an integer, got '4'"),
    "object a string": (changed(rope_scaling="yarn"), "rope_scaling must be an object, got 'yarn'"),
    "int for string": (changed(torch_dtype=16), "torch_dtype must be a string, got 16"),
    # contradictions
    "ratios too short": (
        changed(compress_ratios=[0, 4, 128, 4]),
        "compress_ratios has 4 entries for num_hidden_layers 5",
    ),
    "ratio 8": (changed(compress_ratios=[0, 4, 8, 4, 128]), "compress_ratios[2] must be 0, 4 or 128, got 8"),
    "MTP ratio": (changed(compress_ratios=[0] * 5 + [4]), "compress_ratios[5] belongs to the MTP stage and must be 0"),
    "two MTP stages": (changed(num_nextn_predict_layers=2), "num_nextn_predict_layers must be 0 or 1, got 2"),
    "hash layers": (changed(num_hash_layers=6), "num_hash_layers 6 exceeds num_hidden_layers 5"),
    "experts": (changed(num_experts_per_tok=9), "num_experts_per_tok 9 exceeds n_routed_experts 8"),
    "o_groups": (changed(o_groups=3), "num_attention_heads 4 is not a multiple of o_groups 3"),
    "no groups": (changed(o_groups=0), "o_groups must be at least 1, got 0"),
    "odd rope": (changed(qk_rope_head_dim=63), "qk_rope_head_dim must be even, got 63"),
    "rope beyond head": (changed(head_dim=32), "qk_rope_head_dim 64 exceeds head_dim 32"),
    "rope beyond index": (changed(index_head_dim=32), "qk_rope_head_dim 64 exceeds index_head_dim 32"),
    "eos": (changed(eos_token_id=512), "eos_token_id 512 is not below vocab_size 512"),
    "two dtypes": (changed(dtype="float32"), "dtype 'float32' contradicts torch_dtype 'bfloat16'"),
    # quantisation
    "fmt": (nested("quantization_config", fmt="e5m2"), "quantization_config.fmt must be 'e4m3', got 'e5m2'"),
    "block": (
        nested("quantization_config", weight_block_size=[32, 32]),
        "quantization_config.weight_block_size must be [128, 128], got [32, 32]",
    ),
    "scale": (nested("quantization_config", scale_fmt="fp32"), "scale_fmt must be 'ue8m0', got 'fp32'"),
    "quantised fp32": (changed(torch_dtype="float32"), "torch_dtype must be 'bfloat16' with quantization_config"),
    "expert_dtype": (changed(expert_dtype="int4"), "expert_dtype must be 'fp4' or 'fp8' with quantization_config"),
    "expert_dtype alone": (plain(expert_dtype="fp8"), "expert_dtype 'fp8' is given without quantization_config"),
    "plain half": (plain(torch_dtype="float16"), "torch_dtype must be 'float32' or 'bfloat16' without"),
    "experts cut a block": (changed(moe_intermediate_size=192), "moe_intermediate_size must be a multiple of 128"),
    "groups cut a block": (changed(o_lora_rank=64), "o_lora_rank must be a multiple of 128"),
    "FP4 rows": (changed(hidden_size=240), "hidden_size must be a multiple of 32 with FP4 experts, got 240"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    values, message = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(error.value)


def test_all_problems_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(changed(a=1, b=2, hc_mult=GONE, head_dim="x"), "source.json")
    first, *lines = str(error.value).splitlines()
    assert first == "source.json: 4 problems"
    assert sorted(line.split()[0] for line in lines) == ["hc_mult", "head_dim", "unknown", "unknown"]
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(changed(**{f"key{i}": 1 for i in range(25)}), "source.json")
    assert len(str(error.value).splitlines()) == 12 and str(error.value).endswith("and 15 more")


def test_contradictions_of_a_config_made_in_code() -> None:
    with pytest.raises(ConfigError, match="ModelConfig: num_hash_layers 9 exceeds num_hidden_layers 5"):
        replace(load_config(TINY), num_hash_layers=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "must be an object with the fields of config.json"),
        ('{"head_dim": 1, "head_dim": 2}', "key head_dim stands twice"),
        ("\x80pickle", "cannot be read as JSON"),
    ],
)
def test_not_a_config_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ") and message in str(error.value)


def test_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: no such directory"):
        load_config(tmp_path / "nowhere")
