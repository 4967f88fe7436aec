"""The two-dimensional walk: order, #NPF with EXITINFO1 and EXITINFO2, priority (15.25.5 to 15.25.7)."""

from __future__ import annotations

import pytest

from harness.model.access import Access, NestedPageFault, PageFault, Reached
from harness.model.walk import FINAL, GUEST, NESTED
from tests.model.tables import (
    ALL_ACCESSES,
    FETCH,
    FRAME,
    GVA,
    LEVELS,
    NX,
    READ,
    RW,
    TABLE_OFFSET,
    TOP_DOWN,
    US,
    USER_FETCH,
    USER_READ,
    USER_WRITE,
    WRITE,
    E,
    P,
    Space,
    name,
)

GPA = 1 << 39 | 7 << 30 | 0x40_0000
DATA = 0x60_0000
OFFSET = 0x4D8


class Two:
    """GVA mapped through both dimensions: entries by level in each, and of each guest table's nested walk."""

    def __init__(self, guest_shift: int = 12, nested_shift: int = 12, **features: bool) -> None:
        self.space = Space(**features)  # type: ignore[arg-type]
        size = 1 << guest_shift
        self.gpa = (GPA >> guest_shift << guest_shift) | GVA & size - 1
        self.guest = self.space.map_guest(GVA, self.gpa, guest_shift)
        self.spa = (DATA if nested_shift < 30 else 0) | self.gpa & (1 << nested_shift) - 1
        self.final = self.space.map_nested(self.gpa, self.spa, nested_shift)
        self.tables = {
            level: self.space.map_nested(at + TABLE_OFFSET & ~0xFFF, at & ~0xFFF) for level, at in self.guest.items()
        }

    def walk(self, access: Access = READ) -> NestedPageFault | PageFault | Reached:
        outcome = self.space.walk(GVA | OFFSET, access).outcome
        assert isinstance(outcome, NestedPageFault | PageFault | Reached)
        return outcome


@pytest.mark.parametrize("guest_shift", [12, 21, 30])
@pytest.mark.parametrize("nested_shift", [12, 21, 30])
def test_references_in_order(guest_shift: int, nested_shift: int) -> None:
    """15.25.5: each guest entry is read behind a nested walk of its own gPA, then the page's gPA is
    walked: with four levels in both, 4 * (4 + 1) + 4 = 24 references."""
    two = Two(guest_shift, nested_shift)
    expected = []
    for level in LEVELS[guest_shift]:
        expected += [(NESTED, n, level, two.tables[level][n]) for n in TOP_DOWN]
        expected.append((GUEST, level, "", two.guest[level]))
    expected += [(NESTED, n, FINAL, two.final[n]) for n in LEVELS[nested_shift]]
    walk = two.space.walk(GVA | OFFSET)
    assert [(s.dimension, s.level, s.purpose, s.address) for s in walk.steps] == expected
    assert all(s.entry == two.space.get(s.address) for s in walk.steps)
    if guest_shift == nested_shift == 12:
        assert len(walk.steps) == 24
    assert walk.outcome == Reached(two.spa | OFFSET, two.gpa | OFFSET)


@pytest.mark.parametrize("nested_shift", [12, 21, 30])
@pytest.mark.parametrize("access", ALL_ACCESSES, ids=name)
class TestFinal:
    """Faults of the nested walk of the page itself: bit 32; U always; W and I/D as the access (15.25.6).
    EXITINFO2 is the byte's gPA."""

    def _code(self, access: Access) -> int:
        return E.FINAL | E.U | (E.W if access.write else 0) | (E.ID if access.fetch else 0)

    def test_not_present(self, nested_shift: int, access: Access) -> None:
        for level in LEVELS[nested_shift]:
            two = Two(nested_shift=nested_shift)
            two.space.change(two.final[level], clear=P)
            assert two.walk(access) == NestedPageFault(self._code(access), two.gpa | OFFSET)

    def test_reserved(self, nested_shift: int, access: Access) -> None:
        for level in LEVELS[nested_shift]:
            two = Two(nested_shift=nested_shift)
            two.space.change(two.final[level], set=1 << 51)
            assert two.walk(access) == NestedPageFault(self._code(access) | E.P | E.RSVD, two.gpa | OFFSET)

    def test_supervisor(self, nested_shift: int, access: Access) -> None:
        """15.25.7: each level must be marked user for any access of the guest at all."""
        for level in LEVELS[nested_shift]:
            two = Two(nested_shift=nested_shift)
            two.space.change(two.final[level], clear=US)
            assert two.walk(access) == NestedPageFault(self._code(access) | E.P, two.gpa | OFFSET)

    def test_read_only(self, nested_shift: int, access: Access) -> None:
        """Neither L1's CR0.WP nor L2's makes it writable (15.25.7)."""
        for level in LEVELS[nested_shift]:
            for wp in (True, False):
                two = Two(nested_shift=nested_shift)
                two.space.change(two.final[level], clear=RW)
                outcome = two.space.walk(GVA | OFFSET, access, two.space.paging(wp=wp)).outcome
                if access.write:
                    assert outcome == NestedPageFault(self._code(access) | E.P, two.gpa | OFFSET)
                else:
                    assert isinstance(outcome, Reached)

    def test_no_execute(self, nested_shift: int, access: Access) -> None:
        """Whatever L2's own EFER.NXE (15.25.7)."""
        for level in LEVELS[nested_shift]:
            two = Two(nested_shift=nested_shift, guest_nxe=False)
            two.space.change(two.final[level], set=NX)
            if access.fetch:
                assert two.walk(access) == NestedPageFault(self._code(access) | E.P, two.gpa | OFFSET)
            else:
                assert isinstance(two.walk(access), Reached)

    def test_no_execute_is_reserved_without_host_nxe(self, nested_shift: int, access: Access) -> None:
        for level in LEVELS[nested_shift]:
            two = Two(nested_shift=nested_shift, host_nxe=False)
            two.space.change(two.final[level], set=NX)
            code = self._code(access) | E.P | E.RSVD
            assert two.walk(access) == NestedPageFault(code, two.gpa | OFFSET)


@pytest.mark.parametrize(
    ("access", "code"),
    # values of kvm-unit-tests' svm_npt, seen on processors: EXITINFO1 as it is read from the VMCB
    [("not present", 0x1_0000_0004), ("user", 0x1_0000_0005), ("write", 0x1_0000_0007), ("fetch nx", 0x1_0000_0015),
     ("table read-only", 0x2_0000_0007), ("table reserved", 0x2_0000_000F), ("table absent", 0x2_0000_0006),
     ("final reserved, no nxe", 0x1_0000_001D)],  # I/D or not: lockstep takes both (15.25.6, 8.4.2)
)
def test_worked_values(access: str, code: int) -> None:
    two = Two(host_nxe=access != "final reserved, no nxe")
    pte, table = two.final["pte"], two.tables["pte"]["pte"]
    what = READ
    match access:
        case "not present":
            two.space.change(pte, clear=P)
        case "user":
            two.space.change(pte, clear=US)
        case "write":
            two.space.change(pte, clear=RW)
            what = WRITE
        case "fetch nx":
            two.space.change(pte, set=NX)
            what = FETCH
        case "table read-only":
            two.space.change(table, clear=RW)
        case "table reserved":
            two.space.change(table, set=1 << 51)
            what = FETCH
        case "table absent":
            two.space.change(table, clear=P)
        case _:
            two.space.change(pte, set=1 << 51)
            what = FETCH
    outcome = two.walk(what)
    assert isinstance(outcome, NestedPageFault) and outcome.error_code == code


@pytest.mark.parametrize("level", TOP_DOWN)
@pytest.mark.parametrize("nested", TOP_DOWN)
@pytest.mark.parametrize("access", [READ, USER_WRITE, FETCH], ids=name)
class TestGuestTable:
    """Faults of the nested walk of a guest table: bit 33; a user write, never a fetch, whatever the
    access is; EXITINFO2 is the gPA of the guest's entry (15.25.5, 15.25.6)."""

    def _two(self) -> Two:
        """Each guest table in a nested subtree of its own, so that its walk alone can fault."""
        two = Two()
        for number, level in enumerate(TOP_DOWN):
            spa = two.guest[level] & ~0xFFF
            home = (100 + number) << 39 | (50 + number) << 30 | (60 + number) << 21 | (70 + number) << 12
            two.tables[level] = two.space.map_nested(home, spa)
            if number:
                above = two.guest[TOP_DOWN[number - 1]]
                two.space.set(above, two.space.get(above) & ~FRAME | home)
            else:
                two.space.gcr3 = home
        return two

    def _entry_gpa(self, two: Two, level: str) -> int:
        number = TOP_DOWN.index(level)
        home = (100 + number) << 39 | (50 + number) << 30 | (60 + number) << 21 | (70 + number) << 12
        return home | two.guest[level] & 0xFFF

    @pytest.mark.parametrize(
        ("set", "clear", "code"),
        [(0, P, 0), (1 << 51, 0, E.P | E.RSVD), (0, US, E.P), (0, RW, E.P)],
        ids=["not-present", "reserved", "supervisor", "read-only"],
    )
    def test_faults(self, level: str, nested: str, access: Access, set: int, clear: int, code: int) -> None:
        two = self._two()
        two.space.change(two.tables[level][nested], set, clear)
        expected = NestedPageFault(code | E.U | E.W | E.GUEST_TABLE, self._entry_gpa(two, level))
        walk = two.space.walk(GVA | OFFSET, access)
        assert walk.outcome == expected
        # the levels above were read (four nested entries and their own each), and nothing beyond; rights
        # are judged behind the nested leaf
        own = TOP_DOWN.index(nested) + 1 if code in (0, E.P | E.RSVD) else 4
        assert len(walk.steps) == 5 * TOP_DOWN.index(level) + own

    def test_no_execute_does_not_matter(self, level: str, nested: str, access: Access) -> None:
        two = self._two()
        two.space.change(two.tables[level][nested], set=NX)
        assert isinstance(two.walk(access), Reached)


class TestPriority:
    """15.25.6: the walk's own order decides."""

    def test_guest_rights_before_the_final_nested_walk(self) -> None:
        """Step 3 comes before step 4."""
        two = Two()
        two.space.change(two.final["pte"], clear=P)
        two.space.change(two.guest["pte"], clear=RW)
        assert two.walk(USER_WRITE) == PageFault(E.P | E.W | E.U, GVA | OFFSET)
        assert two.walk(USER_READ) == NestedPageFault(E.U | E.FINAL, two.gpa | OFFSET)

    def test_deeper_table_before_rights_seen_above(self) -> None:
        two = Two()
        two.space.change(two.guest["pml4e"], clear=US | RW)
        two.space.change(two.tables["pte"]["pte"], clear=P)
        outcome = two.walk(USER_WRITE)
        assert outcome == NestedPageFault(E.W | E.U | E.GUEST_TABLE, two.guest["pte"] + TABLE_OFFSET)

    def test_guest_entry_before_what_lies_below(self) -> None:
        two = Two()
        two.space.change(two.guest["pde"], clear=P)
        two.space.change(two.tables["pte"]["pte"], clear=P)
        two.space.change(two.final["pte"], clear=P)
        assert two.walk(USER_FETCH) == PageFault(E.U | E.ID, GVA | OFFSET)

    def test_reserved_before_rights_in_one_nested_walk(self) -> None:
        two = Two()
        two.space.change(two.final["pml4e"], set=NX, clear=US | RW)
        two.space.change(two.final["pte"], set=1 << 51)
        assert two.walk(FETCH) == NestedPageFault(E.P | E.RSVD | E.U | E.ID | E.FINAL, two.gpa | OFFSET)
        two.space.change(two.final["pte"], clear=P)
        assert two.walk(FETCH) == NestedPageFault(E.U | E.ID | E.FINAL, two.gpa | OFFSET)

    @pytest.mark.parametrize(
        ("set", "clear", "access", "rule"),
        [(0, US | RW, WRITE, "nested.user"), (NX, US, FETCH, "nested.user"), (0, RW, WRITE, "nested.write"),
         (NX, RW, FETCH, "nested.execute")],
    )
    def test_rule_named(self, set: int, clear: int, access: Access, rule: str) -> None:
        two = Two()
        two.space.change(two.final["pte"], set, clear)
        assert two.space.walk(GVA, access).rule == rule


def test_smep_and_smap_are_of_the_guest_dimension_only() -> None:
    """15.25.7: nested pages are all user pages; that is no reason to fault for L2's supervisor."""
    two = Two()
    for level in TOP_DOWN:
        two.space.change(two.guest[level], clear=US)
    paging = two.space.paging(smep=True, smap=True)
    for access in (READ, WRITE, FETCH):
        assert isinstance(two.space.walk(GVA, access, paging).outcome, Reached)


def test_ncr3_low_bits_are_ignored() -> None:
    """15.25.4: bits 11:0 of nCR3 are not part of the table's address."""
    two = Two()
    paging = two.space.paging()._replace(ncr3=two.space.ncr3 | 0x018)
    assert two.space.walk(GVA, READ, paging).outcome == Reached(two.spa, two.gpa)


def test_without_paging_in_l2() -> None:
    """15.25.5: with CR0.PG=0 the linear address is the gPA, and each access is a final one."""
    two = Two()
    paging = two.space.paging()._replace(guest=None)
    walk = two.space.walk(two.gpa | 5, READ, paging)
    assert walk.outcome == Reached(two.spa | 5, two.gpa | 5) and len(walk.steps) == 4
    two.space.change(two.final["pde"], clear=P)
    assert two.space.walk(two.gpa | 5, WRITE, paging).outcome == NestedPageFault(E.W | E.U | E.FINAL, two.gpa | 5)
