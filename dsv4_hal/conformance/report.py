"""What a conformance run says: `results.jsonl` is the truth, the others are views of it.

results.jsonl  first the run (backend, numeric profiles, where it ran and where it was judged), then an outcome a line
junit.xml      a test case per outcome, for a CI that shows them
report.md      the headline, a row per op, and every failure
report.html    all of it to look at, see `html.py`
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dsv4_hal.conformance import html, saved
from dsv4_hal.conformance.runner import WHOLE, About, Extent, Outcome
from dsv4_hal.conformance.waivers import Waiver, stale
from dsv4_hal.environment import emulated, environment
from dsv4_hal.ops import OPS
from dsv4_hal.registry import FALLBACK


@dataclass(frozen=True)
class Run:
    """Outcomes of one backend, in the order they came; what it says of itself, waivers that lie beside it, which size
    classes ran; which oracles of the reference were not asked, and why."""

    backend: str
    outcomes: Sequence[Outcome]
    about: About
    waivers: Sequence[Waiver] = ()
    extent: Extent = WHOLE
    unasked: Sequence[str] = ()

    @property
    def runs_as(self) -> dict[str, str]:
        """How each op that ran was run; "native / reference" where that differs from mode to mode."""
        kinds: dict[str, dict[str, None]] = {}
        for outcome in self.outcomes:
            if outcome.runs_as:
                kinds.setdefault(outcome.op, {})[outcome.runs_as] = None
        return {op: " / ".join(kinds[op]) for op in OPS if op in kinds}

    @property
    def failed(self) -> list[Outcome]:
        """Failures that no waiver covers."""
        return [o for o in self.outcomes if not o.ok and not self.waiver(o)]

    @property
    def stale(self) -> list[Waiver]:
        return stale(self.waivers, self.outcomes)

    def waiver(self, outcome: Outcome) -> Waiver | None:
        return next((w for w in self.waivers if not outcome.ok and w.matches(outcome)), None)

    @property
    def headline(self) -> str:
        """First how much of the backend is its own: a pass of code it inherited must not read like one of kernels."""
        own = sum(kind == "native" for kind in self.runs_as.values())
        verdicts = Counter("waived" if self.waiver(o) else o.verdict for o in self.outcomes)
        told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        if self.backend == FALLBACK:
            asked = Counter(oracle for o in self.outcomes for oracle in o.against)
            told_of = ", ".join(f"{oracle} ({n})" for oracle, n in asked.items())
            own_text = f"the reference, against {told_of or 'no oracle'}"
        else:
            own_text = f"{own} native op{'' if own == 1 else 's'} of the {len(self.runs_as)} that ran"
        who = self.backend + emulated(self.about.environment, self.backend)
        return f"{who}: {own_text}; {len(self.outcomes)} cases: {told or 'none'}; {self.extent}"


def rows(run: Run) -> list[dict[str, Any]]:
    """A row per op that ran: op, how it runs, cases, failures, the worst share of a budget, and the first failure."""
    out = []
    for op in dict.fromkeys([*OPS, *(o.op for o in run.outcomes)]):  # whole models come last
        mine = [o for o in run.outcomes if o.op == op]
        if mine:
            failed = [o for o in mine if not o.ok]
            measured = [o.of_budget for o in mine if o.of_budget is not None]
            first = failed[0] if failed else None
            out.append(
                {
                    "op": op,
                    "runs_as": run.runs_as.get(op, ""),
                    "cases": len(mine),
                    "failed": len(failed),
                    "of_budget": max(measured, default=None),
                    "first": "" if first is None else f"{first.id}: {first.verdict}: {first.message}",
                }
            )
    return out


def write(run: Run, directory: Path) -> None:
    """All files, into a directory that is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / saved.OPS_FILE).write_text(jsonl(run), encoding="utf-8")
    ElementTree.ElementTree(junit(run)).write(directory / "junit.xml", encoding="utf-8", xml_declaration=True)
    (directory / "report.md").write_text(markdown(run), encoding="utf-8", errors="backslashreplace")
    html.write([saved.read_file(directory / saved.OPS_FILE)], directory / "report.html")


def jsonl(run: Run) -> str:
    head = {
        "run": run.backend,
        "headline": run.headline,
        "cases": len(run.outcomes),
        "ops": run.runs_as,
        "unasked": list(run.unasked),
        "sizes": asdict(run.extent) | {"classes": run.extent.classes},
        "profiles": run.about.profiles,
        "environment": run.about.environment,
        "judged": environment([FALLBACK]),
        "waivers": [{**asdict(w), "date": str(w.date), "stale": w in run.stale} for w in run.waivers],
    }
    lines = [head, *({**o.to_dict(), "waived": bool(run.waiver(o))} for o in run.outcomes)]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def junit(run: Run) -> ElementTree.Element:
    failed = run.failed
    suite = ElementTree.Element(
        "testsuite", name=f"dsv4-hal conform {run.backend}", tests=str(len(run.outcomes)), failures=str(len(failed))
    )
    for outcome in run.outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{run.backend}.{outcome.op}", name=outcome.id, time=str(outcome.seconds)
        )
        if waiver := run.waiver(outcome):
            ElementTree.SubElement(case, "skipped", message=saved.printable(f"waived {waiver.date}: {waiver.reason}"))
        elif not outcome.ok:
            ElementTree.SubElement(case, "failure", message=saved.printable(f"{outcome.verdict}: {outcome.message}"))
    return suite


def markdown(run: Run) -> str:
    lines = [
        f"# {run.headline}",
        "",
        "| op | runs as | cases | failed | worst of budget |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows(run):
        lines.append(
            f"| {row['op']} | {row['runs_as']} | {row['cases']} | {row['failed']} | {share(row['of_budget'])} |"
        )
    for title, chosen in (("Failures", run.failed), ("Waived", [o for o in run.outcomes if run.waiver(o)])):
        if chosen:
            lines += ["", f"## {title}", ""]
            lines += [f"- `{o.id}` {o.verdict}: {o.message}" for o in chosen]
    if run.unasked:
        lines += ["", "## Oracles that were not asked", "", *(f"- {told}" for told in run.unasked)]
    if run.stale:
        lines += ["", "## Stale waivers", "", *(f"- `{w.case}` of {w.date}: {w.reason}" for w in run.stale)]
    return "\n".join(lines) + "\n"


def share(of_budget: float | None) -> str:
    return "" if of_budget is None else f"{of_budget:.2f}"
