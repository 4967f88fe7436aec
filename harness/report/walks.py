"""A finding as text: what is wrong, the rule, and both walks side by side.

The left column is the model's: each entry of the walk as it must be after the #VMEXIT, with the memory type
that it is read with if that is not WB, and the page's. The right one is the machine's: the same entry as it is in
memory. The first step that differs is marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from harness.lockstep.compare import Divergence
from harness.model.access import ErrorCode, GeneralProtection, NestedPageFault, Outcome, PageFault, Reached
from harness.model.entries import NX, RW, US, A, D, P
from harness.model.memory_type import WB
from harness.model.rules import RULES
from harness.model.walk import FINAL, GUEST, NESTED, Step
from harness.report import words
from harness.report.findings import Finding, headline, place, step_name
from harness.report.styled import BAD, DIM, HEAD, KNOWN, PLAIN, Cell, Line, Span, clamp, line, side_by_side, wrap
from harness.scenario.ops import Scenario

_MARGIN: Final = "  "
_FIRST, _ALSO, _SINCE, _NONE = "> ", "! ", "~ ", "  "
_SHIFTS: Final = {"pte": 12, "pde": 21, "pdpte": 30, "pml4e": 39, "pml5e": 48}
_MAX_LISTED: Final = 8
_DENIED_BY: Final = {"user": (US, "U/S is 0"), "write": (RW, "R/W is 0"), "execute": (NX, "NX is 1")}
"""By what follows the dot in a rule's id: the bit, and how it reads where it forbids."""


def draw(finding: Finding, scenario: Scenario | None = None, width: int = 100) -> list[Line]:
    """The whole finding, in `width` columns (80 to 120)."""
    width = clamp(width)
    lines = wrap(f"{finding.scenario}: {headline(finding, scenario)}", width, rest=_MARGIN, style=BAD)
    lines += wrap(place(finding, scenario), width, _MARGIN, style=DIM)
    for one in finding.divergences[:_MAX_LISTED]:
        lines += _listed(one, width)
    if len(finding.divergences) > _MAX_LISTED:
        lines.append(line(f"{_MARGIN}and {len(finding.divergences) - _MAX_LISTED} more like it"))
    lines += rule(finding.first, width)
    if finding.walk is not None and finding.walk.trail and _about_walk(finding):
        lines += [line(""), *_Drawing(finding, width).lines()]
    if finding.first.events:
        lines += [line(""), *events(finding.first, width)]
    return lines


def events(one: Divergence, width: int) -> list[Line]:
    """What the kernel under L1 said around a divergence of C4, the event in question marked."""
    lines = [line(f"{_MARGIN}what KVM did:", HEAD)]
    for text in one.events:
        lines += wrap(text[len(_FIRST) :], width, f"{_MARGIN}{text[: len(_FIRST)]}", " " * 16,
                      style=BAD if text.startswith(_FIRST) else PLAIN)
    return lines


def _about_walk(finding: Finding) -> bool:
    """Whether the walk has to do with what is wrong: a lost register has nothing of it."""
    return any(d.check != "C3" or d.field == "outcome" for d in finding.divergences)


def _listed(one: Divergence, width: int) -> list[Line]:
    """One divergence in figures: on one line where that is wide enough."""
    name = f"{_MARGIN}{one.check} {one.field}"
    known = f" (known: {one.erratum})" if one.erratum else ""
    values = [f"{what} {words.value(one, v)}" for what, v in (("expected", one.expected), ("observed", one.observed))]
    short = f": {values[0]}, {values[1]}"
    if len(name + known + short) <= width:
        return [(Span(name, HEAD), Span(known, KNOWN), Span(short))]
    lines: list[Line] = [(Span(name, HEAD), Span(known, KNOWN))]
    for text in values:
        lines += wrap(text, width, f"{_MARGIN}   ", f"{_MARGIN}            ")
    return lines


def rule(one: Divergence, width: int) -> list[Line]:
    """The rule behind an expectation, with the manual's section."""
    name = one.rule
    if one.walk is not None and one.check == "C1" and one.field in ("outcome", "value"):
        name = one.walk.rule  # the exit's own rule says nothing of a probe in the middle of a run
    found = RULES.get(name)
    label = f"{_MARGIN}rule "
    if one.check == "C3" and name.startswith(("guest.", "nested.")):
        label = f"{_MARGIN}exit by rule "  # the rule of the fault that L2 left by, not of what it left behind
    if found is None:
        return wrap(name, width, label)
    reference = f" ({found.reference})" if found.reference else ""
    lines = wrap(f"{found.id}{reference}: {found.text}", width, label, f"{_MARGIN}     ")
    if one.field == "exitinfo1" and one.check == "C1":
        section = "15.25.6" if name.startswith("nested.") else "8.4.2"
        lines += wrap(f"the error code's bits: AMD APM vol. 2, {section}", width, f"{_MARGIN}     ")
    return lines


@dataclass(frozen=True)
class _Mark:
    """The first difference: the index of its step, None for the outcome; `why` in words."""

    index: int | None
    why: str


class _Drawing:
    """Both walks of one finding."""

    def __init__(self, finding: Finding, width: int) -> None:
        assert finding.walk is not None
        self.finding = finding
        self.walk = finding.walk
        self.steps = finding.walk.steps
        self.after = finding.after
        self.types = finding.types
        self.rows = [self._values(index, step) for index, step in enumerate(self.steps)]
        self.mark = self._mark()
        self.digits = max(len(f"{v:x}") for row in self.rows for v in row if v is not None)
        self.spa = max(len(f"{step.address:x}") for step in self.steps)
        self.left = len(_MARGIN) + len(_NONE) + 11 + 1 + self.spa + 2
        self.cell = (width - self.left - 2) // 2
        self.aligned = self.cell >= self.digits + 1 + _ALIGNED
        self.width = width

    def lines(self) -> list[Line]:
        """Headings, the steps, both outcomes, and what the marks mean."""
        heads = side_by_side((Span("model", HEAD),), (Span("machine", HEAD),), self.cell)[0]
        entry = f"{_MARGIN}{_NONE}{'entry':11} {'sPA':>{self.spa}}  "
        out: list[Line] = [(Span(entry, HEAD), *heads)]
        group = ""
        for index, step in enumerate(self.steps):
            if step.dimension == NESTED and step.purpose != group:
                group = step.purpose
                out.append(line(f"{_MARGIN}{_NONE}{self._group(index)}", DIM))
            out += self._step(index, step)
        return [*out, *self._outcomes(), *self._legend()]

    # --- what the walks come to -------------------------------------------------------------------

    def _wrong(self, index: int) -> Divergence | None:
        """The divergence that is about the entry of that step, if it is of the same VMRUN."""
        one = self.finding.entries.get(self.steps[index].address & ~7)
        if one is None or not self.after:
            return one
        return one if self._entry_of(one.observed, index) == self._seen(index) else None

    def _entry_of(self, number: int | str, index: int) -> int:
        """A quadword as the entry of that step; what is `unchanged` is as the walk read it."""
        step = self.steps[index]
        if isinstance(number, str):
            return step.entry
        return words.cut(number, step.address) if words.narrow(self.walk, step.dimension) else number

    def _seen(self, index: int) -> int:
        """The entry of that step as the machine left it."""
        step, seen = self.steps[index], self.after[index]
        if seen >> 32 and words.narrow(self.walk, step.dimension):
            return words.cut(seen, step.address)
        return seen

    def _values(self, index: int, step: Step) -> tuple[int, int | None]:
        """The entry as the model and as the machine has it after the #VMEXIT; None for unknown."""
        one = self._wrong(index)
        if one is not None:
            return self._entry_of(one.expected, index), self._entry_of(one.observed, index)
        if not self.after:
            return step.entry, None
        seen = self._seen(index)
        if (seen ^ step.entry) & ~(A | D):
            return step.entry, seen  # nobody objects: L2 itself wrote it, later in this run
        return seen, seen

    def _mark(self) -> _Mark:
        """Where the two walks part."""
        observed, expected = self.finding.observed, self.walk.outcome
        found: list[tuple[int, str]] = []
        for index, (want, got) in enumerate(self.rows):
            wrong = self._wrong(index)
            if wrong is not None and got is not None:
                # A and D that are set too much may be no more than traces of a walk that went too far
                cause = want ^ got if observed is None else (want ^ got) & ~(got & ~want & (A | D))
                if cause:
                    found.append((index, words.difference(wrong)))
                    break
        if observed is not None:
            found += self._parting(expected, observed)
        if found:
            return _Mark(*min(found))
        return _Mark(None, "")

    def _parting(self, expected: Outcome, observed: Outcome | str) -> list[tuple[int, str]]:
        """Where the walks part if they come to different ends, as far as these ends tell."""
        stop = None if isinstance(expected, Reached | GeneralProtection) else self._denier()
        goes_on = ", the machine goes on" if isinstance(observed, str) else ""
        end = [(stop[0], f"the model stops here ({stop[1]}){goes_on}")] if stop is not None else []
        if not isinstance(observed, PageFault | NestedPageFault):
            return end
        where = self._stopped(observed)
        if type(observed) is type(expected) and (where is None or where == self._stopped_by_model()):
            return []  # both stop at the same place: what is wrong is how that is reported
        if where is None:
            return end
        here = (where, "the machine stops in this walk, the model goes on")
        return [here] if stop is None or where <= stop[0] else end

    def _stopped_by_model(self) -> int | None:
        outcome = self.walk.outcome
        return self._stopped(outcome) if isinstance(outcome, PageFault | NestedPageFault) else None

    def _denier(self) -> tuple[int, str] | None:
        """The entry that the model's walk failed at, and why."""
        last = len(self.steps) - 1
        kind = self.walk.rule.rpartition(".")[2]
        if kind not in _DENIED_BY:
            return last, {"present": "P is 0", "reserved": "a reserved bit is set"}.get(kind, "by its rights")
        bit, why = _DENIED_BY[kind]
        for index in self._together(last):
            if bool(self.steps[index].entry & bit) == (bit == NX):
                return index, why
        return last, why

    def _together(self, index: int) -> list[int]:
        """The steps of the walk that the step at `index` is part of: one nested walk, or the guest's."""
        mine = self.steps[index]
        return [n for n, step in enumerate(self.steps) if step[0] == mine.dimension and step[2] == mine.purpose]

    def _stopped(self, outcome: PageFault | NestedPageFault) -> int | None:
        """The step that a walk stopped at, as far as a fault's code and address tell."""
        for indices in self._walks_of(GUEST if isinstance(outcome, PageFault) else NESTED):
            final = self.steps[indices[0]].purpose == FINAL
            if isinstance(outcome, NestedPageFault) and bool(outcome.error_code & ErrorCode.FINAL) != final:
                continue
            known, address = self._translated(indices)
            if (address ^ outcome.address) & known:
                continue
            if outcome.error_code & ErrorCode.P:
                return indices[-1]
            return next((n for n in indices if not (self.rows[n][1] or self.steps[n].entry) & P), indices[-1])
        return None

    def _walks_of(self, dimension: str) -> list[list[int]]:
        """The steps of each walk in that dimension: one of the guest's, or one for each nested walk."""
        groups: dict[str, list[int]] = {}
        for index, step in enumerate(self.steps):
            if step.dimension == dimension:
                groups.setdefault(step.purpose, []).append(index)
        return list(groups.values())

    def _translated(self, indices: list[int]) -> tuple[int, int]:
        """The address that these steps translate, and before it a mask of its bits that are known.

        Each entry's own place in its table gives some; for a gPA the outcome, or the offset of what was
        found there, gives the rest.
        """
        steps = [self.steps[n] for n in indices]
        bits, unit = (10, 2) if steps[0].level == "pde" else (9, 3)  # 32-bit paging, or any other
        known = address = 0
        for step in steps:
            width = 2 if step is steps[0] and step.level == "pdpte" else bits  # PAE's table of four
            shift = _SHIFTS[step.level] + (bits == 10 and step.level == "pde")
            known |= (1 << width) - 1 << shift
            address |= (step.address >> unit & (1 << width) - 1) << shift
        if steps[0].dimension == GUEST:
            return known, address
        outcome, last = self.walk.outcome, indices[-1]
        if isinstance(outcome, NestedPageFault) and last == len(self.steps) - 1:
            return ~0, outcome.address
        if isinstance(outcome, Reached) and last == len(self.steps) - 1:
            return ~0, outcome.gpa
        low = known & -known
        if last + 1 < len(self.steps):
            return known | low - 1, address | self.steps[last + 1].address & low - 1
        return known, address

    # --- lines ------------------------------------------------------------------------------------

    def _group(self, index: int) -> str:
        purpose = self.steps[index].purpose
        what = "the page itself" if purpose == FINAL else f"the guest's {purpose}"
        indices = self._together(index)
        known, address = self._translated(indices)
        return f"nested walk of gPA {address:#x}, for {what}:" if known & 1 else f"nested walk for {what}:"

    def _step(self, index: int, step: Step) -> list[Line]:
        model, machine = self.rows[index]
        differs = machine is not None and model != machine and self._wrong(index) is not None
        mark = _NONE
        if index == self.mark.index:
            mark = _FIRST
        elif differs:
            mark = _ALSO
        elif machine is not None and model != machine:
            mark = _SINCE
        style = BAD if mark in (_FIRST, _ALSO) else PLAIN
        what = f"guest {step.level}" if step.dimension == GUEST else f"  {step.level}"
        name = f"{_MARGIN}{mark}{what:11} {step.address:>{self.spa}x}  "
        cells = side_by_side(
            [*self._entry(step, model, PLAIN), *self._type(index)],
            self._entry(step, machine, style) if machine is not None else (Span("?"),),
            self.cell,
        )
        blank = " " * len(name)
        return [(Span(blank if n else name, style), *cell) for n, cell in enumerate(cells)]

    def _entry(self, step: Step, entry: int, style: str) -> Cell:
        """An entry in hex, and its flags; `+` before those that were not set when the walk read it."""
        names = words.flags(entry, step.level)
        before = set(words.flags(step.entry, step.level))
        shown = {name: name if name in before else f"+{name}" for name in names}
        if not self.aligned:
            return [Span(f"{entry:x}", style), *(Span(flag, style) for flag in shown.values())]
        slots = [f"{shown.pop(name, ''):{width}}" for name, width in _SLOTS]
        if "PAT" in shown:
            slots[5] = f"{shown.pop('PAT'):3}"
        return [Span(f"{entry:>{self.digits}x} {' '.join(slots)}", style), *(Span(f, style) for f in shown.values())]

    def _type(self, index: int) -> Cell:
        """The memory type that the entry is read with, where that is not the usual one."""
        return [Span(name, DIM) for name in self.types[index : index + 1] if name != WB]

    def _outcomes(self) -> list[Line]:
        observed = self.finding.observed
        mark = _FIRST if self.mark.index is None else _NONE if observed is None else _ALSO
        machine = "the same" if observed is None else str(observed)
        values = [d for d in self.finding.divergences if d.field == "value"]
        model = " ".join((str(self.walk.outcome), *self.types[len(self.steps) :]))  # the page's memory type
        if values and observed is None:
            model, machine = f"{model}, value {words.value(values[0], values[0].expected)}", (
                f"value {words.value(values[0], values[0].observed)}")
        elif observed is None:
            mark = _NONE
        style = BAD if mark != _NONE else PLAIN
        name = f"{_MARGIN}{mark}{'outcome':11} {'':{self.spa}}  "
        cells = side_by_side([Span(w) for w in model.split()], [Span(w, style) for w in machine.split()], self.cell)
        return [(Span(" " * len(name) if n else name, style), *cell) for n, cell in enumerate(cells)]

    def _legend(self) -> list[Line]:
        lines: list[Line] = []
        if self.mark.index is not None:
            step = self.steps[self.mark.index]
            where = step_name(step.dimension, step.level, step.purpose)
            lines += wrap(f"{where}: {self.mark.why}", self.width, f"{_MARGIN}{_FIRST}", style=BAD)
        return lines


_SLOTS: Final = (("P", 1), ("RW", 2), ("US", 2), ("A", 2), ("D", 2), ("PS", 3), ("NX", 2))
_ALIGNED: Final = sum(width + 1 for _, width in _SLOTS) - 1
"""Flags in columns of their own, each as wide as it may become: width in all."""

