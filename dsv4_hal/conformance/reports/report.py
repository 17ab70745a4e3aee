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
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dsv4_hal.conformance.judging.results import LOST, WHOLE, About, Extent, Outcome, Suite
from dsv4_hal.conformance.judging.waivers import Waiver, stale
from dsv4_hal.conformance.reports import html, saved
from dsv4_hal.conformance.reports.cells import share
from dsv4_hal.conformance.workers import files
from dsv4_hal.conformance.workers.text import counted, in_markdown
from dsv4_hal.dispatch import LACKING
from dsv4_hal.environment import emulated, environment
from dsv4_hal.ops import OPS
from dsv4_hal.registry import FALLBACK


@dataclass(frozen=True)
class Run:
    """Outcomes of one backend, in the order they came; what it says of itself, waivers that lie beside it, which size
    classes ran; which oracles of the reference were not asked, and why; of a run that was interrupted, how many cases
    it would have come to; of one that was recorded, what there is to record."""

    backend: str
    outcomes: Sequence[Outcome]
    about: About
    waivers: Sequence[Waiver] = ()
    extent: Extent = WHOLE
    unasked: Sequence[str] = ()
    interrupted_of: int | None = None
    suite: Suite | None = None

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

    @cached_property
    def stale(self) -> list[Waiver]:
        return stale(self.waivers, self.outcomes, self.about)

    @property
    def refused(self) -> dict[str, str]:
        """Ops that a backend has and refused, in some cases or in all, and why."""
        found = dict[str, str]()
        for op in self.runs_as:
            mine = [o for o in self.outcomes if o.op == op]
            why = list(dict.fromkeys(o.refused for o in mine if o.refused not in ("", LACKING)))
            if why:
                count = sum(o.refused in why for o in mine)
                some = f"in {count} of {counted(len(mine), 'case')}: " if count < len(mine) else ""
                more = f"; and {counted(len(why) - 1, 'other reason')}" if len(why) > 1 else ""
                found[op] = f"{some}{why[0]}{more}"
        return found

    @property
    def unrecorded(self) -> str:
        """Of one that was recorded: how many cases of which ops were not."""
        missing = Counter(id.partition("[")[0] for id in (self.suite.missing if self.suite else ()))
        return ", ".join(f"{op} ({counted(count, 'case')})" for op, count in missing.items())

    @property
    def judged(self) -> bool:
        """Whether anything was found out about the backend: not where it refused all cases, or computes shapes only."""
        return any(outcome.judged for outcome in self.outcomes)

    def waiver(self, outcome: Outcome) -> Waiver | None:
        return next((w for w in self.waivers if w.covers(outcome)), None)

    @property
    def headline(self) -> str:
        """First whether it was interrupted, then how much of the backend is its own: a pass of code it inherited must
        not read like one of kernels."""
        own = sum(kind == "native" for kind in self.runs_as.values())
        some = sum("native" in kind for kind in self.runs_as.values()) - own
        verdicts = Counter("waived" if self.waiver(o) else o.verdict for o in self.outcomes)
        told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        if self.backend == FALLBACK:
            asked = Counter(oracle for o in self.outcomes for oracle in o.against)
            told_of = ", ".join(f"{oracle} ({n})" for oracle, n in asked.items())
            own_text = f"the reference, against {told_of or 'no oracle'}"
        else:
            in_part = f" and {some} in part" if some else ""
            own_text = f"{counted(own, 'native op')}{in_part} of the {len(self.runs_as)} that ran"
        cases = counted(len(self.outcomes), "case")
        who = self.backend + emulated(self.about.environment, self.backend)
        judged = "" if self.judged else "; nothing of it was judged"
        recorded = "" if self.suite is None else f"; {self.suite}"
        return f"{self.interrupted}{who}: {own_text}; {cases}: {told or 'none'}{judged}{recorded}; {self.extent}"

    @property
    def interrupted(self) -> str:
        """What a headline begins with, if it was."""
        of = self.interrupted_of
        return "" if of is None else f"interrupted after {len(self.outcomes)} of {counted(of, 'case')}; "


def rows(run: Run) -> list[dict[str, Any]]:
    """A row per op that ran: op, how it runs, cases, failures, and the worst share of a budget, as it is told."""
    out = []
    for op in dict.fromkeys([*OPS, *(o.op for o in run.outcomes)]):  # whole models come last
        mine = [o for o in run.outcomes if o.op == op]
        if mine:
            failed = [o for o in mine if not o.ok]
            out.append(
                {
                    "op": op,
                    "runs_as": run.runs_as.get(op, ""),
                    "cases": len(mine),
                    "failed": len(failed),
                    "of_budget": _worst(mine),
                }
            )
    return out


def _worst(outcomes: Sequence[Outcome]) -> str:
    measured = [o.of_budget for o in outcomes if o.of_budget is not None]
    if measured:
        return share(max(measured))
    worst = min(outcomes, key=lambda o: (o.ok, o.verdict == "agrees"))
    return share(None) if worst.verdict == "agrees" else worst.verdict


def write(run: Run, directory: Path) -> None:
    """All files, into a directory that is made if need be."""
    write_views(directory / saved.OPS_FILE, jsonl(run), junit(run), markdown(run))


def write_views(truth: Path, lines: str, junit: ElementTree.Element, markdown: str) -> None:
    """A file of results and the views of it, beside it: all of them, or none."""
    truth.parent.mkdir(parents=True, exist_ok=True)
    found = {
        truth: lines,
        truth.with_name("junit.xml"): "<?xml version='1.0' encoding='utf-8'?>\n"
        + ElementTree.tostring(junit, "unicode"),
        truth.with_name("report.md"): markdown,
        truth.with_name("report.html"): html.page([saved.parsed(truth, lines.encode())]),
    }
    files.write(found)


def jsonl(run: Run) -> str:
    head = {
        "run": run.backend,
        "headline": run.headline,
        "cases": len(run.outcomes),
        "ops": run.runs_as,
        "unasked": list(run.unasked),
        "interrupted_of": run.interrupted_of,
        "refused": run.refused,
        "remarks": list(run.about.remarks),
        "suite": None if run.suite is None else asdict(run.suite),
        "sizes": asdict(run.extent) | {"classes": run.extent.classes},
        "profiles": run.about.profiles,
        "environment": run.about.environment,
        "judged": environment([FALLBACK]),
        "waivers": [{**w.to_dict(), "stale": w.why_stale if w in run.stale else ""} for w in run.waivers],
    }
    lines = [head, *({**o.to_dict(), "waived": bool(run.waiver(o))} for o in run.outcomes)]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def junit(run: Run) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=f"dsv4-hal conform {run.backend}")
    for outcome in run.outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{run.backend}.{outcome.op}", name=outcome.id, time=str(outcome.seconds)
        )
        if waiver := run.waiver(outcome):
            ElementTree.SubElement(case, "skipped", message=saved.printable(f"waived {waiver.date}: {waiver.reason}"))
        elif not outcome.ok:
            kind = "error" if outcome.verdict in LOST else "failure"
            message = saved.printable(f"{outcome.verdict}: {outcome.message}")
            ElementTree.SubElement(case, kind, message=message).text = saved.printable(outcome.trace) or None
    more = [
        ("waivers", f"{w.case} {w.mode}".strip(), "failure", f"stale: {w.why_stale}: {w.reason}") for w in run.stale
    ]
    if run.interrupted:
        more.append(("run", "came to its end", "error", run.headline))
    for group, name, kind, told in more:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{run.backend}.{group}", name=name)
        ElementTree.SubElement(case, kind, message=saved.printable(told))
    suite.set("tests", str(len(suite)))
    for count, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(len(suite.findall(f"testcase/{kind}"))))
    return suite


def markdown(run: Run) -> str:
    lines = [
        f"# {run.headline}",
        "",
        "| op | runs as | cases | failed | worst of budget |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows(run):
        lines.append(f"| {row['op']} | {row['runs_as']} | {row['cases']} | {row['failed']} | {row['of_budget']} |")
    for title, chosen in (("Failures", run.failed), ("Waived", [o for o in run.outcomes if run.waiver(o)])):
        if chosen:
            lines += ["", f"## {title}", ""]
            lines += [f"- `{o.id}` {o.verdict}: {in_markdown(o.message)}" for o in chosen]
    if run.refused:
        lines += ["", "## Ops that it refused", ""]
        lines += [f"- `{op}`: {in_markdown(why)}" for op, why in run.refused.items()]
    if run.unasked:
        lines += ["", "## Oracles that were not asked", "", *(f"- {told}" for told in run.unasked)]
    if run.about.remarks:
        lines += ["", "## Remarks", "", *(f"- {in_markdown(told)}" for told in run.about.remarks)]
    if run.unrecorded:
        lines += ["", "## Cases that were not recorded", "", f"- {run.unrecorded}"]
    if run.stale:
        lines += ["", "## Stale waivers", ""]
        lines += [f"- `{w.case}` of {w.date}: {w.why_stale}: {in_markdown(w.reason)}" for w in run.stale]
    return "\n".join(lines) + "\n"
