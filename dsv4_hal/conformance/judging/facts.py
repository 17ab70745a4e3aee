"""What the arguments of a call tell of a model, and ops that ask a backend with it, call by call.

A model asks `Backend.supports` once, with all fields of its config.json. A case has no model, but its arguments have
widths, heads, ratios and formats, which go by the same names; a backend that refuses an op for them is not run on it,
in a case as in a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any

from dsv4_hal.backend import Backend
from dsv4_hal.dispatch import Resolution, Resolved, implementation, resolve
from dsv4_hal.ops import OPS
from dsv4_hal.registry import FALLBACK

Arguments = Mapping[str, Any]
Found = Mapping[str, Any]

# `expert_dtype` of config.json for the formats that experts are stored in; None: they are plain.
EXPERTS = {
    "mxfp4": "fp4",
    "e4m3_128x128": "fp8",
    "e4m3_128x128_fp32": "fp8",
    "int8_channel": "int8",
    "int4_channel": "int4",
}


class Asking(Resolved):
    """Ops that are resolved at every call, with what its arguments tell.

    asked  op -> how its last call ran, since somebody cleared it
    """

    asked: dict[str, Resolution]

    def ran(self, op: str) -> tuple[str, str]:
        """How an op ran when it was called last (as without facts where it was not), and why the first backend's code
        for it did not, "" where it did. A composite's parts ran as the reference's where none was the backend's."""
        how = self.asked.get(op) or next(r for r in self.resolutions if r.op == op)
        refused = self._refused(how)
        parts = [self._refused(r) for r in self.asked.values() if r.kind != "composite"]
        if how.kind == "composite" and parts and all(parts):
            return FALLBACK, refused or parts[0]
        return how.runs_as, refused

    def _refused(self, how: Resolution) -> str:
        return next((why for name, why in how.rejected if name == self.primary.name), "")


def asking(backends: Sequence[Backend]) -> Asking:
    """Ops of the first of these backends that serves a call. BackendError where none serves some op of any size."""
    ops = Asking(backends[0])
    ops.resolutions, ops.asked = resolve(backends).resolutions, {}
    for op, spec in OPS.items():
        setattr(ops, op, _asking(ops, op, inspect.signature(spec.definition), backends))
    return ops


def _asking(ops: Asking, op: str, signature: inspect.Signature, backends: Sequence[Backend]) -> Callable[..., Any]:
    known: dict[tuple[tuple[str, Any], ...], tuple[Callable[..., Any], Resolution]] = {}

    @wraps(OPS[op].definition)
    def call(*args: Any, **kwargs: Any) -> Any:
        facts = _told(op, signature, args, kwargs)
        key = tuple(sorted(facts.items()))
        if key not in known:
            known[key] = implementation(ops, op, backends, facts)
            if facts.lacked:  # the backend needs more than a call can tell, and is asked without a model
                known[key] = implementation(ops, op, backends, {})
        run, ops.asked[op] = known[key]
        return run(*args, **kwargs)

    return call


class _Facts(dict[str, Any]):
    """lacked: whether one was asked for that is not there."""

    lacked = False

    def __missing__(self, name: str) -> Any:
        self.lacked = True
        raise KeyError(name)


def _told(op: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Facts:
    """Nothing of arguments that the op's preconditions would refuse: these say it better."""
    try:
        return _Facts(FACTS[op](signature.bind(None, *args, **kwargs).arguments))
    except (TypeError, AttributeError, IndexError, KeyError, ValueError):
        return _Facts()


# --- what the arguments of each op tell, by the names of config.json --------------------------------------------------


def _heads(x: Any, heads: str, dim: str) -> Found:
    """Of x [T, H, D], or rows [T, D] that all heads share."""
    return {dim: x.shape[-1]} | ({heads: x.shape[1]} if x.dim() == 3 else {})


def _rms_norm(a: Arguments) -> Found:
    if a["weight"] is None:
        return _heads(a["x"], "num_attention_heads", "head_dim")
    return {"hidden_size": a["x"].shape[-1]}


def _rope(a: Arguments) -> Found:
    x = a["x"] if "x" in a else a["q"]
    return {**_heads(x, "num_attention_heads", "head_dim"), "qk_rope_head_dim": 2 * a["cos_sin"][0].shape[1]}


def _sparse_attention(a: Arguments) -> Found:
    entries, picks = a.get("entries"), a.get("picks")
    return {
        **_heads(a["q"], "num_attention_heads", "head_dim"),
        "sliding_window": a["window_kv"].layout.window,
        "compress_ratios": (0 if entries is None else entries.layout.ratio,),
        **({} if picks is None else {"index_topk": picks.shape[1]}),
    }


def _index_topk(a: Arguments) -> Found:
    ratios = (a["keys"].layout.ratio,)
    return {**_heads(a["q"], "index_n_heads", "index_head_dim"), "index_topk": a["k"], "compress_ratios": ratios}


def _output_proj(a: Arguments) -> Found:
    low = {"o_groups": a["wo_a"].data.shape[0], "o_lora_rank": a["wo_a"].shape[1]}
    return {**_rope(a), **low, "hidden_size": a["wo_b"].shape[0]}


def _rows(a: Arguments) -> Found:
    """Of cache rows: a window's have a ratio of 1."""
    layout = a["layout"] if "layout" in a else a["kv"].layout
    of = {"sliding_window": layout.window} if layout.ratio == 1 else {"compress_ratios": (layout.ratio,)}
    return {"head_dim": layout.dim, **of}


def _compressor(a: Arguments) -> Found:
    ratio = a["layout"].ratio if "layout" in a else a["ratio"]
    return {"compress_ratios": (ratio,), "head_dim": len(a["weights"].norm), "hidden_size": a["x"].shape[-1]}


def _pooled(width: int, a: Arguments) -> Found:
    return {"compress_ratios": (a["ratio"],), "head_dim": width // (2 if a["overlap"] else 1)}


def _experts(w: Any) -> Found:
    known = w.format.plain or w.format.name in EXPERTS
    dtype = {"expert_dtype": EXPERTS.get(w.format.name)} if known else {}
    return {"n_routed_experts": w.data.shape[0], "hidden_size": w.shape[-1], **dtype}


def _streams(a: Arguments) -> Found:
    """hc_pre and what is like it."""
    sizes = {"hc_mult": a["streams"].shape[1], "hidden_size": a["streams"].shape[2]}
    return sizes | ({"hc_sinkhorn_iters": a["iters"]} if "iters" in a else {})


FACTS: Mapping[str, Callable[[Arguments], Found]] = MappingProxyType(
    {
        "quantize": lambda a: {},
        "dequantize": lambda a: {},
        "linear": lambda a: {"hidden_size": a["w"].shape[-1]},
        "grouped_linear": lambda a: _experts(a["w"]),
        "block_diagonal_linear": lambda a: {"o_groups": a["w"].data.shape[0], "o_lora_rank": a["w"].shape[1]},
        "embedding": lambda a: {"vocab_size": a["w"].shape[0], "hidden_size": a["w"].shape[-1]},
        "rms_norm": _rms_norm,
        "rope": _rope,
        "hadamard": lambda a: _heads(a["x"], "index_n_heads", "index_head_dim"),
        "q_norm_rope": _rope,
        "plan": lambda a: {"compress_ratios": tuple(a["ratios"])},
        "kv_store": _rows,
        "kv_load": _rows,
        "kv_norm_rope_store": lambda a: {**_rows(a), "qk_rope_head_dim": 2 * a["cos_sin"][0].shape[1]},
        "state_new": lambda a: _pooled(a["width"], a),
        "state_copy": lambda a: {},
        "state_reset": lambda a: {},
        "compress": lambda a: _pooled(a["ape"].shape[1], a),
        "compressor": _compressor,
        "compress_store": _compressor,
        "index_topk": _index_topk,
        "sparse_attention": _sparse_attention,
        "output_proj": _output_proj,
        "route": lambda a: {"n_routed_experts": a["logits"].shape[1], "num_experts_per_tok": a["k"]},
        "permute": lambda a: {
            "n_routed_experts": a["experts"],
            "num_experts_per_tok": a["ids"].shape[1],
            "hidden_size": a["x"].shape[-1],
        },
        "unpermute": lambda a: {"num_experts_per_tok": a["shape"][1], "hidden_size": a["rows"].shape[-1]},
        "swiglu": lambda a: {"moe_intermediate_size": a["gate_up"].shape[1] // 2, "swiglu_limit": a["limit"]},
        "moe_experts": lambda a: {
            **_experts(a["w13"]),
            "moe_intermediate_size": a["w2"].shape[-1],
            "num_experts_per_tok": a["ids"].shape[1],
            "swiglu_limit": a["limit"],
        },
        "mlp": lambda a: {
            "hidden_size": a["w13"].shape[-1],
            "moe_intermediate_size": a["w2"].shape[-1],
            "swiglu_limit": a["limit"],
        },
        "hc_pre": _streams,
        "hc_post": _streams,
        "hc_head": _streams,
        "hc_pre_norm": _streams,
        "sample": lambda a: {"vocab_size": a["logits"].shape[1]},
    }
)
