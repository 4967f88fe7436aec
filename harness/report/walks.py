"""A finding as text: what is wrong, the rule, and both walks side by side.

The left column is the model's: each entry of the walk as it must be after the #VMEXIT, with the memory type
that it is read with if that is not WB, and the page's. The right one is the machine's: the same entry as it is in
memory. The first step that differs is marked.
"""

from __future__ import annotations

from typing import Final

from harness.lockstep.compare import Divergence
from harness.model.access import Reached
from harness.model.dirty import resolve
from harness.model.liberties import Liberties, Takes
from harness.model.memory_type import WB
from harness.model.rules import RULES
from harness.model.walk import GUEST, NESTED, Step, Walk
from harness.report import words
from harness.report.beside import Beside
from harness.report.findings import Finding, place
from harness.report.headline import cited, headline, rule_of, step_name
from harness.report.styled import BAD, DIM, HEAD, KNOWN, PLAIN, Cell, Line, Span, clamp, line, side_by_side, wrap
from harness.scenario.ops import Scenario

_MARGIN: Final = "  "
_FIRST, _ALSO, _SINCE, _NONE = "> ", "! ", "~ ", "  "
_MAX_LISTED: Final = 8
_MAX_BRIEF: Final = 2
_MAX_EVENTS: Final = 4
"""What is listed where there is little room; events on either side of the one in question."""


def draw(finding: Finding, scenario: Scenario | None = None, width: int = 100, height: int | None = None) -> list[Line]:
    """The finding in `width` columns (80 to 120): the whole of it, or what fits `height` lines, which leaves out
    nested walks in which nothing differs, and what the headline says already; and in the end all of the walk but where
    it differs first."""
    width = clamp(width)
    lines = _whole(finding, scenario, width)
    for tight in (False, True):
        if height is not None and len(lines) > height:
            lines = _brief(finding, scenario, width, tight)
    return lines


def _whole(finding: Finding, scenario: Scenario | None, width: int) -> list[Line]:
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


def _brief(finding: Finding, scenario: Scenario | None, width: int, tight: bool) -> list[Line]:
    lines = wrap(f"{finding.scenario}: {headline(finding, scenario)}", width, rest=_MARGIN, style=BAD)
    lines += wrap(place(finding, scenario), width, _MARGIN, style=DIM)
    has_walk = finding.walk is not None and bool(finding.walk.trail) and _about_walk(finding)
    told = [one for one in finding.divergences if not (has_walk and one.field == "outcome")]  # the drawing has that
    most = 1 if tight else _MAX_BRIEF
    for one in told[:most]:
        lines += _listed(one, width)
    if len(told) > most:
        lines.append(line(f"{_MARGIN}and {len(told) - most} more like it"))
    if has_walk:
        lines += [line(""), *_Drawing(finding, width).lines(folded=True, tight=tight)]
    if finding.first.events:
        at = next((n for n, text in enumerate(finding.first.events) if text.startswith(_FIRST)), 0)
        around = finding.first.events[max(0, at - _MAX_EVENTS + 1) : at + _MAX_EVENTS]
        lines += [line(""), *events(finding.first._replace(events=around), width)]
    return lines


def alone(finding: Finding, width: int) -> list[Line]:
    """A walk that no machine made, of a finding without divergences but for it (`by_itself`): how it ends, the rule,
    and each entry with what it does in it."""
    assert finding.walk is not None
    width = clamp(width)
    lines = wrap(str(finding.walk.outcome), width, style=HEAD if isinstance(finding.walk.outcome, Reached) else BAD)
    lines += rule(finding.first, width)
    return [*lines, line(""), *_Drawing(finding, width, alone=True).lines()] if finding.walk.trail else lines


def by_itself(walk: Walk) -> Finding:
    """A walk as a finding in which nothing is wrong. Its entries are as the walk leaves them, with those accessed and
    dirty bits that it must set (harness.model.dirty)."""
    set_: dict[int, int] = {}
    required, _ = resolve(walk.updates, not isinstance(walk.outcome, Reached), Liberties.each(Takes.NEVER))
    for address, bits, _ in required:
        set_[address] = set_.get(address, 0) | bits
    after = tuple(step.entry | set_.get(step.address, 0) for step in walk.steps)
    return Finding("", -1, -1, (Divergence("", -1, -1, "C1", "value", "", "", walk.rule, walk, after),))


def events(one: Divergence, width: int) -> list[Line]:
    """What the kernel under L1 said around a divergence of C4, or of C5 the entries of all tables, the one in question
    marked."""
    lines = [line(f"{_MARGIN}{'what KVM did' if one.check == 'C4' else 'the tables'}:", HEAD)]
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
    if len(name + known) > width:
        lines = [(Span(name, HEAD),), *wrap(known.strip(), width, f"{_MARGIN}   ", style=KNOWN)]
    for text in values:
        lines += wrap(text, width, f"{_MARGIN}   ", f"{_MARGIN}            ")
    return lines


def rule(one: Divergence, width: int) -> list[Line]:
    """The rule behind an expectation, with the manual's section."""
    name = rule_of(one)
    found = RULES.get(name)
    label = f"{_MARGIN}rule "
    if one.check == "C3" and name.startswith(("guest.", "nested.")):
        label = f"{_MARGIN}exit by rule "  # the rule of the fault that L2 left by, not of what it left behind
    if found is None:
        return wrap(name, width, label)
    reference = f" ({found.reference})" if found.reference else ""
    lines = wrap(f"{found.id}{reference}: {found.text}", width, label, f"{_MARGIN}     ")
    if one.field == "exitinfo1" and one.check == "C1":
        lines += wrap(f"the error code's bits: AMD APM vol. 2, {cited(one)}", width, f"{_MARGIN}     ")
    return lines


class _Drawing:
    """Both walks of one finding."""

    def __init__(self, finding: Finding, width: int, alone: bool = False) -> None:
        """`alone`: there is no machine, and what each entry does stands in its place."""
        both = Beside(finding)
        self.finding, self.both = finding, both
        self.walk, self.steps, self.rows, self.mark = both.walk, both.steps, both.rows, both.mark
        self.types = finding.types
        self.alone = alone
        self.digits = max(len(f"{v:x}") for row in self.rows for v in row if v is not None)
        self.spa = max(len(f"{step.address:x}") for step in self.steps)
        self.left = len(_MARGIN) + len(_NONE) + 11 + 1 + self.spa + 2
        self.cell = (width - self.left - 2) // 2
        self.aligned = self.cell >= self.digits + 1 + _ALIGNED
        self.width = width

    def lines(self, folded: bool = False, tight: bool = False) -> list[Line]:
        """Headings, the steps, both outcomes, and what the marks mean. Folded, nested walks in which nothing differs
        are counted, and nothing is explained; tight, all but the walk with the first difference, or that which ends."""
        heads = side_by_side((Span("model", HEAD),), (Span("what it does" if self.alone else "machine", HEAD),),
                             self.cell)[0]
        entry = f"{_MARGIN}{_NONE}{'entry':11} {'sPA':>{self.spa}}  "
        out: list[Line] = [(Span(entry, HEAD), *heads)]
        group, left_out = "", self._others() if tight else self._alike() if folded else []
        for index, step in enumerate(self.steps):
            if index in left_out:
                continue
            if step.dimension == NESTED and step.purpose != group:
                group = step.purpose
                out.append(line(f"{_MARGIN}{_NONE}{self.both.group(index)}", DIM))
            out += self._step(index, step)
        if left_out:
            differ = sum(self._mark(index) != _NONE for index in left_out)
            said = (f"and {len(left_out)} further entries, {differ} of which differ too" if tight else
                    f"and {len(left_out)} nested entries, of walks in which nothing differs")
            out.append(line(f"{_MARGIN}{_NONE}{said}", DIM))
        return [*out, *self._outcomes(), *([] if folded else self._legend())]

    def _alike(self) -> list[int]:
        """The steps of nested walks in which no entry is marked, and the walk does not end."""
        marks = [self._mark(index) for index in range(len(self.steps))]
        faulted = not isinstance(self.walk.outcome, Reached)
        kept = {step.purpose for index, step in enumerate(self.steps)
                if marks[index] != _NONE or (faulted and index == len(self.steps) - 1)}
        return [index for index, step in enumerate(self.steps) if step.dimension == NESTED and step.purpose not in kept]

    def _others(self) -> list[int]:
        """The steps of all but one walk, and the guest's entry that it is for: that of the first difference, or that
        which ends."""
        at = self.mark.index if self.mark.index is not None else len(self.steps) - 1
        first = last = at
        while first and self.steps[first - 1].dimension == NESTED and (
                self.steps[first - 1].purpose == self.steps[at].purpose or self.steps[at].dimension == GUEST):
            first -= 1
        while last + 1 < len(self.steps) and self.steps[last].dimension == NESTED:
            last += 1
        return [index for index in range(len(self.steps)) if not first <= index <= last]

    # --- lines ------------------------------------------------------------------------------------

    def _mark(self, index: int) -> str:
        """What stands before a step: it is the first that differs, or another one, or was changed since, or none."""
        model, machine = self.rows[index]
        if index == self.mark.index:
            return _FIRST
        if machine is None or model == machine:
            return _NONE
        return _ALSO if self.both.wrong(index) is not None else _SINCE

    def _step(self, index: int, step: Step) -> list[Line]:
        model, machine = self.rows[index]
        mark = self._mark(index)
        style = BAD if mark in (_FIRST, _ALSO) else PLAIN
        what = f"guest {step.level}" if step.dimension == GUEST else f"  {step.level}"
        name = f"{_MARGIN}{mark}{what:11} {step.address:>{self.spa}x}  "
        cells = side_by_side(
            [*self._entry(step, model, PLAIN), *self._type(index)],
            [Span(word) for word in self.both.part(index).split()] if self.alone else
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
        if self.alone:
            return []
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

