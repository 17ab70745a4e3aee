"""Counts, bytes and FLOPs against the published totals, and against the formulas written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dsv4_hal.formats.kv_rows import ascend950_rows
from dsv4_hal.model import facts as module
from dsv4_hal.model.config import ModelConfig, preset, preset_names, stored_as
from dsv4_hal.model.facts import (
    activated_parameters,
    cache_rows,
    facts,
    flops_per_token,
    gqa8_kv_bytes,
    kv_bytes,
    v32_flops_per_token,
    v32_kv_bytes,
)
from dsv4_hal.model.weights import weight_table

MILLION = 1 << 20


def flash(**changes: object) -> ModelConfig:
    return replace(preset("v4-flash"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "stored", "cache", "flops", "ratios"),
    [
        (
            "v4-flash",
            (284_332_240_471, 290_942_289_362, 13_270_101_591, 13_799_632_471),
            (67_612, 69_187),
            (156_015_698_140, 159_609_485_896),
            (3_688_172_544, 3_214_336, 3_310_616_576, 374_341_632),
            (121_448_431_616, 29_140_189_184, 45_097_156_608, 47_211_085_824),
            ("13.67", "9.82", "2.00%"),
        ),
        (
            "v4-pro",
            (1_572_997_201_763, 1_598_837_347_742, 48_852_402_019, 49_779_081_059),
            (142_773, 145_116),
            (850_748_205_004, 864_704_792_696),
            (5_280_404_480, 4_559_872, 4_741_070_848, 534_773_760),
            (323_888_021_504, 106_119_757_824, 64_424_509_440, 153_343_754_240),
            ("9.55", "3.68", "2.02%"),
        ),
    ],
)
def test_published_figures(
    name: str,
    parameters: tuple[int, ...],
    tensors: tuple[int, ...],
    stored: tuple[int, ...],
    cache: tuple[int, ...],
    flops: tuple[int, ...],
    ratios: tuple[str, str, str],
) -> None:
    found = facts(preset(name), MILLION)
    assert tuple(found["parameters"].values()) == parameters
    assert tuple(found["tensors"].values()) == tensors
    assert tuple(found["checkpoint_bytes"].values()) == stored
    assert tuple(found["kv_cache_bytes"].values()) == cache
    assert tuple(found["fp8_equivalent_flops_per_token"].values()) == flops
    over = found["ratios_v3_2_over_model"]
    share = f"{found['kv_cache_share_of_bf16_gqa8']:.2%}"
    assert (*(f"{ratio:.2f}" for ratio in over.values()), share) == ratios
    assert json.loads(json.dumps(found)) == found


def test_deepseek_v32() -> None:
    assert v32_kv_bytes(MILLION) == {"entries": 61 * 656 * MILLION, "index": 61 * 132 * MILLION}
    flops = v32_flops_per_token(MILLION)
    assert f"{sum(v32_kv_bytes(MILLION).values()) / 1e9:.2f}" == "50.40"
    assert f"{sum(flops.values()) / 1e12:.3f}" == "1.193"
    d = 7168
    fp8 = 1536 * d + 128 * 192 * 1536 + 576 * d + 128 * 128 * d + 64 * 128 * 1536 + 128 * d
    bf16 = 128 * 256 * 512 + 64 * d  # kv_b, absorbed, and index weights
    feed_forward = 3 * 3 * d * 18432 + 58 * (9 * 3 * d * 2048 + 2 * 256 * d)
    assert flops["linear"] == 2 * (61 * (fp8 + 2 * bf16) + feed_forward)
    assert flops["indexer"] == 61 * 2 * 64 * 128 * MILLION
    assert flops["attention"] == 61 * 2 * 128 * 1088 * 2048 * 2
    assert v32_flops_per_token(100)["attention"] == 61 * 2 * 128 * 1088 * 100 * 2


def test_activated_parameters_of_one_layer_by_hand() -> None:
    cfg, d, q, experts = flash(), 4096, 1024, 6 + 1
    layer = {name: spec for name, spec in weight_table(cfg).items() if name.startswith("layers.4.")}  # ratio 4, no hash
    attention = q * d + q + 512 * 64 * q + 512 * d + 512 + 8192 * 4096 + d * 8192 + 64
    compressor = 4 * 1024 + 2 * 1024 * d + 512
    indexer = 8192 * q + 64 * d + 4 * 256 + 2 * 256 * d + 128
    feed_forward = 256 * d + 256 + experts * 3 * d * 2048
    mixing = 2 * (24 * 4 * d + 24 + 3) + 2 * d
    assert activated_parameters(layer, cfg) == attention + compressor + indexer + feed_forward + mixing


def test_embedding_head_and_mtp_in_the_activated_count() -> None:
    cfg = flash()
    table = weight_table(cfg)
    vocabulary = 129_280 * 4096
    assert activated_parameters(table, cfg, embedding=True) - activated_parameters(table, cfg) == vocabulary
    assert activated_parameters({"head": table["head"]}, cfg) == vocabulary
    alone = flash(num_nextn_predict_layers=0)
    assert activated_parameters(weight_table(alone), alone) == activated_parameters(table, cfg)


@pytest.mark.parametrize("context", [1, 3, 4, 5, 127, 128, 129, 131, 132, 255, 256, 257, 4095, 4096])
def test_cache_of_flash_by_hand(context: int) -> None:
    """The published formula with N/4 and N/128 rounded down: an entry exists once its last token has come."""
    window, csa, hca = min(context, 128), context // 4, context // 128
    assert kv_bytes(flash(), context) == {
        "window": 43 * 584 * window,
        "entries": 584 * (21 * csa + 20 * hca),
        "index": 21 * 68 * csa,
    }


@pytest.mark.parametrize("context", [1, 4, 127, 128, 2047, 2048, 2052, 1 << 17])
def test_flops_of_flash_by_hand(context: int) -> None:
    d, q = 4096, 1024
    fp8 = 43 * (q * d + 512 * 64 * q + 512 * d + d * 8192 + 7 * 3 * d * 2048) + 21 * 8192 * q
    bf16 = 43 * (8192 * 4096 + 256 * d + 2 * 24 * 4 * d) + 4 * 4 * d  # wo_a, gate, mixing
    bf16 += 21 * (2 * 1024 * d + 64 * d + 2 * 256 * d) + 20 * 2 * 512 * d  # compressors, indexer
    seen = 43 * min(context, 128) + 21 * min(512, context // 4) + 20 * (context // 128)
    assert flops_per_token(weight_table(flash()), flash(), context) == {
        "linear": 2 * (fp8 + 2 * bf16),
        "indexer": 2 * 64 * 128 * (context // 4) * 21 // 2,
        "attention": 4 * 512 * 64 * seen * 2,
    }


@pytest.mark.parametrize("name", preset_names())
def test_costs_grow_with_context(name: str) -> None:
    cfg = preset(name)
    table = weight_table(cfg)
    contexts = [*range(1, 10), *range(126, 134), 255, 256, 257, 2047, 2048, 2049, cfg.max_position_embeddings]
    for cost in (lambda n: kv_bytes(cfg, n), lambda n: flops_per_token(table, cfg, n)):
        totals = [sum(cost(n).values()) for n in contexts]
        assert totals == sorted(totals) and totals[0] < totals[-1]


def test_costs_by_stored_format() -> None:
    cfg = flash(num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0))
    one = {name: flops_per_token(weight_table(c), c, 1000) for name, c in (
        ("fp4", cfg), ("fp8", replace(cfg, expert_dtype="fp8")), ("bf16", stored_as(cfg, "bfloat16")),
        ("fp32", stored_as(cfg, "float32")),
    )}  # fmt: skip
    assert one["fp4"] == one["fp8"] and one["bf16"] == one["fp32"]
    table = weight_table(cfg)
    idle = sum(activated_parameters({name: spec}, cfg) for name, spec in table.items() if not module._is_linear(spec))
    assert one["bf16"]["linear"] == 4 * (activated_parameters(table, cfg, embedding=True) - idle - 129_280 * 4096)
    assert one["fp4"]["linear"] < one["bf16"]["linear"]
    assert all(one["fp4"][part] == one["bf16"][part] for part in ("indexer", "attention"))
    assert kv_bytes(cfg, 1000) == kv_bytes(stored_as(cfg, "bfloat16"), 1000)


def test_widths_that_published_rows_do_not_have() -> None:
    cfg = replace(preset("v4-tiny"), head_dim=80, index_head_dim=80)
    rows = cache_rows(cfg, 4)
    assert {kind: (row.name, row.row_bytes) for kind, row in rows.items()} == dict.fromkeys(rows, ("plain", 160))
    assert kv_bytes(cfg, 40) == {"window": 4 * 32 * 160, "entries": 2 * 10 * 160, "index": 2 * 10 * 160}
    assert flops_per_token(weight_table(cfg), cfg, 40)["indexer"] == 2 * (8 * 80) * 10 * 2 * 2
    assert facts(cfg, 40)["cache_rows"]["index"] == {"layout": "plain", "bytes": 160}
    assert [row.row_bytes for row in cache_rows(preset("v4-tiny"), 4).values()] == [64 + 128 + 8, 64 + 128 + 8, 68]
    assert list(cache_rows(cfg, 0)) == ["window"] and list(cache_rows(cfg, 128)) == ["window", "entries"]


def test_there_is_no_second_list_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = flash()
    table = weight_table(cfg)
    wider = dict(table)
    for name in ("layers.5.attn.wq_b", "layers.4.attn.indexer.wq_b"):
        rows, columns = table[name].shape
        wider[name] = replace(table[name], shape=(rows + 512, columns))
    before, after = (flops_per_token(t, cfg, MILLION) for t in (table, wider))
    more = activated_parameters(wider, cfg) - activated_parameters(table, cfg)
    assert more == 2 * 512 * 1024 and after["linear"] - before["linear"] == 2 * more
    assert after["indexer"] - before["indexer"] == 512 * MILLION // 4
    assert after["attention"] - before["attention"] == 8 * 512 * (128 + MILLION // 128)
    plain = facts(cfg, MILLION)
    monkeypatch.setattr(module, "weight_table", lambda cfg: wider)
    changed = facts(cfg, MILLION)
    assert changed["parameters"]["with_mtp"] == plain["parameters"]["with_mtp"] + more
    assert changed["checkpoint_bytes"]["with_mtp"] == plain["checkpoint_bytes"]["with_mtp"] + more + 2 * 4 * 8
    monkeypatch.setattr(module, "flashmla_rows", ascend950_rows)
    assert kv_bytes(cfg, 128)["window"] == 43 * 128 * 640


def test_baseline_of_grouped_queries() -> None:
    assert gqa8_kv_bytes(flash(), 1000) == 43 * 4096 * 1000
