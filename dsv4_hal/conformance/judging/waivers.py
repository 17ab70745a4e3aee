"""Waivers: cases that a backend may fail for now, each with a reason and a date, in a file beside the backend.

    # waivers.yaml
    - case: "linear[format=mxfp4"        # a case id, or its beginning
      mode: deployed                     # optional
      backend: mychip                    # optional, where several backends share the file
      reason: the vendor's kernel quantises activations per 32; fixed in driver 25.3
      date: 2026-11-25

A backend cannot loosen a tolerance in any other way. A waiver is stale, and fails the run, if no case has such an id,
or if every case of it ran that the backend affords, and none failed. One without a mode is of exact and deployed.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsv4_hal.backend import BackendError
from dsv4_hal.conformance.judging.results import GRAD, About, Outcome, affordable, jobs
from dsv4_hal.numerics import MODES, mode_names
from dsv4_hal.ops import SIZES
from dsv4_hal.registry import registered


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
    if not path.name:
        return []
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"{path}: a link to what is not there") from None
        return []
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if found is None:
        return []
    if not isinstance(found, list):
        raise ValueError(f"{path}: must be a list of waivers")
    return [_waiver(entry, f"{path}: waiver {number}") for number, entry in enumerate(found, 1)]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and leaves days as text."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in loader.construct_pairs(node, deep=True):
        if not isinstance(key, str) or key in found:
            raise ValueError(f"line {node.start_mark.line + 1}: {key} stands twice, or is no text")
        found[key] = value
    return found


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)


def _waiver(entry: object, place: str) -> Waiver:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must have case, reason and date")
    for key in entry.keys() - {"case", "reason", "date", "mode", "backend"}:
        raise ValueError(f"{place}: unknown key {key}; a waiver has case, reason, date, and perhaps mode and backend")
    for key in ("case", "reason"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{place}: {key} must be text")
    try:
        date = datetime.date.fromisoformat(entry.get("date", ""))
    except (ValueError, TypeError):
        raise ValueError(f"{place}: date must be a day, as in 2026-11-25, got {entry.get('date')!r}") from None
    if entry.get("mode", "") not in ("", *mode_names(), GRAD):
        raise ValueError(f"{place}: mode must be {', '.join(mode_names())} or {GRAD}")
    if not isinstance(entry.get("backend", ""), str):
        raise ValueError(f"{place}: backend must be text")
    if backend := entry.get("backend", ""):
        try:
            registered(backend)
        except BackendError as error:
            raise ValueError(f"{place}: {error}") from error
    return Waiver(entry["case"], entry["reason"], date, entry.get("mode", ""), backend)


def stale(waivers: Sequence[Waiver], outcomes: Sequence[Outcome], about: About) -> list[Waiver]:
    """Waivers of which no case failed, where no case has such an id, or every one ran that the backend affords: a part
    of the cases says nothing of the others."""
    every = jobs(modes=(*mode_names(), GRAD), size=SIZES[-1]) if waivers else []
    out = []
    for waiver in waivers:
        modes = (waiver.mode,) if waiver.mode else MODES
        mine = [job for job in every if job.case.startswith(waiver.case) and job.mode in modes]
        due = affordable(mine, about)
        ran = {outcome.id: outcome.ok for outcome in outcomes if waiver.matches(outcome)}
        if all(ran.values()) and (not mine or (due and all(job.id in ran for job in due))):
            out.append(waiver)
    return out
