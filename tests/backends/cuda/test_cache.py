"""What the contract's cases do not see of cache rows: layouts by profile, steps of a fixed shape, unusual widths."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.reference import Reference
from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import resolve
from dsv4_hal.formats import FORMATS, Weight, new_pool, plain_format, plain_rows
from dsv4_hal.numerics import deployed, exact
from dsv4_hal.ops import KV, CompressorWeights, ContractError


def test_layouts_follow_the_profile():
    wide, narrow = Cuda(deployed()), Cuda(exact())
    assert wide.row_layout("window", 512, 64, 1, 128).name == "flashmla"
    assert wide.row_layout("entries", 512, 64, 4).name == "flashmla"
    assert wide.row_layout("index", 128, 0, 4).name == "index_fp4"
    for backend, kind, dim, rope, ratio in (
        (wide, "entries", 96, 64, 4),  # 32 channels fill no block
        (wide, "entries", 64, 64, 4),
        (wide, "index", 48, 0, 4),
        (narrow, "window", 512, 64, 1),
        (narrow, "index", 128, 0, 4),
    ):
        window = 8 if ratio == 1 else 0
        want = Reference(backend.numerics).row_layout(kind, dim, rope, ratio, window)
        assert backend.row_layout(kind, dim, rope, ratio, window) == want
    with pytest.raises(ValueError, match="unknown kind"):
        wide.row_layout("keys", 512, 64, 4)


def compressor(dim: int, ratio: int, inputs: int) -> CompressorWeights:
    def plain() -> Weight:
        return Weight(torch.randn(2 * dim, inputs), None, plain_format(torch.float32))

    return CompressorWeights(plain(), plain(), torch.randn(ratio, 2 * dim), torch.randn(dim))


@pytest.mark.parametrize("rotate", [False, True])
def test_a_step_of_fixed_shape_stores_what_it_completes_and_nothing_else(rotate):
    """Of three sequences, the first and the last complete an entry."""
    ops = resolve([Cuda(exact())])
    layout, weights, x = ops.row_layout("entries", 16, 4, 4), compressor(16, 4, 8), torch.randn(3, 8)
    state, table = torch.randn(3, 8, 2, 32), np.arange(3)[:, None]
    pools = []
    for fixed in (False, True):
        given = {"slots": np.arange(3), "token_table": table, "window_table": table, "fixed": fixed}
        batch = ops.plan(Batch(np.array([1, 1, 1]), np.array([3, 1, 7]), ops.device, **given), {4: True}, {})
        count = batch.require_plan().entries[4].count
        assert count == (3 if fixed else 2)
        tables = torch.full((count, 2), 0.6), torch.full((count, 2), 0.8)
        pool = KV(new_pool(layout, 3, 64).fill_(0xFF), layout, 64)
        ops.compress_store(x, weights, layout, batch, True, state.clone(), tables, 1e-6, pool, rotate)
        pools.append(pool.data)
    assert torch.equal(*pools)
    written = (pools[0].view(3, 64, 64) != 0xFF).any(-1)
    assert written.nonzero().tolist() == [[0, 0], [2, 1]]


@pytest.mark.parametrize(
    "layout",
    [
        plain_rows(9, 2, 1, 8, torch.float32),  # pairs of rotary channels that begin at an odd one
        plain_rows(12, 2, 1, 8, torch.float32, FORMATS["int4_channel"]),
        plain_rows(12, 4, 1, 8, torch.float32, FORMATS["fp16"]),
    ],
    ids=["odd", "int4", "fp16"],
)
def test_rows_that_the_kernel_does_not_know_are_stored_all_the_same(layout):
    x, weight, tables = torch.randn(3, layout.dim), torch.randn(layout.dim), (torch.rand(3, 2), torch.rand(3, 2))
    found = []
    for backend in (Cuda(exact()), Reference(exact())):
        ops = resolve([backend])
        batch = ops.plan(Batch.packed([3]), {}, {})
        found.append(ops.kv_norm_rope_store(x, weight, 1e-6, tables, layout, batch, None).data)
    torch.testing.assert_close(*found)


def test_composites_refuse_what_their_parts_would():
    ops = resolve([Cuda(exact())])
    layout, weights, x = ops.row_layout("entries", 16, 4, 4), compressor(16, 4, 8), torch.randn(8, 8)
    batch = ops.plan(Batch.packed([8]), {4: True}, {})
    tables = torch.zeros(2, 2), torch.zeros(2, 2)
    assert ops.compress_store(x, weights, layout, batch, True, None, tables, 1e-6, None, True).data.shape == (2, 16)
    for wrong in (
        {"x": x[:, 1:]},
        {"x": x.double()},
        {"weights": weights._replace(ape=torch.zeros(3, 32))},
        {"weights": weights._replace(norm=torch.zeros(15))},
        {"state": torch.zeros(1, 8, 2, 32)},
        {"cos_sin": (tables[0][1:], tables[1][1:])},
        {"layout": ops.row_layout("entries", 18, 4, 4)},
    ):
        given = {"x": x, "weights": weights, "layout": layout, "state": None, "cos_sin": tables} | wrong
        with pytest.raises(ContractError):
            ops.compress_store(**given, batch=batch, overlap=True, eps=1e-6, pool=None, rotate=True)
    rows, window = torch.randn(8, 16), ops.row_layout("window", 16, 4, 1, 8)
    tables = torch.zeros(8, 2), torch.zeros(8, 2)
    for wrong in ({"kv": rows[1:]}, {"weight": torch.zeros(15)}, {"cos_sin": (tables[0], tables[1][1:])}):
        given = {"kv": rows, "weight": torch.zeros(16), "cos_sin": tables} | wrong
        with pytest.raises(ContractError):
            ops.kv_norm_rope_store(**given, eps=1e-6, layout=window, batch=batch, pool=None)
    streams, fn = torch.randn(2, 2, 8), torch.randn(8, 16)
    with pytest.raises(ContractError):
        ops.hc_pre_norm(streams, fn, torch.zeros(8), torch.zeros(3), 0, 1e-6, 1e-6, torch.zeros(8))
    with pytest.raises(ContractError):
        ops.hc_pre_norm(streams, fn, torch.zeros(8), torch.zeros(3), 1, 1e-6, 1e-6, torch.zeros(7))
