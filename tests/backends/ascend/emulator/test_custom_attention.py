"""Emulated attention over shared rows, against float64, one query at a time."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import custom_calls as calls
import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.emulator.rules import Refused


def name_of(soc: Soc) -> str:
    return "npu_kv_quant_sparse_attn_sharedkv" if soc.mode == "a5" else "npu_sparse_attn_sharedkv"


def run(soc: Soc, made: calls.Made) -> Tensor:
    given = dict(made.arguments)
    out, _ = getattr(torch.ops._C_ascend, name_of(soc))(given.pop("q"), **given)
    return out


def truth(made: calls.Made) -> Tensor:
    """[T, N, 512] float64: a softmax over 128 window rows and the entries, the sink beside them without a value."""
    given, rows = made.arguments, []
    ratio, picks, sinks = given["cmp_ratio"], given.get("cmp_sparse_indices"), given["sinks"].double()
    bounds, lengths = given["cu_seqlens_q"].tolist(), given["seqused_kv"].tolist()
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        for token in range(start, stop):
            position = lengths[sequence] - stop + token
            keys = [made.values["ori"][sequence][max(0, position - 127) : position + 1]]
            if "cmp" in made.values:
                seen = made.values["cmp"][sequence][: (position + 1) // ratio]
                chosen = None if picks is None else picks[token, 0][picks[token, 0] >= 0].long()
                keys.append(seen if chosen is None else seen[chosen])
            every = torch.cat(keys)
            score = given["q"][token].double() @ every.T * given["softmax_scale"]
            whole = torch.cat([score, sinks[:, None]], 1).softmax(1)
            rows.append(whole[:, :-1] @ every)
    return torch.stack(rows)


def agree(y: Tensor, wanted: Tensor) -> None:
    """Within a few roundings to bfloat16: one of every probability, one of the result."""
    assert y.dtype == torch.bfloat16
    error = (y.double() - wanted).abs()
    assert float(error.max() / wanted.abs().max()) < 2**-8
    assert float(error.norm() / wanted.norm()) < 2**-8


@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize(("entries", "ratio"), [("none", 1), ("all", 4), ("all", 128), ("picks", 4)])
def test_attention(torch_npu: ModuleType, soc: Soc, entries: str, ratio: int, heads: int) -> None:
    if heads == 128 and soc.mode != "a5":
        pytest.skip("this operator takes 64 heads")
    made = calls.attention(soc.mode == "a5", entries, ratio, heads=heads)
    agree(run(soc, made), truth(made))


def test_many_entries_take_several_steps_of_the_softmax(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.attention(soc.mode == "a5", "all", 4, tokens=(1, 1, 1))
    longer = calls.attention(soc.mode == "a5", "all", 4, tokens=(1, 1, 1), seed=5)
    for name in ("cmp", "ori"):  # the third sequence, 20 times as long: 1300 entries
        made.values[name][2] = longer.values[name][2].repeat(20, 1)
        stored = longer.arguments[f"{name}_kv"][longer.arguments[f"{name}_block_table"][2].long()].flatten(0, 2)
        held = stored[: len(longer.values[name][2])].view(torch.uint8).repeat(20, 1).view(stored.dtype)
        few = [
            made.arguments[f"{name}_kv"][made.arguments[f"{name}_block_table"][s].long()].flatten(0, 2)[
                : len(made.values[name][s])
            ]
            for s in (0, 1)
        ]
        cache, table = calls.paged([*few, held], 16, torch.Generator().manual_seed(2))
        made.arguments |= {f"{name}_kv": cache, f"{name}_block_table": table}
    made.arguments["seqused_kv"][2] = 5200
    agree(run(soc, calls.scheduled(made)), truth(made))


def test_a_query_that_no_sequence_has_is_left_alone(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.attention(soc.mode == "a5")
    made.arguments["q"] = torch.cat([made.arguments["q"], made.arguments["q"][:2]])
    y = run(soc, made)
    assert y[4:].isnan().all() and y[:4].isfinite().all()


def test_a_block_that_is_not_there(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.attention(soc.mode == "a5")
    made.arguments["ori_block_table"][0, -9:] = 999
    with pytest.raises(IndexError, match="999"):
        run(soc, made)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cu_seqlens_q": calls.int32([0, 2, 3, 4])}, "metadata"),
        ({"seqused_kv": calls.int32([141, 4, 261])}, "metadata"),
        ({"cmp_ratio": 128}, "metadata"),
    ],
)
def test_a_schedule_is_for_one_step(torch_npu: ModuleType, soc: Soc, change: dict[str, Any], says: str) -> None:
    made = calls.attention(soc.mode == "a5", "all")
    made.arguments |= change
    with pytest.raises(Refused, match=says):
        run(soc, made)


@pytest.mark.parametrize("entries", ["none", "all", "picks"])
def test_the_metadata_operator_makes_the_schedule(torch_npu: ModuleType, soc: Soc, entries: str) -> None:
    made = calls.attention(soc.mode == "a5", entries)
    metadata = getattr(torch.ops._C_ascend, f"{name_of(soc)}_metadata")(**calls.planned(made))
    assert metadata.dtype == torch.int32 and metadata.shape == (1024,)
    assert torch.equal(metadata, made.arguments["metadata"])


def test_the_other_generation_has_another_operator(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.attention(soc.mode != "a5")
    given = dict(made.arguments)
    other = {"a3": "npu_kv_quant_sparse_attn_sharedkv", "a5": "npu_sparse_attn_sharedkv"}[soc.mode]
    with pytest.raises(Refused, match=f"not on {soc.name}"):
        getattr(torch.ops._C_ascend, other)(given.pop("q"), **given)


def test_an_unknown_argument_is_refused_by_the_schema(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.attention(soc.mode == "a5")
    made.arguments["window"] = 128
    with pytest.raises(RuntimeError, match="Unknown keyword argument"):
        run(soc, made)
