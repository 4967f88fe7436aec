"""The audit at the records of L1: what is audited when, and what is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.lockstep.audit import Audit
from harness.lockstep.compare import Context, Divergence
from harness.model.backing import Kvm, Shape
from harness.model.entries import RW, P
from harness.model.memory import Memory
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmcb import FIELDS, ExitCode
from harness.wire.image import Region
from harness.wire.layout import CONTROL_BYTES, RECORDS, VMRUN_RAISED
from tests.model.shadows import L1_SIZE, PRESENT, World

VMMCALL = 0x81
WHERE = Context("s", 3, (), Region(0, 0x1000))
LONG = {"cr0": CR0.PG | CR0.PE, "cr4": CR4.PAE, "efer": EFER.LME | EFER.LMA | EFER.NXE}


@dataclass
class Sink:
    shadow_audits: int = 0
    shadow_leaves: int = 0
    divergences: list[Divergence] = field(default_factory=list)


@dataclass
class Record:
    kind: int
    control: bytes = b""
    before: dict[str, int] = field(default_factory=lambda: dict(LONG))
    exitcode: int = VMMCALL


class L0:
    def __init__(self, world: World) -> None:
        self.world = world
        self.changes: dict[str, Any] = {}

    @property
    def memory(self) -> Memory:
        return self.world.memory

    @property
    def shape(self) -> Shape:
        return Shape(40, len(self.world.l0.levels))

    def look(self) -> Kvm:
        return self.world.kvm()._replace(**self.changes)


class Run:
    """VMRUNs of L1 on a world."""

    def __init__(self, every: int = 1) -> None:
        self.world = World("4-level")
        self.l0 = L0(self.world)
        self.l1 = memoryview(bytearray(L1_SIZE))
        self.audit = Audit(self.l0, self.l1, Cpu(40), every, MachineLost)
        self.sink = Sink()

    def enter(self, np_enable: int = 1) -> None:
        control = bytearray(CONTROL_BYTES)
        for name, value in (("np_control", np_enable), ("ncr3", self.world.nested_root)):
            at = FIELDS[name]
            control[at.offset : at.offset + at.width] = value.to_bytes(at.width, "little")
        self.saw(Record(RECORDS["ENTER"], bytes(control)))

    def exit(self, **change: Any) -> None:
        self.saw(Record(RECORDS["EXIT"], **change))

    def saw(self, record: Record) -> None:
        self.audit.saw(self.sink, WHERE, record)  # type: ignore[arg-type]

    def rules(self) -> list[str]:
        found = [one.rule for one in self.sink.divergences]
        self.sink.divergences.clear()
        return found


def test_every_switch_is_audited() -> None:
    run = Run()
    run.enter()
    assert (run.sink.shadow_audits, run.sink.shadow_leaves) == (1, len(PRESENT)), "L2 has not run"
    run.exit()
    run.enter()
    assert run.sink.shadow_audits == 3 and run.sink.shadow_leaves == 3 * len(PRESENT) + 2 * 7
    assert run.rules() == []


def test_one_in_n() -> None:
    run = Run(every=3)
    for _ in range(3):
        run.enter()
        run.exit()
    assert run.sink.shadow_audits == 2


def test_what_is_told() -> None:
    run = Run()
    run.enter()
    run.world.change("shadow.0", set=RW)
    run.world.change("l1.0.pte", clear=RW)
    run.exit()
    (one,) = run.sink.divergences
    assert (one.scenario, one.op, one.probe, one.check, one.rule) == ("s", 3, -1, "C5", "shadow.rights")
    assert one.field == f"4K leaf for gPA {run.world.gpa:#x} in the shadow"
    assert (one.expected, one.observed) == ("no writes", "RW")
    text = "\n".join(one.events)
    assert text.count("L1's table ") == 4 and text.count("L0's page map") == 5 and "L0's slot" in text
    assert text.count("the shadow ") == 5
    assert [line for line in one.events if line.startswith("> ")] == [one.events[-1]]
    assert f"pte    at hPA {run.world.at['shadow.0']:#x}" in one.events[-1]


def test_it_is_told_once() -> None:
    run = Run()
    run.enter()
    run.world.change("l1.0.pte", clear=P)
    for _ in range(2):
        run.exit()
        run.enter()
    assert run.rules() == ["shadow.frame"]


@pytest.mark.parametrize("code", [0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF, VMRUN_RAISED | 6, ExitCode.SHUTDOWN])
def test_before_the_first_vmrun_and_behind_one_that_was_none_l2s_table_is_nobodys(code: int) -> None:
    """A table that KVM can make no root for is a shutdown, and L2 does not run."""
    run = Run()
    run.world.change("l1.0.pte", clear=P)
    run.enter()
    run.exit(exitcode=code)
    run.enter()
    assert run.rules() == [] and run.sink.shadow_audits == 2
    run.exit()
    assert run.rules() == ["shadow.frame"]


def test_without_nested_paging_l2_runs_on_a_direct_map() -> None:
    run = Run()
    run.enter(np_enable=0)
    run.l0.changes = {"l2_root": run.world.direct_root}
    run.exit()
    assert run.rules() == [] and run.sink.shadow_leaves == 3 * len(PRESENT)
    run.world.change("direct.5000", set=0x1000)
    run.world.change("direct.5000", clear=0x2000)
    run.enter(np_enable=0)
    run.exit()
    assert set(run.rules()) == {"shadow.direct"}


def test_a_root_that_is_gone_is_not_audited_before_vmrun() -> None:
    """KVM drops it when it likes; the VMRUN makes another."""
    run = Run()
    run.enter()
    run.exit()
    run.world.change("l1.0.pte", clear=P)
    del run.world.tables[run.world.shadow_root]
    run.enter()
    assert run.rules() == []
    run.exit()
    assert run.rules() == ["shadow.table"]


def test_no_shadow_at_all() -> None:
    run = Run()
    run.l0.changes = {"l2_root": 0}
    run.enter()
    run.exit()
    assert run.rules() == []


def test_what_l2_wrote_since_vmrun_may_be_either() -> None:
    run = Run()
    at = run.world.at["l1.0.pte"]
    run.l1[at : at + 8] = run.world.l1(at).to_bytes(8, "little")
    run.audit = Audit(run.l0, run.l1, Cpu(40), 1, MachineLost)
    where = Context("s", 3, (), Region(at & ~0xFFF, (at & ~0xFFF) + 0x1000))
    control = bytearray(CONTROL_BYTES)
    control[FIELDS["np_control"].offset] = 1
    offset = FIELDS["ncr3"].offset
    control[offset : offset + 8] = run.world.nested_root.to_bytes(8, "little")
    run.audit.saw(run.sink, where, Record(RECORDS["ENTER"], bytes(control)))  # type: ignore[arg-type]
    run.world.change("l1.0.pte", clear=P)
    run.audit.saw(run.sink, where, Record(RECORDS["EXIT"]))  # type: ignore[arg-type]
    assert run.rules() == []


def test_what_makes_no_sense_is_a_loss() -> None:
    run = Run()
    run.l0.changes = {"page_map": 1 << 40}
    with pytest.raises(MachineLost, match="cannot be audited"):
        run.enter()
