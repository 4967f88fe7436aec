"""The timeline of a run: each visit of L2, from VMRUN to #VMEXIT, in the order in which they were checked, with the
paging that L2 ran under, the MMU contexts that KVM was in and what was found. As plain values for the page
(harness/report/page/timeline.js), in columns, since there are many: texts that come again are numbered.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any, Final

from harness.lockstep.exits import was_refused
from harness.lockstep.result import Result, Switch, Told, Under, Visit
from harness.model.access import ErrorCode
from harness.model.vmcb import ExitCode
from harness.report.summary import errata_of, is_new
from harness.wire.layout import VMRUN_RAISED

LIMIT: Final = 100_000
"""Visits that are shown; behind these only those of scenarios in which something is new, and of so many again."""
_PAGE_FAULT: Final = ExitCode.EXCEPTION + 14
_LEVELS: Final = ("paging off", "", "32-bit", "PAE", "4-level", "5-level")
_NOTE: Final = 240
"""Characters of what was found in one visit."""
_CONTEXTS: Final = (
    " KVM's MMU contexts are those that it was in: of L1 before VMRUN, of L2, and of L1 behind #VMEXIT. A direct map "
    "has L1-physical memory; a shadow is of L1's nested table, or with npt=0 of the running guest's own.")


class _Texts:
    """Numbers for texts, in the order in which they come first."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], int] = {}

    def number(self, kind: str, text: str) -> int:
        return self.known.setdefault((kind, text), len(self.known))


class Timeline:
    """Takes results as they come; with `strict` known errata count as new. Bounded: see LIMIT."""

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._programs: list[tuple[str, int]] = []
        names = "op", "exit", "under", "note", "switch", "entries"
        self._columns: dict[str, list[int]] = {name: [] for name in names}
        self._at: list[str] = []
        self._exits, self._unders, self._notes = _Texts(), _Texts(), _Texts()
        self._notes.number("", "")
        self._contexts = _Texts()
        self._switches: dict[tuple[int, ...], int] = {(): 0}
        self._left_out = 0

    def add(self, result: Result) -> None:
        """The visits of one scenario."""
        new = result.lost is not None or any(is_new(one, self._strict) for one in result.divergences)
        shown = len(self._at) + len(result.visits)
        if shown > LIMIT and not (new and shown <= 2 * LIMIT):
            self._left_out += len(result.visits)
            return
        notes = self._found(result)
        switches = result.switches[: len(result.visits)]
        for index, (visit, switch) in enumerate(zip_longest(result.visits, switches)):
            kind, text, at = _exit(visit)
            self._row(visit.op, self._exits.number(kind, text), self._unders.number("", _under(visit.under)),
                      notes.get(index, 0), at, switch)
        if result.lost is not None:
            self._row(-1, self._exits.number("refused", "no #VMEXIT"), self._unders.number("", ""),
                      self._notes.number("new", f"lost: {result.lost.reason}"[:_NOTE]), "")
        self._programs.append((result.scenario, len(result.visits) + (result.lost is not None)))

    def document(self) -> dict[str, Any]:
        """For the page. A switch is the number of L1's context before VMRUN, -1 if it is not known, those of L2, and
        that of L1 behind #VMEXIT; the first is the empty one, of a VMRUN of which KVM told nothing."""
        return {
            "programs": self._programs, **self._columns, "at": self._at,
            "exits": list(self._exits.known), "unders": [text for _, text in self._unders.known],
            "notes": list(self._notes.known), "left_out": self._left_out,
            "contexts": list(self._contexts.known), "switches": list(self._switches),
            "about": _CONTEXTS if self._contexts.known else "",
        }

    def _row(self, op: int, exit: int, under: int, note: int, at: str, switch: Switch | None = None) -> None:
        values = op, exit, under, note, self._switch(switch), switch.entries if switch is not None else 0
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        self._at.append(at)

    def _switch(self, switch: Switch | None) -> int:
        if switch is None:
            return 0
        before = -1 if switch.before is None else self._context(switch.before)
        key = before, *map(self._context, switch.inside), self._context(switch.behind)
        return self._switches.setdefault(key, len(self._switches))

    def _context(self, context: Told) -> int:
        return self._contexts.number("direct" if context.direct else "shadow", context.words)

    def _found(self, result: Result) -> dict[int, int]:
        """The note of each visit in which something was found."""
        new: dict[int, dict[str, None]] = {}
        known: dict[int, dict[str, None]] = {}
        for one in result.divergences:
            if (index := _visit(result.visits, one.op, one.probe)) is None:
                continue
            if is_new(one, self._strict):
                new.setdefault(index, {})[f"{one.check} {one.field}"] = None
            else:
                known.setdefault(index, {}).update(dict.fromkeys(errata_of(one)))
        return ({index: self._notes.number("known", _joined("known: ", names)) for index, names in known.items()}
                | {index: self._notes.number("new", _joined("new: ", names)) for index, names in new.items()})


def of_results(results: Iterable[Result], strict: bool = False) -> Timeline:
    """A timeline of results that are all there."""
    timeline = Timeline(strict)
    for one in results:
        timeline.add(one)
    return timeline


def _joined(head: str, names: Iterable[str]) -> str:
    return (head + ", ".join(names))[:_NOTE]


def _visit(visits: list[Visit], op: int, probe: int) -> int | None:
    """Which visit a finding at `op` and `probe` is of: that in which the probe was made, the last of the op where it is
    of no probe, the last of all where it is of no VMRUN."""
    of_op = [index for index, one in enumerate(visits) if one.op == op]
    if probe >= 0:
        of_op = [index for index in of_op if visits[index].through >= probe][:1] or of_op
    return of_op[-1] if of_op else len(visits) - 1 if visits else None


def _exit(visit: Visit) -> tuple[str, str, str]:
    """The kind that it is coloured by, its words, and the address that it is about."""
    code = visit.exitcode
    if code >> 32 == VMRUN_RAISED >> 32:
        return "refused", f"exception {code & 0xFF} of VMRUN, in L1", ""
    if was_refused(code):
        return "refused", "VMRUN refused: VMEXIT_INVALID", ""
    if code in (ExitCode.NPF, _PAGE_FAULT):
        kind = "npf" if code == ExitCode.NPF else "exception"
        return kind, f"{ExitCode.describe(code)} {ErrorCode.describe(visit.info1)}", f"{visit.info2:x}"
    if code == ExitCode.VMMCALL:
        return "done", ExitCode.describe(code), ""
    return "exception" if ExitCode.EXCEPTION <= code < ExitCode.EXCEPTION + 32 else "other", ExitCode.describe(code), ""


def _under(under: Under) -> str:
    nested = f"nCR3 {under.ncr3:x}, {_LEVELS[under.nested]}" if under.nested else "not nested"
    return f"{nested}; L2 {_LEVELS[under.guest]}"
