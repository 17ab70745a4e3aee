"""The sizes of the calls that a model makes of each op, from its static facts: what `explain` asks providers about.

Names are those of the rows' limits. Formats of weights are named as they are kept here, after `repack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from dsv4_hal.backend import Facts
from dsv4_hal.backends.ascend.devices import Soc

Sizes = Mapping[str, Any]

# Formats that are exactly another one, which the SoC multiplies: stored -> kept.
KEPT: Mapping[str, str] = MappingProxyType({"e4m3_128x128": "mxfp8", "e4m3_128x128_fp32": "mxfp8"})


# expert_dtype of a model -> the stored formats of its matrices: most of them, and the projections to a latent.
_MATRICES: Mapping[str | None, tuple[str, str]] = MappingProxyType(
    {
        None: ("bf16", "bf16"),
        "fp4": ("e4m3_128x128", "e4m3_128x128"),
        "fp8": ("e4m3_128x128_fp32", "e4m3_128x128_fp32"),
        "int8": ("int8_channel", "bf16"),
        "int4": ("int8_channel", "bf16"),
    }
)
_EXPERTS: Mapping[str | None, str] = MappingProxyType(
    {
        None: "bf16",
        "fp4": "mxfp4",
        "fp8": "e4m3_128x128_fp32",
        "int8": "int8_channel",
        "int4": "int4_channel",
    }
)


def kept_format(name: str, soc: Soc) -> str:
    """How a stored format is kept on a SoC."""
    other = KEPT.get(name, name)
    return other if other in soc.formats else name


def calls(op: str, facts: Facts, soc: Soc) -> list[Sizes]:
    """Sizes of an op's calls; empty without facts, and for an op whose sizes no provider asks about."""
    find = _CALLS.get(op)
    return [] if not facts or find is None else list(find(facts, soc))


def _linear(facts: Facts, soc: Soc) -> Iterator[Sizes]:
    d, q, heads, dim = (facts[k] for k in ("hidden_size", "q_lora_rank", "num_attention_heads", "head_dim"))
    inner, low = facts["moe_intermediate_size"], facts["o_groups"] * facts["o_lora_rank"]
    index = facts["index_n_heads"] * facts["index_head_dim"]
    stored, latent = _MATRICES[facts["expert_dtype"]]
    for outputs, inputs in ((heads * dim, q), (index, q), (d, low), (2 * inner, d), (d, inner)):
        yield {"format": kept_format(stored, soc), "inputs": inputs, "outputs": outputs}
    for outputs, inputs in ((q, d), (dim, d)):
        yield {"format": kept_format(latent, soc), "inputs": inputs, "outputs": outputs}
    for outputs in (facts["n_routed_experts"], facts["vocab_size"]):
        yield {"format": "bf16", "inputs": d, "outputs": outputs}


def _experts(facts: Facts, soc: Soc) -> Iterator[Sizes]:
    d, inner = facts["hidden_size"], facts["moe_intermediate_size"]
    experts = {
        "format": kept_format(_EXPERTS[facts["expert_dtype"]], soc),
        "experts": facts["n_routed_experts"],
    }
    yield experts | {"inputs": d, "outputs": 2 * inner}
    yield experts | {"inputs": inner, "outputs": d}


def _groups(facts: Facts, soc: Soc) -> Iterator[Sizes]:
    groups = facts["o_groups"]
    inputs = facts["num_attention_heads"] * facts["head_dim"] // groups
    yield {"groups": groups, "inputs": inputs, "flat_inputs": groups * inputs, "outputs": facts["o_lora_rank"]}


def _streams(facts: Facts, soc: Soc) -> Iterator[Sizes]:
    yield {"streams": facts["hc_mult"], "width": facts["hidden_size"]}


def _rotary(facts: Facts, soc: Soc) -> Iterator[Sizes]:
    for heads in (facts["num_attention_heads"], facts["index_n_heads"], 1):
        yield {"heads": heads, "rotary": facts["qk_rope_head_dim"]}


def _attention(facts: Facts, soc: Soc) -> Iterator[Sizes]:
    sizes = {"dim": facts["head_dim"], "window": facts["sliding_window"], "lse": False}
    for ratio in sorted(set(facts["compress_ratios"])):
        yield sizes | {"ratio": max(1, ratio)}
    yield sizes | {"picks": facts["index_topk"]}


_CALLS: Mapping[str, Callable[[Facts, Soc], Iterator[Sizes]]] = MappingProxyType(
    {
        "linear": _linear,
        "grouped_linear": _experts,
        "block_diagonal_linear": _groups,
        "rope": _rotary,
        "sparse_attention": _attention,
        "hc_pre": _streams,
        "hc_post": _streams,
        "permute": lambda facts, soc: iter([{"experts": facts["n_routed_experts"]}]),
    }
)
