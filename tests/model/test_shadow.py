"""The audit of shadows: agreement in every format, each planted fault by its rule, and the model's own walk as a second
opinion on any entry whatever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.model.access import Access
from harness.model.backing import Kvm, Slot
from harness.model.entries import FRAME, NX, PS, RW, US, A, D, P
from tests.model.shadows import ALL, FORMATS, L1_SIZE, PRESENT, PROCESS, World

SHAPES = [(fmt, levels) for fmt in FORMATS for levels in (5, 4) if (fmt, levels) != ("5-level", 4)]


@pytest.mark.parametrize(("fmt", "levels"), SHAPES)
def test_as_kvm_builds_it_nothing_is_wrong(fmt: str, levels: int) -> None:
    world = World(fmt, levels)
    auditor = world.auditor()
    assert world.audit(auditor) == []
    assert auditor.leaves == len(PRESENT) + 7
    assert world.audit(auditor) == [] and auditor.leaves == 2 * (len(PRESENT) + 7)


@dataclass
class Fault:
    """`plant` changes the world; breaches of just these `rules`, separated by blanks, must be found."""

    plant: Callable[[World], Kvm | None]
    rules: str


def bits(name: str, set: int = 0, clear: int = 0) -> Callable[[World], None]:
    return lambda world: world.change(name, set, clear)


def both(first: Callable[[World], None], second: Callable[[World], None]) -> Callable[[World], None]:
    def plant(world: World) -> None:
        first(world)
        second(world)
    return plant


def frame(name: str, other: Callable[[World], int]) -> Callable[[World], None]:
    return lambda world: world.change(name, other(world), FRAME)


def new_leaf(world: World) -> None:
    at = world.at["shadow.3"] + 8
    world.memory.words[at >> 3] = world.hpa(0x5000) | P | RW | US


def reserved(world: World) -> None:
    world.change("l1.large.pde", set=1 << (21 if world.fmt.entry_shift == 2 else 13))


def beyond_l1(world: World) -> None:
    """The direct map has one page more than L1."""
    last = world.at[f"direct.{L1_SIZE - 4096:x}"]
    at = world.at["direct.pde"] + 8
    table = world.page()
    world.memory.words[at >> 3] = table | P | RW | US
    world.memory.words[table >> 3] = world.memory.words[last >> 3]


def kept_for_another(world: World) -> None:
    table = world.memory.words[world.at["shadow.0.pde"] >> 3] & FRAME
    world.tables[table] = world.tables[table]._replace(gfn=world.tables[table].gfn + 1)


def not_kept(world: World) -> None:
    """A pointer to a page that is no table of KVM's: a copy of one."""
    at = world.at["shadow.0.pde"] >> 3
    table, copy = world.memory.words[at] & FRAME, world.page()
    world.memory.bytes[copy : copy + 4096] = world.memory.bytes[table : table + 4096]
    world.memory.words[at] = copy | P | RW | US


def writes_to_a_table(world: World) -> None:
    """L1 maps its own table for L2; the shadow must not let it be written."""
    table = world.l1(world.at["l1.0.pde"]) & FRAME
    world.set_l1(world.at["l1.1.pte"], table | ALL)
    world.change("shadow.1", world.hpa(table), FRAME)


def large_writable(world: World) -> None:
    """A large page of the direct map over L1's tables: L0 would need one in one piece for that."""
    world.memory.words[world.at["direct.pde"] >> 3] = world.hpa(0) & ~0x1F_FFFF | P | RW | US | PS


def read_only_slot(world: World) -> Kvm:
    kvm = world.kvm()
    first, second = kvm.slots
    return kvm._replace(slots=(first._replace(writable=False), second))


def read_only_host(world: World) -> None:
    table = world.host
    for level in world.l0.levels:
        at = table + (PROCESS + (2 << 20) >> level.down & 0xFF8)
        table = world.memory.words[at >> 3] & FRAME
    world.memory.words[at >> 3] &= ~RW


def smaller_slot(world: World) -> Kvm:
    kvm = world.kvm()
    return kvm._replace(slots=(kvm.slots[0], Slot(L1_SIZE // 2, L1_SIZE - 4096, PROCESS + L1_SIZE // 2, True)))


FAULTS = {
    "nothing": Fault(lambda world: None, ""),
    "another frame": Fault(frame("shadow.0", lambda world: world.hpa(0x6000)), "frame"),
    "a frame outside of L1": Fault(frame("shadow.0", lambda world: 0x3000), "frame"),
    "another frame of a large page": Fault(frame("shadow.large+3000", lambda w: w.hpa(4 << 20)), "frame"),
    "a leaf where L1 has none": Fault(new_leaf, "frame"),
    "L1's entry cleared": Fault(bits("l1.0.pte", clear=P), "frame"),
    "L1's entry with a reserved bit": Fault(reserved, "frame"),
    "a writable leaf": Fault(bits("l1.0.pte", clear=RW), "rights"),
    "a writable leaf of a large page": Fault(bits("l1.large.pde", clear=RW), "rights"),
    "a leaf for the user": Fault(bits("l1.0.pte", clear=US), "rights"),
    "less rights": Fault(bits("shadow.0", clear=RW), ""),
    "no rights": Fault(bits("shadow.0", clear=US), ""),
    "not present": Fault(bits("shadow.0", clear=P), ""),
    "an entry as of MMIO": Fault(bits("shadow.0", set=1 << 51), ""),
    "software bits": Fault(bits("shadow.0", set=0x7FF << 52 | 7 << 9), ""),
    "rights that a table withholds": Fault(both(bits("l1.0.pte", clear=RW), bits("shadow.0.pde", clear=RW)), ""),
    "L1's leaf without A": Fault(bits("l1.0.pte", clear=A), "ad"),
    "L1's table without A": Fault(bits("l1.0.pde", clear=A), "ad"),
    "L1's leaf without D": Fault(bits("l1.0.pte", clear=D), "ad"),
    "without D, and read-only": Fault(both(bits("l1.0.pte", clear=D), bits("shadow.0", clear=RW)), ""),
    "a leaf that is not write-back": Fault(bits("shadow.0", set=1 << 3), "type"),
    "a leaf with PAT": Fault(bits("shadow.large+3000", set=1 << 7), "type"),
    "a direct map that is not write-back": Fault(bits("direct.5000", set=1 << 4), "type"),
    "L1's type": Fault(bits("l1.0.pte", set=1 << 4), ""),
    "a slot that is read-only": Fault(read_only_slot, "direct rights"),
    "a page that L0 keeps read-only": Fault(read_only_host, "direct rights"),
    "a table that is not KVM's": Fault(not_kept, "table"),
    "a table kept for another": Fault(kept_for_another, "table tracked"),
    "L1's table moved": Fault(lambda world: world.set_l1(
        world.at["l1.0.pde"], world.l1_page() | P | RW | US | A), "table"),
    "writes to L1's table by L1": Fault(lambda world: world.change(f"direct.{world.nested_root:x}", set=RW),
                                        "tracked"),
    "writes to L1's table by L2": Fault(writes_to_a_table, "tracked"),
    "another frame in the direct map": Fault(frame("direct.5000", lambda world: world.hpa(0x6000)), "direct"),
    "a direct map beyond L1's memory": Fault(beyond_l1, "direct"),
    "a slot that was made smaller": Fault(smaller_slot, "direct"),
    "a table of the direct map out of L0's memory": Fault(bits("direct.pde", set=1 << 39), "direct"),
    "a table of the shadow out of L0's memory": Fault(bits("shadow.0.pde", set=1 << 39), "table"),
    "a large page in the direct map": Fault(large_writable, "direct"),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("warm", [False, True], ids=["at first", "since the last"])
def test_a_fault_is_found(fault: str, fmt: str, warm: bool) -> None:
    """Also if all was in order at an audit before."""
    world = World(fmt)
    auditor = world.auditor()
    if warm:
        assert world.audit(auditor) == []
    kvm = FAULTS[fault].plant(world)
    found = {one.rule for one in world.audit(auditor, kvm)}
    wanted = {f"shadow.{rule}" for rule in FAULTS[fault].rules.split()}
    assert found == wanted or (warm and wanted and found - wanted == {"shadow.stale"} and not found & wanted)


@pytest.mark.parametrize("fmt", ["4-level", "5-level", "PAE"])
def test_no_execute(fmt: str) -> None:
    world = World(fmt)
    world.change("l1.2.pte", set=NX)
    assert [one.rule for one in world.audit()] == ["shadow.rights"]
    world.change("shadow.2", set=NX)
    assert world.audit() == []
    world.change("shadow.2", clear=NX)
    world.change("shadow.2.pdpte", set=NX)
    assert world.audit() == []


def test_what_stays_is_stale() -> None:
    world = World("4-level")
    auditor = world.auditor()
    assert world.audit(auditor) == []
    world.change("l1.1.pte", clear=RW)
    (one,) = world.audit(auditor)
    assert (one.rule, one.gpa, one.address) == ("shadow.stale", world.gpa + 4096, world.at["shadow.1"])
    assert [one.rule for one in world.audit(auditor)] == ["shadow.stale"], "until it is mended"
    world.change("shadow.1", clear=RW)
    assert world.audit(auditor) == []


def test_a_table_out_of_step_waits_for_vmrun() -> None:
    world = World("4-level")
    auditor = world.auditor()
    table = world.memory.words[world.at["shadow.0.pde"] >> 3] & FRAME
    world.change("l1.1.pte", clear=P)
    assert len(world.audit(auditor, synced=True)) == 1, "it is in step, says KVM"
    world.tables[table] = world.tables[table]._replace(unsync=True)
    assert world.audit(auditor, synced=True) == []
    assert len(world.audit(auditor)) == 1, "but not behind a VMRUN"


def test_a_table_out_of_step_may_be_written() -> None:
    world = World("4-level")
    table = world.memory.words[world.at["shadow.0.pde"] >> 3] & FRAME
    world.change(f"direct.{world.tables[table].gfn << 12:x}", set=RW)
    assert [one.rule for one in world.audit()] == ["shadow.tracked"]
    world.tables[table] = world.tables[table]._replace(unsync=True)
    assert world.audit() == []


def test_what_was_there_at_the_last_flush_is_permitted() -> None:
    """L2 has written to L1's table since: once that is over, it is not permitted any more."""
    world = World("4-level")
    auditor, kvm = world.auditor(), world.kvm()
    at = world.at["l1.1.pte"]
    old = world.l1(at)
    world.change("l1.1.pte", clear=P)

    def audit(before: int | None) -> list[str]:
        auditor.begin(kvm)
        earlier = world.nested(auditor, lambda spa: before if spa == at else None)
        return [one.rule for one in auditor.shadow(kvm.l2_root, world.nested(auditor), earlier)]

    assert audit(old) == [] and audit(old & ~RW) == ["shadow.stale"]
    assert audit(None) == ["shadow.stale"]


def test_a_leaf_larger_than_l1s_pages() -> None:
    """Permitted if every page below it is, and lies where it must in one piece."""
    world = World("4-level")
    world.hpa = staticmethod(lambda spa: (16 << 20) + spa)  # type: ignore[method-assign]
    auditor, kvm = world.auditor(), world.kvm()
    for spa in (*range(0, 0x30000, 4096), *range(2 << 20, 4 << 20, 4096)):
        world.map_host(PROCESS + spa, world.hpa(spa))
    world.nested_root = world.l1_page()
    gpa = 0x4000_0000
    for number in range(512):
        world.map_l1(f"l1.s{number}", gpa + number * 4096, (2 << 20) + number * 4096, 12)
    root = world.keep(world.page(), world.nested_root, 5)
    world.shadow(root, "shadow.big", gpa, world.hpa(2 << 20), 21, P | RW | US, world.of_l1)
    kvm = world.kvm()

    def audit() -> list[str]:
        auditor.begin(kvm)
        return [one.rule for one in auditor.shadow(root, world.nested(auditor))]

    assert audit() == []
    world.change("l1.s300.pte", clear=RW)
    assert len(audit()) == 1
    world.change("l1.s300.pte", set=RW)
    assert audit() == [], "nothing of it is remembered"


ACCESSES = [Access(user=True), Access(user=True, write=True), Access(user=True, fetch=True)]
ENTRIES = ["l1.0.pte", "l1.0.pde", "l1.large.pde", "shadow.0", "shadow.0.pde", "shadow.0.pdpte", "shadow.large+3000"]


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.tuples(
    st.sampled_from(ENTRIES), st.integers(0, 63), st.booleans()), min_size=1, max_size=3))
def test_nothing_that_is_not_permitted_goes_unseen(fmt: str, changes: list[tuple[str, int, bool]]) -> None:
    """Any bits of any entries: an access that the processor makes through the shadow, and that L1's table does not
    permit, is found; what is found is such an access, or a bit that nobody would set, or a table that is not kept."""
    world = World(fmt)
    for name, bit, on in changes:
        if world.fmt.entry_shift == 3 or bit < 32 or name.startswith("shadow"):
            world.change(name, **{"set" if on else "clear": 1 << bit})
    found = world.audit()
    wrong = [(gpa, access) for gpa in world.gpas() for access in ACCESSES
             if (reached := world.through_shadow(gpa, access)) is not None
             and world.permitted(gpa, access) != reached]
    if wrong:
        assert found, wrong[0]
    elif {one.rule for one in found} & {"shadow.frame", "shadow.rights"}:
        raise AssertionError(found)
