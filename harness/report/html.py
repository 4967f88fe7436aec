"""The `--html` file: a run, or a matrix of several, as one page that needs nothing else, with each walk drawn as the
grid that it is.

A finding's walk has a row for each entry of L2's tables: the nested walk of that entry's own address, then the entry;
and a last row for the page itself. The page is made of the files in harness/report/page, and of the values here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from harness.lockstep.errata import Erratum
from harness.lockstep.signature import Signature
from harness.model.access import Reached
from harness.model.coverage import BOTH, Cell
from harness.model.entries import FRAME
from harness.model.rules import RULES
from harness.model.walk import FINAL, GUEST, NESTED
from harness.report import coverage, output, words
from harness.report.beside import Beside
from harness.report.findings import Finding, findings, place
from harness.report.headline import headline, rule_of
from harness.report.summary import Summary, describe_machine
from harness.report.table import totals, verdict
from harness.report.timeline import Timeline, of_results
from harness.scenario import writer
from harness.scenario.ops import RunOp, Scenario

_DRAWN: Final = 500
_EACH: Final = 3
"""Walks that are drawn: so many in all, and of each signature so many at least. Others are like them."""
_SEARCHED: Final = 400
_DIMENSIONS: Final = ("", "guest", "nested table", "nested page", BOTH)
_LEVELS: Final = ("", "pml5e", "pml4e", "pdpte", "pde", "pte")
_BEFORE: Final = 40
"""Ops of a scenario that are told before the one that a finding is of."""


class Table(NamedTuple):
    """A section of the page that only one command has: `rows` of text under `head`, which may be empty."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write(path: Path, summary: Summary, errata: Iterable[Erratum] = (), tables: Sequence[Table] = (),
          timeline: Timeline | None = None) -> None:
    """After a run: all of the file or nothing. Raises TwinwalkError if that fails after all."""
    output.write(path, text(summary, errata, tables, timeline))


def text(summary: Summary, errata: Iterable[Erratum] = (), tables: Sequence[Table] = (),
         timeline: Timeline | None = None) -> str:
    """The page of a run."""
    return page(document(summary, errata, tables, timeline), "results")


def page(told: Mapping[str, Any], title: str) -> str:
    """The page that shows `told`, plain values of which it knows the names: see harness/report/page/page.js."""
    parts_of = resources.files("harness.report") / "page"
    data = json.dumps(told, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    whole = (parts_of / "page.html").read_text(encoding="utf-8")
    parts = {"title": title, "style": (parts_of / "page.css").read_text(encoding="utf-8"),
             "script": (parts_of / "page.js").read_text(encoding="utf-8"),
             "timeline": (parts_of / "timeline.js").read_text(encoding="utf-8"), "data": data}
    for name, part in parts.items():
        whole = whole.replace(f"{{{{{name}}}}}", part, 1)
    return whole


def document(summary: Summary, errata: Iterable[Erratum] = (), tables: Sequence[Table] = (),
             timeline: Timeline | None = None) -> dict[str, Any]:
    """What the page of a run shows, in plain values. Without a `timeline` it is that of the results that were kept."""
    said, bad = verdict(summary)
    timeline = timeline or of_results(summary.results, summary.strict)
    return {
        "verdict": said,
        "bad": bad,
        "machine": describe_machine(summary.machine),
        "totals": [[name, figure, note] for name, figure, note, _ in totals(summary)],
        "sweeps": [[one.name, *(f"{n:,}" for n in (one.done, one.total, one.pairs, one.pairs_total, one.triples,
                                                   one.triples_total))] for one in summary.sweeps],
        "findings": _findings(summary),
        "lost": [{"scenario": one.scenario, "text": str(one.lost)} for one in summary.lost],
        "known": [{"id": one.erratum.id, "title": one.erratum.title, "count": one.count, "scenarios": one.scenarios,
                   "explanation": " ".join(one.erratum.explanation.split()), "reference": one.erratum.reference}
                  for one in summary.known],
        "tables": [one._asdict() for one in tables],
        "coverage": _coverage(summary, errata),
        "timeline": timeline.document(),
    }


def _findings(summary: Summary) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    drawn: Counter[Signature] = Counter()
    for result in summary.results:
        scenario = summary.scenarios.get(result.scenario)
        for one in findings(result.divergences):
            if not one.is_new(summary.strict):
                continue
            has_walk = one.walk is not None and bool(one.walk.trail)
            draw = has_walk and (len(out) < _DRAWN or drawn[one.signature] < _EACH)
            drawn[one.signature] += draw
            said = headline(one, scenario)
            out.append({
                "name": one.scenario, "family": one.scenario.partition("[")[0], "headline": said,
                "op": one.op, "place": place(one, scenario), "check": one.first.check, "field": one.first.field,
                "sort": str(one.signature),
                "rule": _rule(one), "values": [
                    [f"{d.check} {d.field}", words.value(d, d.expected), words.value(d, d.observed), d.erratum or ""]
                    for d in one.divergences],
                "program": _program(one, scenario) if draw or not has_walk else [],
                "events": list(one.first.events), "grid": grid(one) if draw else None,
                "like": str(one.signature) if has_walk and not draw else "",
                "search": " ".join((one.scenario, said, *one.signature)).lower()[:_SEARCHED],
            })
    return out


def _program(finding: Finding, scenario: Scenario | None) -> list[list[str | bool]]:
    """What L1 and L2 did up to the finding, an op a line, and a probe a line of the run in question: whether it is the
    one, and the text."""
    if scenario is None or finding.op < 0:
        return []
    told: list[list[str | bool]] = []
    for number, op in enumerate(scenario.ops[: finding.op + 1]):
        here = number == finding.op
        if here and isinstance(op, RunOp):
            told.append([finding.probe < 0, f"op {number}  VMRUN, L2 at CPL {op.cpl}"])
            told += [[n == finding.probe, f"  probe {n}  {probe}"] for n, probe in enumerate(op.probes)]
            told.append([finding.probe >= len(op.probes), "  #VMEXIT"])
        else:
            told.append([here, f"op {number}  {'; '.join(writer.op_lines(op))}"])
    return told[-_BEFORE:]


def _rule(finding: Finding) -> list[str]:
    name = rule_of(finding.first)
    found = RULES.get(name)
    return [found.id, found.reference, found.text] if found is not None else [name, "", ""]


def grid(finding: Finding) -> dict[str, Any]:
    """The walk of a finding, which must have one, as rows of cells: what the page and harness.report.svg draw."""
    both = Beside(finding)
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, Any]] = {}
    for index, step in enumerate(both.steps):
        purpose = step.level if step.dimension == GUEST else step.purpose
        row = rows.setdefault(purpose, {
            "label": "the page" if purpose == FINAL else purpose, "what": "", "nested": [], "guest": None})
        if step.dimension == NESTED:
            columns.setdefault(step.level)
            row["nested"].append(_cell(both, index))
            row["what"] = both.group(index)
        else:
            row["guest"] = _cell(both, index)
    observed, expected = finding.observed, both.walk.outcome
    return {
        "columns": list(columns), "rows": list(rows.values()), "model": str(expected),
        "machine": "the same" if observed is None else str(observed), "differs": observed is not None,
        "why": both.mark.why,
    }


def _cell(both: Beside, index: int) -> dict[str, Any]:
    step, (model, machine) = both.steps[index], both.rows[index]
    types = both.finding.types[index : index + 1]
    return {
        "level": step.level, "at": f"{step.address:x}", "model": f"{model:x}",
        "machine": None if machine is None else f"{machine:x}", "frame": f"{model & FRAME:x}",
        "type": types[0] if types else "",
        "differs": machine is not None and machine != model and both.wrong(index) is not None,
        "first": index == both.mark.index,
        "last": index == len(both.steps) - 1 and not isinstance(both.walk.outcome, Reached),
    }


def _coverage(summary: Summary, errata: Iterable[Erratum]) -> dict[str, Any]:
    """How many cells of each rule were reached, of how many, by dimension and level."""
    if summary.machine is None or not summary.cells:
        return {"columns": [], "rows": []}
    merged = coverage.merge([coverage.Covered.made(summary.machine, summary.cells)], errata)
    of = Counter((cell.rule, _column(cell)) for cell in merged.reachable)
    reached = Counter((cell.rule, _column(cell)) for cell in merged.reached)
    columns = sorted({column for _, column in of}, key=_in_order)
    rules = [rule for rule in RULES if any(name == rule for name, _ in of)]
    return {"columns": columns, "rows": [
        [rule, *([reached[rule, column], of[rule, column]] for column in columns)] for rule in rules]}


def _column(cell: Cell) -> tuple[str, str]:
    """Dimension and level; where both dimensions decide, pairs of their page sizes are too many for a column each."""
    return cell.dimension, "" if cell.dimension == BOTH else cell.level


def _in_order(column: tuple[str, str]) -> tuple[int, int, str]:
    """As a walk comes by them: the guest's tables, the nested walks for these, that for the page; levels from the
    root."""
    dimension, level = column
    return _place(_DIMENSIONS, dimension), _place(_LEVELS, level.partition(" ")[0]), level


def _place(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names)
