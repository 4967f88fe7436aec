"""The world that every scenario starts in: two dimensions of tables, a VMCB, and names for it all.

L2 has four pages under test, a to d, consecutive in gVA and scattered in gPA and sPA. Each table of
L2 lies in a 1G region of gPA of its own, so that the nested walk of each goes through entries of its
own, and can be made to fault alone. What L2 itself needs (its code, its mailbox, the tables that map
them) lies under other root entries than a to d, in both dimensions, with A and D set from the start.

    dimension   root slot   what
    guest       90          a b c d
    guest       511         L2's code and mailbox, each twice: for CPL 0 and for CPL 3
    nested      0           a b c d
    nested      1           L2's tables (pml4, pdpt, pd, pt), its code and its mailbox

With less than 40 physical address bits, slot 1 of the nested root cannot be reached: slot 0 has it all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from harness.model.entries import LEVEL_NAMES, PAGE_SHIFTS, PS, RW, US, A, D, P
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.vmcb import MISC2_VMMCALL, MISC2_VMRUN, NP_ENABLE
from harness.scenario.ops import NO_NESTED_PAGING
from harness.wire.image import PAGE, Image

PAGES: Final = ("a", "b", "c", "d")
TABLES: Final = ("pml4", "pdpt", "pd", "pt")
"""L2's tables for pages a to d, as targets of the nested dimension."""

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
    support = [home + (0x10 << 21) + (0x20 + n << 12) for n in range(5)]
    if not nested:
        support = [make.page(), make.page(), make.page(), image.l2_page, image.mailbox]
    for address in support[:3]:
        to_spa[address] = make.page() if nested else address
        map_nested(address, to_spa[address], 12, [], _USER_BITS | _KEPT)
    gpa["code"], gpa["mailbox"] = support[3:]
    spa["code"], spa["mailbox"] = image.l2_page, image.mailbox
    map_nested(gpa["code"], spa["code"], 12, ["nested.code"], _USER_BITS | _KEPT)
    map_nested(gpa["mailbox"], spa["mailbox"], 12, ["nested.mailbox"], _USER_BITS | _KEPT)
    for name in ("code", "mailbox") if nested else ():
        for level in ("pml4e", "pdpte", "pde"):
            entry = make.entries[f"nested.{name}.{level}"]
            make.words[entry] |= A

    # L2's own mappings: the same pages for CPL 0 and for CPL 3, side by side.
    tables = [gpa["pml4"], *support[:3]]
    for upper, lower, shift in zip(tables, tables[1:], (39, 30, 21), strict=False):
        make.words[to_spa[upper] + (_SUPPORT_GVA >> shift & 0x1FF) * 8] = lower | _USER_BITS | A
    last = to_spa[tables[-1]] + 0x40 * 8
    own = (("code", P), ("code", P | US), ("mailbox", P | RW), ("mailbox", _USER_BITS))
    slots = (*own, *((table, P | RW) for table in TABLES))
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

    arena = range(image.arena.start, image.arena.start + make.next_page, PAGE)
    aliases = [_SUPPORT_GVA + (n << 12) for n in range(len(slots))]
    return World(
        vmcb_address=image.vmcbs.start,
        words=make.words,
        vmcb=initial_vmcb(image, gcr3=gpa["pml4"], ncr3=ncr3) | {"np_control": NP_ENABLE if nested else 0},
        entries=make.entries,
        gva=gva,
        gpa=gpa,
        spa=spa,
        watch=(*arena, *sorted({spa[p] for p in PAGES})),
        arena_used=make.next_page,
        entry_gva={
            name: aliases[4 + TABLES.index(table)] + (at & 0xFFF)
            for name, at in make.entries.items()
            for table in TABLES
            if at & ~0xFFF == spa[table]
        },
        code=(aliases[0], aliases[1]),
        mailbox=(aliases[2], aliases[3]),
    )


def _next(region: int, inside: int, shift: int, flip: int, regions: int) -> tuple[int, int]:
    """Where a 2M region and the offset in it go in one dimension with pages of 1 << `shift`."""
    if shift == 30:
        return region, inside
    return (region + 1) % regions, inside ^ (flip << 12 if shift == 12 else 0)


def initial_vmcb(image: Image, gcr3: int, ncr3: int) -> dict[str, int]:
    """A VMCB for 64-bit L2. Where a value is free it is unlike L1's and unlike any other, so that a
    field loaded or saved in the wrong place shows."""
    return {
        "intercept_exceptions": 0xFFFF_FFFF,
        "intercept_misc1": 1 << 31,  # SHUTDOWN: a triple fault of L2 is L2's
        "intercept_misc2": MISC2_VMRUN | MISC2_VMMCALL,
        "iopm_base": image.iopm,
        "msrpm_base": image.msrpm,
        "asid": 5,
        "tlb_control": 1,
        "v_intr": 1 << 24,  # V_INTR_MASKING
        "ncr3": ncr3,
        **_segment("es", 0x0038, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("cs", 0x0028, 0xA9B, 0xFFFF_FFFF, 0),
        **_segment("ss", 0x0030, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("ds", 0x0040, 0xC93, 0xFFFF_FFFF, 0),
        **_segment("fs", 0x0048, 0xC93, 0xFFFF_FFFF, 0x0000_1234_5000_0000),
        **_segment("gs", 0x0050, 0xC93, 0xFFFF_FFFF, 0x0000_1234_6000_0000),
        **_segment("gdtr", 0, 0, 0x5F, 0x0000_1234_7000_0000),
        **_segment("ldtr", 0x0058, 0x082, 0x17, 0x0000_1234_8000_0000),
        **_segment("idtr", 0, 0, 0x1FF, 0x0000_1234_9000_0000),
        **_segment("tr", 0x0068, 0x08B, 0x67, 0x0000_1234_A000_0000),
        "efer": EFER.SCE | EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME,
        "cr0": CR0.PG | CR0.AM | CR0.WP | CR0.NE | CR0.ET | CR0.PE,
        "cr4": CR4.PAE | CR4.PGE | CR4.OSFXSR,
        "cr3": gcr3,
        "dr6": 0xFFFF_0FF0,
        "dr7": 0x400,
        "rflags": RFLAGS.ONE,
        "rsp": 0x0000_1234_B000_0018,
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
