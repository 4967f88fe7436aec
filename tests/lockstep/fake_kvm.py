"""The trace of a KVM that is not there: what Linux 6.1 does with its MMU contexts, written down from its source
(arch/x86/kvm, svm/nested.c and mmu/mmu.c) and not from the model, around the VMRUNs of a fake machine.

A fault is planted by changing the events (`change`) before the checker sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness.errors import MachineLost
from harness.lockstep.contexts import Contexts
from harness.lockstep.driver import Lockstep
from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.model.mmu_context import Capability
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmcb import ExitCode
from harness.scenario.program import Program
from harness.wire.image import Image
from harness.wire.program import Step
from harness.wire.trace import Entry, Event, InUse, NewPage, Vmexit, Vmrun
from tests.lockstep.fake import FakeMachine, Plant

Change = Callable[[list[Event]], list[Event]]
_HPA = 0x7C92_7000
USUAL = Capability(tdp_usable=True, root_level=4)


def cpu_role(cr0: int, cr4: int, efer: int, guest_mode: int) -> dict[str, int]:
    """kvm_calc_cpu_role()."""
    role = dict.fromkeys(("level", "has_4_byte_gpte", "direct", "efer_nx", "cr0_wp", "smep_andnot_wp", "smap_andnot_wp",
                          "passthrough"), 0)
    role |= {"access": 7, "access_all": 1, "guest_mode": guest_mode}
    if not cr0 & CR0.PG:
        return role | {"direct": 1}
    wp = int(bool(cr0 & CR0.WP))
    role |= {"efer_nx": int(bool(efer & EFER.NXE)), "cr0_wp": wp, "has_4_byte_gpte": int(not cr4 & CR4.PAE),
             "smep_andnot_wp": int(bool(cr4 & CR4.SMEP) and not wp),
             "smap_andnot_wp": int(bool(cr4 & CR4.SMAP) and not wp)}
    if efer & EFER.LMA:
        return role | {"level": 5 if cr4 & CR4.LA57 else 4}
    return role | {"level": 3 if cr4 & CR4.PAE else 2}


class FakeKvm(Plant):
    """See harness.lockstep.contexts.Trace. Each VMRUN of L2 is interrupted `handled` times by exits that KVM
    handles itself."""

    def __init__(
        self, capability: Capability = USUAL, change: Change = lambda events: events, handled: int = 1
    ) -> None:
        self.capability = capability
        self.events: list[Event] = []
        self._change = change
        self._handled = handled
        self._time = 0
        self._roots: set[tuple[int, int]] = set()

    def poll(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        twin = fake.twin
        vmcb, host = twin.vmcb, twin.host_at_vmrun()
        long = vmcb["efer"] & EFER.LME and vmcb["cr0"] & CR0.PG
        self._l1 = host.cr0, host.cr4, host.efer
        self._l2 = vmcb["cr0"], vmcb["cr4"], vmcb["efer"] & ~EFER.LMA | (EFER.LMA if long else 0)
        self._vmcb = vmcb.address, vmcb["rip"], vmcb["np_control"] & 1, vmcb["ncr3"], vmcb["cr3"]

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        if out.refused:
            return  # nested_vmcb_check_controls() fails before anything is traced
        address, rip, np, ncr3, cr3 = self._vmcb
        l1, l2 = self._context(0, 0, 0), self._context(1, np, ncr3 if np else cr3)
        new: list[Event] = [self._entry(l1), self._entry(l1)]
        new.append(Vmrun(self._tick(), address, rip, bool(np), ncr3 if np else cr3))
        if np and self.capability.tdp_usable and (ncr3, l2.walked["level"]) not in self._roots:
            self._roots.add((ncr3, l2.walked["level"]))
            new.append(NewPage(self._tick(), ncr3 >> 12, dict(l2.role) | {"level": l2.walked["level"]}, True))
        new += [self._entry(l2) for _ in range(1 + self._handled)]
        code = out.exitcode & 0xFFFF_FFFF
        new.append(Vmexit(self._tick(), code, 0, 0))
        new.append(self._entry(l1))
        assert code != ExitCode.INVALID
        self.events += self._change(new)

    def _context(self, guest_mode: int, np: int, root: int) -> InUse:
        tdp = self.capability.tdp_usable
        level, hpa = self.capability.root_level, _HPA + 0x1000 * guest_mode
        regs = self._l2 if guest_mode else self._l1
        if np and tdp:  # nested_svm_init_mmu_context(): CR0 is X86_CR0_PG alone
            walked = cpu_role(CR0.PG, self._l1[1], self._l1[2], 1)
            through = int(level == 5 and walked["level"] == 4)
            role = walked | {"level": level, "passthrough": through}
            return InUse(True, "guest_mmu", "nested_mmu", root, hpa, hpa, role, walked)
        walked = cpu_role(*regs, guest_mode)
        if tdp:  # kvm_calc_tdp_mmu_root_page_role()
            role = cpu_role(CR0.PG | CR0.WP, CR4.PAE, EFER.NXE, guest_mode) | {"level": level, "direct": 1}
            root = 0
        else:  # kvm_init_shadow_mmu()
            role = walked | {"level": max(walked["level"], 3), "efer_nx": 1}
        return InUse(bool(guest_mode), "root_mmu", "root_mmu", root, hpa, hpa, role, walked)

    def _entry(self, context: InUse) -> Entry:
        return Entry(self._tick(), context)

    def _tick(self) -> int:
        self._time += 1000
        return self._time


def run_traced(
    image: Image, cpu: Cpu, twin: Twin, programs: Iterable[Program], kvm: FakeKvm, strict: bool = True
) -> list[Result]:
    """All results of `programs` on a fake machine with `kvm` under it."""
    fake = FakeMachine(image, cpu, kvm, twin.liberties)

    def lost(reason: str) -> MachineLost:
        return fake.lost(reason)

    try:
        contexts = Contexts(kvm, image.ram_end, lost)
        return list(Lockstep(fake, fake.channel, twin, strict, contexts=contexts).run(programs))
    finally:
        fake.close()
