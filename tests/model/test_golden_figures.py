"""Every bit of every entry, as the figures of chapter 5 draw it.

The figures are written down here field by field. Each bit of each entry is set (or cleared) alone, in
a real walk of either dimension, and must do what a field of that name does: nothing, a reserved-bit fault,
a bit of an address, a right. Memory is 52 bits wide, so that address bits are followed too.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.model.golden import Case

LONG_TABLE = "63 NX, 62:52 AVL, 51:12 BASE, 11:9 AVL, 8:7 MBZ, 6 IGN, 5 A, 4 PCD, 3 PWT, 2 U/S, 1 R/W, 0 P"
LONG_PDPE = "63 NX, 62:52 AVL, 51:12 BASE, 11:9 AVL, 8 IGN, 7 0, 6 IGN, 5 A, 4 PCD, 3 PWT, 2 U/S, 1 R/W, 0 P"
LONG_LEAF = "63 NX, 62:59 AVL, 58:52 AVL, "  # 62:59 are a key with CR4.PKE=1
LOW_LEAF = "11:9 AVL, 8 G, 7 1, 6 D, 5 A, 4 PCD, 3 PWT, 2 U/S, 1 R/W, 0 P"
PAE_PDPE = "63:52 MBZ, 51:12 BASE, 11:9 AVL, 8:5 MBZ, 4 PCD, 3 PWT, 2:1 MBZ, 0 P"

FIGURES = {
    # figure: mode, level (0 is the root), how many levels the walk has, fields
    "5-5 PDE": ("32-bit", 0, 2, "31:12 BASE, 11:9 AVL, 8 IGN, 7 0, 6 IGN, 5 A, 4 PCD, 3 PWT, 2 U/S, 1 R/W, 0 P"),
    "5-6 PTE": ("32-bit", 1, 2, "31:12 BASE, 11:9 AVL, 8 G, 7 PAT, 6 D, 5 A, 4 PCD, 3 PWT, 2 U/S, 1 R/W, 0 P"),
    "5-8 PDE 4M": ("32-bit", 0, 1, "31:22 BASE, 21 MBZ, 20:13 HIGH, 12 PAT, " + LOW_LEAF),
    "5-10 PDPE": ("PAE", 0, 3, PAE_PDPE),
    "5-11 PDE": ("PAE", 1, 3, "63 NX, 62:52 MBZ, 51:12 BASE, 11:9 AVL, 8 IGN, 7 0, 6 IGN, 5 A, 4 PCD, 3 PWT, 2 U/S, "
                              "1 R/W, 0 P"),
    "5-12 PTE": ("PAE", 2, 3, "63 NX, 62:52 MBZ, 51:12 BASE, 11:9 AVL, 8 G, 7 PAT, 6 D, 5 A, 4 PCD, 3 PWT, 2 U/S, "
                              "1 R/W, 0 P"),
    "5-14 PDPE": ("PAE", 0, 2, PAE_PDPE),
    "5-15 PDE 2M": ("PAE", 1, 2, "63 NX, 62:52 MBZ, 51:21 BASE, 20:13 MBZ, 12 PAT, " + LOW_LEAF),
    "5-19 PML5E": ("5-level", 0, 5, LONG_TABLE),
    "5-20 PML4E": ("4-level", 0, 4, LONG_TABLE),
    "5-20 PML4E of five": ("5-level", 1, 5, LONG_TABLE),
    "5-21 PDPE": ("4-level", 1, 4, LONG_PDPE),
    "5-22 PDE": ("4-level", 2, 4, LONG_PDPE),
    "5-23 PTE": ("4-level", 3, 4, LONG_LEAF + "51:12 BASE, 11:9 AVL, 8 G, 7 PAT, 6 D, 5 A, 4 PCD, 3 PWT, 2 U/S, "
                                              "1 R/W, 0 P"),
    "5-26 PML5E": ("5-level", 0, 4, LONG_TABLE),
    "5-27 PML4E": ("4-level", 0, 3, LONG_TABLE),
    "5-28 PDPE": ("4-level", 1, 3, LONG_PDPE),
    "5-29 PDE 2M": ("4-level", 2, 3, LONG_LEAF + "51:21 BASE, 20:13 MBZ, 12 PAT, " + LOW_LEAF),
    "5-32 PML5E": ("5-level", 0, 3, LONG_TABLE),
    "5-33 PML4E": ("4-level", 0, 2, LONG_TABLE),
    "5-34 PDPE 1G": ("4-level", 1, 2, LONG_LEAF + "51:30 BASE, 29:13 MBZ, 12 PAT, " + LOW_LEAF),
}

MODES = {
    # CR4, EFER, address, its index at each level, bytes of an entry, lowest index bit at each level
    "32-bit": (0x10, 0x1000, 0x1234_5678, (0x48, 0x345), 4, (22, 12)),
    "PAE": (0x20, 0x1800, 0xD234_5678, (3, 0x91, 0x145), 8, (30, 21, 12)),
    "4-level": (0x20, 0x1D00, 0x7F12_3456_7ABC, (0xFE, 0x48, 0x1A2, 0x167), 8, (39, 30, 21, 12)),
    "5-level": (0x1020, 0x1D00, 0x0052_7F12_3456_7ABC, (0x52, 0xFE, 0x48, 0x1A2, 0x167), 8, (48, 39, 30, 21, 12)),
}

ROOT, NEXT, PAGE = 0x7000, 0x5000, 0x40_0000_0000
RSVD, P = 8, 1


def fields(text: str) -> dict[int, str]:
    """Names by bit."""
    found: dict[int, str] = {}
    for part in text.split(", "):
        bits, name = part.split()
        high, _, low = bits.partition(":")
        found |= dict.fromkeys(range(int(low or high), int(high) + 1), name)
    return found


@dataclass
class Figure:
    """Tables with the figure's entry at its level; all others grant all."""

    name: str
    nested: bool

    def __post_init__(self) -> None:
        self.mode, self.level, self.levels, text = FIGURES[self.name]
        self.fields = fields(text)
        self.cr4, self.efer, self.address, self.index, self.width, self.shifts = MODES[self.mode]
        self.leaf = self.level == self.levels - 1
        self.offset = self.address & (1 << self.shifts[self.levels - 1]) - 1
        masks = [0x3FF if self.width == 4 else 0x1FF] * len(self.shifts)
        if self.mode == "PAE":
            masks[0] = 3
        assert [self.address >> n & mask for n, mask in zip(self.shifts, masks, strict=True)] == list(self.index)
        assert set(self.fields) == set(range(8 * self.width))

    @property
    def plain(self) -> int:
        """The entry with P, R/W and U/S where there are such bits, and PS as the figure has it."""
        return sum(1 << bit for bit, name in self.fields.items() if name in ("P", "R/W", "U/S", "1"))

    def case(self, entry: int, base: int, cpu: int = 52, nxe: bool = True) -> Case:
        """The walk leads through `entry`, with what it leads to at `base` (of the page, for a leaf)."""
        efer = self.efer if nxe else self.efer & ~0x800
        out = Case(cr4=self.cr4, efer=efer, cr3=ROOT, maxphyaddr=cpu)
        if self.nested:
            # L2 without paging in the nested dimension, where a gPA is the address as it stands
            out = Case(cr0=1, cr4=0, efer=0x1000, np_control=1, ncr3=ROOT, host_cr4=self.cr4, host_efer=efer,
                       maxphyaddr=cpu)
        table = ROOT
        for level in range(self.levels):
            at = table + self.index[level] * self.width
            last = level == self.levels - 1
            if level == self.level:
                out.put(at, entry, self.width)
                table = base
            else:
                table = PAGE if last else NEXT
                if self.width == 4 and last:
                    table = PAGE & 0xFFFF_FFFF | 0x40_0000
                rights = 1 if self.mode == "PAE" and level == 0 else 7
                out.put(at, table | rights | (0x80 if last and self.shifts[level] > 12 else 0), self.width)
        self.page = table
        self.at = ROOT + self.index[0] * self.width if self.level == 0 else NEXT + self.index[self.level] * self.width
        return out

    def reached(self) -> tuple[str, int]:
        return "sPA", self.page | self.offset

    def fault(self, code: int) -> tuple[str, int] | tuple[str, int, int]:
        """The #PF, or the #NPF of the final walk, whose accesses are user accesses."""
        return ("#NPF", code | 4 | 1 << 32, self.address) if self.nested else ("#PF", code)


@pytest.fixture(params=[False, True], ids=["guest", "nested"])
def nested(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


EVERY = pytest.mark.parametrize("name", FIGURES)


def _base(figure: Figure) -> int:
    return (0x40_0000 if figure.width == 4 else PAGE) if figure.leaf else NEXT


@EVERY
def test_plain(name: str, nested: bool) -> None:
    figure = Figure(name, nested)
    case = figure.case(figure.plain | _base(figure), _base(figure))
    for access in ("user read", "user write", "user fetch"):
        assert case.outcome(figure.address, access) == figure.reached()


@EVERY
def test_bits_that_must_be_zero(name: str, nested: bool) -> None:
    """5.4.1: a set one faults with RSVD, whatever the access; in an entry that is not present it does not matter."""
    figure = Figure(name, nested)
    for bit in (bit for bit, field in figure.fields.items() if field == "MBZ"):
        case = figure.case(figure.plain | _base(figure) | 1 << bit, _base(figure))
        assert case.outcome(figure.address, "read") == figure.fault(P | RSVD), bit
        absent = figure.case(figure.plain & ~P | _base(figure) | 1 << bit, _base(figure))
        assert absent.outcome(figure.address, "read") == figure.fault(0), bit


@EVERY
def test_bits_without_a_say(name: str, nested: bool) -> None:
    """AVL, IGN, PCD, PWT, PAT, G, and A and D as they are read: no outcome depends on them."""
    figure = Figure(name, nested)
    for bit in (b for b, field in figure.fields.items() if field in ("AVL", "IGN", "PCD", "PWT", "PAT", "G", "A", "D")):
        for nxe in (True, False):
            case = figure.case(figure.plain | _base(figure) | 1 << bit, _base(figure), nxe=nxe)
            assert case.outcome(figure.address, "user write") == figure.reached(), bit


@EVERY
def test_base_bits_are_address_bits(name: str, nested: bool) -> None:
    figure = Figure(name, nested)
    for bit in (bit for bit, field in figure.fields.items() if field == "BASE"):
        case = figure.case(figure.plain | 1 << bit, 1 << bit)
        assert case.outcome(figure.address) == figure.reached(), bit


@pytest.mark.parametrize("cpu", [36, 40, 48])
@EVERY
def test_base_bits_that_the_cpu_has_not(name: str, cpu: int, nested: bool) -> None:
    """5.4.1: unimplemented bits of an address are reserved, in entries of 64 bits."""
    figure = Figure(name, nested)
    low = 0x40_0000 if figure.leaf and figure.width == 4 else 1 << 30 if figure.leaf else NEXT
    for bit in (bit for bit, field in figure.fields.items() if field == "BASE" and bit >= cpu - 1):
        base = low | 1 << bit
        outcome = figure.case(figure.plain | base, base, cpu).outcome(figure.address)
        if bit >= cpu:
            assert outcome == figure.fault(P | RSVD), bit
        elif figure.leaf or cpu > 38:  # else the page's own address is too wide
            assert outcome == figure.reached(), bit


@EVERY
def test_no_execute(name: str, nested: bool) -> None:
    figure = Figure(name, nested)
    if "NX" not in figure.fields.values():
        assert figure.width == 4 or figure.fields[63] == "MBZ"
        return
    entry = figure.plain | _base(figure) | 1 << 63
    case = figure.case(entry, _base(figure))
    assert case.outcome(figure.address, "user fetch") == figure.fault(P | 4 | 0x10)
    assert case.outcome(figure.address, "user write") == figure.reached()
    off = figure.case(entry, _base(figure), nxe=False)
    assert off.outcome(figure.address, "user write") == figure.fault(P | RSVD | 4 | 2)


@EVERY
def test_rights(name: str, nested: bool) -> None:
    figure = Figure(name, nested)
    if figure.fields[1] == "MBZ":
        return
    for bit, access in ((1, "user write"), (2, "user read")):
        case = figure.case(figure.plain & ~(1 << bit) | _base(figure), _base(figure))
        assert case.outcome(figure.address, access) == figure.fault(P | 4 | (2 if bit == 1 else 0))


@EVERY
def test_accessed_and_dirty(name: str, nested: bool) -> None:
    """5.4.1: A is set by any access, D by a write in the entry that maps the page; an entry that has no such
    bits (a PDPE of PAE) is never written."""
    figure = Figure(name, nested)
    for access, dirty in (("read", 0), ("write", 0x40), ("fetch", 0)):
        entry = figure.plain | _base(figure)
        case = figure.case(entry, _base(figure))
        case.after(figure.address, access)
        has = {figure.fields[bit] for bit in (5, 6)}
        wanted = (0x20 if "A" in has else 0) | (dirty if "D" in has else 0)
        assert case.get(figure.at, figure.width) == entry | wanted


@pytest.mark.parametrize(("cpu", "bits"), [(52, 8), (40, 8), (38, 6), (36, 4), (32, 0)])
def test_high_bits_of_a_4m_page(cpu: int, bits: int, nested: bool) -> None:
    """5.2.2: PDE[20:13] are address bits 39:32, as far as the CPU has them."""
    figure = Figure("5-8 PDE 4M", nested)
    for bit in range(8):
        case = figure.case(figure.plain | 0x40_0000 | 1 << 13 + bit, 0x40_0000 | 1 << 32 + bit, cpu)
        assert case.outcome(figure.address) == (figure.reached() if bit < bits else figure.fault(P | RSVD))


def test_ps_of_a_pde_without_pse(nested: bool) -> None:
    """5.1.4: with CR4.PSE=0 bit 7 of a 32-bit PDE says nothing."""
    figure = Figure("5-5 PDE", nested)
    figure.cr4 = 0
    case = figure.case(figure.plain | NEXT | 0x80, NEXT)
    assert case.outcome(figure.address) == figure.reached()


def test_ps_of_a_pdpe_without_1g_pages(nested: bool) -> None:
    """5.3.5: CPUID 8000_0001h EDX[26]=0."""
    figure = Figure("5-34 PDPE 1G", nested)
    case = figure.case(figure.plain | PAGE, PAGE)
    assert case.but(page1g=False).outcome(figure.address) == figure.fault(P | RSVD)


@pytest.mark.parametrize(("name", "low", "high"), [
    # figures 5-2, 5-3 and 5-16: bits of CR3 that are no address, low ones and above 31
    ("5-5 PDE", 0xFFF, 0xFFFF_FFFF << 32), ("5-10 PDPE", 0x1F, 0xFFFF_FFFF << 32), ("5-20 PML4E", 0xFFF, 0),
    ("5-19 PML5E", 0xFFF, 0),
])
def test_bits_of_cr3_that_are_no_address(name: str, low: int, high: int, nested: bool) -> None:
    figure = Figure(name, nested)
    case = figure.case(figure.plain | NEXT, NEXT)
    assert case.outcome(figure.address) == figure.reached()
    for bit in range(64):
        if (low | high) >> bit & 1:
            root = ROOT | 1 << bit
            assert case.but(**{"ncr3" if nested else "cr3": root}).outcome(figure.address) == figure.reached(), bit


@pytest.mark.parametrize("name", ["5-5 PDE", "5-10 PDPE", "5-20 PML4E", "5-19 PML5E"])
def test_bits_of_cr3_that_are(name: str, nested: bool) -> None:
    """They are added up by no carry: each leads to tables of its own."""
    figure = Figure(name, nested)
    lowest = 5 if figure.mode == "PAE" else 12
    for bit in range(lowest, 52 if "level" in figure.mode else 32):
        case = figure.case(figure.plain | NEXT, NEXT)
        entry = case.get(figure.at, figure.width)
        case.put(figure.at, 0, figure.width)
        case.put((1 << bit) + figure.index[0] * figure.width, entry, figure.width)
        assert case.but(**{"ncr3" if nested else "cr3": 1 << bit}).outcome(figure.address) == figure.reached(), bit
