"""What a VMCB holds at first, and what lies in L2's own system page."""

from __future__ import annotations

from typing import Final

from harness.model.registers import CR0, CR4, EFER, RFLAGS
from harness.model.vmcb import FIELDS, MISC2_SVM, NP_ENABLE
from harness.model.vmrun import Host
from harness.scenario.modes import Mode
from harness.wire.image import PAGE

SYSTEM: Final = ("idt", "gdt", "tss", "stack")
"""L2's system structures: each has a gPA and a gVA of its own, all lie on one sPA page."""

_CODE_SELECTOR: Final = 0x28
_DATA_SELECTOR: Final = 0x30
_DATA: Final = 0x12CA_9334_5678_BCDE
"""Base 1234_5678h, limit ABCD_EFFFh, attributes C93h: unlike any in the VMCB."""
_GDT: Final = 0x200
_FLAT_SELECTOR: Final = 0x38
_FLAT: Final = 0x00CF_9300_0000_FFFF
"""Of legacy mode: the stack segment for a change to CPL 0."""
_CODES: Final = {"long": 0x00AF_9B00_0000_FFFF, "prot": 0x00CF_9B00_0000_FFFF, "real": 0}
"""L2's code segment, by its code page."""
_TSS: Final = 0x304
"""Offsets in the system page; so that RSP0, four bytes into the TSS, is aligned."""
_DF: Final = 8
_IST1: Final = 0x900
_RSP0: Final = 0xB40
_RSP: Final = 0xFE8
"""Where the stacks begin in it: for a change to CPL 0, and for L2 at VMRUN (not 16-byte aligned)."""

HOST_CR0: Final = CR0.PG | CR0.WP | CR0.NE | CR0.ET | CR0.MP | CR0.PE
HOST_CR4: Final = CR4.DE | CR4.PAE | CR4.OSFXSR | CR4.OSXMMEXCPT
HOST_EFER: Final = EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME
HOST_PAT: Final = 0x0007_0406_0007_0406
HOST_DR7: Final = 0x400
HOST_RFLAGS: Final = RFLAGS.ONE | RFLAGS.STATUS
INITIAL_HOST: Final = Host(HOST_CR0, HOST_CR4, HOST_EFER, HOST_PAT, HOST_DR7, rflags=HOST_RFLAGS)
"""L1's registers in 4-level paging, before a scenario changes any."""


def vmcb_fields(maps: dict[str, int], mode: Mode, gva: dict[str, int], gcr3: int, ncr3: int | None) -> dict[str, int]:
    """A VMCB for L2 in `mode`; `ncr3` None is NP_ENABLE=0, `maps` are the permission maps. Where a value is free it
    is unlike L1's and unlike any other, so that a field loaded or saved in the wrong place shows."""
    return {
        "intercept_exceptions": 0xFFFF_FFFF,
        "intercept_misc1": 1 << 31 | 1 << 24,  # SHUTDOWN: a triple fault of L2 is L2's; HLT: its handlers' end
        "intercept_misc2": MISC2_SVM,
        "iopm_base": maps["iopm"],
        "msrpm_base": maps["msrpm"],
        "asid": 5,
        "tlb_control": 1,
        "v_intr": 1 << 24,  # V_INTR_MASKING
        "np_control": 0 if ncr3 is None else NP_ENABLE,
        "ncr3": ncr3 or 0,
        **_segment("es", 0x0038, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("cs", _CODE_SELECTOR, mode.code_attrib, 0xFFFF_FFFF, 0),
        **_segment("ss", 0x0030, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("ds", 0x0040, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("fs", 0x0048, 0xC93, 0xFFFF_FFFF, 0x0000_1234_5000_0000),
        **_segment("gs", 0x0050, 0xC93, 0xFFFF_FFFF, 0x0000_1234_6000_0000),
        **_segment("gdtr", 0, 0, 0x7F, gva["gdt"] + _GDT),
        **_segment("ldtr", 0x0058, 0x082, 0x17, 0x0000_1234_8000_0000),
        **_segment("idtr", 0, 0, 0x1FF, gva["idt"]),
        **_segment("tr", 0x0068, 0x08B if mode.long else 0x089, 0x67, gva["tss"] + _TSS),
        "efer": mode.efer,
        "cr0": mode.cr0,
        "cr4": mode.cr4,
        "cr3": gcr3,
        "dr6": 0xFFFF_0FF0,
        "dr7": 0x400,
        "rflags": RFLAGS.ONE,
        "rsp": gva["stack"] + _RSP,
        "rax": 0x5A5A_1111_2222_3333,
        "star": 0x0023_0010_0000_0000,
        "lstar": 0x0000_1234_C000_0000,
        "cstar": 0x0000_1234_D000_0000,
        "sfmask": 0x0004_7700,
        "kernel_gs_base": 0x0000_1234_E000_0000,
        "sysenter_cs": 0x0010,
        "sysenter_esp": 0x0000_1234_F000_0000,
        "sysenter_eip": 0x0000_1235_0000_0000,
        "cr2": 0x0000_1235_1000_0ABC,
        "g_pat": 0x0007_0406_0007_0406,
    }


def system_words(page: int, mode: Mode, stack: int, double_fault_stack: int, vectors: int) -> dict[int, int]:
    """L2's IDT, GDT and TSS at sPA `page`; the rest of it is stack. `vectors` is the gVA of the first
    handler; each has four bytes (guests/l1/l2.inc). In long mode double faults have a stack of their own, by IST 1, in
    a page of its own in gVA. Of real mode's far pointers each leads to another place, where no code is."""
    words = {page + _GDT + _CODE_SELECTOR: _CODES[mode.stub], page + _GDT + _DATA_SELECTOR: _DATA}
    offsets = [vectors + 4 * vector for vector in range(32)]
    if mode.long:
        words |= {page + _TSS + 4: stack + _RSP0, page + _TSS + 0x24: double_fault_stack + _IST1}
        for vector, offset in enumerate(offsets):
            words[page + 16 * vector] = _gate(offset) | (1 << 32 if vector == _DF else 0)
            words[page + 16 * vector + 8] = offset >> 32
    elif mode.real:
        far = [0x1000 + 0x11 * vector << 16 | 0x120 + 4 * vector for vector in range(32)]
        words |= {page + 4 * vector: far[vector] | far[vector + 1] << 32 for vector in range(0, 32, 2)}
    else:
        words |= {page + _GDT + _FLAT_SELECTOR: _FLAT, page + _TSS + 4: stack + _RSP0 | _FLAT_SELECTOR << 32}
        words |= {page + 8 * vector: _gate(offset) for vector, offset in enumerate(offsets)}
    return words


def _gate(offset: int) -> int:
    """An interrupt gate of CPL 0's to that place in L2's code segment; in long mode the lower half of one."""
    return offset & 0xFFFF | _CODE_SELECTOR << 16 | 0x8E00 << 32 | (offset >> 16 & 0xFFFF) << 48


def vmcb_page(vmcb: dict[str, int]) -> bytes:
    """The page that a VMCB with these fields is."""
    page = bytearray(PAGE)
    for name, value in vmcb.items():
        offset, width = FIELDS[name]
        page[offset : offset + width] = value.to_bytes(width, "little")
    return bytes(page)


def _next(region: int, inside: int, shift: int, flip: int, regions: int) -> tuple[int, int]:
    """Where a 2M region and the offset in it go in one dimension with pages of 1 << `shift`."""
    if shift == 30:
        return region, inside
    return (region + 1) % regions, inside ^ (flip << 12 if shift == 12 else 0)


def _segment(name: str, selector: int, attrib: int, limit: int, base: int) -> dict[str, int]:
    return {f"{name}.selector": selector, f"{name}.attrib": attrib, f"{name}.limit": limit, f"{name}.base": base}
