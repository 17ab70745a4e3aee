"""Sparse attention and the indexer as ops: what the cases of the contract do not see. Interpreted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.triton_kernels import attention, indexer
from dsv4_hal.batch import Batch
from dsv4_hal.formats import FORMATS, new_pool
from dsv4_hal.numerics import numerics_for
from dsv4_hal.ops import KV

HEADS, DIM, ROPE, WINDOW, RATIO, K = 3, 96, 32, 8, 4, 6
MODES = pytest.mark.parametrize("mode", ["exact", "deployed"])


class Step:
    """Three sequences of 37, 1 and 90 tokens in a cache, of which the last 2, 1 and 1 are this step's."""

    q_lens, context = np.array([2, 1, 1]), np.array([35, 0, 89])

    def __init__(self, mode: str) -> None:
        self.ops = Cuda(numerics_for(mode))
        self.generator = torch.Generator().manual_seed(7)
        self.window_table = torch.randperm(12, generator=self.generator).view(3, 4).numpy()
        self.token_table = torch.randperm(9, generator=self.generator).view(3, 3).numpy()
        history = self.batch([0, 1, 2], self.context, np.zeros(3, np.int64))
        self.whole = self.batch([0, 1, 2], self.q_lens, self.context)
        self.window = self.filled("window", 1, WINDOW, [history, self.whole])
        self.entries = self.filled("entries", RATIO, 0, [history, self.whole])
        self.keys = self.filled("index", RATIO, 0, [history, self.whole])
        self.q, self.index_q = self.values(4, HEADS, DIM), self.values(4, HEADS, DIM)
        self.weights = self.values(4, HEADS)
        visible = (self.whole.positions + 1) // RATIO
        picks = torch.rand(4, 24, generator=self.generator).argsort(-1)[:, :K]
        self.picks = torch.where(picks < visible[:, None], picks, -1)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.ops.numerics.storage)

    def batch(self, sequences, q_lens, context) -> Batch:
        batch = Batch(
            q_lens,
            context,
            torch.device("cpu"),
            slots=np.array(sequences),
            token_table=self.token_table[sequences],
            window_table=self.window_table[sequences],
            block_tokens=32,
            window_block=24,
        )
        return self.ops.plan(batch, {RATIO: True}, {})

    def filled(self, kind, ratio, window, batches) -> KV:
        layout = self.ops.row_layout(kind, DIM, 0 if kind == "index" else ROPE, ratio, window)
        rows = 24 if ratio == 1 else 32 // ratio
        kv = KV(new_pool(layout, 12, rows).fill_(0xFF), layout, rows)
        for batch in batches:
            count = batch.tokens if ratio == 1 else batch.plan.entries[ratio].count
            kv = self.ops.kv_store(self.values(count, DIM), layout, batch, kv)
        return kv

    def attend(self, batch: Batch, tokens: slice, entries: str) -> tuple[Tensor, Tensor]:
        given = (self.entries if entries != "none" else None, self.picks[tokens] if entries == "picks" else None)
        sink = torch.linspace(-1, 1, HEADS)
        return self.ops.sparse_attention(self.q[tokens], self.window, sink, 0.1, batch, *given, return_lse=True)

    def pick(self, batch: Batch, tokens: slice) -> tuple[Tensor, Tensor]:
        return self.ops.index_topk(self.index_q[tokens], self.weights[tokens], self.keys, batch, K, with_scores=True)

    def alone(self):
        """Every token of the step in a batch of its own, and its place in the step."""
        for token, (sequence, position) in enumerate(zip(self.whole.seq_host, self.whole.positions_host, strict=True)):
            yield self.batch([sequence], np.array([1]), np.array([position])), slice(token, token + 1)


@MODES
@pytest.mark.parametrize("entries", ["none", "picks", "all"])
def test_a_token_alone_is_the_token_in_a_batch(mode, entries):
    step = Step(mode)
    together = step.attend(step.whole, slice(None), entries)
    for batch, token in step.alone():
        for one, many in zip(step.attend(batch, token, entries), together, strict=True):
            assert torch.equal(one, many[token])


@MODES
@pytest.mark.parametrize("entries", ["picks", "all"])
def test_splits_add_up_alike_wherever_they_are_added(mode, entries, monkeypatch):
    step = Step(mode)
    unsplit = step.attend(step.whole, slice(None), entries)
    monkeypatch.setattr(attention, "SPLIT", 8)
    spread = step.attend(step.whole, slice(None), entries)
    monkeypatch.setattr(attention, "SPREAD", 0)
    looped = step.attend(step.whole, slice(None), entries)
    for one, other, plain in zip(spread, looped, unsplit, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, plain, rtol=2**-6 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-3)


@MODES
def test_picks_of_a_token_alone_are_those_in_a_batch(mode, monkeypatch):
    step = Step(mode)
    together = step.pick(step.whole, slice(None))
    for batch, token in step.alone():
        for one, many in zip(step.pick(batch, token), together, strict=True):
            assert torch.equal(one, many[token])
    monkeypatch.setattr(indexer, "SCRATCH", 1)
    monkeypatch.setattr(indexer, "BLOCK", 2)
    step.whole.plan.vendor.clear()
    for one, many in zip(step.pick(step.whole, slice(None)), together, strict=True):
        assert torch.equal(one, many)


def test_entries_that_come_later_do_not_matter():
    """The same token, once with the rest of its sequence stored behind it, and once without."""
    step = Step("deployed")
    before, _ = step.pick(step.whole, slice(None))
    later = step.batch([0, 1, 2], np.array([20, 20, 5]), step.whole.lengths)
    count = later.plan.entries[RATIO].count
    step.keys = step.ops.kv_store(step.values(count, DIM) * 50, step.keys.layout, later, step.keys)
    after, _ = step.pick(step.whole, slice(None))
    assert torch.equal(after, before)


def test_layouts_are_packed_where_the_profile_rounds():
    deployed, exact = Cuda(numerics_for("deployed")), Cuda(numerics_for("exact"))
    assert deployed.row_layout("window", 512, 64, 1, 128).name == "flashmla"
    assert deployed.row_layout("entries", 96, 32, 4).name == "flashmla"
    assert deployed.row_layout("index", 128, 64, 4).name == "index_fp4"
    assert exact.row_layout("window", 512, 64, 1, 128).plain and exact.row_layout("index", 128, 64, 4).plain
    other = Cuda(replace(numerics_for("deployed"), index=FORMATS["int8_row_fp16"]))
    assert other.row_layout("index", 128, 64, 4).plain
