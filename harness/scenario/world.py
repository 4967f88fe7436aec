"""The world that every scenario starts in: two dimensions of tables, a VMCB, and names for it all.

L2 has four pages under test, a to d, consecutive in gVA and scattered in gPA and sPA. Each table of
L2 lies in a 1G region of gPA of its own, so that the nested walk of each goes through entries of its
own, and can be made to fault alone. What L2 itself needs (its code, its mailbox, the tables that map
them) lies under other root entries than a to d, in both dimensions, with A and D set from the start.

    dimension   root slot   what
    guest       90          a b c d
    guest       511         L2's code and mailbox, each twice: for CPL 0 and for CPL 3;
                            its tables; its IDT, GDT, TSS and stack
    nested      0           a b c d
    nested      1           L2's tables (pml4, pdpt, pd, pt), and all that is L2's own

With less than 40 physical address bits, slot 1 of the nested root cannot be reached: slot 0 has it all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from harness.model.entries import LEVEL_NAMES, PAGE_SHIFTS, PS, RW, US, A, D, P
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.vmcb import FIELDS, MISC2_VMMCALL, MISC2_VMRUN, NP_ENABLE
from harness.scenario.ops import NO_NESTED_PAGING
from harness.wire.image import PAGE, Image

PAGES: Final = ("a", "b", "c", "d")
TABLES: Final = ("pml4", "pdpt", "pd", "pt")
"""L2's tables for pages a to d, as targets of the nested dimension."""

SYSTEM: Final = ("idt", "gdt", "tss", "stack")
"""L2's system structures: each has a gPA and a gVA of its own, all lie on one sPA page."""

REGION: Final = 1 << 21
_TEST_GVA: Final = 90 << 39 | 316 << 30
_TEST_PT: Final = 0x91
_SUPPORT_GVA: Final = 0xFFFF << 48 | 511 << 39 | 496 << 30 | 12 << 21 | 0x40 << 12
_DATA_GPA: Final = 5 << 30
_USER_BITS: Final = P | RW | US
_KEPT: Final = A | D
_FLIP_GUEST: Final = 0x21
_FLIP_NESTED: Final = 0x42
"""What 4K leaves do to the low bits of the page number, so that no dimension is linear."""

_CODE_SELECTOR: Final = 0x28
_GDT: Final = 0x200
_TSS: Final = 0x304
"""Offsets in the system page; so that RSP0, four bytes into the TSS, is aligned."""
_RSP0: Final = 0xB40
_RSP: Final = 0xFE8
"""Where the stacks begin in it: for a change to CPL 0, and for L2 at VMRUN (not 16-byte aligned)."""

HOST_CR0: Final = CR0.PG | CR0.WP | CR0.NE | CR0.ET | CR0.MP | CR0.PE
HOST_CR4: Final = CR4.DE | CR4.PAE | CR4.OSFXSR | CR4.OSXMMEXCPT
HOST_EFER: Final = EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME
HOST_PAT: Final = 0x0007_0406_0007_0406
HOST_DR7: Final = 0x400


@dataclass(frozen=True)
class World:
    """A starting state: `words` by sPA (tables), `vmcb` by field, `entries` and addresses by name."""

    vmcb_address: int
    words: dict[int, int]
    vmcb: dict[str, int]
    entries: dict[str, int]
    gva: dict[str, int]
    gpa: dict[str, int]
    spa: dict[str, int]
    watch: tuple[int, ...]
    arena_used: int
    """Bytes of the arena, from its start, that hold tables."""
    entry_gva: dict[str, int] = field(default_factory=dict)
    """Where L2 finds the entries of its own tables for a to d, by name."""
    vmcb_page: bytes = b""
    """The VMCB's whole page."""
    touched: dict[int, None] = field(default_factory=dict)
    """The sPAs of `words`."""
    system: int = 0
    """sPA of the page with L2's IDT, GDT, TSS and stack."""
    code: tuple[int, int] = (0, 0)
    """gVA of L2's code page, by whether at CPL 3."""
    mailbox: tuple[int, int] = (0, 0)


@dataclass
class _Builder:
    image: Image
    words: dict[int, int] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    next_page: int = 0

    def page(self) -> int:
        self.next_page += PAGE
        return self.image.arena.start + self.next_page - PAGE

    def descend(self, table: int, address: int, shift: int, names: list[str], to_spa: dict[int, int]) -> int:
        """Make the entries for `address` down to the one with `shift`; returns that one's sPA.

        `to_spa` gives the sPA of a table by the address that entries hold (the same in the nested
        dimension); tables that are missing are added there by the caller's `page`.
        """
        height = 3
        while True:
            at = table + (address >> 12 + 9 * height & 0x1FF) * 8
            for name in names:
                self.entries.setdefault(f"{name}.{LEVEL_NAMES[height]}", at)
            if 12 + 9 * height == shift:
                return at
            if at not in self.words:
                spa = self.page()
                to_spa[spa] = spa
                self.words[at] = spa | _USER_BITS
            table = to_spa[self.words[at] & ~0xFFF]
            height -= 1


def build(image: Image, cpu: Cpu, guest_page: str = "4K", nested_page: str = "4K") -> World:
    """The world with a to d mapped by pages of `guest_page` (4K, 2M, 1G) in the guest dimension and
    of `nested_page` in the nested one; `none` there is NP_ENABLE=0: L2's tables hold sPAs."""
    make = _Builder(image)
    nested = nested_page != NO_NESTED_PAGING
    home = 1 << 39 if cpu.maxphyaddr >= 40 else 8 << 30
    ncr3 = make.page() if nested else 0
    identity: dict[int, int] = {}

    def map_nested(gpa: int, spa: int, shift: int, names: list[str], bits: int = _USER_BITS) -> None:
        if not nested:
            return
        at = make.descend(ncr3, gpa, shift, names, identity)
        make.words[at] = spa & ~((1 << shift) - 1) | bits | (PS if shift > 12 else 0)

    gpa: dict[str, int] = {}
    spa: dict[str, int] = {}
    gva: dict[str, int] = {}
    # L2's tables, each in a region of its own; those of its code and mailbox are in the first.
    to_spa: dict[int, int] = {}
    for number, table in enumerate(TABLES):
        gpa[table] = home + (number + 1 << 30) + (0x21 + number << 21) + (0x31 + number << 12)
        spa[table] = make.page()
        if not nested:
            gpa[table] = spa[table]
        to_spa[gpa[table]] = spa[table]
        map_nested(gpa[table], spa[table], 12, [f"nested.{table}"])
    own_tables = []
    for number in range(3):
        address = home + (0x10 << 21) + (0x20 + number << 12)
        own_spa = make.page()
        own_tables.append(address if nested else own_spa)
        to_spa[own_tables[-1]] = own_spa
        map_nested(address, own_spa, 12, [], _USER_BITS | _KEPT)
    system = image.arena.end - PAGE
    spa |= {"code": image.l2_page, "mailbox": image.mailbox} | dict.fromkeys(SYSTEM, system)
    for number, name in enumerate(("code", "mailbox", *SYSTEM)):
        gpa[name] = home + (0x10 << 21) + (0x23 + number << 12) if nested else spa[name]
        map_nested(gpa[name], spa[name], 12, [f"nested.{name}"], _USER_BITS | _KEPT)
        for level in ("pml4e", "pdpte", "pde"):
            if nested:
                make.words[make.entries[f"nested.{name}.{level}"]] |= A

    # L2's own mappings, side by side: code and mailbox for CPL 0 and for CPL 3, its tables, its system pages.
    tables = [gpa["pml4"], *own_tables]
    for upper, lower, shift in zip(tables, tables[1:], (39, 30, 21), strict=False):
        make.words[to_spa[upper] + (_SUPPORT_GVA >> shift & 0x1FF) * 8] = lower | _USER_BITS | A
    last = to_spa[tables[-1]] + 0x40 * 8
    own = (("code", P), ("code", P | US), ("mailbox", P | RW), ("mailbox", _USER_BITS))
    slots = (*own, *((name, P | RW) for name in (*TABLES, *SYSTEM)))
    for slot, (name, bits) in enumerate(slots):
        make.words[last + 8 * slot] = gpa[name] | bits | _KEPT

    # Pages a to d. A large page keeps the offset in it; a 4K leaf scatters; regions of 2M rotate.
    guest_shift, nested_shift = PAGE_SHIFTS[guest_page], PAGE_SHIFTS.get(nested_page, 0)
    offset = image.data.start & (1 << 30) - 1
    regions = (image.data.end - image.data.start) // REGION
    tables = [gpa[t] for t in TABLES]
    for number, page in enumerate(PAGES):
        inside = _TEST_PT + number << 12
        gva[page] = _TEST_GVA + offset + inside
        region, inside = _next(0, inside, guest_shift, _FLIP_GUEST, regions)
        gpa[page] = (_DATA_GPA + offset if nested else image.data.start) + region * REGION + inside
        if nested:
            region, inside = _next(region, inside, nested_shift, _FLIP_NESTED, regions)
        spa[page] = image.data.start + region * REGION + inside
        for height in (3, 2, 1, 0):
            at = to_spa[tables[3 - height]] + (gva[page] >> 12 + 9 * height & 0x1FF) * 8
            make.entries[f"guest.{page}.{LEVEL_NAMES[height]}"] = at
            if 12 + 9 * height == guest_shift:
                make.words[at] = gpa[page] >> guest_shift << guest_shift | _USER_BITS | (PS if height else 0)
                break
            make.words[at] = tables[4 - height] | _USER_BITS
        map_nested(gpa[page], spa[page], nested_shift, [f"nested.{page}"])

    aliases = [_SUPPORT_GVA + (n << 12) for n in range(len(slots))]
    code = (aliases[0], aliases[1])
    gva |= dict(zip(SYSTEM, aliases[-len(SYSTEM):], strict=True))
    vmcb = initial_vmcb(image, gva, gcr3=gpa["pml4"], ncr3=ncr3) | {"np_control": NP_ENABLE if nested else 0}
    make.words |= _system_page(system, gva["stack"], code[0] + image.l2_labels["vectors"])
    arena = range(image.arena.start, image.arena.start + make.next_page, PAGE)
    return World(
        vmcb_address=image.vmcbs.start,
        words=make.words,
        vmcb=vmcb,
        entries=make.entries,
        gva=gva,
        gpa=gpa,
        spa=spa,
        watch=(*arena, system, *sorted({spa[p] for p in PAGES})),
        arena_used=make.next_page,
        entry_gva={
            name: aliases[4 + TABLES.index(table)] + (at & 0xFFF)
            for name, at in make.entries.items()
            for table in TABLES
            if at & ~0xFFF == spa[table]
        },
        vmcb_page=_page_of(vmcb),
        touched=dict.fromkeys(make.words),
        system=system,
        code=code,
        mailbox=(aliases[2], aliases[3]),
    )


def _system_page(page: int, stack: int, vectors: int) -> dict[int, int]:
    """L2's IDT, GDT and TSS at sPA `page`; the rest of it is stack. `vectors` is the gVA of the first
    handler; each has four bytes (guests/l1/l2_long.S)."""
    words = {page + _GDT + (_CODE_SELECTOR & ~7): 0x00AF_9B00_0000_FFFF, page + _TSS + 4: stack + _RSP0}
    for vector in range(32):
        offset = vectors + 4 * vector
        gate = offset & 0xFFFF | _CODE_SELECTOR << 16 | 0x8E00 << 32 | (offset >> 16 & 0xFFFF) << 48
        words[page + 16 * vector] = gate
        words[page + 16 * vector + 8] = offset >> 32
    return words


def _page_of(vmcb: dict[str, int]) -> bytes:
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


def initial_vmcb(image: Image, gva: dict[str, int], gcr3: int, ncr3: int) -> dict[str, int]:
    """A VMCB for 64-bit L2. Where a value is free it is unlike L1's and unlike any other, so that a
    field loaded or saved in the wrong place shows."""
    return {
        "intercept_exceptions": 0xFFFF_FFFF,
        "intercept_misc1": 1 << 31 | 1 << 24,  # SHUTDOWN: a triple fault of L2 is L2's; HLT: its handlers' end
        "intercept_misc2": MISC2_VMRUN | MISC2_VMMCALL,
        "iopm_base": image.iopm,
        "msrpm_base": image.msrpm,
        "asid": 5,
        "tlb_control": 1,
        "v_intr": 1 << 24,  # V_INTR_MASKING
        "ncr3": ncr3,
        **_segment("es", 0x0038, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("cs", _CODE_SELECTOR, 0xA9B, 0xFFFF_FFFF, 0),
        **_segment("ss", 0x0030, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("ds", 0x0040, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("fs", 0x0048, 0xC93, 0xFFFF_FFFF, 0x0000_1234_5000_0000),
        **_segment("gs", 0x0050, 0xC93, 0xFFFF_FFFF, 0x0000_1234_6000_0000),
        **_segment("gdtr", 0, 0, 0x7F, gva["gdt"] + _GDT),
        **_segment("ldtr", 0x0058, 0x082, 0x17, 0x0000_1234_8000_0000),
        **_segment("idtr", 0, 0, 0x1FF, gva["idt"]),
        **_segment("tr", 0x0068, 0x08B, 0x67, gva["tss"] + _TSS),
        "efer": EFER.SCE | EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME,
        "cr0": CR0.PG | CR0.AM | CR0.WP | CR0.NE | CR0.ET | CR0.PE,
        "cr4": CR4.PAE | CR4.PGE | CR4.OSFXSR,
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


def _segment(name: str, selector: int, attrib: int, limit: int, base: int) -> dict[str, int]:
    return {f"{name}.selector": selector, f"{name}.attrib": attrib, f"{name}.limit": limit, f"{name}.base": base}
