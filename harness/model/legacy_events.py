"""Exceptions and interrupts on their way through L2's own IDT outside of long mode: in protected mode, with paging or
without (sections 4.8 and 8.7), and in real mode (8.6). For long mode: harness.model.events.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from harness.errors import UsageError
from harness.model import events
from harness.model.events import CLEARED, NO_HABITS, Bus, Event, Habits
from harness.model.registers import RFLAGS
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Registers

_TASK_GATE: Final = 5
_GATES: Final = frozenset({_TASK_GATE, 6, 7, events.INTERRUPT_GATE, events.TRAP_GATE})
"""S and type of what legacy mode's IDT may hold: a task gate, interrupt and trap gates of either size (4.8.3)."""
_TSS_32: Final = frozenset({9, 0xB})
_CLEARED_REAL: Final = RFLAGS.TF | RFLAGS.RF | RFLAGS.IF | RFLAGS.AC
_WHOLE: Final = 0xFFFF_FFFF


class _Segment(NamedTuple):
    """A segment as its register holds it; `attrib` and `limit` as in the VMCB."""

    selector: int
    base: int
    limit: int
    attrib: int

    @classmethod
    def of(cls, selector: int, descriptor: int) -> _Segment:
        """As loaded from a descriptor (section 4.8.1)."""
        limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000
        if descriptor >> 55 & 1:
            limit = limit << 12 | 0xFFF
        base = descriptor >> 16 & 0xFF_FFFF | descriptor >> 32 & 0xFF00_0000
        return cls(selector, base, limit, descriptor >> 40 & 0xFF | descriptor >> 44 & 0xF00)

    def put(self, name: str, vmcb: Vmcb) -> None:
        for part, value in self._asdict().items():
            vmcb[f"{name}.{part}"] = value


class _Stack(NamedTuple):
    """Where a frame goes: a stack segment, and the stack pointer in it."""

    segment: _Segment
    pointer: int

    @property
    def mask(self) -> int:
        """The bits of the stack pointer that count, by the segment's B."""
        return _WHOLE if self.segment.attrib >> 10 & 1 else 0xFFFF

    def moved(self, by: int) -> int:
        """The stack pointer, `by` bytes further down; of a 16-bit stack the upper half stays."""
        return self.pointer & ~self.mask & _WHOLE | self.pointer - by & self.mask

    def push(self, bus: Bus, width: int, frame: list[tuple[int, int]], cpl: int) -> int:
        """Push values of `width` bytes for a handler at that CPL, each with the bits of it that are not defined;
        returns the stack pointer."""
        if self.segment.limit != _WHOLE and self.mask == _WHOLE:
            raise UsageError("a stack segment that ends is not modelled where an event is delivered")
        part = (1 << 8 * width) - 1
        for number, (value, free) in enumerate(frame, 1):
            at = self.segment.base + (self.moved(width * number) & self.mask) & _WHOLE
            bus.store(at, value & part, free & part, cpl, width)
        return self.moved(width * len(frame))


def protected(
    event: Event, regs: Registers, vmcb: Vmcb, bus: Bus, next_rip: int | None = None, habits: Habits = NO_HABITS,
) -> None:
    """As `events.deliver`, in legacy protected mode (section 8.7). Raises UsageError for what is not modelled: a task
    gate, a 16-bit TSS, a stack segment in an LDT, one that is not present or ends."""
    ext, undecided = events.from_outside(event, habits)
    error = event.vector << 3 | events.IDT | ext
    if 8 * event.vector + 7 > vmcb["idtr.limit"]:
        bus.raises(Event.exception(events.GP, error, undecided))
    gate = bus.load(vmcb["idtr.base"] + 8 * event.vector & _WHOLE)
    kind = gate >> 40 & 0x1F
    checked = event.software and not habits.injected_trap
    if kind not in _GATES or (checked and gate >> 45 & 3 < regs.cpl):
        bus.raises(Event.exception(events.GP, error, undecided))
    if not gate >> 47 & 1:
        bus.raises(Event.exception(events.NP, error, undecided))
    if kind == _TASK_GATE:
        raise UsageError("a task gate is not modelled")
    selector, offset = gate >> 16 & 0xFFFF, gate & 0xFFFF | gate >> 32 & 0xFFFF_0000
    if not kind & 8 and offset >> 16:
        raise UsageError("a gate of 16 bits whose upper word is not 0 is not modelled")
    descriptor = events.code_segment(event, selector, regs.cpl, vmcb, bus, habits, long=False)
    new_cpl = events.handler_cpl(descriptor, regs.cpl)
    inner = new_cpl < regs.cpl
    stack = _inner(event, new_cpl, vmcb, bus, habits) if inner else _own(regs, vmcb)
    rip = regs.rip if next_rip is None else next_rip
    frame = [(vmcb["ss.selector"], 0), (regs.rsp, 0)] if inner else []
    # RF is set in the image of a fault (3.1.6), whether of an injected event is not said; RIP of #DF: 15.12.9
    frame += [(regs.rflags, RFLAGS.RF), (vmcb["cs.selector"], 0), (rip, _WHOLE if event.vector == events.DF else 0)]
    if event.error is not None:
        frame.append((event.error, event.free))
    regs.rsp = stack.push(bus, 4 if kind & 8 else 2, frame, new_cpl)
    if inner:
        stack.segment.put("ss", vmcb)
    _Segment.of(selector & ~3 | new_cpl, descriptor).put("cs", vmcb)
    regs.cpl, regs.rip = new_cpl, offset
    regs.rflags &= ~(CLEARED | (0 if kind & 1 else RFLAGS.IF))


def real(event: Event, regs: Registers, vmcb: Vmcb, bus: Bus, next_rip: int | None = None) -> None:
    """As `events.deliver`, in real mode (section 8.6): the IDT has a far pointer for each vector, and no error code is
    pushed. Raises UsageError for a stack of 32 bits, which real mode has none of."""
    at = 4 * event.vector
    if at + 3 > vmcb["idtr.limit"]:
        bus.raises(Event(events.GP, free=_WHOLE))
    pointer = bus.load(vmcb["idtr.base"] + at & _WHOLE, 4)
    stack = _own(regs, vmcb)
    if stack.mask == _WHOLE:
        raise UsageError("an event that is delivered in real mode on a stack of 32 bits is not modelled")
    rip = regs.rip if next_rip is None else next_rip
    regs.rsp = stack.push(bus, 2, [(regs.rflags, 0), (vmcb["cs.selector"], 0), (rip, 0)], cpl=0)
    vmcb["cs.selector"], vmcb["cs.base"] = pointer >> 16, pointer >> 16 << 4
    regs.rip = pointer & 0xFFFF
    regs.rflags &= ~_CLEARED_REAL


def _own(regs: Registers, vmcb: Vmcb) -> _Stack:
    """L2's stack as it is."""
    return _Stack(_Segment(*(vmcb[f"ss.{part}"] for part in _Segment._fields)), regs.rsp)


def _inner(event: Event, cpl: int, vmcb: Vmcb, bus: Bus, habits: Habits) -> _Stack:
    """The stack for a more privileged handler, which the TSS names (sections 8.7.3 and 12.2.3); ends the delivery where
    there is none."""
    ext, undecided = events.from_outside(event, habits)
    if vmcb["tr.attrib"] & 0x1F not in _TSS_32:
        raise UsageError("a TSS of 16 bits is not modelled where an event is delivered")
    at = 4 + 8 * cpl
    if at + 7 > vmcb["tr.limit"]:
        bus.raises(Event.exception(events.TS, vmcb["tr.selector"] & 0xFFF8 | ext, undecided))
    pointer = bus.load(vmcb["tr.base"] + at & _WHOLE)
    selector = pointer >> 32 & 0xFFFF
    bad = Event.exception(events.TS, selector & 0xFFF8 | ext, undecided)
    if selector & 4:
        raise UsageError("a stack segment in L2's LDT is not modelled")
    if not selector & ~3 or selector & 3 != cpl or (selector | 7) > vmcb["gdtr.limit"]:
        bus.raises(bad)
    descriptor = bus.load(vmcb["gdtr.base"] + (selector & ~7) & _WHOLE)
    writable = descriptor >> 41 & 0xD == 0b1001  # S, no code, W
    if not writable or descriptor >> 45 & 3 != cpl:
        bus.raises(bad)
    if not descriptor >> 47 & 1:
        raise UsageError("a stack segment that is not present is not modelled where an event is delivered")
    return _Stack(_Segment.of(selector, descriptor), pointer & _WHOLE)
