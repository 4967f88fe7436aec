"""Error codes and orders of faults, worked out by hand from sections 8.4.2, 15.25.5 and 15.25.6.

One world, in numbers. L2 is in 4-level paging at gCR3 1_0000_0000h; gVA 7F12_3456_7ABCh has the indices
FEh, 48h, 1A2h, 167h. Each of its tables lies in a nested page of its own:

    what          gPA of the page      nested entries (PML4E, PDPE, PDE, PTE) at    sPA of the page
    gPML4         0001_0000_0000h      50_0000h, 51_0020h, 52_0000h, 53_0000h       60_0000h
    gPDP          0081_0020_1000h      50_0008h, 54_0020h, 55_0008h, 56_0008h       61_0000h
    gPD           0101_0040_2000h      50_0010h, 57_0020h, 58_0010h, 59_0010h       62_0000h
    gPT           0181_0060_3000h      50_0018h, 5A_0020h, 5B_0018h, 5C_0018h       63_0000h
    the page      0201_0080_4000h      50_0020h, 5D_0020h, 5E_0020h, 5F_0020h       64_0000h

gPAs in binary: bits 47:39 are 0, 1, 2, 3, 4; bits 38:30 are 4; bits 29:21 are 0 to 4; bits 20:12 are 0 to 4.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from harness.model.access import NestedPageFault
from harness.model.dirty import resolve
from harness.model.liberties import Liberties, Takes
from tests.model.golden import Case

GVA = 0x7F12_3456_7ABC
GPA = 0x201_0080_4ABC
ENTRY_GPA = (0x1_0000_07F0, 0x81_0020_1240, 0x101_0040_2D10, 0x181_0060_3B38)
GUEST = (0x60_07F0, 0x61_0240, 0x62_0D10, 0x63_0B38)
NESTED = (
    (0x50_0000, 0x51_0020, 0x52_0000, 0x53_0000),
    (0x50_0008, 0x54_0020, 0x55_0008, 0x56_0008),
    (0x50_0010, 0x57_0020, 0x58_0010, 0x59_0010),
    (0x50_0018, 0x5A_0020, 0x5B_0018, 0x5C_0018),
    (0x50_0020, 0x5D_0020, 0x5E_0020, 0x5F_0020),
)
FINAL = NESTED[4]
REACHED = ("sPA", 0x64_0ABC)


@pytest.fixture
def case() -> Case:
    out = Case(cr3=0x1_0000_0000, np_control=1, ncr3=0x50_0000)
    for at, entry in zip(GUEST, (0x81_0020_1007, 0x101_0040_2007, 0x181_0060_3007, 0x201_0080_4007), strict=True):
        out.put(at, entry)
    for number, (pml4e, pdpe, pde, pte) in enumerate(NESTED):
        out.put(pml4e, (pdpe & ~0xFFF) | 7)
        out.put(pdpe, (pde & ~0xFFF) | 7)
        out.put(pde, (pte & ~0xFFF) | 7)
        out.put(pte, 0x60_0007 + number * 0x1_0000)
    return out


def change(case: Case, at: int, set: int = 0, clear: int = 0) -> Case:
    case.put(at, case.get(at) & ~clear | set)
    return case


def test_the_walk_step_by_step(case: Case) -> None:
    """15.25.5: 24 entries, in this order: each guest entry behind the nested walk of its own gPA."""
    assert case.outcome(GVA) == REACHED
    order = [at for number in range(4) for at in (*NESTED[number], GUEST[number])] + list(FINAL)
    assert [step.address for step in case.walk(GVA).steps] == order and len(order) == 24


# 15.25.6, by what is wrong with the nested entry, and 8.4.2 by the same for a guest's: P, RSV and the rest of the
# code. Each access adds its own bits: W 2, U 4, I/D 10h.
WRONG = {
    "P=0": (0, 1, 0x0),
    "P=0, all other bits set": (0x7FFF_FFFF_FFFF_FFFE, 1, 0x0),
    "bit 51, with 48 address bits": (1 << 51, 0, 0x9),
    "U/S=0": (0, 4, 0x1),
}
OWN_BITS = {"read": 0, "write": 2, "fetch": 0x10, "user read": 4, "user write": 6, "user fetch": 0x14}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("access", OWN_BITS)
class TestOneThingWrong:
    def test_nested_final(self, case: Case, access: str, level: int, wrong: str) -> None:
        """Bit 32, and the access's bits with U=1 always; EXITINFO2 is the byte's gPA."""
        set_, clear, code = WRONG[wrong]
        change(case, FINAL[level], set_, clear)
        case.maxphyaddr = 48
        assert case.outcome(GVA, access) == ("#NPF", 0x1_0000_0000 | code | OWN_BITS[access] | 4, GPA)

    @pytest.mark.parametrize("table", range(4))
    def test_nested_of_a_guest_table(self, case: Case, access: str, level: int, wrong: str, table: int) -> None:
        """Bit 33; a user write, whatever the access; EXITINFO2 is the guest entry's gPA."""
        set_, clear, code = WRONG[wrong]
        change(case, NESTED[table][level], set_, clear)
        case.maxphyaddr = 48
        assert case.outcome(GVA, access) == ("#NPF", 0x2_0000_0006 | code, ENTRY_GPA[table])

    def test_guest(self, case: Case, access: str, level: int, wrong: str) -> None:
        set_, clear, code = WRONG[wrong]
        change(case, GUEST[level], set_, clear)
        case.maxphyaddr = 48
        if wrong == "U/S=0" and not access.startswith("user"):
            assert case.outcome(GVA, access) == REACHED
        else:
            assert case.outcome(GVA, access) == ("#PF", code | OWN_BITS[access])


@pytest.mark.parametrize("table", range(4))
@pytest.mark.parametrize("level", range(4))
def test_a_read_only_or_not_executable_nested_page_of_a_table(case: Case, table: int, level: int) -> None:
    """15.25.5: it must be writable, also for a read; NX of it does not matter, also to a fetch."""
    assert change(case.but(), NESTED[table][level], set=1 << 63).outcome(GVA, "fetch") == REACHED
    for access in OWN_BITS:
        outcome = change(case.but(), NESTED[table][level], clear=2).outcome(GVA, access)
        assert outcome == ("#NPF", 0x2_0000_0007, ENTRY_GPA[table])


# Two things wrong: the walk's own order decides (15.25.6). Address, bits to set, bits to clear; then again.
ORDERS = [
    # the nested walk of a table comes before the guest's entry in it
    ("read", (NESTED[2][3], 0, 1), (GUEST[2], 0, 1), ("#NPF", 0x2_0000_0006, 0x101_0040_2D10)),
    # a guest's entry that is not present before the nested walk of the table below it
    ("read", (GUEST[1], 0, 1), (NESTED[2][0], 0, 1), ("#PF", 0x0)),
    # the nested walk of a lower table before a right that an upper guest entry denies
    ("user write", (GUEST[0], 0, 6), (NESTED[3][3], 0, 1), ("#NPF", 0x2_0000_0006, 0x181_0060_3B38)),
    # a reserved bit further down before a right denied above
    ("user write", (GUEST[0], 0, 4), (GUEST[3], 1 << 50, 0), ("#PF", 0xF)),
    # P=0 in an entry before a reserved bit in it
    ("user write", (GUEST[2], 1 << 50, 0), (GUEST[2], 0, 1), ("#PF", 0x6)),
    # the guest's rights before the final nested walk
    ("user write", (GUEST[3], 0, 2), (FINAL[0], 0, 1), ("#PF", 0x7)),
    ("user fetch", (GUEST[3], 1 << 63, 0), (FINAL[3], 1 << 63, 0), ("#PF", 0x15)),
    # in the nested dimension too: further down before a right
    ("write", (FINAL[0], 0, 6), (FINAL[3], 0, 1), ("#NPF", 0x1_0000_0006, 0x201_0080_4ABC)),
    ("fetch", (FINAL[1], 1 << 63, 0), (FINAL[2], 1 << 50, 0), ("#NPF", 0x1_0000_001D, 0x201_0080_4ABC)),
]


@pytest.mark.parametrize(("access", "first", "second", "expected"), ORDERS)
def test_order(
    case: Case, access: str, first: tuple[int, int, int], second: tuple[int, int, int], expected: tuple[str, int]
) -> None:
    case.maxphyaddr = 48
    for at, set_, clear in (first, second):
        change(case, at, set_, clear)
    assert case.outcome(GVA, access) == expected


def test_accessed_and_dirty_of_a_read(case: Case) -> None:
    """15.25.5: A and D in the nested entries that led to a guest table, also for a read; of the page only A."""
    case.after(GVA, "read")
    for number in range(4):
        assert [case.get(at) & 0x60 for at in NESTED[number]] == [0x20, 0x20, 0x20, 0x60]
    assert [case.get(at) & 0x60 for at in GUEST] == [0x20] * 4
    assert [case.get(at) & 0x60 for at in FINAL] == [0x20] * 4


def test_accessed_and_dirty_of_a_write(case: Case) -> None:
    case.after(GVA, "write")
    assert [case.get(at) & 0x60 for at in GUEST] == [0x20, 0x20, 0x20, 0x60]
    assert [case.get(at) & 0x60 for at in FINAL] == [0x20, 0x20, 0x20, 0x60]


# 5.3.1: with 48 bits, bits 63:47 are all alike; with 57, bits 63:56.
@pytest.mark.parametrize(("cr4", "gva", "canonical"), [
    (0x20, 0x0000_7FFF_FFFF_FFFF, True), (0x20, 0x0000_8000_0000_0000, False), (0x20, 0xFFFF_7FFF_FFFF_FFFF, False),
    (0x20, 0xFFFF_8000_0000_0000, True), (0x20, 0x8000_0000_0000_0000, False), (0x20, 0xFFFE_8000_0000_0000, False),
    (0x1020, 0x00FF_FFFF_FFFF_FFFF, True), (0x1020, 0x0100_0000_0000_0000, False),
    (0x1020, 0xFEFF_FFFF_FFFF_FFFF, False), (0x1020, 0xFF00_0000_0000_0000, True),
    (0x1020, 0x0000_8000_0000_0000, True), (0x1020, 0xFFFF_7FFF_FFFF_FFFF, True),
])
def test_canonical(cr4: int, gva: int, canonical: bool) -> None:
    outcome = Case(cr4=cr4, cr3=0x1000).outcome(gva)
    assert outcome == (("#PF", 0) if canonical else ("#GP", 0))


@pytest.mark.parametrize(("host_cr4", "host_efer", "gpa", "entries"), [
    # a gPA of more bits than L1's tables translate: those above take no part, EXITINFO2 has them all
    (0x20, 0x1D00, 0xF_0040_0000_5678, (0x50_0000 + 8 * 0, 0x51_0000 + 8 * 0x100)),
    (0x20, 0x1800, 0xF_0000_4000_5678, (0x50_0008,)),
    (0x20, 0x1800, 0x7F_4000_5678, (0x50_0008,)),
    (0x10, 0x1000, 0xF_0000_4040_5678, (0x50_0000 + 4 * 0x101,)),
    (0x1020, 0x1D00, 0x5_0040_0000_5678, (0x50_0000 + 8 * 5, 0x51_0000, 0x52_0000 + 8 * 0x100)),
])
def test_wide_guest_physical_addresses(host_cr4: int, host_efer: int, gpa: int, entries: tuple[int, ...]) -> None:
    """15.25.5 knows no canonical form of a gPA. The last of `entries` is not present."""
    case = Case(cr3=0x1000, np_control=1, ncr3=0x50_0000, host_cr4=host_cr4, host_efer=host_efer)
    case.cr0 = 0x1
    case.efer, case.cr4 = 0x1000, 0
    for at, below in pairwise(entries):
        case.put(at, (below & ~0xFFF) | 7)
    walk = case.walk(gpa)
    assert [step.address for step in walk.steps] == list(entries)
    assert case.outcome(gpa) == ("#NPF", 0x1_0000_0004, gpa)


@pytest.mark.parametrize(("efer", "cr4", "code"), [
    (0x1D00, 0x20, 0x10), (0x1500, 0x20, 0), (0x1500, 0x20 | 1 << 20, 0x10), (0x1D00, 0x20 | 1 << 20, 0x10),
    (0x1800, 0x20, 0x10), (0x1800, 0x10, 0), (0x1000, 0x20, 0), (0x1000, 1 << 20, 0x10),
])
def test_when_page_faults_report_a_fetch(efer: int, cr4: int, code: int) -> None:
    """8.4.2: I/D needs EFER.NXE and CR4.PAE, or CR4.SMEP."""
    assert Case(cr3=0x1000, efer=efer, cr4=cr4).outcome(0x1234_5678, "fetch") == ("#PF", code)


@pytest.mark.parametrize(("guest_nxe", "host_nxe"), [(False, True), (True, False), (False, False)])
def test_each_dimension_has_its_own_nxe(case: Case, guest_nxe: bool, host_nxe: bool) -> None:
    """15.25.7, 5.4.1: NX is reserved in the dimension whose owner has NXE=0, and a right in the other."""
    case.efer, case.host_efer = 0x1500 | guest_nxe << 11, 0x1500 | host_nxe << 11
    guest = change(case.but(), GUEST[3], set=1 << 63)
    assert guest.outcome(GVA, "read") == (REACHED if guest_nxe else ("#PF", 0x9))
    nested = change(case.but(), FINAL[3], set=1 << 63)
    assert nested.outcome(GVA, "read") == (REACHED if host_nxe else ("#NPF", 0x1_0000_000D, GPA))
    assert nested.outcome(GVA, "fetch")[0] == "#NPF"


def test_what_completed_nested_walks_must_have_set(case: Case) -> None:
    """15.25.5: entries touched for a guest table always have their bits, whatever comes of the walk behind them:
    also those that a later nested walk goes through again before it faults."""
    nothing_free = Liberties(Takes.NEVER, Takes.NEVER, Takes.NEVER, Takes.NEVER)
    change(case, 0x50_0008, clear=7)
    case.put(GUEST[0], 0x1_0020_1007)  # the gPDP's gPA now shares its nested PML4E and PDPE with the gPML4's
    case.put(0x52_0008, 0x56_0007)
    assert case.outcome(GVA) == REACHED
    change(case, 0x56_0008, clear=1)
    walk = case.walk(GVA)
    required, permitted = resolve(walk.updates, True, nothing_free)
    assert isinstance(walk.outcome, NestedPageFault) and not permitted
    assert {(at, bits) for at, bits, _ in required} == {
        (0x50_0000, 0x20), (0x51_0020, 0x20), (0x52_0000, 0x20), (0x53_0000, 0x60)}


def test_what_a_nested_walk_that_faults_leaves_open() -> None:
    """The entries above the one that faults; those above a guest entry; never the one that faults."""
    case = Case(cr0=1, cr4=0, efer=0x1000, np_control=1, ncr3=0x50_0000)
    for at, entry in ((0x50_0000, 0x51_0007), (0x51_0000, 0x52_0007), (0x52_0000, 0x53_0007), (0x53_0028, 0x6)):
        case.put(at, entry)
    required, permitted = resolve(case.walk(0x5678).updates, True, Liberties())
    assert required == [] and [(at, bits) for at, bits, _ in permitted] == [
        (0x50_0000, 0x20), (0x51_0000, 0x20), (0x52_0000, 0x20)]
    # PAE: its PDPTEs have no such bits
    case = case.but(host_efer=0x1800)
    case.put(0x50_0000, 0x51_0001)
    required, permitted = resolve(case.walk(0x5678).updates, True, Liberties())
    assert required == [] and [at for at, _, _ in permitted] == [0x51_0000]


def test_a_nested_walk_that_faults_behind_others_with_pae_tables() -> None:
    """Only its own entries are left open: not the guest's, nor those of the nested walks of the guest's tables."""
    case = Case(cr4=0x10, efer=0x1000, cr3=0x4000_1000, np_control=1, ncr3=0x50_0000, host_efer=0x1800)
    for at, entry in ((0x50_0008, 0x51_0001), (0x51_0000, 0x52_0007), (0x52_0008, 0x60_0007),
                      (0x50_0010, 0x53_0001), (0x53_0000, 0x54_0007)):
        case.put(at, entry)
    case.put(0x60_0000, 0x8000_0087, 4)  # gVA 0 to 3F_FFFFh is gPA 8000_0000h on
    required, permitted = resolve(case.walk(0x5678).updates, True, Liberties())
    assert [(at, bits) for at, bits, _ in required] == [(0x51_0000, 0x20), (0x52_0008, 0x60)]
    assert [(at, bits) for at, bits, _ in permitted] == [(0x60_0000, 0x20), (0x53_0000, 0x20)]
    only_cut = Liberties(nested_cut=Takes.SOMETIMES, guest_cut=Takes.NEVER, page_not_reached=Takes.NEVER)
    assert [at for at, _, _ in resolve(case.walk(0x5678).updates, True, only_cut)[1]] == [0x53_0000]


def test_a_nested_walk_that_faults_behind_a_pdpte_of_the_guest() -> None:
    """A PDPTE of L2 has no A between the two nested walks: what the first one sets is required all the same."""
    case = Case(cr4=0x20, efer=0x1000, cr3=0x4000_1000, np_control=1, ncr3=0x50_0000, host_efer=0x1800)
    for at, entry in ((0x50_0008, 0x51_0001), (0x51_0000, 0x52_0007), (0x52_0008, 0x60_0007), (0x60_0000, 0x8000_0001),
                      (0x50_0010, 0x53_0001), (0x53_0000, 0x54_0007)):
        case.put(at, entry)
    assert case.outcome(0x5678) == ("#NPF", 0x2_0000_0006, 0x8000_0000)
    required, permitted = resolve(case.walk(0x5678).updates, True, Liberties())
    assert [(at, bits) for at, bits, _ in required] == [(0x51_0000, 0x20), (0x52_0008, 0x60)]
    assert [(at, bits) for at, bits, _ in permitted] == [(0x53_0000, 0x20)]
