"""Runs read back from their files: `results.jsonl` (the cases of the contract) and `model.jsonl` (a whole model).

Every line is checked, and that none is missing; what is damaged or foreign is a ValueError that names the file and the
line. Keys that are not known here are left aside, so that files may grow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from dsv4_hal.conformance.judging.results import VERDICTS, Outcome
from dsv4_hal.conformance.judging.waivers import Waiver
from dsv4_hal.conformance.models.drift import Free, Part, Picks, Row

OPS_FILE, MODEL_FILE = "results.jsonl", "model.jsonl"
VIEWS = ("junit.xml", "report.md", "report.html")

Sections = Mapping[str, Mapping[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class SavedWaiver(Waiver):
    """A waiver that lay beside the backend, and why it has grown stale, "" if it has not."""

    stale: str = ""


@dataclass(frozen=True)
class OpsHead:
    """The first line of results.jsonl, as far as it is read here."""

    run: str
    headline: str
    cases: int
    profiles: Sections
    environment: Sections
    judged: Sections
    waivers: Sequence[SavedWaiver]
    refused: Mapping[str, str] = field(default_factory=dict)
    unasked: Sequence[str] = ()
    remarks: Sequence[str] = ()
    interrupted_of: int | None = None


@dataclass(frozen=True)
class SavedOutcome(Outcome):
    of_budget: Annotated[float, Field(ge=0)] | None = None
    waived: bool = False


@dataclass(frozen=True)
class ModelHead:
    """The first line of model.jsonl, as far as it is read here."""

    baseline: str
    backends: Sequence[str]
    model: Mapping[str, Any]
    mode: str
    prompts: Sequence[int]
    steps: Sequence[str]
    profiles: Sections
    environment: Mapping[str, Sections]
    headline: Sequence[str]
    rows: int
    unjudged: Sequence[str] = ()


@dataclass(frozen=True)
class OpsRun:
    """The cases of the contract on a backend. place: the file."""

    place: Path
    head: OpsHead
    outcomes: Sequence[SavedOutcome]


@dataclass(frozen=True)
class ModelRun:
    """Backends compared on a whole model. place: the file."""

    place: Path
    head: ModelHead
    rows: Sequence[Row]


def read(path: Path) -> list[OpsRun | ModelRun]:
    """What a file of results holds, or a folder of them. ValueError where that cannot be read."""
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if not path.is_dir():
        return [read_file(path)]
    files = [path / name for name in (OPS_FILE, MODEL_FILE) if (path / name).is_file()]
    if not files:
        raise ValueError(f"{path}: holds neither {OPS_FILE} nor {MODEL_FILE}")
    return [read_file(file) for file in files]


def folder(directory: Path, file: str) -> None:
    """Make a folder that `file` and its views can be written to, or say why not, before anything runs."""
    directory.mkdir(parents=True, exist_ok=True)
    (other,) = {OPS_FILE, MODEL_FILE} - {file}
    if (directory / other).exists():
        raise ValueError(f"{directory} holds {other}, and reports of the same names: choose another folder")
    for name in (file, *VIEWS):
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a directory")
    probe = directory / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b"\n")
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from error


def finished(directory: Path) -> bool:
    """Whether a folder holds cases of the contract that ran to their end."""
    try:
        run = read_file(directory / OPS_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(run, OpsRun) and run.head.interrupted_of is None


def read_file(path: Path) -> OpsRun | ModelRun:
    """The run in a file: which kind it is, its first line says."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    return parsed(path, path.read_bytes())


def parsed(path: Path, content: bytes) -> OpsRun | ModelRun:
    """The same, from what the file holds."""
    (where, first), *lines = _lines(path, content)
    if first.get("kind") == "model":
        model = _checked(ModelHead, first, where)
        _all_there(path, len(lines), model.rows, "rows")
        return ModelRun(path, model, [_row(found, at) for at, found in lines])
    if "run" in first:
        head = _checked(OpsHead, first, where)
        _all_there(path, len(lines), head.cases, "cases")
        outcomes = [_checked(SavedOutcome, found, at) for at, found in lines]
        seen = set[str]()
        for (at, _), outcome in zip(lines, outcomes, strict=True):
            if outcome.backend != head.run:
                raise ValueError(f"{at}: is a case of {outcome.backend}, in a run of {head.run}")
            if outcome.id in seen:
                raise ValueError(f"{at}: {outcome.id} is there already")
            if outcome.verdict not in VERDICTS:
                raise ValueError(f"{at}: {outcome.verdict!r} is no verdict")
            seen.add(outcome.id)
        return OpsRun(path, head, outcomes)
    raise ValueError(f"{where}: begins neither a conformance run nor a comparison of models")


def printable(text: str) -> str:
    """Control characters, and halves of surrogate pairs, as escapes: a message may hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _all_there(path: Path, found: int, told: int, what: str) -> None:
    if found != told:
        raise ValueError(f"{path}:{found + 1}: ends after {found} {what}, and its first line tells of {told}")


def _row(found: dict[str, Any], where: str) -> Row:
    kind = Free if "free" in found else Picks if "picks" in found else Part
    return cast(Row, _checked(kind, found, where))


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line stands, and the object on it; at least one."""
    lines = content.splitlines()
    if not lines:
        raise ValueError(f"{path}:1: is empty")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            found = _printable(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{where}: is not a JSON object")
        yield where, found


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


_READERS: Mapping[type[Any], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (OpsHead, SavedOutcome, ModelHead, Part, Picks, Free)
}


def _checked(kind: type[T], found: dict[str, Any], where: str) -> T:
    """Numbers that JSON cannot hold are the texts "inf" and "nan"."""
    try:
        return cast(T, _READERS[kind].validate_python(found))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
