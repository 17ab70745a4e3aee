"""HF transformers' own DeepSeek-V4, live, on the same tensors in float32."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.23.0", reason="the oracle is transformers 5.23")

from peer_transformers import hf_model  # noqa: E402

import dsv4_hal  # noqa: E402
from dsv4_hal import Batch  # noqa: E402
from dsv4_hal.conformance.oracles.transformers import stable_order  # noqa: E402
from dsv4_hal.model.config import ModelConfig  # noqa: E402
from dsv4_hal.model.transformer import Model  # noqa: E402
from dsv4_hal.ops import KV  # noqa: E402


@pytest.fixture(autouse=True)
def stable() -> Iterator[None]:
    with stable_order():
        yield


def undecided(model: Model, tokens: Tensor) -> Tensor:
    """Tokens [B, S] from the first one on whose k-th choice of entry or expert leads the next by less than 2e-6.

    There two right implementations may choose differently, and everything after in the sequence with them. Exactly
    equal scores are no such place: their order is fixed.
    """
    gaps: list[Tensor] = []
    ops = model.ops

    def index_topk(q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, **_: bool) -> tuple[Tensor, None]:
        picks, scores = choose(q, weights, keys, batch, k + 1, with_scores=True)
        gaps.append(scores[:, k - 1] - scores[:, k])
        return picks[:, :k], None

    def route(logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None):
        if picks is None and k < logits.shape[1]:
            score = torch.nn.functional.softplus(logits).sqrt() + bias
            best = score.sort(descending=True).values
            gaps.append(best[:, k - 1] - best[:, k])
        return send(logits, k, scale, bias, picks)

    choose, send = ops.index_topk, ops.route
    with patch.object(ops, "index_topk", index_topk), patch.object(ops, "route", route):
        model(tokens)
    close = [(gap > 0) & (gap < 2e-6) for gap in gaps]
    return torch.stack(close).any(0).view(tokens.shape).cummax(-1).values


def agree(model: Model, lengths: list[int], seed: int = 0) -> None:
    oracle = hf_model(model)
    g = torch.Generator().manual_seed(seed)
    compared = total = 0
    for length in lengths:
        tokens = torch.randint(model.cfg.vocab_size, (2, length), generator=g)
        with torch.inference_mode():
            got, want = model(tokens), oracle(input_ids=tokens, use_cache=False).logits
            sure = ~undecided(model, tokens)
        assert want.abs().max() > 0.1
        compared, total = compared + int(sure.sum()), total + sure.numel()
        torch.testing.assert_close(got[sure], want[sure], atol=1e-4, rtol=0, msg=lambda m, n=length: f"length {n}: {m}")
    assert compared > 0.75 * total, f"only {compared} of {total} tokens are free of near ties"


def test_golden_checkpoint(tiny_dir: Path) -> None:
    agree(dsv4_hal.load_model(tiny_dir, mode="exact"), [3, 120, 129, 270])


def random_changes(seed: int) -> dict[str, object]:
    """A small configuration with all three layer types, hash and learned routing, and few picks."""
    r = random.Random(seed)
    layers = r.choice([4, 5])
    middle = [4, 128, *r.choices([0, 4, 128], k=layers - 3)]
    r.shuffle(middle)
    groups = r.choice([1, 2, 4])
    experts = r.choice([4, 6, 9])
    return {
        "num_hidden_layers": layers,
        "compress_ratios": [0, *middle, 0],
        "num_attention_heads": groups * r.choice([1, 2]),
        "o_groups": groups,
        "hidden_size": 8 * r.randint(3, 8),
        "head_dim": r.choice([32, 64]),
        "index_n_heads": r.choice([2, 3, 8]),
        "index_head_dim": r.choice([16, 32, 64]),
        "index_topk": r.choice([1, 5, 16]),
        "sliding_window": r.choice([4, 9, 32]),
        "n_routed_experts": experts,
        "num_experts_per_tok": r.choice([1, 2, 3]),
        "num_hash_layers": r.choice([1, 2]),
        "routed_scaling_factor": r.choice([1.0, 1.5, 2.5]),
        "swiglu_limit": r.choice([0.5, 2.0, 10.0]),
        "hc_mult": r.choice([2, 4]),
        "hc_sinkhorn_iters": r.choice([2, 20]),
        "num_nextn_predict_layers": 0,
    }


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(s, marks=pytest.mark.full) for s in range(12, 60))])
def test_random_configurations(small_model: Callable[..., Model], seed: int) -> None:
    model = small_model(seed=seed, **random_changes(seed))
    cfg: ModelConfig = model.cfg
    assert {0, 4, 128} <= set(cfg.layer_ratios)
    assert 0 < cfg.num_hash_layers < cfg.num_hidden_layers
    lengths = [1, 3, 4, 5, 127, 128, 129, 255, 256, 257]
    assert max(lengths) // 4 > cfg.index_topk
    agree(model, lengths, seed)
