"""The divergences of one probe taken together, and what is wrong in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from harness.lockstep.compare import Divergence
from harness.lockstep.driver import Result
from harness.lockstep.signature import Signature, of_loss, signature
from harness.model.access import NestedPageFault, Outcome, PageFault, Reached
from harness.model.vmcb import FIELDS
from harness.model.walk import Walk
from harness.report import words
from harness.scenario.ops import Probe, Scenario

_REFUSED: Final = "VMEXIT_INVALID"
_NUMBER: Final = re.compile(r"0x[0-9a-f]+")
_HALF_REFUSED: Final = "VMEXIT 0xffffffff,"
_CONTEXTS: Final = {
    "context.direct-l1": "of L1",
    "context.direct-l2": "of L2, which runs without nested paging,",
    "context.nested": "of L2, which runs on L1's nested table,",
    "context.guest-table": "of a guest on a host without usable nested paging",
    "context.back": "of L1 after #VMEXIT",
}


@dataclass(frozen=True)
class Finding:
    """What one probe, or one VMRUN where `probe` is -1, came to: at least one divergence. MMU contexts (C4) are
    a finding of their own.

    `entries` has every divergence of the same op that is about a table entry, by its sPA: a walk may go
    through an entry that an earlier probe is to blame for.
    """

    scenario: str
    op: int
    probe: int
    divergences: tuple[Divergence, ...]
    entries: Mapping[int, Divergence] = field(default_factory=dict)

    @property
    def first(self) -> Divergence:
        """The divergence that says most: one that no erratum explains; an outcome before what follows from it."""
        return next((d for d in self.divergences if d.erratum is None), self.divergences[0])

    @property
    def signature(self) -> Signature:
        """By which it is one finding with others."""
        return signature(self.first)

    @cached_property
    def walk(self) -> Walk | None:
        return next((d.walk for d in self.divergences if d.walk is not None), None)

    @cached_property
    def after(self) -> tuple[int, ...]:
        """The walk's entries as the machine left them; empty if nobody looked."""
        return next((d.after for d in self.divergences if d.walk is not None), ())

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The memory types of that walk."""
        return next((d.types for d in self.divergences if d.walk is not None), ())

    @cached_property
    def observed(self) -> Outcome | str | None:
        """What the machine made of the probe, where that is not what the model says; else None."""
        for one in self.divergences:
            if one.field == "outcome":
                return words.parse_outcome(str(one.observed)) or str(one.observed)
        fields = {d.field: d.observed for d in self.divergences if d.check == "C1"}
        walk = self.walk
        if walk is not None and isinstance(walk.outcome, PageFault | NestedPageFault):
            code, address = fields.get("exitinfo1"), fields.get("exitinfo2")
            if isinstance(code, int) or isinstance(address, int):
                return walk.outcome._replace(
                    error_code=code if isinstance(code, int) else walk.outcome.error_code,
                    address=address if isinstance(address, int) else walk.outcome.address,
                )
        return None

    def is_new(self, strict: bool = False) -> bool:
        """Whether any of it is not explained by an erratum; with `strict`, always."""
        return strict or any(d.erratum is None for d in self.divergences)


def findings(divergences: Iterable[Divergence]) -> list[Finding]:
    """Divergences of one scenario, those of one probe together, in the order of their first ones. In each,
    what became of the probe comes before what is in its tables, and that before registers."""
    groups: dict[tuple[int, int, bool], list[Divergence]] = {}
    entries: dict[int, dict[int, Divergence]] = {}
    for one in divergences:
        groups.setdefault((one.op, one.probe, one.check == "C4"), []).append(one)
        address = words.entry_address(one.field)
        if address is not None:
            entries.setdefault(one.op, {}).setdefault(address, one)
    return [
        Finding(group[0].scenario, op, probe, tuple(sorted(group, key=_weight)), entries.get(op, {}))
        for (op, probe, _), group in groups.items()
    ]


def signatures(result: Result, strict: bool) -> set[Signature]:
    """Of what a result shows that is new: its findings, or how the machine was lost, which comes before them."""
    if result.lost is not None:
        return {of_loss(result.lost)}
    return {one.signature for one in findings(result.divergences) if one.is_new(strict)}


def _weight(one: Divergence) -> tuple[bool, str]:
    return one.field != "outcome", one.check


def place(finding: Finding, scenario: Scenario | None) -> str:
    """Where in its scenario a finding is: `op 1 (walk/a.toml:7), probe 1: write a+8 at CPL 0`."""
    parts = []
    if finding.op >= 0:
        parts.append(f"op {finding.op}{_source(finding, scenario)}")
    found = words.probe_of(scenario, finding.op, finding.probe)
    if found is not None:
        parts.append(f"probe {finding.probe}: {found[0]} at CPL {found[1]}")
    elif finding.probe >= 0 and scenario is None:
        parts.append(f"probe {finding.probe}")
    elif finding.probe >= 0:
        parts.append("the VMMCALL behind the last probe")
    return ", ".join(parts) or "the end of the scenario"


def _source(finding: Finding, scenario: Scenario | None) -> str:
    if scenario is None or not scenario.source:
        return ""
    path, here = Path(scenario.source), Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    line = f":{scenario.lines[finding.op]}" if finding.op < len(scenario.lines) else ""
    return f" ({shown}{line})"


def headline(finding: Finding, scenario: Scenario | None) -> str:
    """What is wrong, in a sentence, of the finding's first divergence."""
    one = finding.first
    found = words.probe_of(scenario, finding.op, finding.probe)
    probe, who = (found[0], f"`{found[0]}`") if found is not None else (None, "L2")
    address = words.entry_address(one.field)
    if one.check == "C4":
        return _context(one)
    if one.field == "outcome":
        return _outcome(one, who)
    if address is not None:
        return _entry(one, who)
    if one.field.startswith("memory at "):
        return _memory(one, who)
    if one.field == "value":
        return _value(one, who, probe)
    if one.check == "C1" and any(d.field == "rip" for d in finding.divergences):
        return f"L2 faults at another instruction than {who}{_why(one)}."
    if one.check == "C1":
        return f"{who} faults as it must, but {one.field.upper()} is wrong{_why(one)}."
    return _state(one, who, probe)


def kind(finding: Finding) -> str:
    """What is wrong, without the probe and the addresses."""
    return f"{_NUMBER.sub('...', headline(finding, None))} (rule {finding.first.rule})"


def _context(one: Divergence) -> str:
    """C4: which context, and what of it."""
    if one.rule == "context.vmrun":
        return f"The hypervisor under L1 did not run what L1's VMCB says: {one.field}."
    return f"The MMU context {_CONTEXTS.get(one.rule, 'under L1')} is wrong: {one.field}."


def _outcome(one: Divergence, who: str) -> str:
    want, got = str(one.expected), str(one.observed)
    if want == _REFUSED and got.startswith(_HALF_REFUSED):
        return "VMRUN was refused as it must be, but EXITCODE is 0xffffffff, half of VMEXIT_INVALID."
    if want == _REFUSED:
        return f"VMRUN must be refused, and was not: the machine ran L2 ({got})."
    if got.startswith(_REFUSED):
        return "VMRUN was refused, and must not be."
    fault = one.walk is not None and not isinstance(one.walk.outcome, Reached)
    if fault and got.startswith("done"):
        return f"{who} went through; it must end in {_kind(want)}."
    if not fault and words.parse_outcome(got) is not None:
        return f"{who} ended in {_kind(got)}; it must go through."
    if words.parse_outcome(got) is not None and _kind(got) == _kind(want):
        return f"{who} ended in another {_kind(got)} than it must."
    return f"{who} ended in {_kind(got)}, not in {_kind(want)}."


def _kind(outcome: str) -> str:
    """`#NPF` of an outcome's text, without its numbers."""
    return outcome.split()[0].rstrip(",") if outcome else "nothing"


def _entry(one: Divergence, who: str) -> str:
    why = words.difference(one) or "it has another value"
    name = entry_name(one)
    return f"{who} left the {name} wrong: {why}." if name else f"The {one.field} is wrong: {why}."


def entry_name(one: Divergence) -> str:
    """`nested pte for the guest's pde`, of an entry that the divergence's walk went through; else empty."""
    step = words.step_of(one)
    return step_name(step.dimension, step.level, step.purpose) if step is not None else ""


def step_name(dimension: str, level: str, purpose: str) -> str:
    """A step of a walk in words: `guest pde`, or `nested pte for the guest's pde`."""
    if not purpose:
        return f"{dimension} {level}"
    return f"{dimension} {level} for the {'page itself' if purpose == 'final' else f'guest{chr(39)}s {purpose}'}"


def _memory(one: Divergence, who: str) -> str:
    what = one.field.removeprefix("memory at ")
    if one.expected == "unchanged":
        return f"{who} or another access changed memory at {what}, which must stay as it was."
    if one.observed == "unchanged":
        return f"{who} did not reach memory at {what}, which it must change."
    return f"Memory at {what} does not hold what it must."


def _value(one: Divergence, who: str, probe: Probe | None) -> str:
    came = words.reached_instead(one, probe)
    if came is not None and one.walk is not None and isinstance(one.walk.outcome, Reached):
        return f"{who} came to sPA {came:#x}; it must come to sPA {one.walk.outcome.spa:#x}."
    return f"{who} returned a wrong value."


def _state(one: Divergence, who: str, probe: Probe | None) -> str:
    name, why = one.field, _why(one)
    if name.endswith(" before VMRUN"):
        return f"Before VMRUN the VMCB's {name.removeprefix('vmcb.').removesuffix(' before VMRUN')} was wrong{why}."
    if name.startswith("l1."):
        return f"#VMEXIT did not give L1 its {name[3:].upper()} back{why}."
    if name.startswith("l2."):
        return f"{name[3:].upper()} of L2 is not what it must be after #VMEXIT{why}."
    if probe is not None and name == probe.kind:
        return f"{who} returned a wrong value{why}."
    if name in FIELDS or name.startswith("reserved+"):
        behind = f"After {who} the" if probe is not None else "The"
        return f"{behind} VMCB's {name} is wrong{why}."
    return f"{name} is wrong{why}."


def _why(one: Divergence) -> str:
    difference = words.difference(one)
    return f": {difference}" if difference else ""
