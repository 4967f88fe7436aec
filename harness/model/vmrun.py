"""VMRUN and #VMEXIT: what L2 starts with, under which translation it runs, what is saved.

Sections 15.5.1 (VMRUN), 15.6 and 15.7.1 (#VMEXIT), 15.25.3 and 15.25.4 (nested paging). When VMRUN is refused:
harness.model.consistency.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Final

from harness.model.entries import Format, legacy, long_mode, pae
from harness.model.memory_type import Caching
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.vmcb import NP_ENABLE, NP_GMET, NP_SSS, Group, VIntr, Vmcb
from harness.model.walk import Paging


@dataclass(slots=True)
class Registers:
    """L2's registers that VMRUN loads and #VMEXIT saves, and that L2 can change by itself. The names
    are those of the VMCB's fields, in their order there (section 15.5.1, appendix B)."""

    cpl: int
    efer: int
    cr4: int
    cr3: int
    cr0: int
    dr7: int
    dr6: int
    rflags: int
    rip: int
    rsp: int
    rax: int
    cr2: int
    g_pat: int


LOADED: Final = tuple(f.name for f in fields(Registers))
_LOADED: Final = Group(*LOADED)
_values: Final = attrgetter(*LOADED)
_LOADED_BASES: Final = Group(*(f"{name}.base" for name in ("es", "cs", "ss", "ds", "gdtr", "idtr")))


@dataclass(slots=True)
class Host:
    """L1's registers as far as they matter to VMRUN and to the nested walk; PKRU, which is not in the VMCB:
    VMRUN and #VMEXIT leave it as it is; and U_CET, an MSR that VMRUN looks at."""

    cr0: int
    cr4: int
    efer: int
    pat: int
    dr7: int
    pkru: int = 0
    u_cet: int = 0
    rflags: int = RFLAGS.ONE
    gif: int = 0
    cr8: int = 0
    """The task priority, which is L2's CR8 too without V_INTR_MASKING."""


def canonicalize(vmcb: Vmcb, cpu: Cpu) -> None:
    """VMRUN sign-extends the bases of the segments that it loads (section 15.5.1): from the highest bit of a
    linear address of this CPU, with which they then are saved."""
    top = 1 << (56 if "la57" in cpu.features else 47)
    if max(_LOADED_BASES.values(vmcb)) < top:
        return
    for name, base in _LOADED_BASES.read(vmcb).items():
        if base >= top:
            vmcb[name] = ((base & 2 * top - 1) ^ top) - top & (1 << 64) - 1


def virtual_interrupt(vmcb: Vmcb, rflags: int, at_priority: bool = False) -> int | None:
    """The vector of the virtual interrupt that L2 takes with these flags, outside of an interrupt shadow
    (section 15.21.4): its priority must be above V_TPR; `at_priority`: or the same. None if there is none."""
    control = vmcb["v_intr"]
    if control & VIntr.GIF_ENABLE and not control & VIntr.GIF:
        return None  # 15.33.1
    above = (control >> 16 & 0xF) - (control & VIntr.TPR) + at_priority > 0
    taken = control & VIntr.IRQ and rflags & RFLAGS.IF and (above or control & VIntr.IGN_TPR)
    return control >> 32 & 0xFF if taken else None


def popped(regs: Registers, value: int) -> int:
    """RFLAGS behind a POPF of `value` outside of virtual-8086 mode (volume 3, POPF): IOPL changes at CPL 0 only, IF at
    a CPL that IOPL lets in, RF is cleared, VM, VIF and VIP stay."""
    changes = RFLAGS.STATUS | RFLAGS.TF | RFLAGS.DF | RFLAGS.NT | RFLAGS.AC | RFLAGS.ID
    if not regs.cpl:
        changes |= RFLAGS.IOPL
    if regs.cpl <= regs.rflags >> 12 & 3:
        changes |= RFLAGS.IF
    return regs.rflags & ~(changes | RFLAGS.RF) | value & changes


def load(vmcb: Vmcb, host: Host) -> Registers:
    """What L2 starts with. gPAT is loaded with nested paging only (section 15.25.4). EFER.LMA is not taken
    from the VMCB: it is LME and PG (section 15.5.1). DR6, DR7 and RFLAGS come with their fixed bits as
    they always read (section 13.1.1)."""
    regs = Registers(*_LOADED.values(vmcb))
    if not vmcb["np_control"] & NP_ENABLE:
        regs.g_pat = host.pat
    regs.efer &= ~EFER.LMA
    if regs.efer & EFER.LME and regs.cr0 & CR0.PG:
        regs.efer |= EFER.LMA
    regs.cr0 |= CR0.ET
    regs.dr6 |= 0xFFFF_0FF0
    regs.dr7 |= 0x400
    regs.rflags |= RFLAGS.ONE
    return regs


def table_format(cr0: int, cr4: int, efer: int, cpu: Cpu) -> Format | None:
    """The tables that these registers select (sections 5.2 and 5.3); None with paging off."""
    if not cr0 & CR0.PG:
        return None
    nxe = bool(efer & EFER.NXE)
    if efer & EFER.LMA:
        return long_mode(cpu.maxphyaddr, nxe, cpu.page1g, bool(cr4 & CR4.LA57))
    return pae(cpu.maxphyaddr, nxe) if cr4 & CR4.PAE else legacy(cpu.maxphyaddr, bool(cr4 & CR4.PSE))


def paging(regs: Registers, vmcb: Vmcb, host: Host, cpu: Cpu) -> Paging:
    """The translation in force for L2 with `regs`.

    The nested dimension has the format that L1 has at VMRUN; L1's EFER.NXE decides over NX in it; its
    CR0.WP, CR4.SMEP and CR4.SMAP have no part in it (sections 15.25.3, 15.25.5 and 15.25.7). The supervisor
    shadow stack check is ignored where L1 has no NX bit to mark such pages with (15.25.14).
    """
    control = vmcb["np_control"]
    nested = table_format(host.cr0, host.cr4, host.efer, cpu) if control & NP_ENABLE else None
    return Paging(
        guest=table_format(regs.cr0, regs.cr4, regs.efer, cpu),
        gcr3=regs.cr3,
        wp=bool(regs.cr0 & CR0.WP),
        smep=bool(regs.cr4 & CR4.SMEP),
        smap=bool(regs.cr4 & CR4.SMAP),
        ac=bool(regs.rflags & RFLAGS.AC),
        guest_id=bool((regs.efer & EFER.NXE and regs.cr4 & CR4.PAE) or regs.cr4 & CR4.SMEP),  # 8.4.2
        nested=nested,
        ncr3=vmcb["ncr3"],
        pkru=host.pkru if regs.cr4 & CR4.PKE and regs.efer & EFER.LMA else 0,
        gmet="gmet" in cpu.features and bool(control & NP_GMET),
        sss="sss" in cpu.features and bool(control & NP_SSS and host.cr4 & CR4.PAE and host.efer & EFER.NXE),
    )


def caching(regs: Registers, vmcb: Vmcb, host: Host) -> Caching:
    """What decides over memory types while L2 runs with `regs`. Without nested paging L1's registers have no
    part in it, but for its PAT, which then is L2's too (sections 15.25.2 and 15.25.8)."""
    cr0 = regs.cr0 | (host.cr0 if vmcb["np_control"] & NP_ENABLE else 0)
    return Caching(regs.g_pat, host.pat, bool(cr0 & CR0.CD))


def save(vmcb: Vmcb, regs: Registers) -> None:
    """#VMEXIT: write L2's registers back. gPAT only with nested paging (section 15.25.4)."""
    nested = vmcb["np_control"] & NP_ENABLE
    for name, old, new in zip(LOADED, _LOADED.values(vmcb), _values(regs), strict=True):
        if new != old and (nested or name != "g_pat"):
            vmcb[name] = new
