"""The ragged step and its plan, against loops that anyone can check by hand."""

import inspect
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_hal import batch as module
from dsv4_hal.batch import Batch, completed, cos_sin, make_plan, physical, tiles

RATIOS = {4: True, 128: False}


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Ragged steps with a cache: any lengths, block tables and slots in random order, a ring of window blocks."""
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, 140), st.one_of(st.integers(0, 9), st.integers(120, 300))), min_size=0, max_size=5
        )
    )
    q = np.array([p[0] for p in pairs], np.int64)
    context = np.array([p[1] for p in pairs], np.int64)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    n = len(pairs)
    return Batch(
        q,
        context,
        torch.device("cpu"),
        padding=draw(st.integers(0, 3)),
        slots=rng.permutation(n + 2)[:n],
        token_table=rng.permutation(n * 2 + 1)[: n * 2].reshape(n, 2),
        window_table=rng.permutation(n * 10 + 1)[: n * 10].reshape(n, 10),
        rollback=draw(st.sampled_from((0, 3))),
    )


def tokens_of(batch: Batch) -> list[tuple[int, int]]:
    """(sequence, position) of every flat token, padding excluded."""
    return [(r, int(batch.context[r]) + i) for r in range(len(batch.q_lens)) for i in range(int(batch.q_lens[r]))]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(batches())
def test_flat_tokens(batch: Batch) -> None:
    expected = tokens_of(batch)
    padding = [(-1, 0)] * batch.padding
    assert list(zip(batch.seq.tolist(), batch.positions.tolist(), strict=True)) == expected + padding
    assert batch.tokens == len(expected) + batch.padding


@settings(derandomize=True, deadline=None, max_examples=60)
@given(batches())
def test_tiles_cover_every_token_once(batch: Batch) -> None:
    expected = tokens_of(batch)
    seen = []
    for tile in tiles(batch):
        for seq, first, tokens, last in zip(tile.seq, tile.first, tile.tokens, tile.last, strict=True):
            real = tokens[tokens >= 0]
            assert len(tokens) == tile.size and (tokens[: len(real)] == real).all()  # -1 only at the end
            assert [expected[t] for t in real] == [(seq, first + i) for i in range(len(real))]
            assert last == first + len(real) - 1
            longest = batch.q_lens[seq]
            assert tile.size == (1 if longest == 1 else 8 if longest <= 8 else 64)
            seen += real.tolist()
    assert sorted(seen) == list(range(len(expected)))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(batches(), st.sampled_from(sorted(RATIOS)))
def test_completed_entries(batch: Batch, ratio: int) -> None:
    overlap = RATIOS[ratio]
    span = ratio * (2 if overlap else 1)
    ring = span + batch.rollback
    flat = {token: t for t, token in enumerate(tokens_of(batch))}
    slots = batch.slots
    assert slots is not None
    expected, sources = [], []
    for r in range(len(batch.q_lens)):
        for i in range(int(batch.lengths[r]) // ratio):
            if (i + 1) * ratio <= batch.context[r]:
                continue  # complete before this step
            expected.append((r, i))
            row = []
            for p in range((i + 1) * ratio - span, (i + 1) * ratio):
                if p < 0:
                    row.append(-1)
                elif p >= batch.context[r]:
                    row.append(flat[r, p])
                else:
                    row.append(batch.tokens + int(slots[r]) * ring + p % ring)
            sources.append(row)
    entries, seq, index = completed(batch, ratio, overlap)
    assert list(zip(seq.tolist(), index.tolist(), strict=True)) == expected
    assert entries.count == len(expected) and entries.ring == ring
    assert entries.positions.tolist() == [i * ratio for _, i in expected]
    assert entries.source.tolist() == sources
    kept = {int(slots[r]) * ring + p % ring: t for (r, p), t in flat.items() if p >= batch.lengths[r] - ring}
    assert dict(zip(entries.keep_target.tolist(), entries.keep_source.tolist(), strict=True)) == kept


@settings(derandomize=True, deadline=None, max_examples=60)
@given(batches())
def test_plan_rows(batch: Batch) -> None:
    frequency = torch.tensor([1.0, 0.1, 1e-4])
    plan = make_plan(batch, RATIOS, {"a": frequency}, torch.float64)
    window, tokens = batch.window_table, batch.token_table
    assert window is not None and tokens is not None
    source, target = plan.write[1]
    expected = []
    for r, p in tokens_of(batch):
        expected.append(int(window[r, p // 16 % window.shape[1]]) * 16 + p % 16)
    assert source.tolist() == list(range(len(expected))) and target.tolist() == expected
    for ratio in RATIOS:
        done, (source, target) = plan.entries[ratio], plan.write[ratio]
        rows = 256 // ratio
        expected = [
            int(tokens[r, i // rows]) * rows + i % rows
            for r, i in zip(done.seq.tolist(), done.index.tolist(), strict=True)
        ]
        assert source.tolist() == list(range(done.count)) and target.tolist() == expected
        base = [sum(1 for s in done.seq.tolist() if s < r) for r in range(len(batch.q_lens))]
        assert plan.base[ratio].tolist() == base
        cos, sin = plan.rope["a", ratio]
        angle = (done.positions.float()[:, None] * frequency).double()
        assert torch.equal(cos, angle.cos()) and torch.equal(sin, angle.sin())
    assert plan.base[1].tolist() == batch.starts.tolist()
    assert plan.rope["a", 1][0].shape == (batch.tokens, 3)


def test_physical_is_a_ring() -> None:
    table = np.array([[7, 3]])
    rows = physical(table, 16, np.zeros(4, np.int64), np.array([0, 17, 32, 50]))
    assert rows.tolist() == [7 * 16, 3 * 16 + 1, 7 * 16, 3 * 16 + 2]


def test_angles_are_float32_products() -> None:
    frequency = torch.tensor([0.7310585])
    position = torch.tensor([1_000_003])
    cos, _ = cos_sin(position, frequency, torch.float64)
    assert cos.item() == torch.cos((position.float() * frequency).double()).item()
    assert abs(cos.item() - torch.cos(position.double() * frequency.double()).item()) > 1e-4


def test_packed() -> None:
    batch = Batch.packed([3, 0, 2], padding=1)
    assert not batch.cached and batch.tokens == 6
    assert batch.seq.tolist() == [0, 0, 0, 2, 2, -1]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0]
    plan = make_plan(batch, {4: True}, {}, torch.float32)
    assert plan.write == {} and plan.tables == {} and plan.entries[4].count == 0


def test_an_empty_batch() -> None:
    batch = Batch.packed([])
    plan = make_plan(batch, RATIOS, {"a": torch.ones(2)}, torch.float32)
    assert batch.tokens == 0 and plan.tiles == () and plan.rope["a", 4][0].shape == (0, 2)


@pytest.mark.parametrize(
    ("q", "context", "extra", "message"),
    [
        ([1, 2], [0], {"slots": np.zeros(2)}, "equally long"),
        ([[1]], [[0]], {"slots": np.zeros(1)}, "equally long"),
        ([-1], [0], {}, "negative"),
        ([1], [-1], {"slots": np.zeros(1)}, "negative"),
        ([1], [0], {"padding": -1}, "padding must be a whole number of at least 0, got -1"),
        ([1], [4], {}, "without cache slots"),
    ],
)
def test_impossible_batches(q: list, context: list, extra: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(np.array(q), np.array(context), torch.device("cpu"), **extra)


def test_lengths_are_whole_numbers() -> None:
    with pytest.raises(TypeError, match="whole numbers"):
        Batch.packed([1.5])  # type: ignore[list-item]


def test_no_plan() -> None:
    with pytest.raises(ValueError, match=r"no plan.*ops\.plan"):
        Batch.packed([1]).require_plan()


def test_many_sequences_cost_no_python_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly more lines of batch.py run for 256 sequences than for 2: no loop over sequences."""
    assert lines_run(256) < lines_run(2) + 20


def lines_run(count: int) -> int:
    batch = Batch(
        np.full(count, 9),
        np.arange(count),
        torch.device("cpu"),
        slots=np.arange(count),
        token_table=np.arange(2 * count).reshape(count, 2),
        window_table=np.arange(2 * count).reshape(count, 2),
    )
    lines = 0
    here = inspect.getsourcefile(module)

    def trace(frame, event, argument):  # type: ignore[no-untyped-def]
        nonlocal lines
        if frame.f_code.co_filename != here:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        make_plan(batch, RATIOS, {"a": torch.ones(4)}, torch.float32)
    finally:
        sys.settrace(None)
    assert lines > 20
    return lines
