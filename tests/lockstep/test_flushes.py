"""What L1 takes away in its nested tables, and must flush."""

from __future__ import annotations

import pytest

from harness.lockstep.nested_tables import NestedTables
from harness.model.entries import FRAME, NX, PS, US, A, P, long_mode
from tests.lockstep.observed import DATA, World, no_flush, told
from tests.model.tables import USER, Space


class TestFlushes:
    def test_once(self, world: World) -> None:
        assert no_flush(lambda w, at: w.space.change(at, clear=P))(world)
        world.vmmcall()
        assert world.enter() == []

    def test_not_of_an_entry_that_was_never_used(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        world.space.change(world.entry(DATA), clear=P | A)
        assert world.enter() == []

    def test_three_counts_where_the_cpu_has_it(self, world: World) -> None:
        world.vmcb["tlb_control"] = 3
        assert no_flush(lambda w, at: w.space.change(at, clear=P))(world)

    def test_the_asid_that_ran_then(self, world: World) -> None:
        """Another one may run first: the flush is due when this one runs again."""
        at = world.entry(DATA)
        world.space.change(at, set=A)
        world.enter()
        world.vmmcall()
        world.space.change(at, clear=P)
        world.vmcb["asid"] = 2
        assert world.enter() == []
        world.vmmcall()
        world.vmcb["asid"] = 1
        assert told(world.enter()) == [("L1", "tlb_control", "tlb.control")]


@pytest.fixture
def large() -> tuple[Space, int, NestedTables]:
    """A large page at the last GiB of a nested table, and what is known of it."""
    space = Space()
    at = space.map_nested(0x4000_0000, 0x80_0000, shift=21)["pde"]
    space.change(at, set=A)
    return space, at, NestedTables(space.ncr3, long_mode(48, True), space.memory.bytes)


class TestLargePages:
    """Only what no more translates to the same is a loss."""

    def split(self, space: Space, at: int) -> int:
        table = space.page()
        for n in range(512):
            space.set(table + 8 * n, 0x80_0000 + 0x1000 * n | USER)
        space.set(at, table | USER | A)
        return table

    def test_split(self, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        self.split(space, at)
        assert [one.lost for one in tables.refresh()] == [False]
        space.set(at, 0x80_0000 | USER | PS | A)
        assert [one.lost for one in tables.refresh()] == [False]

    @pytest.mark.parametrize("entry", [0, 0x90_0000 | USER, 0x80_7000 | P | US, 0x80_7000 | USER | NX])
    def test_split_with_a_loss(self, entry: int, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        space.set(self.split(space, at) + 7 * 8, entry)
        assert [one.lost for one in tables.refresh()] == [True]

    def test_another_frame(self, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        space.set(at, space.get(at) ^ 0x20_0000)
        assert [one.lost for one in tables.refresh()] == [True]
        assert tables.refresh() == []

    def test_a_table_of_another_entry_is_read_too(self, large: tuple[Space, int, NestedTables]) -> None:
        space, at, tables = large
        assert space.get(at) & FRAME == 0x80_0000
        leaf = space.map_nested(0x5000_0000, 0x90_0000)["pte"]
        tables.refresh()
        space.change(leaf, clear=P)
        assert [(one.address, one.depth, one.lost) for one in tables.refresh()] == [(leaf, 3, True)]
