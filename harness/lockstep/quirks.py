"""Known ways in which a machine's MMU differs from the manual's, for errata to name.

The model never has them. When a prediction fails on a machine whose errata name quirks, the VMRUN is
predicted once more with them: only if everything then agrees are the divergences those errata's. They
are reported all the same; what is gained is that the run can go on from what the machine did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from harness.model.access import Access, ErrorCode, NestedPageFault, PageFault, Reached
from harness.model.dirty import CUT, NESTED_TABLE, TABLE, Update
from harness.model.entries import FRAME, PS, A, Format, G, Level, P
from harness.model.events import EVENT_VALID, EXCEPTION, VC
from harness.model.registers import CR4, EFER
from harness.model.vmcb import MISC1_NMI, VIntr, Vmcb
from harness.model.vmrun import Host
from harness.model.walk import Paging, Walk

RMW_READS_FIRST: Final = "rmw-reads-first"
EXCLUSIVE_LOSES_FLAGS: Final = "exclusive-loses-flags"
JUMP_NON_CANONICAL: Final = "jump-non-canonical"
PKE_NOT_FLUSHED: Final = "pke-not-flushed"
SOFTWARE_EVENT_LOST: Final = "software-event-lost"
VC_DROPPED: Final = "vc-dropped"
SOFTWARE_EVENT_RIP: Final = "software-event-rip"
V_IRQ_KEPT: Final = "v-irq-kept"
V_IRQ_AT_PRIORITY: Final = "v-irq-at-priority"
INTERRUPT_AS_EXCEPTION: Final = "interrupt-as-exception"
RESERVED_EVENT_LOST: Final = "reserved-event-lost"
NESTED_PDPTE_UNCHECKED: Final = "nested-pdpte-unchecked"
NESTED_PDPTE_SHUTDOWN: Final = "nested-pdpte-shutdown"
V_TPR_OVERWRITTEN: Final = "v-tpr-overwritten"
VMRUN_WANTS_PAGING: Final = "vmrun-wants-paging"
BREAKPOINT_AS_SOFTWARE: Final = "breakpoint-as-software"
INVD_AS_WBINVD: Final = "invd-as-wbinvd"
RDTSCP_AS_RDTSC: Final = "rdtscp-as-rdtsc"
ICEBP_UNDEFINED: Final = "icebp-undefined"
IST_NULL_SS: Final = "ist-null-ss"
IDT_ERROR_OF_SLOT: Final = "idt-error-of-slot"
IDT_ERROR_WITHOUT_EXT: Final = "idt-error-without-ext"
INJECTED_TRAP_NO_DPL: Final = "injected-trap-no-dpl"
DOUBLE_FAULT_NOT_INTERCEPTED: Final = "double-fault-not-intercepted"
LMSW_BY_BITS: Final = "lmsw-by-bits"
MAPS_TO_THE_BYTE: Final = "maps-to-the-byte"
XSETBV_NOT_INTERCEPTED: Final = "xsetbv-not-intercepted"
CR_READS_AS_CR0: Final = "cr-reads-as-cr0"
INVD_WITHOUT_CPL: Final = "invd-without-cpl"
SKINIT_UNDEFINED: Final = "skinit-undefined"
LAR_LOSES_FLAGS: Final = "lar-loses-flags"
PAE_EMULATED: Final = "pae-emulated"
PSE36_OF_FOUR: Final = "pse36-of-four"
SOFTWARE_WALK_FAULT: Final = "software-walk-fault"
SOFTWARE_WALK_OFFSET: Final = "software-walk-offset"
STRING_WRITE_HALVES: Final = "string-write-halves"
REPEATED_INS_LOST: Final = "repeated-ins-lost"
VM_STATE_WANTS_NPT: Final = "vm-state-wants-npt"
INTERCEPT_BEFORE_ILLEGAL: Final = "intercept-before-illegal"
CR4_HIGH_DROPPED: Final = "cr4-high-dropped"
ILLEGAL_CR4_ENDS: Final = "illegal-cr4-ends"
EFER_RESERVED_DROPPED: Final = "efer-reserved-dropped"
WINDOW_AS_INTERRUPT: Final = "window-as-interrupt"
FIRST_EVENT_KEPT: Final = "first-event-kept"
XSETBV_CPL_FIRST: Final = "xsetbv-cpl-first"
SKINIT_ANY_CPL: Final = "skinit-any-cpl"
NESTED_FORMAT_BY_L2: Final = "nested-format-by-l2"
CR0_CD_CLEARED: Final = "cr0-cd-cleared"
FIVE_LEVELS_KEPT: Final = "five-levels-kept"
PDE_WRITES_MISSED: Final = "pde-writes-missed"
STI_ALWAYS_SHADOWS: Final = "sti-always-shadows"
BREAKPOINTS_KEPT: Final = "breakpoints-kept"
EXCLUSIVE_PROBES_FIRST: Final = "exclusive-probes-first"
XSETBV_INTERCEPT_FIRST: Final = "xsetbv-intercept-first"
INTERRUPT_BEHIND_ANOTHER: Final = "interrupt-behind-another"
DELIVERY_EMULATED: Final = "delivery-emulated"
EMULATED_FAULT_PLACE: Final = "emulated-fault-place"
PUSH_OF_SUPERVISOR: Final = "push-of-supervisor"
SHADOW_LOST: Final = "shadow-lost"
ERROR_CODE_WITHOUT_EV: Final = "error-code-without-ev"
"""Quirks of how instructions are carried out: see harness.lockstep.l2 and twin."""


@dataclass(frozen=True)
class Quirk:
    """A variation of the translation in force, of what is asked of it at a CPL, or of what comes of a walk;
    or of what VMRUN refuses: `accepts` says whether it goes on though that rule is broken, `refuses` says
    by which rule it stops though none is broken."""

    paging: Callable[[Paging], Paging] = lambda paging: paging
    access: Callable[[Access, int], Access] = lambda access, cpl: access
    walk: Callable[[Paging, Walk], Walk] = lambda paging, walk: walk
    by_software: Callable[[Paging], Paging] = lambda paging: paging
    """As `paging`, where a hypervisor below L1 walks L2's own tables in place of the CPU."""
    seen: Callable[[Walk], bool] = lambda walk: True
    """Whether a walk under such a `paging` may have come out otherwise for it."""
    accepts: Callable[[str, Vmcb, Host], bool] = lambda rule, vmcb, host: False
    refuses: Callable[[Vmcb], str] = lambda vmcb: ""


def _levels(fmt: Format | None, change: Callable[[Format, Level], Level]) -> Format | None:
    return None if fmt is None else fmt._replace(levels=tuple(change(fmt, level) for level in fmt.levels))


def _in_both(change: Callable[[Format, Level], Level], names: Collection[str], bits: int) -> Quirk:
    """Levels of both dimensions changed; it shows where an entry of such a name with one of `bits` is read."""
    return Quirk(
        paging=lambda p: p._replace(guest=_levels(p.guest, change), nested=_levels(p.nested, change)),
        seen=lambda walk: any(name in names and entry & bits for _, name, _, _, entry in walk.trail),
    )


_PSE36_UPPER: Final = 0xF << 17
_TOP: Final = ("pml4e", "pml5e")


def _pml4e_bit_8(fmt: Format, level: Level) -> Level:
    """Bit 8 of a PML4E (and PML5E) is not reserved."""
    if level.name not in _TOP:
        return level
    return level._replace(reserved_table=level.reserved_table & ~G)


def _pae_pdpte(fmt: Format, level: Level) -> Level:
    """A PDPTE of PAE mode is taken for a long-mode one: bits 8:5 and 2:1 not reserved, bit 5 set as A."""
    if fmt.name != "PAE" or level.name != "pdpte":
        return level
    return level._replace(reserved_table=level.reserved_table & ~0x1E6, accessed=A)


def _nested_pdpte(fmt: Format, level: Level) -> Level:
    """The reserved bits of a PDPTE of PAE mode are not looked at, but for those beyond the physical addresses."""
    if fmt.name != "PAE" or level.name != "pdpte":
        return level
    return level._replace(reserved_table=level.reserved_table & ~0x1E6)


def _nested_pdpte_nowhere(paging: Paging, walk: Walk) -> Walk:
    """A PDPTE of PAE mode whose frame is beyond the physical addresses is reported as one that is not present."""
    match walk.outcome:
        case NestedPageFault(code, address) if code & ErrorCode.RSVD and paging.nested is not None:
            dimension, name, _, _, entry = walk.trail[-1]
            if (dimension, name, paging.nested.name) == ("nested", "pdpte", "PAE") and (
                    entry & paging.nested.levels[-1].reserved_leaf & FRAME):
                return walk._replace(outcome=NestedPageFault(code & ~(ErrorCode.P | ErrorCode.RSVD), address))
    return walk


def _pse36_of_four(fmt: Format, level: Level) -> Level:
    """Of the eight address bits in the PDE of a 4M page the upper four, 39:36, are reserved."""
    if fmt.name != "32-bit" or not level.leaf & PS:
        return level
    return level._replace(reserved_leaf=level.reserved_leaf | _PSE36_UPPER)


def _no_legacy_nested(paging: Paging) -> Paging:
    """Nested tables in the format of 32-bit paging are not walked: a gPA is taken for the sPA."""
    legacy = paging.nested is not None and paging.nested.name == "32-bit"
    return paging._replace(nested=None) if legacy else paging


def _reserved_without_p(paging: Paging, walk: Walk) -> Walk:
    """A reserved-bit fault is reported with P=0."""
    match walk.outcome:
        case PageFault(code, address) if code & ErrorCode.RSVD:
            return walk._replace(outcome=PageFault(code & ~ErrorCode.P, address))
        case NestedPageFault(code, address) if code & ErrorCode.RSVD:
            return walk._replace(outcome=NestedPageFault(code & ~ErrorCode.P, address))
    return walk


def _nested_leaf_kept(paging: Paging, walk: Walk) -> Walk:
    """The entry that maps a page in the nested dimension gets neither A nor D; but A if that page is of 1G."""
    trail, faulted = walk.trail, isinstance(walk.outcome, NestedPageFault)
    leaves = {one[3]: A if one[1] == "pdpte" else 0 for one, after in pairwise([*trail, None])
              if one is not None and one[0] == "nested" and (after[2] != one[2] if after else not faulted)}
    updates = [(at, bits & leaves.get(at, bits), kind) if kind in (NESTED_TABLE, CUT) else (at, bits, kind)
               for at, bits, kind in walk.updates]
    return walk._replace(updates=[one for one in updates if one[1]]) if updates != walk.updates else walk


def _old_pdes(paging: Paging, walk: Walk) -> Walk:
    """A PDE of a 32-bit nested table may be one of before, also of an earlier program; then A is not set in it."""
    if paging.nested is None or paging.nested.name != "32-bit" or (paging.guest and paging.guest.name == "32-bit"):
        return walk
    pdes = {address for dimension, name, _, address, _ in walk.trail if dimension == "nested" and name == "pde"}
    updates = [(at, bits, CUT if at in pdes else kind) for at, bits, kind in walk.updates]
    return walk._replace(updates=updates) if updates != walk.updates else walk


def _info_cut_short(paging: Paging, walk: Walk) -> Walk:
    """EXITINFO1 of a nested fault has no bits 63:32."""
    match walk.outcome:
        case NestedPageFault(code, address):
            return walk._replace(outcome=NestedPageFault(code & 0xFFFF_FFFF, address))
    return walk


def _four_levels_nested(paging: Paging) -> Paging:
    """A nested table of five levels is walked as one of four."""
    if paging.nested is None or paging.nested.name != "5-level":
        return paging
    return paging._replace(nested=paging.nested._replace(
        name="4-level", levels=paging.nested.levels[1:], address_bits=48))


def _1g_accessed_first(paging: Paging, walk: Walk) -> Walk:
    """A PDPTE that maps 1G has its A bit set before its low reserved bits and its rights are looked at."""
    if isinstance(walk.outcome, Reached):
        return walk
    updates: list[Update] = []
    known = {address for address, _, _ in walk.updates}
    for dimension, name, _, address, entry in walk.trail:
        fmt = paging.nested if dimension == "nested" else paging.guest
        if name == "pdpte" and entry & P and entry & PS and address not in known and fmt is not None:
            level = next(level for level in fmt.levels if level.name == name)
            if not entry & level.reserved_table & ~0xFFF:
                updates.append((address, A, TABLE if dimension == "guest" else CUT))
    return walk._replace(updates=[*walk.updates, *updates]) if updates else walk


def _implicit_obeys_ac(access: Access, cpl: int) -> Access:
    """RFLAGS.AC lifts SMAP from implicit references too, but for those at CPL 3."""
    return access._replace(implicit=access.implicit and cpl == 3)


def _stack_as_data(access: Access, cpl: int) -> Access:
    """A reference through the stack segment is one like any other: #GP where it should be #SS."""
    return access._replace(stack=False)


def _unchecked(rule: str, where: Callable[[Vmcb, Host], bool] = lambda vmcb, host: True) -> Quirk:
    """VMRUN is not refused by `rule` where that holds."""
    return Quirk(accepts=lambda broken, vmcb, host: broken == rule and where(vmcb, host))


def _ncr3_beyond(paging: Paging) -> Paging:
    """Where an nCR3 that should be refused leads there is nothing; but PAE drops its bits 63:32, four levels
    bits 63:52."""
    if paging.nested is None or paging.nested.address_bits == 32:
        return paging
    beyond = paging.nested.levels[-1].reserved_leaf & FRAME
    if paging.nested.name == "5-level":
        beyond |= ~FRAME & ~0xFFF
    return paging._replace(ncr3=0) if paging.ncr3 & beyond else paging


def _vector(vmcb: Vmcb) -> int:
    """The vector of an exception in EVENTINJ; 2, which is none, for anything else."""
    event = vmcb["eventinj"]
    return event & 0xFF if event >> 8 & 7 == EXCEPTION and event & 0xFF < 32 else 2


QUIRKS: Final[dict[str, Quirk]] = {
    "pml4e-bit-8": _in_both(_pml4e_bit_8, _TOP, G),
    "pae-pdpte": _in_both(_pae_pdpte, ("pdpte",), P),
    NESTED_PDPTE_UNCHECKED: Quirk(paging=lambda p: p._replace(nested=_levels(p.nested, _nested_pdpte))),
    "nested-pdpte-nowhere": Quirk(walk=_nested_pdpte_nowhere),
    PSE36_OF_FOUR: Quirk(
        paging=lambda p: p._replace(nested=_levels(p.nested, _pse36_of_four)),
        by_software=lambda p: p._replace(guest=_levels(p.guest, _pse36_of_four)),
        seen=lambda walk: any(name == "pde" and entry & PS and entry & _PSE36_UPPER
                              for _, name, _, _, entry in walk.trail)),
    "no-legacy-nested": Quirk(paging=_no_legacy_nested),
    "reserved-without-p": Quirk(walk=_reserved_without_p),
    "1g-accessed-first": Quirk(walk=_1g_accessed_first),
    "nested-leaf-kept": Quirk(walk=_nested_leaf_kept),
    "info-cut-short": Quirk(walk=_info_cut_short),
    "four-levels-nested": Quirk(paging=_four_levels_nested),
    "guest-pdpte-unchecked": Quirk(paging=lambda p: p._replace(guest=_levels(p.guest, _nested_pdpte),
                                                               nested=_levels(p.nested, _nested_pdpte))),
    "implicit-obeys-ac": Quirk(access=_implicit_obeys_ac),
    "stack-as-data": Quirk(access=_stack_as_data),
    PKE_NOT_FLUSHED: Quirk(),
    V_IRQ_KEPT: Quirk(),
    V_IRQ_AT_PRIORITY: Quirk(),
    RMW_READS_FIRST: Quirk(),
    EXCLUSIVE_LOSES_FLAGS: Quirk(),
    JUMP_NON_CANONICAL: Quirk(),
    SOFTWARE_EVENT_LOST: Quirk(),
    VC_DROPPED: Quirk(),
    SOFTWARE_EVENT_RIP: Quirk(),
    RESERVED_EVENT_LOST: _unchecked("vmrun.eventinj", lambda vmcb, host: vmcb["eventinj"] >> 8 & 7 in (1, 5, 6, 7)),
    NESTED_PDPTE_SHUTDOWN: Quirk(),
    VMRUN_WANTS_PAGING: Quirk(),
    V_TPR_OVERWRITTEN: Quirk(),
    BREAKPOINT_AS_SOFTWARE: Quirk(),
    INVD_AS_WBINVD: Quirk(),
    RDTSCP_AS_RDTSC: Quirk(),
    ICEBP_UNDEFINED: Quirk(),
    XSETBV_NOT_INTERCEPTED: Quirk(),
    PAE_EMULATED: Quirk(seen=lambda walk: False),  # something only below a hypervisor
    MAPS_TO_THE_BYTE: Quirk(),
    SOFTWARE_WALK_FAULT: Quirk(),
    SOFTWARE_WALK_OFFSET: Quirk(),
    STRING_WRITE_HALVES: Quirk(),
    REPEATED_INS_LOST: Quirk(),
    VM_STATE_WANTS_NPT: Quirk(),
    INTERCEPT_BEFORE_ILLEGAL: Quirk(),
    CR4_HIGH_DROPPED: Quirk(),
    ILLEGAL_CR4_ENDS: Quirk(),
    EFER_RESERVED_DROPPED: Quirk(),
    WINDOW_AS_INTERRUPT: Quirk(),
    FIRST_EVENT_KEPT: Quirk(),
    XSETBV_CPL_FIRST: Quirk(),
    SKINIT_ANY_CPL: Quirk(),
    NESTED_FORMAT_BY_L2: Quirk(),
    CR0_CD_CLEARED: Quirk(),
    FIVE_LEVELS_KEPT: Quirk(),
    PDE_WRITES_MISSED: Quirk(walk=_old_pdes),
    STI_ALWAYS_SHADOWS: Quirk(),
    BREAKPOINTS_KEPT: Quirk(),
    EXCLUSIVE_PROBES_FIRST: Quirk(),
    XSETBV_INTERCEPT_FIRST: Quirk(),
    INTERRUPT_BEHIND_ANOTHER: Quirk(),
    DELIVERY_EMULATED: Quirk(),
    EMULATED_FAULT_PLACE: Quirk(),
    PUSH_OF_SUPERVISOR: Quirk(),
    SHADOW_LOST: Quirk(),
    ERROR_CODE_WITHOUT_EV: Quirk(),
    LMSW_BY_BITS: Quirk(),
    DOUBLE_FAULT_NOT_INTERCEPTED: Quirk(),
    CR_READS_AS_CR0: Quirk(),
    INVD_WITHOUT_CPL: Quirk(),
    LAR_LOSES_FLAGS: Quirk(),
    SKINIT_UNDEFINED: Quirk(),
    IST_NULL_SS: Quirk(),
    IDT_ERROR_OF_SLOT: Quirk(),
    IDT_ERROR_WITHOUT_EXT: Quirk(),
    INJECTED_TRAP_NO_DPL: Quirk(),
    INTERRUPT_AS_EXCEPTION: Quirk(),
    "pdpe-unchecked": _unchecked("vmrun.pdpe"),
    "permission-maps-unchecked": _unchecked("vmrun.permission-maps"),
    "host-paging-unchecked": _unchecked("vmrun.host-paging"),
    "g-pat-unchecked": _unchecked("vmrun.g-pat"),
    "ncr3-unchecked": Quirk(paging=_ncr3_beyond, accepts=lambda rule, vmcb, host: rule == "vmrun.ncr3-mbz"),
    "cr3-unchecked-in-legacy-l1": _unchecked("vmrun.cr3-mbz", lambda vmcb, host: not host.efer & EFER.LMA),
    "cr4-pcide-unchecked": _unchecked("vmrun.cr4-mbz", lambda vmcb, host: bool(vmcb["cr4"] & CR4.PCIDE)),
    "cr4-pks": _unchecked("vmrun.cr4-mbz", lambda vmcb, host: bool(vmcb["cr4"] & 1 << 24)),
    "efer-ffxsr-unchecked": _unchecked("vmrun.efer-mbz", lambda vmcb, host: bool(vmcb["efer"] & EFER.FFXSR)),
    "efer-low-and-lmsle-refused": Quirk(
        refuses=lambda vmcb: "vmrun.efer-mbz" if vmcb["efer"] & (0xFE | EFER.LMSLE) else ""),
    "v-nmi-refused": Quirk(refuses=lambda vmcb: "vmrun.v-nmi" if (
        vmcb["v_intr"] & VIntr.NMI_ENABLE and not vmcb["intercept_misc1"] & MISC1_NMI) else ""),
    "eventinj-reserved-unchecked": _unchecked("vmrun.eventinj", lambda vmcb, host: _vector(vmcb) not in (2, 31)),
    "vc-refused": Quirk(refuses=lambda vmcb: "vmrun.eventinj" if (
        vmcb["eventinj"] & EVENT_VALID and _vector(vmcb) == VC) else ""),
    "eventinj-mode-unchecked": _unchecked("vmrun.eventinj-mode"),
}


def _of_guest(quirk: Quirk) -> Quirk:
    """`quirk` of a CPU on which a hypervisor runs L1: what that CPU walks is L2's own tables and the hypervisor's
    shadow of L1's nested table; L1's table, and VMRUN, are the hypervisor's business."""
    def paging(whole: Paging) -> Paging:
        return quirk.paging(whole._replace(nested=None))._replace(nested=whole.nested)

    def walk(whole: Paging, result: Walk) -> Walk:
        changed = quirk.walk(whole._replace(nested=None), result)
        if changed is result:
            return result
        return changed._replace(outcome=result.outcome) if isinstance(result.outcome, NestedPageFault) else changed

    return Quirk(paging, quirk.access, walk, seen=quirk.seen)


_BELOW: Final = " below a hypervisor"
QUIRKS.update({name + _BELOW: _of_guest(quirk) for name, quirk in list(QUIRKS.items())})

FLEETING: Final = frozenset({SHADOW_LOST})
"""Those that show by chance: one explains nothing that comes whenever the scenario is run."""

EMULATED_BELOW: Final = PAE_EMULATED + _BELOW
"""The hypervisor emulates an instruction of L2 in PAE mode, and cannot fetch it."""


def below(name: str) -> str:
    """The quirk `name` of the CPU that a hypervisor which runs L1 is on itself."""
    return name if QUIRKS[name] == Quirk() else name + _BELOW


def is_below(name: str) -> bool:
    """Whether the quirk is one of how such a CPU walks."""
    return name.endswith(_BELOW)
