"""What a comparison of whole models says: `model.jsonl` is the truth, the others are views of it.

model.jsonl  first what was compared (models, backends, profiles, environments), then a row of `drift.py` a line
junit.xml    a test case per part, for a CI that shows them
report.md    a headline per backend, a row per part, and every failure
report.html  all of it to look at, see `html.py`
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dsv4_hal.conformance.judging.results import finite
from dsv4_hal.conformance.models.compare import Compared, headline
from dsv4_hal.conformance.models.drift import GOOD, Part, Picks, Row
from dsv4_hal.conformance.reports import saved
from dsv4_hal.conformance.reports.cells import share
from dsv4_hal.conformance.reports.report import write_views
from dsv4_hal.conformance.workers.text import in_markdown


def write(compared: Compared, directory: Path) -> None:
    """All files, into a directory that is made if need be."""
    write_views(directory / saved.MODEL_FILE, jsonl(compared), junit(compared), markdown(compared))


def jsonl(compared: Compared) -> str:
    told = {"headline": list(headline(compared)), "unjudged": list(compared.unjudged), "rows": len(compared.rows)}
    head = {"kind": "model", **compared.head, **told}
    lines = [head, *map(_plain, compared.rows)]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def _plain(row: Row) -> dict[str, Any]:
    """As JSON can hold it: what is not finite becomes text."""
    told = {k: finite(v) if isinstance(v, float) else v for k, v in asdict(row).items()}
    return told | {"message": "" if row.verdict in GOOD else row.message}


def junit(compared: Compared) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=f"dsv4-hal compare {compared.head['model']['name']}")
    for row in compared.rows:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{row.backend}.model", name=row.name)
        if row.verdict not in GOOD:
            kind = "error" if row.verdict == "error" else "failure"
            ElementTree.SubElement(case, kind, message=saved.printable(f"{row.verdict}: {row.message}"))
    for count, kind in (("tests", ""), ("failures", "/failure"), ("errors", "/error")):
        suite.set(count, str(len(suite.findall(f"testcase{kind}"))))
    return suite


def markdown(compared: Compared) -> str:
    head = compared.head
    lines = [f"# {head['model']['name']}, mode {head['mode']}", "", *(f"- {line}" for line in headline(compared)), ""]
    for backend in head["backends"]:
        mine = [row for row in compared.rows if row.backend == backend]
        lines += [f"## {backend}", "", "| part | relative error | median token | worst token | of budget | verdict |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(cells(row))} |" for row in mine if isinstance(row, Part)]
        lines += ["", "| picks | agree |", "| --- | --- |"]
        lines += [f"| {row.name} | {row.agreement:.2%} |" for row in mine if isinstance(row, Picks)]
        lines += [""]
        failed = [row for row in mine if row.verdict not in GOOD]
        if failed:
            lines += [
                "### Failures",
                "",
                *(f"- `{row.name}` {row.verdict}: {in_markdown(row.message)}" for row in failed),
                "",
            ]
    return "\n".join(lines)


def cells(part: Part) -> tuple[str, ...]:
    """name, relative error, median token, worst token, share of budget, verdict."""
    errors = (part.rms, part.median_token, part.worst_token)
    of_budget = "" if part.of_budget is None and part.verdict not in GOOD else share(part.of_budget)
    return part.name, *("" if e is None else f"{e:.1e}" for e in errors), of_budget, part.verdict
