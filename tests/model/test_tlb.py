"""What a TLB may hold: section 5.5 and 15.16, rule by rule, on small tables of both dimensions."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from harness.model.access import Access, Reached
from harness.model.dirty import write_back
from harness.model.entries import FRAME, G
from harness.model.liberties import WIDEST, Caches
from harness.model.tlb import Tlb
from harness.model.tlb_events import CONTROL, CR3, CR4, INVLPG, INVLPGA, Flushed, Left, Ran, Wrote
from harness.model.walk import Paging
from tests.model.tables import GVA, LEVELS, NX, READ, RW, USER_READ, WRITE, A, D, P, Space

GPA, OTHER_GPA = 0x7000_0000, 0x7100_0000
SPA, OTHER_SPA = 0x9_0000, 0xA_0000
ASID = 5


@dataclass
class Machine:
    """A guest on `space` with GVA mapped to GPA and SPA; another page at GVA + 1000h."""

    space: Space = field(default_factory=Space)
    tlb: Tlb = field(default_factory=Tlb)

    def __post_init__(self) -> None:
        self.guest = self.space.map_guest(GVA, GPA)
        self.space.map_guest(GVA + 0x1000, OTHER_GPA)
        self.nested = self.space.map_nested(GPA, SPA)
        self.space.map_nested(OTHER_GPA, OTHER_SPA)

    def enter(self, asid: int = ASID, control: int = 0, paging: Paging | None = None, **ran: int | bool) -> None:
        self.tlb.vmrun(control, asid)
        self.tlb.add(Ran(asid, paging or self.space.paging(), **ran))  # type: ignore[arg-type]

    def leave(self) -> None:
        self.tlb.add(Left())

    def access(self, access: Access = READ, gva: int = GVA) -> None:
        write_back(self.space.memory.words, self.space.walk(gva, access).updates)

    def write(self, address: int, entry: int) -> None:
        self.tlb.add(Wrote(address, self.space.get(address)))
        self.space.set(address, entry)

    def change(self, address: int, set: int = 0, clear: int = 0) -> None:
        self.write(address, (self.space.get(address) | set) & ~clear)

    def remap(self, address: int, frame: int) -> None:
        """A and D are clear in what software writes."""
        self.write(address, self.space.get(address) & ~(FRAME | A | D) | frame)

    def permitted(self, access: Access = READ, caches: Caches = WIDEST, gva: int = GVA) -> set[int | str]:
        """sPAs that may be reached; `fault` if that is what the tables say."""
        fresh = self.space.walk(gva, access)
        walks = [fresh, *self.tlb.stale(self.space.memory.words, gva, access, fresh, caches)]
        assert not isinstance(fresh.outcome, Reached) or all(isinstance(walk.outcome, Reached) for walk in walks)
        return {walk.outcome.spa if isinstance(walk.outcome, Reached) else "fault" for walk in walks}


@pytest.fixture
def machine() -> Machine:
    one = Machine()
    one.enter()
    one.access()
    return one


HERE, THERE = SPA | GVA & 0xFFF, OTHER_SPA | GVA & 0xFFF


@pytest.mark.parametrize("level", LEVELS[12])
class TestAnEntryTakenAway:
    def test_until_it_is_flushed(self, machine: Machine, level: str) -> None:
        machine.change(machine.guest[level], clear=P)
        assert machine.permitted() == {HERE, "fault"}
        machine.tlb.add(Flushed(INVLPG, ASID, GVA))
        assert machine.permitted() == {"fault"}

    def test_in_the_nested_dimension_a_guests_flush_is_not_enough(self, machine: Machine, level: str) -> None:
        machine.change(machine.nested[level], clear=P)
        for flush in (Flushed(INVLPG, ASID, GVA), Flushed(CR3, ASID, keeps_global=True), Flushed(CR4, ASID)):
            machine.tlb.add(flush)
            assert machine.permitted() == {HERE, "fault"}
        machine.leave()
        machine.enter(control=3)
        assert machine.permitted() == {"fault"}

    def test_what_was_not_accessed_is_not_cached(self, level: str) -> None:
        machine = Machine()
        machine.enter()
        machine.change(machine.guest[level], clear=P)
        assert machine.permitted() == {"fault"}

    def test_what_was_not_there_while_a_guest_ran(self, machine: Machine, level: str) -> None:
        machine.leave()
        there = machine.space.get(machine.nested[level])
        machine.change(machine.nested[level], clear=P)
        machine.enter(control=1)
        machine.leave()
        machine.write(machine.nested[level], there)
        machine.change(machine.nested[level], clear=P)
        machine.enter()
        assert machine.permitted() == {"fault"}


class TestFlushes:
    def test_another_page(self, machine: Machine) -> None:
        machine.remap(machine.guest["pte"], OTHER_GPA)
        machine.tlb.add(Flushed(INVLPG, ASID, GVA + 0x1000))
        assert machine.permitted() == {HERE, THERE}

    def test_another_page_flushes_upper_levels(self, machine: Machine) -> None:
        """5.5.3: INVLPG flushes all upper-level entries, but with EFER.TCE only those that lead to its page. The
        translation itself stays in either case."""
        machine.change(machine.guest["pde"], clear=P)
        machine.tlb.add(Flushed(INVLPG, ASID, GVA + (1 << 30)))
        assert machine.permitted() == {HERE, "fault"}
        machine.tlb.add(Flushed(INVLPG, ASID, GVA))
        assert machine.permitted() == {"fault"}

    def test_with_tce_only_those_that_lead_there(self, machine: Machine) -> None:
        machine.access(gva=GVA + 0x1000)
        machine.remap(machine.guest["pde"], machine.space.get(machine.guest["pdpte"]) & FRAME)
        machine.tlb.add(Flushed(INVLPG, ASID, GVA, narrow=True))
        assert machine.permitted() == {"fault"}
        assert THERE in machine.permitted(gva=GVA + 0x1000)

    @pytest.mark.parametrize(("event", "gone"), [
        (Flushed(CR3, ASID, keeps_global=True), False),
        (Flushed(CR4, ASID), True),
        (Flushed(INVLPG, ASID, GVA), True),
        (Flushed(INVLPGA, ASID + 1, GVA), False),
        (Flushed(INVLPGA, ASID, GVA), True),
        (Flushed(CONTROL, ASID, keeps_global=True, nested=True), False),
        (Flushed(CONTROL, ASID, nested=True), True),
    ])
    def test_a_global_page(self, event: Flushed, gone: bool) -> None:
        machine = Machine()
        machine.space.change(machine.guest["pte"], set=G)
        machine.enter(pge=True)
        machine.access()
        machine.change(machine.guest["pte"], clear=P)
        machine.tlb.add(event)
        assert machine.permitted() == ({"fault"} if gone else {HERE, "fault"})

    def test_g_means_nothing_without_pge(self, machine: Machine) -> None:
        machine = Machine()
        machine.space.change(machine.guest["pte"], set=G)
        machine.enter()
        machine.access()
        machine.change(machine.guest["pte"], clear=P)
        machine.tlb.add(Flushed(CR3, ASID, keeps_global=True))
        assert machine.permitted() == {"fault"}

    @pytest.mark.parametrize(("control", "gone"), [(0, False), (1, True), (2, False), (3, True), (7, True), (9, False)])
    def test_tlb_control(self, machine: Machine, control: int, gone: bool) -> None:
        machine.leave()
        machine.remap(machine.nested["pte"], OTHER_SPA)
        machine.enter(control=control)
        assert machine.permitted() == ({THERE} if gone else {HERE, THERE})

    def test_a_large_page_goes_as_a_whole(self) -> None:
        space = Space()
        pde = space.map_guest(GVA, GPA, 21)["pde"]
        gpa = GPA | GVA & 0x1F_FFFF
        space.map_nested(gpa & ~0xFFF, SPA)
        machine = Machine.__new__(Machine)
        machine.space, machine.tlb = space, Tlb()
        machine.enter()
        machine.access()
        machine.change(pde, clear=P)
        assert machine.permitted() == {HERE, "fault"}
        machine.tlb.add(Flushed(INVLPG, ASID, GVA ^ 0x10_0000))
        assert machine.permitted() == {"fault"}


class TestAsids:
    def test_another_one_has_its_own(self, machine: Machine) -> None:
        machine.leave()
        machine.remap(machine.nested["pte"], OTHER_SPA)
        machine.enter(asid=6)
        assert machine.permitted() == {THERE}
        machine.leave()
        machine.enter()
        assert machine.permitted() == {HERE, THERE}

    def test_flushed_for_the_other_one(self, machine: Machine) -> None:
        machine.leave()
        machine.remap(machine.nested["pte"], OTHER_SPA)
        machine.enter(asid=6, control=3)
        machine.leave()
        machine.enter()
        assert machine.permitted() == {HERE, THERE}

    def test_pcids(self) -> None:
        """5.5.1: only the current one's are used; a global page is everybody's."""
        for bits, expected in ((0, {"fault"}), (G, {HERE, "fault"})):
            machine = Machine()
            machine.space.change(machine.guest["pte"], set=bits)
            machine.enter(pge=True, pcid=1)
            machine.access()
            machine.change(machine.guest["pte"], clear=P)
            machine.tlb.add(Ran(ASID, machine.space.paging(), True, 2, False))
            assert machine.permitted() == expected
            machine.tlb.add(Ran(ASID, machine.space.paging(), True, 1, False))
            assert machine.permitted() == {HERE, "fault"}
            machine.tlb.add(Flushed(CR3, ASID, keeps_global=True, pcid=2))
            assert machine.permitted() == {HERE, "fault"}


class TestRights:
    def test_taken(self, machine: Machine) -> None:
        machine.access(WRITE)
        machine.change(machine.guest["pte"], clear=RW)
        assert machine.permitted(WRITE) == {HERE, "fault"}

    def test_given_needs_no_flush(self, machine: Machine) -> None:
        machine.change(machine.guest["pte"], clear=RW | D)
        machine.tlb.add(Flushed(INVLPG, ASID, GVA))
        machine.access()
        machine.change(machine.guest["pte"], set=RW)
        assert machine.permitted(WRITE) == {HERE}

    def test_no_execute(self, machine: Machine) -> None:
        machine.change(machine.nested["pde"], set=NX)
        assert machine.permitted(Access(fetch=True)) == {HERE, "fault"}

    def test_controls_that_l2_changes_hold_at_once(self, machine: Machine) -> None:
        machine.access(WRITE)
        machine.change(machine.guest["pte"], clear=RW)
        machine.tlb.add(Flushed(INVLPG, ASID, GVA))
        relaxed = machine.space.paging(wp=False)
        machine.tlb.add(Ran(ASID, relaxed, by_vmrun=False))
        machine.tlb.add(Ran(ASID, machine.space.paging(), by_vmrun=False))
        assert machine.permitted(WRITE) == {"fault"}

    def test_controls_that_l1_changes_may_live_on(self, machine: Machine) -> None:
        """15.16, Software Rule: CR0.WP in the VMCB is changed with a flush, or else either may hold."""
        machine.access(WRITE)
        machine.leave()
        machine.change(machine.guest["pte"], clear=RW)
        machine.enter(control=1, paging=machine.space.paging(wp=False))
        machine.leave()
        machine.enter()
        assert machine.permitted(WRITE) == {HERE, "fault"}

    def test_cpl_is_that_of_the_access(self, machine: Machine) -> None:
        machine.change(machine.guest["pte"], clear=P)
        assert machine.permitted(USER_READ) == {HERE, "fault"}


class TestAccessedAndDirty:
    def _effects(self, machine: Machine, access: Access) -> set[tuple[int, frozenset[int]]]:
        """What may come of it: the sPA, and the entries in which a bit is set that was not."""
        fresh = machine.space.walk(GVA, access)
        found = set()
        for walk in (fresh, *machine.tlb.stale(machine.space.memory.words, GVA, access, fresh)):
            assert isinstance(walk.outcome, Reached)
            changed = {at for at, bits, _ in walk.updates if bits & ~machine.space.get(at)}
            found.add((walk.outcome.spa, frozenset(changed)))
        return found

    def test_a_dirty_bit_that_software_cleared(self, machine: Machine) -> None:
        machine.access(WRITE)
        pte = machine.guest["pte"]
        machine.change(pte, clear=D)
        assert self._effects(machine, WRITE) == {(HERE, frozenset()), (HERE, frozenset({pte}))}
        machine.tlb.add(Flushed(INVLPG, ASID, GVA))
        assert self._effects(machine, WRITE) == {(HERE, frozenset({pte}))}

    def test_a_clean_translation_is_no_use_to_a_write(self, machine: Machine) -> None:
        """The walk that sets D reads the entry in memory (5.5.3)."""
        machine.remap(machine.guest["pte"], OTHER_GPA)
        assert machine.permitted(READ) == {HERE, THERE}
        assert machine.permitted(WRITE) == {THERE}

    def test_an_accessed_bit_that_software_cleared(self, machine: Machine) -> None:
        pde = machine.guest["pde"]
        machine.change(pde, clear=A)
        assert self._effects(machine, READ) == {(HERE, frozenset()), (HERE, frozenset({pde}))}


class TestPieces:
    """An upper-level entry may be old where the one below it is new, if it is kept by itself."""

    def test_upper_level_entries(self, machine: Machine) -> None:
        space = machine.space
        other = space.guest_page()
        index = GVA >> 12 & 0x1FF
        space.set(space.spa_of(other) + 8 * index, OTHER_GPA | 7)
        old_table = space.get(machine.guest["pde"]) & FRAME
        machine.remap(machine.guest["pde"], other)
        machine.remap(space.spa_of(old_table) + 8 * index, OTHER_GPA + 0x1000)
        space.map_nested(OTHER_GPA + 0x1000, 0xB_0000)
        third = 0xB_0000 | GVA & 0xFFF
        assert machine.permitted() == {HERE, THERE, third}
        assert machine.permitted(caches=Caches(upper=False)) == {HERE, THERE}

    def test_an_entry_is_not_read_before_the_one_that_leads_to_it(self, machine: Machine) -> None:
        space = machine.space
        other = space.guest_page()
        at = space.spa_of(other) + 8 * (GVA >> 12 & 0x1FF)
        space.set(at, GPA + 0x1000 | 7 | A)
        space.map_nested(GPA + 0x1000, 0xB_0000)
        machine.write(at, OTHER_GPA | 7)
        machine.remap(machine.guest["pde"], other)
        assert machine.permitted() == {HERE, THERE}

    def test_nested_translations_of_the_guests_tables(self, machine: Machine) -> None:
        """The old nested translation of a table outlives the guest's flush, and leads to the old table."""
        space = machine.space
        machine.leave()
        other = space.page()
        space.set(other + 8 * (GVA >> 12 & 0x1FF), OTHER_GPA | 7)
        (entry,) = (step.address for step in space.walk(GVA).steps if step[:3] == ("nested", "pte", "pte"))
        machine.remap(entry, other)
        machine.enter()
        machine.tlb.add(Flushed(INVLPG, ASID, GVA))
        assert machine.permitted() == {HERE, THERE}


class TestTheLog:
    def test_nothing_to_say(self, machine: Machine) -> None:
        assert not machine.tlb.changed and machine.permitted() == {HERE}
        machine.leave()
        machine.enter()
        assert not machine.tlb.changed

    def test_rewind(self, machine: Machine) -> None:
        machine.change(machine.guest["pte"], clear=P)
        before = machine.permitted()
        mark = machine.tlb.mark()
        machine.leave()
        machine.enter(control=1)
        assert machine.permitted() == {"fault"}
        machine.tlb.rewind(mark)
        assert machine.permitted() == before == {HERE, "fault"}

    def test_a_profile(self, machine: Machine) -> None:
        machine.leave()
        machine.remap(machine.nested["pte"], OTHER_SPA)
        machine.enter()
        assert machine.permitted(caches=Caches(over_vmrun=False)) == {THERE}

    def test_an_entry_that_leads_nowhere(self, machine: Machine) -> None:
        machine.change(machine.guest["pde"], set=1 << 45)
        machine.change(machine.guest["pde"], clear=FRAME)
        assert HERE in {walk.outcome.spa for walk in machine.tlb.stale(
            machine.space.memory.words, GVA, READ, machine.space.walk(GVA)) if isinstance(walk.outcome, Reached)}
