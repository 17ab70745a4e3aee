"""The contract table: good calls pass, and every rule refuses a call that is wrong in nothing else.

Wrong calls are made from the table: a good call, and for every kind of rule a way to break it. The first half needs no
torch_npu; the second makes the same calls of the real operators.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import SOCS, Soc
from dsv4_hal.backends.ascend.emulator import rules as kinds
from dsv4_hal.backends.ascend.emulator.call import OPS
from dsv4_hal.backends.ascend.emulator.load import FAMILIES
from dsv4_hal.backends.ascend.emulator.rule_table import RULES
from dsv4_hal.backends.ascend.emulator.rules import Call, Refused, Rule, applies, broken, complaint

for family in FAMILIES:
    import_module(f"dsv4_hal.backends.ascend.emulator.{family}")

BF16, FP16, FP32, I8, I32, I64, U8 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
)
E4M3, E8M0, FP4 = 292, 293, 296  # torch_npu's numbers
Arguments = dict[str, Any]


def full(*shape: int, dtype: torch.dtype = FP32, value: float = 1) -> Tensor:
    return torch.full(shape, value, dtype=torch.float32).to(dtype)


def columns(*shape: int, dtype: torch.dtype) -> Tensor:
    """The transposed view of a matrix that lies in memory row by row."""
    return full(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT


def scales(*shape: int, dtype: torch.dtype = U8) -> Tensor:
    return full(*shape, dtype=U8, value=127).view(dtype)


def quant_matmul(**changes: Any) -> Arguments:
    """INT8: 5 tokens, 64 to 24."""
    good = {
        "x1": full(5, 64, dtype=I8),
        "x2": full(64, 24, dtype=I8),
        "scale": full(24),
        "pertoken_scale": full(5),
        "output_dtype": 15,
    }
    return good | changes


def mx_matmul(**changes: Any) -> Arguments:
    """5 tokens, 128 to 24."""
    good = {
        "x1": full(5, 128, dtype=torch.float8_e4m3fn),
        "x2": columns(128, 24, dtype=torch.float8_e4m3fn),
        "scale": scales(24, 2, 2).transpose(0, 1),
        "pertoken_scale": scales(5, 2, 2),
        "output_dtype": 15,
        "scale_dtype": E8M0,
        "pertoken_scale_dtype": E8M0,
        "group_sizes": [1, 1, 32],
    }
    return good | changes


def grouped(x: Tensor, weight: Tensor, **changes: Any) -> Arguments:
    good = {
        "x": [x],
        "weight": [weight],
        "group_list": torch.tensor([2, 5, 6]),
        "split_item": 2,
        "group_type": 0,
        "group_list_type": 0,
        "act_type": 0,
    }
    return good | changes


def grouped_int8(**changes: Any) -> Arguments:
    good = {"scale": [full(3, 32, dtype=BF16)], "per_token_scale": [full(6)], "output_dtype": 15}
    return grouped(full(6, 64, dtype=I8), full(3, 64, 32, dtype=I8), **good | changes)


def grouped_int4(**changes: Any) -> Arguments:
    good = {
        "scale": [full(3, 1, 32, dtype=I64)],
        "bias": [full(3, 32)],
        "per_token_scale": [full(6)],
        "output_dtype": 15,
        "group_list": torch.tensor([2, 3, 1]),
        "group_list_type": 1,
    }
    return grouped(full(6, 64, dtype=I8), full(3, 64, 4, dtype=I32), **good | changes)


def grouped_mx(weight: Tensor, name: str, **changes: Any) -> Arguments:
    good = {
        name: [scales(3, 32, 2, 2).transpose(1, 2)],
        "per_token_scale": [scales(6, 2, 2)],
        "per_token_scale_dtype": E8M0,
        "output_dtype": 15,
    }
    return grouped(full(6, 128, dtype=torch.float8_e4m3fn), weight, **good | changes)


def mx_quant(**changes: Any) -> Arguments:
    good = {
        "input": full(3, 64, dtype=BF16),
        "axis": -1,
        "round_mode": "rint",
        "dst_type": E4M3,
        "block_size": 32,
        "scale_alg": 1,
        "dst_type_max": 0.0,
        "max_low_bound": 0.0,
    }
    return good | changes


def rotary(mode: str) -> Arguments:
    table = full(1, 3, 1, 64)
    return {"input": full(1, 3, 2, 64), "r1": table, "r2": table.clone(), "rotary_mode": mode}


def init_routing(**changes: Any) -> Arguments:
    good = {
        "x": full(4, 16, dtype=BF16),
        "expert_idx": torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0]], dtype=I32),
        "active_num": -1,
        "expert_capacity": -1,
        "expert_num": 3,
        "drop_pad_mode": 0,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "quant_mode": -1,
        "active_expert_range": [0, 3],
        "row_idx_type": 0,
    }
    return good | changes


def finalize(**changes: Any) -> Arguments:
    good = {
        "expanded_permuted_rows": full(8, 16, dtype=BF16),
        "skip1": full(4, 16, dtype=BF16),
        "skip2": full(4, 16, dtype=BF16),
        "bias": full(3, 16, dtype=BF16),
        "scales": full(4, 2, dtype=BF16),
        "expanded_src_to_dst_row": torch.arange(8, dtype=I32),
        "export_for_source_row": full(4, 2, dtype=I32),
        "drop_pad_mode": 2,
        "k": 2,
    }
    return good | changes


def gating(**changes: Any) -> Arguments:
    good = {
        "x": full(4, 8),
        "k": 2,
        "bias": full(8),
        "k_group": 1,
        "group_count": 1,
        "group_select_mode": 0,
        "renorm": 0,
        "norm_type": 1,
        "out_flag": False,
        "routed_scaling_factor": 1.0,
        "eps": 1e-20,
    }
    return good | changes


def mhc_pre(n: int, **changes: Any) -> Arguments:
    width = n * n + 2 * n
    good = {
        "x": full(3, n, 16, dtype=BF16),
        "phi": full(width, n * 16),
        "alpha": full(3),
        "bias": full(width),
        "gamma": full(n, 16),
        "norm_eps": 1e-6,
        "hc_eps": 1e-6,
        "out_flag": 0,
        "inner_precise": 0,
    }
    return good | changes


FP8 = torch.float8_e4m3fn
CALLS: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "int8": ("npu_quant_matmul", quant_matmul),
    "int8 bias": ("npu_quant_matmul", lambda: quant_matmul(bias=full(24))),
    "int8 to fp16": ("npu_quant_matmul", lambda: quant_matmul(output_dtype=5)),
    "int8 to int8": (
        "npu_quant_matmul",
        lambda: quant_matmul(output_dtype=None, pertoken_scale=None, offset=full(24)),
    ),
    "fp8 a channel": (
        "npu_quant_matmul",
        lambda: quant_matmul(x1=full(5, 64, dtype=FP8), x2=full(64, 24, dtype=FP8), bias=full(24)),
    ),
    "mxfp8": ("npu_quant_matmul", lambda: mx_matmul(bias=full(24))),
    "mxfp4": (
        "npu_quant_matmul",
        lambda: mx_matmul(
            x1=full(5, 64, dtype=U8), x2=columns(64, 24, dtype=U8), x1_dtype=FP4, x2_dtype=FP4, bias=full(24)
        ),
    ),
    "mxfp8 by mxfp4": (
        "npu_quant_matmul",
        lambda: mx_matmul(x2=columns(64, 24, dtype=U8), x2_dtype=FP4, bias=full(1, 24, dtype=BF16)),
    ),
    "grouped bf16": (
        "npu_grouped_matmul",
        lambda: grouped(full(6, 64, dtype=BF16), full(3, 64, 32, dtype=BF16), bias=[full(3, 32)]),
    ),
    "grouped fp16": (
        "npu_grouped_matmul",
        lambda: grouped(full(6, 64, dtype=FP16), full(3, 64, 32, dtype=FP16), bias=[full(3, 32, dtype=FP16)]),
    ),
    "grouped fp32": (
        "npu_grouped_matmul",
        lambda: grouped(full(6, 64), full(3, 64, 32), bias=[full(3, 32)]),
    ),
    "grouped int8": ("npu_grouped_matmul", lambda: grouped_int8(bias=[full(3, 32, dtype=I32)])),
    "grouped int8 to fp16": ("npu_grouped_matmul", lambda: grouped_int8(scale=[full(3, 32)], output_dtype=5)),
    "grouped int8 to int32": (
        "npu_grouped_matmul",
        lambda: grouped_int8(scale=None, per_token_scale=None, output_dtype=3),
    ),
    "grouped int4": ("npu_grouped_matmul", grouped_int4),
    "grouped mxfp8": (
        "npu_grouped_matmul",
        lambda: grouped_mx(columns(3, 128, 32, dtype=FP8), "scale", scale_dtype=E8M0),
    ),
    "grouped mxfp8 by mxfp4": (
        "npu_grouped_matmul",
        lambda: grouped_mx(columns(3, 64, 32, dtype=U8), "antiquant_scale", weight_dtype=FP4),
    ),
    "batch": (
        "npu_transpose_batchmatmul",
        lambda: {"input": full(2, 3, 16), "weight": full(2, 16, 8), "batch_split_factor": 1},
    ),
    "batch, turned": (
        "npu_transpose_batchmatmul",
        lambda: {
            "input": full(3, 2, 16),
            "weight": full(2, 16, 8),
            "perm_x1": [1, 0, 2],
            "batch_split_factor": 1,
        },
    ),
    "dynamic quant": (
        "npu_dynamic_quant",
        lambda: {
            "input": full(3, 64, dtype=BF16),
            "smooth_scales": full(64, dtype=BF16),
            "quant_mode": "pertoken",
            "dst_type_max": 0.0,
        },
    ),
    "mx quant": ("npu_dynamic_mx_quant", mx_quant),
    "mx quant of float32": ("npu_dynamic_mx_quant", lambda: mx_quant(input=full(3, 64))),
    "mx quant as OCP": ("npu_dynamic_mx_quant", lambda: mx_quant(scale_alg=0)),
    "mx quant to fp4": ("npu_dynamic_mx_quant", lambda: mx_quant(scale_alg=0, dst_type=FP4)),
    "param": ("npu_trans_quant_param", lambda: {"scale": full(8), "offset": full(8), "round_mode": 0}),
    "norm": (
        "npu_rms_norm",
        lambda: {"input": full(3, 64, dtype=BF16), "gamma": full(64, dtype=BF16), "epsilon": 1e-6},
    ),
    "rotary half": ("npu_rotary_mul", lambda: rotary("half")),
    "rotary interleave": ("npu_rotary_mul", lambda: rotary("interleave")),
    "swiglu": ("npu_swiglu", lambda: {"input": full(3, 64, dtype=BF16), "dim": -1}),
    "clipped swiglu": (
        "npu_clipped_swiglu",
        lambda: {
            "x": full(3, 64, dtype=BF16),
            "dim": -1,
            "alpha": 1.0,
            "limit": 7.0,
            "bias": 0.0,
            "interleaved": False,
        },
    ),
    "gating": ("npu_moe_gating_top_k", gating),
    "gating by softmax": ("npu_moe_gating_top_k", lambda: gating(norm_type=0)),
    "gating by hash": (
        "npu_moe_gating_top_k",
        lambda: gating(bias=None, input_ids=torch.arange(4), tid2eid=full(6, 2, dtype=I32)),
    ),
    "init routing": ("npu_moe_init_routing_v2", lambda: init_routing(scale=full(4))),
    "init routing to int8": ("npu_moe_init_routing_v2", lambda: init_routing(quant_mode=1)),
    "finalize": ("npu_moe_finalize_routing", finalize),
    "mhc pre 4": ("npu_mhc_pre", lambda: mhc_pre(4)),
    "mhc pre 6": ("npu_mhc_pre", lambda: mhc_pre(6)),
    "mhc pre 8": ("npu_mhc_pre", lambda: mhc_pre(8)),
    "mhc sinkhorn": ("npu_mhc_sinkhorn", lambda: {"x": full(3, 4, 4), "eps": 1e-6, "num_iters": 20, "out_flag": 0}),
    "mhc post": (
        "npu_mhc_post",
        lambda: {
            "x": full(3, 4, 16, dtype=BF16),
            "h_res": full(3, 4, 4),
            "h_out": full(3, 16, dtype=BF16),
            "h_post": full(3, 4),
        },
    ),
    "scatter": (
        "npu_scatter_nd_update_",
        lambda: {
            "input": full(9, 4, dtype=BF16),
            "indices": torch.tensor([[3], [1]], dtype=I32),
            "updates": full(2, 4, dtype=BF16),
        },
    ),
    "int4 pack": ("npu_convert_weight_to_int4pack", lambda: {"weight": full(4, 16, dtype=I32), "inner_k_tiles": 0}),
    "format cast": ("npu_format_cast", lambda: {"input": full(4, 16), "acl_format": 29}),
}


def call_of(label: str, soc: str, arguments: Arguments | None = None) -> Call:
    """With all arguments by name, None where a call leaves one out."""
    name, make = CALLS[label]
    op = f"npu::{name}"
    return Call(op, soc, dict.fromkeys(inspect.signature(OPS[op].body).parameters) | (arguments or make()))


@cache
def good_calls() -> list[tuple[str, Call]]:
    calls = [(label, call_of(label, soc)) for label in CALLS for soc in SOCS]
    return [(label, call) for label, call in calls if not list(broken(RULES, call))]


# Ways to break a rule -------------------------------------------------------------------------------------------------


def changed(arguments: Arguments, name: str, change: Callable[[Tensor], Tensor]) -> Arguments:
    value = arguments[name]
    return arguments | {name: [change(value[0])] if isinstance(value, list) else change(value)}


def grown(axis: int, by: int = 1) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        raw = t.view(U8) if t.element_size() == 1 else t
        return torch.cat([raw, *[raw.narrow(axis, 0, 1)] * by], axis).view(t.dtype)

    return change


def grow(arguments: Arguments, name: str, axis: int, *about: Any) -> Arguments:
    return changed(arguments, name, grown(axis))


def other_value(arguments: Arguments, name: str, *allowed: Any) -> Arguments:
    like = next((v for v in (arguments[name], *allowed) if v is not None), None)
    if isinstance(like, list | tuple):
        return arguments | {name: [0, 2, 1]}
    wrong = {str: "sideways", bool: not like, float: 0.5}.get(type(like), 4)
    return arguments | {name: wrong}


def other_rank(arguments: Arguments, name: str, *allowed: int) -> Arguments:
    def change(t: Tensor) -> Tensor:
        if min(allowed) > 1:
            return t.flatten()
        while t.dim() in allowed:
            t = t.unsqueeze(0)
        return t

    return changed(arguments, name, change)


def outside(arguments: Arguments, name: str, axis: int, low: int, high: int) -> Arguments:
    def change(t: Tensor) -> Tensor:
        if low > 0:
            return t.narrow(axis, 0, low - 1)
        shape = list(t.shape)
        shape[axis] = high + 1
        return t.narrow(axis, 0, 1).expand(shape)

    return changed(arguments, name, change)


def unlike(arguments: Arguments, name: str, other: str) -> Arguments:
    value = arguments[other]
    there = (value[0] if isinstance(value, list) else value).dtype
    return changed(arguments, name, lambda t: t.to(next(d for d in (FP32, BF16, FP16) if d != there)))


def filled(arguments: Arguments, name: str) -> Arguments:
    lists = isinstance(arguments.get("weight"), list)
    return arguments | {name: [full(1)] if lists else full(1)}


SPOIL: dict[Callable[..., str], Callable[..., Arguments]] = {
    kinds.given: lambda arguments, name: arguments | {name: None},
    kinds.absent: filled,
    kinds.value: other_value,
    kinds.code: lambda arguments, name, *allowed: arguments | {name: 290},  # hifloat8
    kinds.at_least: lambda arguments, name, low: arguments | {name: low - 1},
    kinds.dtype: lambda arguments, name, *allowed: changed(arguments, name, lambda t: t.to(torch.float64)),
    kinds.same_dtype: unlike,
    kinds.rank: other_rank,
    kinds.size: grow,
    kinds.multiple: grow,
    kinds.between: outside,
    kinds.same_size: grow,
    kinds.one_or: grow,
    kinds.blocks: grow,
    kinds.tail: lambda arguments, name, other: grow(arguments, name, -1),
    kinds.broadcasts: lambda arguments, name, other: grow(arguments, name, -1),
    kinds.same_shape: lambda arguments, name, other: grow(arguments, name, -1),
    kinds.one_wide: lambda arguments, name: grow(arguments, name, 2),
    kinds.members: lambda arguments, name, count: arguments | {name: arguments[name] * 2},
    kinds.is_transposed: lambda arguments, name: changed(arguments, name, lambda t: t.contiguous()),
    kinds.turned_alike: lambda arguments, name, matrix: changed(
        arguments,
        name,
        lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.is_contiguous() else t.contiguous(),
    ),
    kinds.is_plain: lambda arguments, name: changed(arguments, name, lambda t: t.mT.contiguous().mT),
    kinds.partition: lambda arguments, name, *about: changed(arguments, name, lambda t: t + 9),
    kinds.within: lambda arguments, name, *about: changed(arguments, name, lambda t: t + 99),
    kinds.below: lambda arguments, name, *about: changed(arguments, name, lambda t: t + 99),
    kinds.scattered: lambda arguments, name, indices, target: changed(arguments, indices, lambda t: t - 99),
}


def spoiled(rule: Rule, call: Call) -> Call | None:
    """The call, wrong as the rule says; None where the rule does not look at what it has."""
    kind, name, *about = rule.check
    if kind not in (kinds.given, kinds.absent, kinds.value, kinds.code, kinds.at_least) and not call.tensors(name):
        return None
    arguments = SPOIL[kind](dict(call.arguments), name, *about)
    return Call(call.op, call.soc, arguments)


def wrong_calls(rule: Rule) -> Iterator[tuple[str, Call]]:
    """Good calls that break one rule, by label. Of a rule on SoCs, good calls as on another."""
    for label, call in good_calls():
        if rule.check[0] is kinds.soc:
            others = [Call(call.op, s, call.arguments) for s in SOCS if s not in rule.check[1:]]
            yield from ((label, other) for other in others if applies(rule, other))
        elif applies(rule, call):
            wrong = spoiled(rule, call)
            if wrong is not None and applies(rule, wrong) and complaint(rule.check, wrong):
                yield label, wrong


def name_of(rule: Rule) -> str:
    kind, *about = rule.check
    return f"{rule.op[5:]} {kind.__name__} {' '.join(str(a).removeprefix('torch.') for a in about)}"


@pytest.mark.parametrize("label", CALLS)
def test_a_good_call_is_good_somewhere(label: str) -> None:
    said = {soc: list(broken(RULES, call_of(label, soc))) for soc in SOCS}
    assert not all(said.values()), said


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_no_rule_is_idle(rule: Rule) -> None:
    assert any(True for _ in wrong_calls(rule)), f"no call breaks it: {name_of(rule)}, from {rule.source}"


def test_every_rule_is_of_an_operator() -> None:
    assert {rule.op for rule in RULES} == {name for name in OPS if name.startswith("npu::")}


# The same calls of the real operators ---------------------------------------------------------------------------------


def run(torch_npu: ModuleType, label: str, arguments: Arguments) -> Any:
    """As a caller writes it: what is left out is left out."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return getattr(torch_npu, CALLS[label][0])(**given)


@pytest.mark.parametrize("label", CALLS)
def test_good_calls_pass(torch_npu: ModuleType, soc: Soc, label: str) -> None:
    if (label, soc.name) in [(good, call.soc) for good, call in good_calls()]:
        run(torch_npu, label, CALLS[label][1]())
    else:
        with pytest.raises(Refused):
            run(torch_npu, label, CALLS[label][1]())


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_wrong_calls_are_refused(
    torch_npu: ModuleType, soc: Soc, layer: Callable[[pytest.ExceptionInfo[BaseException]], str], rule: Rule
) -> None:
    """By the schema, the meta kernel, or a rule: whichever comes first."""
    for label, wrong in wrong_calls(rule):
        if wrong.soc == soc.name:
            with pytest.raises((Refused, RuntimeError, TypeError)) as error:
                run(torch_npu, label, dict(wrong.arguments))
            layer(error)
