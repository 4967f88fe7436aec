"""The checks of a foreign L1's stops: what a right machine does passes, and what cannot be judged is counted."""

from __future__ import annotations

import pytest

from harness.lockstep.errata import Erratum
from harness.lockstep.exits import has_table
from harness.lockstep.observe import KEPT
from harness.lockstep.result import Under, Visit
from harness.model.entries import PS, RW, US, A, Format, P, legacy, long_mode, pae
from harness.model.memory import Memory
from harness.model.vmcb import ExitCode
from harness.model.walk import Paging
from harness.wire.stop import ENTER, EXIT, Stop
from tests.lockstep.observed import CODE, DATA, HOLE, E, World, fault
from tests.model.tables import USER


class TestRight:
    """A machine and an L1 that do nothing wrong."""

    def test_an_instruction(self, world: World) -> None:
        assert world.enter() == [] and world.vmmcall() == []
        assert world.observer.seen.vmruns == 1 and world.observer.seen.exits == {"VMEXIT_VMMCALL": 1}

    def test_its_visits(self, world: World) -> None:
        """Each #VMEXIT whose VMRUN was seen, with the paging that L2 ran under."""
        world.enter()
        world.npf()
        world.enter()
        world.vmmcall()
        world.vmmcall()
        under = Under(4, world.space.ncr3, 4)
        assert world.observer.seen.visits == [
            Visit(0, 0, ExitCode.NPF, E.FINAL | E.U, HOLE, under), Visit(1, 0, ExitCode.VMMCALL, 0, 0, under)]

    def test_a_nested_fault(self, world: World) -> None:
        assert world.enter() == [] and world.npf() == []

    def test_a_nested_fault_for_a_guest_table(self, world: World) -> None:
        gpa = world.unmapped_table()
        world.enter()
        assert world.npf(E.GUEST_TABLE | E.W | E.U, gpa) == []

    def test_a_page_fault(self, world: World) -> None:
        world.enter()
        assert world.leave(0x4E, E.W, 0x7000) == []

    def test_a_refusal(self, world: World) -> None:
        world.vmcb["asid"] = 0
        world.enter()
        assert world.leave(ExitCode.INVALID) == [] and world.observer.seen.refused == 1

    def test_entries_that_l1_makes_present_need_no_flush(self, world: World) -> None:
        world.enter()
        world.npf()
        world.space.map_nested(HOLE, world.space.page())
        assert world.enter() == []

    @pytest.mark.parametrize("control", [1])
    def test_what_is_flushed_may_go(self, world: World, control: int) -> None:
        world.enter()
        world.vmmcall()
        world.space.change(world.entry(DATA), set=A)
        world.enter()
        world.vmmcall()
        world.space.set(world.entry(DATA), 0)
        world.vmcb["tlb_control"] = control
        assert world.enter() == []

    def test_another_asid_needs_no_flush(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        world.space.set(world.entry(), world.space.get(world.entry()) & ~P)
        world.vmcb["asid"] = 2
        assert world.enter() == []


    def test_accesses(self, world: World) -> None:
        world.enter()
        assert world.access() == [] and world.access(write=True) == [] and world.access(cs=3) == []
        assert world.vmmcall() == [] and world.observer.seen.accesses == 3
        assert world.access() == [], "L2 does not run"

    def test_an_access_on_the_side(self, world: World) -> None:
        """To a descriptor, at CPL 3, in a page of the supervisor's."""
        world.space.map_guest(DATA, world.space.guest_page(), bits=P | RW)
        world.enter()
        assert world.access(cs=3) == []

    def test_invlpga(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        at = world.entry(DATA)
        world.space.change(at, set=A)
        world.enter()
        world.vmmcall()
        world.space.change(at, clear=P)
        assert world.invlpga(DATA) == [] and world.enter() == []

    def test_the_same_by_another_table(self, world: World) -> None:
        """nCR3 has changed, and all that L2 used is in the new table."""
        world.enter()
        world.vmmcall()
        world.other_table()
        assert world.enter() == [] and world.observer.seen.vmruns == 2

    def test_another_table_and_a_flush(self, world: World) -> None:
        world.enter()
        world.vmmcall()
        world.other_table(without=CODE)
        world.vmcb["tlb_control"] = 1
        assert world.enter() == []


class TestTheUnknown:
    def test_an_exit_without_its_vmrun(self, world: World) -> None:
        assert world.vmmcall() == [] and world.observer.seen.unpaired == 1

    def test_a_walk_out_of_memory(self, world: World) -> None:
        world.space.set(world.space.ncr3, 1 << 40 | USER)
        world.enter()
        world.vmcb["exitcode"] = ExitCode.VMMCALL
        found = world.observer.stop(Stop(EXIT, 1, world.host | {"rip": 0x2003}))
        assert found == [] and world.observer.seen.elsewhere == 1

    def test_another_processor(self, world: World) -> None:
        """It may have mended the entry before anyone could look."""
        world.alone = False
        world.enter()
        world.space.change(world.entry(DATA), set=1 << 9)
        assert world.npf(gpa=world.space.gcr3) == [] and world.observer.seen.overtaken == 1
        world.enter()
        assert world.npf(gpa=world.space.gcr3), "nothing changed this time"

    def test_an_access_of_one_of_several(self, world: World) -> None:
        """It is judged if no other processor has run since VMRUN, which could have changed tables."""
        world.alone = False
        world.enter()
        assert world.access(spa=0x5000, others=True) == [] and world.observer.seen.disturbed == 1
        assert [one.rule for one in world.access(spa=0x5000)] == ["reached"] and world.observer.seen.accesses == 1

    def test_what_is_kept(self, world: World) -> None:
        for _ in range(KEPT + 5):
            fault(E.FINAL)(world)
        seen = world.observer.seen
        assert len(seen.divergences) == KEPT and list(seen.by_signature.values()) == [KEPT + 5]

    def test_a_vmcb_out_of_memory(self, world: World) -> None:
        for rax in (1 << 40, world.vmcb.address + 8):
            assert not world.observer.plausible(Stop(ENTER, 1, world.host | {"rax": rax}))


def test_errata_explain(errata: list[Erratum]) -> None:
    """QEMU's reserved bits, by a quirk; the half of VMEXIT_INVALID, by a predicate."""
    world = World([one for one in errata if one.holds_for("qemu-tcg", (7, 2, 22))])
    world.space.map_nested(HOLE, 0, bits=USER | 1 << 51)
    world.enter()
    assert [one.erratum for one in world.npf(E.FINAL | E.U | E.RSVD)] == ["qemu-tcg-reserved-without-p"]
    world.vmcb["asid"] = 0
    world.enter()
    assert [one.erratum for one in world.leave(0xFFFF_FFFF)] == ["qemu-tcg-invalid-high-half"]




@pytest.mark.parametrize(
    "guest", [legacy(40, True), pae(40, True), long_mode(40, True), long_mode(40, True, la57=True)],
    ids=lambda fmt: fmt.name)
def test_where_l2_has_tables(guest: Format) -> None:
    """In each format: those that its walks come to, and no others. The nested table maps 2M to themselves."""
    memory = Memory(2 << 20)
    for at, entry in ((0x1000, 0x2000), (0x2000, 0x3000), (0x3000, PS)):
        memory.write(at, entry | P | RW | US, 8)
    tables = [0x10000 + 0x1000 * number for number, _ in enumerate(guest.levels)]
    size = 1 << guest.entry_shift
    for table, below in zip(tables, [*tables[1:], 0x30000], strict=True):
        memory.write(table + 2 * size, below | P, size)
        memory.write(table + 3 * size, 0x40000, size)  # not present
        memory.write(table + size, 0x50000 | (PS if below not in (tables[1], 0x30000) else 0) | P, size)
    paging = Paging(guest, tables[0], True, False, False, False, True, long_mode(40, True), 0x1000)
    found = [page for page in range(0, 2 << 20, 0x1000) if has_table(paging, memory.words, page + 2 * size)]
    assert found == sorted({*tables, 0x50000})
    memory.write(0x3000, 0, 8)
    assert has_table(paging, memory.words, tables[0]) and not has_table(paging, memory.words, tables[1])
    assert not has_table(paging._replace(guest=None), memory.words, tables[0])
