"""Events through L2's own IDT (8.9.3, 15.20) and as EXITINTINFO reports them (15.7.2)."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from harness.model.events import EVENT_VALID, EXCEPTION, INTERRUPT, NMI, SOFTWARE, Event, Habits, combine, deliver
from harness.model.memory import Memory
from harness.model.registers import CR0, EFER, RFLAGS
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Host, Registers, load

IDT, GDT, TSS, HANDLER = 0x10_0000, 0x11_0000, 0x12_0004, 0xFFFF_8000_1234_5678
STACK = 0x13_0018


class Faulted(Exception):
    def __init__(self, event: Event) -> None:
        super().__init__(event)
        self.event = event


class Bus:
    """Memory as a dictionary; what is loaded and stored is kept in order."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.loads: list[int] = []
        self.stores: list[tuple[int, int, int]] = []
        self.pushed_at: set[int] = set()
        """The CPLs of the stores."""

    def load(self, gva: int, width: int = 8) -> int:
        self.loads.append(gva)
        return self.words.get(gva, 0)

    def store(self, gva: int, value: int, free: int, cpl: int, width: int = 8) -> None:
        self.stores.append((gva, value, free))
        self.pushed_at.add(cpl)

    def raises(self, event: Event) -> NoReturn:
        raise Faulted(event)


def gate(kind: int = 0xE, ist: int = 0, selector: int = 0x28, present: bool = True) -> tuple[int, int]:
    low = HANDLER & 0xFFFF | selector << 16 | ist << 32 | kind << 40 | present << 47 | (HANDLER >> 16 & 0xFFFF) << 48
    return low, HANDLER >> 32


def world(vector: int, cpl: int = 0, code_dpl: int = 0, **parts: Any) -> tuple[Registers, Vmcb, Bus]:
    vmcb = Vmcb(Memory(0x2000), 0)
    values = {"idtr.base": IDT, "idtr.limit": 0x1FF, "gdtr.base": GDT, "gdtr.limit": 0x7F,
              "tr.base": TSS, "tr.limit": 0x67, "tr.selector": 0x68, "cs.selector": 0x10 | cpl,
              "ss.selector": 0x18 | cpl, "rsp": STACK, "rip": 0x4000_1000, "cpl": cpl,
              "efer": EFER.LME | EFER.SVME, "cr0": CR0.PE | CR0.PG,
              "rflags": 0x2 | RFLAGS.IF | RFLAGS.TF | RFLAGS.AC | RFLAGS.CF}
    for name, value in values.items():
        vmcb[name] = value
    bus = Bus()
    bus.words[IDT + 16 * vector], bus.words[IDT + 16 * vector + 8] = gate(**parts)
    bus.words[GDT + 0x28] = 0x00AF_9B00_0000_FFFF | code_dpl << 45
    bus.words[TSS + 4], bus.words[TSS + 4 + 8 * 2] = 0x20_0FF8, 0x20_2FF8
    bus.words[TSS + 0x24 + 8 * 2] = 0x30_0FF0
    return load(vmcb, Host(CR0.PE | CR0.PG, 0, EFER.SVME, 0, 0)), vmcb, bus


@pytest.mark.parametrize(
    ("value", "event"),
    [
        (0, None),
        (3 << 8 | 14, None),  # V=0
        (1 << 31 | 3 << 8 | 13 | 1 << 11 | 0x1234 << 32, Event(13, EXCEPTION, 0x1234)),
        (1 << 31 | 3 << 8 | 6, Event(6, EXCEPTION, None)),
        (1 << 31 | 3 << 8 | 6 | 0x77 << 32, Event(6, EXCEPTION, None)),  # EV=0: no error code
        (1 << 31 | 0x51, Event(0x51, INTERRUPT, None)),
        (1 << 31 | 2 << 8 | 0x51, Event(2, NMI, None)),  # VECTOR is ignored
        (1 << 31 | 4 << 8 | 0x80, Event(0x80, SOFTWARE, None)),
    ],
)
def test_eventinj(value: int, event: Event | None) -> None:
    assert Event.from_eventinj(value) == event


def test_exitintinfo() -> None:
    """15.7.2: in the format of EVENTINJ."""
    some = (Event(13, EXCEPTION, 0x1234), Event(6), Event(0x51, INTERRUPT), Event(2, NMI), Event(14, EXCEPTION, 0))
    for event in some:
        assert event.exitintinfo & EVENT_VALID
        assert Event.from_eventinj(event.exitintinfo) == event


@pytest.mark.parametrize(("vector", "pushed"), [(0, False), (6, False), (8, True), (10, True), (11, True), (12, True),
                                                (13, True), (14, True), (16, False), (17, True), (21, True)])
def test_which_exceptions_push_an_error_code(vector: int, pushed: bool) -> None:
    assert (Event.exception(vector, 5).error is not None) == pushed


def test_same_privilege() -> None:
    """8.9.3: SS, RSP, RFLAGS, CS, RIP and the error code, on a stack aligned to 16."""
    regs, vmcb, bus = world(14)
    assert deliver(Event.exception(14, 7), regs, vmcb, bus) == ()
    top = STACK & ~0xF
    flags = 0x2 | RFLAGS.IF | RFLAGS.TF | RFLAGS.AC | RFLAGS.CF
    assert [(at, value) for at, value, _ in bus.stores] == [
        (top - 8, 0x18), (top - 16, STACK), (top - 24, flags), (top - 32, 0x10), (top - 40, 0x4000_1000), (top - 48, 7)]
    assert [free for _, _, free in bus.stores] == [0, 0, RFLAGS.RF, 0, 0, 0]
    assert (regs.rip, regs.rsp, regs.cpl) == (HANDLER, top - 48, 0)
    assert bus.loads == [IDT + 14 * 16, IDT + 14 * 16 + 8, GDT + 0x28]
    assert vmcb["cs.selector"] == 0x28 and vmcb["ss.selector"] == 0x18


def test_without_an_error_code() -> None:
    regs, vmcb, bus = world(6)
    deliver(Event.exception(6), regs, vmcb, bus)
    assert len(bus.stores) == 5 and regs.rsp == (STACK & ~0xF) - 40


@pytest.mark.parametrize(("kind", "kept"), [(0xE, 0), (0xF, RFLAGS.IF)])
def test_flags(kind: int, kept: int) -> None:
    """8.9: an interrupt gate clears IF, a trap gate does not; TF, NT, VM and RF are cleared."""
    regs, vmcb, bus = world(6, kind=kind)
    deliver(Event.exception(6), regs, vmcb, bus)
    assert regs.rflags == 0x2 | RFLAGS.AC | RFLAGS.CF | kept


def test_to_more_privilege() -> None:
    """8.9.3: RSP from the TSS, a null SS with the new CPL as RPL."""
    regs, vmcb, bus = world(14, cpl=3)
    undefined = deliver(Event.exception(14, 6), regs, vmcb, bus)
    assert bus.loads[-1] == TSS + 4
    assert bus.stores[0][:2] == ((0x20_0FF8 & ~0xF) - 8, 0x1B) and bus.stores[1][1] == STACK
    assert bus.pushed_at == {0}, "5.6.1: the stack is written at the handler's CPL"
    assert regs.cpl == 0 and vmcb["ss.selector"] == 0 and vmcb["cs.selector"] == 0x28
    assert set(undefined) <= {"ss.attrib", "ss.limit", "ss.base"} and undefined


def test_interrupt_stack() -> None:
    """2.6.3 and 8.9: an IST entry, whatever the privilege; SS stays if the CPL does."""
    regs, vmcb, bus = world(2, ist=3)
    deliver(Event(2, NMI), regs, vmcb, bus)
    assert bus.loads[-1] == TSS + 0x1C + 8 * 3 and bus.stores[0][0] == 0x30_0FF0 - 8
    assert vmcb["ss.selector"] == 0x18


def test_an_error_code_with_bits_that_are_not_defined() -> None:
    regs, vmcb, bus = world(13)
    deliver(Event.exception(13, 6 << 3 | 2, 1), regs, vmcb, bus)
    assert bus.stores[5][1:] == (6 << 3 | 2, 1)


@pytest.mark.parametrize(
    ("habits", "event", "raised"),
    [
        (Habits(error_of_slot=True), Event(32, INTERRUPT), Event.exception(13, 32 << 4 | 3)),
        (Habits(no_ext=True), Event(32, INTERRUPT), Event.exception(13, 32 << 3 | 2)),
        (Habits(error_of_slot=True, no_ext=True), Event(32, INTERRUPT), Event.exception(13, 32 << 4 | 2)),
        (Habits(error_of_slot=True), Event(32, SOFTWARE), Event.exception(13, 32 << 4 | 2)),
    ],
)
def test_habits_with_error_codes(habits: Habits, event: Event, raised: Event) -> None:
    regs, vmcb, bus = world(event.vector)
    with pytest.raises(Faulted) as fault:
        deliver(event, regs, vmcb, bus, habits=habits)
    assert fault.value.event == raised


@pytest.mark.parametrize(
    ("event", "parts", "raised"),
    [
        (Event(32, INTERRUPT), {}, Event.exception(13, 32 << 3 | 3)),  # beyond the IDT's limit
        (Event(2, NMI), {"present": False}, Event.exception(11, 2 << 3 | 3)),
        (Event(6), {"kind": 0xC}, Event.exception(13, 6 << 3 | 2, 1)),  # EXT behind an exception: either
        (Event(6), {"present": False}, Event.exception(11, 6 << 3 | 2, 1)),
        (Event(6), {"kind": 0xC, "present": False}, Event.exception(13, 6 << 3 | 2, 1)),
        (Event(32, SOFTWARE), {}, Event.exception(13, 32 << 3 | 2)),  # EXT is 0 for what an instruction raises
        (Event(28, SOFTWARE), {"cpl": 3}, Event.exception(13, 28 << 3 | 2)),  # the gate's DPL is 0
        (Event(3), {"cpl": 3}, Event.exception(13, 3 << 3 | 2)),
    ],
)
def test_a_delivery_that_faults_itself(event: Event, parts: dict[str, Any], raised: Event) -> None:
    regs, vmcb, bus = world(event.vector, **parts)
    before = regs.rip, regs.rsp, regs.cpl
    with pytest.raises(Faulted) as fault:
        deliver(event, regs, vmcb, bus)
    assert fault.value.event == raised and not bus.stores and before == (regs.rip, regs.rsp, regs.cpl)


@pytest.mark.parametrize(("selector", "descriptor", "cpl", "raised"), [
    (0, 0, 0, (13, 0)), (3, 0, 0, (13, 0)), (0x80, 0, 0, (13, 0x80)),  # null; beyond the limit
    (0x70, 0x00AF_9300_0000_FFFF, 0, (13, 0x70)), (0x73, 0x00AF_8B00_0000_FFFF, 0, (13, 0x70)),  # data; no segment
    (0x70, 0x00AF_FB00_0000_FFFF, 0, (13, 0x70)), (0x70, 0x00AF_FF00_0000_FFFF, 0, (13, 0x70)),  # of a higher DPL
    (0x70, 0x00AF_1B00_0000_FFFF, 0, (11, 0x70)),
    (0x70, 0x00CF_9B00_0000_FFFF, 0, (13, 0x70)), (0x70, 0x00EF_9B00_0000_FFFF, 0, (13, 0x70)),  # not of 64 bits
])
def test_the_handlers_segment(selector: int, descriptor: int, cpl: int, raised: tuple[int, int]) -> None:
    """8.9.1, 8.4: what a gate's selector must lead to."""
    regs, vmcb, bus = world(2, cpl=cpl, selector=selector)
    bus.words[GDT + 0x70] = descriptor
    with pytest.raises(Faulted) as fault:
        deliver(Event(2, NMI), regs, vmcb, bus)
    assert fault.value.event == Event.exception(raised[0], raised[1] | 1) and not bus.stores


def test_a_conforming_segment_leaves_the_cpl() -> None:
    regs, vmcb, bus = world(2, cpl=3)
    bus.words[GDT + 0x28] = 0x00AF_9F00_0000_FFFF
    deliver(Event(2, NMI), regs, vmcb, bus)
    assert (regs.cpl, vmcb["cs.selector"], bus.stores[0][0]) == (3, 0x2B, (STACK & ~0xF) - 8)
    assert bus.pushed_at == {3}


@pytest.mark.parametrize(("parts", "limit", "faults"), [
    ({"cpl": 3}, 0xB, False), ({"cpl": 3}, 0xA, True), ({}, 0, False),
    ({"ist": 3}, 0x3B, False), ({"ist": 3}, 0x3A, True),
])
def test_a_short_tss(parts: dict[str, Any], limit: int, faults: bool) -> None:
    """12.2.5: RSP0 is at 4, the IST's stacks from 24h on; #TS has TR's selector."""
    regs, vmcb, bus = world(2, **parts)
    vmcb["tr.limit"] = limit
    if not faults:
        deliver(Event(2, NMI), regs, vmcb, bus)
        return
    with pytest.raises(Faulted) as fault:
        deliver(Event(2, NMI), regs, vmcb, bus)
    assert fault.value.event == Event.exception(10, 0x69)


@pytest.mark.parametrize("event", [Event(14, EXCEPTION, 4), Event(0x20, INTERRUPT), Event(2, NMI), Event(6)])
def test_hardware_needs_no_dpl(event: Event) -> None:
    regs, vmcb, bus = world(event.vector if event.vector < 32 else 6, cpl=3)
    vmcb["idtr.limit"] = 0xFFF
    bus.words[IDT + 16 * event.vector], bus.words[IDT + 16 * event.vector + 8] = gate()
    deliver(event, regs, vmcb, bus)
    assert regs.rip == HANDLER


BENIGN, CONTRIBUTORY = (1, 2, 3, 5, 6, 7, 16, 17, 18, 19), (0, 10, 11, 12, 13, 21)


def test_double_faults() -> None:
    """8.2.9, all of its table: the first exception's class, the second's, and what comes of them."""
    def result(first: int, second: int, kind: int = EXCEPTION) -> int | None:
        event = combine(Event(first, kind), Event.exception(second))
        return None if event is None else event.vector

    for first in (*BENIGN, *CONTRIBUTORY, 14, 8):
        for second in (*BENIGN, *CONTRIBUTORY, 14):
            both = (first in CONTRIBUTORY and second in CONTRIBUTORY) or (first == 14 and second in (*CONTRIBUTORY, 14))
            expected: int | None = 8 if both else second
            if first == 8 and second not in BENIGN:
                expected = None
            assert result(first, second) == expected, (first, second)
    for kind in (INTERRUPT, SOFTWARE, NMI):
        assert result(13, 13, kind) == 13 and result(14, 14, kind) == 14  # interrupts are benign, whatever their vector
    assert combine(Event(14, EXCEPTION, 2), Event.exception(14, 2)) == Event(8, EXCEPTION, 0)


def test_the_next_rip_goes_into_the_frame() -> None:
    regs, vmcb, bus = world(28)
    deliver(Event(28, SOFTWARE), regs, vmcb, bus, 0x4000_1002)
    assert 0x4000_1002 in [value for _, value, _ in bus.stores]
