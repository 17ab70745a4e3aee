"""Gradients of every parameter against finite differences, in float64 on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_hal import Batch
from dsv4_hal.formats import Weight
from dsv4_hal.model.step import Step, Trace
from dsv4_hal.model.transformer import Model

TINY = {
    "vocab_size": 16,
    "hidden_size": 8,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "o_lora_rank": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 40,
    "sliding_window": 5,
    "n_routed_experts": 3,
    "swiglu_limit": 3.0,
    "hc_sinkhorn_iters": 3,
}


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Model]) -> Model:
    return small_model(torch.float64, seed=1, **TINY)


def loss(model: Model, values: dict[str, Tensor]) -> Tensor:
    """Logits and MTP logits of two packed sequences, and the indexer's scores, weighed by fixed random numbers.

    index_topk exceeds what is visible and experts are replayed, so that no choice can jump between two evaluations.
    """
    weights = {
        name: replace(old, data=values[name]) if isinstance(old, Weight) else values.get(name, old)
        for name, old in model.weights.items()
    }
    tuned = Model(model.cfg, model.ops, weights)
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(16, (140,), generator=g)
    trace = Trace(record=True, replay=REPLAY)
    step = Step(tokens, tuned.plan(Batch.packed([131, 9])), trace=trace)
    streams = tuned.streams(step)
    logits = tuned.head(streams)
    mtp = tuned.mtp(streams, tuned.ops.embedding(tokens.roll(-1), tuned.embed), Step(tokens, step.batch, trace=trace))
    scores = [t.masked_fill(t == float("-inf"), 0) for n, t in trace.seen.items() if n.endswith("index_scores")]
    REPLAY.update({n: t for n, t in trace.seen.items() if n.endswith("experts") and n not in REPLAY})
    return sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in (logits, mtp, *scores))


REPLAY: dict[str, Tensor] = {}


def test_every_parameter(model: Model) -> None:
    """Central differences along a random direction of each parameter, and of its largest gradient component.

    The step of 1e-6 leaves an error of about eps / step = 1e-10 relative to the loss's terms, and step^2 truncation.
    """
    REPLAY.clear()
    values = {
        name: (w.data if isinstance(w, Weight) else w).clone().requires_grad_()
        for name, w in model.weights.items()
        if (w.data if isinstance(w, Weight) else w).is_floating_point()
    }
    total = loss(model, values)
    total.backward()
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, value in values.items():
            if name.endswith("gate.bias"):  # chooses experts, and never reaches the weights
                assert value.grad is None, name
                continue
            assert value.grad is not None, f"{name} has no gradient"
            assert value.grad.abs().max() > 0, f"{name} has no influence"
            direction = torch.randn(value.shape, generator=g, dtype=value.dtype)
            peak = torch.zeros_like(value).view(-1)
            peak[value.grad.abs().argmax()] = 1
            for along in (direction, peak.view(value.shape)):
                h = 1e-6
                high, low = (loss(model, values | {name: value + s * along}) for s in (h, -h))
                numeric, analytic = (high - low) / (2 * h), (value.grad * along).sum()
                scale = max(1.0, abs(float(analytic)))
                assert abs(numeric - analytic) < 1e-5 * scale, (name, float(numeric), float(analytic))
