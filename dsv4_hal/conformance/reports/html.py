"""`report.html`: runs on one page that needs nothing else, neither a network nor, but for its filters, JavaScript.

Here is what the page says; `page/` is how: Jinja templates, which escape every text, a style sheet, and a script that
hides what a filter leaves out. The page's policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsv4_hal.conformance.judging.results import DEFAULT_SIZE, up_to
from dsv4_hal.conformance.models.drift import GOOD, Free, Part, Picks
from dsv4_hal.conformance.reports import charts
from dsv4_hal.conformance.reports.cells import STATES, Cell, gather, share, state
from dsv4_hal.conformance.reports.saved import ModelRun, OpsRun, SavedOutcome, SavedWaiver, Sections, printable
from dsv4_hal.conformance.workers import files
from dsv4_hal.conformance.workers.text import counted
from dsv4_hal.ops import OPS

FOLDER = Path(__file__).parent / "page"
OTHER = {"model": "whole model"}  # families of what is no op
TITLES = {"nmse": "NMSE", "max_abs": "max abs", "max_rel": "max rel", "1e-3": "within 1e-3", "5e-3": "within 5e-3"}


def write(runs: Sequence[OpsRun | ModelRun], path: Path) -> None:
    """Write the page of these runs. ValueError where the same one is given twice."""
    files.write({path: page(runs)})


def page(runs: Sequence[OpsRun | ModelRun]) -> str:
    """The page of these runs."""
    places = [run.place for run in runs]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise ValueError(f"{twice} is given twice")
    labelled = _labelled(runs)
    ops = {label: run for label, run in labelled.items() if isinstance(run, OpsRun)}
    models = {label: run for label, run in labelled.items() if isinstance(run, ModelRun)}
    cells = gather(ops)
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": share,
        "number": number,
        "counted": counted,
        "state": state,
        "command": command,
        "results": results,
    }
    return environment.get_template("page.html").render(
        runs=[_summary(label, run, [c for c in cells if c.label == label]) for label, run in ops.items()],
        labels=list(ops),
        matrix=_matrix(cells),
        ops={op: [c for c in cells if c.op == op] for op in dict.fromkeys(c.op for c in cells)},
        modes=list(dict.fromkeys(o.mode for c in cells for o in c.outcomes)),
        models=[_model(label, run) for label, run in models.items()],
        numerics=_side_by_side(_profiles(ops, models)),
        environments=_side_by_side(_environments(ops, models)),
        places=[printable(str(place)) for place in places],
        states=STATES,
        titles=TITLES,
        good=GOOD,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def command(outcome: SavedOutcome) -> str:
    """What runs one case again."""
    size = () if outcome.size in up_to(DEFAULT_SIZE) else ("--size", outcome.size)
    op = ("-o", outcome.op) if outcome.op in OPS else ()
    return shlex.join(["dsv4-hal", "conform", "--backend", outcome.backend, *op, "-p", outcome.id, *size])


def results(outcome: SavedOutcome) -> list[tuple[str, Mapping[str, float]]]:
    """The numbers of each result; results that have the same ones together."""
    found: list[tuple[str, Mapping[str, float]]] = []
    for name, metrics in outcome.metrics.items():
        same = next((i for i, (_, other) in enumerate(found) if other == metrics), None)
        if same is None:
            found.append((name, metrics))
        else:
            found[same] = (f"{found[same][0]}, {name}", metrics)
    return found


def _labelled(runs: Sequence[OpsRun | ModelRun]) -> dict[str, OpsRun | ModelRun]:
    """A name for each run; where several have the same, with the place of its results."""
    names = [
        run.head.run if isinstance(run, OpsRun) else f"{run.head.model.get('name', 'model')}, {run.head.mode}"
        for run in runs
    ]
    labels = [
        name if names.count(name) == 1 else printable(f"{name} ({run.place})")
        for name, run in zip(names, runs, strict=True)
    ]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"two runs are called {twice}")
    return dict(zip(labels, runs, strict=True))


def _matrix(cells: Iterable[Cell]) -> dict[str, dict[str, dict[str, dict[str, Cell]]]]:
    """Family -> op -> format -> run -> its cell."""
    out: dict[str, dict[str, dict[str, dict[str, Cell]]]] = {}
    for cell in cells:
        family = OPS[cell.op].family.replace("_", " ") if cell.op in OPS else OTHER.get(cell.op, "not in this contract")
        out.setdefault(family, {}).setdefault(cell.op, {}).setdefault(cell.format, {})[cell.label] = cell
    return out


def _summary(label: str, run: OpsRun, cells: Sequence[Cell]) -> dict[str, Any]:
    stale = [w for w in run.head.waivers if w.stale]
    refused: dict[str, list[str]] = {}
    for op, why in run.head.refused.items():
        refused.setdefault(why, []).append(op)
    bad = [cell for cell in cells if cell.state in ("fails", "waived")]
    seen = {cell.state for cell in cells}
    if "fails" in seen:
        told = ("fails", "disagrees")
    elif run.head.interrupted_of is not None:
        told = ("waived", f"interrupted after {len(run.outcomes)} of {counted(run.head.interrupted_of, 'case')}")
    elif stale:
        told = ("waived", "a waiver is stale")
    elif "waived" in seen:
        told = ("waived", "waivers cover all failures")
    elif not cells:
        told = ("shapes", "no case ran")
    elif "shapes" in seen:
        told = ("shapes", "shapes are right; no values compared")
    elif not any(o.judged for o in run.outcomes):
        told = ("borrowed", "nothing was judged: the reference ran in its place")
    else:
        told = ("agrees" if "agrees" in seen else "borrowed", "no failures")
    return {
        "label": label,
        "state": told[0],
        "told": told[1],
        "headline": run.head.headline,
        "refused": refused,
        "unasked": run.head.unasked,
        "remarks": run.head.remarks,
        "counts": Counter(state(o) for o in run.outcomes),
        "bad": [(cell, _waiver(run.head.waivers, cell.outcomes[0])) for cell in bad],
        "stale": stale,
        "charts": charts.distributions((o, state(o)) for o in run.outcomes),
    }


def _waiver(waivers: Iterable[SavedWaiver], outcome: SavedOutcome) -> SavedWaiver | None:
    return next((w for w in waivers if outcome.waived and w.covers(outcome)), None)


def _model(label: str, run: ModelRun) -> dict[str, Any]:
    """What the page shows of a comparison of models: cards, charts of the parts that every layer has, tables."""
    parts = [row for row in run.rows if isinstance(row, Part)]
    picks = [row for row in run.rows if isinstance(row, Picks)]
    in_layers = dict.fromkeys(p.part for p in parts if p.layer is not None)
    backends = list(dict.fromkeys(row.backend for row in run.rows))
    failed = [row for row in run.rows if row.verdict not in GOOD]
    told = ("fails", "disagrees") if failed else ("agrees", "no failures") if run.rows else ("shapes", "nothing ran")
    if run.head.unjudged and not failed:
        told = ("borrowed", f"nothing was judged: {' and '.join(run.head.unjudged)} refused every op")
    return {
        "label": label,
        "head": run.head,
        "state": told[0],
        "told": told[1],
        "failed": failed,
        "backends": backends,
        "charts": [(name, charts.drift([p for p in parts if p.part == name], backends)) for name in in_layers],
        "parts": parts,
        "picks": picks,
        "free": [row for row in run.rows if isinstance(row, Free)],
    }


def _profiles(ops: Mapping[str, OpsRun], models: Mapping[str, ModelRun]) -> dict[str, Sections]:
    found = {label: run.head.profiles for label, run in ops.items()}
    for label, model in models.items():
        for backend, profile in model.head.profiles.items():
            found[f"{backend} on {label}"] = {model.head.mode: profile}
    return found


def _environments(ops: Mapping[str, OpsRun], models: Mapping[str, ModelRun]) -> dict[str, Sections]:
    """Where each run took place, and where it was judged."""
    found = {label: run.head.environment for label, run in ops.items()}
    for label, model in models.items():
        found |= {f"{backend} on {label}": where for backend, where in model.head.environment.items()}
    return found | {f"judge of {label}": run.head.judged for label, run in ops.items()}


def _side_by_side(found: Mapping[str, Sections]) -> dict[str, Any]:
    """A column each, equal ones together; of each section its facts, and whether they differ between the columns."""
    columns: list[tuple[list[str], Sections]] = []
    for label, sections in found.items():
        same = next((labels for labels, other in columns if other == sections), None)
        if same is None:
            columns.append(([label], sections))
        else:
            same.append(label)
    told: dict[str, list[tuple[str, bool, list[str]]]] = {}
    for section in dict.fromkeys(name for _, sections in columns for name in sections):
        who = [sections.get(section) for _, sections in columns]
        for fact in dict.fromkeys(name for facts in who for name in facts or {}):
            values = ["" if facts is None else _text(facts.get(fact, "")) for facts in who]
            differs = len({v for v, facts in zip(values, who, strict=True) if facts is not None}) > 1
            told.setdefault(section, []).append((fact, differs, values))
    return {"columns": ["; ".join(labels) for labels, _ in columns], "sections": told}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
