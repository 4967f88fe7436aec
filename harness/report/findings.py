"""The divergences of one probe taken together, and what is wrong in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from harness.lockstep.compare import Divergence
from harness.lockstep.result import Result
from harness.lockstep.signature import Signature, of_loss, signature
from harness.model.access import NestedPageFault, Outcome, PageFault
from harness.model.walk import Walk
from harness.report import words
from harness.scenario.ops import Scenario


@dataclass(frozen=True)
class Finding:
    """What one probe, or one VMRUN where `probe` is -1, came to: at least one divergence. MMU contexts (C4) are
    a finding of their own, and so are KVM's tables (C5).

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
        """The model's walk that it is about; None if it is about none."""
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
    groups: dict[tuple[int, int, str], list[Divergence]] = {}
    entries: dict[int, dict[int, Divergence]] = {}
    for one in divergences:
        groups.setdefault((one.op, one.probe, one.check if one.check in ("C4", "C5") else ""), []).append(one)
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
