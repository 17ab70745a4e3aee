"""Waivers: cases that a backend may fail for now, each with a reason and an end, in a file beside the backend.

    # waivers.yaml
    - case: "linear[format=mxfp4"        # a case id, or its beginning: an op at least, as in "linear["
      mode: deployed                     # optional
      backend: mychip                    # optional, where several backends share the file
      reason: the vendor's kernel quantises activations per 32; fixed in driver 25.3
      date: 2026-11-25                   # when it was written
      expires: 2027-05-25                # its last day, within a year from today

A backend cannot loosen a tolerance in any other way. A waiver covers results that disagree and exceptions, and no
crash, hang or misconduct. It is stale, and fails the run, if its last day is over, if no case has such an id, or if
every case of it ran that the backend affords, and none failed. One without a mode is of exact and deployed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dsv4_hal.backend import BackendError
from dsv4_hal.conformance.judging.results import GRAD, About, Outcome, affordable, jobs
from dsv4_hal.numerics import MODES, mode_names
from dsv4_hal.ops import SIZES
from dsv4_hal.registry import registered

COVERED = ("disagrees", "error")  # verdicts
LONGEST = datetime.timedelta(days=366)


@dataclass(frozen=True)
class Waiver:
    """case: the beginning of case ids; date, expires: when it was written, and its last day; mode, backend: "" for
    any."""

    case: str
    reason: str
    date: datetime.date
    expires: datetime.date
    mode: str = ""
    backend: str = ""

    def of(self, outcome: Outcome) -> bool:
        """Whether it is of this case."""
        fits = self.mode in ("", outcome.mode) and self.backend in ("", outcome.backend)
        return fits and outcome.case.startswith(self.case)

    def covers(self, outcome: Outcome) -> bool:
        """Whether it excuses this failure."""
        return self.of(outcome) and outcome.verdict in COVERED

    def to_dict(self) -> dict[str, str]:
        """As JSON can hold it."""
        return {name: str(value) for name, value in asdict(self).items()}

    @property
    def expired(self) -> bool:
        return self.expires < today()

    @property
    def why_stale(self) -> str:
        """Of one that is."""
        return f"it expired on {self.expires}" if self.expired else "no case of it fails"


def today() -> datetime.date:
    return datetime.date.today()


def check(waiver: Waiver) -> None:
    """ValueError for one that says too little, or too much."""
    if not re.match(r"\w+\[", waiver.case):
        raise ValueError(f"case must be a case id, or begin one: 'linear[...', got {waiver.case!r}")
    if not waiver.reason.strip():
        raise ValueError("reason must say why the case fails")
    if waiver.expires < waiver.date or waiver.expires > today() + LONGEST:
        raise ValueError(
            f"expires must be a day between {waiver.date}, when it was written, and {today() + LONGEST}, a year from "
            f"today, got {waiver.expires}"
        )


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
        raise ValueError(f"{place}: must have case, reason, date and expires")
    for key in entry.keys() - {"case", "reason", "date", "expires", "mode", "backend"}:
        raise ValueError(
            f"{place}: unknown key {key}; a waiver has case, reason, date, expires, and perhaps mode and backend"
        )
    for key in ("case", "reason"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{place}: {key} must be text")
    date, expires = (_day(place, entry, key) for key in ("date", "expires"))
    if entry.get("mode", "") not in ("", *mode_names(), GRAD):
        raise ValueError(f"{place}: mode must be {', '.join(mode_names())} or {GRAD}")
    if not isinstance(entry.get("backend", ""), str):
        raise ValueError(f"{place}: backend must be text")
    if backend := entry.get("backend", ""):
        try:
            registered(backend)
        except BackendError as error:
            raise ValueError(f"{place}: {error}") from error
    found = Waiver(entry["case"], entry["reason"], date, expires, entry.get("mode", ""), backend)
    try:
        check(found)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return found


def _day(place: str, entry: dict[str, Any], key: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(entry.get(key, ""))
    except (ValueError, TypeError):
        raise ValueError(f"{place}: {key} must be a day, as in 2026-11-25, got {entry.get(key)!r}") from None


def stale(waivers: Sequence[Waiver], outcomes: Sequence[Outcome], about: About) -> list[Waiver]:
    """Waivers that have expired, and those of which no case failed, where no case has such an id, or every one ran that
    the backend affords: a part of the cases says nothing of the others."""
    every = jobs(modes=(*mode_names(), GRAD), size=SIZES[-1]) if waivers else []
    out = []
    for waiver in waivers:
        modes = (waiver.mode,) if waiver.mode else MODES
        mine = [job for job in every if job.case.startswith(waiver.case) and job.mode in modes]
        due = affordable(mine, about)
        ran = {outcome.id: outcome.ok for outcome in outcomes if waiver.of(outcome)}
        needless = all(ran.values()) and (not mine or (due and all(job.id in ran for job in due)))
        if waiver.expired or needless:
            out.append(waiver)
    return out
