"""Divergences to report: made of the model's own walks over small tables, and of what a machine may
have made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.model.access import Access, Reached
from harness.model.dirty import resolve, write_back
from harness.model.entries import A, D, legacy, pae
from harness.model.liberties import Liberties, Takes
from harness.model.walk import Walk, translate
from harness.report.findings import Finding, findings
from harness.report.styled import plain
from harness.report.walks import draw
from harness.scenario.ops import Change, EntryOp, RunOp, Scenario, parse_probe
from tests.model.tables import GVA, READ, Space

GPA: Final = 1 << 39 | 7 << 30 | 0x45_6000
SPA: Final = 0x65_4000
NAME: Final = "nested-write[pte]"

SCENARIO: Final = Scenario(
    name=NAME,
    title="A write through a read-only nested pte faults",
    manual="15.25.5",
    shows="",
    ops=(
        EntryOp("nested.a.pte", Change(clear=("rw",))),
        RunOp((parse_probe("read a"), parse_probe("write a+8"), parse_probe("fetch a"), parse_probe("rdcr2")), cpl=3),
    ),
    source="/somewhere/scenarios/walk/nested-write.toml",
    lines=(5, 9),
)


@dataclass
class Case:
    """GVA mapped to GPA and on to SPA. `run` is one probe of both sides: what the machine does differently
    is said by what it leaves in memory."""

    space: Space = field(default_factory=Space)
    shift: int = 12

    def __post_init__(self) -> None:
        low = (1 << self.shift) - 1
        self.guest = self.space.map_guest(GVA, GPA & ~low | GVA & low & ~0xFFF, self.shift)
        gpa = GPA & ~low | GVA & low & ~0xFFF
        self.final = self.space.map_nested(gpa, SPA) if self.space.nested else {}

    def walk(self, access: Access = READ, offset: int = 0) -> Walk:
        """As the twin does: a walk, and its bits written back."""
        walk = self.space.walk(GVA | offset, access)
        faulted = not isinstance(walk.outcome, Reached)
        required, _ = resolve(walk.updates, faulted, Liberties.each(Takes.ALWAYS))
        write_back(self.space.memory.words, required)
        return walk

    def after(self, walk: Walk, changes: dict[int, int] | None = None) -> tuple[int, ...]:
        """The entries of `walk` as the machine left them: as the model has them, but for `changes` by sPA."""
        changes = changes or {}
        return tuple(changes.get(step.address, self.space.get(step.address)) for step in walk.steps)


def divergence(walk: Walk | None = None, **values: Any) -> Divergence:
    """A divergence of probe 1 of the scenario, unless `values` say otherwise."""
    base: dict[str, Any] = {
        "scenario": NAME, "op": 1, "probe": 1, "check": "C1", "field": "outcome", "expected": "", "observed": "",
        "rule": walk.rule if walk is not None else "exit.host", "walk": walk,
    }
    return Divergence(**base | values)


def entry(walk: Walk | None, address: int, expected: int | str, observed: int | str, **values: Any) -> Divergence:
    """A divergence about a table entry."""
    return divergence(walk, check="C2", field=f"entry at sPA {address:#x}", expected=expected, observed=observed,
                      **{"rule": "ad"} | values)


def went_through(case: Case, walk: Walk, probe: int = 1) -> Divergence:
    """The model's walk faults, the machine's did not."""
    return divergence(walk, probe=probe, expected=str(walk.outcome), observed="done, result 0x77",
                      after=case.after(walk))


def only(*divergences: Divergence) -> Finding:
    found = findings(divergences)
    assert len(found) == 1
    return found[0]


def missing_a(case: Case, address: int, walk: Walk) -> Divergence:
    """The machine did not set A in the entry at `address`."""
    want = case.space.get(address)
    assert want & A
    return entry(walk, address, want, want & ~A, after=case.after(walk, {address: want & ~A}))


def extra_d(case: Case, address: int, walk: Walk) -> Divergence:
    """The machine set D in the entry at `address`, where it must not."""
    want = case.space.get(address)
    assert not want & D
    return entry(walk, address, want, want | D, after=case.after(walk, {address: want | D}))


def erratum(id: str = "e1", **values: Any) -> Erratum:
    base: dict[str, Any] = {"id": id, "title": f"title of {id}", "machine": "qemu-tcg", "explanation": "because",
                            "reference": "the manual"}
    return Erratum(**base | values)


def result(*divergences: Divergence, scenario: str = NAME, **values: Any) -> Result:
    return Result(scenario, 3, 12, 4096, [d._replace(scenario=scenario) for d in divergences], **values)


def pae_walk(gva: int) -> tuple[Space, Walk]:
    """A walk of PAE's tables for `gva`, whose root does not begin at a page."""
    space = Space(identity=True)
    root, directory, table = space.guest_page() + 0x60, space.guest_page(), space.guest_page()
    space.set(root + 8 * (gva >> 30), directory | 1)
    space.set(directory + 8 * (gva >> 21 & 0x1FF), table | 7)
    space.set(table + 8 * (gva >> 12 & 0x1FF), SPA | 7)
    space.map_nested(SPA, SPA)
    paging = space.paging()._replace(guest=pae(48, True), gcr3=root)
    return space, translate(paging, space.memory.words, gva, READ)


def narrow_walk(change: Callable[[Space, int, int], None] = lambda space, pde, pte: None) -> tuple[Space, Walk]:
    """A walk of 32-bit tables whose entries are the odd ones of their quadwords; `change` is given the sPAs
    of PDE and PTE before it."""
    space = Space(identity=True)
    directory, table = space.guest_page(), space.guest_page()
    gva = 0x5 << 22 | 0x7 << 12 | 0x10
    pde, pte = directory + 4 * 5, table + 4 * 7
    space.memory.write(pde, table | 7, 4)
    space.memory.write(pte, SPA | 7, 4)
    space.map_nested(SPA, SPA)
    change(space, pde, pte)
    paging = space.paging()._replace(guest=legacy(48, True), gcr3=directory)
    return space, translate(paging, space.memory.words, gva, READ)


def drawn(finding: Finding, width: int = 100) -> list[str]:
    return plain(draw(finding, SCENARIO, width)).splitlines()


def rows(finding: Finding) -> list[str]:
    """The lines of the walks: from their heading on."""
    lines = drawn(finding)
    return lines[next(n for n, text in enumerate(lines) if text.split()[:2] == ["entry", "sPA"]) :]


def marked(finding: Finding) -> str:
    """The line that the first difference is marked in: exactly one."""
    found = [text for text in rows(finding) if text.startswith("  > ")]
    table = [text for text in found if text.split()[1] in ("guest", "pml4e", "pdpte", "pde", "pte", "outcome")
             and ":" not in text]
    assert len(table) == 1, found
    return table[0]


def also(finding: Finding) -> list[str]:
    return [text for text in rows(finding) if text.startswith("  ! ")]
