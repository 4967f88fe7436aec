"""Exceptions and interrupts on their way through L2's own IDT, in long mode (sections 8.2, 8.9, 15.20).

Every memory reference of a delivery is an implicit supervisor access, translated like any other; one
that faults ends the delivery, and the event it was for is reported in EXITINTINFO (section 15.7.2).
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol, Self

from harness.model.registers import RFLAGS
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Registers

INTERRUPT: Final = 0
NMI: Final = 2
EXCEPTION: Final = 3
SOFTWARE: Final = 4

DE: Final = 0
BP: Final = 3
OF: Final = 4
UD: Final = 6
SS: Final = 12
GP: Final = 13
PF: Final = 14
WITH_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})

EVENT_VALID: Final = 1 << 31
"""V of EVENTINJ and EXITINTINFO: there is an event."""
_HAS_ERROR: Final = 1 << 11
_CLEARED: Final = RFLAGS.TF | RFLAGS.RF | 1 << 14 | 1 << 17  # NT and VM
_INTERRUPT_GATE: Final = 0xE
_TRAP_GATE: Final = 0xF


class Event(NamedTuple):
    """An event: `vector`, `kind` as EVENTINJ and EXITINTINFO code it, and its error code if it has one."""

    vector: int
    kind: int = EXCEPTION
    error: int | None = None

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
    def exception(cls, vector: int, error: int = 0) -> Self:
        """The exception of that vector, as the processor raises it."""
        return cls(vector, EXCEPTION, error if vector in WITH_ERROR_CODE else None)


class Bus(Protocol):
    """How a delivery reaches memory, by gVA. Each raises what ends the delivery if it faults."""

    def load(self, gva: int) -> int:
        """The quadword at `gva`."""

    def store(self, gva: int, value: int, free: int) -> None:
        """Write a quadword; the bits of `free` are not defined."""


def deliver(
    event: Event, regs: Registers, vmcb: Vmcb, bus: Bus, next_rip: int | None = None
) -> tuple[str, ...]:
    """Bring L2 to the first instruction of its handler (section 8.9.3). `next_rip` goes into the frame, as that of
    the next instruction, where it is not RIP. Returns the VMCB fields that
    the manual leaves undefined by it. Raises ValueError for tables that this model does not cover."""
    gate_at = vmcb["idtr.base"] + 16 * event.vector
    if 16 * event.vector + 15 > vmcb["idtr.limit"]:
        raise ValueError(f"vector {event.vector} lies beyond L2's IDT")
    low, high = bus.load(gate_at), bus.load(gate_at + 8)
    kind = low >> 40 & 0xF
    if not low >> 47 & 1 or kind not in (_INTERRUPT_GATE, _TRAP_GATE):
        raise ValueError(f"the gate of vector {event.vector} is not present, or no interrupt or trap gate")
    selector = low >> 16 & 0xFFFF
    descriptor = bus.load(vmcb["gdtr.base"] + (selector & ~7))
    new_cpl = descriptor >> 45 & 3
    ist = low >> 32 & 7
    undefined: tuple[str, ...] = ()
    stack = regs.rsp
    if ist:
        stack = bus.load(vmcb["tr.base"] + 0x1C + 8 * ist)
    elif new_cpl < regs.cpl:
        stack = bus.load(vmcb["tr.base"] + 4 + 8 * new_cpl)
    stack &= ~0xF
    # 8.9.3: SS is pushed in 64-bit mode always; RF is set in the image of a fault (3.1.6). Whether it
    # is for an event that was injected is not said.
    flags, free = regs.rflags, RFLAGS.RF
    frame = [vmcb["ss.selector"], regs.rsp, flags, vmcb["cs.selector"], regs.rip if next_rip is None else next_rip]
    if event.error is not None:
        frame.append(event.error)
    for slot, value in enumerate(frame):
        bus.store(stack - 8 * (slot + 1), value, free if slot == 2 else 0)
    if new_cpl < regs.cpl:
        vmcb["ss.selector"] = new_cpl
        undefined = ("ss.attrib", "ss.limit", "ss.base")
    vmcb["cs.selector"] = selector & ~3 | new_cpl
    vmcb["cs.attrib"] = descriptor >> 40 & 0xFF | descriptor >> 44 & 0xF00
    vmcb["cs.base"] = 0
    vmcb["cs.limit"] = 0xFFFF_FFFF
    regs.cpl = new_cpl
    regs.rsp = stack - 8 * len(frame)
    regs.rip = low & 0xFFFF | low >> 32 & 0xFFFF_0000 | high << 32
    regs.rflags &= ~(_CLEARED | (RFLAGS.IF if kind == _INTERRUPT_GATE else 0))
    return undefined
