"""Waivers: cases that a backend may fail for now, each with a reason and a date, in a file beside the backend.

    # waivers.yaml
    - case: "linear[format=mxfp4"        # a case id, or its beginning
      mode: deployed                     # optional
      reason: the vendor's kernel quantises activations per 32; fixed in driver 25.3
      date: 2026-11-25

A backend cannot loosen a tolerance in any other way. A waiver that no failing case matches is stale, and fails the run.
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dsv4_hal.backend import Backend
from dsv4_hal.conformance.runner import Outcome

FILE = "waivers.yaml"


@dataclass(frozen=True)
class Waiver:
    """case: the beginning of case ids; mode: "" for both."""

    case: str
    reason: str
    date: datetime.date
    mode: str = ""

    def matches(self, outcome: Outcome) -> bool:
        return outcome.case.startswith(self.case) and self.mode in ("", outcome.mode)


def waivers_of(cls: type[Backend]) -> list[Waiver]:
    """The waivers in the file beside the backend's module; none where there is no such file."""
    path = Path(inspect.getfile(cls)).parent / FILE
    return read_waivers(path) if path.is_file() else []


def read_waivers(path: Path) -> list[Waiver]:
    """ValueError names the file and the entry that is wrong."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: must be a list of waivers")
    return [_waiver(entry, f"{path}: waiver {number}") for number, entry in enumerate(found, 1)]


def _waiver(entry: object, place: str) -> Waiver:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must have case, reason and date")
    for key in entry.keys() - {"case", "reason", "date", "mode"}:
        raise ValueError(f"{place}: unknown key {key}; a waiver has case, reason, date, and perhaps mode")
    for key in ("case", "reason"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{place}: {key} must be text")
    if not isinstance(entry.get("date"), datetime.date):
        raise ValueError(f"{place}: date must be a day, as in 2026-11-25")
    if entry.get("mode", "") not in ("", "exact", "deployed"):
        raise ValueError(f"{place}: mode must be exact or deployed")
    return Waiver(entry["case"], entry["reason"], entry["date"], entry.get("mode", ""))


def stale(waivers: Sequence[Waiver], outcomes: Sequence[Outcome]) -> list[Waiver]:
    """Waivers whose cases ran, and of which none failed."""
    return [w for w in waivers if (ran := [o for o in outcomes if w.matches(o)]) and all(o.ok for o in ran)]
