"""Waivers: cases that a backend may fail for now, each with a reason and a date, in a file beside the backend.

    # waivers.yaml
    - case: "linear[format=mxfp4"        # a case id, or its beginning
      mode: deployed                     # optional
      backend: mychip                    # optional, where several backends share the file
      reason: the vendor's kernel quantises activations per 32; fixed in driver 25.3
      date: 2026-11-25

A backend cannot loosen a tolerance in any other way. A waiver is stale, and fails the run, if no case has such an id,
or if its cases ran and none failed.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dsv4_hal.conformance.runner import GRAD, MODES, Outcome
from dsv4_hal.ops import OPS


@dataclass(frozen=True)
class Waiver:
    """case: the beginning of case ids; mode, backend: "" for any."""

    case: str
    reason: str
    date: datetime.date
    mode: str = ""
    backend: str = ""

    def matches(self, outcome: Outcome) -> bool:
        fits = self.mode in ("", outcome.mode) and self.backend in ("", outcome.backend)
        return fits and outcome.case.startswith(self.case)


def read_waivers(path: Path) -> list[Waiver]:
    """The waivers in a file; none where there is none, or no path (""). ValueError names file and entry."""
    if not path.name or not path.exists():
        return []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if found is None:
        return []
    if not isinstance(found, list):
        raise ValueError(f"{path}: must be a list of waivers")
    return [_waiver(entry, f"{path}: waiver {number}") for number, entry in enumerate(found, 1)]


def _waiver(entry: object, place: str) -> Waiver:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must have case, reason and date")
    for key in entry.keys() - {"case", "reason", "date", "mode", "backend"}:
        raise ValueError(f"{place}: unknown key {key}; a waiver has case, reason, date, and perhaps mode and backend")
    for key in ("case", "reason"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{place}: {key} must be text")
    if type(entry.get("date")) is not datetime.date:  # a time of day is one too
        raise ValueError(f"{place}: date must be a day, as in 2026-11-25")
    if entry.get("mode", "") not in ("", *MODES, GRAD):
        raise ValueError(f"{place}: mode must be exact, deployed or {GRAD}")
    if not isinstance(entry.get("backend", ""), str):
        raise ValueError(f"{place}: backend must be text")
    return Waiver(entry["case"], entry["reason"], entry["date"], entry.get("mode", ""), entry.get("backend", ""))


def stale(waivers: Sequence[Waiver], outcomes: Sequence[Outcome]) -> list[Waiver]:
    """Waivers that fit no case there is, and those whose cases ran, and of which none failed."""
    every = [case.id for spec in OPS.values() for case in spec.cases()]
    out = []
    for waiver in waivers:
        ran = [outcome for outcome in outcomes if waiver.matches(outcome)]
        unknown = not any(id.startswith(waiver.case) for id in every)
        if unknown or (ran and all(outcome.ok for outcome in ran)):
            out.append(waiver)
    return out
