"""Comparing backends on a whole model, and finding the first op that is wrong: who is run on what, in which order.

Live, the first backend runs freely, and the parts of every other one are run from what it saw. A bundle holds such a
free run of a backend elsewhere, and the parts of a backend here are run from what that one saw. In both cases the
reference runs them too, in its profile and in the widened one, for the budgets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_hal.backend import BackendError
from dsv4_hal.conformance.judging.profiles import known, told
from dsv4_hal.conformance.models import drift
from dsv4_hal.conformance.models import run as model_run
from dsv4_hal.conformance.models.drift import GOOD, Call, Part, Picks, Row
from dsv4_hal.conformance.models.replay import Script
from dsv4_hal.conformance.models.run import LIMIT, PROGRESS, ModelRun
from dsv4_hal.conformance.workers.container import BundleError
from dsv4_hal.conformance.workers.text import counted
from dsv4_hal.environment import emulated
from dsv4_hal.numerics import Numerics
from dsv4_hal.registry import FALLBACK, registered

Tell = Callable[[str], PROGRESS]
"""Told what begins; returns what is called with its progress."""
LOST = "process"  # in place of a part, where a backend failed on the way


@dataclass(frozen=True)
class Compared:
    """head: what was compared, the first line of model.jsonl. rows: see `drift.rows`, backend by backend. unjudged:
    backends that refused every op, so that the reference ran in their place."""

    head: dict[str, Any]
    rows: Sequence[Row]
    unjudged: Sequence[str] = ()

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.verdict not in GOOD]


def live(
    directory: str, backends: Sequence[str], mode: str, script: Script, tell: Tell, limit: float = LIMIT
) -> Compared:
    """The first backend against each of the others. One that fails on the way is an error among the rows.

    limit  seconds that a step may take
    BackendError, before anything is run, where one cannot be used; and where the first one fails: nothing can be
    compared with it.
    """
    base, *others = backends
    numerics = check_usable(directory, backends, mode)
    with _Runs(directory, tell, limit) as runs:
        want = runs.record(base, numerics, script)
        narrow, wide = runs.budget(want)
        found: list[Row] = []
        known = {base: want}
        for backend in others:
            try:
                got = runs.replay(backend)
            except BackendError as error:
                found.append(_lost(backend, error))
                continue
            known[backend] = got
            found += drift.rows(backend, got, want, narrow, wide)
    return _compared(directory, base, others, known, want, found)


def check_usable(directory: str, backends: Sequence[str], mode: str) -> Numerics:
    """The mode's profile. BackendError where a backend cannot be used. The first one's own run tells what is wrong with
    it."""
    for backend in backends:
        registered(backend)
    numerics = told(mode)
    for backend in backends[1:]:
        if backend != FALLBACK:
            model_run.check_usable(directory, backend, numerics)
    return numerics


def recorded(directory: str, bundle: Path, backend: str, tell: Tell, limit: float = LIMIT) -> Compared:
    """A run recorded elsewhere against a backend here. BackendError where the latter fails."""
    with _Runs(directory, tell, limit, bundle) as runs:
        got = runs.given
        want = runs.replay(backend)
        narrow, wide = runs.budget(want)
    found = list(drift.rows(got.backend, got, want, narrow, wide))
    return _compared(directory, backend, [got.backend], {got.backend: got, backend: want}, got, found)


@dataclass(frozen=True)
class Bisected:
    """Where two runs part.

    compared  the parts
    place     name of the first part beyond its budget; "" if there is none
    calls     calls of ops there, or everywhere in a bundle, in order
    """

    compared: Compared
    place: str
    calls: Sequence[Call]

    @property
    def first(self) -> Call | None:
        return next((call for call in self.calls if not call.ok), None)


def bisect_live(
    directory: str, backends: Sequence[str], mode: str, script: Script, tell: Tell, limit: float = LIMIT
) -> Bisected:
    """The first call of an op that the second backend makes wrong, in the first part that is beyond its budget.

    limit and BackendError as in `live`. Where the second backend fails on the way, no call is found, and that it did is
    the last row.
    """
    base, backend = backends
    numerics = check_usable(directory, backends, mode)
    with _Runs(directory, tell, limit) as runs:
        want = runs.record(base, numerics, script)
        narrow, wide = runs.budget(want)
        known, found = {base: want}, list[Row]()
        try:
            known[backend] = got = runs.replay(backend)
            found += drift.rows(backend, got, want, narrow, wide)
            place = first_place([row for row in found if row.verdict not in GOOD])
            if place:
                got = runs.replay(backend, place)
        except BackendError as error:
            place = ""
            found.append(_lost(backend, error))
        compared = _compared(directory, base, [backend], known, want, found)
        if not place:
            return Bisected(compared, "", ())
        want = runs.replay(base, place)
        narrow, wide = runs.budget(want, place)
        return Bisected(compared, place, list(drift.calls(backend, got, want, narrow, wide)))


def bisect_recorded(directory: str, bundle: Path, backend: str, tell: Tell, limit: float = LIMIT) -> Bisected:
    """The first call of an op that a bundle's backend made wrong. ValueError if the bundle holds no ops."""
    with _Runs(directory, tell, limit, bundle) as runs:
        got = runs.given
        if not any(got.calls):
            raise ValueError(f"{bundle} holds what parts made, not what ops made: record it with --ops")
        want = runs.replay(backend, "")
        narrow, wide = runs.budget(want, "")
    found = list(drift.calls(got.backend, got, want, narrow, wide))
    first = next((call.name.partition("/")[0] for call in found if not call.ok), "")
    compared = _compared(directory, backend, [got.backend], {got.backend: got, backend: want}, got, ())
    return Bisected(compared, first, found)


def first_place(failed: Sequence[Row]) -> str:
    """The name of the first part, in the order of the forward pass, that failed or made other picks."""
    order = ("embed", "streams", "attn", "ffn", "head")
    places = [
        (-1 if row.part == "embed" else 10**9 if row.layer is None else row.layer, order.index(row.part), row.name)
        for row in failed
        if isinstance(row, Part) and row.part in order
    ]
    for row in failed:
        if isinstance(row, Picks):
            part = "ffn" if row.picks == "experts" else "attn"
            places.append((row.layer, order.index(part), f"layers.{row.layer}.{part}"))
    return min(places)[2] if places else ""


class _Runs:
    """Runs of one model, kept in a folder while they are compared. The first is recorded, or given."""

    def __init__(self, directory: str, tell: Tell, limit: float, bundle: Path | None = None) -> None:
        self.directory, self.tell, self.limit, self.bundle = directory, tell, limit, bundle
        if bundle is not None:
            self.given = model_run.read(bundle)
            try:
                known(self.given.mode, self.given.profile)
            except ValueError as error:
                raise BundleError(f"{bundle}: profile: {error}") from error

    def __enter__(self) -> _Runs:
        self.folder = tempfile.TemporaryDirectory(prefix="dsv4-hal-")
        return self

    def __exit__(self, *error: object) -> None:
        self.folder.cleanup()

    def record(self, backend: str, numerics: Numerics, script: Script) -> ModelRun:
        self.bundle = self._path()
        progress = self.tell(f"{backend}, freely")
        model_run.record(self.bundle, self.directory, backend, numerics, script, progress=progress, limit=self.limit)
        self.given = _in(numerics, model_run.read(self.bundle))
        return self.given

    def replay(self, backend: str, ops: str | None = None, wide: bool = False) -> ModelRun:
        assert self.bundle is not None
        path = self._path()
        what = f"{backend}, part by part" + (", in float64" if wide else "") + ("" if ops is None else ", every op")
        model_run.replayed(path, self.bundle, self.directory, backend, wide, ops, self.tell(what), self.limit)
        try:
            found = model_run.read(path)
            return found if wide else _in(self.given.numerics, found)
        finally:
            path.unlink()

    def budget(self, here: ModelRun, ops: str | None = None) -> tuple[ModelRun, ModelRun]:
        """The reference on what the first run saw: in its profile, which may be a run made here already, and in the
        widened one."""
        narrow = here if here.backend == FALLBACK else self.replay(FALLBACK, ops)
        return narrow, self.replay(FALLBACK, ops, wide=True)

    def _path(self) -> Path:
        return Path(self.folder.name) / f"{len(list(Path(self.folder.name).iterdir()))}.bundle"


def _in(numerics: Numerics, run: ModelRun) -> ModelRun:
    """A run, which must have been in this profile. BackendError otherwise."""
    if run.numerics != numerics:
        raise BackendError(f"backend {run.backend} ran in another profile than that of mode {numerics.mode}")
    return run


def _lost(backend: str, error: BackendError) -> Part:
    return Part(backend, None, None, LOST, verdict="error", message=str(error))


def _compared(
    directory: str, base: str, others: Sequence[str], runs: dict[str, ModelRun], given: ModelRun, rows: Sequence[Row]
) -> Compared:
    head = {
        "baseline": base,
        "backends": list(others),
        "model": {**given.model, "path": directory},
        "mode": given.mode,
        "prompts": [len(prompt) for prompt in given.script.prompts],
        "steps": ["+".join(map(str, q_lens)) for q_lens in given.script.steps],
        "profiles": {name: run.profile for name, run in runs.items()},
        "environment": {name: run.environment for name, run in runs.items()},
        "ops": {name: run.ops for name, run in runs.items()},
        "refused": {name: run.refused for name, run in runs.items()},
    }
    return Compared(head, rows, [name for name, run in runs.items() if not run.judged])


def headline(compared: Compared) -> Iterator[str]:
    """A line per backend: how many of its parts agree, the worst, and how far the free run stays together."""
    base, where = compared.head["baseline"], compared.head["environment"]
    for backend in compared.head["backends"]:
        mine = [row for row in compared.rows if row.backend == backend]
        judged = [row for row in mine if isinstance(row, Part)]
        if lost := next((row for row in judged if row.part == LOST), None):
            yield f"{backend} against {base}: not compared: {lost.message}"
            continue
        bad = [row for row in mine if row.verdict not in GOOD]
        own = sum(kind == "native" for kind in compared.head["ops"].get(backend, {}).values())
        shares = [row.of_budget for row in judged if row.of_budget is not None]
        free = next((row for row in mine if isinstance(row, drift.Free) and row.top1 is not None), None)
        who = backend + emulated(where.get(backend, {}), backend)
        text = f"{who} against {base}: {counted(own, 'native op')}; {counted(len(judged), 'part')}, {len(bad)} wrong"
        if unjudged := [name for name in (base, backend) if name in compared.unjudged]:
            text += f"; nothing was judged: {' and '.join(unjudged)} refused every op"
        if shares:
            text += f", worst at {max(shares):.2f} of its budget"
        if free is not None:
            after = "none" if free.diverges is None else f"token {free.diverges}"
            text += (
                f"; free run: top-1 {free.top1:.1%}, KL {free.kl:.2g}, "
                f"first greedy token that differs: {after} of {free.greedy_tokens}"
            )
        yield text
