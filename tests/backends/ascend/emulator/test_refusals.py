"""Calls that are wrong on purpose, and which of three layers refuses each: the real schema, the operator's real meta
kernel, or a rule of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import SOCS, Soc
from dsv4_hal.backends.ascend.emulator.rules import Refused

BF16, FP16, I8, I32, U8 = torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.uint8
FP8 = torch.float8_e4m3fn
E8M0 = 293
A3, A5 = ("ascend910_93",), ("ascend950",)
Layer = Callable[[pytest.ExceptionInfo[BaseException]], str]


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


@dataclass(frozen=True)
class Wrong:
    """what is wrong; the layer that says so; the call; and where: the SoCs, or all."""

    what: str
    layer: str
    call: Callable[[Any], object]
    socs: tuple[str, ...] = tuple(SOCS)


def int8(npu: Any, **changes: Any) -> object:
    given = {"x1": ones(4, 64, dtype=I8), "x2": ones(64, 8, dtype=I8), "scale": ones(8), "pertoken_scale": ones(4)}
    return npu.npu_quant_matmul(**given | {"output_dtype": BF16} | changes)


def mxfp8(npu: Any, **changes: Any) -> object:
    given = {
        "x1": ones(4, 64, dtype=FP8),
        "x2": ones(64, 8, dtype=FP8),
        "scale": ones(1, 8, 2, dtype=U8),
        "pertoken_scale": ones(4, 1, 2, dtype=U8),
        "scale_dtype": E8M0,
        "pertoken_scale_dtype": E8M0,
        "group_sizes": [1, 1, 32],
    }
    return npu.npu_quant_matmul(**given | {"output_dtype": BF16} | changes)


def grouped(npu: Any, x: Tensor | None = None, weight: Tensor | None = None, **changes: Any) -> object:
    rows = ones(4, 64, dtype=BF16) if x is None else x
    matrices = ones(2, 64, 8, dtype=BF16) if weight is None else weight
    given = {"group_list": torch.tensor([1, 4]), "split_item": 2, "group_type": 0, "group_list_type": 0}
    return npu.npu_grouped_matmul([rows], [matrices], **given | changes)


def routing(npu: Any, experts: Tensor, **changes: Any) -> object:
    given = {"expert_num": 4, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    return npu.npu_moe_init_routing_v2(ones(2, 8, dtype=BF16), experts, **given | changes)


def hyper(npu: Any, **changes: Any) -> object:
    given = {"x": ones(3, 4, 32, dtype=BF16), "phi": ones(24, 128), "alpha": ones(3), "bias": ones(24)}
    return npu.npu_mhc_pre(**given | changes)


def rope(npu: Any, **changes: Any) -> object:
    given = {"input": ones(1, 4, 2, 8), "r1": ones(1, 4, 1, 8), "r2": ones(1, 4, 1, 8), "rotary_mode": "interleave"}
    return npu.npu_rotary_mul(**given | changes)


EXPERTS = torch.tensor([[0, 1], [2, 3]])
CALLS = (
    # the schema
    Wrong("an argument that does not exist", "schema", lambda n: int8(n, block_size=32)),
    Wrong("a required argument missing", "schema", lambda n: n.npu_rms_norm(ones(2, 8))),
    Wrong("a tensor where a list is wanted", "schema", lambda n: n.npu_grouped_matmul(ones(4, 8), ones(8, 8))),
    Wrong("a string where a number is wanted", "schema", lambda n: n.npu_rms_norm(ones(2, 8), ones(8), "1e-6")),
    Wrong("a keyword given by place", "schema", lambda n: n.npu_dynamic_quant(ones(2, 8, dtype=BF16), None, None)),
    Wrong("a number where a tensor is wanted", "schema", lambda n: n.npu_swiglu(1.0)),
    Wrong("an operator that does not exist", "schema", lambda n: n.npu_sparse_attn_sharedkv(ones(2, 8))),
    # the meta kernel
    Wrong("INT8 with a K of another length", "meta", lambda n: int8(n, x2=ones(65, 8, dtype=I8))),
    Wrong("as many scales as neither one nor N", "meta", lambda n: int8(n, scale=ones(5))),
    Wrong(
        "bfloat16 scales for a float16 result", "meta", lambda n: int8(n, scale=ones(8, dtype=BF16), output_dtype=FP16)
    ),
    Wrong("a group size that nobody knows", "meta", lambda n: mxfp8(n, group_sizes=[1, 1, 48]), A5),
    Wrong("float32 bytes called E8M0", "meta", lambda n: mxfp8(n, scale=ones(1, 8, 2)), A5),
    Wrong("an MX block of 48", "meta", lambda n: n.npu_dynamic_mx_quant(ones(2, 96, dtype=BF16), block_size=48), A5),
    Wrong("FP4 of an odd number of channels", "meta", lambda n: n.npu_dynamic_mx_quant(ones(2, 33, dtype=BF16)), A5),
    Wrong(
        "a table of another number of choices",
        "meta",
        lambda n: n.npu_moe_gating_top_k(
            ones(2, 8), 2, input_ids=torch.arange(2), tid2eid=torch.zeros(4, 3, dtype=I32)
        ),
    ),
    Wrong(
        "ids of another number of tokens",
        "meta",
        lambda n: n.npu_moe_gating_top_k(
            ones(2, 8), 2, input_ids=torch.arange(3), tid2eid=torch.zeros(4, 2, dtype=I32)
        ),
    ),
    Wrong("experts of another number of tokens", "meta", lambda n: routing(n, EXPERTS[:1].int())),
    Wrong("five streams", "meta", lambda n: n.npu_mhc_sinkhorn(ones(3, 5, 5)), A5),
    Wrong("no Sinkhorn iteration", "meta", lambda n: n.npu_mhc_sinkhorn(ones(3, 4, 4), num_iters=0), A5),
    Wrong(
        "a permutation that is none of the two",
        "meta",
        lambda n: n.npu_transpose_batchmatmul(ones(2, 3, 8), ones(2, 8, 4), perm_x1=[2, 0, 1]),
    ),
    Wrong("groups along an axis that is not one", "meta", lambda n: grouped(n, group_type=3)),
    # the rules
    Wrong("a grouped K of another length", "rule", lambda n: grouped(n, weight=ones(2, 65, 8, dtype=BF16))),
    Wrong("groups of more rows than there are", "rule", lambda n: grouped(n, group_list=torch.tensor([1, 5]))),
    Wrong("groups that go down", "rule", lambda n: grouped(n, group_list=torch.tensor([4, 1]))),
    Wrong("groups in int32", "rule", lambda n: grouped(n, group_list=torch.tensor([1, 4], dtype=I32))),
    Wrong("groups for another number of experts", "rule", lambda n: grouped(n, group_list=torch.tensor([1, 2, 4]))),
    Wrong(
        "a grouped INT8 product without scales",
        "rule",
        lambda n: grouped(n, ones(4, 64, dtype=I8), ones(2, 64, 8, dtype=I8), output_dtype=BF16),
    ),
    Wrong(
        "grouped INT8 with float32 scales into bfloat16",
        "rule",
        lambda n: grouped(n, ones(4, 64, dtype=I8), ones(2, 64, 8, dtype=I8), scale=[ones(2, 8)], output_dtype=BF16),
        A3,
    ),
    Wrong(
        "INT4 without its compensation",
        "rule",
        lambda n: grouped(
            n,
            ones(4, 64, dtype=I8),
            ones(2, 64, 1, dtype=I32),
            scale=[ones(2, 1, 8).long()],
            per_token_scale=[ones(4)],
            group_list=torch.tensor([1, 3]),
            group_list_type=1,
            output_dtype=BF16,
        ),
    ),
    Wrong("FP8 on a SoC without it", "rule", lambda n: mxfp8(n), A3),
    Wrong(
        "FP8 out of dynamic_quant on a SoC without it",
        "rule",
        lambda n: n.npu_dynamic_quant(ones(2, 8, dtype=BF16), dst_type=292),
        A3,
    ),
    Wrong("MX quantisation on a SoC without it", "rule", lambda n: n.npu_dynamic_mx_quant(ones(2, 64, dtype=BF16)), A3),
    Wrong("hyper-connections on a SoC without them", "rule", hyper, A3),
    Wrong(
        "MX scales of K / 32",
        "rule",
        lambda n: mxfp8(n, scale=ones(2, 8, 2, dtype=U8), pertoken_scale=ones(4, 2, 2, dtype=U8)),
        A5,
    ),
    Wrong("a scale that is not in pairs", "rule", lambda n: mxfp8(n, pertoken_scale=ones(4, 1, 1, dtype=U8)), A5),
    Wrong("experts in int64", "rule", lambda n: routing(n, EXPERTS)),
    Wrong("a gamma of another dtype", "rule", lambda n: n.npu_rms_norm(ones(2, 8, dtype=BF16), ones(8))),
    Wrong("a gamma of another length", "rule", lambda n: n.npu_rms_norm(ones(2, 8), ones(7))),
    Wrong("an odd number of gated channels", "rule", lambda n: n.npu_swiglu(ones(2, 7))),
    Wrong("a layout that is not one", "rule", lambda n: rope(n, rotary_mode="interleaved")),
    Wrong("tables of another dtype", "rule", lambda n: rope(n, input=ones(1, 4, 2, 8, dtype=BF16))),
    Wrong(
        "a table that varies along two axes", "rule", lambda n: rope(n, r1=ones(1, 4, 2, 8), r2=ones(1, 4, 2, 8)), A3
    ),
    Wrong(
        "a bias of another number of experts",
        "rule",
        lambda n: n.npu_moe_gating_top_k(ones(2, 8), 2, bias=ones(7), norm_type=1),
    ),
    Wrong("a norm that does not exist", "rule", lambda n: n.npu_moe_gating_top_k(ones(2, 8), 2, norm_type=7)),
    Wrong(
        "an id that the table lacks",
        "rule",
        lambda n: n.npu_moe_gating_top_k(
            ones(1, 8), 2, input_ids=torch.tensor([4]), tid2eid=torch.zeros(4, 2, dtype=I32)
        ),
    ),
    Wrong("weights for another number of streams", "rule", lambda n: hyper(n, phi=ones(24, 64)), A5),
    Wrong("bfloat16 weights of hyper-connections", "rule", lambda n: hyper(n, phi=ones(24, 128, dtype=BF16)), A5),
    Wrong(
        "a mixing matrix of another size",
        "rule",
        lambda n: n.npu_mhc_post(ones(3, 4, 16, dtype=BF16), ones(3, 6, 6), ones(3, 16, dtype=BF16), ones(3, 4)),
        A5,
    ),
    Wrong(
        "a row index of -1", "rule", lambda n: n.npu_scatter_nd_update_(ones(4, 8), torch.tensor([[-1]]), ones(1, 8))
    ),
    Wrong(
        "a row index behind the end",
        "rule",
        lambda n: n.npu_scatter_nd_update_(ones(4, 8), torch.tensor([[4]]), ones(1, 8)),
    ),
    Wrong(
        "one row written twice",
        "rule",
        lambda n: n.npu_scatter_nd_update_(ones(4, 8), torch.tensor([[1], [1]]), ones(2, 8)),
    ),
    Wrong(
        "INT4 values out of range", "rule", lambda n: n.npu_convert_weight_to_int4pack(torch.full((2, 8), 8, dtype=I32))
    ),
    Wrong("a scale in float16", "rule", lambda n: n.npu_trans_quant_param(ones(8, dtype=FP16))),
    Wrong("float32 activations into INT8", "rule", lambda n: n.npu_dynamic_quant(ones(2, 8))),
)


@pytest.mark.parametrize("wrong", CALLS, ids=lambda wrong: wrong.what)
def test_refused(torch_npu: ModuleType, soc: Soc, layer: Layer, wrong: Wrong) -> None:
    if soc.name not in wrong.socs:
        pytest.skip(f"right on {soc.title}, or wrong in another way")
    with pytest.raises((Refused, RuntimeError, TypeError, AttributeError)) as error:
        wrong.call(torch_npu)
    assert layer(error) == wrong.layer, error.value


def test_each_layer_refuses_many_kinds() -> None:
    assert len(CALLS) >= 25 and {wrong.layer for wrong in CALLS} == {"schema", "meta", "rule"}


def test_a_refusal_names_the_operator_and_the_document(torch_npu: ModuleType) -> None:
    with pytest.raises(Refused, match=r"npu::npu_rms_norm.*rules.*gamma and input.*_op_plugin_docs\.py: npu_rms_norm"):
        torch_npu.npu_rms_norm(ones(2, 8), ones(8, dtype=BF16))
