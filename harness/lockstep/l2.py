"""L2 between VMRUN and #VMEXIT: its probes, its own accesses, its exceptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from harness.errors import UsageError
from harness.lockstep import devices, instructions, registers, stale, stub
from harness.lockstep.delivery import Leave, deliver
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import (
    EXCLUSIVE_LOSES_FLAGS,
    EXCLUSIVE_PROBES_FIRST,
    JUMP_NON_CANONICAL,
    LAR_LOSES_FLAGS,
    RMW_READS_FIRST,
    V_IRQ_AT_PRIORITY,
    V_IRQ_KEPT,
)
from harness.lockstep.state import DELIVERED, Own, State
from harness.lockstep.translation import Translation, joined
from harness.model import events, vmrun
from harness.model.access import Access, GeneralProtection, NestedPageFault, PageFault, Reached, StackFault
from harness.model.events import Event
from harness.model.intercepts import INTERCEPTS, asks
from harness.model.registers import CR4, DR6_BS, EFER, RFLAGS
from harness.model.tlb_events import Flushed, Ran, Wrote
from harness.model.vmcb import ExitCode, VIntr
from harness.model.walk import Walk
from harness.scenario.ops import STRINGS
from harness.wire.image import DATA_PAGES_TAG, tag
from harness.wire.program import Step, WireProbe

_FETCH = {cpl: Access(fetch=True, user=cpl == 3) for cpl in range(4)}
_READ = {cpl: Access(user=cpl == 3) for cpl in range(4)}
_WRITE = {cpl: Access(write=True, user=cpl == 3) for cpl in range(4)}
_POP = {cpl: access._replace(stack=True) for cpl, access in _READ.items()}
_PUSH = {cpl: access._replace(stack=True) for cpl, access in _WRITE.items()}
_IMPLICIT_READ = Access(implicit=True)
_LAR_SEES = 0x00F0_FF00
"""What LAR returns of a descriptor's upper half (volume 3, LAR)."""
_MASK64 = (1 << 64) - 1
_MAX_ENTERED = 100
_RULES = {events.GP: "exit.privileged", events.DB: "exit.debug"}
"""Of exceptions that instructions raise; `exit.exception` of the others."""
_FIRST_INSTRUCTION = 5
"""Bytes of the first of the two instructions in a quadword of the data pages."""
_CODE_BYTES = 7
"""Bytes of both."""
_CODE_NAME = 0xFFFF_FFFF << 8
"""Which of them are what it returns."""


class L2(Translation):
    """One run of L2 by VMRUN. `do` and the rest end in `Leave` where L2 leaves."""

    def __init__(self, state: State, out: Prediction, step: Step) -> None:
        super().__init__(state, out, vmrun.load(state.vmcb, state.host))
        self.step = step
        self.caching = vmrun.caching(self.regs, state.vmcb, state.host)
        self.page = self.step.b & ~0xFFF
        self.base = 0 if state.mode.long else state.vmcb["cs.base"]
        self.mask = (1 << 8 * state.mode.native) - 1
        self.host: dict[str, int] = {}
        """Registers of L1 that L2 wrote."""
        self.injected: Event | None = None
        self.first: Event | None = None
        """The event whose delivery led to what is delivered now."""
        self.begun = False
        """Whether it has executed an instruction."""
        self.in_shadow = False
        """Whether that was one behind which no interrupt is taken."""
        self.undefined: dict[str, int] = {}
        self.registers = {"rsi": step.c}
        """General registers that are known, beside those that it leaves alone: rSI is its mailbox."""
        self.is_rmw = False
        """Whether the probe at hand is a read-modify-write."""
        self.asid = state.vmcb["asid"]
        self.ran(by_vmrun=True)

    def ran(self, by_vmrun: bool = False) -> None:
        """L2 runs on, with the registers as they are."""
        regs = self.regs
        pcid = regs.cr3 & 0xFFF if regs.cr4 & CR4.PCIDE else 0
        self.state.tlb.add(Ran(self.asid, self.paging, bool(regs.cr4 & CR4.PGE), pcid, by_vmrun))

    def flush(self, by: str, gva: int | None = None, keeps_global: bool = False) -> None:
        """L2 flushes translations: that of `gva`, or all of its address space or, with neither, all."""
        regs = self.regs
        own = regs.cr4 & CR4.PCIDE and (gva is not None or keeps_global)
        narrow = bool(gva is not None and regs.efer & EFER.TCE)
        self.state.tlb.add(Flushed(by, self.asid, gva, keeps_global, False, narrow, regs.cr3 & 0xFFF if own else None))

    def interrupt(self) -> None:
        """Between two instructions: take the virtual interrupt that is pending, if it is taken (section 15.21.4); L1
        may intercept that. Raises Leave."""
        vmcb = self.state.vmcb
        vector = vmrun.virtual_interrupt(vmcb, self.regs.rflags)
        if vector is None:
            vector = vmrun.virtual_interrupt(vmcb, self.regs.rflags, at_priority=True)
            if vector is None or not self.state.quirks.has(V_IRQ_AT_PRIORITY):
                return
        if vmcb["interrupt_shadow"] and not self.begun:
            raise UsageError("a virtual interrupt that a shadow holds back is not modelled")
        if asks(vmcb, "vintr"):
            raise Leave(INTERCEPTS["vintr"].exitcode, rule="exit.intercept")
        if not self._keeps_v_irq():
            vmcb["v_intr"] &= ~VIntr.IRQ
        cpl = self.regs.cpl
        try:
            self.deliver(Event(vector, events.INTERRUPT))
        except Leave as leave:
            if leave.event is None:
                self.state.outside[DELIVERED] = cpl
            raise

    def _keeps_v_irq(self) -> bool:
        """By a quirk V_IRQ stays set: where a hypervisor below needs it for an interrupt that is pending for L1; or
        where it may lack what the delivery touches, since none like it came before with all as it is."""
        state = self.state
        window = not state.vmcb["v_intr"] & VIntr.MASKING and "interrupt" in state.outside
        may = window or state.outside.get(DELIVERED) != self.regs.cpl
        return may and state.saw_v_irq() and state.quirks.has(V_IRQ_KEPT)

    def enter(self) -> None:
        """L2's own accesses: fetch of its code, use of its mailbox. A fault of the first is the
        scenario's business; one of the others would make L2 itself fault at places nobody names. Raises UsageError for
        such a fault."""
        state, words = self.state, self.state.memory.words
        code = self.regs.rip + self.base & _MASK64
        key = code, self.step.c, self.regs.cpl
        own = state.own.get(key)
        known = own.made.get(own.read(words)) if own is not None else None
        if known is not None:
            self.out.accesses += known.accesses
            for index, old, new in known.changed:
                state.changed(self.out, index << 3, old)
                words[index] = new
            state.quirks.played |= known.played
            return
        before, state.quirks.played = state.quirks.played, set()
        met: dict[int, int] = {}
        try:
            self._use_own_page(code, _FETCH, met)
            written = self._use_own_page(self.step.c, _WRITE, met)
            if not isinstance(written.outcome, Reached):
                raise UsageError(f"L2 cannot use its own mailbox any more: {written.outcome}")
            if own is None or own.indices != tuple(met) or len(own.made) >= _MAX_ENTERED:
                own = state.own[key] = Own(tuple(met))
            own.learn(met, words, self.out.accesses[-2:], frozenset(state.quirks.played))
        finally:
            state.quirks.played |= before

    def _use_own_page(self, address: int, access: Mapping[int, Access], met: dict[int, int]) -> Walk:
        """One access of its own; `met` gets the quadwords that it reads, by index, as they were."""
        walk, words = self.walk(address, access[self.regs.cpl]), self.state.memory.words
        for step in walk.trail:
            index = step[3] >> 3
            if index not in met:
                met[index] = words[index]
        self._note(walk)
        if access is _FETCH and not isinstance(walk.outcome, Reached):
            self.fault(walk)
        return walk

    def enter_again(self) -> None:
        """After a change of translation L2's own pages must still be there for it. Raises UsageError if they are
        not."""
        for address, access in ((self.page + self.base, _FETCH), (self.step.c, _WRITE)):
            walk = self.walk(address, access[self.regs.cpl])
            if self.state.tlb.changed:
                walk, optional = stale.own(self.state, address, access[self.regs.cpl], walk)
                self._permit(optional)
            self._note(walk)
            if not isinstance(walk.outcome, Reached):
                raise UsageError(f"this leaves L2 without its own pages: {walk.outcome}")

    def at(self, label: str, rax: int) -> None:
        """Set the registers as they are when L2 stands at `label`."""
        regs, self.begun = self.regs, True
        regs.rip = self.page + self.state.stub.labels[label]
        regs.rflags = regs.rflags & ~RFLAGS.STATUS | stub.FLAGS
        regs.rax = rax & _MASK64

    def single_step(self, behind: str) -> None:
        """#DB, the trap that RFLAGS.TF asks for, at the label `behind` the instruction (section 13.1.4). DR6 has its
        cause, also where L1 intercepts it (15.12.2)."""
        self.begun, self.regs.rip = True, self.page + self.state.stub.labels[behind]
        self.regs.dr6 |= DR6_BS
        self.exception(Event.exception(events.DB))

    def do(self, probe: WireProbe, index: int) -> int:
        """Do one probe; returns its result."""
        kind, size, address, value = probe
        self.out.under[index] = self.paging, self.caching
        if kind != "read":
            self.state.outside.pop(DELIVERED, None)
        self.at(stub.label(kind, size), value)
        if kind in ("read", "write", "rmw", "push", "pop"):
            result = self._data(kind, size, address, value, index)
        elif kind in STRINGS:
            self.is_rmw = False
            result = devices.string(self, kind, size, address, value, index)
        elif kind == "lar":
            result = self._lar(value, index)
        elif kind == "fetch":
            result = self._fetch(address, index)
        else:
            result = instructions.do(self, kind, size, address, value)
        self.regs.rax = result
        return result

    def end(self) -> None:
        """All probes done: L2 leaves by VMMCALL. Raises Leave."""
        self.at("end", 0)
        if not asks(self.state.vmcb, "vmmcall"):
            self.exception(Event.exception(events.UD))
        raise Leave(ExitCode.VMMCALL, rule="exit.vmmcall", length=instructions.length(self, "end"))

    # --- probes -----------------------------------------------------------------------------------

    def _data(self, kind: str, size: int, address: int, value: int, index: int) -> int:
        cpl, begun = self.regs.cpl, self.regs.rsp
        self.is_rmw = kind == "rmw"
        reads = kind in ("read", "pop")
        if kind in ("push", "pop"):
            self.regs.rsp = address + (size if kind == "push" else 0) & self.mask
            access = _POP[cpl] if reads else _PUSH[cpl]
        else:
            access = _READ[cpl] if reads else _WRITE[cpl]
        self.writes = value if kind in ("write", "push") else None
        old = 0
        # with two processors QEMU's atomic operations are whole, but for those that are not aligned
        second, quirks = "second" in self.state.cpu.features, self.state.quirks
        if kind == "rmw" and second and address % size and quirks.has(EXCLUSIVE_PROBES_FIRST):
            self.reach(access, address, 1, index, more=address & 0xFFF > 0x1000 - size)  # of the first page alone
        if kind == "rmw" and second and address % size and quirks.has(EXCLUSIVE_LOSES_FLAGS):
            self.regs.rflags &= ~RFLAGS.STATUS
        if kind == "rmw" and not (second and address % size == 0) and quirks.has(RMW_READS_FIRST):
            self.reads_first = True
            old = self.read(self.reach(_READ[cpl], address, size, index))
            self.reads_first, self.writes = False, old + value
        parts = self.reach(access, address, size, index)
        self.regs.rsp = begun
        if self.writes is None:
            old = self.read(parts)
        if not reads:
            instructions.write_is_emulated(self, index)
            new = old + value if kind == "rmw" else value
            for spa, at, width in parts:
                mask = (1 << 8 * width) - 1
                self.store(spa, new >> 8 * at & mask, mask)
        if kind in ("write", "push"):
            return value
        # 32-bit results are zero-extended
        return old if size >= 4 else value & ~((1 << 8 * size) - 1) & _MASK64 | old

    def read(self, parts: list[tuple[int, int, int]]) -> int:
        """What is at the `parts` of an operand, each an sPA, its place in the value and its width in bytes. Raises
        UsageError for an access of a device that is none."""
        for spa, _, width in parts:
            devices.check(spa, width, rmw=self.is_rmw)
        return sum(self.state.memory.read(spa, width) << 8 * at for spa, at, width in parts)

    def reach(
        self, access: Access, address: int, size: int, index: int, more: bool = False,
        fits: Callable[[int, int, int, bool, int], bool] | None = None,
    ) -> list[tuple[int, int, int]]:
        """Translate an access of `size` bytes: for each page that it touches the sPA, where in the operand
        that begins, and how many bytes. Of two pages the lower is translated first; a fault of the higher
        has that page's first address. With `more` other accesses of the instruction follow. `fits` is in the place of
        `_fits`."""
        first = min(size, 0x1000 - (address & 0xFFF))
        parts = [(address, 0, first)]
        if first < size:
            parts.append((address + first & self.mask, first, size - first))
        reached: list[tuple[int, int, int]] = []
        walks: list[Walk] = []
        for gva, at, width in parts:
            walk = self._cached(gva, access, index, partial(fits or self._fits, index, at, width, access.write),
                                more=more or at + width < size)
            walks.append(walk)
            self.out.walks[index] = joined(walks)
            if not isinstance(walk.outcome, Reached):
                for done in walks[:-1]:
                    self._note(done, other_faulted=True)
                self._note(walk)
                self.fault(devices.fault(self, walk))
            reached.append((self._own_memory(walk, f"an access of gVA {gva:#x}"), at, width))
        emulated = devices.cannot_be_emulated(self, reached)
        for walk in walks:
            self._note(walk, other_faulted=emulated)
        if emulated:
            instructions.end_of_emulation(self)
        return reached

    def _lar(self, selector: int, index: int) -> int:
        """LAR (volume 3): reads a descriptor of the GDT, whatever the CPL; its access rights if they may be seen."""
        vmcb, cpl = self.state.vmcb, self.regs.cpl
        offset = selector & 0xFFF8
        if not offset or offset + 7 > vmcb["gdtr.limit"]:
            return 0
        walk = self._cached(vmcb["gdtr.base"] + offset & _MASK64, _IMPLICIT_READ, index, lambda spa: True)
        self._note(walk)
        self.out.walks[index] = walk
        if not isinstance(walk.outcome, Reached):
            if self.state.quirks.has(LAR_LOSES_FLAGS):
                self.undefined["rflags"] = RFLAGS.STATUS
            self.fault(walk)
        descriptor = self.state.memory.words[self._own_memory(walk, "LAR") >> 3]
        conforming = descriptor >> 42 & 3 == 3
        seen = descriptor >> 44 & 1 and (conforming or descriptor >> 45 & 3 >= max(cpl, selector & 3))
        return descriptor >> 32 & _LAR_SEES if seen else 0

    def store(self, spa: int, new: int, mask: int) -> None:
        """Write the bits of `mask` at `spa`, over one quadword or two."""
        devices.check(spa, mask.bit_length() // 8, new, self.is_rmw)
        words, shift = self.state.memory.words, 8 * (spa & 7)
        for number in (0, 1):
            part = mask << shift >> 64 * number & _MASK64
            if part:
                at = (spa & ~7) + 8 * number
                before = words[at >> 3]
                self.state.changed(self.out, at, before)
                if self.state.image.in_arena(at):
                    self.state.tlb.add(Wrote(at, before))
                words[at >> 3] = before & ~part | new << shift >> 64 * number & _MASK64

    def _fetch(self, address: int, index: int) -> int:
        registers.old_breakpoint(self, address, index)
        if 0x1000 - (address & 0xFFF) < _FIRST_INSTRUCTION:
            return self._crossing_fetch(address, index)
        walk = self._cached(address, _FETCH[self.regs.cpl], index, lambda spa: self._seen_result(index) == spa >> 3)
        self._note(walk)
        self.out.walks[index] = walk
        if not isinstance(walk.outcome, Reached):
            if not isinstance(walk.outcome, GeneralProtection) or self.state.quirks.has(JUMP_NON_CANONICAL):
                self.regs.rip = address
            self.fault(walk)
        spa = self._own_memory(walk, f"fetch at gVA {address:#x}")
        if spa & 7 or not self.state.image.in_data(spa) or self.state.memory.words[spa >> 3] != tag(spa):
            raise UsageError(f"fetch at gVA {address:#x} reaches sPA {spa:#x}, where there is no code that returns")
        return spa >> 3

    def _crossing_fetch(self, address: int, index: int) -> int:
        """A fetch whose first instruction goes on in the next page: L2 stands at it if that page faults."""
        access = _FETCH[self.regs.cpl]
        if isinstance(self.walk(address, access).outcome, GeneralProtection):
            raise UsageError(f"fetch at gVA {address:#x}: code that begins at no canonical address is not modelled")
        self.is_rmw, self.regs.rip = False, address
        code = self.read(self.reach(access, address, _CODE_BYTES, index, fits=self._fits_code))
        if code & ~_CODE_NAME != DATA_PAGES_TAG & (1 << 8 * _CODE_BYTES) - 1:
            raise UsageError(f"fetch at gVA {address:#x} reaches {code:#x}, which is no code that returns")
        return (code & _CODE_NAME) >> 8

    def _fits_code(self, index: int, at: int, width: int, write: bool, spa: int) -> bool:
        """`_fits`, of a part of the code that returned what the machine is seen to have returned."""
        if self.state.seen is None or index >= self.state.seen.next_probe:
            return True
        code = DATA_PAGES_TAG | self._seen_result(index) << 8
        return code >> 8 * at & (1 << 8 * width) - 1 == self.state.memory.read(spa, width)

    # --- faults -----------------------------------------------------------------------------------

    def fault(self, walk: Walk) -> None:
        """A walk faulted: #NPF leaves L2; an exception leaves it if L1 intercepts it, and goes through
        L2's own IDT if not. Raises Leave."""
        match walk.outcome:
            case NestedPageFault(code, gpa):
                raise Leave(ExitCode.NPF, *devices.place(self, walk, code, gpa), walk, walk.rule)
            case PageFault(code, gva):
                if not self.intercepted(events.PF):
                    self.regs.cr2 = gva
                self.exception(Event.exception(events.PF, code), gva, walk)
            case GeneralProtection(code):
                self.exception(Event.exception(events.GP, code), 0, walk)
            case StackFault(code):
                self.exception(Event.exception(events.SS, code), 0, walk)
            case _:
                raise AssertionError(walk.outcome)

    def intercepted(self, vector: int) -> bool:
        """Whether L1 intercepts the exception with that vector (15.12)."""
        return bool(self.state.vmcb["intercept_exceptions"] >> vector & 1)

    def exception(self, event: Event, info2: int = 0, walk: Walk | None = None) -> None:
        """An exception of L2: an exit, or its own handler's business. Raises Leave."""
        rule = walk.rule if walk is not None else _RULES.get(event.vector, "exit.exception")
        if self.intercepted(event.vector):
            raise Leave(ExitCode.EXCEPTION + event.vector, event.error or 0, info2, walk, rule)
        self.deliver(event, walk)

    def deliver(self, event: Event, walk: Walk | None = None, next_rip: int | None = None) -> None:
        """See harness.lockstep.delivery."""
        deliver(self, event, walk, next_rip)
