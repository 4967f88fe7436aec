"""Which cells a walk belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.model.access import Access
from harness.model.coverage import Cell, cells_of, reserved
from harness.model.entries import BITS, Level, legacy, long_mode, pae
from tests.model.tables import FETCH, GVA, NX, PS, READ, RW, US, USER_FETCH, USER_READ, USER_WRITE, WRITE, P, Space

GPA = 1 << 39 | 7 << 30 | 0x45_6000
MODE = "4-level/4-level"


@dataclass
class Mapped:
    """GVA mapped to GPA, and that to an sPA; its entries by level."""

    space: Space = field(default_factory=Space)
    guest_shift: int = 12
    nested_shift: int = 12

    def __post_init__(self) -> None:
        low = (1 << self.guest_shift) - 1
        gpa = GPA & ~low | GVA & low
        self.guest = self.space.map_guest(GVA, gpa, self.guest_shift)
        self.page = self.space.map_nested(gpa, gpa & 0x3F_FFFF, self.nested_shift)

    def cells(self, rule: str, access: Access = READ, gva: int = GVA, **registers: Any) -> set[tuple[str, str, str]]:
        """The cells of one walk that are of `rule`: their dimension, level and outcome."""
        paging = self.space.paging(**registers)
        found = set(cells_of(paging, access, self.space.walk(gva, access, paging)))
        assert all(cell.mode == MODE for cell in found)
        return {(cell.dimension, cell.level, cell.outcome) for cell in found if cell.rule == rule}


def test_reached() -> None:
    mapped = Mapped()
    assert mapped.cells("reached") == {("both", "pte/pte", "supervisor read")}
    assert mapped.cells("reached", USER_FETCH) == {("both", "pte/pte", "user fetch")}
    assert mapped.cells("write", USER_WRITE) == {("", "", "written")}
    assert mapped.cells("write", FETCH) == set()


def test_modes() -> None:
    space = Space(nested=False)
    space.map_guest(GVA, 0x65_4000)
    (cell,) = (c for c in cells_of(space.paging(), READ, space.walk(GVA)) if c.rule == "reached")
    assert cell == Cell("reached", "both", "pte", "4-level/none", "supervisor read")
    paging = space.paging()._replace(guest=None)
    (cell,) = cells_of(paging, READ, space.walk(GVA, READ, paging))
    assert cell == Cell("reached", "both", "", "off/none", "supervisor read")


def test_sizes() -> None:
    assert Mapped(guest_shift=21, nested_shift=21).cells("reached") == {("both", "pde 2M/pde 2M", "supervisor read")}
    mapped = Mapped(guest_shift=21)
    mapped.space.change(mapped.guest["pde"], clear=US)
    assert mapped.cells("guest.user", USER_READ) == {("guest", "pde 2M", "#PF user read")}
    mapped.space.change(mapped.guest["pde"], clear=P)
    assert mapped.cells("guest.present") == {("guest", "pde", "#PF supervisor read")}


@pytest.mark.parametrize("level", ["pml4e", "pdpte", "pde", "pte"])
def test_the_level_is_the_one_that_denies(level: str) -> None:
    mapped = Mapped()
    mapped.space.change(mapped.guest[level], clear=RW)
    assert mapped.cells("guest.write", USER_WRITE) == {("guest", level, "#PF user write")}
    assert mapped.cells("guest.write", WRITE) == {("guest", level, "#PF supervisor write")}
    mapped.space.change(mapped.guest[level], set=RW | NX)
    assert mapped.cells("guest.execute", FETCH) == {("guest", level, "#PF supervisor fetch")}


def test_two_that_deny_test_neither() -> None:
    mapped = Mapped()
    for level in ("pde", "pte"):
        mapped.space.change(mapped.guest[level], clear=RW)
    assert mapped.cells("guest.write", WRITE) == set()
    assert mapped.cells("guest.write", READ) == set()


def test_what_lets_an_access_pass() -> None:
    mapped = Mapped()
    mapped.space.change(mapped.guest["pde"], clear=RW)
    assert mapped.cells("guest.write", WRITE, wp=False) == {("guest", "pde", "permitted, CR0.WP=0")}
    assert mapped.cells("guest.write", READ) == {("guest", "pde", "permitted, other access")}
    assert mapped.cells("guest.smap", READ, smap=True, ac=True) == {("guest", "pte", "permitted, AC=1")}
    assert mapped.cells("guest.smap", READ, smap=True) == {("guest", "pte", "#PF supervisor read")}
    assert mapped.cells("guest.smap", USER_READ, smap=True, ac=True) == set()
    mapped.space.change(mapped.guest["pdpte"], clear=US)
    assert mapped.cells("guest.user", READ) == {("guest", "pdpte", "permitted, supervisor")}


def test_the_nested_dimension_by_purpose() -> None:
    mapped = Mapped()
    mapped.space.change(mapped.page["pte"], clear=RW)
    assert mapped.cells("nested.write", USER_WRITE) == {("nested page", "pte", "#NPF write")}
    assert mapped.cells("nested.write", FETCH) == {("nested page", "pte", "permitted, other access")}
    mapped.space.change(mapped.page["pml4e"], clear=US)
    assert mapped.cells("nested.user") == {("nested page", "pml4e", "#NPF read")}


def test_tables() -> None:
    mapped = Mapped()
    root = mapped.space.gcr3
    table = mapped.space.map_nested(root, mapped.space.spa_of(root))
    mapped.space.change(table["pde"], clear=RW)
    assert mapped.cells("nested.write") == {("nested table", "pde", "#NPF")}


def test_canonical() -> None:
    assert Mapped().cells("canonical", WRITE, 1 << 47) == {("guest", "", "#GP supervisor write")}


class TestAccessedAndDirty:
    def test_bits_that_were_clear(self) -> None:
        mapped = Mapped()
        for level in ("pml4e", "pdpte", "pde"):
            mapped.space.change(mapped.guest[level], set=1 << 5)
        found = mapped.cells("ad", WRITE)
        assert {cell for cell in found if cell[0] == "guest"} == {
            ("guest", "pte", "A by write"), ("guest", "pte", "D by write"),
        }
        assert ("nested table", "pte", "D") in found and ("nested table", "pde", "A") in found

    def test_nothing_is_left_to_set(self) -> None:
        mapped = Mapped()
        mapped.space.walk_and_write(GVA, WRITE)
        assert mapped.cells("ad", WRITE) == mapped.cells("ad", FETCH) == set()

    def test_the_first_use_counts(self) -> None:
        """Where the page and the tables share the nested root's entry, the walk for a table comes first."""
        assert ("nested page", "pml4e", "A by read") in Mapped().cells("ad")
        same = Space(identity=True)
        same.map_guest(GVA, GPA & 0x3F_F000)
        same.map_nested(GPA & 0x3F_F000, GPA & 0x3F_F000)
        found = {(c.dimension, c.level) for c in cells_of(same.paging(), READ, same.walk(GVA)) if c.rule == "ad"}
        assert ("nested table", "pml4e") in found and ("nested page", "pml4e") not in found

    def test_before_a_fault(self) -> None:
        mapped = Mapped()
        mapped.space.change(mapped.page["pte"], clear=P)
        found = mapped.cells("ad", WRITE)
        assert ("guest", "pte", "D before a fault") in found and ("nested page", "pde", "A before a fault") in found
        assert not any("by" in outcome for _, _, outcome in found)


LONG = {level.name: level for level in long_mode(40, False).levels}
PAE = {level.name: level for level in pae(40, True).levels}
SHORT = {level.name: level for level in legacy(36, True).levels}


@pytest.mark.parametrize(
    ("level", "bits", "reasons"),
    [
        (LONG["pte"], "bit40", {"beyond MAXPHYADDR"}),
        (LONG["pte"], "nx", {"NX"}),
        (LONG["pte"], "ps", set()),
        (LONG["pte"], "bit52", set()),
        (LONG["pml4e"], "ps", {"PS"}),
        (LONG["pml4e"], "g", {"G"}),
        (LONG["pml4e"], "g ps bit51 nx", {"G", "PS", "beyond MAXPHYADDR", "NX"}),
        (LONG["pde"], "bit13", set()),
        (LONG["pde"], "ps bit13", {"low frame bits"}),
        (LONG["pde"], "ps bit12", set()),
        (LONG["pdpte"], "ps bit29", {"low frame bits"}),
        (LONG["pdpte"], "ps bit45 bit29", {"low frame bits", "beyond MAXPHYADDR"}),
        (PAE["pdpte"], "rw", {"low bits"}),
        (PAE["pdpte"], "us ps", {"low bits"}),
        (PAE["pdpte"], "nx", {"NX"}),
        (PAE["pte"], "bit52", {"bits 62:52"}),
        (PAE["pte"], "nx", set()),
        (SHORT["pde"], "ps bit21", {"low frame bits"}),
        (SHORT["pde"], "ps bit20", {"beyond MAXPHYADDR"}),
        (SHORT["pde"], "ps bit13", set()),
        (SHORT["pde"], "bit21", set()),
    ],
)
def test_reserved(level: Level, bits: str, reasons: set[str]) -> None:
    assert reserved(level, P | sum(BITS[bit] for bit in bits.split())) == reasons


def test_reserved_in_a_walk() -> None:
    mapped = Mapped(guest_shift=30)
    mapped.space.change(mapped.guest["pdpte"], set=1 << 13)
    assert mapped.cells("guest.reserved") == {("guest", "pdpte 1G", "#PF low frame bits")}
    mapped.space.change(mapped.guest["pdpte"], set=1 << 51)
    assert mapped.cells("guest.reserved") == set()
    mapped = Mapped()
    mapped.space.change(mapped.page["pml4e"], set=PS)
    assert mapped.cells("nested.reserved") == {("nested page", "pml4e", "#NPF PS")}
