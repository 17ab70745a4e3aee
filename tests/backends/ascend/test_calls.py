"""Calls at the widths of the published models: each reaches the operators it should, and agrees with the reference."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend import Ascend
from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.emulator import call
from dsv4_hal.backends.reference import Reference
from dsv4_hal.batch import cos_sin
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.formats import FORMATS, QTensor, Weight, quantize
from dsv4_hal.numerics import numerics_for

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def both(torch_npu: ModuleType, soc: Soc) -> tuple[Resolved, Resolved]:
    numerics = numerics_for(soc.mode)
    return resolve([Ascend(numerics), Reference(numerics)]), resolve([Reference(numerics)])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Emulated operators that are called from here on."""
    seen: Counter[str] = Counter()

    def checked(table: object, made: call.Call) -> list[object]:
        seen[made.op] += 1
        return list(broken(table, made))  # type: ignore[arg-type]

    broken = call.broken
    monkeypatch.setattr(call, "broken", checked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here may run on torch's own ops
        yield seen


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(ops: Resolved, name: str, *shape: int) -> Weight:
    q = quantize(normal(*shape, dtype=torch.float32, seed=1) * shape[-1] ** -0.5, FORMATS[name])
    return ops.repack(Weight(q.data, q.scale, q.format, "w"))


def close(a: Tensor, b: Tensor) -> None:
    """To the last bit of bfloat16."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=2**-7 * float(b.float().abs().max()))


FP8 = {"a3": ("int8_channel", "npu::npu_dynamic_quant"), "a5": ("e4m3_128x128", "npu::npu_dynamic_mx_quant")}


def test_linear(both: tuple[Resolved, Resolved], soc: Soc, called: Counter[str]) -> None:
    (ops, reference), (name, quantiser) = both, FP8[soc.mode]
    x = normal(3, 4096)
    y = ops.linear(x, weight(ops, name, 512, 4096))
    assert called == Counter([quantiser, "npu::npu_quant_matmul"])
    close(y, reference.linear(x, weight(reference, name, 512, 4096)))


def test_linear_of_rows_that_are_quantised(both: tuple[Resolved, Resolved], soc: Soc, called: Counter[str]) -> None:
    (ops, reference), (name, _) = both, FP8[soc.mode]
    activation = ops.numerics.activation
    assert activation is not None
    x: QTensor = quantize(normal(3, 256), activation)
    y = ops.linear(x, weight(ops, name, 128, 256))
    assert called == Counter(["npu::npu_quant_matmul"])
    close(y, reference.linear(x, weight(reference, name, 128, 256)))


EXPERTS = {
    "a3": {"int8_channel": "npu::npu_dynamic_quant", "int4_channel": "npu::npu_dynamic_quant", "bf16": ""},
    "a5": {"mxfp4": "npu::npu_dynamic_mx_quant", "e4m3_128x128": "npu::npu_dynamic_mx_quant", "bf16": ""},
}


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_grouped_linear(both: tuple[Resolved, Resolved], soc: Soc, called: Counter[str], kind: int) -> None:
    (ops, reference), (name, quantiser) = both, list(EXPERTS[soc.mode].items())[kind]
    x, offsets = normal(6, 512), torch.tensor([0, 2, 2, 5, 6])
    with torch.inference_mode():
        w = weight(ops, name, 4, 256, 512)
        called.clear()  # of what arranged the weight
        y = ops.grouped_linear(x, w, offsets)
    assert called == Counter(filter(None, [quantiser, "npu::npu_grouped_matmul"]))
    close(y, reference.grouped_linear(x, weight(reference, name, 4, 256, 512), offsets))


def test_the_output_projection(both: tuple[Resolved, Resolved], called: Counter[str]) -> None:
    ops, reference = both
    x = normal(2, 8, 4096)
    y = ops.block_diagonal_linear(x, weight(ops, "bf16", 8, 128, 4096))
    assert called == Counter(["npu::npu_transpose_batchmatmul"])
    close(y, reference.block_diagonal_linear(x, weight(reference, "bf16", 8, 128, 4096)))


def test_streams(both: tuple[Resolved, Resolved], soc: Soc, called: Counter[str]) -> None:
    ops, reference = both
    x, fn = normal(3, 4, 4096), normal(24, 4 * 4096, dtype=torch.float32) / 128
    base, scale = normal(24, dtype=torch.float32), normal(3, dtype=torch.float32)
    got = ops.hc_pre(x, fn, base, scale, 20, 1e-6, 1e-6)
    streams = ops.hc_post(got[0], x, got[1], got[2])
    assert called == Counter(
        {
            "a3": ["_C_ascend::npu_hc_pre_v2", "_C_ascend::npu_hc_post"],
            "a5": ["npu::npu_mhc_pre", "npu::npu_mhc_sinkhorn", "npu::npu_mhc_post"],
        }[soc.mode]
    )
    for found, wanted in zip(got, reference.hc_pre(x, fn, base, scale, 20, 1e-6, 1e-6), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-5)
    close(streams, reference.hc_post(got[0], x, got[1], got[2]))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("heads", [(), (64,)])
def test_rope(both: tuple[Resolved, Resolved], called: Counter[str], heads: tuple[int, ...], inverse: bool) -> None:
    ops, reference = both
    tables = cos_sin(torch.tensor([7, 100_000]), torch.logspace(0, -4, 32), torch.float32)
    x = normal(2, *heads, 512)
    kept = x.clone()
    y = ops.rope(x, tables, inverse)
    assert called == Counter(["_C_ascend::inplace_partial_rotary_mul"])
    assert torch.equal(x, kept), "the operator writes in place, the op may not"
    close(y, reference.rope(x, tables, inverse))


def test_rope_without_vllm_ascend(both: tuple[Resolved, Resolved], called: Counter[str]) -> None:
    ops, reference = both
    tables = cos_sin(torch.tensor([7, 100_000]), torch.logspace(0, -4, 32), torch.float32)
    x = normal(2, 4, 128, dtype=torch.float32)  # float32 rows, which vllm-ascend's callers do not have
    y = ops.rope(x, tables)
    assert called == Counter(["npu::npu_rotary_mul"])
    torch.testing.assert_close(y, reference.rope(x, tables))


def test_experts(both: tuple[Resolved, Resolved], soc: Soc, called: Counter[str]) -> None:
    ops, reference = both
    ids = torch.tensor([[3, 1], [1, 0], [0, 3]])
    rows, offsets, order = ops.permute(normal(3, 128), ids, 5)
    hidden = ops.swiglu(normal(4, 256) * 4, 2.0, torch.rand(4, generator=torch.Generator().manual_seed(2)))
    swiglu = {"a3": "npu::npu_clipped_swiglu", "a5": "npu::npu_swiglu"}[soc.mode]
    assert called == Counter(["npu::npu_moe_init_routing_v2", swiglu])
    for found, wanted in zip((rows, offsets, order), reference.permute(normal(3, 128), ids, 5), strict=True):
        assert torch.equal(found, wanted)
    close(
        hidden,
        reference.swiglu(normal(4, 256) * 4, 2.0, torch.rand(4, generator=torch.Generator().manual_seed(2))),
    )


def test_rms_norm(both: tuple[Resolved, Resolved], called: Counter[str]) -> None:
    ops, reference = both
    x, gain = normal(3, 4096), normal(4096, dtype=torch.float32)
    y = ops.rms_norm(x, gain, 1e-6)
    assert called == Counter(["npu::npu_rms_norm"])
    close(y, reference.rms_norm(x, gain, 1e-6))
    ops.rms_norm(x, None, 1e-6)
    assert sum(called.values()) == 1, "the query norm is rounded at every step, which no operator does"


def test_a_width_that_no_operator_takes_is_said(both: tuple[Resolved, Resolved]) -> None:
    ops, reference = both
    y, x, post, comb = normal(2, 24), normal(2, 3, 24), normal(2, 3), normal(2, 3, 3)
    with pytest.warns(UserWarning, match="ascend: hc_post runs on torch's own ops here: .*streams 3, not 4"):
        streams = ops.hc_post(y, x, post.float(), comb.float())
    assert torch.equal(streams, reference.hc_post(y, x, post.float(), comb.float()))


def test_strict_accepts_what_no_operator_computes(both: tuple[Resolved, Resolved], soc: Soc) -> None:
    refused = {r.op: r.fallback for r in both[0].resolutions if r.fallback}
    assert not {"route", "unpermute", "hadamard", "hc_head", "embedding", "quantize"} & set(refused)
