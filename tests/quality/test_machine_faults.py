"""A machine with one fault in it, on scenarios of the library: the run must fail, and name the fault.

The machine is the model behind the real rings (tests/lockstep/fake.py), so that it can be made wrong in
ways in which no QEMU at hand is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest

from harness.lockstep.errata import Known, explain
from harness.lockstep.errata import load as load_errata
from harness.lockstep.prediction import Prediction
from harness.lockstep.twin import Twin
from harness.model.entries import A, D
from harness.model.registers import Cpu
from harness.model.vmcb import CONTROL, FIELDS, ExitCode
from harness.run import Outcome
from harness.scenario import files
from harness.scenario.program import Compiler
from harness.wire.image import PAGE, Image
from harness.wire.layout import HOST, RECORD, RECORDS, REGS
from tests.conftest import LIBRARY
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake

_AT: Final = RECORD.offsets
AfterRun = Callable[[FakeMachine, Prediction], None]
OnRecord = Callable[[bytearray], None]


class _Fault(Plant):
    def __init__(self, after_run: AfterRun | None, on_exit: OnRecord | None) -> None:
        self._after_run, self._on_exit = after_run, on_exit

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        if self._after_run:
            self._after_run(fake, out)

    def record(self, fake: FakeMachine, data: bytearray) -> None:
        if self._on_exit and data[0] == RECORDS["EXIT"]:
            self._on_exit(data)


def _get(data: bytearray, at: int) -> int:
    return int(struct.unpack_from("<Q", data, at)[0])


def _vmcb(name: str) -> int:
    offset = FIELDS[name].offset
    return _AT["control"] + offset if name in CONTROL else _AT["save"] + offset - 0x400


def field(name: str, change: Callable[[int], int], at_exit: int | None = None) -> OnRecord:
    """The VMCB field as `change` makes it; only at exits with that code."""

    def apply(data: bytearray) -> None:
        if at_exit is None or _get(data, _vmcb("exitcode")) == at_exit:
            size = FIELDS[name].width
            at = _vmcb(name)
            value = change(int.from_bytes(data[at : at + size], "little"))
            data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    return apply


def host(name: str, change: Callable[[int], int]) -> OnRecord:
    def apply(data: bytearray) -> None:
        at = _AT["after"] + HOST.offsets[name]
        data[at : at + 2] = (change(int.from_bytes(data[at : at + 2], "little")) & 0xFFFF).to_bytes(2, "little")

    return apply


def register(name: str, value: int) -> OnRecord:
    def apply(data: bytearray) -> None:
        struct.pack_into("<Q", data, _AT["regs"] + REGS.offsets[name], value)

    return apply


def bits(mask: int, where: Callable[[FakeMachine, int], bool]) -> AfterRun:
    """Bits that the machine set in entries of the arena, and that now it has not set."""

    def apply(fake: FakeMachine, out: Prediction) -> None:
        words = fake.memory.cast("Q")
        for address, old in out.old.items():
            if where(fake, address):
                words[address >> 3] &= ~mask | old

    return apply


def in_tables(fake: FakeMachine, address: int) -> bool:
    return address in fake.image.arena


def _extra(entry_bits: int) -> AfterRun:
    def apply(fake: FakeMachine, out: Prediction) -> None:
        words = fake.memory.cast("Q")
        for walk in out.walks.values():
            for step in walk.steps:
                words[step.address >> 3] |= entry_bits

    return apply


def _move_writes(fake: FakeMachine, out: Prediction) -> None:
    words = fake.memory.cast("Q")
    for address, old in out.old.items():
        if address in fake.image.data:
            words[address + 8 >> 3], words[address >> 3] = words[address >> 3], old


def _lose_writes(fake: FakeMachine, out: Prediction) -> None:
    for address, old in out.old.items():
        if address in fake.image.data:
            fake.memory.cast("Q")[address >> 3] = old


def _far_write(fake: FakeMachine, out: Prediction) -> None:
    fake.memory.cast("Q")[fake.image.data.end - PAGE >> 3] += 1


def _table_write(fake: FakeMachine, out: Prediction) -> None:
    fake.memory.cast("Q")[fake.image.arena.start + 0x7F8 >> 3] = 0xC0DE000


def _result(change: Callable[[int], int]) -> OnRecord:
    def apply(data: bytearray) -> None:
        struct.pack_into("<Q", data, _AT["results"], change(_get(data, _AT["results"])))

    return apply


@dataclass(frozen=True)
class Fault:
    scenarios: tuple[str, ...]
    check: str
    field: str
    after_run: AfterRun | None = None
    on_exit: OnRecord | None = None


NPF: Final = ExitCode.NPF
PF: Final = 0x4E
NESTED: Final = ("walk/nested-not-present", "walk/nested-read-only")
GUEST: Final = ("walk/guest-not-present", "walk/guest-read-only")
FIRST: Final = ("ad/first-access",)
READ: Final = ("first-light",)

FAULTS: Final[dict[str, Fault]] = {
    "bits 32 and 33 lost (QEMU 5.2)": Fault(
        NESTED, "C1", "exitinfo1", on_exit=field("exitinfo1", lambda v: v & 0xFFFF_FFFF, NPF)),
    "GUEST_FINAL always set (KVM before 7.2)": Fault(
        ("walk/table-not-present",), "C1", "exitinfo1",
        on_exit=field("exitinfo1", lambda v: v & ~(3 << 32) | 1 << 32, NPF)),
    "P of EXITINFO1 wrong": Fault(NESTED, "C1", "exitinfo1", on_exit=field("exitinfo1", lambda v: v ^ 1, NPF)),
    "U of EXITINFO1 lost": Fault(NESTED, "C1", "exitinfo1", on_exit=field("exitinfo1", lambda v: v & ~4, NPF)),
    "EXITINFO2 is the page (KVM's soft walk)": Fault(
        ("walk/npf-addresses",), "C1", "exitinfo2", on_exit=field("exitinfo2", lambda v: v & ~0xFFF, NPF)),
    "EXITINFO2 is the last one": Fault(
        ("walk/npf-addresses",), "C1", "exitinfo2", on_exit=field("exitinfo2", lambda v: 0x1234, NPF)),
    "#PF error code without W": Fault(GUEST, "C1", "exitinfo1", on_exit=field("exitinfo1", lambda v: v & ~2, PF)),
    "#PF address cut to 32 bits": Fault(
        GUEST, "C1", "exitinfo2", on_exit=field("exitinfo2", lambda v: v & 0xFFFF_FFFF, PF)),
    "CR2 written by an intercepted #PF": Fault(
        GUEST, "C3", "cr2", on_exit=field("cr2", lambda v: 0x2D4F_0709_1000, PF)),
    "#PF where #NPF is due": Fault(NESTED, "C1", "outcome", on_exit=field("exitcode", lambda v: PF, NPF)),
    "the wrong page read": Fault(READ, "C1", "value", on_exit=_result(lambda v: v + (0x1000 >> 3 << 8))),
    "A never set": Fault(FIRST, "C2", "entry", after_run=bits(A, in_tables)),
    "D never set": Fault(FIRST, "C2", "entry", after_run=bits(D, in_tables)),
    "D set in all entries": Fault(FIRST, "C2", "entry", after_run=_extra(D)),
    "an available bit set": Fault(FIRST, "C2", "entry", after_run=_extra(1 << 9)),
    "a table written at random": Fault(READ, "C2", "entry", after_run=_table_write),
    "a write one quadword off": Fault(READ, "C1", "memory", after_run=_move_writes),
    "a write lost": Fault(READ, "C1", "memory", after_run=_lose_writes),
    "a write far away": Fault(READ, "C1", "memory", after_run=_far_write),
    "RSP not saved": Fault(READ, "C3", "rsp", on_exit=field("rsp", lambda v: 0)),
    "RAX not saved": Fault(READ, "C3", "rax", on_exit=field("rax", lambda v: 0x5A5A_1111_2222_3333)),
    "CPL not saved": Fault(READ, "C3", "cpl", on_exit=field("cpl", lambda v: 3 - v)),
    "RFLAGS with IF": Fault(READ, "C3", "rflags", on_exit=field("rflags", lambda v: v | 0x200)),
    "nCR3 written back": Fault(READ, "C3", "ncr3", on_exit=field("ncr3", lambda v: v | 0x18)),
    "TLB_CONTROL written back": Fault(READ, "C3", "tlb_control", on_exit=field("tlb_control", lambda v: 0)),
    "EVENTINJ left valid (KVM before 7.1)": Fault(
        READ, "C3", "eventinj", on_exit=field("eventinj", lambda v: v | 1 << 31)),
    "FS base clobbered": Fault(READ, "C3", "fs.base", on_exit=field("fs.base", lambda v: 0)),
    "GDTR limit of the host saved": Fault(READ, "C3", "gdtr.limit", on_exit=field("gdtr.limit", lambda v: 0x1F)),
    "CR4 of L1 not restored": Fault(READ, "C3", "l1.cr4", on_exit=host("cr4", lambda v: v & ~0x20 | 0x80)),
    "RFLAGS of L1 not restored": Fault(READ, "C3", "l1.rflags", on_exit=host("rflags", lambda v: 2)),
    "ES of L1 not restored": Fault(READ, "C3", "l1.es", on_exit=host("es", lambda v: 0x38)),
    "breakpoints of L1 on (QEMU 7.2)": Fault(READ, "C3", "l1.dr7", on_exit=host("dr7", lambda v: v | 1)),
    "R14 clobbered": Fault(READ, "C3", "l2.r14", on_exit=register("r14", 0)),
    "VMRUN refused": Fault(READ, "C3", "outcome", on_exit=field("exitcode", lambda v: ExitCode.INVALID)),
    "VMRUN refused, with half the code": Fault(READ, "C3", "outcome", on_exit=field("exitcode", lambda v: 0xFFFF_FFFF)),
    "a VMCB byte of no field written": Fault(
        READ, "C3", "reserved", on_exit=lambda data: data.__setitem__(_AT["control"] + 0x30, 1)),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_machine_is_found(
    name: str, strict: bool, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin
) -> None:
    fault = FAULTS[name]
    scenarios = [s for each in fault.scenarios for s in files.read(LIBRARY / f"{each}.toml")]
    programs = [compiler.compile(s) for s in scenarios]
    good = run_on_fake(image, cpu, twin, programs, strict=strict)
    assert [d for r in good for d in r.divergences] == []
    results = run_on_fake(image, cpu, twin, programs, _Fault(fault.after_run, fault.on_exit), strict)
    found = [d for r in results for d in r.divergences]
    assert any(d.check == fault.check and d.field.startswith(fault.field) for d in found), (
        sorted({(d.check, d.field) for d in found}))
    assert Outcome(results=results).exit_code() == 1


def test_errata_do_not_hide_them() -> None:
    """No erratum of the library explains a fault that its machine does not have: all of them together
    leave most of these new (which, see `explain` and its tests)."""
    errata = [e for e in load_errata(LIBRARY / "errata") if e.holds_for("qemu-tcg", (7, 2, 22))]
    assert all(e.rules != ("*",) or e.differs or e.expected or e.observed for e in errata)
    assert explain([], Known(errata)) == []


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 25
