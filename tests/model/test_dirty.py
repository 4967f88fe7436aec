"""Accessed and dirty bits: which a walk sets (5.4.1, 5.4.2, 15.25.5), and what a machine may make of it."""

from __future__ import annotations

from typing import ClassVar

import pytest

from harness.model.access import Access, NestedPageFault, PageFault, Reached
from harness.model.dirty import CUT, NESTED_TABLE, PAGE, TABLE, resolve, write_back
from harness.model.liberties import Liberties, Takes
from harness.model.memory import Memory
from tests.model.tables import (
    ALL_ACCESSES,
    FETCH,
    GVA,
    LEVELS,
    NX,
    READ,
    RW,
    TABLE_OFFSET,
    TOP_DOWN,
    US,
    USER_READ,
    USER_WRITE,
    WRITE,
    A,
    D,
    P,
    Space,
    name,
)

GPA = 1 << 39 | 7 << 30 | 0x40_0000
DATA = 0x60_0000


def _world(guest_shift: int = 12, nested_shift: int = 12) -> tuple[Space, dict[str, int], dict[str, int]]:
    space = Space()
    gpa = GPA >> guest_shift << guest_shift
    guest = space.map_guest(GVA, gpa, guest_shift)
    gpa |= GVA & (1 << guest_shift) - 1
    nested = space.map_nested(gpa, DATA if nested_shift < 30 else 0, nested_shift)
    return space, guest, nested


def _ad(space: Space) -> dict[int, int]:
    """sPA of every table entry with A or D, and those bits."""
    words = space.memory.words
    return {at: words[at >> 3] & (A | D) for at in range(0, space.next_page, 8) if words[at >> 3] & (A | D)}


def _table_walks(space: Space, levels: dict[str, int], names: tuple[str, ...]) -> dict[int, int]:
    """What the nested walks of the guest tables at `names` set: A above, A and D in the leaf, always
    (15.25.5: they are writes, also where the guest's entry has nothing to be set in)."""
    expected: dict[int, int] = {}
    for level in names:
        entries = space.map_nested(levels[level] + TABLE_OFFSET & ~0xFFF, levels[level] & ~0xFFF)
        for nested in TOP_DOWN:
            expected[entries[nested]] = A | D if nested == "pte" else A
    return expected


@pytest.mark.parametrize("guest_shift", [12, 21, 30])
@pytest.mark.parametrize("nested_shift", [12, 21, 30])
@pytest.mark.parametrize("access", ALL_ACCESSES, ids=name)
def test_success(guest_shift: int, nested_shift: int, access: Access) -> None:
    """A at all levels, D in the leaves of a write and nowhere else (5.4.1)."""
    space, guest, nested = _world(guest_shift, nested_shift)
    leaf = A | D if access.write else A
    expected = _table_walks(space, guest, LEVELS[guest_shift])
    expected |= {guest[level]: A for level in LEVELS[guest_shift][:-1]} | {guest[LEVELS[guest_shift][-1]]: leaf}
    expected |= {nested[level]: A | expected.get(nested[level], 0) for level in LEVELS[nested_shift][:-1]}
    expected[nested[LEVELS[nested_shift][-1]]] = leaf
    for takes in Takes:  # no liberty in a walk that reaches its page
        fresh, *_ = _world(guest_shift, nested_shift)
        walk = fresh.walk_and_write(GVA, access, takes)
        assert isinstance(walk.outcome, Reached)
        assert _ad(fresh) == expected


def test_one_dimension() -> None:
    space = Space(nested=False)
    entries = space.map_guest(GVA, 0x50_0000)
    space.walk_and_write(GVA, READ)
    assert _ad(space) == {entries[level]: A for level in TOP_DOWN}
    space.walk_and_write(GVA, WRITE)
    assert _ad(space) == {entries[level]: A for level in TOP_DOWN} | {entries["pte"]: A | D}


def test_never_cleared() -> None:
    """5.4.1: the processor never clears them."""
    space, guest, nested = _world()
    for entry in (*guest.values(), *nested.values()):
        space.change(entry, set=A | D)
    before = {entry: space.get(entry) for entry in (*guest.values(), *nested.values())}
    space.walk_and_write(GVA, READ)
    assert {entry: space.get(entry) for entry in before} == before


@pytest.mark.parametrize("level", TOP_DOWN)
@pytest.mark.parametrize("change", [(0, P), (1 << 51, 0)], ids=["not-present", "reserved"])
class TestAbsent:
    """An entry that is not present or malformed is never written (5.4.2); those above it may be."""

    def test_guest(self, level: str, change: tuple[int, int]) -> None:
        space, guest, _ = _world()
        above = TOP_DOWN[: TOP_DOWN.index(level)]
        tables = _table_walks(space, guest, (*above, level))
        space.change(guest[level], *change)
        walk = space.walk_and_write(GVA, WRITE)
        assert isinstance(walk.outcome, PageFault)
        assert _ad(space) == tables | {guest[n]: A for n in above}

    def test_nested(self, level: str, change: tuple[int, int]) -> None:
        space, guest, nested = _world()
        above = TOP_DOWN[: TOP_DOWN.index(level)]
        expected = _table_walks(space, guest, TOP_DOWN) if level != "pml4e" else {}
        expected |= {guest[n]: A for n in TOP_DOWN}
        expected[guest["pte"]] = A | D  # 15.25.6: step 2 sets the guest's bits before step 4 faults
        if level == "pml4e":
            # the tables' nested root entry is another one: take it from the walk
            expected |= _table_walks(space, guest, TOP_DOWN)
        expected |= {nested[n]: A for n in above}
        space.change(nested[level], *change)
        walk = space.walk_and_write(GVA, WRITE)
        assert isinstance(walk.outcome, NestedPageFault)
        assert _ad(space) == expected

    def test_a_machine_may_set_none_of_the_guest(self, level: str, change: tuple[int, int]) -> None:
        """But 15.25.6 has the tables' nested walks done, A and D included, before a guest's entry is looked at."""
        space, guest, _ = _world()
        tables = _table_walks(space, guest, TOP_DOWN[: TOP_DOWN.index(level) + 1])
        space.change(guest[level], *change)
        space.walk_and_write(GVA, WRITE, Takes.NEVER)
        assert _ad(space) == tables

    def test_a_machine_may_set_none_of_the_nested_walk_that_faults(self, level: str, change: tuple[int, int]) -> None:
        space, guest, nested = _world()
        tables = _table_walks(space, guest, TOP_DOWN)
        space.change(nested[level], *change)
        space.walk_and_write(GVA, WRITE, Takes.NEVER)
        assert _ad(space) == tables


@pytest.mark.parametrize(
    ("set", "clear", "access"),
    [(0, US, USER_READ), (0, RW, USER_WRITE), (0, RW, WRITE), (NX, 0, FETCH)],
    ids=["user", "user-write", "write", "fetch"],
)
@pytest.mark.parametrize("level", TOP_DOWN)
def test_rights_leave_the_leaf_alone(level: str, set: int, clear: int, access: Access) -> None:
    """kvm-unit-tests' access.c compares the PTE exactly: no A and no D where the access was denied."""
    space, guest, nested = _world()
    space.change(guest[level], set, clear)
    assert isinstance(space.walk_and_write(GVA, access).outcome, PageFault)
    assert not space.get(guest["pte"]) & (A | D)
    assert not space.get(nested["pte"]) & (A | D)

    space, guest, nested = _world()
    space.change(nested[level], set, clear)
    if isinstance(space.walk(GVA, access).outcome, NestedPageFault):
        space.walk_and_write(GVA, access)
        assert not space.get(nested["pte"]) & (A | D)
        assert space.get(guest["pte"]) & (A | D) == (A | D if access.write else A)


def test_write_protected_page_with_wp_clear() -> None:
    """A supervisor write through R/W=0 with CR0.WP=0 is a write: D is set."""
    space, guest, _ = _world()
    space.change(guest["pte"], clear=RW)
    walk = space.walk(GVA, WRITE, space.paging(wp=False))
    write_back(space.memory.words, walk.updates)
    assert space.get(guest["pte"]) & (A | D) == A | D


class TestResolve:
    updates: ClassVar = [(0x10, A, TABLE), (0x20, A | D, PAGE), (0x30, A, CUT), (0x38, A | D, NESTED_TABLE)]

    def test_success_has_no_liberty(self) -> None:
        assert resolve(self.updates, False, Liberties.each(Takes.NEVER)) == (self.updates, [])

    @pytest.mark.parametrize("cut", Takes)
    @pytest.mark.parametrize("table", Takes)
    @pytest.mark.parametrize("page", Takes)
    def test_fault(self, cut: Takes, table: Takes, page: Takes) -> None:
        required, permitted = resolve(self.updates, True, Liberties(cut, table, page))
        for update in self.updates:
            takes = {CUT: cut, TABLE: table, PAGE: page, NESTED_TABLE: Takes.ALWAYS}[update[2]]
            assert (update in required) == (takes is Takes.ALWAYS)
            assert (update in permitted) == (takes is Takes.SOMETIMES)

    def test_the_default_is_the_widest(self) -> None:
        assert resolve(self.updates, True, Liberties()) == (self.updates[3:], self.updates[:3])

    @pytest.mark.parametrize("takes", Takes)
    def test_the_other_page_of_an_access_faults(self, takes: Takes) -> None:
        required, permitted = resolve(self.updates, False, Liberties(other_page=takes), other_faulted=True)
        assert required == (self.updates if takes is Takes.ALWAYS else [])
        assert permitted == (self.updates if takes is Takes.SOMETIMES else [])


def test_write_back_returns_the_first_old_value() -> None:
    memory = Memory(4096)
    memory.words[2] = P
    changed = write_back(memory.words, [(16, A, TABLE), (16, A | D, PAGE), (24, A, TABLE)])
    assert changed == {16: P, 24: 0}
    assert memory.words[2] == P | A | D
    assert write_back(memory.words, [(16, A, TABLE)]) == {}


@pytest.mark.parametrize("takes", Takes)
def test_the_page_not_reached(takes: Takes) -> None:
    """15.25.6, steps 2 to 4: the guest's leaf bits are set before the final nested walk faults; a
    processor that sets them at the end is permitted too, and that is a liberty of its own."""
    space, guest, nested = _world()
    space.change(nested["pte"], clear=P)
    walk = space.walk(GVA, WRITE)
    required, permitted = resolve(walk.updates, True, Liberties(Takes.NEVER, Takes.NEVER, takes))
    wanted = (guest["pte"], A | D, PAGE)
    assert [u for u in required if u[2] != NESTED_TABLE] == ([wanted] if takes is Takes.ALWAYS else [])
    assert permitted == ([wanted] if takes is Takes.SOMETIMES else [])
