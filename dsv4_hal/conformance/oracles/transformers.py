"""HF transformers' own DeepSeek-V4 as an oracle of single ops, in mode exact.

`Transformers` puts the arguments of an op into the module of transformers that computes the same, with the arguments as
its weights. What it has no module for, or only inside a larger one, is the naive oracle's, and so is a step without
tokens, which its reshapes refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dsv4_hal.batch import Batch
from dsv4_hal.conformance.oracles.naive import Naive, new_rows
from dsv4_hal.formats import Weight, dequantize
from dsv4_hal.ops import KV

OPS = (
    "block_diagonal_linear",
    "rms_norm",
    "rope",
    "index_topk",
    "sparse_attention",
    "route",
    "swiglu",
    "moe_experts",
    "mlp",
    "hc_pre",
    "hc_head",
)
NEEDED = "pip install 'transformers>=5.23'"


@cache
def missing() -> str:
    """Why transformers cannot be asked; "" if it can."""
    try:
        modeling()
    except Exception as error:  # an installed transformers may break in any way it likes
        return f"transformers' DeepSeek-V4 does not load: {type(error).__name__}: {error}; {NEEDED}"
    return ""


@cache
def version() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


@cache
def modeling() -> ModuleType:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    return modeling_deepseek_v4


class Transformers(Naive):
    """The ops of OPS by transformers, in float32."""

    name = "transformers"

    def block_diagonal_linear(self, x: Tensor, w: Weight, *, out: Tensor | None = None) -> Tensor:
        if not len(x):
            return super().block_diagonal_linear(x, w, out=out)
        groups, outputs, inputs = w.shape
        module = modeling().DeepseekV4GroupedLinear(inputs, groups * outputs, groups)
        matrix = dequantize(w, torch.float32).flatten(0, 1)
        return self._emit(filled(module, weight=matrix)(x), None, out)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        if weight is None:
            y = modeling().DeepseekV4UnweightedRMSNorm(eps)(x)
        else:
            y = filled(modeling().DeepseekV4RMSNorm(x.shape[-1], eps), weight=weight)(x)
        return self._emit(y, x.dtype, out)

    def rope(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], inverse: bool = False, *, out: Tensor | None = None
    ) -> Tensor:
        cos, sin = cos_sin
        heads = x.flatten(1, -2) if x.dim() > 2 else x[:, None]  # [N, heads, D]
        y = modeling().apply_rotary_pos_emb(heads, cos, -sin if inverse else sin)
        return self._emit(y.reshape(x.shape), x.dtype, out)

    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        heads = q.shape[1]
        scorer = modeling().DeepseekV4IndexerScorer(
            SimpleNamespace(index_head_dim=1, index_n_heads=1, hidden_size=heads)
        )
        scorer.weights_proj = nn.Identity()  # the weights come as they are
        picks, scores = torch.full((len(q), k), -1), torch.full((len(q), k), float("-inf"))
        for t, (sequence, p) in enumerate(new_rows(batch, 1)):
            rows = self.kv_load(keys, batch, sequence, 0, (p + 1) // keys.layout.ratio)
            score = scorer(q[None, None, t], rows[None], weights[None, None, t])[0, 0]
            best = score.sort(descending=True, stable=True)
            seen = min(k, len(rows))
            picks[t, :seen], scores[t, :seen] = best.indices[:k], best.values[:k]
        return picks, scores if with_scores else None

    def sparse_attention(
        self, q: Tensor, window_kv: KV, sink: Tensor, scale: float, batch: Batch, *more: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The log-sum is the naive oracle's: transformers keeps none."""
        y, lse = super().sparse_attention(q, window_kv, sink, scale, batch, *more, **options)
        module = SimpleNamespace(num_key_value_groups=q.shape[1], sinks=sink, training=False)
        for t, keys in enumerate(self.visible(window_kv, batch, *more)):
            rows = keys[None, None].to(q.dtype)
            y[t] = modeling().eager_attention_forward(module, q[None, t, :, None], rows, rows, None, scale)[0][0, 0]
        return y, lse

    def route(
        self, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        tokens, experts = logits.shape
        config = SimpleNamespace(
            num_experts_per_tok=k,
            num_local_experts=experts,
            hidden_size=experts,
            scoring_func="sqrtsoftplus",
            routed_scaling_factor=scale,
            vocab_size=tokens,
        )
        eye = torch.eye(experts)  # so that the logits are the hidden states
        if picks is not None:
            router = filled(modeling().DeepseekV4HashRouter(config), weight=eye, tid2eid=picks)
            _, weights, ids = router(logits, torch.arange(tokens))
            return ids, weights
        router = filled(modeling().DeepseekV4TopKRouter(config), weight=eye)
        if bias is not None:
            filled(router, e_score_correction_bias=bias)
        with stable_order():
            _, weights, ids = router(logits)
        return ids, weights

    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        module = SimpleNamespace(limit=unlimited(limit), act_fn=nn.functional.silu)
        y = modeling().DeepseekV4Experts._apply_gate(module, gate_up)
        return self._emit(y if row_weight is None else y * row_weight[:, None], None, out)

    def moe_experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, w13: Weight, w2: Weight, limit: float | None
    ) -> Tensor:
        experts, width, inner = w2.shape
        config = SimpleNamespace(
            num_local_experts=experts,
            hidden_size=width,
            intermediate_size=inner,
            hidden_act="silu",
            swiglu_limit=unlimited(limit),
            _experts_implementation="eager",
        )
        module = modeling().DeepseekV4Experts(config)
        matrices = {"gate_up_proj": dequantize(w13, torch.float32), "down_proj": dequantize(w2, torch.float32)}
        return filled(module, **matrices)(x, ids, weights)

    def mlp(self, x: Tensor, w13: Weight, w2: Weight, limit: float | None) -> Tensor:
        width, inner = w2.shape
        config = SimpleNamespace(
            hidden_size=width,
            intermediate_size=inner,
            mlp_bias=False,
            hidden_act="silu",
            swiglu_limit=unlimited(limit),
        )
        module = modeling().DeepseekV4MLP(config)
        gate, up = dequantize(w13, torch.float32).chunk(2)
        filled(module.gate_proj, weight=gate), filled(module.up_proj, weight=up)
        filled(module.down_proj, weight=dequantize(w2, torch.float32))
        return module(x)

    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not len(streams):
            return super().hc_pre(streams, fn, base, scale, iters, norm_eps, eps)
        config = SimpleNamespace(
            hc_mult=streams.shape[1],
            hidden_size=streams.shape[2],
            hc_sinkhorn_iters=iters,
            hc_eps=eps,
            rms_norm_eps=norm_eps,
        )
        module = filled(modeling().DeepseekV4HyperConnection(config), fn=fn, base=base, scale=scale)
        post, comb, x = module(streams.contiguous()[None])
        return x[0], post[0], comb[0]

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        config = SimpleNamespace(
            hc_mult=streams.shape[1], hidden_size=streams.shape[2], hc_eps=eps, rms_norm_eps=norm_eps
        )
        module = filled(modeling().DeepseekV4HyperHead(config), hc_fn=fn, hc_base=base, hc_scale=scale)
        return module(streams[None])[0]


@contextmanager
def stable_order() -> Iterator[None]:
    """While this lasts, torch.topk gives the best first, and equal ones in order of index, as the contract does:
    transformers leaves both open."""

    def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        values, indices = x.sort(dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    with patch.object(torch, "topk", topk), patch.object(Tensor, "topk", topk):
        yield


def filled(module: Any, **weights: Tensor) -> Any:
    """The module, with these weights and buffers."""
    for name, value in weights.items():
        if name in dict(module.named_parameters(recurse=False)):
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, name, value)
    return module


def unlimited(limit: float | None) -> float:
    return float("inf") if limit is None else limit
