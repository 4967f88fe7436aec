"""The world that every scenario starts in: two dimensions of tables, a VMCB, and names for it all.

L2 has four pages under test, a to d, consecutive in gVA and scattered in gPA and sPA. Each table of
L2 has nested entries of its own (down from the PDPTE where gPAs are wide enough), so that the nested
walk of each can be made to fault alone. What L2 itself needs (its code, its mailbox, its system
structures, the tables that map them) lies under another root entry than a to d, in both dimensions,
with A and D set from the start.

    dimension   what                                                  where (4-level)
    guest       a b c d                                               root entry 90
    guest       L2's code and mailbox, each for CPL 0 and for CPL 3;  root entry 511
                its tables; its IDT, GDT, TSS and stack
    nested      a b c d                                               root entry 0
    nested      L2's tables (pml4, pdpt, pd, pt), all that is L2's    root entry 1

Each dimension has one table more, that nothing points to at first: `alt`, and `nested-alt`. Put in the place of any
table above a to d, the root included, it maps a to b, b to c and so on; `nested-alt` also gPAs of L2's tables to `alt`.

Four gPAs more lead to page a by other entries of its nested tables, or by the last entry of one, so that one table is
reached by two ways and in each of its halves: see ALIASES.

`device` is the frame of L1's local APIC, which is no RAM.

With gPAs of less than 40 bits (a CPU that has no more, a mode that makes no more) root entry 0 of the
nested dimension has it all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from harness.model import local_apic
from harness.model.entries import PAGE_SHIFTS, RW, US, P
from harness.model.registers import CR4, Cpu
from harness.scenario import modes
from harness.scenario.initial import INITIAL_HOST, SYSTEM, system_words, vmcb_fields, vmcb_page
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import DEFAULT_MODE, NO_NESTED_PAGING
from harness.scenario.tables import KEPT, RIGHTS, Arena, Tables
from harness.wire.image import PAGE, Image, Region
from harness.wire.layout import MAILBOX_CODE

PAGES: Final = ("a", "b", "c", "d")
DEVICE: Final = "device"
"""The frame of L1's local APIC."""

ALIASES: Final = {"last": 0x1FF << 12, "near": 1 << 21, "half": 1 << 29, "far": 1 << 30}
"""gPAs that L1 maps to page a too, by the bits in which they are not page a's; of `last` they are all 1. Entries that
the ways have in common are the same ones, and tables that are missing are page a's own."""

REGION: Final = 1 << 21
_TEST_PT: Final = 0x91
_FLIP_GUEST: Final = 0x21
_FLIP_NESTED: Final = 0x42
"""What 4K leaves do to the low bits of the page number, so that no dimension is linear."""


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
    arena: Region
    data: Region
    """Where its tables and its pages are."""
    arena_used: int
    """Bytes of the arena, from its start, that hold tables."""
    entry_gva: dict[str, int] = field(default_factory=dict)
    """Where L2 finds the entries of its own tables for a to d, by name."""
    vmcb_page: bytes = b""
    """The VMCB's whole page."""
    system: int = 0
    """sPA of the page with L2's IDT, GDT, TSS and stack."""
    mode: modes.Mode = MODES[DEFAULT_MODE]
    host_mode: modes.HostMode = HOST_MODES[DEFAULT_MODE]
    entry_widths: dict[str, int] = field(default_factory=dict)
    """Bytes of an entry, by dimension."""
    code: tuple[int, int] = (0, 0)
    """What RIP is at the start of L2's code page, by whether at CPL 3."""
    mailbox: tuple[int, int] = (0, 0)
    maps: dict[str, int] = field(default_factory=dict)
    """sPAs of L1's permission maps for MSRs and ports, `msrpm` and `iopm`: no bit is set."""


@dataclass(frozen=True)
class _Places:
    """Where things lie in gPA: pages a to d, and the rest, with L2's tables `stride` apart."""

    data: int
    home: int
    stride: int


def _places(mode: modes.Mode, host_mode: modes.HostMode, cpu: Cpu, guest_page: str) -> _Places:
    """Pages and tables lie behind different nested entries, also of the root where addresses are wide enough."""
    far = 1 << 39 if cpu.maxphyaddr >= 40 and not host_mode.narrow else 0
    if not mode.long or host_mode.narrow:
        wide = mode.name == "PAE" or guest_page == "4M"  # frames of more than 32 bits
        return _Places(data=far if far and wide else 2 << 30, home=1 << 30, stride=2 << 21)
    return _Places(data=6 << 30, home=far or 8 << 30, stride=(1 << 30) + (1 << 21))


def build(
    image: Image,
    cpu: Cpu,
    guest: str = DEFAULT_MODE,
    nested_mode: str = DEFAULT_MODE,
    guest_page: str = "4K",
    nested_page: str = "4K",
    table_page: str = "4K",
) -> World:
    """The world with L2 in mode `guest` and L1 in mode `nested_mode`, a to d mapped by pages of `guest_page`
    in the guest dimension and of `nested_page` in the nested one; `none` there is NP_ENABLE=0: L2's
    tables hold sPAs. L2's tables for a to d are mapped by nested pages of `table_page`."""
    mode = MODES[guest]
    host_mode = HOST_MODES[nested_mode]
    tables_at, data = _regions(image, mode, host_mode, nested_page != NO_NESTED_PAGING)
    arena = Arena(tables_at.start)
    at = _places(mode, host_mode, cpu, guest_page)
    nested = None
    if nested_page != NO_NESTED_PAGING:
        nested = Tables(arena, host_mode.format(INITIAL_HOST, cpu), arena.page(), lambda address: address)
    gpa: dict[str, int] = {}
    spa: dict[str, int] = {}
    to_spa: dict[int, int] = {}

    def place(
        name: str, address: int, target: int, bits: int = RIGHTS, named: bool = True, shift: int = 12
    ) -> int:
        """Give `name` its gPA and its sPA, and map one to the other by a page of 1 << `shift` bytes."""
        inside = (1 << shift) - 0x1000
        address = address & ~inside | (target if shift > 12 else address) & inside
        gpa[name], spa[name] = address if nested else target, target
        to_spa[gpa[name]] = target
        if nested:
            nested.map(address, target, shift, f"nested.{name}" if named else "", bits, bits & ~KEPT | bits & KEPT >> 1)
        return gpa[name]

    fmt = mode.format(cpu)
    names = [level.name.removesuffix("e") for level in fmt.levels] if fmt else []
    for number, name in enumerate(names):
        shape = (0x21 << 21) + (0x31 + number << 12)
        address = at.home + (number + 1) * at.stride + shape
        if table_page == "1G" and at.stride < 1 << 30:
            address = 3 << 30  # where nothing else is
        place(name, address, arena.page(), shift=PAGE_SHIFTS[table_page])
    system = tables_at.end - PAGE
    own = at.home + (0x10 << 21) + (0x20 << 12)
    for number in range(1, len(names)):
        place(f"own{number}", own + (number << 12), arena.page(), RIGHTS | KEPT, named=False)
    stub = image.stubs[mode.stub]
    targets = {"code": stub.page, "mailbox": image.mailbox} | dict.fromkeys(SYSTEM, system)
    for number, (name, target) in enumerate(targets.items()):
        place(name, own + (8 + number << 12), target, RIGHTS | KEPT)
    if fmt:
        place("alt", own + (8 + len(targets) << 12), arena.page(), RIGHTS | KEPT, named=False)

    gva: dict[str, int] = {}
    aliases: dict[str, int] = {}
    tables = None
    if fmt:
        tables = Tables(arena, fmt, gpa[names[0]], to_spa.__getitem__)
        slots = {"code": P, "code3": P | US, "mailbox": P | RW, "mailbox3": RIGHTS} | dict.fromkeys(
            (*names, *SYSTEM), P | RW)
        for number, (name, bits) in enumerate(slots.items()):
            # an L1 in a 32-bit mode hands L2 an address of 32 bits
            aliases[name] = (modes.OWN_SHORT if host_mode.narrow else mode.own) + (number << 12)
            below = [gpa[f"own{n}"] for n in range(1, len(names))]
            named = f"guest.{name}" if name in SYSTEM else ""
            tables.map(aliases[name], gpa[name.removesuffix("3")], 12, named, bits | KEPT, RIGHTS | KEPT >> 1, below)
    else:
        aliases = gpa | {"code3": gpa["code"], "mailbox3": gpa["mailbox"]}
    gva |= {name: aliases[name] for name in SYSTEM}

    # Pages a to d. A large page keeps the offset in it; a 4K leaf scatters; regions of 2M rotate.
    guest_shift, nested_shift = PAGE_SHIFTS[guest_page], PAGE_SHIFTS.get(nested_page, 0)
    offset = data.start & (1 << 30) - 1
    regions = (data.end - data.start) // REGION
    for number, page in enumerate(PAGES):
        inside = _TEST_PT + number << 12
        gva[page] = mode.test + offset + inside
        region, inside = _next(0, inside, guest_shift, _FLIP_GUEST, regions)
        gpa[page] = (at.data + offset if nested else data.start) + region * REGION + inside
        if nested:
            region, inside = _next(region, inside, nested_shift, _FLIP_NESTED, regions)
        spa[page] = data.start + region * REGION + inside
        if tables:
            tables.map(gva[page], gpa[page], guest_shift, f"guest.{page}", tables=[gpa[n] for n in names[1:]])
        else:
            gva[page] = gpa[page]
        if nested:
            nested.map(gpa[page], spa[page], nested_shift, f"nested.{page}")
    others = dict(zip(PAGES, PAGES[1:] + PAGES[:1], strict=True))
    if tables:
        tables.alternative(spa["alt"], gpa["alt"], {gva[page]: gpa[other] for page, other in others.items()}, {})
    if nested:
        _add_aliases(nested, gpa, spa, nested_shift)
        spa["nested-alt"] = arena.page()
        mapped = {gpa[page]: spa[other] for page, other in others.items()}
        nested.alternative(spa["nested-alt"], spa["nested-alt"], mapped,
                           {gpa[name]: spa["alt"] for name in names})
        for level in nested.fmt.levels:
            index = gpa["a"] >> level.shift & nested.fmt.index_mask
            nested.entries[f"nested.alt-a.{level.name}"] = spa["nested-alt"] + (index << nested.fmt.entry_shift)

    (spa if nested else gpa)[DEVICE] = local_apic.BASE
    maps = {"msrpm": system - 2 * PAGE, "iopm": system - 5 * PAGE}
    vmcb = vmcb_fields(maps, mode, gva, gpa[names[0]] if names else 0, nested.root if nested else None)
    words = arena.words | system_words(
        system, mode, gva["stack"], gva["tss"], aliases["code"] + stub.labels["vectors"])
    code = aliases["code"], aliases["code3"]
    if mode.real:  # RIP is an offset in a segment that begins with the page, and L2 is told where that is
        code = 0, 0
        vmcb["cs.base"] = words[image.mailbox + MAILBOX_CODE] = aliases["code"]
    entries = (tables.entries if tables else {}) | (nested.entries if nested else {})
    return World(
        vmcb_address=(image.low_vmcbs if host_mode.narrow else image.vmcbs).start,
        words=words,
        vmcb=vmcb,
        entries=entries,
        gva=gva,
        gpa=gpa,
        spa=spa,
        watch=(*range(arena.start, arena.start + arena.used, PAGE), system, *sorted({spa[p] for p in PAGES})),
        arena=tables_at,
        data=data,
        arena_used=arena.used,
        entry_gva={
            name: aliases[table] + (at & 0xFFF)
            for name, at in entries.items()
            for table in names
            if at & ~0xFFF == spa[table]
        },
        vmcb_page=vmcb_page(vmcb),
        system=system,
        mode=mode,
        host_mode=host_mode,
        entry_widths={"guest": tables.width if tables else 8, "nested": nested.width if nested else 8},
        code=code,
        mailbox=(aliases["mailbox"], aliases["mailbox3"]),
        maps=maps,
    )


def _regions(image: Image, mode: modes.Mode, host_mode: modes.HostMode, nested: bool) -> tuple[Region, Region]:
    """Where tables and pages are: above 4 GiB, but for what entries of four bytes, or no paging at all, must
    reach, and for tables whose root is a PDPT of PAE, which CR3 has 32 bits for."""
    wide = host_mode.wide if nested else mode.paging and (mode.long or bool(mode.cr4 & CR4.PAE))
    long = not host_mode.narrow if nested else mode.long
    return image.arena if long else image.low_arena, image.data if wide else image.low_data


def _add_aliases(nested: Tables, gpa: dict[str, int], spa: dict[str, int], shift: int) -> None:
    """Map ALIASES to page a, in its own tables; the tables on the way to it get names."""
    spa["nested-root"] = nested.root
    ways = {level.name: nested.entries[f"nested.a.{level.name}"] for level in nested.fmt.levels if level.shift >= shift}
    for name, at in list(ways.items())[1:]:
        spa[f"nested-{name.removesuffix('e')}"] = at & ~0xFFF
    for name, bits in ALIASES.items():
        gpa[name] = gpa["a"] | bits if name == "last" else gpa["a"] ^ bits
        own = next((n for n, level in enumerate(nested.fmt.levels) if (gpa[name] ^ gpa["a"]) >> level.shift), 0)
        below = [at & ~0xFFF for at in list(ways.values())[own + 1:]]
        nested.map(gpa[name], spa["a"], shift, f"nested.{name}", tables=below)


def _next(region: int, inside: int, shift: int, flip: int, regions: int) -> tuple[int, int]:
    """Where a 2M region and the offset in it go in one dimension with pages of 1 << `shift`."""
    if shift > 21:
        return region, inside
    return (region + 1) % regions, inside ^ (flip << 12 if shift == 12 else 0)
