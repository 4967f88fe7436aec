"""A rule of the model is changed, and real guests under QEMU must disagree: with the right check and field.

This shows, rule by rule, that the library and the checks would notice: what is wrong between model and
machine shows whichever of the two it is in. Where stock QEMU itself is known to be wrong, its own
divergences (the same without the change) are set aside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pytest

from harness.lockstep import twin as twin_module
from harness.lockstep.compare import Divergence
from harness.lockstep.driver import Lockstep
from harness.lockstep.result import Result
from harness.machine import tcg
from harness.run import Outcome
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from tests.conftest import LIBRARY
from tests.quality.mutants import plant
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in harness.`module`; `scenarios` are files of the library, or a scenario; a
    divergence of `check` in a field that begins with `field` must come of it."""

    module: str
    old: str
    new: str
    scenarios: tuple[str | Scenario, ...]
    check: str
    field: str
    number: int = 1


NO_NXE: Final = 'vmcb = "efer"\nclear = ["nxe"]'
NO_HOST_NXE: Final = 'host = "efer"\nclear = ["nxe"]'
ALL: Final = run("read a; write a; fetch a+8")
READ: Final = ("first-light",)
SECOND: Final = 'entry = "guest.a.pte"\nframe = "b"\nby = "second"'


def set_bits(entry: str, *bits: str) -> str:
    return f'entry = "{entry}"\nset = {list(bits)}'.replace("'", '"')


def clear_bits(entry: str, *bits: str) -> str:
    return f'entry = "{entry}"\nclear = {list(bits)}'.replace("'", '"')


MUTANTS: Final[dict[str, Mutant]] = {
    # permissions
    "nested U/S ignored": Mutant(
        "model.walk", "if not rights & US:\n            if not paging.gmet:", "if False:\n            if False:",
        ("walk/nested-supervisor",), "C1", "outcome"),
    "nested R/W ignored": Mutant(
        "model.walk", "if access.write and not rights & RW:", "if False:", ("walk/nested-read-only",), "C1",
        "outcome"),
    "nested NX ignored": Mutant(
        "model.walk", "if access.fetch and no_execute & NX:", "if False:", ("walk/nested-no-execute",), "C1",
        "outcome"),
    "guest tables are only read": Mutant(
        "model.walk", "_TABLE_ACCESS: Final = Access(write=True", "_TABLE_ACCESS: Final = Access(write=False",
        (one(clear_bits("nested.pt.pte", "rw"), run("read a")),), "C1", "outcome"),
    "guest tables are supervisor accesses that nested U/S spares": Mutant(
        "model.walk", "if not paging.gmet:\n                raise", "if purpose == FINAL:\n                raise",
        ("walk/table-supervisor",), "C1", "outcome"),
    "only the nested leaf's rights count": Mutant(
        "model.walk", "rights &= entry | granted", "rights = entry | granted", ("walk/nested-read-only",), "C1",
        "outcome"),
    "only the guest leaf's rights count": Mutant(
        "model.walk", "rights &= entry | granted", "rights = entry | granted", ("walk/guest-read-only",), "C1",
        "outcome", 2),
    "guest U/S ignored": Mutant(
        "model.walk", "    elif user:\n        if not rights & US:", "    elif user:\n        if False:",
        ("walk/guest-supervisor",), "C1", "outcome"),
    "guest NX ignored": Mutant(
        "model.walk", "if fetch and no_execute & NX:", "if False:", ("walk/guest-no-execute",), "C1", "outcome"),
    "CR0.WP taken for set": Mutant(
        "model.walk", "if write and paging.wp and not", "if write and not",
        (one('vmcb = "cr0"\nclear = ["wp"]', clear_bits("guest.a.pte", "rw"), ALL),), "C1", "outcome"),
    "SMEP ignored": Mutant(
        "model.walk", "if fetch and paging.smep:", "if False:",
        (one('vmcb = "cr4"\nset = ["smep"]', ALL),), "C1", "outcome"),
    "SMAP ignored": Mutant(
        "model.walk", "if paging.smap and not fetch and (implicit or not paging.ac):", "if False:",
        (one('vmcb = "cr4"\nset = ["smap"]', ALL),), "C1", "outcome"),
    "SMAP: RFLAGS.AC ignored": Mutant(
        "model.walk", "if paging.smap and not fetch and (implicit or not paging.ac):", "if paging.smap and not fetch:",
        (one('vmcb = "cr4"\nset = ["smap"]', 'vmcb = "rflags"\nset = ["ac"]', ALL),), "C1", "outcome"),
    "not canonical, and walked": Mutant(
        "model.walk", "if address_bits > 32 and", "if False and", ("walk/non-canonical",), "C1", "outcome"),
    "protection keys: AD ignored": Mutant(
        "model.walk", "of_key & PKRU_AD or", "False or", ("keys/denied",), "C1", "outcome"),
    "protection keys: WD ignored": Mutant(
        "model.walk", "write and of_key & PKRU_WD and", "False and", ("keys/denied",), "C1", "outcome"),
    "protection keys: WD holds without CR0.WP": Mutant(
        "model.walk", "PKRU_WD and (user or paging.wp)", "PKRU_WD and (True)", ("keys/wp-off",), "C1", "outcome"),
    "protection keys: supervisor pages have keys": Mutant(
        "model.walk", "if paging.pkru and rights & US and not fetch", "if paging.pkru and not fetch",
        ("keys/supervisor-page",), "C1", ""),
    "protection keys: fetches are denied": Mutant(
        "model.walk", "if paging.pkru and rights & US and not fetch and", "if paging.pkru and rights & US and",
        ("keys/denied",), "C1", "outcome"),
    "protection keys: key bit 62 lost": Mutant(
        "model.walk", "(entry >> KEY_SHIFT & 0xF)", "(entry >> KEY_SHIFT & 0x7)", ("keys/denied",), "C1", "outcome"),
    "protection keys: PK reported only where nothing else denies": Mutant(
        "model.walk", 'raise _guest_fault("smap", paging, gva, access, code)',
        'raise _guest_fault("smap", paging, gva, access, code & ~ErrorCode.PK)', ("keys/smap",), "C1", "exitinfo1"),
    "protection keys: in force without CR4.PKE": Mutant(
        "model.vmrun", "host.pkru if regs.cr4 & CR4.PKE and regs.efer", "host.pkru if regs.efer",
        (one('host = "pkru"\nvalue = 0xFFFFFFFF', ALL),), "C1", "outcome"),
    "protection keys: in force outside of long mode": Mutant(
        "model.vmrun", "host.pkru if regs.cr4 & CR4.PKE and regs.efer & EFER.LMA", "host.pkru if regs.cr4 & CR4.PKE",
        (one('vmcb = "cr4"\nset = ["pke"]', 'host = "pkru"\nvalue = 0xFFFFFFFF', ALL, head='guest = "PAE"\n'),), "C1",
        "outcome"),
    "RDPKRU without CR4.PKE": Mutant(
        "lockstep.registers", "if not l2.regs.cr4 & CR4.PKE:", "if False:", ("keys/no-pke-no-rdpkru",), "C1",
        "outcome"),
    "SMAP: RFLAGS.AC lifts it from implicit references": Mutant(
        "model.walk", "(implicit or not paging.ac)", "(not paging.ac)", ("controls/smap-implicit",), "C1", "outcome"),
    "descriptors are read at the CPL": Mutant(
        "lockstep.l2", "_IMPLICIT_READ, index", "_READ[cpl], index", ("walk/descriptor",), "C1", "outcome"),
    "PUSH only reads": Mutant(
        "lockstep.l2", "access = _POP[cpl] if reads else _PUSH[cpl]", "access = _POP[cpl]", ("walk/stack",), "C1",
        "outcome"),
    "RSP at a fault of PUSH is decremented": Mutant(
        "lockstep.l2", 'address + (size if kind == "push" else 0)', "address + (0)", ("walk/stack",), "C3", "rsp"),
    "a crossing access reports its own address for its second page": Mutant(
        "lockstep.l2", "self._cached(gva, access, index, partial", "self._cached(gva & ~0xFFF | address & 0xFFF if at "
        "else gva, access, index, partial", ("split/guest-denied",), "C1", "exitinfo2"),
    "a crossing access sets nothing for its second page": Mutant(
        "lockstep.l2", "for walk in walks:\n            self._note(walk, other",
        "for walk in walks[:1]:\n            self._note(walk, other",
        ("split/first-access",), "C2", "entry"),
    "a crossing access goes on in its first page": Mutant(
        "lockstep.l2", "parts.append((address + first & self.mask", "parts.append((address & ~0xFFF & self.mask",
        ("split/both-there",), "C1", ""),
    # addresses
    "EXITINFO2 is a page": Mutant(
        "model.walk", "NestedPageFault(code, gpa)", "NestedPageFault(code, gpa & ~0xFFF)",
        ("walk/npf-addresses",), "C1", "exitinfo2"),
    "#PF reports the page": Mutant(
        "model.walk", "PageFault(code, gva)", "PageFault(code, gva & ~0xFFF)", ("walk/fault-addresses",), "C1",
        "exitinfo2"),
    "offset of a nested large page": Mutant(
        "model.walk", "entry_shift, gpa)", "entry_shift, gpa ^ 0x1000)",
        ("large/offsets-2m",), "C1", "value"),
    "offset of a guest large page": Mutant(
        "model.walk", "entry_shift, gva)", "entry_shift, gva ^ 0x1000)",
        ("large/offsets-2m",), "C1", ""),
    # what is reported
    "EXITINFO1 without U": Mutant(
        "model.walk", "if access.user or not (access.fetch and paging.gmet):", "if False:",
        ("walk/nested-not-present",), "C1", "exitinfo1"),
    "EXITINFO1 bits 32 and 33 swapped": Mutant(
        "model.walk", "if purpose == FINAL else", "if purpose != FINAL else", ("walk/table-not-present",), "C1",
        "exitinfo1"),
    "#PF without W": Mutant(
        "model.walk", "    if access.write:\n        code |= ErrorCode.W", "    if False:\n        code |= ErrorCode.W",
        ("walk/guest-read-only",), "C1", "exitinfo1"),
    "#PF without U": Mutant(
        "model.walk", "    if access.user:\n        code |= ErrorCode.U", "    if False:\n        code |= ErrorCode.U",
        ("walk/guest-supervisor",), "C1", "exitinfo1"),
    "#PF without I/D": Mutant(
        "model.walk", "if access.fetch and paging.guest_id:", "if False:", ("walk/guest-no-execute",), "C1",
        "exitinfo1"),
    "#NPF without I/D": Mutant(
        "model.walk", "if access.fetch:\n        code", "if False:\n        code", ("walk/nested-no-execute",), "C1",
        "exitinfo1"),
    "permission fault without P": Mutant(
        "model.walk", 'raise _denied("write", paging, gpa, access, purpose, leaf)',
        'raise _nested_fault("write", paging, gpa, access, purpose, 0)', ("walk/nested-read-only",), "C1", "exitinfo1"),
    # accessed and dirty
    "A of a guest table entry not set": Mutant(
        "model.walk", "updates.append((address, accessed, TABLE))", "pass", ("ad/first-access",), "C2", "entry"),
    "A of a nested table entry not set": Mutant(
        "model.walk", "updates.append((address, accessed, NESTED_TABLE))", "pass", ("ad/first-access",), "C2", "entry"),
    "D of the guest's leaf not set": Mutant(
        "model.walk", "updates.append((address, A | D if write else A, PAGE))", "updates.append((address, A, PAGE))",
        ("ad/first-access",), "C2", "entry"),
    "D of the nested leaf not set": Mutant(
        "model.walk", "updates.append((address, A | D if write else A, NESTED_TABLE))",
        "updates.append((address, A, NESTED_TABLE))", ("ad/first-access",), "C2", "entry"),
    "D set by reads": Mutant(
        "model.walk", "updates.append((address, A | D if write else A, PAGE))",
        "updates.append((address, A | D, PAGE))", ("ad/first-access",), "C2", "entry"),
    "nothing set where a walk faults": Mutant(
        "model.dirty", "    if not faulted:\n        return list(updates), []",
        "    if faulted:\n        return [], []\n    if not faulted:\n        return list(updates), []",
        ("ad/cut-short-guest",), "C2", "entry"),
    "A cleared by a walk": Mutant(
        "model.dirty", "new = old | bits <<", "new = old & ~0x20 | (bits & ~0x20) <<", ("ad/first-access",), "C2",
        "entry"),
    # addresses of more than 32 bits
    "nCR3 cut to 32 bits": Mutant(
        "model.walk", "table = paging.ncr3 & root_mask", "table = paging.ncr3 & root_mask & 0xFFFF_FFFF", READ,
        "C1", "outcome"),
    "gCR3 cut to 32 bits": Mutant(
        "model.walk", "table = paging.gcr3 & root_mask", "table = paging.gcr3 & root_mask & 0xFFFF_FFFF", READ,
        "C1", "outcome"),
    "gCR3 cut to 32 bits, without nested paging": Mutant(
        "model.walk", "table = paging.gcr3 & root_mask", "table = paging.gcr3 & root_mask & 0xFFFF_FFFF",
        (one(ALL, head='nested_page = "none"\n'),), "C1", "outcome"),
    "sPA of a nested table cut to 32 bits": Mutant(
        "model.walk", "table = entry & FRAME", "table = entry & 0xFFFF_F000", READ, "C1", "outcome"),
    "address of a guest table cut to 32 bits": Mutant(
        "model.walk", "table = entry & FRAME", "table = entry & 0xFFFF_F000", READ, "C1", "outcome", 2),
    "address of a guest table cut to 32 bits, without nested paging": Mutant(
        "model.walk", "table = entry & FRAME", "table = entry & 0xFFFF_F000",
        (one(ALL, head='nested_page = "none"\n'),), "C1", "outcome", 2),
    "sPA of a page cut to 32 bits": Mutant(
        "model.walk", "entry & FRAME | gpa", "entry & 0xFFFF_F000 | gpa", READ, "C1", ""),
    "sPA of a page cut to 32 bits, under an L1 in PAE mode": Mutant(
        "model.walk", "entry & FRAME | gpa", "entry & 0xFFFF_F000 | gpa",
        (one(ALL, head='nested = "PAE"\n'),), "C1", ""),
    "sPA of a large page cut to 32 bits": Mutant(
        "model.walk", "frame = leaf & FRAME", "frame = leaf & 0xFFFF_F000",
        (one(ALL, head='nested_page = "1G"\n'),), "C1", ""),
    "gPA of a page cut to 32 bits": Mutant(
        "model.walk", "entry & FRAME | gva", "entry & 0xFFFF_F000 | gva", READ, "C1", ""),
    # formats
    "PDPE bit 8 reserved": Mutant(
        "model.entries", 'Level("pdpte", 30, PS if page1g else 0, ', 'Level("pdpte", 30, PS if page1g else 0, G | ',
        (one(set_bits("nested.a.pdpte", "g"), ALL), one(set_bits("guest.a.pdpte", "g"), ALL)), "C1", "outcome"),
    "2M: low frame bits free": Mutant(
        "model.entries", 'Level("pde", 21, PS, high, high | _below(21))', 'Level("pde", 21, PS, high, high)',
        ("large/nested-2m-low-frame", "large/guest-2m-low-frame"), "C1", "outcome"),
    "1G: low frame bits free": Mutant(
        "model.entries", "high | _below(30)", "high", ("large/nested-1g-low-frame", "large/guest-1g-low-frame"), "C1",
        "outcome"),
    "PAT of a large page reserved": Mutant(
        "model.entries", "& FRAME & ~PAT_LARGE", "& FRAME",
        (one(set_bits("nested.a.pde", "pat"), ALL, head='nested_page = "2M"\n'),), "C1", "outcome"),
    "one address bit too many": Mutant(
        "model.entries", "(1 << maxphyaddr) - 1", "(2 << maxphyaddr) - 1",
        (one(set_bits("guest.b.pte", "bit40"), run("read a; read b; fetch b")),), "C1", "outcome"),
    "NX free without EFER.NXE": Mutant(
        "model.entries", "(0 if nxe else NX)", "0",
        (one(NO_NXE, set_bits("guest.a.pte", "nx"), ALL),), "C1", "outcome"),
    "L2's EFER.NXE rules the nested dimension": Mutant(
        "model.vmrun", "nested = table_format(host.cr0, host.cr4, host.efer, cpu)",
        "nested = table_format(host.cr0, host.cr4, regs.efer, cpu)",
        (one(NO_NXE, set_bits("nested.a.pte", "nx"), ALL),), "C1", "outcome"),
    "L1's EFER.NXE rules the guest dimension": Mutant(
        "model.vmrun", "guest=table_format(regs.cr0, regs.cr4, regs.efer, cpu)",
        "guest=table_format(regs.cr0, regs.cr4, host.efer, cpu)",
        (one(NO_NXE, set_bits("guest.a.pte", "nx"), ALL),), "C1", "outcome"),
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
    # deliveries that fault
    "no double faults": Mutant(
        "model.events", "return Event.exception(DF)", "return Event(1)", ("events/double-fault-limit",), "C1", ""),
    "software interrupts are combined": Mutant(
        "model.events", "or first.kind != EXCEPTION", "or False", ("events/software-dpl-delivered",), "C1", ""),
    "no shutdown": Mutant(
        "model.events", "return None\n    if first.vector == PF", "return Event(1)\n    if first.vector == PF",
        ("events/inject-double-fault",), "C1", ""),
    "what is raised on the way is combined before its intercept": Mutant(
        "lockstep.delivery", "if l2.intercepted(second.vector):", "if False:",
        ("events/double-fault-limit",), "C1", ""),
    "no DPL check": Mutant(
        "model.events", "checked and low >> 45 & 3 < regs.cpl", "False", ("events/software-dpl", "events/int-n"), "C1",
        ""),
    "hardware's events meet the DPL check": Mutant(
        "model.events", "checked = event.software and", "checked = True and", ("events/software-dpl",), "C1", ""),
    "IST ignored": Mutant("model.events", "    if ist:", "    if False:", ("events/double-fault-limit",), "C1", ""),
    "the frame of INT n has its own RIP": Mutant(
        "model.events", "regs.rip if next_rip is None else next_rip", "regs.rip", ("intercepts/exceptions",), "C1", ""),
    # deliveries outside of long mode, and the segments that they lead to
    "any gate": Mutant("model.legacy_events", "kind not in _GATES", "False", ("events/legacy-gates",), "C1", ""),
    "all gates of 32 bits": Mutant(
        "model.legacy_events", "4 if kind & 8 else 2", "4", ("events/legacy-gates-16-bit",), "C1", ""),
    "trap gates clear IF": Mutant(
        "model.legacy_events", "0 if kind & 1 else", "0 if False else", ("events/legacy-gates",), "C3", "rflags"),
    "no DPL check in legacy mode": Mutant(
        "model.legacy_events", "checked and gate >> 45 & 3 < regs.cpl", "False", ("events/legacy-software-dpl",), "C1",
        ""),
    "stacks of 32 bits only": Mutant(
        "model.legacy_events", "return _WHOLE if self.segment", "return _WHOLE if True or self.segment",
        ("events/legacy-stack-16-bit",), "C1", ""),
    "any stack segment": Mutant(
        "model.legacy_events", "if not writable or descriptor >> 45 & 3 != cpl:", "if False:",
        ("events/legacy-stack-selector",), "C1", ""),
    "the TSS has no end": Mutant(
        "model.legacy_events", 'if at + 7 > vmcb["tr.limit"]:', "if False:", ("events/legacy-tss-limit",), "C1", ""),
    "RSP0 has no end": Mutant(
        "model.events", 'if at + 7 > vmcb["tr.limit"]:', "if False:", ("events/tss-limit",), "C1", ""),
    "stacks that are not canonical": Mutant(
        "model.events", "Event.exception(SS, 0, EXT)", "Event.exception(GP, 0, EXT)", ("events/tss-canonical",), "C1",
        ""),
    "seven stacks are three": Mutant(
        "model.events", "ist = low >> 32 & 7", "ist = low >> 32 & 3", ("events/ist",), "C1", ""),
    "L1's task priority is none of L2's business": Mutant(
        "lockstep.registers", 'l2.host.get("cr8", l2.state.host.cr8)', 'l2.host.get("cr8", 0)', ("state/l1-cr8",), "C3",
        "rdcr8"),
    "V_GIF lets all in": Mutant(
        "model.vmrun", "if control & VIntr.GIF_ENABLE and not control & VIntr.GIF:", "if False:",
        ("state/virtual-gif",), "C1", "outcome"),
    "STGI leaves V_GIF": Mutant(
        "lockstep.instructions", 'VIntr.GIF if kind == "stgi" else 0', "0", ("state/virtual-gif",), "C3", "v_intr"),
    "an NMI wants IF": Mutant(
        "lockstep.delivery", 'if "nmi" in outside:', 'if "nmi" in outside and l2.regs.rflags & RFLAGS.IF:',
        ("events/physical-nmi-delivered",), "C1", "outcome"),
    "an NMI has another vector": Mutant(
        "lockstep.delivery", "_NMI_VECTOR = 2", "_NMI_VECTOR = 3", ("events/physical-nmi-delivered",), "C3", "rip"),
    "error codes in real mode": Mutant(
        "model.legacy_events", "(rip, 0)])", "(rip, 0), *([] if event.error is None else [(event.error, 0)])])",
        ("events/real-injected",), "C1", ""),
    "real mode keeps AC": Mutant(
        "model.legacy_events", "RFLAGS.IF | RFLAGS.AC", "RFLAGS.IF", ("events/real-injected",), "C3", "rflags"),
    "conforming code changes the CPL": Mutant(
        "model.events", "return cpl if descriptor >> 42 & 1 else", "return",
        ("events/code-segment", "events/legacy-code-segment"), "C1", ""),
    "any code segment": Mutant(
        "model.events", "if not is_code or descriptor >> 45 & 3 > cpl:", "if False:",
        ("events/code-segment", "events/legacy-code-segment"), "C1", ""),
    "code that is not there": Mutant(
        "model.events", "if not descriptor >> 47 & 1:", "if False:",
        ("events/code-segment", "events/legacy-code-segment"), "C1", ""),
    # several VMCBs, and L1's second processor
    "one VMCB for all": Mutant(
        "lockstep.twin", "if step.a != self.vmcb.address:", "if False:", ("state/two-vmcbs",), "C3", ""),
    "what the second processor writes is seen at once": Mutant(
        "lockstep.l2", "self.state.tlb.add(Wrote(at, before))", "pass",
        (one(SECOND, run("read a; remote; read a+8")),), "C1", "value"),
    "an NMI is an INTR": Mutant(
        "lockstep.l2", "raise Leave(ExitCode.NMI,", "raise Leave(ExitCode.NMI - 1,",
        (one('vmcb = "intercept_misc1"\nset = ["bit1"]', SECOND, run("read a; remotenmi; read a+8")),), "C1",
        "outcome"),
    "the second processor writes nothing": Mutant(
        "lockstep.l2", "for step in self.state.remote:", "for step in ():",
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


def _scenarios(wanted: tuple[str | Scenario, ...]) -> list[Scenario]:
    out: list[Scenario] = []
    for each in wanted:
        out += files.read(LIBRARY / f"{each}.toml") if isinstance(each, str) else [each]
    return out


def _run(machine: tcg.TcgMachine, scenarios: list[Scenario]) -> list[Result]:
    compiler = Compiler(machine.image, machine.cpu)
    twin = twin_module.Twin(machine.image, machine.cpu, tcg.LIBERTIES)  # a planted one, if there is one
    return list(Lockstep(machine, machine.channel, twin, strict=True).run(map(compiler.compile, scenarios)))


def _key(divergence: Divergence) -> tuple[object, ...]:
    return divergence.scenario, divergence.op, divergence.probe, divergence.check, divergence.field, divergence.expected


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_found(name: str, machine: tcg.TcgMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    scenarios = _scenarios(mutant.scenarios)
    stock = {_key(d) for r in _run(machine, scenarios) for d in r.divergences}
    plant(monkeypatch, mutant.module, mutant.old, mutant.new, mutant.number)
    results = _run(machine, scenarios)
    for result in results:
        assert result.lost is None
        result.divergences = [d for d in result.divergences if _key(d) not in stock]
    found = [d for r in results for d in r.divergences]
    assert any(d.check == mutant.check and d.field.startswith(mutant.field) for d in found), (
        sorted({(d.check, d.field) for d in found}))
    assert Outcome(results=results).exit_code() == 1
    monkeypatch.undo()
    assert {_key(d) for r in _run(machine, scenarios) for d in r.divergences} == stock


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 25
    assert {m.check for m in MUTANTS.values()} == {"C1", "C2", "C3"}
