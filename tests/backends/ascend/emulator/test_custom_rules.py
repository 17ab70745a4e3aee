"""Every rule of the table on vllm-ascend's operators, broken on purpose: a good call is changed so that it says no.

The first half runs no operator, and needs no torch_npu; the second makes the same calls of the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import custom_calls as calls
import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.emulator import custom_rules as table
from dsv4_hal.backends.ascend.emulator import rules as kinds
from dsv4_hal.backends.ascend.emulator import stream_rules
from dsv4_hal.backends.ascend.emulator.call import OPS
from dsv4_hal.backends.ascend.emulator.custom_rules import A3, A5
from dsv4_hal.backends.ascend.emulator.rules import Call, Refused, Rule, applies, broken, complaint

RULES = (*table.RULES, *stream_rules.RULES)
FILES = ("custom_attention", "custom_cache", "custom_compressor", "custom_indexer", "custom_streams")
for file in FILES:
    import_module(f"dsv4_hal.backends.ascend.emulator.{file}")

Arguments = dict[str, Any]


def with_defaults(op: str, given: Mapping[str, Any]) -> Arguments:
    schema = torch._C.parse_schema(op.partition("::")[2] + OPS[op].schema)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def good() -> Iterator[Call]:
    """Calls that break no rule, of every operator, in every way that a rule asks about."""
    for fp8, soc, name in (
        (False, A3[1], "npu_sparse_attn_sharedkv"),
        (True, A5[0], "npu_kv_quant_sparse_attn_sharedkv"),
    ):
        for entries in ("none", "all", "picks"):
            made = calls.attention(fp8, entries)
            for op, given in ((name, made.arguments), (f"{name}_metadata", calls.planned(made))):
                yield Call(f"_C_ascend::{op}", soc, with_defaults(f"_C_ascend::{op}", given))
        op, made = "_C_ascend::npu_vllm_quant_lightning_indexer", calls.indexer(fp8)
        yield Call(op, soc, with_defaults(op, made.arguments))
        yield Call(f"{op}_metadata", soc, with_defaults(f"{op}_metadata", calls.planned_picks(made)))
    x = torch.ones(2, 512).bfloat16()
    for op, made in (
        ("npu_scatter_nd_update_v2", calls.scatter()),
        ("kv_compress_epilog", calls.kv_epilog(x, [0, -1])),
        ("indexer_compress_epilog_v2", calls.index_epilog(x[:, :128], [0, -1])),
        ("compressor", calls.compressor()),
    ):
        yield Call(f"_C_ascend::{op}", A3[1] if "scatter" in op else A5[0], made.arguments)
    for op, arguments in calls.streams().items():
        yield Call(f"_C_ascend::{op}", A3[1], arguments)


GOOD = list(good())


def resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The tensor, repeated and cut along an axis."""
    times = [1] * tensor.dim()
    times[axis] = -(-size // tensor.shape[axis])
    wide = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return wide.repeat(times).narrow(axis, 0, size).view(tensor.dtype)


def of_another(tensor: Tensor, *not_these: torch.dtype) -> Tensor:
    others = (torch.int64, torch.int16, torch.float32, torch.float16)
    return tensor.to(torch.float32).nan_to_num().to(next(d for d in others if d not in not_these))


def spoil_no_gaps(call: Call, name: str) -> Any:
    picks = call.arguments[name].clone()
    picks[0, 0, 0] = -1
    return picks


def spoil_lengths(call: Call, name: str) -> Any:
    """Sums that go down at the end, or do not begin with 0."""
    return call.arguments[name].flip(0) + 1


SPOIL: Mapping[Callable[..., str], Callable[..., Any]] = {
    kinds.given: lambda call, name: None,
    kinds.absent: lambda call, name: torch.zeros(1),
    kinds.value: lambda call, name, *allowed: next(
        v
        for v in (not call.arguments[name], "none such", 77)
        if type(v) is type(call.arguments[name]) and v not in allowed
    ),
    kinds.dtype: lambda call, name, *allowed: of_another(call.arguments[name], *allowed),
    kinds.same_dtype: lambda call, name, other: of_another(call.arguments[name], call.arguments[name].dtype),
    kinds.rank: lambda call, name, *allowed: call.arguments[name][None],
    kinds.size: lambda call, name, axis, *allowed: resized(call.arguments[name], axis, max(allowed) + 1),
    kinds.multiple: lambda call, name, axis, of: resized(call.arguments[name], axis, of + 1),
    kinds.between: lambda call, name, axis, low, high: resized(call.arguments[name], axis, high + low),
    kinds.same_size: lambda call, name, axis, other, other_axis, times=1: resized(
        call.arguments[name], axis, call.arguments[name].shape[axis] + 1
    ),
    kinds.same_shape: lambda call, name, other: call.arguments[name][..., :-1],
    kinds.is_plain: lambda call, name: call.arguments[name].transpose(0, 1),
    stream_rules.slice_width: lambda call, name, bounds: call.arguments[name][..., :-1],
    table.no_gaps: spoil_no_gaps,
    table.sums: spoil_lengths,
    table.starts_at_zero: spoil_lengths,
    table.rows_of: lambda call, name, low, target: call.arguments[name] - 1,
    kinds.scattered: lambda call, name, indices, target: call.arguments[name][:, :-1],
    table.covers: lambda call, name, *rest: call.arguments[name][:, :1],
    table.not_empty: lambda call, name, *rest: call.arguments[name][:0],
    table.at_most: lambda call, name, most: most + 1,
}


def spoiled(call: Call, rule: Rule) -> Call:
    kind, *about = rule.check
    if kind is kinds.soc:
        return Call(call.op, next(soc for soc in (*A3, *A5) if soc not in about), call.arguments)
    if kind in (table.scheduled_attention, table.scheduled_picks):
        name, value = "metadata", torch.zeros(1024, dtype=torch.int32)
    elif kind is table.one_of:
        name, value = "coff", 3
    else:
        name, value = about[0], SPOIL[kind](call, *about)
    return Call(call.op, call.soc, {**call.arguments, name: value})


def whole(rule: Rule) -> str:
    return f"{rule.op.partition('::')[2]} {rule.check[0].__name__} {' '.join(map(str, rule.check[1:2]))}"


@pytest.mark.parametrize("call", GOOD, ids=lambda call: call.op)
def test_good_calls_break_no_rule(call: Call) -> None:
    assert [said for _, said in broken(RULES, call)] == []


def wrong_call(rule: Rule) -> Call:
    """A good call that the rule is asked about, spoiled."""
    asked = [call for call in GOOD if applies(rule, call)]
    if rule.check[0] not in (kinds.given, kinds.absent, kinds.soc) and len(rule.check) > 1:
        asked = [call for call in asked if call.arguments.get(str(rule.check[1]), "") is not None]
    assert asked, "no good call asks about it"
    return spoiled(asked[-1], rule)


@pytest.mark.parametrize("rule", RULES, ids=whole)
def test_a_broken_rule_says_so(rule: Rule) -> None:
    assert complaint(rule.check, wrong_call(rule)), "a call that breaks it passes"
    assert rule.source


def test_every_operator_of_these_files_has_rules() -> None:
    files = {f"dsv4_hal.backends.ascend.emulator.{file}" for file in FILES}
    assert {rule.op for rule in RULES} == {name for name, op in OPS.items() if op.body.__module__ in files}


def made(call: Call) -> None:
    getattr(torch.ops._C_ascend, call.op.partition("::")[2])(**call.arguments)


@pytest.mark.parametrize("call", GOOD, ids=lambda call: call.op)
def test_good_calls_pass(torch_npu: ModuleType, soc: Soc, call: Call) -> None:
    if call.soc == soc.name:
        made(call)


@pytest.mark.parametrize("rule", RULES, ids=whole)
def test_wrong_calls_are_refused(torch_npu: ModuleType, soc: Soc, rule: Rule) -> None:
    """By the schema or a rule, whichever comes first."""
    wrong = wrong_call(rule)
    if wrong.soc == soc.name:
        with pytest.raises((Refused, RuntimeError)):
            made(wrong)
