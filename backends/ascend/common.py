"""What the parts of the Ascend backend share: which provider serves a call, and what happens where none does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from dsv4_hal.backend import Facts, Verdict
from dsv4_hal.backends.ascend import widths
from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.providers import Choice, Provider
from dsv4_hal.backends.reference import Reference


class Base(Reference):
    """soc: whose builds the operators come from. choices: op -> its providers on it, for ops that have candidates."""

    soc: Soc
    choices: Mapping[str, Choice]

    def provider(self, op: str, **sizes: Any) -> Provider | None:
        """What computes a call of these sizes. None: torch's own ops on the device do, and a warning says why, once."""
        key = (op, *sizes.values())
        if key not in self._chosen:
            self._chosen[key] = self.choices[op].for_call(sizes)
        found = self._chosen[key]
        if found is None:
            own_ops(op, "; ".join(self.choices[op].misfits(sizes)) or "no operator for it can be used here")
        return found

    def uses(self, op: str, call: str, **sizes: Any) -> bool:
        """Whether such a call goes to the provider that calls the operator `call`, among others."""
        found = self.provider(op, **sizes)
        return found is not None and call in found.calls

    def supports(self, op: str, facts: Facts) -> Verdict:
        """Which providers serve the calls that such a model makes, and why not the others."""
        choice = self.choices.get(op)
        if choice is None:
            return super().supports(op, facts)
        passed = [f"not {p.name}: {why}" for p, why in choice.passed]
        if self.origin(op).kind != "native":
            return Verdict(True, "; ".join(passed))
        if self.numerics.accumulate != torch.float32:
            return Verdict(False, f"its operators sum in float32, the profile in {self.numerics.accumulate}")
        wanted = widths.calls(op, facts, self.soc)
        served = [found for sizes in wanted if (found := choice.for_call(sizes))] if wanted else choice.used
        lacking = [sizes for sizes in wanted if choice.for_call(sizes) is None]
        alien = {sizes["format"] for sizes in wanted if sizes.get("format", "bf16") not in self.soc.formats}
        if alien or not served:
            convert = [f"{self.soc.title} multiplies no {', '.join(sorted(alien))}: see dsv4-hal convert"] * bool(alien)
            why = [choice.why_not(sizes) for sizes in lacking]
            return Verdict(False, "; ".join(dict.fromkeys(convert + why)) or choice.why_not({}))
        used = [f"{p.name} ({p.note})" if p.note else p.name for p in served]
        own = [
            f"torch's own ops for calls that it does not take: {'; '.join(choice.misfits(sizes))}" for sizes in lacking
        ]
        return Verdict(True, "; ".join(dict.fromkeys(used + own + passed)))

    @property
    def _chosen(self) -> dict[tuple[Any, ...], Provider | None]:
        return self.__dict__.setdefault("_kept_choices", {})


def own_ops(op: str, why: str) -> None:
    """Say, once, that torch's own ops compute a call on the device, and why."""
    warnings.warn(f"ascend: {op} runs on torch's own ops here: {why}", stacklevel=4)
