"""The one table of weights: what the model reads, how it is shaped and stored, which file tensors it is made of, and
along which axis it may later be split over devices.

Everything else about weights (loading, saving, initialising, counting) is a walk over this table; the names and shapes
of the official files stand nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from dsv4_hal.formats.types import FORMATS, Weight
from dsv4_hal.model.config import ModelConfig, overlaps


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the running model.

    name     as in the files without `.weight`; the experts' matrices are stacked under `ffn.experts.w13` and `.w2`
    shape    logical: matrices [out, in], stacks [E, out, in], vectors [n]; wo_a is [g * o_lora_rank, H * D / g]
    format   a name in FORMATS, or "int64". Where files may differ (scales of FP8 experts, dtype of plain checkpoints)
             it is the usual one, and a loaded Weight says what it really holds
    sources  names of the file tensors it is made of: outer one per expert (a single one where nothing is stacked),
             inner the parts whose rows follow one another (w1, w3)
    shard    the axis that tensor or expert parallelism may split: "out" (rows; of each part), "in" (columns),
             "expert", "vocab" (rows); None: every device holds it whole
    op       of the contract that reads it, where that is not `linear` or, for a stack, `grouped_linear`
    """

    name: str
    shape: tuple[int, ...]
    format: str
    sources: tuple[tuple[str, ...], ...]
    shard: str | None = None
    op: str = ""

    @property
    def read_by(self) -> str:
        """The op of the contract that reads it, of a matrix."""
        return self.op or ("grouped_linear" if self.is_stack else "linear")

    @property
    def is_matrix(self) -> bool:
        """Held as a `Weight` that linear ops read; everything else (norms, hc_*, ape, tid2eid) is a plain Tensor."""
        return len(self.shape) > 1 and self.sources[0][0].endswith(".weight")

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Logical shape of one source tensor."""
        rows, *columns = self.shape[1:] if self.is_stack else self.shape
        return (rows // len(self.sources[0]), *columns)

    @property
    def is_stack(self) -> bool:
        return len(self.shape) == 3

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        return math.prod(self.shape) * 8 if self.format == "int64" else FORMATS[self.format].nbytes(self.shape)


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the checkpoint files: its stored shape, the dtypes it may have there (safetensors' names), and
    the WeightSpec it belongs to."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    spec: str


def weight_table(cfg: ModelConfig) -> dict[str, WeightSpec]:
    """Every weight of `cfg` by name: embed, layers.0..L-1, norm, head, hc_head_*, then mtp.0 where there is one."""
    formats, vocab, d = _formats(cfg), cfg.vocab_size, cfg.hidden_size
    specs = [_spec("embed.weight", (vocab, d), formats["bf16"], "vocab", "embedding")]
    for i, ratio in enumerate(cfg.layer_ratios):
        specs += _block(cfg, f"layers.{i}.", ratio, hashed=i < cfg.num_hash_layers)
    specs += [
        _spec("norm.weight", (d,), formats["bf16"]),
        _spec("head.weight", (vocab, d), formats["bf16"], "vocab"),
        *_hyper_connection(cfg, "hc_head", heads=1, rows=cfg.hc_mult),
    ]
    if cfg.num_nextn_predict_layers:
        specs += _block(cfg, "mtp.0.", ratio=0, hashed=False)
        specs += [_spec(f"mtp.0.{name}.weight", (d, d), formats["fp8"]) for name in ("e_proj", "h_proj")]
        specs += [_spec(f"mtp.0.{name}.weight", (d,), formats["bf16"]) for name in ("enorm", "hnorm", "norm")]
        specs += _hyper_connection(cfg, "mtp.0.hc_head", heads=1, rows=cfg.hc_mult)
    return {spec.name: spec for spec in specs}


def checkpoint_tensors(table: Mapping[str, WeightSpec], cfg: ModelConfig) -> dict[str, FileTensor]:
    """Every tensor of the files of `cfg` by name, scales included, in the table's order."""
    return {tensor.name: tensor for spec in table.values() for tensor in _file_tensors(spec, cfg)}


def scale_name(source: str) -> str:
    """Name of the scales beside the file tensor `source`."""
    return source.removesuffix(".weight") + ".scale"


def parameter_count(table: Mapping[str, WeightSpec], mtp: bool = True) -> int:
    """Parameters as the reports count them: without scales and hash table; `mtp=False` leaves out the MTP stage."""
    return sum(math.prod(spec.shape) for spec in _chosen(table, mtp) if spec.format != "int64")


def stored_bytes(table: Mapping[str, WeightSpec], mtp: bool = True) -> int:
    """Bytes of the tensors in the files, scales included."""
    return sum(spec.nbytes for spec in _chosen(table, mtp))


def shapes_only(
    cfg: ModelConfig, place: Callable[[Weight], Weight] = lambda weight: weight
) -> dict[str, Weight | Tensor]:
    """Every weight of `cfg` on the meta device: shapes and dtypes as loading would give them, and no memory.

    place  what arranges a matrix for its backend (`Ops.repack`)
    """
    out: dict[str, Weight | Tensor] = {}
    for name, spec in weight_table(cfg).items():
        if spec.format == "int64":
            out[name] = torch.empty(spec.shape, dtype=torch.int64, device="meta")
            continue
        fmt = FORMATS[spec.format]
        data = torch.empty(fmt.data_shape(spec.shape), dtype=fmt.storage, device="meta")
        scales = fmt.scale_shape(spec.shape)
        scale = None if scales is None else torch.empty(scales, dtype=fmt.scale_dtype, device="meta")
        out[name] = place(Weight(data, scale, fmt, name, op=spec.read_by)) if spec.is_matrix else data
    return out


# --- the rows -------------------------------------------------------------------------------------------------------


def _formats(cfg: ModelConfig) -> Mapping[str, str]:
    """Format by kind. The kinds are named after what the published checkpoints hold; a plain one has no quantised.

    latent  projections between the residual stream and the low ranks of attention: published in FP8, and kept in bf16
            where the others are INT8, as Ascend's own conversion does
    """
    if cfg.quantization_config is None:
        plain = {"float32": "fp32", "bfloat16": "bf16"}[cfg.torch_dtype]
        return {"bf16": plain, "latent": plain, "fp8": plain, "expert": plain}
    if cfg.quantization_config.quant_method == "int8":
        return {"bf16": "bf16", "latent": "bf16", "fp8": "int8_channel", "expert": f"{cfg.expert_dtype}_channel"}
    matrix, expert = ("e4m3_128x128_fp32",) * 2 if cfg.expert_dtype == "fp8" else ("e4m3_128x128", "mxfp4")
    return {"bf16": "bf16", "latent": matrix, "fp8": matrix, "expert": expert}


def _spec(source: str, shape: tuple[int, ...], fmt: str, shard: str | None = None, op: str = "") -> WeightSpec:
    """A weight that is one tensor of the files."""
    return WeightSpec(source.removesuffix(".weight"), shape, fmt, ((source,),), shard, op)


def _block(cfg: ModelConfig, prefix: str, ratio: int, hashed: bool) -> Iterator[WeightSpec]:
    """The weights of one layer."""
    formats, d = _formats(cfg), cfg.hidden_size
    for part in ("attn", "ffn"):
        yield _spec(f"{prefix}{part}_norm.weight", (d,), formats["bf16"])
        yield from _hyper_connection(cfg, f"{prefix}hc_{part}", heads=3, rows=(2 + cfg.hc_mult) * cfg.hc_mult)
    yield from _attention(cfg, f"{prefix}attn.", ratio)
    yield from _experts(cfg, f"{prefix}ffn.", hashed)


def _hyper_connection(cfg: ModelConfig, name: str, heads: int, rows: int) -> Iterator[WeightSpec]:
    """Mixing projection of the flattened streams, its offsets, and one scale for each of its `heads`."""
    yield _spec(f"{name}_fn", (rows, cfg.hc_mult * cfg.hidden_size), "fp32")
    yield _spec(f"{name}_base", (rows,), "fp32")
    yield _spec(f"{name}_scale", (heads,), "fp32")


def _attention(cfg: ModelConfig, prefix: str, ratio: int) -> Iterator[WeightSpec]:
    formats, d, q = _formats(cfg), cfg.hidden_size, cfg.q_lora_rank
    heads, width, groups = cfg.num_attention_heads, cfg.head_dim, cfg.o_groups
    latent = groups * cfg.o_lora_rank
    yield _spec(f"{prefix}attn_sink", (heads,), "fp32", "out")
    yield _spec(f"{prefix}wq_a.weight", (q, d), formats["latent"])
    yield _spec(f"{prefix}q_norm.weight", (q,), formats["bf16"])
    yield _spec(f"{prefix}wq_b.weight", (heads * width, q), formats["fp8"], "out")
    yield _spec(f"{prefix}wkv.weight", (width, d), formats["latent"])
    yield _spec(f"{prefix}kv_norm.weight", (width,), formats["bf16"])
    inputs = heads * width // groups
    yield _spec(f"{prefix}wo_a.weight", (latent, inputs), formats["latent"], "out", "block_diagonal_linear")
    yield _spec(f"{prefix}wo_b.weight", (d, latent), formats["fp8"], "in")
    if ratio:
        yield from _compressor(cfg, f"{prefix}compressor.", ratio, width)
    if overlaps(ratio):
        index = f"{prefix}indexer."
        yield _spec(f"{index}wq_b.weight", (cfg.index_n_heads * cfg.index_head_dim, q), formats["fp8"], "out")
        yield _spec(f"{index}weights_proj.weight", (cfg.index_n_heads, d), formats["bf16"], "out")
        yield from _compressor(cfg, f"{index}compressor.", ratio, cfg.index_head_dim)


def _compressor(cfg: ModelConfig, prefix: str, ratio: int, width: int) -> Iterator[WeightSpec]:
    rows = 2 * width if overlaps(ratio) else width  # blocks overlap: half for each of the two
    plain = _formats(cfg)["bf16"]
    yield _spec(f"{prefix}ape", (ratio, rows), "fp32")
    yield _spec(f"{prefix}wkv.weight", (rows, cfg.hidden_size), plain)
    yield _spec(f"{prefix}wgate.weight", (rows, cfg.hidden_size), plain)
    yield _spec(f"{prefix}norm.weight", (width,), plain)


def _experts(cfg: ModelConfig, prefix: str, hashed: bool) -> Iterator[WeightSpec]:
    formats, d, inner, experts = _formats(cfg), cfg.hidden_size, cfg.moe_intermediate_size, cfg.n_routed_experts
    yield _spec(f"{prefix}gate.weight", (experts, d), formats["bf16"])
    if hashed:
        yield _spec(f"{prefix}gate.tid2eid", (cfg.vocab_size, cfg.num_experts_per_tok), "int64")
    else:
        yield _spec(f"{prefix}gate.bias", (experts,), "fp32")
    shared, routed, kind = f"{prefix}shared_experts.", f"{prefix}experts.", formats["expert"]
    w13 = ((f"{shared}w1.weight", f"{shared}w3.weight"),)
    yield WeightSpec(f"{shared}w13", (2 * inner, d), formats["fp8"], w13, "out")
    yield _spec(f"{shared}w2.weight", (d, inner), formats["fp8"], "in")
    w13s = tuple((f"{routed}{e}.w1.weight", f"{routed}{e}.w3.weight") for e in range(experts))
    yield WeightSpec(f"{routed}w13", (experts, 2 * inner, d), kind, w13s, "expert")
    w2s = tuple((f"{routed}{e}.w2.weight",) for e in range(experts))
    yield WeightSpec(f"{routed}w2", (experts, d, inner), kind, w2s, "expert")


# --- from a row to the files ----------------------------------------------------------------------------------------

# Format -> dtype names in the files of its codes, and of its scales.
_FILE_DTYPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "int64": (("I64",), ()),
        "bf16": (("BF16",), ()),
        "fp32": (("F32",), ()),
        "mxfp4": (("I8",), ("F8_E8M0",)),
        "e4m3_128x128": (("F8_E4M3",), ("F8_E8M0",)),
        "e4m3_128x128_fp32": (("F8_E4M3",), ("F32", "F8_E8M0")),  # Base: the usual dtype first
        "int8_channel": (("I8",), ("F32",)),
        "int4_channel": (("I8",), ("F32",)),
    }
)


def _file_tensors(spec: WeightSpec, cfg: ModelConfig) -> Iterator[FileTensor]:
    data, scale = _FILE_DTYPES[spec.format]
    if cfg.quantization_config is None and not spec.format.startswith("int"):
        data = (*data, *({"F32", "BF16"} - set(data)))  # a plain checkpoint may hold either
    fmt = FORMATS.get(spec.format)
    shape = spec.part_shape if fmt is None else fmt.data_shape(spec.part_shape)
    scale_shape = None if fmt is None else fmt.scale_shape(spec.part_shape)
    for parts in spec.sources:
        for source in parts:
            yield FileTensor(source, shape, data, spec.name)
            if scale_shape is not None:
                yield FileTensor(scale_name(source), scale_shape, scale, spec.name)


def _chosen(table: Mapping[str, WeightSpec], mtp: bool) -> Iterable[WeightSpec]:
    return (spec for spec in table.values() if mtp or not spec.name.startswith("mtp."))
