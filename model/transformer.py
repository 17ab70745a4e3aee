"""The whole model: embedding, layers between residual streams, head; and the interface that callers use."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.formats import Weight
from dsv4_hal.model.block import Block
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.checkpoint import save_checkpoint, unstack
from dsv4_hal.model.config import ModelConfig, overlaps
from dsv4_hal.model.hyper_connection import Head
from dsv4_hal.model.mtp import Mtp
from dsv4_hal.model.rope import inverse_frequencies
from dsv4_hal.model.scope import Scope
from dsv4_hal.model.step import Step, Trace
from dsv4_hal.model.weights import weight_table
from dsv4_hal.ops import Ops


class Model:
    """DeepSeek-V4 on resolved ops.

    weights       the table of `dsv4_hal.model.weights`, filled
    shared_clamp  whether `swiglu_limit` also holds for the shared expert
    metadata      text that the checkpoint's files carried; `save` writes it again
    """

    def __init__(
        self,
        cfg: ModelConfig,
        ops: Ops,
        weights: Mapping[str, Weight | Tensor],
        shared_clamp: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.cfg, self.ops, self.weights, self.metadata = cfg, ops, weights, dict(metadata or {})
        scope, ratios = Scope(weights), cfg.layer_ratios
        self.embed = scope.matrix("embed")
        self.layers = [
            Block(cfg, ops, scope.below(f"layers.{i}"), i, ratio, shared_clamp) for i, ratio in enumerate(ratios)
        ]
        self.head = Head(cfg, ops, scope, scope)
        has_mtp = "mtp.0.e_proj" in scope
        self.mtp = Mtp(cfg, ops, scope.below("mtp.0"), scope, shared_clamp) if has_mtp else None
        self.ropes = {name: f.to(ops.device) for name, f in inverse_frequencies(cfg).items()}
        self.ratios = {ratio: overlaps(ratio) for ratio in sorted(set(ratios)) if ratio}

    def new_cache(self, batch_size: int, max_seq_len: int, max_chunk: int | None = None, rollback: int = 0) -> Cache:
        """An empty cache.

        batch_size   sequences
        max_seq_len  tokens that each may hold
        max_chunk    tokens of one sequence in one step (default max_seq_len); the window ring is sized for it
        rollback     tokens that `Cache.truncate` may take back
        """
        chunk = max_seq_len if max_chunk is None else max_chunk
        return Cache(self.cfg, self.ops, batch_size, max_seq_len, chunk, rollback)

    def __call__(self, tokens: Tensor, cache: Cache | None = None, logits_to_keep: int | None = None) -> Tensor:
        """Logits of tokens [B, S] int64 -> [B, S, V] float32 (float64 in a float64 profile).

        cache           None: one shot. Otherwise sequence b of the cache continues with tokens[b], for all of them.
        logits_to_keep  only the last so many positions
        """
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise ValueError(f"tokens must be a tensor [B, S], got {getattr(tokens, 'shape', type(tokens).__name__)}")
        count, length = tokens.shape
        if cache is not None and count != cache.batch_size:
            raise ValueError(
                f"{count} rows of tokens for a cache of {cache.batch_size} sequences; see step() for fewer"
            )
        if logits_to_keep is not None and not 1 <= logits_to_keep <= max(length, 1):
            raise ValueError(f"logits_to_keep {logits_to_keep} of {length} positions")
        batch = Batch.packed([length] * count, self.ops.device) if cache is None else cache.batch([length] * count)
        kept = min(length, logits_to_keep or length)
        rows = None
        if kept < length:
            rows = torch.arange(count * length).view(count, length)[:, length - kept :].flatten()
        logits = self.step(tokens.flatten(), batch, cache, rows=rows)
        return logits.unflatten(0, (count, kept))

    def step(
        self,
        tokens: Tensor,
        batch: Batch,
        cache: Cache | None = None,
        *,
        rows: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Logits of the flat tokens [T] of a ragged step -> [T, V], or [len(rows), V] for the flat rows named.

        batch  `Batch.packed(...)` without a cache, `cache.batch(...)` with one, whose sequences then hold the tokens
        cache  a step with a cache is not differentiable: train on packed batches
        trace  records what layers saw, or replays choices of experts and entries
        """
        if rows is not None and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < batch.tokens:
            raise ValueError(f"rows {int(rows.min())}..{int(rows.max())} of a step of {batch.tokens} tokens")
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):  # pools hold bytes, not a graph
            step = self.begin(tokens, batch, cache, trace)
            streams = self.streams(step)
            logits = self.head(streams if rows is None else streams[rows.to(streams.device)])
        if cache is not None:
            cache.commit(batch)
        return logits

    def mtp_logits(self, tokens: Tensor, next_tokens: Tensor, *, trace: Trace | None = None) -> Tensor:
        """Logits of the token after the next, in one shot: tokens, next_tokens [B, S] int64 -> [B, S, V].

        next_tokens[b, s] is the token that follows tokens[b, s]. ValueError if the checkpoint has no MTP block.
        """
        if self.mtp is None:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers is 0)")
        if tokens.dim() != 2 or next_tokens.shape != tokens.shape:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and next_tokens {tuple(next_tokens.shape)} must be alike [B, S]"
            )
        count, length = tokens.shape
        step = self.begin(tokens.flatten(), Batch.packed([length] * count, self.ops.device), None, trace)
        following = self._tokens(next_tokens.flatten()).to(self.ops.device)
        streams = self.streams(step)
        mtp_step = Step(following, step.batch, trace=step.trace)
        return self.mtp(streams, self.ops.embedding(following, self.embed), mtp_step).unflatten(0, (count, length))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and the weights in the official format, byte for byte as they were stored.

        ValueError if the backend has rearranged a weight, or if `directory` exists and is not empty.
        """
        moved = [w.name for w in self.weights.values() if isinstance(w, Weight) and w.layout != "checkpoint"]
        if moved:
            raise ValueError(
                f"{len(moved)} weights are no longer in the checkpoint's arrangement, the first {moved[0]}"
            )
        table = {name: spec for name, spec in weight_table(self.cfg).items() if name in self.weights}
        save_checkpoint(directory, self.cfg, unstack(self.weights, table), metadata=self.metadata)

    def streams(self, step: Step) -> Tensor:
        """Residual streams [T, n, d] after the last layer."""
        x = self.ops.embedding(step.tokens, self.embed)
        streams = x[:, None].repeat(1, self.cfg.hc_mult, 1)
        for i, layer in enumerate(self.layers):
            streams = layer(step.trace.see(f"layers.{i}.in", streams), step)
        return step.trace.see("head.in", streams)

    def plan(self, batch: Batch) -> Batch:
        """Make the batch's plan for this model; `step` does so by itself."""
        self.ops.plan(batch, self.ratios, self.ropes).require_plan().owner = self
        return batch

    def begin(self, tokens: Tensor, batch: Batch, cache: Cache | None = None, trace: Trace | None = None) -> Step:
        """A step that is about to run; ValueError or TypeError where tokens, batch, cache and model do not fit."""
        if tokens.shape != (batch.tokens,):
            raise ValueError(f"tokens {tuple(tokens.shape)} for a batch of {batch.tokens}")
        if batch.cached != (cache is not None):
            raise ValueError("a batch made by a cache needs that cache, and Batch.packed none")
        if cache is not None and (cache.cfg != self.cfg or cache.ops is not self.ops):
            raise ValueError("this cache was made by another model's new_cache()")
        if batch.plan is not None and batch.plan.owner is not self:
            raise ValueError("this batch was planned by another model")
        longest = int(batch.lengths.max(initial=0))
        if longest > self.cfg.max_position_embeddings:
            raise ValueError(f"{longest} tokens exceed the model's {self.cfg.max_position_embeddings} positions")
        tokens = self._tokens(tokens).to(batch.device)
        if batch.plan is None:
            self.plan(batch)
        if cache is not None:
            cache.begin(batch)
        return Step(tokens, batch, cache, trace or Trace())

    def _tokens(self, tokens: Tensor) -> Tensor:
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64, got {tokens.dtype}")
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.cfg.vocab_size:
                raise ValueError(f"token ids {int(low)}..{int(high)} outside the vocabulary of {self.cfg.vocab_size}")
        return tokens
