"""The emulated indexer, against float64; and why the backend cannot use it."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import custom_calls as calls
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import Soc


def run(made: calls.Made) -> Tensor:
    picks, _ = torch.ops._C_ascend.npu_vllm_quant_lightning_indexer(**made.arguments)
    assert picks.dtype == torch.int32
    return picks[:, 0]


def scores(made: calls.Made) -> list[Tensor]:
    """Of every token, one score for each entry that it sees."""
    given, out = made.arguments, []
    bounds, lengths = [0, *given["actual_seq_lengths_query"].tolist()], given["actual_seq_lengths_key"].tolist()
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        for token in range(start, stop):
            seen = (lengths[sequence] - stop + token + 1) // given["cmp_ratio"]
            product = made.values["query"][0][token] @ made.values["key"][sequence][:seen].T
            out.append((given["weights"][token].double()[:, None] * product.clamp(min=0)).sum(0))
    return out


def test_picks(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.indexer(soc.mode == "a5")
    for picks, score in zip(run(made), scores(made), strict=True):
        count = len(score)
        assert (picks[count:] == -1).all() and sorted(picks[:count].tolist()) == list(range(count))
        # weight times scale is rounded to float16 on the A3
        slack = score.abs().max() * (1e-6 if soc.mode == "a5" else 2e-3)
        assert (score[picks[:count].long()].diff() <= slack).all()


def test_equal_scores_come_last_entry_first(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.indexer(soc.mode == "a5")
    made.arguments["weights"].zero_()
    assert run(made)[-1, :15].tolist() == list(range(14, -1, -1))  # the contract: lower entries first


def test_weights_and_scales_overflow_together_on_the_a3(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.indexer(soc.mode == "a5")
    made.arguments["weights"].fill_(60000.0)
    made.arguments["query_dequant_scale"].fill_(2.0)
    made.values["query"] = [made.arguments["query"].double() * 2]
    best = run(made)[-1, :15].tolist()
    # All scores are infinite on the A3, or not a number where a product is 0: their order says nothing.
    assert (best == scores(made)[-1].argsort(descending=True).tolist()) == (soc.mode == "a5")


def test_the_metadata_operator_makes_the_schedule(torch_npu: ModuleType, soc: Soc) -> None:
    made = calls.indexer(soc.mode == "a5")
    metadata = torch.ops._C_ascend.npu_vllm_quant_lightning_indexer_metadata(**calls.planned_picks(made))
    assert torch.equal(metadata, made.arguments["metadata"])
