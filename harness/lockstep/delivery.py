"""How L2 leaves, and how the delivery of an event reaches memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from harness.errors import UsageError
from harness.lockstep.hazards import BUSY_TSS, DELIVERY_IN_SHADOW
from harness.lockstep.prediction import WHOLE
from harness.lockstep.quirks import (
    DELIVERY_EMULATED,
    DOUBLE_FAULT_NOT_INTERCEPTED,
    FIRST_EVENT_KEPT,
    IDT_ERROR_OF_SLOT,
    IDT_ERROR_WITHOUT_EXT,
    INJECTED_TRAP_NO_DPL,
    INTERRUPT_BEHIND_ANOTHER,
    IST_NULL_SS,
    PUSH_OF_SUPERVISOR,
    WINDOW_AS_INTERRUPT,
)
from harness.model import events, legacy_events, vmrun
from harness.model.access import Access, NestedPageFault, PageFault, Reached
from harness.model.events import Event, Habits
from harness.model.intercepts import INTERCEPTS, asks
from harness.model.registers import RFLAGS
from harness.model.vmcb import MISC1_NMI, ExitCode, VIntr
from harness.model.walk import Walk
from harness.wire.layout import INTERRUPT_VECTOR

if TYPE_CHECKING:
    from harness.lockstep.l2 import L2

_BUSY_TSS = 0xB
_NMI_VECTOR = 2
_REINJECTED = (events.INTERRUPT, events.NMI, events.EXCEPTION)
_READ = Access(implicit=True)
_PUSH = {cpl: Access(write=True, user=cpl == 3) for cpl in range(4)}
_PUSH_OF_SUPERVISOR = Access(write=True, implicit=True)
_FETCH = {cpl: Access(fetch=True, user=cpl == 3) for cpl in range(4)}


class Leave(Exception):
    """L2 leaves: the exit's code, EXITINFO1 and 2, the walk that faulted, and the rule behind it.
    `event` is what was being delivered; `length` is that of the instruction, in bytes, where nRIP tells it."""

    def __init__(
        self, code: int, info1: int = 0, info2: int = 0, walk: Walk | None = None, rule: str = "",
        event: Event | None = None, length: int = 0,
    ) -> None:
        super().__init__(code)
        self.code, self.info1, self.info2 = code, info1, info2
        self.walk, self.rule, self.event = walk, rule, event
        self.length = length


class Bus:
    """Memory as a delivery sees it. Tables are read by implicit supervisor accesses, whatever the CPL (5.6.6); the
    stack is written as any data is, at the handler's CPL."""

    def __init__(self, l2: L2, event: Event) -> None:
        self._l2, self._event = l2, event

    def load(self, gva: int, width: int = 8) -> int:
        """The `width` bytes at `gva`. Raises Leave where they cannot be reached."""
        return self._l2.state.memory.read(self._reach(gva, _READ, width), width)

    def store(self, gva: int, value: int, free: int, cpl: int, width: int = 8) -> None:
        """Write `width` bytes at `gva`, at that CPL; bits of `free` are left to the machine. Raises Leave as `load`
        does."""
        spa = self._reach(gva, self._push(gva, cpl), width)
        state, out = self._l2.state, self._l2.out
        word, shift = spa & ~7, 8 * (spa & 7)
        before = state.memory.words[word >> 3]
        state.changed(out, word, before)
        state.memory.words[word >> 3] = before & ~((1 << 8 * width) - 1 << shift) | value << shift
        if free:
            out.permitted[word] = out.permitted.get(word, 0) | free << shift

    def raises(self, event: Event) -> NoReturn:
        """The delivery raises `event`, which is delivered in its place: raises Leave, or L2 goes on there."""
        _second(self._l2, self._event, event, 0, None, "exit.delivery")

    def _push(self, gva: int, cpl: int) -> Access:
        """How the stack is written; or, by a quirk, as a table is read."""
        l2, access = self._l2, _PUSH[cpl]
        if PUSH_OF_SUPERVISOR not in l2.state.quirks.names:
            return access
        if l2.walk(gva, access).outcome != l2.walk(gva, _PUSH_OF_SUPERVISOR).outcome:
            l2.state.quirks.has(PUSH_OF_SUPERVISOR)
        return _PUSH_OF_SUPERVISOR

    def _is_emulated(self, gva: int, access: Access) -> bool:
        """By a quirk: whether a hypervisor below L1 takes this for a write of the instruction at RIP, since an entry of
        L2's lies in a page that it keeps a shadow of, as one of L1's nested tables."""
        state = self._l2.state
        if DELIVERY_EMULATED not in state.quirks.names or self._event.kind not in _REINJECTED:
            return False
        return self._in_shadow(self._l2.walk(gva, access)) and state.quirks.has(DELIVERY_EMULATED)

    def _in_shadow(self, walk: Walk) -> bool:
        """Whether it comes by an entry of L2's in a page that is also one of L1's nested tables."""
        pages = self._l2.state.nested_pages
        return any(step[0] == "guest" and step[3] & ~0xFFF in pages for step in walk.trail)

    def _reach(self, gva: int, access: Access, width: int) -> int:
        if self._is_emulated(gva, access):
            _emulated(self._l2, self._event)
        walk = self._l2.access(gva, access)
        if self._event.kind != events.INTERRUPT and self._in_shadow(walk):
            self._l2.out.perils.add(DELIVERY_IN_SHADOW)
        match walk.outcome:
            case Reached(spa, _):
                if gva & width - 1 or not self._l2.state.image.in_arena(spa):
                    raise UsageError(f"a delivery reaches sPA {spa:#x} through gVA {gva:#x}: no page of L2's own")
                return spa
            case NestedPageFault(code, gpa):
                raise Leave(ExitCode.NPF, code, gpa, walk, walk.rule, _told(self._l2, self._event))
            case PageFault(code, fault):
                _second(self._l2, self._event, Event.exception(events.PF, code), fault, walk, walk.rule)
            case outcome:
                raise UsageError(f"a delivery faults with {outcome}: that is not modelled")


def deliver(l2: L2, event: Event, walk: Walk | None, next_rip: int | None) -> NoReturn:
    """Through L2's own IDT; its handlers do nothing but leave by HLT. `next_rip` is what goes into the frame where
    that is not RIP. Raises Leave: L2 ends in its handler at the latest; or UsageError for what is not modelled."""
    l2.out.event = event
    l2.first = l2.first or event
    mode, vmcb, bus = l2.state.mode, l2.state.vmcb, Bus(l2, event)
    if mode.long:
        undefined = events.deliver(event, l2.regs, vmcb, bus, next_rip, _habits(l2, event))
        l2.undefined |= dict.fromkeys(undefined, WHOLE)
    elif mode.real:
        legacy_events.real(event, l2.regs, vmcb, bus, next_rip)
    else:
        if l2.regs.cpl and vmcb["tr.attrib"] & 0x1F == _BUSY_TSS:
            l2.out.perils.add(BUSY_TSS)
        legacy_events.protected(event, l2.regs, vmcb, bus, next_rip, _habits(l2, event))
    if not (_another_is_due(l2, event) and l2.state.quirks.has(INTERRUPT_BEHIND_ANOTHER)):
        physical(l2)
        l2.interrupt()
    landed = l2.access(l2.regs.rip + (0 if mode.long else vmcb["cs.base"]), _FETCH[l2.regs.cpl])
    if not isinstance(landed.outcome, Reached):
        l2.fault(landed)
    if l2.regs.cpl:  # HLT is CPL 0's
        l2.exception(Event.exception(events.GP))
    if not asks(l2.state.vmcb, "hlt"):
        raise UsageError("L1 must intercept HLT, by which L2's handlers end")
    raise Leave(ExitCode.HLT, walk=walk, rule="exit.delivered", length=1)


def _another_is_due(l2: L2, event: Event) -> bool:
    """Whether an interrupt is pending behind `event`, which was one or an NMI, and came by itself."""
    came = event is not l2.injected and event.kind in (events.INTERRUPT, events.NMI)
    return came and ("interrupt" in l2.state.outside
                     or vmrun.virtual_interrupt(l2.state.vmcb, l2.regs.rflags) is not None)


def physical(l2: L2) -> None:
    """What is pending for the processor is taken between two instructions, before anything virtual (15.13, 15.21.4): it
    ends L2 if L1 intercepts it. GIF is 1 in L2; an interrupt wants L1's IF with V_INTR_MASKING, without it L2's. Raises
    Leave, or UsageError for what is not modelled."""
    vmcb, outside = l2.state.vmcb, l2.state.outside
    if "nmi" in outside:
        if vmcb["interrupt_shadow"] and not l2.begun:
            raise UsageError("an NMI that a shadow holds back is not modelled")
        del outside["nmi"]
        if not vmcb["intercept_misc1"] & MISC1_NMI:
            deliver(l2, Event(_NMI_VECTOR, events.NMI), None, None)
        raise Leave(ExitCode.NMI, rule="exit.intercept")
    if "interrupt" not in outside:
        return
    flags = l2.state.host.rflags if vmcb["v_intr"] & VIntr.MASKING else l2.regs.rflags
    if not flags & RFLAGS.IF:
        if l2.regs.rflags & RFLAGS.IF and l2.state.quirks.has(WINDOW_AS_INTERRUPT):
            vmcb["v_intr"] &= ~VIntr.IRQ  # the one that is taken has taken its place
            deliver(l2, Event(0, events.INTERRUPT), None, None)
        return
    if vmcb["interrupt_shadow"] and not l2.begun:
        raise UsageError("an interrupt that a shadow holds back is not modelled")
    if l2.state.host.cr8 >= INTERRUPT_VECTOR >> 4:
        raise UsageError("an interrupt that L1's task priority holds back is not modelled")
    del outside["interrupt"]
    if asks(vmcb, "intr"):
        raise Leave(INTERCEPTS["intr"].exitcode, rule="exit.intercept")
    deliver(l2, Event(INTERRUPT_VECTOR, events.INTERRUPT), None, None)


def second_processor(l2: L2, kind: str, value: int) -> int:
    """L1's second processor does its writes, and may then end L2 by an NMI. Raises Leave then; UsageError for what
    is not modelled."""
    if kind == "remotenmi" and not l2.state.vmcb["intercept_misc1"] & MISC1_NMI:
        raise UsageError("L1 must intercept NMI: what one does inside of L2 is not modelled")
    for step in l2.state.remote:
        l2.store(step.a, step.b, (1 << 8 * step.arg) - 1)
    if kind == "remotenmi":
        raise Leave(ExitCode.NMI, rule="exit.intercept")
    return value


def _emulated(l2: L2, event: Event) -> NoReturn:
    """The instruction at RIP is fetched before `event` is delivered, and tells it if that faults; unless it is an
    exception, which is dropped for the instruction's own."""
    told = None if event.kind == events.EXCEPTION else event
    walk = l2.access(l2.regs.rip + l2.base & l2.mask, _FETCH[l2.regs.cpl])
    match walk.outcome:
        case PageFault(code, gva) if l2.intercepted(events.PF):
            raise Leave(ExitCode.EXCEPTION + events.PF, code, gva, walk, walk.rule, told)
        case NestedPageFault(code, gpa):
            raise Leave(ExitCode.NPF, code, gpa, walk, walk.rule, told)
    raise UsageError("an instruction that comes before the event that VMRUN injects is not modelled")


def _second(l2: L2, first: Event, second: Event, info2: int, walk: Walk | None, rule: str) -> NoReturn:
    """The delivery of `first` raises `second` (section 15.7.3): that is intercepted before the two are combined,
    what comes of them after."""
    if l2.intercepted(second.vector):
        if second.free:
            l2.undefined["exitinfo1"] = second.free
        raise Leave(ExitCode.EXCEPTION + second.vector, second.error or 0, info2, walk, rule, _told(l2, first))
    if second.vector == events.PF:
        l2.regs.cr2 = info2
    result = events.combine(first, second)
    if result is None:
        raise Leave(ExitCode.SHUTDOWN, walk=walk, rule="exit.double-fault", event=first)
    if result.vector == events.DF:
        l2.undefined |= {"rip": WHOLE}  # 15.12.9
        if l2.intercepted(events.DF) and not l2.state.quirks.has(DOUBLE_FAULT_NOT_INTERCEPTED):
            raise Leave(ExitCode.EXCEPTION + events.DF, walk=walk, rule="exit.double-fault", event=_told(l2, first))
    deliver(l2, result, walk, None)


def _told(l2: L2, event: Event) -> Event:
    """What EXITINTINFO tells where the delivery of `event` is cut short."""
    first = l2.first
    return first if first is not None and first is not event and l2.state.quirks.has(FIRST_EVENT_KEPT) else event


def _habits(l2: L2, event: Event) -> Habits:
    has = l2.state.quirks.has
    trap = event.kind == events.EXCEPTION and event.software and l2.injected is event
    external = event.kind in (events.INTERRUPT, events.NMI)
    return Habits(has(IST_NULL_SS), has(IDT_ERROR_OF_SLOT), external and has(IDT_ERROR_WITHOUT_EXT),
                  trap and has(INJECTED_TRAP_NO_DPL))
