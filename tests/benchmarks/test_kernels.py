"""The catalogue calls every op, costs are those that can be worked out by hand, and the table notices a change."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernel_calls
import kernel_table
from kernel_costs import cost, hit
from kernels import Kernel, merged

from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.triton_kernels import runtime
from dsv4_hal.batch import Batch, make_plan
from dsv4_hal.formats import FORMATS, Weight, plain_rows
from dsv4_hal.model.config import preset
from dsv4_hal.numerics import deployed, exact
from dsv4_hal.ops import KV, OPS


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels launched on the meta device, instead of compiled."""
    seen: Counter[str] = Counter()
    monkeypatch.setattr(runtime, "on_meta", lambda kernel, grid, *args, **options: seen.update([kernel.__name__]))
    return seen


@pytest.mark.parametrize("mode", ["deployed", "exact"])
def test_every_op_is_called(mode: str, launched: Counter[str]) -> None:
    calls = kernel_calls.calls("v4-tiny", mode, [])
    assert [(c.step, c.op, c.error) for c in calls if c.error] == []
    composite = {op for op, spec in OPS.items() if spec.composite and Cuda.origin(op).kind != "native"}
    unused = {"plan", "state_new"} | ({"hadamard"} if mode == "exact" else set())
    assert {c.op for c in calls} == set(OPS) - composite - unused
    assert {c.step for c in calls} == {*kernel_calls.STEPS, "alone"}
    for call in calls:
        spent = cost(call.op, call.inputs, call.result, deployed() if mode == "deployed" else exact())
        assert spent.moved > 0 and all(count >= 0 for count in spent.flops.values()), call.op


def test_every_kernel_is_launched(launched: Counter[str]) -> None:
    for model in ("v4-tiny", "v4-flash"):  # few tokens and few experts take other ways
        kernel_calls.calls(model, "deployed", [])
    folder = Path(runtime.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    assert set(launched) == {name for text in sources for name in re.findall(r"launch\(\s*(_\w+),", text)}


def test_calls_of_a_step_are_counted(launched: Counter[str]) -> None:
    outer: Counter[str] = Counter()
    for call in kernel_calls.calls("v4-tiny", "deployed", [], ["decode"]):
        outer[call.op] += call.count * (call.step == "decode" and not call.part)
    ratios = preset("v4-tiny").layer_ratios
    assert outer["embedding"] == outer["hc_head"] == 1
    assert (outer["sparse_attention"], outer["index_topk"]) == (len(ratios), ratios.count(4))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(name: str, *shape: int) -> Weight:
    fmt = FORMATS[name]
    scale = None if fmt.plain else torch.empty(fmt.scale_shape(shape), dtype=fmt.scale_dtype, device="meta")
    return Weight(empty(*fmt.data_shape(shape), dtype=fmt.storage), scale, fmt)


def test_cost_of_products() -> None:
    x, w = empty(4, 256), weight("e4m3_128x128", 128, 256)
    spent = cost("linear", {"x": x, "w": w, "out_dtype": None, "out": None}, empty(4, 128), deployed())
    assert spent.flops == {"fp8": 2 * 4 * 256 * 128}
    assert spent.moved == 4 * 256 * 2 + (128 * 256 + 2) + 4 * 128 * 2
    plain = cost("linear", {"x": x, "w": weight("bf16", 128, 256)}, empty(4, 128), deployed())
    assert list(plain.flops) == ["bf16"]
    experts = weight("mxfp4", 8, 64, 32)
    given = {"rows": empty(3, 32), "w": experts, "offsets": empty(9, dtype=torch.int64)}
    spent = cost("grouped_linear", given, empty(3, 64), deployed())
    assert spent.flops == {"fp8": 2 * 3 * 64 * 32}
    assert spent.moved == pytest.approx(3 * 32 * 2 + 9 * 8 + experts.nbytes * hit(3, 8) / 8 + 3 * 64 * 2)
    assert hit(1, 8) == pytest.approx(1) and hit(1000, 8) == pytest.approx(8)


def test_cost_of_attention() -> None:
    batch = Batch.packed([10, 3], "meta")
    batch.plan = make_plan(batch, {4: True}, {}, torch.float32)
    window = KV(empty(13, 64), plain_rows(64, 0, 1, 8, torch.bfloat16))
    entries = KV(empty(2, 64), plain_rows(64, 0, 4, 0, torch.bfloat16))
    given = {"q": empty(13, 2, 64), "window_kv": window, "batch": batch, "entries": entries, "picks": None}
    spent = cost("sparse_attention", given, (empty(13, 2, 64), None), deployed())
    keys = sum(min(p + 1, 8) + (p + 1) // 4 for p in (*range(10), *range(3)))
    assert spent.flops == {"bf16": 4 * keys * 2 * 64}
    assert spent.moved == 2 * (13 * 2 * 64 * 2) + (13 + 2) * 64 * 2


def kernel(**changes: Any) -> Kernel:
    names = {"kernel": "gemm", "target": "sm_90", "key": "key", "constants": {"BLOCK": "64"}, "types": {"x": "*bf16"}}
    sizes = {"warps": 4, "stages": 3, "shared": 1024, "tensor": 0, "registers": 64, "spilled": 0, "stack": 0}
    more = {"dots": True, "matrix": ("wgmma e4m3",), "grid": (2, 1), "seconds": 0.5}
    return Kernel(**names | sizes | more | {"used": [("v4-flash", "deployed", "prefill", "linear")]} | changes)


def result(**changes: Any) -> dict[str, Any]:
    call = {"model": "v4-flash", "mode": "deployed", "step": "decode", "op": "linear", "part": False, "count": 2}
    call |= {"shape": "4x8", "kernels": ["gemm"], "flops": {"fp8": 1979e6}, "bytes": 10.0}
    return {
        "task": {"target": "sm_90", "model": "v4-flash", "mode": "deployed", "steps": ["decode"]},
        "calls": [call | changes],
    }


def test_the_table_notices_a_change() -> None:
    text = kernel_table.page([kernel()], [result()])
    assert "| `gemm` | linear | 1 | 64 | 1024 | 0 | 0 | wgmma e4m3 |" in text
    assert "| linear | 4x8 | `gemm` | 2 | 1.98 G | 10 | 1 |" in text
    assert "| all calls |  |  | 2 |  |  | 2 |" in text
    assert kernel_table.differences(text, [kernel()], [result()]) == []
    changed = kernel_table.differences(text, [kernel(registers=65)], [result()])
    assert len(changed) == 2 and all("'## sm_90, mode deployed'" in line for line in changed)
    assert any(
        "no section '## sm_100, mode deployed'" in d
        for d in kernel_table.differences(text, [kernel(target="sm_100")], [result()])
    )
    assert kernel_table.differences(text.replace("triton", "a"), [kernel()], [])


def test_the_same_code_is_one_kernel_with_all_its_users() -> None:
    first, second = kernel(grid=(2, 7)), kernel(grid=(9,), used=[("v4-pro", "deployed", "decode", "mlp")])
    (one,) = merged({"kernels": [vars(k)]} for k in (first, second))
    assert one.grid == (9, 7) and one.decode and len(one.used) == 2
