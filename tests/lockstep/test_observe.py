"""The checks of a foreign L1's stops: what a right machine does passes, and each planted fault is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum
from harness.lockstep.nested_tables import NestedTables
from harness.lockstep.observe import KEPT, Observer, judge_again
from harness.lockstep.result import Under, Visit
from harness.lockstep.signature import signature
from harness.model.access import ErrorCode, Reached
from harness.model.dirty import write_back
from harness.model.entries import FRAME, NX, PS, RW, US, A, D, P, long_mode
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmcb import ExitCode, Vmcb
from harness.wire.stop import ACCESS, ENTER, EXIT, INVLPGA, Stop
from tests.model.tables import FETCH, GVA, READ, USER, Space

E = ErrorCode
CODE = GVA
DATA = GVA + 0x1000
PAGING = CR0.PE | CR0.PG | CR0.WP
LONG = EFER.SVME | EFER.LME | EFER.LMA | EFER.NXE
HOLE = 0x1234_5000
"""A gPA that L1 does not map at first."""


@dataclass
class World:
    """An L1 with one VMCB, and an L2 with a page of code and one of data, under an observer."""

    errata: list[Erratum] = field(default_factory=list)
    alone: bool = True

    def __post_init__(self) -> None:
        self.space = space = Space()
        for gva in (CODE, DATA):
            page = space.guest_page()
            space.map_guest(gva, page)
        self.vmcb = Vmcb(space.memory, space.page())
        values = {
            "asid": 1, "np_control": 1, "ncr3": space.ncr3, "intercept_misc2": 3, "cr0": PAGING, "cr3": space.gcr3,
            "cr4": CR4.PAE, "efer": LONG, "dr6": 0xFFFF_0FF0, "dr7": 0x400, "rflags": 2, "rip": CODE,
            "cs.attrib": 0x29B, "g_pat": 0x0007_0406_0007_0406,
        }
        for name, value in values.items():
            self.vmcb[name] = value
        self.cpu = Cpu(48, True, 16, frozenset({"nx"}))
        self.observer = Observer("test", space.memory.bytes, self.cpu, self.errata)
        self.host = {"rax": self.vmcb.address, "rsp": 0x1000, "rip": 0x2000, "eflags": 2, "cs": 8, "ss": 16, "ds": 16,
                     "es": 16, "cr0": PAGING, "cr3": 0x3000, "cr4": CR4.PAE, "efer": LONG}

    def enter(self) -> list[Divergence]:
        return self.observer.stop(Stop(ENTER, 1, dict(self.host), self.alone))

    def leave(self, code: int, info1: int = 0, info2: int = 0, **host: int) -> list[Divergence]:
        """The #VMEXIT of a machine that fetched the instruction at L2's RIP."""
        write_back(self.space.memory.words, self.space.walk(CODE, FETCH).updates)
        self.vmcb["exitcode"], self.vmcb["exitinfo1"], self.vmcb["exitinfo2"] = code, info1, info2
        now = self.host | {"rip": self.host["rip"] + 3} | host
        return self.observer.stop(Stop(EXIT, 1, now, self.alone))

    def npf(self, info1: int = E.FINAL | E.U, gpa: int = HOLE) -> list[Divergence]:
        return self.leave(ExitCode.NPF, info1, gpa)

    def access(self, gva: int = DATA, write: bool = False, spa: int | None = None, **l2: int) -> list[Divergence]:
        """A memory access of L2, after which its page is where the walk leads."""
        walk = self.space.walk(gva, READ._replace(write=write))
        write_back(self.space.memory.words, walk.updates)
        reached = walk.outcome.spa if isinstance(walk.outcome, Reached) else 0
        registers = self.host | {"cr3": self.space.gcr3, "cs": 0, "eflags": 2} | l2
        return self.observer.stop(Stop(ACCESS, 1, registers, self.alone, gva=gva, write=write,
                                       spa=reached if spa is None else spa))

    def vmmcall(self) -> list[Divergence]:
        return self.leave(ExitCode.VMMCALL)

    def invlpga(self, gva: int, asid: int = 1) -> list[Divergence]:
        return self.observer.stop(Stop(INVLPGA, 1, dict(self.host), self.alone, gva=gva, asid=asid))

    def other_table(self, without: int | None = None) -> None:
        """nCR3 leads to a copy of the nested table, in which the page of `without` is not present."""
        space, gone = self.space, self.entry(without) if without is not None else -1

        def copy(table: int, depth: int) -> int:
            new = space.page()
            for at in range(0, 4096, 8):
                entry = space.get(table + at)
                if entry & P and depth < 3:
                    entry = copy(entry & FRAME, depth + 1) | entry & ~FRAME
                space.set(new + at, 0 if table + at == gone else entry)
            return new

        self.vmcb["ncr3"] = copy(space.ncr3, 0)

    def entry(self, gva: int = CODE) -> int:
        """The sPA of the nested PTE of a page of L2's."""
        return next(s.address for s in reversed(self.space.walk(gva, READ).steps) if s.dimension == "nested")


@pytest.fixture
def world() -> World:
    return World()


def told(found: list[Divergence]) -> list[tuple[str, str, str]]:
    return [(one.check, one.field, one.rule) for one in found]


class TestRight:
    """A machine and an L1 that do nothing wrong."""

    def test_an_instruction(self, world: World) -> None:
        assert world.enter() == [] and world.vmmcall() == []
        assert world.observer.seen.vmruns == 1 and world.observer.seen.exits == {"VMEXIT_VMMCALL": 1}

    def test_its_visits(self, world: World) -> None:
        """Each #VMEXIT whose VMRUN was seen, with the paging that L2 ran under."""
        world.enter()
        world.npf()
        world.enter()
        world.vmmcall()
        world.vmmcall()
        under = Under(4, world.space.ncr3, 4)
        assert world.observer.seen.visits == [
            Visit(0, 0, ExitCode.NPF, E.FINAL | E.U, HOLE, under), Visit(1, 0, ExitCode.VMMCALL, 0, 0, under)]

    def test_a_nested_fault(self, world: World) -> None:
        assert world.enter() == [] and world.npf() == []

    def test_a_nested_fault_for_a_guest_table(self, world: World) -> None:
        world.enter()
        assert world.npf(E.GUEST_TABLE | E.W | E.U) == []

    def test_a_page_fault(self, world: World) -> None:
        world.enter()
        assert world.leave(0x4E, E.W, 0x7000) == []

    def test_a_refusal(self, world: World) -> None:
        world.vmcb["asid"] = 0
        world.enter()
        assert world.leave(ExitCode.INVALID) == [] and world.observer.seen.refused == 1

    def test_entries_that_l1_makes_present_need_no_flush(self, world: World) -> None:
        world.enter()
        world.npf()
        world.space.map_nested(HOLE, world.space.page())
        assert world.enter() == []

    @pytest.mark.parametrize("control", [1])
    def test_what_is_flushed_may_go(self, world: World, control: int) -> None:
        world.enter()
        world.vmmcall()
        world.space.change(world.entry(DATA), set=A)
        world.enter()
        world.vmmcall()
        world.space.set(world.entry(DATA), 0)
        world.vmcb["tlb_control"] = control
        assert world.enter() == []

    def test_another_asid_needs_no_flush(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        world.space.set(world.entry(), world.space.get(world.entry()) & ~P)
        world.vmcb["asid"] = 2
        assert world.enter() == []


    def test_accesses(self, world: World) -> None:
        world.enter()
        assert world.access() == [] and world.access(write=True) == [] and world.access(cs=3) == []
        assert world.vmmcall() == [] and world.observer.seen.accesses == 3
        assert world.access() == [], "L2 does not run"

    def test_an_access_on_the_side(self, world: World) -> None:
        """To a descriptor, at CPL 3, in a page of the supervisor's."""
        world.space.map_guest(DATA, world.space.guest_page(), bits=P | RW)
        world.enter()
        assert world.access(cs=3) == []

    def test_invlpga(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        at = world.entry(DATA)
        world.space.change(at, set=A)
        world.enter()
        world.vmmcall()
        world.space.change(at, clear=P)
        assert world.invlpga(DATA) == [] and world.enter() == []

    def test_the_same_by_another_table(self, world: World) -> None:
        """nCR3 has changed, and all that L2 used is in the new table."""
        world.enter()
        world.vmmcall()
        world.other_table()
        assert world.enter() == [] and world.observer.seen.vmruns == 2

    def test_another_table_and_a_flush(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        world.other_table(without=CODE)
        world.vmcb["tlb_control"] = 1
        assert world.enter() == []


def machine(change: Callable[[World], object], code: int = ExitCode.VMMCALL) -> Callable[[World], list[Divergence]]:
    """A machine that does `change` beside what it must."""
    def run(world: World) -> list[Divergence]:
        world.enter()
        change(world)
        return world.leave(code)
    return run


def put(name: str, value: int) -> Callable[[World], list[Divergence]]:
    return machine(lambda world: world.vmcb.__setitem__(name, value))


def refused(world: World) -> list[Divergence]:
    world.enter()
    return world.leave(ExitCode.INVALID)


def not_refused(world: World) -> list[Divergence]:
    world.vmcb["intercept_misc2"] = 0
    world.enter()
    return world.vmmcall()


def fault(info1: int, gpa: int = HOLE, code: int = ExitCode.NPF) -> Callable[[World], list[Divergence]]:
    def run(world: World) -> list[Divergence]:
        world.enter()
        return world.leave(code, info1, gpa)
    return run


def no_fault(world: World) -> list[Divergence]:
    """#NPF for what L1 maps."""
    world.enter()
    return world.npf(gpa=world.space.gcr3)


def fetch_elsewhere(world: World) -> list[Divergence]:
    world.enter()
    return world.npf(E.FINAL | E.U | E.ID)


def registers(**values: int) -> Callable[[World], list[Divergence]]:
    def run(world: World) -> list[Divergence]:
        world.enter()
        return world.leave(ExitCode.VMMCALL, **values)
    return run


def accessed_missing(world: World) -> list[Divergence]:
    """The machine leaves a nested entry of the code's page alone."""
    world.enter()
    walk = world.space.walk(CODE, FETCH)
    world.leave(0x60)
    world.space.change(walk.trail[-1][3], clear=A)
    world.enter()
    world.vmcb["exitcode"] = ExitCode.VMMCALL
    return world.observer.stop(Stop(EXIT, 1, world.host | {"rip": 0x2003}))


def unmapped(world: World) -> list[Divergence]:
    """L2 executed an instruction that its tables do not have."""
    world.enter()
    world.vmcb["rip"] = 0x9000
    return world.vmmcall()


def set_entry(bits: int) -> Callable[[World], list[Divergence]]:
    return machine(lambda world: world.space.change(world.entry(DATA), set=bits))


def clear_entry(bits: int) -> Callable[[World], list[Divergence]]:
    def run(world: World) -> list[Divergence]:
        world.space.change(world.entry(DATA), set=A | D)
        return machine(lambda w: w.space.change(w.entry(DATA), clear=bits))(world)
    return run


def dirty_read_only(world: World) -> list[Divergence]:
    world.space.change(world.entry(DATA), clear=RW)
    return set_entry(D)(world)


def no_flush(change: Callable[[World, int], object]) -> Callable[[World], list[Divergence]]:
    """An L1 that changes a nested entry that was used, and does not flush."""
    def run(world: World) -> list[Divergence]:
        at = world.entry(DATA)
        world.space.change(at, set=A)
        world.enter()
        world.vmmcall()
        change(world, at)
        return world.enter()
    return run


def access(**how: Any) -> Callable[[World], list[Divergence]]:
    def run(world: World) -> list[Divergence]:
        world.enter()
        return world.access(**how)
    return run


def write_to_read_only(world: World) -> list[Divergence]:
    """L2 writes where L1 does not let it."""
    world.enter()
    world.access()
    at, spa = world.entry(DATA), world.space.walk(DATA, READ).outcome
    world.space.change(at, clear=RW)
    assert isinstance(spa, Reached)
    return world.access(write=True, spa=spa.spa)


def dirty_missing(world: World) -> list[Divergence]:
    world.enter()
    world.access(write=True)
    at = world.entry(DATA)
    world.space.change(at, clear=D)
    spa = world.space.walk(DATA, READ).outcome
    assert isinstance(spa, Reached)
    return world.observer.stop(Stop(ACCESS, 1, world.host | {"cr3": world.space.gcr3, "cs": 0}, gva=DATA, write=True,
                                    spa=spa.spa))


def another_table(world: World) -> list[Divergence]:
    world.enter()
    world.vmmcall()
    world.other_table(without=CODE)
    return world.enter()


def invlpga_of(gva: int, asid: int, late: bool = False) -> Callable[[World], list[Divergence]]:
    """INVLPGA of another address or in another ASID, or before the entry is changed, flushes nothing of it."""
    def run(world: World) -> list[Divergence]:
        at = world.entry(DATA)
        world.space.change(at, set=A)
        world.enter()
        world.vmmcall()
        if late:
            world.invlpga(gva, asid)
        world.space.change(at, clear=P)
        if not late:
            world.invlpga(gva, asid)
        return world.enter()
    return run


FAULTS = {
    "L2's access went elsewhere": (access(spa=0x5000), "C1", "outcome", "reached"),
    "L2 read what it has not": (access(gva=0x7000, spa=0x5000, cs=3), "C1", "outcome", "guest.present"),
    "L2's write, read-only": (write_to_read_only, "C1", "outcome", "nested.write"),
    "D is missing": (dirty_missing, "C2", "entry", "ad"),
    "nCR3 of tables that lack a page": (another_table, "L1", "ncr3", "tlb.control"),
    "INVLPGA elsewhere": (invlpga_of(CODE, 1), "L1", "tlb_control", "tlb.control"),
    "INVLPGA in another ASID": (invlpga_of(DATA, 2), "L1", "tlb_control", "tlb.control"),
    "INVLPGA too early": (invlpga_of(DATA, 1, late=True), "L1", "tlb_control", "tlb.control"),
    "refused": (refused, "C3", "outcome", "vmrun.legal"),
    "not refused": (not_refused, "C3", "outcome", "vmrun.intercept"),
    "#NPF without U": (fault(E.FINAL), "C1", "exitinfo1", "nested.present"),
    "#NPF with P": (fault(E.FINAL | E.U | E.P), "C1", "exitinfo1", "nested.present"),
    "#NPF with RSVD": (fault(E.FINAL | E.U | E.RSVD), "C1", "exitinfo1", "nested.present"),
    "#NPF with bit 5": (fault(E.FINAL | E.U | 1 << 5), "C1", "exitinfo1", "nested.present"),
    "#NPF with neither bit 32 nor 33": (fault(E.U), "C1", "exitinfo1", "nested.present"),
    "#NPF with both": (fault(E.FINAL | E.GUEST_TABLE | E.U | E.W), "C1", "exitinfo1", "nested.present"),
    "#NPF of a table, no write": (fault(E.GUEST_TABLE | E.U), "C1", "exitinfo1", "nested.present"),
    "#NPF of what is mapped": (no_fault, "C1", "outcome", "reached"),
    "#NPF of a fetch, not where RIP is": (fetch_elsewhere, "C1", "outcome", "reached"),
    "#PF with P": (fault(E.P, 0x7000, 0x4E), "C1", "exitinfo1", "guest.present"),
    "#PF of what is mapped": (fault(0, DATA, 0x4E), "C1", "outcome", "reached"),
    "not mapped, executed": (unmapped, "C1", "outcome", "guest.present"),
    "A is missing": (accessed_missing, "C2", "entry", "ad"),
    "R/W appeared": (set_entry(1 << 9), "C2", "entry", "ad"),
    "D, read-only": (dirty_read_only, "C2", "entry", "ad"),
    "A vanished": (clear_entry(A), "C2", "entry", "ad"),
    "D vanished": (clear_entry(D), "C2", "entry", "ad"),
    "P vanished": (clear_entry(P), "C2", "entry", "ad"),
    "TSC_OFFSET": (put("tsc_offset", 5), "C3", "tsc_offset", "exit.control"),
    "ASID": (put("asid", 2), "C3", "asid", "exit.control"),
    "intercepts": (put("intercept_cr", 1), "C3", "intercept_cr", "exit.control"),
    "VMSAVE's state": (put("kernel_gs_base", 1), "C3", "kernel_gs_base", "exit.control"),
    "EVENTINJ": (put("eventinj", 1 << 31 | 3 << 8 | 13), "C3", "eventinj", "exit.saved"),
    "EXITINTINFO's type": (put("exitintinfo", 1 << 31 | 5 << 8), "C3", "exitintinfo", "exit.saved"),
    "EXITINTINFO's error": (put("exitintinfo", 1 << 31 | 4 << 8 | 1 << 11), "C3", "exitintinfo", "exit.saved"),
    "EFER.SVME": (put("efer", LONG & ~EFER.SVME), "C3", "efer", "exit.saved"),
    "EFER.LMA": (put("efer", LONG & ~EFER.LMA), "C3", "efer", "exit.saved"),
    "RFLAGS": (put("rflags", 0), "C3", "rflags", "exit.saved"),
    "CPL": (put("cpl", 4), "C3", "cpl", "exit.saved"),
    "CR0": (put("cr0", PAGING | 1 << 40), "C3", "cr0", "exit.saved"),
    "DR6": (put("dr6", 1 << 40), "C3", "dr6", "exit.saved"),
    "DR7": (put("dr7", 1 << 40), "C3", "dr7", "exit.saved"),
    "RIP": (put("rip", 1 << 60), "C3", "rip", "exit.saved"),
    "L1's RSP": (registers(rsp=0x1008), "C3", "l1.rsp", "exit.host"),
    "L1's RFLAGS": (registers(eflags=3), "C3", "l1.rflags", "exit.host"),
    "L1's CR3": (registers(cr3=0x4000), "C3", "l1.cr3", "exit.host"),
    "L1's CS": (registers(cs=16), "C3", "l1.cs", "exit.host"),
    "L1 takes P, no flush": (no_flush(lambda w, at: w.space.change(at, clear=P)), "L1", "tlb_control", "tlb.control"),
    "L1 takes R/W": (no_flush(lambda w, at: w.space.change(at, clear=RW)), "L1", "tlb_control", "tlb.control"),
    "L1 takes U/S": (no_flush(lambda w, at: w.space.change(at, clear=US)), "L1", "tlb_control", "tlb.control"),
    "L1 sets NX": (no_flush(lambda w, at: w.space.change(at, set=NX)), "L1", "tlb_control", "tlb.control"),
    "L1 moves the page": (no_flush(lambda w, at: w.space.set(at, w.space.get(at) ^ 0x3000)), "L1", "tlb_control",
                          "tlb.control"),
}


@pytest.mark.parametrize(("run", "check", "name", "rule"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_told(
    run: Callable[[World], list[Divergence]], check: str, name: str, rule: str, world: World
) -> None:
    made = run(world)
    found = told(made)
    assert any((one[0], one[1].partition(" at sPA")[0], one[2]) == (check, name, rule) for one in found), found
    again = judge_again("test", world.observer.evidence(), world.cpu)
    assert {signature(one) for one in again} == {signature(one) for one in made}, "what was taken down is enough"


class TestFlushes:
    def test_once(self, world: World) -> None:
        assert no_flush(lambda w, at: w.space.change(at, clear=P))(world)
        world.vmmcall()
        assert world.enter() == []

    def test_not_of_an_entry_that_was_never_used(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        world.space.change(world.entry(DATA), clear=P | A)
        assert world.enter() == []

    def test_three_counts_where_the_cpu_has_it(self, world: World) -> None:
        world.vmcb["tlb_control"] = 3
        assert no_flush(lambda w, at: w.space.change(at, clear=P))(world)

    def test_the_asid_that_ran_then(self, world: World) -> None:
        """Another one may run first: the flush is due when this one runs again."""
        at = world.entry(DATA)
        world.space.change(at, set=A)
        world.enter()
        world.vmmcall()
        world.space.change(at, clear=P)
        world.vmcb["asid"] = 2
        assert world.enter() == []
        world.vmmcall()
        world.vmcb["asid"] = 1
        assert told(world.enter()) == [("L1", "tlb_control", "tlb.control")]


class TestTheUnknown:
    def test_an_exit_without_its_vmrun(self, world: World) -> None:
        assert world.vmmcall() == [] and world.observer.seen.unpaired == 1

    def test_a_walk_out_of_memory(self, world: World) -> None:
        world.space.set(world.space.ncr3, 1 << 40 | USER)
        world.enter()
        world.vmcb["exitcode"] = ExitCode.VMMCALL
        found = world.observer.stop(Stop(EXIT, 1, world.host | {"rip": 0x2003}))
        assert found == [] and world.observer.seen.elsewhere == 1

    def test_another_processor(self, world: World) -> None:
        """It may have mended the entry before anyone could look."""
        world.alone = False
        world.enter()
        world.space.change(world.entry(DATA), set=1 << 9)
        assert world.npf(gpa=world.space.gcr3) == [] and world.observer.seen.overtaken == 1
        world.enter()
        assert world.npf(gpa=world.space.gcr3), "nothing changed this time"

    def test_what_is_kept(self, world: World) -> None:
        for _ in range(KEPT + 5):
            fault(E.FINAL)(world)
        seen = world.observer.seen
        assert len(seen.divergences) == KEPT and list(seen.by_signature.values()) == [KEPT + 5]

    def test_a_vmcb_out_of_memory(self, world: World) -> None:
        for rax in (1 << 40, world.vmcb.address + 8):
            assert not world.observer.plausible(Stop(ENTER, 1, world.host | {"rax": rax}))


def test_errata_explain(errata: list[Erratum]) -> None:
    """QEMU's reserved bits, by a quirk; the half of VMEXIT_INVALID, by a predicate."""
    world = World([one for one in errata if one.holds_for("qemu-tcg", (7, 2, 22))])
    world.space.map_nested(HOLE, 0, bits=USER | 1 << 51)
    world.enter()
    assert [one.erratum for one in world.npf(E.FINAL | E.U | E.RSVD)] == ["qemu-tcg-reserved-without-p"]
    world.vmcb["asid"] = 0
    world.enter()
    assert [one.erratum for one in world.leave(0xFFFF_FFFF)] == ["qemu-tcg-invalid-high-half"]


@pytest.fixture
def large() -> tuple[Space, int, NestedTables]:
    """A large page at the last GiB of a nested table, and what is known of it."""
    space = Space()
    at = space.map_nested(0x4000_0000, 0x80_0000, shift=21)["pde"]
    space.change(at, set=A)
    return space, at, NestedTables(space.ncr3, long_mode(48, True), space.memory.bytes)


class TestLargePages:
    """Only what no more translates to the same is a loss."""

    def split(self, space: Space, at: int) -> int:
        table = space.page()
        for n in range(512):
            space.set(table + 8 * n, 0x80_0000 + 0x1000 * n | USER)
        space.set(at, table | USER | A)
        return table

    def test_split(self, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        self.split(space, at)
        assert [one.lost for one in tables.refresh()] == [False]
        space.set(at, 0x80_0000 | USER | PS | A)
        assert [one.lost for one in tables.refresh()] == [False]

    @pytest.mark.parametrize("entry", [0, 0x90_0000 | USER, 0x80_7000 | P | US, 0x80_7000 | USER | NX])
    def test_split_with_a_loss(self, entry: int, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        space.set(self.split(space, at) + 7 * 8, entry)
        assert [one.lost for one in tables.refresh()] == [True]

    def test_another_frame(self, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        space.set(at, space.get(at) ^ 0x20_0000)
        assert [one.lost for one in tables.refresh()] == [True]
        assert tables.refresh() == []

    def test_a_table_of_another_entry_is_read_too(self, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        assert space.get(at) & FRAME == 0x80_0000
        leaf = space.map_nested(0x5000_0000, 0x90_0000)["pte"]
        tables.refresh()
        space.change(leaf, clear=P)
        assert [(one.address, one.depth, one.lost) for one in tables.refresh()] == [(leaf, 3, True)]
