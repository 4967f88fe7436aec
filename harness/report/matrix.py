"""Findings by version: what each of several machines showed, as text, Markdown, HTML and JSON.

A row is an erratum, or a finding that no erratum explains; a column is a machine of some version. A cell says how
often it showed there; that it did not, though a scenario that shows it elsewhere ran; or why neither can be said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from harness.lockstep.errata import Erratum
from harness.lockstep.signature import of_loss, signature
from harness.report.html import page
from harness.report.summary import Summary, errata_of

SHOWS: Final = "shows"
ABSENT: Final = "absent"
UNTESTED: Final = "not testable"
_NEW: Final = "new: "
_LEGEND: Final = (
    "A number: it showed in so many scenarios and cases of sweeps. `-`: it did not, though a scenario that shows it "
    "elsewhere ran. `x`: it cannot be tested there, see the notes. `*`: stale, an erratum of that version that did not "
    "show.")


@dataclass(frozen=True)
class Column:
    """What one machine came to. `failed` says why it could not be tested at all; the rest is empty then. `found` has
    the number of scenarios and cases by row, `ran` scenarios of the library that ran to their end."""

    name: str
    machine: str = ""
    layers: tuple[tuple[str, tuple[int, ...]], ...] = ()
    failed: str = ""
    scenarios: int = 0
    cases: int = 0
    skipped: int = 0
    seconds: float = 0.0
    found: Mapping[str, int] = field(default_factory=dict)
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By row, scenarios of the library in which it showed."""
    ran: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset()
    lost: tuple[str, ...] = ()
    """Scenarios in which the machine was lost, each with the reason."""


@dataclass(frozen=True)
class Cell:
    """`state` is SHOWS, ABSENT or UNTESTED, with the number of scenarios, or the reason."""

    state: str
    count: int = 0
    reason: str = ""
    stale: bool = False

    def __str__(self) -> str:
        mark = {SHOWS: str(self.count), ABSENT: "-", UNTESTED: "x"}[self.state]
        return mark + ("*" if self.stale else "")


def column(name: str, summary: Summary, layers: Sequence[tuple[str, tuple[int, ...]]]) -> Column:
    """Of a run's summary."""
    found: Counter[str] = Counter()
    where: dict[str, set[str]] = {}
    sweeps = {tally.name for tally in summary.sweeps}
    lost = []
    for result in summary.results:
        rows = {name for one in result.divergences for name in errata_of(one)}
        rows |= {f"{_NEW}{signature(one)}" for one in result.divergences if one.erratum is None}
        if result.lost is not None:
            rows.add(f"{_NEW}{of_loss(result.lost)}")
            lost.append(f"{result.scenario}: {result.lost.reason}")
        found.update(rows)
        if result.scenario.partition("[")[0] not in sweeps:
            for row in rows:
                where.setdefault(row, set()).add(result.scenario)
    for tally in summary.sweeps:
        found.update(tally.known_cases)
    ran = {one.scenario for one in summary.results if not one.skipped and one.lost is None}
    return Column(
        name, _machine(summary.machine), tuple(layers), "", summary.totals.scenarios,
        summary.totals.sweep_cases, len(summary.skipped) + sum(tally.skipped for tally in summary.sweeps),
        summary.totals.seconds, dict(found), {row: frozenset(names) for row, names in where.items()},
        frozenset(ran & summary.scenarios.keys()), frozenset(one.id for one in summary.outdated), tuple(lost),
    )


def _machine(identity: Mapping[str, Any] | None) -> str:
    """In words, without this host's paths and what all versions have alike."""
    if identity is None:
        return "the machine never came up"
    parts = [f"QEMU {identity.get('qemu_version', '?')}", f"CPU {identity.get('cpu_model', '?')}"]
    if identity.get("kernel"):
        parts += [f"Linux {identity['kernel_version']} ({identity['kernel']})", f"contexts {identity['contexts']}"]
    return ", ".join(parts)


@dataclass(frozen=True)
class Matrix:
    """`made` says when, and by which command."""

    columns: tuple[Column, ...]
    errata: tuple[Erratum, ...]
    made: str

    def rows(self) -> list[str]:
        """What showed or should have in some column: what is new first, then errata in the order of the library."""
        seen = {row for one in self.columns for row in one.found} | {row for one in self.columns for row in one.stale}
        new = sorted(row for row in seen if row.startswith(_NEW))
        known = [erratum.id for erratum in self.errata if erratum.id in seen]
        return new + known + sorted(seen.difference(new, known))

    def cell(self, row: str, one: Column) -> Cell:
        """What is known of a row in a column."""
        if one.failed:
            return Cell(UNTESTED, reason=one.failed)
        if row in one.found:
            return Cell(SHOWS, one.found[row])
        erratum = next((erratum for erratum in self.errata if erratum.id == row), None)
        if erratum is not None and not self._concerns(erratum, one):
            return Cell(UNTESTED, reason=f"an erratum of {erratum.machine}, which does not show on this machine")
        known = frozenset[str]().union(*(other.where.get(row, frozenset()) for other in self.columns))
        known |= frozenset(erratum.shown) if erratum is not None else frozenset()
        if known.isdisjoint(one.ran):
            return Cell(UNTESTED, reason="no scenario that shows it ran")
        return Cell(ABSENT, stale=row in one.stale)

    @staticmethod
    def _concerns(erratum: Erratum, one: Column) -> bool:
        """Whether an erratum can show on such a machine, whatever the version."""
        layers = [name for name, _ in one.layers]
        if erratum.machine == layers[0]:
            return not erratum.below
        return (erratum.surfaces or erratum.below) and erratum.machine in layers

    def unexplained(self) -> list[str]:
        """Rows that no erratum explains."""
        return [row for row in self.rows() if row.startswith(_NEW)]

    def notes(self) -> Iterator[str]:
        """What is to be said of columns."""
        for one in self.columns:
            if one.failed:
                yield f"{one.name}: not tested: {one.failed}"
                continue
            yield (f"{one.name}: {one.machine}; {one.scenarios:,} scenarios, {one.cases:,} cases of sweeps, "
                   f"{one.skipped:,} skipped which this machine cannot run, {one.seconds:,.0f} s")
            for text in one.lost:
                yield f"{one.name}: lost in {text.partition(chr(10))[0]}"

    def reasons(self) -> Iterator[str]:
        """Why cells are x, each reason once, with its columns."""
        where: dict[str, set[str]] = {}
        for row in self.rows():
            for one in self.columns:
                cell = self.cell(row, one)
                if cell.state == UNTESTED and not one.failed:
                    where.setdefault(f"{row}: {cell.reason}", set()).add(one.name)
        for text, names in where.items():
            yield f"{text} ({', '.join(one.name for one in self.columns if one.name in names)})"


def table(matrix: Matrix) -> Iterator[str]:
    """For a terminal or a log."""
    names = [one.name for one in matrix.columns]
    rows = [(row, [str(matrix.cell(row, one)) for one in matrix.columns]) for row in matrix.rows()]
    first = max((len(row) for row, _ in rows), default=0)
    yield " ".join([f"{'':{first}}", *(f"{name:>13}" for name in names)])
    for row, cells in rows:
        yield " ".join([f"{row:{first}}", *(f"{cell:>13}" for cell in cells)])
    yield ""
    yield from matrix.notes()


def verdict(matrix: Matrix) -> str:
    """In a line."""
    unexplained = len(matrix.unexplained())
    return f"not explained by any erratum: {unexplained}" if unexplained else "all is explained"


def markdown(matrix: Matrix) -> str:
    """The table as a page."""
    titles = {erratum.id: erratum.title for erratum in matrix.errata}
    lines = ["# Findings by version", "", matrix.made, "", _LEGEND, ""]
    lines += ["| finding | what | " + " | ".join(one.name for one in matrix.columns) + " |",
              "| --- | --- |" + " ---: |" * len(matrix.columns)]
    for row in matrix.rows():
        cells = " | ".join(str(matrix.cell(row, one)) for one in matrix.columns)
        lines.append(f"| {_escaped(row)} | {_escaped(titles.get(row, ''))} | {cells} |")
    lines += ["", "## Machines", ""] + [f"- {_escaped(note)}" for note in matrix.notes()]
    reasons = list(matrix.reasons())
    if reasons:
        lines += ["", "## What cannot be tested", ""] + [f"- {_escaped(text)}" for text in reasons]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def html(matrix: Matrix) -> str:
    """The table as a page (harness.report.html); a cell says what it means when it is chosen."""
    by_id = {erratum.id: erratum for erratum in matrix.errata}
    rows = []
    for row in matrix.rows():
        erratum = by_id.get(row)
        about = " ".join(f"{erratum.explanation} {erratum.reference}".split()) if erratum else ""
        rows.append({"name": row, "title": erratum.title if erratum else "", "about": about,
                     "cells": [_html_cell(row, matrix.cell(row, one)) for one in matrix.columns]})
    by_version = {
        "columns": [one.name for one in matrix.columns], "rows": rows, "legend": _LEGEND.replace("`", ""),
        "notes": [["Machines", list(matrix.notes())], ["What cannot be tested", list(matrix.reasons())]]}
    return page({
        "verdict": verdict(matrix), "bad": bool(matrix.unexplained()),
        "machine": matrix.made.replace("`", ""), "totals": [], "sweeps": [], "tables": [],
        "findings": [], "lost": [], "known": [], "coverage": {"columns": [], "rows": []}, "matrix": by_version,
    }, "findings by version")


def _html_cell(row: str, cell: Cell) -> dict[str, Any]:
    kind = {SHOWS: "new" if row.startswith(_NEW) else "shows", ABSENT: "absent", UNTESTED: "none"}[cell.state]
    return {"text": str(cell), "kind": kind, "stale": cell.stale, "about": cell.reason or cell.state}


def document(matrix: Matrix) -> str:
    """As JSON: `made`, `columns` and `rows`, each row with a cell for each column."""
    columns = [{"name": one.name, "machine": one.machine, "failed": one.failed, "scenarios": one.scenarios,
                "cases": one.cases, "skipped": one.skipped, "seconds": round(one.seconds, 1), "lost": list(one.lost)}
               for one in matrix.columns]
    rows: list[dict[str, Any]] = []
    for row in matrix.rows():
        cells = {one.name: asdict(matrix.cell(row, one)) for one in matrix.columns}
        rows.append({"finding": row, "explained": not row.startswith(_NEW), "cells": cells})
    lines = ",\n".join(f"  {json.dumps(one)}" for one in rows)
    made = json.dumps(matrix.made)
    return f'{{\n "made": {made},\n "columns": {json.dumps(columns)},\n "rows": [\n{lines}\n ]\n}}\n'
