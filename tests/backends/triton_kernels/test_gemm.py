"""Matrix products in kernels: what the contract's cases do not ask. Interpreted."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

import triton.language as tl

from dsv4_hal.backends.cuda.devices import ARCHS
from dsv4_hal.backends.cuda.tiles import EXPERTS, GEMM
from dsv4_hal.backends.triton_kernels import gemm, quantize
from dsv4_hal.backends.triton_kernels.runtime import launch
from dsv4_hal.formats import FORMATS, QTensor, dequantize
from dsv4_hal.formats import quantize as stored


def units(name: str = "sm_90") -> gemm.Units:
    return gemm.Units(ARCHS[name].fp8, ARCHS[name].products, ARCHS[name].scaled, GEMM[name])


def whole(*shape: int) -> torch.Tensor:
    """Whole numbers that every format holds, whose sums are exact in whatever order."""
    x = torch.randint(-2, 3, shape).float()
    x[..., ::32] = 4.0  # of every block's largest magnitude, and so its scale
    return x


def activation(x: torch.Tensor) -> QTensor:
    return quantize.encode(x, FORMATS["e4m3_1x128"])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["e4m3_128x128", "mxfp4"])
def test_every_architecture_computes_the_same(arch, name):
    x, w = whole(3, 160), stored(whole(40, 160), FORMATS[name])
    got = gemm.matmul(activation(x), w, torch.empty(3, 40, dtype=torch.bfloat16), units(arch))
    assert torch.equal(got, (x @ dequantize(w).T).bfloat16())


@pytest.mark.parametrize("name", ["bf16", "e4m3_128x128_fp32", "mxfp4", "int4_channel"])
def test_a_row_is_multiplied_alike_alone_and_in_a_batch(name):
    x, w = torch.randn(131, 96, dtype=torch.bfloat16), stored(torch.randn(40, 96), FORMATS[name])
    x = x if name == "bf16" else activation(x)
    many = gemm.matmul(x, w, torch.empty(131, 40), units())
    for row in (0, 130):
        one = (
            x[row : row + 1]
            if isinstance(x, torch.Tensor)
            else replace(x, data=x.data[row : row + 1], scale=x.scale[row : row + 1])
        )
        assert torch.equal(gemm.matmul(one, w, torch.empty(1, 40), units()), many[row : row + 1])


def test_experts_without_rows_are_not_read():
    counts = torch.tensor([0, 2, 0, 0, 65, 1, 0])
    w = whole(len(counts), 24, 64).bfloat16()
    w[counts == 0] = float("nan")
    x, offsets = whole(68, 64).bfloat16(), torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    tiles = {**GEMM["sm_90"], "plain": {**GEMM["sm_90"]["plain"], "BM": 16}}
    got = gemm.matmul(x, QTensor(w, None, FORMATS["bf16"]), torch.empty(68, 24), replace(units(), tiles=tiles), offsets)
    expert = torch.repeat_interleave(torch.arange(len(counts)), counts)
    assert torch.equal(got, torch.einsum("mk,mnk->mn", x.float(), w[expert].float()))


def test_there_are_row_tiles_enough_and_not_many_more():
    for size in (16, 64):
        for _ in range(50):
            counts = torch.randint(0, 2 * size, (int(torch.randint(1, 9, ())),))
            needed = int(((counts + size - 1) // size).sum())
            assert needed <= gemm.row_tiles(int(counts.sum()), len(counts), size) <= needed + len(counts)
    assert gemm.row_tiles(6, 384, 64) == 6  # a token's experts have one each


def test_float8_is_multiplied_as_it_is_only_where_sums_keep_their_bits():
    x, w = activation(torch.randn(1, 128)), stored(torch.randn(16, 128), FORMATS["e4m3_128x128"])
    assert gemm.constants(x, w, units("sm_100"))["OPERAND"] == tl.float8e4nv
    assert gemm.constants(x, w, units("sm_90"))["OPERAND"] == tl.bfloat16
    assert gemm.constants(x, w, units("sm_80"))["OPERAND"] == tl.bfloat16


@pytest.mark.parametrize(("name", "groups"), [("bf16", 1), ("e4m3_128x128", 1), ("mxfp4", 1), ("bf16", 2)])
def test_splits_add_up_alike_wherever_they_are_added(monkeypatch, name, groups):
    """Few rows: a program for every split, and another kernel adds. Many: one program adds."""
    monkeypatch.setattr(gemm, "PROGRAMS", 4)
    launched = []
    monkeypatch.setattr(gemm, "launch", lambda kernel, *a, **o: (launched.append(kernel), launch(kernel, *a, **o)))
    grouped = (groups,) if groups > 1 else ()
    w = stored(torch.randn(*grouped, 40, 1088), FORMATS[name])
    x = torch.randn(600, *grouped, 1088, dtype=torch.bfloat16)
    x = x if name == "bf16" else activation(x)

    def made(rows: int) -> torch.Tensor:
        some = x[:rows] if isinstance(x, torch.Tensor) else replace(x, data=x.data[:rows], scale=x.scale[:rows])
        return gemm.matmul(some, w, torch.empty(rows, *grouped, 40), units())

    many = made(600)
    assert len(launched) == 1
    assert torch.equal(made(3), many[:3]) and len(launched) == 3


def test_chains_of_float32_are_short(monkeypatch):
    cut = []
    monkeypatch.setattr(gemm, "launch", lambda *a, **o: cut.append((o.get("SPLIT"), o.get("SPREAD"))))
    w, x = torch.randn(2, 16, 1100), torch.randn(2, 1100)
    for weight, offsets in ((w[0], None), (w, torch.tensor([0, 1, 2]))):
        gemm.matmul(x, QTensor(weight, None, FORMATS["fp32"]), torch.empty(2, 16), units(), offsets)
    assert cut == [(512, True), (None, None), (512, False)]  # the second adds the splits of the first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrices_without_rows_or_columns(dtype):
    for n, k in ((0, 64), (16, 0)):
        w = QTensor(torch.ones(n, k, dtype=dtype), None, FORMATS["bf16" if dtype == torch.bfloat16 else "fp32"])
        got = gemm.matmul(torch.ones(3, k, dtype=dtype), w, torch.full((3, n), 7.0), units())
        assert torch.equal(got, torch.zeros(3, n))


def test_scales_beyond_float16_are_not_folded_into_it():
    x, w = torch.ones(1, 32, dtype=torch.float16), stored(torch.full((16, 32), 2.0**-40), FORMATS["mxfp4"])
    got = gemm.matmul(x, w, torch.empty(1, 16), units())
    assert torch.equal(got, torch.full((1, 16), 32 * 2.0**-40))


def test_every_architecture_has_tiles_of_every_kind_it_needs():
    for table in (GEMM, EXPERTS):
        assert table.keys() == ARCHS.keys()
        for name, kinds in table.items():
            assert {"plain", "widened", "float32"} <= kinds.keys()
            assert "float8" in kinds or not ARCHS[name].products
            assert "scaled" in kinds or not ARCHS[name].scaled
            assert all(128 % tile["BK"] == 0 for tile in kinds.values())
