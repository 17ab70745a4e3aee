"""Which vendor operator computes an op, as data: every candidate, in order of preference, and what keeps it from use.

The rows lie beside the code that uses them, one tuple a family; this file reads them. A candidate is passed over where
its numbers are not the contract's, where its SoC's builds lack it, where it cannot be called here, or where a width is
none that it takes. What is left is torch's own ops on the NPU: the reference's code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_hal.backends.ascend.devices import Soc

A2, A3, A5 = "ascend910b", "ascend910_93", "ascend950"
ALL = frozenset({A2, A3, A5})
INT8 = frozenset({A2, A3})
MX = frozenset({A5})

VLLM_ASCEND = "vllm-ascend 182b75ea, csrc/torch_binding.cpp and csrc/build_aclnn.sh"


def documented(name: str) -> str:
    return f"torch_npu 2.13.0, _op_plugin_docs.py: {name}"


@dataclass(frozen=True)
class Limit:
    """What a size, or a format, of a call may be: one of `among`, if that has members; else a multiple of `multiple`
    from 1 to `most`."""

    among: tuple[Any, ...] = ()
    multiple: int = 1
    most: int = 2**31 - 1

    def allows(self, value: Any) -> bool:
        if self.among:
            return value in self.among
        return 0 < value <= self.most and value % self.multiple == 0

    def __str__(self) -> str:
        if self.among:
            return " or ".join(map(str, self.among))
        bound = f", at most {self.most}" if self.most < 2**31 - 1 else ""
        return f"a multiple of {self.multiple}{bound}" if self.multiple > 1 else f"at most {self.most}"


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    op       of the contract
    calls    the operators that it calls, namespace::name; of torch's own, aten::name
    socs     names of the SoCs that it is for: those that have them, after `source`, and whose formats these are
    source   the document or file that was read
    refused  why it is not used although it is there; "" if it is
    alien    numeric profile -> why its numbers are not that profile's
    note     how it is wrapped, so that the contract holds
    limits   size of a call -> what it may be
    """

    op: str
    calls: tuple[str, ...]
    socs: frozenset[str]
    source: str
    refused: str = ""
    note: str = ""
    alien: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Limit] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " + ".join(call.partition("::")[2] if call.startswith("npu::") else call for call in self.calls)

    def lacks(self, soc: Soc) -> str:
        """Why it is not used on a SoC; "" if it is, as far as documents say."""
        if self.refused or soc.mode in self.alien:
            return self.refused or self.alien[soc.mode]
        return "" if soc.name in self.socs else f"it is not for {soc.title}"

    def misfits(self, sizes: Mapping[str, Any]) -> str:
        """Why it does not take a call of these sizes; "" if it does. A size that is not given is not looked at."""
        wrong = [
            f"{name.replace('_', ' ')} {sizes[name]}, not {limit}"
            for name, limit in self.limits.items()
            if name in sizes and not limit.allows(sizes[name])
        ]
        return "; ".join(wrong)


@dataclass(frozen=True)
class Choice:
    """The providers of one op on one SoC: those that are used, in order, and why each other is not."""

    used: tuple[Provider, ...]
    passed: tuple[tuple[Provider, str], ...]

    def for_call(self, sizes: Mapping[str, Any]) -> Provider | None:
        return next((p for p in self.used if not p.misfits(sizes)), None)

    def misfits(self, sizes: Mapping[str, Any]) -> list[str]:
        """Why each of those that are used does not take a call of these sizes."""
        return [f"{p.name}: {why}" for p in self.used if (why := p.misfits(sizes))]

    def why_not(self, sizes: Mapping[str, Any]) -> str:
        """Why nothing takes a call of these sizes. Rows of the same operators say the same once."""
        return "; ".join(dict.fromkeys([f"{p.name}: {why}" for p, why in self.passed] + self.misfits(sizes)))


def choose(table: Sequence[Provider], op: str, soc: Soc, missing: Mapping[str, str]) -> Choice:
    """What of a table is used for an op on a SoC. missing: why an operator cannot be called, of those that cannot.

    A row for other SoCs is left out where one of the same operators is for this."""
    here = {p.calls for p in table if p.op == op and soc.name in p.socs}
    asked = [p for p in table if p.op == op and (soc.name in p.socs or p.calls not in here)]
    rows = [(p, p.lacks(soc) or _first(p.calls, missing)) for p in asked]
    return Choice(tuple(p for p, why in rows if not why), tuple((p, why) for p, why in rows if why))


def operators(table: Sequence[Provider], soc: Soc) -> Iterator[str]:
    """Every vendor operator that could be called on a SoC, once."""
    found = (call for p in table if not p.lacks(soc) for call in p.calls if not call.startswith("aten::"))
    yield from dict.fromkeys(found)


def _first(calls: Sequence[str], missing: Mapping[str, str]) -> str:
    return next((missing[call] for call in calls if call in missing), "")
