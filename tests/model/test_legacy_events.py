"""Events through L2's own IDT outside of long mode (sections 8.6 and 8.7)."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from harness.errors import UsageError
from harness.model.events import EXCEPTION, INTERRUPT, NMI, SOFTWARE, Event
from harness.model.legacy_events import protected, real
from harness.model.memory import Memory
from harness.model.registers import CR0, RFLAGS
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Host, Registers, load

IDT, GDT, TSS, HANDLER, STACK = 0x10_0000, 0x11_0000, 0x12_0004, 0x1234_5678, 0x13_0FE8
FLAGS = 0x2 | RFLAGS.IF | RFLAGS.TF | RFLAGS.AC | RFLAGS.CF | 1 << 14
CODE, FLAT = 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF


class Faulted(Exception):
    def __init__(self, event: Event) -> None:
        super().__init__(event)
        self.event = event


class Bus:
    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.stores: list[tuple[int, int, int]] = []
        self.free: list[int] = []
        self.pushed_at: set[int] = set()
        """The CPLs of the stores."""

    def load(self, gva: int, width: int = 8) -> int:
        return self.words[gva]

    def store(self, gva: int, value: int, free: int, cpl: int, width: int = 8) -> None:
        self.stores.append((gva, value, width))
        self.pushed_at.add(cpl)
        self.free.append(free)

    def raises(self, event: Event) -> NoReturn:
        raise Faulted(event)


def world(vector: int, cpl: int = 0, byte5: int = 0x8E, selector: int = 0x28, **fields: int) -> Any:
    vmcb = Vmcb(Memory(0x2000), 0)
    values = {"idtr.base": IDT, "idtr.limit": 0xFF, "gdtr.base": GDT, "gdtr.limit": 0x7F, "tr.base": TSS,
              "tr.limit": 0x67, "tr.selector": 0x68, "tr.attrib": 0x89, "cs.selector": 0x10 | cpl,
              "ss.selector": 0x18 | cpl, "ss.attrib": 0xC93, "ss.limit": 0xFFFF_FFFF, "rsp": STACK, "rip": 0x4000_1000,
              "cpl": cpl, "cr0": CR0.PE | CR0.PG, "rflags": FLAGS}
    for name, value in (values | fields).items():
        vmcb[name] = value
    bus = Bus()
    offset = HANDLER if byte5 & 8 else HANDLER & 0xFFFF
    bus.words[IDT + 8 * vector] = offset & 0xFFFF | selector << 16 | byte5 << 40 | (offset >> 16) << 48
    bus.words |= {GDT + 0x28: CODE, GDT + 0x38: FLAT, TSS + 4: 0x20_0FF8 | 0x38 << 32}
    return load(vmcb, Host(CR0.PE | CR0.PG, 0, 0, 0, 0)), vmcb, bus


def raised(event: Event, regs: Registers, vmcb: Vmcb, bus: Bus) -> Event:
    with pytest.raises(Faulted) as fault:
        protected(event, regs, vmcb, bus)
    assert not bus.stores and regs.rip == 0x4000_1000
    return fault.value.event


def test_same_privilege() -> None:
    """EFLAGS, CS, EIP and the error code, 4 bytes each, on the stack as it is."""
    regs, vmcb, bus = world(13)
    protected(Event(13, EXCEPTION, 7), regs, vmcb, bus)
    assert bus.stores == [(STACK - 4, FLAGS, 4), (STACK - 8, 0x10, 4), (STACK - 12, 0x4000_1000, 4), (STACK - 16, 7, 4)]
    assert bus.free == [RFLAGS.RF, 0, 0, 0]
    assert (regs.rip, regs.rsp, regs.cpl) == (HANDLER, STACK - 16, 0)
    assert regs.rflags == 0x2 | RFLAGS.AC | RFLAGS.CF
    assert [vmcb[f"cs.{part}"] for part in ("selector", "base", "limit", "attrib")] == [0x28, 0, 0xFFFF_FFFF, 0xC9B]
    assert vmcb["ss.selector"] == 0x18


def test_to_more_privilege() -> None:
    """8.7.3: SS and ESP from the TSS, and the old ones first in the frame."""
    regs, vmcb, bus = world(6, cpl=3)
    bus.words[GDT + 0x38] = 0x12CF_9334_0000_FFFF
    protected(Event(6), regs, vmcb, bus)
    top = 0x1234_0000 + 0x20_0FF8
    assert [one[:2] for one in bus.stores] == [(top - 4, 0x1B), (top - 8, STACK), (top - 12, FLAGS), (top - 16, 0x13),
                                               (top - 20, 0x4000_1000)]
    assert bus.pushed_at == {0}
    assert (regs.cpl, regs.rsp, vmcb["ss.selector"], vmcb["ss.base"]) == (0, 0x20_0FF8 - 20, 0x38, 0x1234_0000)
    assert (vmcb["ss.attrib"], vmcb["ss.limit"]) == (0xC93, 0xFFFF_FFFF)


@pytest.mark.parametrize(("byte5", "kept"), [(0x8E, 0), (0x8F, RFLAGS.IF), (0x86, 0), (0x87, RFLAGS.IF)])
def test_kinds_of_gates(byte5: int, kept: int) -> None:
    """4.8.4: a trap gate leaves IF; one of 16 bits pushes 2 bytes each, and has an offset of 16 bits."""
    regs, vmcb, bus = world(6, byte5=byte5)
    protected(Event(6), regs, vmcb, bus)
    width = 4 if byte5 & 8 else 2
    assert bus.stores[0] == (STACK - width, FLAGS & (1 << 8 * width) - 1, width)
    assert regs.rflags & RFLAGS.IF == kept and regs.rsp == STACK - 3 * width
    assert regs.rip == (HANDLER if byte5 & 8 else HANDLER & 0xFFFF)


def test_a_stack_of_16_bits() -> None:
    """4.8.1: without B the stack pointer is SP, and wraps."""
    regs, vmcb, bus = world(6, rsp=0x5678_0004)
    vmcb["ss.attrib"], vmcb["ss.base"] = 0x893, 0x7000_0000
    protected(Event(6), regs, vmcb, bus)
    assert [one[0] for one in bus.stores] == [0x7000_0000, 0x7000_FFFC, 0x7000_FFF8] and regs.rsp == 0x5678_FFF8


@pytest.mark.parametrize(("event", "parts", "vector", "error"), [
    (Event(32, INTERRUPT), {}, 13, 32 << 3 | 3),  # beyond the limit
    (Event(2, NMI), {"byte5": 0x0E}, 11, 2 << 3 | 3),
    (Event(2, NMI), {"byte5": 0x8C}, 13, 2 << 3 | 3),
    (Event(2, NMI), {"byte5": 0x9E}, 13, 2 << 3 | 3),  # S=1
    (Event(3, SOFTWARE), {"cpl": 3, "byte5": 0xCE}, 13, 3 << 3 | 2),
    (Event(2, NMI), {"selector": 0}, 13, 1), (Event(2, NMI), {"selector": 0x80}, 13, 0x81),
    (Event(2, NMI), {"selector": 0x38}, 13, 0x39),
    (Event(2, NMI), {"cpl": 3, "tr.limit": 0xA}, 10, 0x69),
])
def test_a_delivery_that_faults_itself(event: Event, parts: dict[str, int], vector: int, error: int) -> None:
    assert raised(event, *world(event.vector, **parts)) == Event.exception(vector, error)


@pytest.mark.parametrize(("selector", "descriptor"), [
    (0, FLAT), (3, FLAT), (0x39, FLAT), (0x80, FLAT), (0x38, CODE), (0x38, FLAT & ~(1 << 41)), (0x38, FLAT | 3 << 45),
    (0x38, FLAT & ~(1 << 44)),
])
def test_no_stack_for_cpl_0(selector: int, descriptor: int) -> None:
    """8.2.11: #TS with the selector for what is no writable data of DPL 0, or a selector of another RPL."""
    regs, vmcb, bus = world(2, cpl=3)
    bus.words |= {TSS + 4: 0x20_0FF8 | selector << 32, GDT + 0x38: descriptor}
    assert raised(Event(2, NMI), regs, vmcb, bus) == Event.exception(10, selector & ~7 | 1)


def test_what_is_not_modelled() -> None:
    for parts in ({"byte5": 0x85}, {"ss.limit": 0xFFF}, {"cpl": 3, "tr.attrib": 0x81}, {"selector": 0x2C}):
        with pytest.raises(UsageError):
            protected(Event(2, NMI), *world(2, **parts))


def in_real_mode(event: Event, **fields: int) -> Any:
    regs, vmcb, bus = world(event.vector, **{"ss.attrib": 0x93, "ss.base": 0x7000_0000, "cr0": 0, "idtr.limit": 0x3FF}
                            | fields)
    bus.words[IDT + 4 * event.vector] = 0xF000_1234
    return regs, vmcb, bus


def test_real_mode() -> None:
    """8.6: FLAGS, CS and IP; no error code; IF, TF, RF and AC cleared."""
    regs, vmcb, bus = in_real_mode(Event(13, EXCEPTION, 7), rsp=0x5678_0002)
    real(Event(13, EXCEPTION, 7), regs, vmcb, bus)
    assert bus.stores == [(0x7000_0000, FLAGS & 0xFFFF, 2), (0x7000_FFFE, 0x10, 2), (0x7000_FFFC, 0x1000, 2)]
    assert (regs.rip, regs.rsp, vmcb["cs.selector"], vmcb["cs.base"]) == (0x1234, 0x5678_FFFC, 0xF000, 0xF_0000)
    assert regs.rflags == 0x2 | RFLAGS.CF | 1 << 14


def test_beyond_the_real_mode_table() -> None:
    event = Event(0x10, INTERRUPT)
    real(event, *in_real_mode(event, **{"idtr.limit": 0x43}))
    with pytest.raises(Faulted) as fault:
        real(event, *in_real_mode(event, **{"idtr.limit": 0x42}))
    assert fault.value.event.vector == 13 and fault.value.event.error is None
    with pytest.raises(UsageError, match="32 bits"):
        real(event, *in_real_mode(event, **{"ss.attrib": 0xC93}))
