"""Quirks that fuzzing found: what a VMRUN comes to with them, and that nothing else has them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from harness.lockstep.active import Active
from harness.lockstep.compare import _host_differences
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import (
    BREAKPOINTS_KEPT,
    DELIVERY_EMULATED,
    EMULATED_FAULT_PLACE,
    ERROR_CODE_WITHOUT_EV,
    EXCLUSIVE_PROBES_FIRST,
    INTERRUPT_BEHIND_ANOTHER,
    NESTED_PDPTE_SHUTDOWN,
    PDE_WRITES_MISSED,
    QUIRKS,
    RMW_READS_FIRST,
    SKINIT_ANY_CPL,
    SOFTWARE_WALK_OFFSET,
    XSETBV_INTERCEPT_FIRST,
)
from harness.lockstep.twin import Twin
from harness.model import events
from harness.model.access import ErrorCode
from harness.model.dirty import CUT, NESTED_TABLE
from harness.model.liberties import Liberties
from harness.model.registers import Cpu
from harness.model.vmcb import FIELDS, ExitCode
from harness.scenario import files
from harness.scenario.ops import Change, Scenario, VmcbOp
from harness.scenario.program import Compiler
from harness.wire.image import PAGE, Image
from harness.wire.layout import HOST, SAVE_BYTES
from tests.conftest import LIBRARY
from tests.scenario.texts import one, run

DEBUG = ExitCode.EXCEPTION + events.DB
PAGE_FAULT = ExitCode.EXCEPTION + events.PF


def last(twin: Twin, compiler: Compiler, name: str | Scenario, *quirks: str, seen: Any = None) -> Prediction:
    """The prediction of a scenario's last RUN, with quirks there; the VMCB is as it leaves it."""
    (scenario,) = [name] if isinstance(name, Scenario) else files.load([LIBRARY], lambda it: it == name)
    program = compiler.compile(scenario)
    twin.reset(program.world)
    runs = [number for number, step in enumerate(program.steps) if step.code == "RUN"]
    for number, step in enumerate(program.steps[: runs[-1] + 1]):
        if step.code != "RUN":
            twin.apply(step)
            continue
        twin.begin(step)
        before = bytes(twin.memory.bytes[step.a : step.a + PAGE])
        out = twin.predict(step, 0)
        if any(quirks) and number == runs[-1]:
            out = twin.predict_again(out, before, step, Active(filter(None, quirks)), seen)
    return out


def left(twin: Twin, *names: str) -> tuple[int, ...]:
    return tuple(twin.vmcb[name] for name in names)


@pytest.mark.parametrize(("event", "vector", "told"), [
    (0x8000_0010, 16, 0x8000_0010), (0x8000_0202, 2, 0x8000_0202), (0x8000_0B0D, 13, 0),
])
def test_an_event_gives_way_to_the_next_instruction(
    twin: Twin, compiler: Compiler, event: int, vector: int, told: int
) -> None:
    (known,) = files.load([LIBRARY], lambda it: it == "regressions/delivery-by-nested-table[0x80000010]")
    injected = VmcbOp("eventinj", Change(value=event))
    ops = [injected if isinstance(op, VmcbOp) and op.field == "eventinj" else op for op in known.ops]
    name = replace(known, ops=tuple(ops))
    last(twin, compiler, name)
    rip, idt = twin.vmcb["rip"], twin.vmcb["idtr.base"] + 16 * vector
    fields = "exitcode", "exitinfo1", "exitinfo2", "exitintinfo"
    assert left(twin, *fields) == (PAGE_FAULT, 0, idt, event)
    last(twin, compiler, name, DELIVERY_EMULATED)
    assert left(twin, *fields) == (PAGE_FAULT, 0x10, rip, told)


def test_only_where_a_table_is_shadowed(twin: Twin, compiler: Compiler) -> None:
    name = "events/inject-cut[0x80000010,idt]"
    last(twin, compiler, name)
    before = twin.vmcb_bytes()
    out = last(twin, compiler, name, DELIVERY_EMULATED)
    assert twin.vmcb_bytes() == before and out.rule


@pytest.mark.parametrize(("quirk", "event"), [("", 0), (NESTED_PDPTE_SHUTDOWN, 0x8000_0010)])
def test_a_shutdown_before_l2_is_entered_keeps_the_event(
    twin: Twin, compiler: Compiler, quirk: str, event: int
) -> None:
    last(twin, compiler, "regressions/nested-pdpte-event", quirk)
    code = ExitCode.SHUTDOWN if quirk else ExitCode.NPF
    assert left(twin, "exitcode", "eventinj", "exitintinfo") == (code, event, 0x8000_0010)


@pytest.mark.parametrize("dr6", [0xFFFF_0FF0, 0xFFFF_0FF4, 0xFFFF_0FFF])
@pytest.mark.parametrize(("code", "probe", "stops"), [(DEBUG, 0, True), (DEBUG, 1, False), (PAGE_FAULT, 0, False)])
def test_a_breakpoint_of_l1_stops_l2_where_that_was_seen(
    twin: Twin, compiler: Compiler, code: int, probe: int, stops: bool, dr6: int
) -> None:
    save = bytearray(SAVE_BYTES)
    save[FIELDS["dr6"][0] - 0x400 : FIELDS["dr6"][0] - 0x3F8] = dr6.to_bytes(8, "little")
    seen = SimpleNamespace(exitcode=code, next_probe=probe, fault_code=0, fault_address=0, save=bytes(save))
    scenario = one('host = "dr7"\nvalue = 0x400', run("fetch 0x0; read a"))
    last(twin, compiler, scenario, BREAKPOINTS_KEPT, seen=seen)
    assert left(twin, "exitcode", "rip") == (DEBUG if stops else PAGE_FAULT, 0)
    assert twin.vmcb["dr6"] & 0xF == (dr6 & 0xF if stops else 0)


@pytest.mark.parametrize("its", ["0x7f", "0x3f"])
@pytest.mark.parametrize("quirk", ["", SKINIT_ANY_CPL])
def test_skinit_at_cpl_3(twin: Twin, compiler: Compiler, its: str, quirk: str) -> None:
    last(twin, compiler, f"intercepts/skinit-user[0xffffffff,{its}]", quirk)
    asked = 0x86 if its == "0x7f" else ExitCode.EXCEPTION + events.UD
    assert twin.vmcb["exitcode"] == (asked if quirk else ExitCode.EXCEPTION + events.GP)


@pytest.mark.parametrize("cpl", [0, 3])
def test_xsetbv_that_is_undefined_is_intercepted(twin: Twin, compiler: Compiler, cpl: int) -> None:
    name = f"intercepts/xsetbv-undefined[{cpl}]"
    last(twin, compiler, name)
    assert twin.vmcb["exitcode"] == ExitCode.EXCEPTION + events.UD
    last(twin, compiler, name, XSETBV_INTERCEPT_FIRST)
    assert twin.vmcb["exitcode"] == 0x8D


@pytest.mark.parametrize(("page", "code"), [("a", 2), ("b", 0)])
def test_a_locked_instruction_begins_as_a_write(image: Image, cpu: Cpu, page: str, code: int) -> None:
    """Of the first page, where it is not aligned; the second one is read first."""
    twin, compiler = Twin(image, cpu, Liberties()), Compiler(image, cpu)
    name = f"split/locked[{page},p]"
    last(twin, compiler, name, RMW_READS_FIRST)
    assert left(twin, "exitcode", "exitinfo1") == (PAGE_FAULT, 0)
    last(twin, compiler, name, RMW_READS_FIRST, EXCLUSIVE_PROBES_FIRST)
    assert left(twin, "exitcode", "exitinfo1") == (PAGE_FAULT, code)


@pytest.mark.parametrize(("probe", "name", "head"), [
    ("wrpkru = 0xc", "pkru", ""), ("wrmsr 0x277 = 0x0706050401000706", "pat", 'nested_page = "none"\n'),
])
def test_what_l2_wrote_to_registers_of_l1_is_undone(
    twin: Twin, compiler: Compiler, probe: str, name: str, head: str
) -> None:
    """A VMRUN that is predicted once more begins with L1's registers as they were."""
    program = compiler.compile(one('vmcb = "cr4"\nset = ["pke"]', run(f"read a; {probe}; read a"), head=head))
    twin.reset(program.world)
    for step in program.steps:
        if step.code == "RUN":
            break
        twin.apply(step)
    begun = getattr(twin.host, name)
    before = bytes(twin.memory.bytes[step.a : step.a + PAGE])
    first = twin.predict(step, 0)
    written = getattr(twin.host, name)
    assert written != begun
    twin._undo(first)
    assert getattr(twin.host, name) == begun
    again = twin.predict_again(first, before, step)
    assert getattr(twin.host, name) == written and again.exitcode == first.exitcode


@pytest.mark.parametrize(("exited", "fields"), [(True, ["l1.dr7"]), (False, [])])
def test_breakpoints_of_l1_are_disabled_by_an_exit_alone(exited: bool, fields: list[str]) -> None:
    """15.6: a VMRUN that raises an exception in L1 has none."""
    values = [{"dr7": 0x402, "all_read": 1}.get(name, 0) for name in HOST.names]
    registers = HOST.packer.pack(*values) * 2
    found = _host_differences((), registers, exited)
    assert [one[0] for one in found] == fields


@pytest.mark.parametrize(("quirk", "code"), [("", 0x60), (INTERRUPT_BEHIND_ANOTHER, ExitCode.HLT)])
def test_an_interrupt_is_due_before_the_handler_of_an_nmi(
    twin: Twin, compiler: Compiler, quirk: str, code: int
) -> None:
    (scenario,) = files.load([LIBRARY], lambda it: it == "events/nmi-and-interrupt[bit0]")
    last(twin, compiler, replace(scenario, ops=scenario.ops[:-2]), quirk)
    assert twin.vmcb["exitcode"] == code and "nmi" not in twin.outside
    assert ("interrupt" in twin.outside) == bool(quirk)


@pytest.mark.parametrize(("gate", "quirk", "cs_pushes"), [("0x8e", "", 1), ("0x8f", "", 2),
                                                          ("0x8f", INTERRUPT_BEHIND_ANOTHER, 1)])
def test_a_trap_gate_lets_a_virtual_interrupt_in(
    twin: Twin, compiler: Compiler, gate: str, quirk: str, cs_pushes: int
) -> None:
    """8.9.1: such a gate leaves IF, so that what is pending is due before the handler's first instruction."""
    name = f"events/virtual-behind-physical[{gate},0x1e00060100]"
    (scenario,) = files.load([LIBRARY], lambda it: it == name)
    last(twin, compiler, replace(scenario, ops=scenario.ops[:-1]), quirk)
    assert twin.vmcb["exitcode"] == ExitCode.HLT
    assert bool(twin.vmcb["v_intr"] & 1 << 8) == (cs_pushes == 1)


def _seen_npf(code: int, gpa: int) -> Any:
    return SimpleNamespace(exitcode=ExitCode.NPF, next_probe=1, fault_code=code, fault_address=gpa)


def test_a_fault_behind_a_shadowed_table_is_told_as_the_tables(twin: Twin, compiler: Compiler) -> None:
    name = "regressions/fault-behind-nested-table[pd,p,read a+0x5b8]"
    last(twin, compiler, name)
    code, gpa = left(twin, "exitinfo1", "exitinfo2")
    assert code == ErrorCode.FINAL | ErrorCode.U
    by_table, pde = ErrorCode.GUEST_TABLE | ErrorCode.U, 0x44E3_39C0
    for seen, told in (
        (_seen_npf(by_table, pde), (by_table, pde)),
        (_seen_npf(by_table, pde + 8), (code, gpa)),  # no entry of that walk
        (_seen_npf(by_table | ErrorCode.P, pde), (code, gpa)),  # not that fault
        (_seen_npf(code, pde), (code, gpa)),  # told as one of the page itself
    ):
        last(twin, compiler, name, EMULATED_FAULT_PLACE, seen=seen)
        assert left(twin, "exitinfo1", "exitinfo2") == told
    last(twin, compiler, name, SOFTWARE_WALK_OFFSET, seen=_seen_npf(code, gpa & ~0xFFF))
    assert left(twin, "exitinfo1", "exitinfo2") == (code, gpa & ~0xFFF)


def test_nothing_else_is_told_without_an_offset(twin: Twin, compiler: Compiler) -> None:
    scenario = one('entry = "nested.a.pte"\nclear = ["p"]', run("read a+0x5b8"))
    last(twin, compiler, scenario)
    code, gpa = left(twin, "exitinfo1", "exitinfo2")
    last(twin, compiler, scenario, SOFTWARE_WALK_OFFSET, seen=_seen_npf(code, gpa & ~0xFFF))
    assert gpa & 0xFFF == 0x5B8 and left(twin, "exitinfo1", "exitinfo2") == (code, gpa)


@pytest.mark.parametrize(("event", "more"), [(0x80000300 | events.GP, 8), (0x80000300 | events.DB, 0), (
    0x80000B00 | events.GP, 0), (0x8000031D, 0)])
def test_an_error_code_without_ev(twin: Twin, compiler: Compiler, event: int, more: int) -> None:
    """By the quirk it is pushed where the vector is of those that usually have one."""
    injects = one(f'vmcb = "eventinj"\nvalue = {event}', "run = []")
    last(twin, compiler, injects)
    rsp = twin.vmcb["rsp"]
    last(twin, compiler, injects, ERROR_CODE_WITHOUT_EV)
    assert rsp - twin.vmcb["rsp"] == more


@pytest.mark.parametrize(("guest", "plays"), [("PAE", True), ("4-level", True), ("32-bit", False)])
def test_old_pdes_have_no_accessed_bit_to_set(twin: Twin, compiler: Compiler, guest: str, plays: bool) -> None:
    """By the quirk, where KVM takes entries of 4 bytes for such of 8: those of L1's page directory in a walk that
    faults."""
    absent = one('entry = "nested.a.pte"\nclear = ["p"]', run("read a"), head=f'guest = "{guest}"\nnested = "32-bit"\n')
    out = last(twin, compiler, absent)
    assert out.paging is not None
    walk = out.walks[0]
    changed = QUIRKS[PDE_WRITES_MISSED].walk(out.paging, walk)
    pdes = {at for dimension, name, _, at, _ in walk.trail if (dimension, name) == ("nested", "pde")}
    assert {kind for at, _, kind in changed.updates if at in pdes} == ({CUT} if plays else {CUT, NESTED_TABLE})
