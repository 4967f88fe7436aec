"""L2 between VMRUN and #VMEXIT: its probes, its own accesses, its exceptions."""

from __future__ import annotations

from harness.errors import UsageError
from harness.lockstep import instructions, stub
from harness.lockstep.delivery import Leave, deliver
from harness.lockstep.prediction import WHOLE, Prediction
from harness.lockstep.quirks import JUMP_NON_CANONICAL, PKE_NOT_FLUSHED, RMW_READS_FIRST, V_IRQ_AT_PRIORITY
from harness.lockstep.state import Entered, State
from harness.model import dirty, events, vmrun
from harness.model.access import Access, GeneralProtection, NestedPageFault, PageFault, Reached, StackFault
from harness.model.consistency import cr4_mbz, efer_mbz
from harness.model.entries import P
from harness.model.events import Event
from harness.model.intercepts import asks
from harness.model.registers import CR4, RFLAGS
from harness.model.vmcb import MISC1_VINTR, NP_ENABLE, SEGMENT_P, ExitCode, VIntr
from harness.model.walk import GUEST, Walk, translate
from harness.wire.image import tag
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
_MAX_ENTERED = 1000
_FLUSHING = CR4.PGE | CR4.PAE | CR4.PSE
"""Bits of CR4 whose change flushes all translations, global ones too (section 5.5.3)."""


def joined(walks: list[Walk]) -> Walk:
    """The walks of one access that touches two pages, as one: with the first one's outcome, or the fault."""
    if len(walks) == 1:
        return walks[0]
    decided = next((walk for walk in walks if not isinstance(walk.outcome, Reached)), walks[0])
    return decided._replace(
        trail=[step for walk in walks for step in walk.trail],
        updates=[update for walk in walks for update in walk.updates],
    )


class L2:
    """One run of L2 by VMRUN. `do` and the rest end in `Leave` where L2 leaves."""

    def __init__(self, state: State, out: Prediction, step: Step) -> None:
        self.state, self.out, self.step = state, out, step
        self.regs = vmrun.load(state.vmcb, state.host)
        self.paging = state.paging(self.regs)
        self.caching = vmrun.caching(self.regs, state.vmcb, state.host)
        self.page = self.step.b & ~0xFFF
        self.base = 0 if state.mode.long else state.vmcb["cs.base"]
        self.mask = (1 << 8 * state.mode.native) - 1
        self.host: dict[str, int] = {}
        """Registers of L1 that L2 wrote."""
        self.injected: Event | None = None
        self.begun = False
        """Whether it has executed an instruction."""
        self.undefined: dict[str, int] = {}
        self.fresh: set[int] | None = None
        """After L2 wrote a table: the pages (gVA >> 12) whose translation it has flushed since."""

    def interrupt(self) -> None:
        """Take the virtual interrupt that is pending at VMRUN, if it is taken (section 15.21.4)."""
        vmcb = self.state.vmcb
        vector = vmrun.virtual_interrupt(vmcb, self.regs.rflags)
        if vector is None:
            vector = vmrun.virtual_interrupt(vmcb, self.regs.rflags, at_priority=True)
            if vector is None or not self.state.quirks.has(V_IRQ_AT_PRIORITY):
                return
        if vmcb["intercept_misc1"] & MISC1_VINTR or vmcb["interrupt_shadow"]:
            raise UsageError("a virtual interrupt that is intercepted, or held back by a shadow, is not modelled")
        vmcb["v_intr"] &= ~VIntr.IRQ
        self.deliver(Event(vector, events.INTERRUPT))

    def enter(self) -> None:
        """L2's own accesses: fetch of its code, use of its mailbox. A fault of the first is the
        scenario's business; one of the others would make L2 itself fault at places nobody names."""
        state = self.state
        code = self.regs.rip + self.base & _MASK64
        key = (state.quirks.names, self.paging, code, self.step.c, self.regs.cpl)
        words = state.memory.words
        known = state.entered.get(key)
        if known is not None and all(words[index] == word for index, word in known.words.items()):
            self.out.accesses += known.accesses
            state.quirks.played |= known.played
            return
        before, state.quirks.played = state.quirks.played, set()
        try:
            self._use_own_pages(code)
            if len(state.entered) >= _MAX_ENTERED:
                state.entered.clear()
            state.entered[key] = Entered.of(words, self.out.accesses[-2:], state.quirks.played)
        finally:
            state.quirks.played |= before

    def _use_own_pages(self, code: int) -> None:
        fetched = self.access(code, _FETCH[self.regs.cpl])
        if not isinstance(fetched.outcome, Reached):
            self.fault(fetched)
        written = self.access(self.step.c, _WRITE[self.regs.cpl])
        if not isinstance(written.outcome, Reached):
            raise UsageError(f"L2 cannot use its own mailbox any more: {written.outcome}")

    def enter_again(self) -> None:
        """After a change of translation L2's own pages must still be there for it."""
        for address, access in ((self.page + self.base, _FETCH), (self.step.c, _WRITE)):
            walk = self.access(address, access[self.regs.cpl])
            if not isinstance(walk.outcome, Reached):
                raise UsageError(f"this leaves L2 without its own pages: {walk.outcome}")

    def at(self, label: str, rax: int) -> None:
        """Set the registers as they are when L2 stands at `label`."""
        regs, self.begun = self.regs, True
        regs.rip = self.page + self.state.stub.labels[label]
        regs.rflags = regs.rflags & ~RFLAGS.STATUS | stub.FLAGS
        regs.rax = rax & _MASK64

    def do(self, probe: WireProbe, index: int) -> int:
        """Do one probe; returns its result."""
        kind, size, address, value = probe
        self.out.under[index] = self.paging, self.caching
        self.at(stub.label(kind, size), value)
        if kind in ("read", "write", "rmw", "push", "pop"):
            result = self._data(kind, size, address, value, index)
        elif kind == "lar":
            result = self._lar(value, index)
        elif kind == "fetch":
            result = self._fetch(address, index)
        else:
            result = instructions.do(self, kind, size, address, value)
        self.regs.rax = result
        return result

    def end(self) -> None:
        """All probes done: L2 leaves by VMMCALL."""
        self.at("end", 0)
        if not asks(self.state.vmcb, "vmmcall"):
            self.exception(Event.exception(events.UD))
        raise Leave(ExitCode.VMMCALL, rule="exit.vmmcall", length=instructions.length(self, "end"))

    # --- probes -----------------------------------------------------------------------------------

    def _data(self, kind: str, size: int, address: int, value: int, index: int) -> int:
        cpl, begun = self.regs.cpl, self.regs.rsp
        reads = kind in ("read", "pop")
        if kind in ("push", "pop"):
            self.regs.rsp = address + (size if kind == "push" else 0) & self.mask
            access = _POP[cpl] if reads else _PUSH[cpl]
        else:
            access = _READ[cpl] if reads else _WRITE[cpl]
        if kind == "rmw" and self.state.quirks.has(RMW_READS_FIRST):
            self._reach(_READ[cpl], address, size, index)
        parts = self._reach(access, address, size, index)
        self.regs.rsp = begun
        old = sum(self.state.memory.read(spa, width) << 8 * at for spa, at, width in parts)
        if not reads:
            new = old + value if kind == "rmw" else value
            for spa, at, width in parts:
                mask = (1 << 8 * width) - 1
                self._store(spa, new >> 8 * at & mask, mask)
        if kind in ("write", "push"):
            return value
        # 32-bit results are zero-extended
        return old if size >= 4 else value & ~((1 << 8 * size) - 1) & _MASK64 | old

    def _reach(self, access: Access, address: int, size: int, index: int) -> list[tuple[int, int, int]]:
        """Translate an access of `size` bytes: for each page that it touches the sPA, where in the operand
        that begins, and how many bytes. Of two pages the lower is translated first; a fault of the higher
        has that page's first address."""
        first = min(size, 0x1000 - (address & 0xFFF))
        parts = [(address, 0, first)]
        if first < size:
            parts.append((address + first & self.mask, first, size - first))
        reached: list[tuple[int, int, int]] = []
        walks: list[Walk] = []
        for gva, at, width in parts:
            self._must_be_fresh(gva)
            walk = self.walk(gva, access)
            walks.append(walk)
            self.out.walks[index] = joined(walks)
            if not isinstance(walk.outcome, Reached):
                for done in walks[:-1]:
                    self._note(done, other_faulted=True)
                self._note(walk)
                self.fault(walk)
            reached.append((self._own_memory(walk, f"an access of gVA {gva:#x}"), at, width))
        for walk in walks:
            self._note(walk)
        return reached

    def _lar(self, selector: int, index: int) -> int:
        """LAR (volume 3): reads a descriptor of the GDT, whatever the CPL; its access rights if they may be seen."""
        vmcb, cpl = self.state.vmcb, self.regs.cpl
        offset = selector & 0xFFF8
        if not offset or offset + 7 > vmcb["gdtr.limit"]:
            return 0
        walk = self.access(vmcb["gdtr.base"] + offset & _MASK64, _IMPLICIT_READ)
        self.out.walks[index] = walk
        if not isinstance(walk.outcome, Reached):
            self.fault(walk)
        descriptor = self.state.memory.words[self._own_memory(walk, "LAR") >> 3]
        conforming = descriptor >> 42 & 3 == 3
        seen = descriptor >> 44 & 1 and (conforming or descriptor >> 45 & 3 >= max(cpl, selector & 3))
        return descriptor >> 32 & _LAR_SEES if seen else 0

    def _store(self, spa: int, new: int, mask: int) -> None:
        """Write the bits of `mask` at `spa`, over one quadword or two."""
        words, shift = self.state.memory.words, 8 * (spa & 7)
        for number in (0, 1):
            part = mask << shift >> 64 * number & _MASK64
            if part:
                at = (spa & ~7) + 8 * number
                before = words[at >> 3]
                self.state.changed(self.out, at, before)
                words[at >> 3] = before & ~part | new << shift >> 64 * number & _MASK64
        if self.state.image.in_arena(spa):
            self.fresh = set()

    def _fetch(self, address: int, index: int) -> int:
        self._must_be_fresh(address)
        walk = self.access(address, _FETCH[self.regs.cpl])
        self.out.walks[index] = walk
        if not isinstance(walk.outcome, Reached):
            if not isinstance(walk.outcome, GeneralProtection) or self.state.quirks.has(JUMP_NON_CANONICAL):
                self.regs.rip = address
            self.fault(walk)
        spa = self._own_memory(walk, f"fetch at gVA {address:#x}")
        if spa & 7 or not self.state.image.in_data(spa) or self.state.memory.words[spa >> 3] != tag(spa):
            raise UsageError(f"fetch at gVA {address:#x} reaches sPA {spa:#x}, where there is no code that returns")
        return spa >> 3

    def _own_memory(self, walk: Walk, what: str) -> int:
        assert isinstance(walk.outcome, Reached)
        spa = walk.outcome.spa
        if not self.state.image.in_data(spa) and not self.state.image.in_arena(spa):
            raise UsageError(f"{what} reaches sPA {spa:#x}, which is no page of tables or data")
        return spa

    def _must_be_fresh(self, address: int) -> None:
        """Where L2 has changed a table, a translation may be old or new until it is flushed."""
        page = address >> 12
        if self.fresh is not None and page not in self.fresh and page not in self.state.tables:
            raise UsageError(f"L2 wrote a table before this access of {address:#x}: flush first, by invlpg of that "
                             "page or wrcr3; more than one outcome is permitted until then")

    def _invlpg(self, address: int) -> None:
        """The page at `address` is fresh, all of it if it is a large one (section 5.5.3)."""
        fmt = self.paging.guest
        if self.fresh is None or fmt is None:
            return
        walk = translate(self.paging, self.state.memory.words, address, _READ[0])
        read = [step for step in walk.steps if step.dimension == GUEST]
        shift = next((level.shift for level in fmt.levels if read and level.name == read[-1].level
                      and read[-1].entry & P and read[-1].entry & level.leaf), 12)
        first = address >> shift << shift - 12
        self.fresh.update(range(first, first + (1 << shift - 12)))

    def register(self, kind: str, address: int, value: int) -> int:
        """Reads and writes of L2's own registers."""
        regs, vmcb = self.regs, self.state.vmcb
        if kind in ("rdpkru", "wrpkru"):
            return self._pkru(kind, value)
        if kind in stub.DESCRIPTOR_READS:
            return vmcb[stub.DESCRIPTOR_READS[kind]] & self.mask
        if kind in stub.LOADED_LIMITS:
            name, limit = stub.LOADED_LIMITS[kind]
            vmcb[f"{name}.base"], vmcb[f"{name}.limit"] = value, limit
            return value
        if kind in stub.SEGMENT_LOADS:
            return self._load_segment(stub.SEGMENT_LOADS[kind], value)
        what = kind[2:]
        if what == "cr8":
            return self._cr8(kind, value)
        if what == "seg" and not self.state.mode.long:
            return vmcb["cs.selector"] << 16 | vmcb["es.selector"]
        if what == "seg":
            return sum(vmcb[f"{s}.selector"] << 16 * n for n, s in enumerate(("es", "cs", "ss", "ds")))
        if what == "flags":
            if kind == "wrflags":
                regs.rflags = value | RFLAGS.ONE
                self.paging = self.state.paging(regs)
                if vmrun.virtual_interrupt(vmcb, value) is not None:
                    raise UsageError("a virtual interrupt that L2 lets in itself is not modelled")
                return value
            return regs.rflags & ~RFLAGS.STATUS | stub.FLAGS
        if kind == "invlpg":
            self._invlpg(address)
            return value
        if what == "msr" and address not in stub.MSR_FIELDS:
            raise UsageError(f"L1 must intercept MSR {address:#x}: it is not modelled")
        if what != "msr" and not hasattr(regs, what):
            raise UsageError(f"L1 must intercept {kind.upper()}: what it does inside of L2 is not modelled")
        name = stub.MSR_FIELDS[address] if what == "msr" else what
        own = hasattr(regs, name)
        if kind.startswith("rd"):
            return (int(getattr(regs, name)) if own else vmcb[name]) & self.mask
        if own:
            self.write_register(name, value)
        else:
            vmcb[name] = value
        return value

    def write_register(self, name: str, value: int) -> None:
        """L2 writes a register that decides over translation."""
        regs, vmcb = self.regs, self.state.vmcb
        lacking = {"cr4": cr4_mbz, "efer": efer_mbz}.get(name)
        if lacking is not None and lacking(value, self.state.cpu):
            raise UsageError(f"L2 cannot write {value:#x} to {name.upper()}: this CPU has no such feature")
        keys_on = name == "cr4" and value ^ regs.cr4 == value & CR4.PKE
        if name == "cr4" and (value ^ regs.cr4) & _FLUSHING:
            self.fresh = None
        setattr(regs, name, value)
        if name == "cr3":
            self.fresh = None
        if name == "g_pat" and not vmcb["np_control"] & NP_ENABLE:
            self.state.host.pat = value  # 15.25.4: without nested paging L1 and L2 have one PAT
        before, self.paging = self.paging, self.state.paging(regs)
        self.caching = vmrun.caching(regs, vmcb, self.state.host)
        if keys_on and self.state.quirks.has(PKE_NOT_FLUSHED):
            self.paging = self.paging._replace(pkru=before.pkru)
        self.enter_again()

    def _cr8(self, kind: str, value: int) -> int:
        """CR8 is V_TPR with V_INTR_MASKING, and without it L1's own, which writes go to beside V_TPR
        (section 15.21.2)."""
        vmcb = self.state.vmcb
        own = not vmcb["v_intr"] & VIntr.MASKING
        if own and self.state.host_mode.narrow:
            raise UsageError("without V_INTR_MASKING CR8 is L1's, which an L1 in a 32-bit mode cannot see")
        if kind == "wrcr8":
            vmcb["v_intr"] = vmcb["v_intr"] & ~VIntr.TPR | value & 0xF
            if own:
                self.host["cr8"] = value & 0xF
            return value
        return self.host.get("cr8", 0) if own else vmcb["v_intr"] & 0xF

    def _load_segment(self, name: str, selector: int) -> int:
        """MOV to ES or DS: a null selector, or one of a data segment in L2's GDT (section 4.8.1)."""
        vmcb = self.state.vmcb
        vmcb[f"{name}.selector"] = selector
        if not selector & ~3:
            # 15.5.1: a null segment is one with P=0; what else its attributes, limit and base say is not defined
            vmcb[f"{name}.attrib"] = 0
            self.undefined |= {f"{name}.attrib": ~SEGMENT_P, f"{name}.limit": WHOLE, f"{name}.base": WHOLE}
            return selector
        walk = self.access(vmcb["gdtr.base"] + (selector & ~7), _IMPLICIT_READ)
        if not isinstance(walk.outcome, Reached):
            raise UsageError(f"L2 cannot reach the descriptor of {selector:#x}: {walk.outcome}")
        entry = self.state.memory.words[walk.outcome.spa >> 3]
        if name != "es" or self.regs.cpl or entry >> 40 & 0xF9 != 0x91 or selector > vmcb["gdtr.limit"]:
            raise UsageError(f"{name} = {selector:#x}: L2 can load ES with an accessed data segment, at CPL 0")
        limit = entry & 0xFFFF | entry >> 32 & 0xF_0000
        vmcb[f"{name}.attrib"] = entry >> 40 & 0xFF | entry >> 44 & 0xF00
        vmcb[f"{name}.limit"] = limit << 12 | 0xFFF if entry >> 55 & 1 else limit
        vmcb[f"{name}.base"] = entry >> 16 & 0xFF_FFFF | entry >> 32 & 0xFF00_0000
        return selector

    def _pkru(self, kind: str, value: int) -> int:
        """RDPKRU and WRPKRU (section 5.6.7): PKRU is one for L1 and L2."""
        if not self.regs.cr4 & CR4.PKE:
            self.exception(Event.exception(events.UD))
        host = self.state.host
        if kind == "wrpkru":
            host.pkru = value & 0xFFFF_FFFF
            self.paging = self.state.paging(self.regs)
            return value
        return host.pkru

    # --- memory and faults ------------------------------------------------------------------------

    def access(self, gva: int, access: Access) -> Walk:
        """Translate, and write accessed and dirty bits back."""
        walk = self.walk(gva, access)
        self._note(walk)
        return walk

    def walk(self, gva: int, access: Access) -> Walk:
        """Translate, and change nothing."""
        quirks = self.state.quirks
        if quirks:
            access = quirks.on_access(access, self.regs.cpl)
        try:
            walk = translate(self.paging, self.state.memory.words, gva, access)
        except IndexError:
            raise UsageError(f"the walk of gVA {gva:#x} leaves L1's memory") from None
        if quirks:
            walk = quirks.on_walk(self.paging, walk)
        self.out.accesses.append((self.paging, access, walk))
        return walk

    def _note(self, walk: Walk, other_faulted: bool = False) -> None:
        """Write the accessed and dirty bits of `walk` back."""
        state, out = self.state, self.out
        faulted = not isinstance(walk.outcome, Reached)
        required, permitted = dirty.resolve(walk.updates, faulted, state.liberties, other_faulted)
        for address, old in dirty.write_back(state.memory.words, required).items():
            state.changed(out, address, old)
        for address, bits, _ in permitted:
            quadword = address & ~7  # two entries of 32-bit paging are one
            state.changed(out, quadword, state.memory.words[quadword >> 3])
            out.permitted[quadword] = out.permitted.get(quadword, 0) | bits << (address & 4) * 8

    def fault(self, walk: Walk) -> None:
        """A walk faulted: #NPF leaves L2; an exception leaves it if L1 intercepts it, and goes through
        L2's own IDT if not."""
        match walk.outcome:
            case NestedPageFault(code, gpa):
                raise Leave(ExitCode.NPF, code, gpa, walk, walk.rule)
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
        return bool(self.state.vmcb["intercept_exceptions"] >> vector & 1)

    def exception(self, event: Event, info2: int = 0, walk: Walk | None = None) -> None:
        """An exception of L2: an exit, or its own handler's business."""
        own = "exit.privileged" if event.vector == events.GP else "exit.exception"
        rule = walk.rule if walk is not None else own
        if self.intercepted(event.vector):
            raise Leave(ExitCode.EXCEPTION + event.vector, event.error or 0, info2, walk, rule)
        self.deliver(event, walk)

    def deliver(self, event: Event, walk: Walk | None = None, next_rip: int | None = None) -> None:
        """See harness.lockstep.delivery."""
        deliver(self, event, walk, next_rip)
