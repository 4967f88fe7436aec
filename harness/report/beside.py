"""Both walks of a finding beside each other, step by step: what each entry is to the model and to the machine, and
where the two part. What is shown is made from this: text (harness.report.walks), or a page (harness.report.html).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from harness.lockstep.compare import Divergence
from harness.model.access import ErrorCode, GeneralProtection, NestedPageFault, Outcome, PageFault, Reached
from harness.model.entries import FRAME, NX, RW, US, A, D, P
from harness.model.walk import FINAL, GUEST, NESTED, Step
from harness.report import words
from harness.report.findings import Finding

_SHIFTS: Final = {"pte": 12, "pde": 21, "pdpte": 30, "pml4e": 39, "pml5e": 48}
_DENIED_BY: Final = {"user": (US, "U/S=0"), "write": (RW, "R/W=0"), "execute": (NX, "NX=1")}
"""By what follows the dot in a rule's id: the bit, and how it reads where it forbids."""
_ENDED_BY: Final = {
    "present": "P=0", "reserved": "a reserved bit set", "smep": "U/S=1, and CR4.SMEP=1",
    "smap": "U/S=1, and CR4.SMAP=1", "key": "a key that PKRU denies", "gmet": "U/S=1, and GMET is enabled"}
"""The same for what the last entry of a walk is to blame for."""


@dataclass(frozen=True)
class Mark:
    """The first difference: the index of its step, None for the outcome; `why` in words."""

    index: int | None
    why: str


class Beside:
    """Both walks of one finding, which must have one. `rows` has for each of `steps` the entry as it must be, and as
    the machine left it, None where nobody looked; `mark` is where the walks part."""

    def __init__(self, finding: Finding) -> None:
        assert finding.walk is not None
        self.finding = finding
        self.walk = finding.walk
        self.steps = finding.walk.steps
        self.after = finding.after
        self.rows = [self._values(index, step) for index, step in enumerate(self.steps)]
        self.mark = self._mark()

    def group(self, index: int) -> str:
        """What the nested walk is for that the step at `index` is of."""
        purpose = self.steps[index].purpose
        what = "the page itself" if purpose == FINAL else f"the guest's {purpose}"
        known, address = self._translated(self._together(index))
        return f"nested walk of gPA {address:#x}, for {what}:" if known & 1 else f"nested walk for {what}:"

    def part(self, index: int) -> str:
        """What the entry at `index` does in the model's walk: it leads to a table or a page, or it ends the walk."""
        stop = None if isinstance(self.walk.outcome, Reached) else self.end()
        if stop is not None and index == stop[0]:
            return f"ends here: {stop[1]}"
        step, last = self.steps[index], self._together(index)[-1]
        kind = self._kind(step)
        if index != last:
            return f"table at {kind} {step.entry & FRAME:#x}"
        return f"page at {kind} {self._page(step)[0]:#x}"

    def stopped_at(self) -> str:
        """Where the access would have gone that the rights of its last translation forbid: `sPA 0x1008`, or, if it is
        L2's own tables that do, `gPA 0x1008`; empty if the walk did not come so far."""
        outcome, last = self.walk.outcome, self.steps[-1]
        if self.walk.rule.rpartition(".")[2] in ("present", "reserved") or last.purpose not in ("", FINAL):
            return ""
        if not isinstance(outcome, PageFault | NestedPageFault):
            return ""
        base, size = self._page(last)
        return f"{self._kind(last)} {base | outcome.address & size - 1:#x}"

    def _kind(self, step: Step) -> str:
        """Of the addresses that an entry holds: L2's own tables have sPAs only where there is no nested dimension."""
        alone = not any(one.dimension == NESTED for one in self.steps)
        return "sPA" if step.dimension == NESTED or alone else "gPA"

    def _page(self, step: Step) -> tuple[int, int]:
        """The page that a leaf maps: its address and its size."""
        if step.level == "pde" and words.narrow(self.walk, step.dimension):  # a page of 4M, with address bits 39:32
            return step.entry & 0xFFC0_0000 | (step.entry >> 13 & 0xFF) << 32, 1 << 22
        return step.entry & FRAME & -(1 << _SHIFTS[step.level]), 1 << _SHIFTS[step.level]

    def wrong(self, index: int) -> Divergence | None:
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
        one = self.wrong(index)
        if one is not None:
            return self._entry_of(one.expected, index), self._entry_of(one.observed, index)
        if not self.after:
            return step.entry, None
        seen = self._seen(index)
        if (seen ^ step.entry) & ~(A | D):
            return step.entry, seen  # nobody objects: L2 itself wrote it, later in this run
        return seen, seen

    def _mark(self) -> Mark:
        """Where the two walks part."""
        observed, expected = self.finding.observed, self.walk.outcome
        found: list[tuple[int, str]] = []
        for index, (want, got) in enumerate(self.rows):
            wrong = self.wrong(index)
            if wrong is not None and got is not None:
                # A and D that are set too much may be no more than traces of a walk that went too far
                cause = want ^ got if observed is None else (want ^ got) & ~(got & ~want & (A | D))
                if cause:
                    found.append((index, words.difference(wrong)))
                    break
        if observed is not None:
            found += self._parting(expected, observed)
        if found:
            return Mark(*min(found))
        return Mark(None, "")

    def _parting(self, expected: Outcome, observed: Outcome | str) -> list[tuple[int, str]]:
        """Where the walks part if they come to different ends, as far as these ends tell."""
        stop = None if isinstance(expected, Reached | GeneralProtection) else self.end()
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

    def end(self) -> tuple[int, str]:
        """The index of the entry that the model's walk failed at, and what that has: `R/W=0`."""
        last = len(self.steps) - 1
        kind = self.walk.rule.rpartition(".")[2]
        if kind == "reserved" and self.walk.reserved:
            return last, f"reserved {words.bits(self.walk.reserved)} set"
        if kind not in _DENIED_BY:
            return last, _ENDED_BY.get(kind, "rights that forbid it")
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
