"""The program run on the model: for each VMRUN of a RUN op a prediction."""

from __future__ import annotations

from contextlib import suppress

from harness.errors import UsageError
from harness.lockstep import stub
from harness.lockstep.active import Active
from harness.lockstep.delivery import Leave, physical
from harness.lockstep.hazards import OTHER_PAGING
from harness.lockstep.l2 import L2
from harness.lockstep.prediction import WHOLE, Prediction
from harness.lockstep.quirks import (
    CR0_CD_CLEARED,
    ERROR_CODE_WITHOUT_EV,
    FIVE_LEVELS_KEPT,
    INTERRUPT_AS_EXCEPTION,
    NESTED_FORMAT_BY_L2,
    NESTED_PDPTE_SHUTDOWN,
    PDE_WRITES_MISSED,
    SOFTWARE_EVENT_LOST,
    SOFTWARE_EVENT_RIP,
    V_IRQ_KEPT,
    V_TPR_OVERWRITTEN,
    VC_DROPPED,
    VMRUN_WANTS_PAGING,
)
from harness.lockstep.state import PENDING, State
from harness.model import consistency, events, speculation, vmrun
from harness.model.access import ErrorCode
from harness.model.events import EVENT_VALID, Event
from harness.model.intercepts import INTERCEPTS
from harness.model.registers import CR0, CR4, EFER, RFLAGS
from harness.model.tlb_events import CONTROL, Left
from harness.model.vmcb import NP_ENABLE, SAVE, STATE, ExitCode, Group, VIntr, Vmcb
from harness.model.vmrun import Host
from harness.wire.image import PAGE
from harness.wire.layout import CONTROL_BYTES, SAVE_BYTES, VMRUN_RAISED
from harness.wire.program import Step
from harness.wire.records import Record

_RESUMED = Group("cpl", "rflags", "rip", "rsp", *(f"{s}.{p}" for s in ("es", "cs", "ss", "ds")
                                                  for p in ("selector", "attrib", "limit", "base")))
"""What L1 puts back into the VMCB before it re-enters L2 behind a fault (guests/l1/main.c)."""

_ALWAYS_WITH_ERROR_CODE = events.WITH_ERROR_CODE - {21, 29, 30}
"""Those that a machine which goes by the vector knows of."""

_NONE = Active()
_UNCACHED = CR0.CD | CR0.NW
_BOTH_INFO = ("exitinfo1", "exitinfo2")
_UNDEFINED = dict.fromkeys((one.exitcode for one in INTERCEPTS.values()), _BOTH_INFO) | {
    ExitCode.EXCEPTION + vector: ("exitinfo2",) if vector in events.WITH_ERROR_CODE else _BOTH_INFO
    for vector in range(32) if vector != events.PF
} | {INTERCEPTS["msr"].exitcode: ("exitinfo2",), INTERCEPTS["ioio"].exitcode: (),
     ExitCode.NMI: _BOTH_INFO}
"""Fields in which no value is named for the exit (sections 15.6 and 15.12), by exit code."""


class Twin(State):
    """The model's side of a program. `last` is the prediction that was made last, or as far as it came."""

    last: Prediction

    def vmcb_bytes(self) -> tuple[bytes, bytes]:
        """Control area and save area as a record shows them."""
        start = self.vmcb.address
        memory = self.memory.bytes
        return (
            bytes(memory[start : start + CONTROL_BYTES]),
            bytes(memory[start + SAVE : start + SAVE + SAVE_BYTES]),
        )

    def begin(self, step: Step) -> dict[str, int]:
        """What to hand to `resume` later in this RUN op."""
        self.remote, self.queued = self.queued, []
        if step.a != self.vmcb.address:
            self.vmcb = Vmcb(self.memory, step.a)
        return _RESUMED.read(self.vmcb) | {"rip": step.b}

    def resume(self, begun: dict[str, int]) -> None:
        """L1 gets the VMCB ready to re-enter L2 behind the probe that faulted."""
        for (name, value), now in zip(begun.items(), _RESUMED.values(self.vmcb), strict=True):
            if now != value:
                self.vmcb[name] = value

    def predict(self, step: Step, first: int) -> Prediction:
        """One VMRUN of a RUN op, from probe `first` on. The model's own state moves along; after a UsageError
        memory is as it was."""
        out = self.last = Prediction(first_probe=first, next_probe=first)
        self._before = self.tlb.mark(), dict(self.outside), self.host.pkru, self.host.pat
        vmcb = self.vmcb
        if self.host.gif and self.outside.keys() & PENDING:
            raise UsageError("L1 sets GIF while something is pending for it, and takes it itself")
        if not self.host_at_vmrun().cr0 & CR0.PG and self.quirks.has(VMRUN_WANTS_PAGING):
            return self._raise(out)
        if vmcb["np_control"] & NP_ENABLE and not self.cpu.npt:
            raise UsageError("what NP_ENABLE does is not defined on a CPU that has no nested paging")
        if vmcb["v_intr"] & VIntr.GIF_ENABLE and not self.cpu.vgif:
            raise UsageError("this CPU has no virtual GIF")
        out.refused = self._refusal()
        if out.refused:
            self._refuse(out)
            return out
        vmrun.canonicalize(vmcb, self.cpu)
        if self._taken_for_exception():
            return self._refuse_halfway(out, step)
        event = vmcb["eventinj"]
        injected = Event.from_eventinj(event)
        if injected is not None and self._pushes_all_the_same(injected):
            injected = injected._replace(error=event >> 32)
        vmcb["eventinj"] = 0  # at the latest by the #VMEXIT (volume 3, VMRUN)
        self.tlb.vmrun(self._tlb_control(), vmcb["asid"])
        l2 = L2(self, out, step)
        if l2.regs.cr0 & _UNCACHED and self.quirks.has(CR0_CD_CLEARED):
            l2.regs.cr0 &= ~_UNCACHED
        if self._no_root():
            vmcb["eventinj"] = event  # L2 was never entered
            self._leave(out, l2, Leave(ExitCode.SHUTDOWN, rule="nested.reserved", event=injected))
            return out
        try:
            if injected is not None and not self._lost(injected):
                l2.injected = injected
                self._inject(l2, injected)
            physical(l2)
            l2.interrupt()
            l2.enter()
            if l2.regs.rflags & RFLAGS.TF:
                l2.single_step("next_entry")
            for index in range(first, len(step.probes)):
                out.next_probe = index
                out.results[index] = l2.do(step.probes[index], index)
            out.next_probe = len(step.probes)
            l2.end()
        except Leave as leave:
            self._share_tpr(l2)
            if "interrupt" in self.outside and self.saw_v_irq() and self.quirks.has(V_IRQ_KEPT):
                self.vmcb["v_intr"] |= VIntr.IRQ  # the hypervisor's own, by which it waits for L1's IF
            self._leave(out, l2, leave)
        except UsageError:
            self._undo(out)
            raise
        return out

    def _share_tpr(self, l2: L2) -> None:
        """By a quirk, CR8 lies in V_TPR also where it is L1's own."""
        control, cr8 = self.vmcb["v_intr"], l2.host.get("cr8", self.host.cr8)
        if not control & VIntr.MASKING and control & VIntr.TPR != cr8 and self.quirks.has(V_TPR_OVERWRITTEN):
            self.vmcb["v_intr"] = control & ~VIntr.TPR | cr8

    def _tlb_control(self) -> int:
        """TLB_CONTROL as this CPU obeys it: without flush by ASID, 3 and 7 are reserved (table 15-9)."""
        control = self.vmcb["tlb_control"]
        return control if control == 1 or "flushbyasid" in self.cpu.features else 0

    def _undo(self, out: Prediction) -> None:
        mark, outside, self.host.pkru, self.host.pat = self._before  # L2 writes the two where L1 has them
        self.tlb.rewind(mark)
        self.outside = dict(outside)
        words = self.memory.words
        for address, old in out.old.items():
            words[address >> 3] = old

    def _refusal(self) -> str:
        """The rule by which this VMRUN is refused, or an empty string."""
        host = self.host_at_vmrun()
        try:
            broken = consistency.violations(self.vmcb, host, self.cpu, self.memory.words)
            return self.quirks.on_refusal(broken, self.vmcb, host)
        except IndexError:
            raise UsageError(f"VMRUN reads PDPEs at {self.vmcb['cr3']:#x}, which is not in L1's memory") from None

    def _no_root(self) -> bool:
        """Whether a quirk makes L2 shut down since a PDPTE of L1's PAE nested table leads out of L1's memory."""
        return self.leads_outside() and self.quirks.has(NESTED_PDPTE_SHUTDOWN)

    def _taken_for_exception(self) -> bool:
        """Whether a quirk makes an exception, of an impossible vector, of the virtual interrupt that is pending."""
        vector = vmrun.virtual_interrupt(self.vmcb, self.vmcb["rflags"], at_priority=True)
        return vector is not None and vector >= 31 and self.quirks.has(INTERRUPT_AS_EXCEPTION)

    def _refuse_halfway(self, out: Prediction, step: Step) -> Prediction:
        """The interrupt's delivery was begun: what it would have changed may have been changed."""
        with suppress(Leave):
            L2(self, out, step).interrupt()
        words = self.memory.words
        for address, old in out.old.items():
            out.permitted[address] = out.permitted.get(address, 0) | words[address >> 3] ^ old
            words[address >> 3] = old
        out.refused = "vmrun.eventinj"
        self._refuse(out)
        return out

    def _lost(self, injected: Event) -> bool:
        """Whether a quirk loses the event; what steps over any instruction misses none, and loses nothing."""
        if injected.kind not in (events.INTERRUPT, events.NMI, events.EXCEPTION, events.SOFTWARE):
            return True
        if (injected.kind, injected.vector) == (events.EXCEPTION, events.VC) and self.quirks.has(VC_DROPPED):
            return True
        steps_over = SOFTWARE_EVENT_RIP in self.quirks.names
        return injected.software and not steps_over and self.quirks.has(SOFTWARE_EVENT_LOST)

    def _pushes_all_the_same(self, injected: Event) -> bool:
        """Whether, by a quirk, an error code is pushed that EV says there is none of."""
        usual = injected.kind == events.EXCEPTION and injected.vector in _ALWAYS_WITH_ERROR_CODE
        return usual and injected.error is None and self.quirks.has(ERROR_CODE_WITHOUT_EV)

    def _inject(self, l2: L2, injected: Event) -> None:
        """What an instruction raises returns to nRIP: without that field it cannot be injected properly (15.20), and
        RIP is all that there is. By a quirk RIP is behind the instruction there while the event is delivered."""
        rip, has_next = l2.regs.rip, "nrips" in self.cpu.features
        if injected.software and not has_next and self.quirks.has(SOFTWARE_EVENT_RIP):
            l2.regs.rip = l2.page + self.stub.labels["next_entry"]
        try:
            l2.deliver(injected, next_rip=self.vmcb["nrip"] if injected.software and has_next else None)
        except Leave as leave:
            if leave.event is not None:
                l2.regs.rip = rip
            raise

    def _raise(self, out: Prediction) -> Prediction:
        """#UD at VMRUN, in L1: nothing happens but that L1 says so."""
        out.exitcode = self.vmcb["exitcode"] = VMRUN_RAISED | events.UD
        out.rule = "vmrun.host-paging"
        out.control, out.save = self.vmcb_bytes()
        out.host = self._host()
        return out

    def _refuse(self, out: Prediction) -> None:
        """#VMEXIT(INVALID): nothing of L2 was run; what is saved is not defined (section 15.6)."""
        out.exitcode, out.rule = ExitCode.INVALID, out.refused
        self.vmcb["exitcode"] = ExitCode.INVALID
        out.control, out.save = self.vmcb_bytes()
        out.host = self._host()
        out.free = dict.fromkeys((*STATE, "exitinfo1", "exitinfo2", "exitintinfo", "nrip", "fetched_count",
                                  "fetched_bytes", "interrupt_shadow", "eventinj"), WHOLE)

    def _leave(self, out: Prediction, l2: L2, leave: Leave) -> None:
        vmcb, code = self.vmcb, leave.code
        if (code == ExitCode.NPF and leave.info1 & ErrorCode.ID and self.kept is not None
                and not self.kept.tells_fetches and self.quirks.has(NESTED_FORMAT_BY_L2)):
            leave.info1 &= ~ErrorCode.ID
        out.exitcode, out.rule, out.paging = code, leave.rule, l2.paging
        if leave.walk is not None:
            out.walks[out.next_probe] = leave.walk
        if not l2.regs.cr0 & CR0.PG and _other_paging(self.host_at_vmrun(), l2.regs.cr4):
            out.perils.add(OTHER_PAGING)
        self.tlb.add(Left())
        vmrun.save(vmcb, l2.regs)
        vmcb["exitcode"], vmcb["exitinfo1"], vmcb["exitinfo2"] = code, leave.info1, leave.info2
        vmcb["exitintinfo"] = leave.event.exitintinfo if leave.event is not None else 0
        if l2.begun:
            vmcb["interrupt_shadow"] = int(l2.in_shadow)  # 15.21.5: over with the first instruction
        undefined = ["fetched_count", "fetched_bytes"]
        undefined += _UNDEFINED.get(code, ())
        if code == ExitCode.SHUTDOWN:
            undefined += [*STATE, "exitintinfo", "nrip", "interrupt_shadow"]  # 15.14.3
        out.free = dict.fromkeys(undefined, WHOLE) | l2.undefined
        if leave.info1 & ErrorCode.ID and code == ExitCode.NPF and not self.host.efer & EFER.NXE:
            # 15.25.6 has I/D for every fetch, and an error code like that of #PF, where it needs NXE or SMEP (8.4.2)
            out.free["exitinfo1"] = ErrorCode.ID
        if code == ExitCode.NPF and l2.paging.gmet and l2.regs.cpl < 3 and not leave.info1 & ErrorCode.ID:
            # 15.25.6: accesses are a user's unless a feature overrides that; of data 15.25.13 does not tell
            out.free["exitinfo1"] = ErrorCode.U if leave.info1 & ErrorCode.FINAL else 0
        out.free["eventinj"] = ~EVENT_VALID  # with V=0 the rest of an event means nothing (15.20, 15.7.2)
        if leave.event is None:
            out.free["exitintinfo"] = ~EVENT_VALID
        elif leave.event.error is None:
            out.free.setdefault("exitintinfo", 0xFFFF_FFFF << 32)  # with EV=0 there is none (15.20)
        elif leave.event.free:
            out.free.setdefault("exitintinfo", leave.event.free << 32)
        if not self.mode.long:
            out.free["rax"] = out.free.get("rax", 0) | ~0xFFFF_FFFF  # legacy mode has no upper halves
        if code == ExitCode.NPF or code & ~0x1F == ExitCode.EXCEPTION:
            # 15.5.1 and 15.7.1 leave open whether a fault saves it set
            out.free["rflags"] = out.free.get("rflags", 0) | RFLAGS.RF
        if "nrips" in self.cpu.features:
            vmcb["nrip"] = l2.regs.rip + leave.length if leave.length else 0
        out.control, out.save = self.vmcb_bytes()
        seen = 0xFFFF_FFFF if self.host_mode.narrow else WHOLE  # an L1 in a 32-bit mode sees no more
        out.regs = stub.CONSTANT | {name: value & seen for name, value in l2.registers.items()}
        out.regs["rbp"] = out.next_probe
        out.host = self._host() | {"dr6": l2.regs.dr6} | l2.host

    def _host(self) -> dict[str, int]:
        """What L1 must find in its own registers behind VMRUN, beside what was in them before it."""
        host = self.host_at_vmrun()
        return {"rax": self.vmcb.address, "cr0": host.cr0, "cr4": host.cr4, "efer": host.efer, "pat": host.pat}

    def predict_again(
        self, out: Prediction, before: bytes, step: Step, quirks: Active = _NONE, seen: Record | None = None,
        ignores: frozenset[str] = frozenset(), search: bool = True,
    ) -> Prediction:
        """The VMRUN of `out` once more; `before` is the VMCB page then, `seen` what came of it where more than one
        course is permitted, among those that there are by a `search` in what a TLB may hold. The machine may have
        `quirks`, and break those rules of the TLB that it `ignores`."""
        self._undo(out)
        self.memory.bytes[self.vmcb.address : self.vmcb.address + PAGE] = before
        if self.kept is not None and ((self.kept.keeps_tables and quirks.has(FIVE_LEVELS_KEPT))
                                      or (self.kept.takes_entries_for_long and quirks.has(PDE_WRITES_MISSED))):
            ignores |= {CONTROL}
        self.seen, self.quirks, self.search = seen, quirks, search
        self.caches = self.caches._replace(ignores=ignores)
        try:
            return self.predict(step, out.first_probe)
        finally:
            self.seen, self.quirks, self.search, self.caches = None, _NONE, False, self.liberties.caches

    def speculate(self, out: Prediction, observed: dict[int, int]) -> bool:
        """Permit, among the changes that were observed, the accessed bits of accesses that L2 never made; whether
        there are any."""
        words, found = self.memory.words, False
        pagings = {id(paging): paging for paging in (out.paging, *(access[0] for access in out.accesses))}
        for paging in filter(None, pagings.values()):
            for address, bits in speculation.may_be_set(paging, words, out.old).items():
                if address in observed and observed[address] & bits & ~words[address >> 3]:
                    out.old.setdefault(address, words[address >> 3])
                    out.permitted[address] = out.permitted.get(address, 0) | bits
                    found = True
        return found

    def adopt(self, out: Prediction, observed: dict[int, int]) -> None:
        """Go on from what the machine did: where a prediction failed, one divergence is enough."""
        words = self.memory.words
        for address, old in out.old.items():
            if address & ~0xFFF in self.watched:
                words[address >> 3] = observed.get(address, old)
        for address, value in observed.items():
            self.touch(address)
            words[address >> 3] = value


def _other_paging(host: Host, cr4: int) -> bool:
    """Whether L1's tables would be walked otherwise with `cr4` in place of its own."""
    legacy = CR4.PAE if host.cr4 & CR4.PAE else CR4.PAE | CR4.PSE
    return bool((host.cr4 ^ cr4) & (CR4.LA57 if host.efer & EFER.LMA else legacy))
