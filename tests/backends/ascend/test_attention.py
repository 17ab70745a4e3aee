"""Sparse attention through vllm-ascend's operators: which calls go to them, how they are made up, and their numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_hal import load_model
from dsv4_hal.backends.ascend import Ascend, sharedkv
from dsv4_hal.backends.ascend.devices import SOCS, Soc, emulated
from dsv4_hal.backends.reference import Reference
from dsv4_hal.batch import Batch
from dsv4_hal.conformance import compare, expect, run_case, widen
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.formats import new_pool
from dsv4_hal.model.checkpoint import init_checkpoint
from dsv4_hal.model.config import find_config
from dsv4_hal.numerics import numerics_for
from dsv4_hal.ops import KV, OPS, Case

RATIOS = {4: True, 128: False}
CASES = [case for case in OPS["sparse_attention"].cases() if "window=128" in case.id and case.size == "quick"]
SERVED = [case for case in CASES if "lse=False" in case.id]


class Calls(TorchDispatchMode):
    """Counts operators of the vendors that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace in ("npu", "_C_ascend"):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def backend(torch_npu: ModuleType, soc: Soc) -> Ascend:
    return Ascend(numerics_for(soc.mode))


@pytest.fixture
def kernel(soc: Soc) -> sharedkv.Kernel:
    return sharedkv.FP8 if soc.mode == "a5" else sharedkv.PLAIN


def ops_of(backend: Ascend | Reference) -> Resolved:
    return resolve([backend, Reference(backend.numerics)])


def agree(backend: Ascend, case: Case) -> None:
    op = OPS[case.id.partition("[")[0]]
    wide = resolve([Reference(widen(backend.numerics))])
    expected = expect(partial(run_case, case), wide, backend.numerics.accumulate, op.tolerance)
    found = compare(run_case(case, ops_of(backend)), expected, op.tolerance)
    assert not {name: c.message for name, c in found.items() if not c.ok}


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.id)
def test_cases_that_the_operators_serve(backend: Ascend, kernel: sharedkv.Kernel, case: Case) -> None:
    with Calls() as calls:
        agree(backend, case)
    assert calls.count[kernel.name] == calls.count[f"{kernel.name}_metadata"] == 1


class Step:
    """A step of two sequences that a cache holds, 300 and 5 tokens long, the last 2 and 5 of them new; and padding."""

    def __init__(self, backend: Ascend | Reference, fixed: bool = False) -> None:
        self.ops = ops_of(backend)
        self.generator = torch.Generator().manual_seed(7)
        self.pools = {
            1: self.pool("window", 1, 16, 20, 128),
            4: self.pool("entries", 4, 64, 6, 0),
            128: self.pool("entries", 128, 2, 6, 0),
        }
        for q, context in (([150, 0], [0, 0]), ([148, 0], [150, 0]), ([2, 5], [298, 0])):
            last = q == [2, 5]
            self.batch = Batch(
                np.array(q),
                np.array(context),
                torch.device("cpu"),
                padding=1 if last else 0,
                slots=np.array([0, 1]),
                token_table=np.array([[4, 1], [2, 3]]),
                window_table=np.array([[19, 3, 8, 1, 12, 5, 0, 2, 4, 6, 9, 10, 11, 13, 14, 15, 16, 17], [7, 18] * 9]),
                window_block=16,
                fixed=fixed and last,
            )
            self.ops.plan(self.batch, RATIOS, {})
            for ratio, kv in self.pools.items():
                count = self.batch.tokens if ratio == 1 else self.batch.require_plan().entries[ratio].count
                self.ops.kv_store(self.random(count, 512), kv.layout, self.batch, kv)

    def pool(self, kind: str, ratio: int, rows: int, blocks: int, window: int) -> KV:
        layout = self.ops.row_layout(kind, 512, 64, ratio, window)
        return KV(new_pool(layout, blocks, rows).fill_(0xFF), layout, rows)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).bfloat16()

    def attend(self, heads: int = 4, ratio: int = 0, picks: Tensor | None = None, **more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(heads)
        q = torch.randn(8, heads, 512, generator=generator).bfloat16()
        sink = torch.randn(heads, generator=generator)
        entries = self.pools[ratio] if ratio else None
        y, _ = self.ops.sparse_attention(q, self.pools[1], sink, 512**-0.5, self.batch, entries, picks, **more)
        return y


@pytest.fixture
def pair(backend: Ascend) -> tuple[Step, Step]:
    return Step(backend), Step(Reference(backend.numerics))


def close(y: Tensor, wanted: Tensor) -> None:
    """Within roundings of probabilities and of the result to bfloat16."""
    error = (y - wanted).float()
    assert float(error.norm() / wanted.float().norm()) < 2**-9
    assert float(error.abs().max() / wanted.float().abs().max()) < 2**-7


@pytest.mark.parametrize("heads", [1, 64, 65, 128, 130])
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_heads_are_filled_up_or_taken_in_parts(
    pair: tuple[Step, Step], kernel: sharedkv.Kernel, heads: int, ratio: int
) -> None:
    mine, theirs = pair
    with Calls() as calls:
        y = mine.attend(heads, ratio)
    most = kernel.heads[-1]
    assert calls.count[kernel.name] == -(-heads // most)
    close(y, theirs.attend(heads, ratio))
    assert not y[7].any()  # padding


def test_picks_come_in_any_order_and_number(pair: tuple[Step, Step], kernel: sharedkv.Kernel) -> None:
    mine, theirs = pair
    seen = (mine.batch.positions + 1) // 4
    for width in (1, 75, kernel.picks[-1]):
        generator = torch.Generator().manual_seed(width)
        picks = torch.rand(8, max(75, width), generator=generator).argsort(-1)[:, :width]
        picks = torch.where(picks < seen[:, None], picks, -1)
        picks[7] = -1
        with Calls() as calls:
            y = mine.attend(4, 4, picks)
        assert calls.count[kernel.name] == 1
        close(y, theirs.attend(4, 4, picks))
    nothing = torch.full((8, 0), -1)
    assert torch.equal(mine.attend(4, 4, nothing), mine.attend(4, 0))  # none is not all


def test_a_schedule_is_made_once_for_a_step_and_a_ratio(backend: Ascend, kernel: sharedkv.Kernel) -> None:
    step = Step(backend)
    with Calls() as calls:
        for _ in range(3):
            step.attend(4, 4)
            step.attend(4, 128)
    assert calls.count[kernel.name] == 6 and calls.count[f"{kernel.name}_metadata"] == 2


def test_a_fixed_step_keeps_nothing_that_moves(backend: Ascend, kernel: sharedkv.Kernel) -> None:
    step = Step(backend, fixed=True)
    with Calls() as calls:
        y = [step.attend(4, 128) for _ in range(2)]
    assert calls.count[f"{kernel.name}_metadata"] == 2
    assert not step.batch.require_plan().vendor
    close(y[1], Step(Reference(backend.numerics), fixed=True).attend(4, 128))


def test_no_entry_is_complete_yet(backend: Ascend, kernel: sharedkv.Kernel) -> None:
    ops = ops_of(backend)
    batch = ops.plan(Batch.packed([3]), RATIOS, {})
    layouts = [ops.row_layout(kind, 512, 64, ratio, w) for kind, ratio, w in (("window", 1, 128), ("entries", 4, 0))]
    window, entries = (
        ops.kv_store(torch.ones(n, 512).bfloat16(), layout, batch) for n, layout in zip((3, 0), layouts, strict=True)
    )
    q, sink = torch.ones(3, 2, 512).bfloat16(), torch.zeros(2)
    with Calls() as calls:
        y, _ = ops.sparse_attention(q, window, sink, 1.0, batch, entries)
    assert calls.count[kernel.name] == 1
    assert torch.equal(y, ops.sparse_attention(q, window, sink, 1.0, batch)[0])


def test_out_is_written(pair: tuple[Step, Step]) -> None:
    out = torch.full((8, 4, 512), float("nan"), dtype=torch.bfloat16)
    y = pair[0].attend(4, 4, out=out)
    assert y is out and torch.equal(out, pair[0].attend(4, 4))


def test_a_ring_is_written_out(backend: Ascend) -> None:
    step = Step(backend)
    blocks, table = sharedkv.blocks(step.pools[1], step.batch)
    assert blocks.data_ptr() == step.pools[1].data.data_ptr()
    assert table.dtype == torch.int32 and table.shape == (2, 19)
    assert table[0, 18] == table[0, 0] == 19 and table[1, 3] == 18


@pytest.mark.parametrize("ratio", [1, 4, 128])
def test_blocks_are_what_the_operators_take(backend: Ascend, ratio: int) -> None:
    step = Step(backend)
    blocks, table = sharedkv.blocks(step.pools[ratio], step.batch)
    assert blocks.shape[1] % 16 == 0 and blocks.shape[2] == 1
    loaded = step.ops.kv_load(step.pools[ratio], step.batch, 0, 0 if ratio > 1 else 290, 300 // ratio)
    width = blocks.shape[1]
    first = 0 if ratio > 1 else 290
    for i, row in enumerate(loaded):
        found = blocks[table[0, (first + i) // width], (first + i) % width, 0]
        if backend.numerics.kv is not None:
            from dsv4_hal.backends.ascend.emulator.custom_attention import fp8_rows

            found = fp8_rows(found)
        assert torch.equal(found, row)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"return_lse": True}, "lse True"),
        ({"picks": torch.full((8, 1025), -1)}, "picks 1025"),
    ],
)
def test_what_they_do_not_take_runs_on_torchs_own_ops(
    pair: tuple[Step, Step], kernel: sharedkv.Kernel, change: dict[str, Any], says: str
) -> None:
    mine, theirs = pair
    with Calls() as calls, pytest.warns(UserWarning, match=says):
        y = mine.attend(5, 4, **change)
    assert kernel.name not in calls.count
    close(y, theirs.attend(5, 4, **change))


def test_other_windows_and_widths_run_on_torchs_own_ops(backend: Ascend, kernel: sharedkv.Kernel) -> None:
    for part, says in (
        ("ragged=mixed,entries=none,window=1]", "window 1,"),
        ("ragged=few,entries=csa,small=True]", "dim 96"),
    ):
        (case,) = [case for case in OPS["sparse_attention"].cases() if part in case.id]
        with Calls() as calls, pytest.warns(UserWarning, match=says):
            agree(backend, case)
        assert kernel.name not in calls.count


def test_a_step_without_tokens(backend: Ascend, kernel: sharedkv.Kernel) -> None:
    ops = ops_of(backend)
    batch = ops.plan(Batch.packed([0], padding=2), RATIOS, {})
    layout = ops.row_layout("window", 512, 64, 1, 128)
    window = ops.kv_store(torch.full((2, 512), float("nan")).bfloat16(), layout, batch)
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = ops.sparse_attention(torch.ones(2, 4, 512).bfloat16(), window, torch.zeros(4), 1.0, batch)
    assert not calls.count and not y.any()


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "window": lambda patch: patch.setattr(sharedkv, "WINDOW", 127),
    "picks": lambda patch: patch.setattr(sharedkv, "filled", lambda picks, allowed: picks.to(torch.int32)),
    "schedule": lambda patch: patch.setattr(sharedkv, "_schedule", lambda *_: torch.zeros(1024, dtype=torch.int32)),
    "table": lambda patch: patch.setattr(
        sharedkv, "_written_out", lambda batch, ratio, rows: batch.require_plan().tables[ratio].to(torch.int32)
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_emulator_finds_what_a_device_would_not_take(
    backend: Ascend, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4_hal.backends.ascend.emulator.rules import Refused

    step = Step(backend)
    BROKEN[what](monkeypatch)
    with pytest.raises(Refused):
        step.attend(64, 4, torch.tensor([[-1, 0]]).repeat(8, 1))


def test_another_profile_is_not_served(torch_npu: ModuleType, soc: Soc, kernel: sharedkv.Kernel) -> None:
    backend = Ascend(replace(numerics_for(soc.mode), probs=torch.float32))
    case = next(c for c in SERVED if "few_packed" in c.id and "none" in c.id)
    with Calls() as calls, pytest.warns(UserWarning, match="probabilities torch.float32"):
        agree(backend, case)
    assert kernel.name not in calls.count


def test_a_model_of_the_published_widths(
    torch_npu: ModuleType, soc: Soc, kernel: sharedkv.Kernel, tmp_path: Path
) -> None:
    """Four layers with heads of 512 channels and a window of 128: a prompt, then tokens one by one. Every token sees
    all entries that there are, so that no pick hangs on a last bit."""
    tiny = find_config("v4-tiny")[0]
    widths = {"head_dim": 512, "sliding_window": 128, "index_topk": 512, "vocab_size": 256}
    init_checkpoint(replace(tiny, **widths), tmp_path, "bfloat16")
    tokens, logits = torch.arange(136)[None] * 7 % 256, []
    for backend in ("ascend", "reference"):
        model = load_model(tmp_path, backend, soc.mode)
        cache = model.new_cache(1, 160, max_chunk=130)
        with Calls() as calls, torch.inference_mode():
            parts = [model(part, cache) for part in tokens.split([130, 3, 1, 1, 1], 1)]
        assert calls.count[kernel.name] == (5 * 4 if backend == "ascend" else 0)
        assert calls.count[f"{kernel.name}_metadata"] == (5 * 3 if backend == "ascend" else 0)
        logits.append(torch.cat(parts, 1))
    mine, theirs = logits
    assert float((mine - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.skipif(emulated(), reason="explains what an assumed SoC would run, without torch_npu")
@pytest.mark.parametrize(
    ("model", "name", "served", "says"),
    [
        ("v4-flash", "ascend910_93", True, "npu_sparse_attn_sharedkv"),
        ("v4-flash", "ascend950", True, "npu_kv_quant_sparse_attn_sharedkv"),
        ("v4-pro", "ascend950", True, "npu_kv_quant_sparse_attn_sharedkv"),
        ("v4-pro", "ascend910b", True, "torch's own ops for calls that it does not take: "),
        ("v4-tiny", "ascend950", False, "dim 128, not 512; window 32, not 128"),
    ],
)
def test_models_that_the_operators_serve(
    model: str, name: str, served: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_HAL_ASSUME", name)
    backend = Ascend(numerics_for(SOCS[name].mode))
    verdict = backend.supports("sparse_attention", vars(find_config(model)[0]))
    assert bool(verdict) == served and says in verdict.reason
    indexer = backend.supports("index_topk", {})
    assert indexer and "equal scores" in indexer.reason
