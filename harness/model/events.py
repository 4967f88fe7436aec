"""Exceptions and interrupts on their way through L2's own IDT, in long mode (sections 8.2, 8.9, 15.20); in the other
modes: harness.model.legacy_events.

Every memory reference of a delivery is an implicit supervisor access, translated like any other; one
that faults ends the delivery, and the event it was for is reported in EXITINTINFO (section 15.7.2).
"""

from __future__ import annotations

from typing import Final, NamedTuple, NoReturn, Protocol, Self

from harness.errors import UsageError
from harness.model.registers import CR4, RFLAGS
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Registers

INTERRUPT: Final = 0
NMI: Final = 2
EXCEPTION: Final = 3
SOFTWARE: Final = 4

DE: Final = 0
DB: Final = 1
BP: Final = 3
OF: Final = 4
UD: Final = 6
DF: Final = 8
TS: Final = 10
NP: Final = 11
SS: Final = 12
GP: Final = 13
PF: Final = 14
VC: Final = 29
WITH_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})

EVENT_VALID: Final = 1 << 31
"""V of EVENTINJ and EXITINTINFO: there is an event."""
_HAS_ERROR: Final = 1 << 11
CLEARED: Final = RFLAGS.TF | RFLAGS.RF | 1 << 14 | 1 << 17  # NT and VM
EXT: Final = 1 << 0
IDT: Final = 1 << 1
"""In an error code with a selector (8.4): a source external to the processor; a gate of the IDT."""
INTERRUPT_GATE: Final = 0xE
TRAP_GATE: Final = 0xF
_WHOLE: Final = (1 << 64) - 1


class Event(NamedTuple):
    """An event: `vector`, `kind` as EVENTINJ and EXITINTINFO code it, and its error code if it has one, of which
    the bits `free` are not defined."""

    vector: int
    kind: int = EXCEPTION
    error: int | None = None
    free: int = 0

    @classmethod
    def from_eventinj(cls, value: int) -> Self | None:
        """What a VMCB's EVENTINJ asks for; None if its V bit is clear. An NMI has vector 2 whatever
        the field says (section 15.20)."""
        if not value & EVENT_VALID:
            return None
        kind = value >> 8 & 7
        return cls(2 if kind == NMI else value & 0xFF, kind, value >> 32 if value & _HAS_ERROR else None)

    @property
    def exitintinfo(self) -> int:
        """The event as EXITINTINFO reports it."""
        value = EVENT_VALID | self.kind << 8 | self.vector
        return value if self.error is None else value | _HAS_ERROR | self.error << 32

    @property
    def software(self) -> bool:
        """Whether an instruction raises such an event: INT n, INT3 or INTO."""
        return self.kind == SOFTWARE or (self.kind == EXCEPTION and self.vector in (3, 4))

    @classmethod
    def exception(cls, vector: int, error: int = 0, free: int = 0) -> Self:
        """The exception of that vector, as the processor raises it."""
        return cls(vector, EXCEPTION, error if vector in WITH_ERROR_CODE else None, free)


_CONTRIBUTORY: Final = frozenset({0, 10, 11, 12, 13, 21})
"""#DE, #TS, #NP, #SS, #GP and #CP. #PF and #DF are classes of their own; all else is benign."""


def combine(first: Event, second: Event) -> Event | None:
    """What comes of exception `second`, raised while `first` was delivered (8.2.9, 15.7.2): that one; or a double
    fault; or None, a shutdown."""
    if (second.vector != PF and second.vector not in _CONTRIBUTORY) or first.kind != EXCEPTION:
        return second
    if first.vector == DF:
        return None
    if first.vector == PF or (first.vector in _CONTRIBUTORY and second.vector != PF):
        return Event.exception(DF)
    return second


class Habits(NamedTuple):
    """How a machine is known to deliver otherwise than the manual says; as they are, it does not."""

    null_ss: bool = False
    """A stack by IST makes SS null, also where the CPL stays."""
    error_of_slot: bool = False
    """The selector of an error code for the IDT is twice the vector."""
    no_ext: bool = False
    """EXT of an error code for the IDT is 0, whatever was delivered."""
    injected_trap: bool = False
    """The event is an exception 3 or 4 that was injected: the gate's DPL is not looked at."""


NO_HABITS: Final = Habits()


class Bus(Protocol):
    """How a delivery reaches memory, by gVA. Each raises what ends the delivery if it faults."""

    def load(self, gva: int, width: int = 8) -> int:
        """The `width` bytes at `gva`, which is a multiple of that."""

    def store(self, gva: int, value: int, free: int, cpl: int, width: int = 8) -> None:
        """Write so many bytes there, for a handler at that CPL; the bits of `free` are not defined."""

    def raises(self, event: Event) -> NoReturn:
        """The delivery itself raises `event`, of what it found in the IDT."""


def from_outside(event: Event, habits: Habits) -> tuple[int, int]:
    """EXT as an error code with a selector has it where `event` is delivered (8.4), and which bits of that are not
    defined: for a source external to the processor, which is not said of an exception before."""
    if event.kind in (INTERRUPT, NMI):
        return 0 if habits.no_ext else EXT, 0
    return 0, 0 if event.software else EXT


def code_segment(event: Event, selector: int, cpl: int, vmcb: Vmcb, bus: Bus, habits: Habits, long: bool) -> int:
    """The descriptor of the handler's code segment, which a gate's selector names (sections 8.7.1 and 8.9.1); ends the
    delivery where it is none. Raises UsageError for one in L2's LDT."""
    ext, undecided = from_outside(event, habits)
    if selector & 4:
        raise UsageError("a gate that leads through L2's LDT is not modelled")
    error = selector & 0xFFF8 | ext
    if not error & ~EXT or (selector | 7) > vmcb["gdtr.limit"]:
        bus.raises(Event.exception(GP, error, undecided))
    descriptor = bus.load(vmcb["gdtr.base"] + (selector & ~7))
    is_code = descriptor >> 43 & 3 == 3
    fits = not long or descriptor >> 53 & 3 == 1
    if not is_code or descriptor >> 45 & 3 > cpl:
        bus.raises(Event.exception(GP, error, undecided))
    if not descriptor >> 47 & 1:
        bus.raises(Event.exception(NP, error, undecided))
    if not fits:
        bus.raises(Event.exception(GP, error, undecided))
    return descriptor


def handler_cpl(descriptor: int, cpl: int) -> int:
    """The CPL of a handler in that code segment: conforming ones leave it."""
    return cpl if descriptor >> 42 & 1 else descriptor >> 45 & 3


def _stack_pointer(event: Event, at: int, vmcb: Vmcb, bus: Bus, habits: Habits) -> int:
    """RSP from that place in the TSS (8.9.3, 12.2.5); ends the delivery where there is no canonical one."""
    ext, undecided = from_outside(event, habits)
    if at + 7 > vmcb["tr.limit"]:
        bus.raises(Event.exception(TS, vmcb["tr.selector"] & 0xFFF8 | ext, undecided))
    pointer = bus.load(vmcb["tr.base"] + at)
    top = 1 << (56 if vmcb["cr4"] & CR4.LA57 else 47)
    if top <= pointer < -top & _WHOLE:
        bus.raises(Event.exception(SS, 0, EXT))  # 8.2.13 has 0; whether an outer event sets EXT is not said
    return pointer


def deliver(
    event: Event, regs: Registers, vmcb: Vmcb, bus: Bus, next_rip: int | None = None, habits: Habits = NO_HABITS,
) -> tuple[str, ...]:
    """Bring L2 to the first instruction of its handler (section 8.9.3). `next_rip` goes into the frame, as that of
    the next instruction, where it is not RIP. Returns the VMCB fields that
    the manual leaves undefined by it."""
    gate_at = vmcb["idtr.base"] + 16 * event.vector
    ext, undecided = from_outside(event, habits)
    error = event.vector << (4 if habits.error_of_slot else 3) | IDT | ext
    if 16 * event.vector + 15 > vmcb["idtr.limit"]:
        bus.raises(Event.exception(GP, error, undecided))
    low, high = bus.load(gate_at), bus.load(gate_at + 8)
    kind = low >> 40 & 0x1F
    checked = event.software and not habits.injected_trap
    if kind not in (INTERRUPT_GATE, TRAP_GATE) or (checked and low >> 45 & 3 < regs.cpl):
        bus.raises(Event.exception(GP, error, undecided))
    if not low >> 47 & 1:
        bus.raises(Event.exception(NP, error, undecided))
    selector = low >> 16 & 0xFFFF
    descriptor = code_segment(event, selector, regs.cpl, vmcb, bus, habits, long=True)
    new_cpl = handler_cpl(descriptor, regs.cpl)
    ist = low >> 32 & 7
    undefined: tuple[str, ...] = ()
    stack = regs.rsp
    if ist:
        stack = _stack_pointer(event, 0x1C + 8 * ist, vmcb, bus, habits)
    elif new_cpl < regs.cpl:
        stack = _stack_pointer(event, 4 + 8 * new_cpl, vmcb, bus, habits)
    stack &= _WHOLE & ~0xF
    # 8.9.3: SS is pushed in 64-bit mode always; RF is set in the image of a fault (3.1.6). Whether it
    # is for an event that was injected is not said.
    free = {2: RFLAGS.RF, 5: event.free} | ({4: _WHOLE} if event.vector == DF else {})  # RIP of #DF: 15.12.9
    flags = regs.rflags
    frame = [vmcb["ss.selector"], regs.rsp, flags, vmcb["cs.selector"], regs.rip if next_rip is None else next_rip]
    if event.error is not None:
        frame.append(event.error)
    for slot, value in enumerate(frame):
        bus.store(stack - 8 * (slot + 1) & _WHOLE, value, free.get(slot, 0), new_cpl)
    if new_cpl < regs.cpl or (ist and habits.null_ss):
        vmcb["ss.selector"] = new_cpl
        undefined = ("ss.attrib", "ss.limit", "ss.base")
    vmcb["cs.selector"] = selector & ~3 | new_cpl
    vmcb["cs.attrib"] = descriptor >> 40 & 0xFF | descriptor >> 44 & 0xF00
    vmcb["cs.base"] = 0
    vmcb["cs.limit"] = 0xFFFF_FFFF
    regs.cpl = new_cpl
    regs.rsp = stack - 8 * len(frame) & _WHOLE
    regs.rip = low & 0xFFFF | low >> 32 & 0xFFFF_0000 | high << 32
    regs.rflags &= ~(CLEARED | (RFLAGS.IF if kind == INTERRUPT_GATE else 0))
    return undefined
