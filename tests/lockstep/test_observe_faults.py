"""Each planted fault of a machine, or of an L1, is told at its stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harness.lockstep.compare import Divergence
from harness.lockstep.observe import judge_again
from harness.lockstep.signature import signature
from harness.model.access import Reached
from harness.model.entries import NX, RW, US, A, D, P
from harness.model.registers import EFER
from harness.model.vmcb import ExitCode
from harness.wire.stop import ACCESS, EXIT, Stop
from tests.lockstep.observed import CODE, DATA, LONG, PAGING, E, World, fault, no_flush, told
from tests.model.tables import FETCH, READ


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
    "#NPF of a table, where L2 has none": (fault(E.GUEST_TABLE | E.U | E.W), "C1", "exitinfo1", "nested.present"),
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


