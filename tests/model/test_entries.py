"""Which bits of an entry are reserved: AMD64 manual, volume 2, figures 5-20 to 5-34 and section 5.4.1.

Each bit of each kind of entry is set alone, in a real walk of either dimension, and must or must not
come to a reserved-bit fault. The expectations are the manual's figures, written down here by bit number.
"""

from __future__ import annotations

import pytest

from harness.model.access import NestedPageFault, PageFault, Reached
from harness.model.entries import BITS, PAT_4K, PAT_LARGE, PCD, PWT, long_mode
from tests.model.tables import GVA, NX, PS, RW, US, E, P, Space

DATA = 0x40_0000
GPA = 1 << 39 | 7 << 30 | 0x40_0000

# kind of entry: (level, shift of the page it is walked for, reserved bits whatever the CPU)
FIGURES = {
    "PML4E": ("pml4e", 12, {7, 8}),  # figure 5-20: MBZ over 8:7
    "PDPE": ("pdpte", 12, set[int]()),  # figure 5-21
    "PDPE 1G": ("pdpte", 30, set(range(13, 30))),  # figure 5-34: 29:13, bit 12 is PAT
    "PDE": ("pde", 12, set[int]()),  # figure 5-22
    "PDE 2M": ("pde", 21, set(range(13, 21))),  # figure 5-29: 20:13, bit 12 is PAT
    "PTE": ("pte", 12, set[int]()),  # figure 5-23
}


def _expected(kind: str, maxphyaddr: int, nxe: bool) -> set[int]:
    """5.4.1: bits 51 to MAXPHYADDR are reserved everywhere, NX where EFER.NXE is 0."""
    return FIGURES[kind][2] | set(range(maxphyaddr, 52)) | (set() if nxe else {63})


def _found(space: Space, dimension: str, kind: str) -> set[int]:
    level, shift, _ = FIGURES[kind]
    guest = space.map_guest(GVA, GPA, shift if dimension == "guest" else 12)
    nested = space.map_nested(GPA, DATA, shift if dimension == "nested" else 12)
    at = (guest if dimension == "guest" else nested)[level]
    entry = space.get(at)
    found = set()
    for bit in range(64):
        if bit == 7 and kind in ("PDPE", "PDE"):
            continue  # PS makes it another kind of entry
        space.set(at, entry | 1 << bit)
        try:
            outcome = space.walk(GVA).outcome
        except IndexError:
            continue  # an address bit that is not reserved: it led out of this small memory
        if isinstance(outcome, PageFault | NestedPageFault) and outcome.error_code & E.RSVD:
            found.add(bit)
            # 8.4.2: a reserved bit is looked at only in an entry that is present
            assert outcome.error_code & E.P
            space.set(at, (entry | 1 << bit) & ~P)
            absent = space.walk(GVA).outcome
            assert isinstance(absent, type(outcome)) and not absent.error_code & (E.RSVD | E.P)
    return found


@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.parametrize("dimension", ["guest", "nested"])
@pytest.mark.parametrize("maxphyaddr", [40, 48, 52])
@pytest.mark.parametrize("nxe", [True, False])
def test_reserved_bits(kind: str, dimension: str, maxphyaddr: int, nxe: bool) -> None:
    """The dimension's own EFER.NXE decides; the other one's is the opposite here (15.25.7)."""
    guest = dimension == "guest"
    space = Space(maxphyaddr=maxphyaddr, guest_nxe=nxe == guest, host_nxe=nxe != guest)
    assert _found(space, dimension, kind) == _expected(kind, maxphyaddr, nxe)


@pytest.mark.parametrize("dimension", ["guest", "nested"])
def test_1g_pages_need_the_cpu(dimension: str) -> None:
    """CPUID 8000_0001h EDX[26]=0: PS is reserved in a PDPE (section 5.3.5)."""
    space = Space(page1g=False)
    guest = space.map_guest(GVA, GPA, 30 if dimension == "guest" else 12)
    nested = space.map_nested(GPA, 0, 30 if dimension == "nested" else 12)
    outcome = space.walk(GVA).outcome
    if dimension == "guest":
        assert outcome == PageFault(E.P | E.RSVD, GVA)
    else:
        assert outcome == NestedPageFault(E.P | E.RSVD | E.U | E.FINAL, space_gpa(GVA))
    space.change((guest if dimension == "guest" else nested)["pdpte"], clear=PS)
    changed = space.walk(GVA).outcome
    assert isinstance(changed, PageFault | NestedPageFault) and not changed.error_code & E.RSVD


def space_gpa(gva: int) -> int:
    return GPA | gva & 0xFFF


@pytest.mark.parametrize(("shift", "pat"), [(12, 7), (21, 12), (30, 12)])
def test_pat_and_global_are_never_reserved_in_a_leaf(shift: int, pat: int) -> None:
    """5.4.1: PAT is bit 7 of a PTE and bit 12 of a large page; G gives no fault."""
    space = Space(nested=False)
    level = {12: "pte", 21: "pde", 30: "pdpte"}[shift]
    at = space.map_guest(GVA, 0, shift)[level]
    space.change(at, set=1 << pat | 1 << 8)
    assert space.walk(GVA).outcome == Reached(GVA & (1 << shift) - 1, GVA & (1 << shift) - 1)


def test_format_in_numbers() -> None:
    """The example of section 5.3: with 48 bits, 51:48 are reserved; with 52 none are."""
    for level in long_mode(48, True).levels:
        assert level.reserved_table & 0x000F_0000_0000_0000 or level.name == "pte"
    leaf = {level.name: level.reserved_leaf for level in long_mode(52, True).levels}
    assert leaf == {"pml4e": 0, "pdpte": 0x3FFF_E000, "pde": 0x1F_E000, "pte": 0}
    table = {level.name: level.reserved_table for level in long_mode(52, False).levels}
    assert table["pml4e"] == 1 << 63 | 0x180
    assert [(level.name, level.shift) for level in long_mode(52, True).levels] == [
        ("pml4e", 39), ("pdpte", 30), ("pde", 21), ("pte", 12),
    ]


def test_bit_names() -> None:
    """The names in scenario files are the manual's (section 5.4.1)."""
    names = {"p": 0, "rw": 1, "us": 2, "pwt": 3, "pcd": 4, "a": 5, "d": 6, "ps": 7, "g": 8, "pat": 12, "nx": 63}
    assert {name: 1 << bit for name, bit in names.items()}.items() <= BITS.items()
    assert BITS["bit8"] == 1 << 8 and BITS["bit62"] == 1 << 62
    assert (P, RW, US, PS, NX) == (1, 2, 4, 0x80, 1 << 63)
    assert (PWT, PCD, PAT_4K, PAT_LARGE) == (8, 0x10, 0x80, 0x1000)
