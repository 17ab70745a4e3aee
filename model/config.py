"""The model's shape: config.json as one frozen dataclass, under config.json's own names.

Reading is strict, because a field that is misread is another model: an unknown key, a wrong type, a value that this
architecture does not have and fields that contradict each other are errors, all of them listed in one message.
The fields are those of DeepSeek-V4's published config.json (Flash, Pro, their Base forms, and the later checkpoints
whose config carries `dspark_*` keys).
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml


class ConfigError(ValueError):
    """A model configuration that cannot be used; the message names the source and the keys."""


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies of the compressed layers (`rope_scaling` with type "yarn")."""

    factor: float  # context extension; frequencies below the ramp are divided by it
    beta_fast: float  # rotations within the original context above which a frequency is left alone
    beta_slow: float  # rotations below which a frequency is divided by `factor`
    original_max_position_embeddings: int  # context length before the extension


@dataclass(frozen=True)
class Quantization:
    """`quantization_config`. For each method of QUANTIZATIONS every field has one value."""

    quant_method: str  # "fp8", as published; "int8", as `dsv4-hal convert` writes for devices without FP8
    fmt: str  # element of the quantised matrices: "e4m3" or "int8"
    weight_block_size: tuple[int, ...]  # rows and columns that share a scale: (128, 128); (1, 0): those of a row
    activation_scheme: str  # "dynamic": scales of activations are computed as they come
    scale_fmt: str | None = None  # "ue8m0"; may be absent, as Base checkpoints store fp32 scales


@dataclass(frozen=True)
class ModelConfig:
    """DeepSeek-V4's config.json. ConfigError where fields contradict each other."""

    vocab_size: int  # V: tokens of the vocabulary, and rows of embedding and head
    hidden_size: int  # d: width of one residual stream
    num_hidden_layers: int  # L: layers, without MTP stages
    max_position_embeddings: int  # longest context the model was made for
    bos_token_id: int  # token that starts a text
    eos_token_id: int  # token that ends one
    initializer_range: float  # standard deviation of freshly initialised matrices
    torch_dtype: str  # dtype of unquantised matrices: "bfloat16", or "float32" in a plain checkpoint
    rms_norm_eps: float  # epsilon of every RMSNorm
    # attention
    num_attention_heads: int  # H: query heads
    head_dim: int  # D: channels of a query head, and of the one key/value row all heads share
    qk_rope_head_dim: int  # last channels of a head that are rotated
    q_lora_rank: int  # q: width of the query latent
    o_groups: int  # g: groups of heads that the first output projection keeps apart
    o_lora_rank: int  # width of one group's output latent
    sliding_window: int  # keys a token sees uncompressed, itself included
    rope_theta: float  # rotary base of layers with ratio 0
    compress_rope_theta: float  # rotary base of layers with ratio 4 or 128
    compress_ratios: tuple[int, ...]  # tokens per compressed entry: layers 0..L-1, then MTP stages
    index_n_heads: int  # heads of the indexer (ratio 4)
    index_head_dim: int  # channels of an indexer head
    index_topk: int  # entries the indexer picks for a token
    # experts
    n_routed_experts: int  # E: routed experts of a layer
    n_shared_experts: int  # experts every token passes through: 1
    num_experts_per_tok: int  # routed experts a token passes through
    moe_intermediate_size: int  # I: inner width of an expert
    num_hash_layers: int  # first layers, whose experts are looked up by token id
    routed_scaling_factor: float  # factor on the normalised routing weights
    swiglu_limit: float | None  # clamp inside the experts' SwiGLU; None: no clamp
    # hyper-connections (mHC)
    hc_mult: int  # residual streams
    hc_sinkhorn_iters: int  # Sinkhorn iterations of the mixing matrix
    hc_eps: float  # epsilon of the mixing weights
    num_nextn_predict_layers: int  # MTP stages stored in the official form: 0 or 1
    # what a config may lack
    rope_scaling: Yarn | None = None  # YaRN of the compressed layers; None: their frequencies are not scaled
    expert_dtype: str | None = None  # with FP8 "fp4" or "fp8" (absent: "fp4"), with INT8 "int8" or "int4"; else None
    quantization_config: Quantization | None = None  # None: a plain checkpoint, bf16 or fp32 throughout
    dspark: tuple[tuple[str, Any], ...] = ()  # the `dspark_*` keys of later checkpoints, kept to be saved again

    def __post_init__(self) -> None:
        problems = [*_out_of_range(self), *_contradictions(self)]
        if problems:
            raise ConfigError(listing("ModelConfig", problems))

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each of the L layers."""
        return self.compress_ratios[: self.num_hidden_layers]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> ModelConfig:
        """The configuration in `values`, the content of a config.json; `source` names it in errors.

        ConfigError lists every key that is missing, unknown, of a wrong type, or of a value this model does not have.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: must be an object with the fields of config.json, got {_shown(values)}")
        _check_family(values, source)
        known = {key: value for key, value in values.items() if key not in BOOKKEEPING}
        dspark = tuple((key, _frozen(known.pop(key))) for key in list(known) if key.startswith("dspark_"))
        problems: list[str] = []
        dtype = known.pop("dtype", None)  # the newer name of torch_dtype
        if dtype is not None and known.setdefault("torch_dtype", dtype) != dtype:
            problems.append(f"dtype {_shown(dtype)} contradicts torch_dtype {_shown(known['torch_dtype'])}")
        if known.get("quantization_config") is not None:
            known.setdefault("expert_dtype", "fp4")  # the first published configurations lack it
        found = _read(cls, known, FIXED, "", problems)
        if problems:
            raise ConfigError(listing(source, problems))
        try:
            return cls(**found, dspark=dspark)
        except ConfigError as error:
            raise ConfigError(str(error).replace("ModelConfig", source, 1)) from None

    def to_dict(self) -> dict[str, Any]:
        """The content of an official config.json that `from_dict` reads back as this configuration."""
        out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", **FIXED}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "dspark" and (value is not None or field.default is MISSING):
                out[field.name] = _plain(value)
        return out | {key: _plain(value) for key, value in self.dspark}


def overlaps(ratio: int) -> bool:
    """Blocks of ratio 4 overlap and are picked by an indexer (CSA); others do not, and are all seen (HCA)."""
    return ratio == 4


# Keys of config.json whose value says nothing about the computation: ignored.
BOOKKEEPING = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "model_type",  # read by _check_family
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "transformers_version",
        "use_cache",
    }
)

# Keys that may be absent, and that have one value in this architecture: with another it is another model.
FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "scoring_func": "sqrtsoftplus",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
    }
)

QUANTIZATION = Quantization("fp8", "e4m3", (128, 128), "dynamic", "ue8m0")  # as in the published instruct configs
INT8 = Quantization("int8", "int8", (1, 0), "dynamic")
QUANTIZATIONS: Mapping[str, Quantization] = MappingProxyType({q.quant_method: q for q in (QUANTIZATION, INT8)})
EXPERTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"fp8": ("fp4", "fp8"), "int8": ("int8", "int4")})

# What `dsv4-hal init --dtype` writes.
STORED_AS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "float32": {"torch_dtype": "float32", "expert_dtype": None, "quantization_config": None},
        "bfloat16": {"torch_dtype": "bfloat16", "expert_dtype": None, "quantization_config": None},
        "fp8-fp4": {"torch_dtype": "bfloat16", "expert_dtype": "fp4", "quantization_config": QUANTIZATION},
        "w8a8": {"torch_dtype": "bfloat16", "expert_dtype": "int8", "quantization_config": INT8},
        "w4a8": {"torch_dtype": "bfloat16", "expert_dtype": "int4", "quantization_config": INT8},
    }
)


def load_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The configuration in `directory`/config.json. ConfigError names the file and the keys that are wrong."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        why = "no such file" if Path(directory).is_dir() else "no such directory"
        raise ConfigError(f"{path}: {why}; a checkpoint is a directory with config.json and safetensors files")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    return ModelConfig.from_dict(values, str(path))


def preset_names() -> list[str]:
    """Names that `preset` takes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml"))


def preset(name: str) -> ModelConfig:
    """The configuration in configs/models/`name`.yaml. ConfigError for a name that is not among `preset_names`."""
    if name not in preset_names():
        raise ConfigError(f"{name}: no such preset; there are {', '.join(preset_names())}")
    text = _presets().joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return ModelConfig.from_dict(yaml.safe_load(text), f"preset {name}")


def find_config(model: str | os.PathLike[str]) -> tuple[ModelConfig, Path | None]:
    """The configuration of a model named by a user: a preset, or a checkpoint directory, and which (None: a preset).

    A name that is both a preset and a directory here is refused, rather than guessed at; a path that ends in a slash
    or starts with ./ is a directory. ConfigError also where it is neither, with the nearest preset.
    """
    name, directory = str(model), Path(model)
    if name in preset_names():
        if directory.is_dir():
            raise ConfigError(f"{name} is a preset and a directory here: write ./{name} for the directory")
        return preset(name), None
    if not directory.exists() and name == directory.name:
        near = difflib.get_close_matches(name, preset_names(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{name}: no such directory, and no such preset (there are {', '.join(preset_names())}){hint}"
        )
    return load_config(directory), directory


def stored_as(cfg: ModelConfig, dtype: str) -> ModelConfig:
    """`cfg` with its weights stored as `dtype`, a key of STORED_AS. ConfigError for any other."""
    if dtype not in STORED_AS:
        raise ConfigError(f"dtype must be one of {', '.join(STORED_AS)}, got {_shown(dtype)}")
    return replace(cfg, **STORED_AS[dtype])


def listing(source: object, problems: Iterable[str], limit: int = 10) -> str:
    """One message of several problems: `source: problem`, or one line each; after `limit` lines only their number."""
    lines = list(problems)
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([f"{source}: {len(lines)} problems", *lines[:limit], *more])


# --- reading: each value by the type its field declares -------------------------------------------------------------


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be an integer, got {_shown(value)}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ValueError(f"must be a finite number, got {_shown(value)}")
    return float(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {_shown(value)}")
    return value


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of integers, got {_shown(value)}")
    return tuple(_integer(item) for item in value)


_READERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {"int": _integer, "float": _number, "str": _string, "tuple[int, ...]": _integers}
)
_NESTED: Mapping[str, tuple[type, Mapping[str, Any]]] = MappingProxyType(
    {  # type of a field that is an object -> (its class, keys with one value only)
        "Yarn": (Yarn, {"type": "yarn", "rope_type": "yarn"}),
        "Quantization": (Quantization, {}),
    }
)


def _read(
    cls: type, values: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str, problems: list[str]
) -> dict[str, Any]:
    """Arguments of the dataclass `cls` out of `values`; what is wrong is appended to `problems`, keys with `prefix`."""
    declared = {field.name: field for field in fields(cls) if field.name != "dspark"}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key in fixed:
            if isinstance(value, bool) != isinstance(fixed[key], bool) or value != fixed[key]:
                problems.append(f"{name} must be {_shown(fixed[key])}, got {_shown(value)}")
        elif key not in declared:
            near = difflib.get_close_matches(str(key), [*declared, *fixed], 1)
            problems.append(f"unknown key {name}" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
        else:
            kind, _, optional = str(declared[key].type).partition(" | ")
            try:
                if value is None and optional:
                    found[key] = None
                elif kind in _NESTED:
                    found[key] = _object(*_NESTED[kind], value, f"{name}.", problems)
                else:
                    found[key] = _READERS[kind](value)
            except ValueError as error:
                problems.append(f"{name} {error}")
    missing = [f for f in declared.values() if f.name not in values and f.default is MISSING]
    problems.extend(f"{prefix}{field.name} is missing" for field in missing)
    return found


def _object(cls: type, fixed: Mapping[str, Any], value: Any, prefix: str, problems: list[str]) -> Any:
    """An instance of `cls` out of a nested object; None where a problem was appended."""
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object, got {_shown(value)}")
    before = len(problems)
    if fixed and not fixed.keys() & value.keys():
        problems.append(f"{prefix}{next(iter(fixed))} is missing")
    found = _read(cls, value, fixed, prefix, problems)
    return cls(**found) if len(problems) == before else None


def _check_family(values: Mapping[str, Any], source: str) -> None:
    """ConfigError unless this is a text-only DeepSeek-V4: any other problem would be beside the point."""
    kind = values.get("model_type")
    if kind == "deepseek_v41":
        raise ConfigError(f"{source}: model_type deepseek_v41 is not supported: V4.1 is another architecture than V4")
    if kind != "deepseek_v4":
        raise ConfigError(f"{source}: model_type must be 'deepseek_v4', got {_shown(kind)}")
    vision = [key for key in values if str(key).startswith("vision_")]
    if vision:
        raise ConfigError(f"{source}: vision checkpoints are not supported ({', '.join(vision)})")


# --- what must hold between fields ----------------------------------------------------------------------------------

_MAY_BE_ZERO = frozenset({"num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"})


_MOST = {"hc_sinkhorn_iters": 1000, "n_routed_experts": 1 << 16, "num_hidden_layers": 1 << 12}


def _out_of_range(cfg: ModelConfig) -> Iterator[str]:
    """Integers are at least 1 (some 0) and at most 2^31 - 1 (Sinkhorn iterations 1000), numbers positive, finite as
    float32; a rotary base exceeds 1."""
    for part, prefix in ((cfg, ""), (cfg.rope_scaling, "rope_scaling.")):
        for field in fields(part) if part is not None else ():
            value = getattr(part, field.name)
            if field.type == "int" and value < (field.name not in _MAY_BE_ZERO):
                least = 0 if field.name in _MAY_BE_ZERO else 1
                yield f"{prefix}{field.name} must be at least {least}, got {value}"
            elif field.type == "int" and value > _MOST.get(field.name, 2**31 - 1):
                yield f"{prefix}{field.name} must be at most {_MOST.get(field.name, 2**31 - 1)}, got {value}"
            elif field.name.endswith("rope_theta") and not 1 < value < 1e30:
                yield f"{prefix}{field.name} must exceed 1, got {value}"
            elif str(field.type).startswith("float") and value is not None and value > 3e38:
                yield f"{prefix}{field.name} must be finite as float32, got {value}"
            elif str(field.type).startswith("float") and value is not None and not value > 0:
                null = " (null: no clamp)" if field.name == "swiglu_limit" else ""
                yield f"{prefix}{field.name} must be positive{null}, got {value}"


def _contradictions(cfg: ModelConfig) -> Iterator[str]:
    """What contradicts itself in `cfg`, one line each."""
    layers, ratios, heads = cfg.num_hidden_layers, cfg.compress_ratios, cfg.num_attention_heads
    if len(ratios) < layers:
        yield f"compress_ratios has {len(ratios)} entries for num_hidden_layers {layers}"
    for i, ratio in enumerate(ratios):
        if ratio not in (0, 4, 128):
            yield f"compress_ratios[{i}] must be 0, 4 or 128, got {ratio}"
    if cfg.num_nextn_predict_layers > 1:
        yield f"num_nextn_predict_layers must be 0 or 1, got {cfg.num_nextn_predict_layers}"
    if cfg.num_nextn_predict_layers and any(ratios[layers : layers + 1]):
        yield f"compress_ratios[{layers}] belongs to the MTP stage and must be 0, got {ratios[layers]}"
    if cfg.n_shared_experts != 1:
        yield f"n_shared_experts must be 1, got {cfg.n_shared_experts}"
    if cfg.o_groups > 0 and heads % cfg.o_groups:
        yield f"num_attention_heads {heads} is not a multiple of o_groups {cfg.o_groups}"
    if cfg.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim must be even, got {cfg.qk_rope_head_dim}"
    for key, limit in (
        ("num_hash_layers", "num_hidden_layers"),
        ("num_experts_per_tok", "n_routed_experts"),
        ("qk_rope_head_dim", "head_dim"),
        ("qk_rope_head_dim", "index_head_dim"),
    ):
        if getattr(cfg, key) > getattr(cfg, limit):
            yield f"{key} {getattr(cfg, key)} exceeds {limit} {getattr(cfg, limit)}"
    for key in ("bos_token_id", "eos_token_id"):
        if getattr(cfg, key) >= cfg.vocab_size:
            yield f"{key} {getattr(cfg, key)} is not below vocab_size {cfg.vocab_size}"
    if cfg.quantization_config is None:
        yield from _plain_contradictions(cfg)
    else:
        yield from _quantized_contradictions(cfg, cfg.quantization_config)


def _plain_contradictions(cfg: ModelConfig) -> Iterator[str]:
    if cfg.torch_dtype not in ("float32", "bfloat16"):
        yield f"torch_dtype must be 'float32' or 'bfloat16' without quantization_config, got {cfg.torch_dtype!r}"
    if cfg.expert_dtype is not None:
        yield f"expert_dtype {cfg.expert_dtype!r} is given without quantization_config"


def _quantized_contradictions(cfg: ModelConfig, quantization: Quantization) -> Iterator[str]:
    method = quantization.quant_method
    if method not in QUANTIZATIONS:
        yield f"quantization_config.quant_method must be {' or '.join(QUANTIZATIONS)}, got {_shown(method)}"
        return
    for field in fields(quantization):
        got, want = getattr(quantization, field.name), getattr(QUANTIZATIONS[method], field.name)
        if got != want and (got is not None or field.default is MISSING):
            yield f"quantization_config.{field.name} must be {_shown(_plain(want))}, got {_shown(_plain(got))}"
    if cfg.torch_dtype != "bfloat16":
        yield f"torch_dtype must be 'bfloat16' with quantization_config, got {cfg.torch_dtype!r}"
    if cfg.expert_dtype not in EXPERTS[method]:
        wanted = " or ".join(map(repr, EXPERTS[method]))
        yield f"expert_dtype must be {wanted} with quantization_config, got {cfg.expert_dtype!r}"
    if method == "int8":
        if cfg.expert_dtype == "int4":
            yield from _multiples(cfg, [(key, 2, "INT4 experts") for key in ("hidden_size", "moe_intermediate_size")])
        return
    # w1 and w3 are kept as one matrix, and wo_a is read group by group: neither seam may cut a block of 128 rows
    multiples = [("moe_intermediate_size", 128, "FP8 weights"), ("o_lora_rank", 128, "FP8 weights")]
    if cfg.expert_dtype == "fp4":  # rows of the experts' matrices are whole FP4 blocks
        multiples.append(("hidden_size", 32, "FP4 experts"))
    yield from _multiples(cfg, multiples)


def _multiples(cfg: ModelConfig, multiples: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    for key, unit, what in multiples:
        if getattr(cfg, key) % unit:
            yield f"{key} must be a multiple of {unit} with {what}, got {getattr(cfg, key)}"


# --- small things ---------------------------------------------------------------------------------------------------


def _presets() -> Any:
    return files("dsv4_hal") / "configs" / "models"


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object hook: of a key that stands twice, plain json would keep the last in silence."""
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [key for key, _ in pairs]
        raise ConfigError(f"key {next(key for key in names if names.count(key) > 1)} stands twice")
    return out


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Yarn):
        return {"type": "yarn"} | {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Quantization):
        kept = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {key: item for key, item in kept.items() if item is not None}
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
