"""V4-Flash and V4-Pro at full size on the null backend: parameters, bytes and calls, exactly, in seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import dsv4_hal
from dsv4_hal.model.config import ModelConfig, preset
from dsv4_hal.model.transformer import Model
from dsv4_hal.model.weights import parameter_count, weight_table
from dsv4_hal.ops import OPS

SEQUENCES, CONTEXT, PROMPT = 2, 1 << 16, 2048


def calls_of_a_step(cfg: ModelConfig, entries: bool) -> dict[str, int]:
    """How often each op is called in a step that completes compressed entries, or none."""
    layers, csa, hca = cfg.num_hidden_layers, cfg.layer_ratios.count(4), cfg.layer_ratios.count(128)
    compressors = 2 * csa + hca  # a CSA layer compresses its keys and those of its indexer
    stored = compressors if entries else 0
    per_layer = "kv_norm_rope_store q_norm_rope output_proj block_diagonal_linear sparse_attention"
    per_layer += " route permute unpermute moe_experts mlp"
    out = dict.fromkeys(per_layer.split(), layers)
    out |= dict.fromkeys(("hc_pre", "hc_pre_norm", "hc_post", "grouped_linear", "swiglu"), 2 * layers)
    out |= dict.fromkeys(("embedding", "plan", "hc_head"), 1)
    out |= dict.fromkeys(("compress", "compressor", "compress_store"), compressors)
    out["index_topk"] = csa
    # a layer: wq_a, wq_b, wkv, wo_b, gate, two of the shared expert; a compressor and an indexer: two each; the head
    out["linear"] = 7 * layers + 2 * compressors + 2 * csa + 1
    # a layer: in front of both sub-layers, query latent, each query head, KV row; and in front of the output matrix
    out["rms_norm"] = 5 * layers + stored + 1
    out["rope"] = 3 * layers + csa + stored  # query, key, output; the indexer's query
    out["kv_store"] = layers + stored
    out["hadamard"] = csa + (csa if entries else 0)  # the indexer's queries, and its keys
    return out


def cache_bytes(cfg: ModelConfig) -> dict[str, int]:
    """What two sequences take: bf16 rows, fp32 state."""
    layers, csa, hca = cfg.num_hidden_layers, cfg.layer_ratios.count(4), cfg.layer_ratios.count(128)
    ring = -(-(cfg.sliding_window - 1 + PROMPT) // 64) * 64
    dim, index = cfg.head_dim, cfg.index_head_dim
    out = {
        "window": layers * ring * dim * 2,
        "entries": (csa * CONTEXT // 4 + hca * CONTEXT // 128) * dim * 2,
        "keys": csa * CONTEXT // 4 * index * 2,
        # key and gate of the last 8 tokens, twice as wide, or of the last 128
        "state": csa * 8 * 2 * 2 * dim * 4 + hca * 128 * 2 * dim * 4,
        "index_state": csa * 8 * 2 * 2 * index * 4,
    }
    return {kind: SEQUENCES * size for kind, size in out.items()}


@pytest.mark.parametrize(
    ("name", "parameters", "stored", "cached"),
    [
        ("v4-flash", 290_942_289_362, 159_609_485_896, 1_117_814_784),
        ("v4-pro", 1_598_837_347_742, 864_704_792_696, 1_600_061_440),
    ],
)
def test_prefill_and_decode(name: str, parameters: int, stored: int, cached: int) -> None:
    model = dsv4_hal.load_model(name, backend="null", strict=True)
    cfg = model.cfg
    assert cfg == preset(name)
    assert parameter_count(weight_table(cfg)) == parameters
    assert sum(w.nbytes for w in model.weights.values()) == stored
    cache = model.new_cache(SEQUENCES, CONTEXT, max_chunk=PROMPT)
    assert cache.breakdown() == cache_bytes(cfg)
    assert cache.nbytes == cached
    calls = model.ops.count_calls()
    prefill = model(torch.zeros(SEQUENCES, PROMPT, dtype=torch.int64), cache, logits_to_keep=1)
    assert calls == calls_of_a_step(cfg, entries=True)
    calls.clear()
    decode = model(torch.zeros(SEQUENCES, 1, dtype=torch.int64), cache)
    assert calls == calls_of_a_step(cfg, entries=False)
    for logits in (prefill, decode):
        assert logits.shape == (SEQUENCES, 1, cfg.vocab_size)
        assert (logits.dtype, logits.device.type) == (torch.float32, "meta")
    assert cache.lengths == (PROMPT + 1,) * SEQUENCES


def test_calls_are_counted_where_there_is_arithmetic_too(small_model: Callable[..., Model]) -> None:
    model = small_model()
    calls = model.ops.count_calls()
    model(torch.zeros(1, 128, dtype=torch.int64))
    want = calls_of_a_step(model.cfg, entries=True)
    del want["hadamard"]  # mode exact does not rotate
    assert calls == want
    assert set(calls) <= set(OPS)


def test_a_preset_has_no_weights_to_compute_with() -> None:
    with pytest.raises(
        ValueError, match="v4-flash is a preset: it has shapes but no weights, and reference needs some"
    ):
        dsv4_hal.load_model("v4-flash", backend="reference")
