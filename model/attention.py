"""Hybrid attention: a window always; compressed entries, all of them (HCA) or picked by an indexer (CSA)."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal.model.cache import layouts
from dsv4_hal.model.config import ModelConfig, overlaps
from dsv4_hal.model.rope import rope_name
from dsv4_hal.model.scope import Scope
from dsv4_hal.model.step import Step
from dsv4_hal.ops import CompressorWeights, Ops


def compressor_weights(weights: Scope) -> CompressorWeights:
    return CompressorWeights(
        weights.matrix("wkv"), weights.matrix("wgate"), weights.vector("ape"), weights.vector("norm")
    )


class Attention:
    """The attention of one layer: normed input [T, d] -> [T, d]."""

    def __init__(self, cfg: ModelConfig, ops: Ops, weights: Scope, index: int, ratio: int) -> None:
        self.cfg, self.ops, self.weights, self.index, self.ratio = cfg, ops, weights, index, ratio
        self.name, self.rope = weights.prefix.rstrip("."), rope_name(ratio)
        self.layouts = layouts(cfg, ops, ratio)
        self.wq_a, self.wq_b, self.wkv = (weights.matrix(n) for n in ("wq_a", "wq_b", "wkv"))
        self.q_norm, self.kv_norm, self.sink = (weights.vector(n) for n in ("q_norm", "kv_norm", "attn_sink"))
        self.wo_a, self.wo_b = weights.matrix("wo_a").split_rows(cfg.o_groups), weights.matrix("wo_b")
        self.compressor = compressor_weights(weights.below("compressor")) if ratio else None
        self.indexer = Indexer(cfg, ops, weights.below("indexer"), index, ratio) if overlaps(ratio) else None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        ops, cfg, batch, cache = self.ops, self.cfg, step.batch, step.layer(self.index)
        eps, cos_sin = cfg.rms_norm_eps, batch.require_plan().rope[self.rope, 1]
        step.trace.see(f"{self.name}.in", x)
        low = ops.rms_norm(ops.linear(x, self.wq_a), self.q_norm, eps)
        q = ops.linear(low, self.wq_b).view(len(x), cfg.num_attention_heads, cfg.head_dim)
        q = ops.q_norm_rope(q, eps, cos_sin)
        window = ops.kv_norm_rope_store(
            ops.linear(x, self.wkv), self.kv_norm, eps, cos_sin, self.layouts["window"], batch, cache.window
        )
        entries = picks = None
        if self.compressor is not None:
            entries = ops.compress_store(
                x,
                self.compressor,
                self.layouts["entries"],
                batch,
                overlaps(self.ratio),
                cache.state,
                batch.require_plan().rope[self.rope, self.ratio],
                eps,
                cache.entries,
                rotate=False,
            )
        if self.indexer is not None:
            picks = self.indexer(x, low, step)
        y, _ = ops.sparse_attention(q, window, self.sink, cfg.head_dim**-0.5, batch, entries, picks)
        return step.trace.see(f"{self.name}.out", ops.output_proj(y, cos_sin, self.wo_a, self.wo_b))


class Indexer:
    """Picks the compressed entries that each token attends to."""

    def __init__(self, cfg: ModelConfig, ops: Ops, weights: Scope, index: int, ratio: int) -> None:
        self.cfg, self.ops, self.index, self.ratio = cfg, ops, index, ratio
        self.name, self.rope = weights.prefix.removesuffix("indexer."), rope_name(ratio)
        self.layout = layouts(cfg, ops, ratio)["index"]
        self.wq_b, self.weights_proj = weights.matrix("wq_b"), weights.matrix("weights_proj")
        self.compressor = compressor_weights(weights.below("compressor"))

    def __call__(self, x: Tensor, low: Tensor, step: Step) -> Tensor:
        """x: layer input [T, d]; low: the normed low-rank query [T, q_lora_rank], shared with attention."""
        ops, cfg, batch, cache = self.ops, self.cfg, step.batch, step.layer(self.index)
        heads, dim, rotate, ropes = (
            cfg.index_n_heads,
            cfg.index_head_dim,
            ops.numerics.hadamard,
            batch.require_plan().rope,
        )
        keys = ops.compress_store(
            x,
            self.compressor,
            self.layout,
            batch,
            overlaps(self.ratio),
            cache.index_state,
            ropes[self.rope, self.ratio],
            cfg.rms_norm_eps,
            cache.keys,
            rotate=rotate,
        )
        replayed = step.trace.replay.get(f"{self.name}index_picks")
        if replayed is not None and not step.trace.record:
            return replayed
        q = ops.rope(ops.linear(low, self.wq_b).view(len(x), heads, dim), ropes[self.rope, 1])
        weights = ops.linear(x, self.weights_proj) * (dim**-0.5 * heads**-0.5)
        q = ops.hadamard(q) if rotate else q
        picks, scores = ops.index_topk(q, weights, keys, batch, cfg.index_topk, with_scores=step.trace.record)
        if scores is not None:
            step.trace.see(f"{self.name}index_scores", scores)
        step.trace.see(f"{self.name}index_picks", picks)
        return picks if replayed is None else replayed
