"""The cache's accounting, limits and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv4_hal import Batch
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.transformer import Model


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Model]) -> Model:
    return small_model()


def test_bytes_by_hand(model: Model) -> None:
    """4 layers (ratios 0, 4, 128, 4) of float32 rows: head_dim 32, index_head_dim 32, 2 sequences of 600 tokens."""
    cache = model.new_cache(2, 600, max_chunk=100, rollback=3)
    ring = -(-(12 - 1 + 100) // 64) * 64  # window 12
    blocks = -(-600 // 256)
    want = {
        "window": 4 * 2 * ring * 32 * 4,
        "entries": 2 * blocks * (64 + 2 + 64) * 32 * 4,
        "keys": 2 * blocks * (64 + 64) * 32 * 4,
        "state": 2 * 2 * 4 * ((8 + 3) * 64 + (128 + 3) * 32 + (8 + 3) * 64),
        "index_state": 2 * 2 * 4 * 2 * (8 + 3) * 64,
    }
    assert cache.breakdown() == want
    assert cache.nbytes == sum(want.values())


def test_rollback_is_a_budget(model: Model) -> None:
    cache = model.new_cache(2, 64, rollback=3)
    model(torch.arange(40).view(2, 20), cache)
    with pytest.raises(ValueError, match=r"sequence 0 cannot be cut to 16: 20 tokens were written.*rollback=3, so 17"):
        cache.truncate(16)
    assert cache.lengths == (20, 20)
    cache.truncate(18)
    cache.truncate(17, 1)
    with pytest.raises(ValueError, match="so 17 is the least"):
        cache.truncate(16, 1)
    assert cache.lengths == (18, 17)
    cache.truncate(0)
    assert cache.lengths == (0, 0)
    with pytest.raises(ValueError, match="holds 0 tokens and cannot be cut to 1"):
        cache.truncate(1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"max_seq_len": 5000}, "beyond the model's 4096 positions"),
        ({"rollback": -1}, "rollback"),
        ({"max_chunk": -4}, "max_chunk"),
        ({"max_chunk": 0}, "max_chunk must be a whole number of at least 1, got 0"),
        ({"batch_size": True}, "batch_size"),
        ({"max_seq_len": 3.5}, "max_seq_len"),
    ],
)
def test_impossible_sizes(model: Model, arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        model.new_cache(**({"batch_size": 1, "max_seq_len": 16} | arguments))


@pytest.mark.parametrize(
    ("q_lens", "sequences", "text"),
    [
        ([1], None, "need one per sequence"),
        ([1, 1], [0, 0], "named once"),
        ([1], [2], "sequence 2 of a cache of 2"),
        ([9, 1], None, "sequence 0, 12 tokens and 9 new ones: more tokens in one step than the cache's max_chunk=8"),
        ([5, 1], None, r"12 tokens and 5 new ones: more tokens than the cache's max_seq_len=16"),
        ([-1, 1], None, "must not be negative"),
    ],
)
def test_impossible_batches(model: Model, q_lens: list, sequences: list | None, text: str) -> None:
    cache = model.new_cache(2, 16, max_chunk=8)
    for _ in range(2):
        model(torch.ones(2, 6, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=text):
        cache.batch(q_lens, sequences)


def test_a_batch_belongs_to_one_state_of_one_cache(model: Model) -> None:
    cache = model.new_cache(1, 16)
    stale = cache.batch([2])
    model(torch.ones(1, 2, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="moved on since"):
        model.step(torch.ones(2, dtype=torch.int64), stale, cache)
    with pytest.raises(ValueError, match=r"needs that cache, and Batch.packed none"):
        model.step(torch.ones(2, dtype=torch.int64), Batch.packed([2]), cache)
    with pytest.raises(ValueError, match=r"needs that cache"):
        model.step(torch.ones(2, dtype=torch.int64), cache.batch([2]))
    other = model.new_cache(1, 16)
    model(torch.ones(1, 2, dtype=torch.int64), other)
    with pytest.raises(ValueError, match="not made by this cache"):
        model.step(torch.ones(2, dtype=torch.int64), cache.batch([2]), other)
    with pytest.raises(TypeError, match="q_lens must be whole numbers"):
        cache.batch([1.7])


def test_a_step_that_fails_does_not_pass_for_done(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step wrote into rings before it failed: the sequence must be begun again, and says so."""
    cache = model.new_cache(1, 64)
    model(torch.ones(1, 20, dtype=torch.int64), cache)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.layers[2], "ffn", fail)
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1, 20, dtype=torch.int64), cache)
    assert cache.lengths == (20,)
    with pytest.raises(
        ValueError, match=r"sequence 0, 20 tokens and 1 new ones: was left in the middle.*; call truncate\(0, 0\)"
    ):
        model(torch.ones(1, 1, dtype=torch.int64), cache)
    cache.truncate(0)
    start_again(model, cache)


def start_again(model: Model, cache: Cache) -> None:
    given = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(2))
    got = torch.cat([model(part, cache) for part in given.split([9, 1, 2], 1)], 1)
    torch.testing.assert_close(got, model(given), atol=1e-5, rtol=0)


def test_a_first_step_that_fails_leaves_a_new_sequence(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.new_cache(1, 64)
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[2], "ffn", None)
        with pytest.raises(TypeError):
            model(torch.ones(1, 40, dtype=torch.int64), cache)
    start_again(model, cache)


def test_a_failed_step_within_the_rollback_budget_can_be_repeated(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = torch.randint(96, (1, 31), generator=torch.Generator().manual_seed(1))
    want = model(given)
    cache = model.new_cache(1, 64, rollback=1)
    model(given[:, :30], cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.head, "ops", None)
        with pytest.raises(AttributeError):
            model(given[:, 30:], cache)
    torch.testing.assert_close(model(given[:, 30:], cache), want[:, 30:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.truncate(1.5),
        lambda c: c.truncate(True),
        lambda c: c.truncate(0, True),
        lambda c: c.truncate(0, -1),
        lambda c: c.fork(0, True),
        lambda c: c.fork(0.0, 1),
        lambda c: c.fork(0, 2),
        lambda c: c.batch([1, 1], torch.tensor([0, 0])),
        lambda c: c.batch([1, 1], padding=1.5),
    ],
)
def test_only_whole_numbers_name_sequences_and_lengths(model: Model, call: Callable[[Cache], object]) -> None:
    cache = model.new_cache(2, 16)
    model(torch.ones(2, 3, dtype=torch.int64), cache)
    with pytest.raises(ValueError):
        call(cache)
    with pytest.raises(TypeError, match="q_lens must be whole numbers, got bool"):
        cache.batch([True, True])
    assert cache.lengths == (3, 3)


def test_caches_and_plans_belong_to_their_model(model: Model, small_model: Callable[..., Model]) -> None:
    other, tokens = small_model(sliding_window=20), torch.ones(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="made by another model"):
        other(tokens[None], model.new_cache(1, 16))
    batch = Batch.packed([5])
    model.step(tokens, batch)
    with pytest.raises(ValueError, match="planned by another model"):
        other.step(tokens, batch)


def test_a_cache_made_in_inference_mode_works_outside(model: Model) -> None:
    given = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        cache = model.new_cache(1, 16)
        model(given[:, :7], cache)
    torch.testing.assert_close(model(given[:, 7:], cache), model(given)[:, 7:], atol=1e-5, rtol=0)


def test_steps_with_a_cache_build_no_graph(small_model: Callable[..., Model]) -> None:
    model = small_model()
    for weight in model.weights.values():
        data = weight.data
        if data.is_floating_point():
            data.requires_grad_()
    tokens = torch.ones(1, 5, dtype=torch.int64)
    assert model(tokens).requires_grad
    assert not model(tokens, model.new_cache(1, 8)).requires_grad


def test_wrong_rows_leave_the_cache_as_it_was(model: Model) -> None:
    cache = model.new_cache(1, 16)
    for rows in ([9], [0, -1]):
        with pytest.raises(ValueError, match="of a step of 3 tokens"):
            model.step(torch.ones(3, dtype=torch.int64), cache.batch([3]), cache, rows=torch.tensor(rows))
    assert model(torch.ones(1, 2, dtype=torch.int64), cache).isfinite().all()


def test_positions_beyond_the_model(model: Model) -> None:
    with pytest.raises(ValueError, match="4097 tokens exceed the model's 4096 positions"):
        model(torch.ones(1, 4097, dtype=torch.int64))
