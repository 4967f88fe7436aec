"""Rules of the model changed one at a time, for tests/quality/test_model_mutants.py.

VMRUN, #VMEXIT and intercepts; several VMCBs, and L1's second processor.
"""

from __future__ import annotations

from typing import Final

from tests.quality.mutants import Mutant
from tests.scenario.texts import one, run

ALL: Final = run("read a; write a; fetch a+8")
SECOND: Final = 'entry = "guest.a.pte"\nframe = "b"\nby = "second"'

MUTANTS: Final[dict[str, Mutant]] = {
    # VMRUN and #VMEXIT
    "ASID 0 accepted": Mutant(
        "model.consistency", 'lambda it: not it.vmcb["asid"]', "lambda it: False",
        (one('vmcb = "asid"\nvalue = 0', ALL),), "C3", "outcome"),
    "VMRUN intercept not needed": Mutant(
        "model.consistency", 'lambda it: not it.vmcb["intercept_misc2"] & MISC2_VMRUN', "lambda it: False",
        (one('vmcb = "intercept_misc2"\nclear = ["bit0"]', ALL),), "C3", "outcome"),
    "CR0.NW without CD accepted": Mutant(
        "model.consistency", "lambda it: it.cr0 & CR0.NW and not it.cr0 & CR0.CD", "lambda it: False",
        (one('vmcb = "cr0"\nset = ["nw"]', ALL),), "C3", "outcome"),
    "EFER.SVME not needed": Mutant(
        "model.consistency", "lambda it: not it.efer & EFER.SVME", "lambda it: False",
        (one('vmcb = "efer"\nclear = ["svme"]', ALL),), "C3", "outcome"),
    "any ASID but 5 refused": Mutant(
        "model.consistency", 'lambda it: not it.vmcb["asid"]', 'lambda it: it.vmcb["asid"] == 5', (one(ALL),), "C3",
        "outcome"),
    **{
        f"{rule} not checked": Mutant(
            "model.consistency", f'Check("{rule}", ', f'Check("{rule}", lambda it: False) if True else Check("", ',
            (f"vmrun/{file}",), "C3", "outcome")
        for rule, file in {
            "vmrun.cr0-high": "cr0-high", "vmrun.cr3-mbz": "cr3-mbz", "vmrun.cr4-mbz": "cr4-mbz",
            "vmrun.dr6-high": "dr6-high", "vmrun.dr7-high": "dr7-high", "vmrun.efer-mbz": "efer-reserved",
            "vmrun.long-pae": "long-pae", "vmrun.long-pe": "long-pe", "vmrun.cs-l-d": "cs-l-d",
            "vmrun.permission-maps": "iopm",
        }.items()
    },
    "NMI taken for an exception": Mutant(
        "model.consistency", "vector not in _EXCEPTIONS", "vector not in _EXCEPTIONS | {2}",
        (one('vmcb = "eventinj"\nvalue = 0x80000302', ALL),), "C3", "outcome"),
    "host paging needed without nested paging too": Mutant(
        "model.consistency", "lambda it: it.nested and not it.host.cr0", "lambda it: not it.host.cr0",
        ("vmrun/host-paging-unused",), "C3", "outcome"),
    "low bits of nCR3 are an address": Mutant(
        "model.consistency", 'it.nested and it.beyond(it.vmcb["ncr3"])', 'it.nested and it.vmcb["ncr3"] & 7',
        ("vmrun/ncr3-ignored",), "C3", "outcome"),
    "bases saved as they are": Mutant(
        "lockstep.twin", "vmrun.canonicalize(vmcb, self.cpu)", "pass", ("state/canonical-bases",), "C3", "es.base"),
    "the interrupt shadow lasts": Mutant(
        "lockstep.twin", "if l2.begun:", "if False:", ("state/interrupt-shadow",), "C3", "interrupt_shadow"),
    "V_IRQ stays when it is taken": Mutant(
        "lockstep.l2", 'vmcb["v_intr"] &= ~VIntr.IRQ', "pass", ("state/v-irq-taken",), "C3", "v_intr"),
    "virtual interrupts ignore V_TPR": Mutant(
        "model.vmrun", "(above or control", "(True or control", ("state/v-irq-masked",), "C1", "outcome"),
    "virtual interrupts ignore IF": Mutant(
        "model.vmrun", "control & VIntr.IRQ and rflags & RFLAGS.IF and", "control & VIntr.IRQ and",
        ("state/v-irq-pending",), "C1", "outcome"),
    "CR8 is V_TPR always": Mutant(
        "lockstep.registers", 'own = not vmcb["v_intr"] & VIntr.MASKING\n    if', "own = False\n    if",
        ("state/cr8-not-masked",),
        "C3", "rdcr8"),
    "CR8 of L1 is not L2's to write": Mutant(
        "lockstep.registers", 'l2.host["cr8"] = value & 0xF', "pass", ("state/cr8-not-masked",), "C3", "l1.cr8"),
    # intercepts
    "one exit for VMLOAD and VMSAVE": Mutant(
        "lockstep.instructions", "code = INTERCEPTS[kind].exitcode",
        'code = INTERCEPTS[kind.replace("save", "load")].exitcode', ("state/svm-instructions-alone",), "C1", "outcome"),
    "intercepts of reads and writes of CRs swapped": Mutant(
        "model.intercepts", "return bool(vmcb[field] >> bit & 1)",
        'return bool(vmcb[field] >> (bit ^ 16 if field == "intercept_cr" else bit) & 1)', ("intercepts/cr-bits",), "C1",
        "outcome"),
    "intercepts of reads and writes of DRs swapped": Mutant(
        "model.intercepts", "return bool(vmcb[field] >> bit & 1)",
        'return bool(vmcb[field] >> (bit ^ 16 if field == "intercept_dr" else bit) & 1)', ("intercepts/dr-bits",), "C1",
        "outcome"),
    "an intercept bit's neighbour asks for it": Mutant(
        "model.intercepts", "return bool(vmcb[field] >> bit & 1)", "return bool(vmcb[field] >> bit & 3)",
        ("intercepts/misc1-bits", "intercepts/misc2-bits"), "C1", "outcome"),
    "WBINVD is not intercepted": Mutant(
        "model.intercepts", "return bool(vmcb[field] >> bit & 1)",
        'return bool(vmcb[field] >> bit & 1) and name != "wbinvd"', ("intercepts/misc2-bits",), "C1", "outcome"),
    "the intercept of virtual interrupts is not looked at": Mutant(
        "lockstep.l2", 'if asks(vmcb, "vintr"):', "if False:", ("state/v-irq-intercepted",), "C1", "outcome"),
    "STI casts no shadow": Mutant(
        "lockstep.instructions", "shadow = not regs.rflags & RFLAGS.IF", "shadow = False", ("state/shadow-saved",),
        "C3", "interrupt_shadow"),
    "TF at VMRUN has no trap": Mutant(
        "lockstep.twin", "if l2.regs.rflags & RFLAGS.TF:", "if False:", ("events/single-step",), "C1", "outcome"),
    "DR6 does not have the cause of a trap": Mutant(
        "lockstep.l2", "self.regs.dr6 |= DR6_BS", "self.regs.dr6 |= 0", ("events/single-step",), "C3", "dr6"),
    "the intercept of PUSHF comes behind its push": Mutant(
        "lockstep.instructions", 'if kind == "wrflags" else 0)', "if True else 0)", ("intercepts/all",), "C3", "rsp"),
    "the selective intercept of CR0 looks at TS": Mutant(
        "model.intercepts", "& ~(CR0.TS | CR0.MP)", "& ~CR0.MP", ("intercepts/selective",), "C1", "outcome"),
    "the selective intercept of CR0 looks at no bits": Mutant(
        "model.intercepts", "(old ^ new) & ~(CR0.TS | CR0.MP)", "1", ("intercepts/selective",), "C1", "outcome"),
    "CLTS is intercepted by its bits": Mutant(
        "lockstep.instructions", 'if not asked and kind in ("wrcr0", "lmsw")',
        'if not asked and kind in ("wrcr0", "lmsw", "clts")', ("intercepts/selective",), "C1", "outcome"),
    "MSR map: reads for writes": Mutant(
        "model.intercepts", "% 4 * 2 + write", "% 4 * 2 + (not write)", ("intercepts/msr",), "C1", "outcome"),
    "MSR map: one bit for both": Mutant(
        "model.intercepts", "% 4 * 2 + write", "% 4 * 2", ("intercepts/msr",), "C1", "outcome"),
    "MSR map: the second range where the first is": Mutant(
        "model.intercepts", "(0xC000_0000, 0x800)", "(0xC000_0000, 0)", ("intercepts/msr",), "C1", "outcome"),
    "MSR map: its address cut to 32 bits": Mutant(
        "model.intercepts", '_bit(ram, vmcb["msrpm_base"],', '_bit(ram, vmcb["msrpm_base"] & 0xFFFF_FFFF,',
        ("intercepts/msr",), "C1", "outcome"),
    "MSR: EXITINFO1 is 0 for writes": Mutant(
        "lockstep.instructions", 'info1 = int(kind == "wrmsr")', "info1 = 0", ("intercepts/msr",), "C3", "exitinfo1"),
    "ports: the first byte's bit alone": Mutant(
        "model.intercepts", "range(number, number + size)", "range(number, number + 1)", ("intercepts/ports",), "C1",
        "outcome"),
    "ports: bits of the same byte of the map only": Mutant(
        "model.intercepts", "range(number, number + size)", "range(number, min(number + size, (number | 7) + 1))",
        ("intercepts/ports",), "C1", "outcome"),
    "ports: one byte too many": Mutant(
        "model.intercepts", "range(number, number + size)", "range(number, number + size + 1)", ("intercepts/ports",),
        "C1", "outcome"),
    "ports: the map's address cut to 32 bits": Mutant(
        "model.intercepts", 'base = vmcb["iopm_base"]', 'base = vmcb["iopm_base"] & 0xFFFF_FFFF', ("intercepts/ports",),
        "C1", "outcome"),
    "ports: IN for OUT in EXITINFO1": Mutant(
        "model.intercepts", "| size << 4 | read", "| size << 4 | (not read)", ("intercepts/ports",), "C3", "exitinfo1"),
    "ports: no operand size": Mutant(
        "model.intercepts", "| size << 4 | read", "| read", ("intercepts/ports",), "C3", "exitinfo1"),
    "ports: EXITINFO2 is RIP": Mutant(
        "lockstep.instructions", "info2 = _next_rip(l2, kind, size)", "info2 = regs.rip", ("intercepts/ports",), "C3",
        "exitinfo2"),
    "TSC_OFFSET ignored": Mutant(
        "lockstep.instructions", 'return vmcb["tsc_offset"]', "return 0", ("intercepts/tsc-offset",), "C3",
        "rdtsc"),
    "VMMCALL that is not intercepted does nothing": Mutant(
        "lockstep.instructions", 'case "vmmcall" | "undefined" |', 'case "undefined" |', ("intercepts/vmmcall",), "C1",
        "outcome"),
    "RSM is privileged": Mutant(
        "lockstep.instructions", "kind in stub.UNPRIVILEGED or", 'kind in stub.UNPRIVILEGED - {"rsm"} or',
        ("intercepts/rsm",), "C1", "outcome"),
    "RSM does something outside of SMM": Mutant(
        "lockstep.instructions", '"undefined" | "rsm" |', '"undefined" |', ("intercepts/rsm",), "C1", "outcome"),
    "RDPMC: CR4.PCE ignored": Mutant(
        "lockstep.instructions", 'kind == "rdpmc" and l2.regs.cr4 & CR4.PCE', "False", ("intercepts/rdpmc-user",), "C1",
        "outcome"),
    "INT n meets exception intercepts": Mutant(
        "lockstep.instructions", "l2.deliver(Event(_INT_VECTOR, events.SOFTWARE), next_rip",
        "l2.exception(Event(_INT_VECTOR)), l2.deliver(Event(_INT_VECTOR, events.SOFTWARE), next_rip",
        ("intercepts/exceptions",), "C1", "outcome"),
    # several VMCBs, and L1's second processor
    "one VMCB for all": Mutant(
        "lockstep.twin", "if step.a != self.vmcb.address:", "if False:", ("state/two-vmcbs",), "C3", ""),
    "what the second processor writes is seen at once": Mutant(
        "lockstep.l2", "self.state.tlb.add(Wrote(at, before))", "pass",
        (one(SECOND, run("read a; remote; read a+8")),), "C1", "value"),
    "an NMI is an INTR": Mutant(
        "lockstep.delivery", "raise Leave(ExitCode.NMI,", "raise Leave(ExitCode.NMI - 1,",
        (one('vmcb = "intercept_misc1"\nset = ["bit1"]', SECOND, run("read a; remotenmi; read a+8")),), "C1",
        "outcome", 2),
    "the second processor writes nothing": Mutant(
        "lockstep.delivery", "for step in l2.state.remote:", "for step in ():",
        (one(SECOND, run("read a; remote; invlpg a; read a+8")),), "C2", "entry"),
    "ES keeps its base": Mutant(
        "lockstep.registers", 'vmcb[f"{name}.base"] = entry', "entry = entry", ("state/load-descriptor",), "C3",
        "es.base"),
    "ES keeps its limit": Mutant(
        "lockstep.registers", "limit << 12 | 0xFFF if entry >> 55 & 1 else limit", "0xFFFF_FFFF",
        ("state/load-descriptor",), "C3", "es.limit"),
    "RAX not saved": Mutant(
        "model.vmrun", "if new != old and", 'if name != "rax" and new != old and',
        (one(run("read a")),), "C3", "rax"),
    "CR2 written by an intercepted #PF": Mutant(
        "lockstep.l2", "if not self.intercepted(events.PF):", "if True:", ("faults/cr2-kept",), "C3", "cr2"),
    "EXITINTINFO kept from the last exit": Mutant(
        "lockstep.twin", "leave.event.exitintinfo if leave.event is not None else 0", "1 << 31 | 0x30E",
        (one(run("read a")),), "C3", "exitintinfo"),
    "DR6 of L1 restored": Mutant(
        "lockstep.twin", '"dr6": l2.regs.dr6', '"dr6": 0xFFFF4FF0', (one(run("read a")),), "C3", "l1.dr6"),
}
