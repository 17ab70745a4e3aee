"""V4-Flash and V4-Pro at full size on the null backend: shapes, bytes and ops, without arithmetic or memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.null import Null
from dsv4_hal.dispatch import resolve
from dsv4_hal.formats import FORMATS, Weight
from dsv4_hal.model.config import ModelConfig, preset
from dsv4_hal.model.transformer import Model
from dsv4_hal.model.weights import weight_table
from dsv4_hal.numerics import deployed
from dsv4_hal.ops import OPS


def shapes_only(cfg: ModelConfig) -> dict[str, Weight | Tensor]:
    out: dict[str, Weight | Tensor] = {}
    for name, spec in weight_table(cfg).items():
        if spec.format == "int64":
            out[name] = torch.empty(spec.shape, dtype=torch.int64, device="meta")
            continue
        fmt = FORMATS[spec.format]
        data = torch.empty(fmt.data_shape(spec.shape), dtype=fmt.storage, device="meta")
        scales = fmt.scale_shape(spec.shape)
        scale = None if scales is None else torch.empty(scales, dtype=fmt.scale_dtype, device="meta")
        out[name] = Weight(data, scale, fmt, name) if spec.is_matrix else data
    return out


@pytest.mark.parametrize(("name", "stored"), [("v4-flash", 159_609_485_896), ("v4-pro", 864_704_792_696)])
def test_prefill_and_decode(name: str, stored: int) -> None:
    cfg = preset(name)
    ops = resolve([Null(deployed())], vars(cfg))
    calls: Counter[str] = Counter()
    for op in OPS:
        run = getattr(ops, op)
        setattr(ops, op, lambda *a, _run=run, _op=op, **k: (calls.update([_op]), _run(*a, **k))[1])
    weights = shapes_only(cfg)
    assert sum(w.nbytes for w in weights.values()) == stored
    model = Model(cfg, ops, weights)
    cache = model.new_cache(2, 1 << 16, max_chunk=2048)
    prefill = model(torch.zeros(2, 2048, dtype=torch.int64), cache, logits_to_keep=1)
    layers, csa = cfg.num_hidden_layers, cfg.layer_ratios.count(4)
    hca = cfg.layer_ratios.count(128)
    assert calls["sparse_attention"] == calls["moe_experts"] == layers
    assert calls["index_topk"] == csa
    assert calls["compress"] == 2 * csa + hca
    decode = model(torch.zeros(2, 1, dtype=torch.int64), cache)
    for logits in (prefill, decode):
        assert logits.shape == (2, 1, cfg.vocab_size)
        assert logits.dtype == torch.float32
        assert logits.device.type == "meta"
    assert cache.lengths == (2049, 2049)
    rows = 2 * (layers * -(-(127 + 2048) // 64) * 64 + (1 << 16) * csa // 4 + (1 << 16) * hca // 128) * 512 * 2
    assert sum(cache.breakdown()[kind] for kind in ("window", "entries")) == rows
