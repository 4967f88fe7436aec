"""Rules of the model changed one at a time, for tests/quality/test_model_mutants.py.

Rights, addresses, what a fault reports, accessed and dirty bits, formats.
"""

from __future__ import annotations

from typing import Final

from tests.quality.mutants import Mutant
from tests.scenario.texts import clear_bits, one, run, set_bits

NO_NXE: Final = 'vmcb = "efer"\nclear = ["nxe"]'
ALL: Final = run("read a; write a; fetch a+8")
READ: Final = ("first-light",)

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
    "SMEP with CR0.WP alone": Mutant(
        "model.walk", "if fetch and paging.smep:", "if fetch and paging.smep and paging.wp:",
        ("controls/smep-wp-off",), "C1", "outcome"),
    "CPL 1 and 2 are users": Mutant(
        "lockstep.l2", "_FETCH[self.regs.cpl], index, lambda", "_FETCH[3 if self.regs.cpl else 0], index, lambda",
        ("controls/rings",), "C1", "outcome"),
    "L2 stands before a jump to code that faults in its second page": Mutant(
        "lockstep.l2", "self.is_rmw, self.regs.rip = False, address", "self.is_rmw = False",
        ("walk/fetch-crosses-absent",), "C3", "rip"),
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
}
