"""VMRUN's consistency checks: which VMCBs it refuses, and why (section 15.5.1 and those that add to it).

`CHECKS` is the manual's list, in its order. What is not in it is legal, whatever else is wrong with it:

- An ASID beyond those that CPUID counts: 15.5.1 names 0 alone. What such an ASID does is not said.
- Bits 11:5 and 2:0 of CR3 and of nCR3 (4:0 where the root is a PDPT of PAE): 3.1.2 has them reserved, but MBZ
  are only bits 63:52, and with them what MAXPHYADDR leaves of 51:32. They are ignored, PWT and PCD are not addresses.
- Bits 63:32 of CR3 outside of long mode, where the register has none: not said, so never tried.
- Control bits of features that the CPU lacks, but for those of CR4 and EFER: 15.25.13 has GMET ignored there.
- EFER.LMA, which is not consulted; bits 7:1 of EFER, which read as zero and are not MBZ (3.1.7).
- Reserved bits of U_CET, which are checked for guests of SEV-ES only. SEV has checks of its own (15.34 to 15.36):
  it is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from harness.model.entries import P, pae
from harness.model.memory import Words
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.vmcb import MISC1_NMI, MISC2_VMRUN, NP_ENABLE, NP_SSS, SEGMENT_D, SEGMENT_L, Group, VIntr, Vmcb
from harness.model.vmrun import Host

_CR4_ALWAYS: Final = 0x7FF  # bits 10:0 are in every CPU with SVM
_CR4_BY_FEATURE: Final = {
    "umip": CR4.UMIP, "la57": CR4.LA57, "fsgsbase": CR4.FSGSBASE, "pcid": CR4.PCIDE, "xsave": CR4.OSXSAVE,
    "smep": CR4.SMEP, "smap": CR4.SMAP, "pku": CR4.PKE, "cet": CR4.CET,
}
_EFER_BY_FEATURE: Final = {
    "nx": EFER.NXE, "lmsle": EFER.LMSLE, "ffxsr": EFER.FFXSR, "tce": EFER.TCE, "mcommit": EFER.MCOMMIT,
    "intwb": EFER.INTWB, "uai": EFER.UAIE, "aibrs": EFER.AIBRSE,
}
_EFER_NEVER: Final = ~0x3F_FFFF | 1 << 19 | 1 << 16 | 1 << 9
_S_CET: Final = 0x3  # SH_STK_EN and WR_SHSTK_EN (18.13)
_U_CET_SS: Final = 0x1  # SH_STK_EN
_PAT_TYPES: Final = {0, 1, 4, 5, 6, 7}
_EVENT_VALID: Final = 1 << 31
_EVENT_TYPES: Final = {0, 2, 3, 4}
_EXCEPTION: Final = 3
_EXCEPTIONS: Final = {0, 1, *range(3, 9), *range(10, 15), *range(16, 20), 21, 28, 29, 30}  # table 8-1
_NOT_IN_64_BIT_MODE: Final = {4, 5}  # #OF and #BR: INTO and BOUND are none of its instructions
_IOPM_BYTES: Final = 0x3000
_MSRPM_BYTES: Final = 0x2000
_CONSULTED: Final = Group(
    "asid", "avic_backing_page", "avic_logical_table", "avic_physical_table", "cr0", "cr3", "cr4", "cs.attrib",
    "dr6", "dr7", "efer", "eventinj", "g_pat", "intercept_misc1", "intercept_misc2", "iopm_base", "msrpm_base",
    "ncr3", "np_control", "rflags", "s_cet", "v_intr",
)
"""The fields that checks look at."""


class _Host(NamedTuple):
    """L1's registers that checks look at."""

    cr0: int
    u_cet: int


class _Vmrun(NamedTuple):
    """What VMRUN has before it. `long` is EFER.LME and CR0.PG, `nested` NP_ENABLE."""

    vmcb: Mapping[str, int]
    host: _Host
    cpu: Cpu
    ram: Words
    cr0: int
    cr3: int
    cr4: int
    efer: int
    long: bool
    nested: bool

    def beyond(self, address: int) -> bool:
        """Whether the CPU has no such physical address."""
        return bool(address >> self.cpu.maxphyaddr)


class Check(NamedTuple):
    """One condition: `illegal` says whether VMRUN is refused by `rule`."""

    rule: str
    illegal: Callable[[_Vmrun], object]


def violations(vmcb: Vmcb, host: Host, cpu: Cpu, ram: Words) -> Iterator[str]:
    """The rules that this VMCB breaks; VMRUN ends in #VMEXIT(INVALID) if there is one.

    Raises IndexError where VMRUN would read PDPEs outside of `ram`.
    """
    values, registers = _CONSULTED.values(vmcb), _Host(host.cr0, host.u_cet)
    if vmcb["np_control"] & NP_ENABLE:
        return iter(_violated_under_nested_paging(values, registers, cpu))
    return _violated(values, registers, cpu, ram)


@lru_cache(maxsize=10_000)
def _violated_under_nested_paging(values: tuple[int, ...], host: _Host, cpu: Cpu) -> tuple[str, ...]:
    """There no memory is looked at, so that one VMCB is like the last, mostly."""
    return tuple(_violated(values, host, cpu, []))


def _violated(values: tuple[int, ...], host: _Host, cpu: Cpu, ram: Words) -> Iterator[str]:
    vmcb = dict(zip(_CONSULTED.names, values, strict=True))
    cr0, efer = vmcb["cr0"], vmcb["efer"]
    long, nested = bool(efer & EFER.LME and cr0 & CR0.PG), bool(vmcb["np_control"] & NP_ENABLE)
    it = _Vmrun(vmcb, host, cpu, ram, cr0, vmcb["cr3"], vmcb["cr4"], efer, long, nested)
    return (rule for rule, illegal in CHECKS if illegal(it))


def _reserved_of(features: dict[str, int], cpu: Cpu) -> int:
    """The bits of `features` that this CPU lacks."""
    return sum(bit for feature, bit in features.items() if feature not in cpu.features)


def cr4_mbz(cr4: int, cpu: Cpu) -> int:
    """The bits of `cr4` that must be zero (section 3.1.3): no feature's, or of one that this CPU lacks."""
    return cr4 & (~(_CR4_ALWAYS | sum(_CR4_BY_FEATURE.values())) | _reserved_of(_CR4_BY_FEATURE, cpu))


def efer_mbz(efer: int, cpu: Cpu) -> int:
    """The bits of `efer` that must be zero on this processor (section 3.1.7)."""
    return efer & (_EFER_NEVER | _reserved_of(_EFER_BY_FEATURE, cpu))


def _permission_maps(it: _Vmrun) -> bool:
    """Sections 15.10.1 and 15.11: the low 12 bits of either address are ignored."""
    last_of_iopm = (it.vmcb["iopm_base"] & ~0xFFF) + _IOPM_BYTES - 1
    last_of_msrpm = (it.vmcb["msrpm_base"] & ~0xFFF) + _MSRPM_BYTES - 1
    return it.beyond(last_of_iopm) or it.beyond(last_of_msrpm)


def _eventinj(it: _Vmrun) -> bool:
    """Section 15.20: a reserved type, or an exception whose vector is none."""
    event = it.vmcb["eventinj"]
    kind, vector = event >> 8 & 7, event & 0xFF
    return bool(event & _EVENT_VALID) and (
        kind not in _EVENT_TYPES or (kind == _EXCEPTION and vector not in _EXCEPTIONS))


def _eventinj_mode(it: _Vmrun) -> bool:
    """Section 15.20: an event that is impossible in the guest's mode."""
    event = it.vmcb["eventinj"]
    exception = event & _EVENT_VALID and event >> 8 & 7 == _EXCEPTION
    in_64_bit_mode = it.long and it.vmcb["cs.attrib"] & SEGMENT_L
    return bool(exception and in_64_bit_mode and event & 0xFF in _NOT_IN_64_BIT_MODE)


def _pdpe(it: _Vmrun) -> bool:
    """Section 15.5.1: in PAE paging without nested paging VMRUN reads the four PDPEs itself."""
    if it.nested or it.long or not (it.cr0 & CR0.PG and it.cr4 & CR4.PAE):
        return False
    fmt = pae(it.cpu.maxphyaddr, bool(it.efer & EFER.NXE))
    first = (it.cr3 & fmt.root_mask) >> 3
    entries = [it.ram[first + n] for n in range(4)]
    return any(entry & P and entry & fmt.levels[0].reserved_table for entry in entries)


def _g_pat(it: _Vmrun) -> bool:
    """Section 7.8.1: each field is a byte, its five high bits reserved."""
    pat = it.vmcb["g_pat"]
    return any(pat >> 8 * n & 0xFF not in _PAT_TYPES for n in range(8))


def _avic(it: _Vmrun) -> int:
    """V_INTR where the CPU has AVIC and the VMCB enables it, or x2AVIC; else 0."""
    control = it.vmcb["v_intr"]
    return control if "avic" in it.cpu.features and control & (VIntr.AVIC | VIntr.X2AVIC) else 0


def _x2avic_alone(it: _Vmrun) -> bool:
    control = _avic(it)
    return "x2avic" in it.cpu.features and bool(control & VIntr.X2AVIC) and not control & VIntr.AVIC


def _avic_pointers(it: _Vmrun) -> bool:
    """Section 15.29.4.3. The APIC BAR is a gPA, and none of them; x2AVIC has no logical table."""
    control = _avic(it)
    names = ["avic_backing_page", "avic_physical_table"]
    if not control & VIntr.X2AVIC:
        names.append("avic_logical_table")
    return bool(control & VIntr.AVIC) and any(it.beyond(it.vmcb[name]) for name in names)


def _avic_index(it: _Vmrun) -> bool:
    """Section 15.29.4.3: AVIC_PHYSICAL_MAX_INDEX."""
    control, index = _avic(it), it.vmcb["avic_physical_table"] & 0xFFF
    if not control & VIntr.X2AVIC:
        return bool(control & VIntr.AVIC) and index > 255
    return "x2avic_ext" not in it.cpu.features and index > 511


CHECKS: Final = (
    # 15.5.1, in the order of its list
    Check("vmrun.efer-svme", lambda it: not it.efer & EFER.SVME),
    Check("vmrun.cr0-nw", lambda it: it.cr0 & CR0.NW and not it.cr0 & CR0.CD),
    Check("vmrun.cr0-high", lambda it: it.cr0 >> 32),
    Check("vmrun.cr3-mbz", lambda it: it.long and it.beyond(it.cr3)),
    Check("vmrun.cr4-mbz", lambda it: cr4_mbz(it.cr4, it.cpu)),
    Check("vmrun.dr6-high", lambda it: it.vmcb["dr6"] >> 32),
    Check("vmrun.dr7-high", lambda it: it.vmcb["dr7"] >> 32),
    Check("vmrun.efer-mbz", lambda it: efer_mbz(it.efer, it.cpu)),
    Check("vmrun.no-long-mode", lambda it: it.efer & (EFER.LME | EFER.LMA) and not it.cpu.long_mode),
    Check("vmrun.long-pae", lambda it: it.long and not it.cr4 & CR4.PAE),
    Check("vmrun.long-pe", lambda it: it.long and not it.cr0 & CR0.PE),
    Check("vmrun.cs-l-d", lambda it: it.long and not ~it.vmcb["cs.attrib"] & (SEGMENT_L | SEGMENT_D)),
    Check("vmrun.intercept", lambda it: not it.vmcb["intercept_misc2"] & MISC2_VMRUN),
    Check("vmrun.permission-maps", _permission_maps),
    Check("vmrun.eventinj", _eventinj),
    Check("vmrun.eventinj-mode", _eventinj_mode),
    Check("vmrun.asid", lambda it: not it.vmcb["asid"]),
    Check("vmrun.s-cet", lambda it: "cet" in it.cpu.features and it.vmcb["s_cet"] & ~_S_CET),
    Check("vmrun.cet-wp", lambda it: it.cr4 & CR4.CET and not it.cr0 & CR0.WP),
    Check("vmrun.cet-vm", lambda it: it.cr4 & CR4.CET and it.host.u_cet & _U_CET_SS and it.vmcb["rflags"] & RFLAGS.VM),
    Check("vmrun.pdpe", _pdpe),
    # interrupts
    Check("vmrun.v-nmi", lambda it: "vnmi" in it.cpu.features and it.vmcb["v_intr"] & VIntr.NMI_ENABLE
          and not it.vmcb["intercept_misc1"] & MISC1_NMI),
    Check("vmrun.x2avic", _x2avic_alone),
    Check("vmrun.avic-pointers", _avic_pointers),
    Check("vmrun.avic-index", _avic_index),
    # nested paging
    Check("vmrun.host-paging", lambda it: it.nested and not it.host.cr0 & CR0.PG),
    Check("vmrun.ncr3-mbz", lambda it: it.nested and it.beyond(it.vmcb["ncr3"])),
    Check("vmrun.g-pat", lambda it: it.nested and _g_pat(it)),
    Check("vmrun.sss", lambda it: "sss" in it.cpu.features and it.vmcb["np_control"] & NP_SSS and not it.nested),
)
