"""Properties that hold for every pair of tables, good or broken; checked over random small ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st

from harness.model.access import Access, ErrorCode, GeneralProtection, NestedPageFault, Outcome, PageFault, Reached
from harness.model.dirty import write_back
from harness.model.entries import FRAME, LEVEL_NAMES, NX, PS, RW, US, A, D, P
from harness.model.walk import NESTED, Paging, Walk, translate
from tests.model.tables import ALL_ACCESSES, LEVELS, SIZE, TABLE_OFFSET, USER, Space

SHIFTS = st.sampled_from([12, 12, 12, 21, 30])
FLAWS = st.sampled_from([RW, US, NX, P, A, D, 1 << 51, 1 << 8, 1 << 13, 1 << 62, RW | US])
"""Bits to flip in an entry that grants all."""


@dataclass
class Case:
    """Tables, and an access through them."""

    space: Space
    gva: int
    access: Access
    paging: Paging
    guest: dict[str, int]
    nested: dict[str, int]
    shifts: tuple[int, int]
    gpa: int
    own: list[int] = field(default_factory=list)
    """sPAs of the entries on the walk's way, tables' nested entries included."""

    def walk(self) -> Walk:
        return translate(self.paging, self.space.memory.words, self.gva, self.access)

    def faults(self) -> bool:
        return not isinstance(self.walk().outcome, Reached)


@st.composite
def cases(draw: st.DrawFn, nested: bool = True) -> Case:
    space = Space(nested=nested, guest_nxe=draw(st.booleans()), host_nxe=draw(st.booleans()))
    guest_shift, nested_shift = draw(SHIFTS), draw(SHIFTS)
    gva = draw(st.integers(0, (1 << 47) - 1))
    if not nested:
        frame = 0 if guest_shift == 30 else draw(st.integers(0, SIZE - 1)) >> guest_shift << guest_shift
        guest, final = space.map_guest(gva, frame, guest_shift), {}
    else:
        # clear of the tables' own gPAs, so that what is flawed for the page leaves them alone, mostly
        frame = (draw(st.integers(0, (1 << 39) - 1)) | 1 << 39) >> guest_shift << guest_shift
        guest = space.map_guest(gva, frame, guest_shift)
        spa = 0 if nested_shift == 30 else draw(st.integers(0, SIZE - 1)) >> nested_shift << nested_shift
        final = space.map_nested(frame | gva & (1 << guest_shift) - 1, spa, nested_shift)
    way = [*guest.values(), *final.values()]
    near = way * 2  # flaws there show in more ways than in the tables' own nested walks
    if nested:
        for at in guest.values():
            way += space.map_nested(at + TABLE_OFFSET & ~0xFFF, at & ~0xFFF).values()
    way = list(dict.fromkeys(way))
    for at, flaw in draw(st.lists(st.tuples(st.sampled_from(near + way), FLAWS), max_size=3)):
        if flaw != 1 << 13 or space.get(at) & PS:  # a reserved bit there; elsewhere it leads to another table
            space.set(at, space.get(at) ^ flaw)
    access = draw(st.sampled_from(ALL_ACCESSES))
    paging = space.paging(wp=draw(st.booleans()), smep=draw(st.booleans()), smap=draw(st.booleans()),
                          ac=draw(st.booleans()))
    gpa = frame | gva & (1 << guest_shift) - 1
    return Case(space, gva, access, paging, guest, final, (guest_shift, nested_shift), gpa, way)


@given(cases(), st.data())
def test_less_right_never_helps(case: Case, data: st.DataObject) -> None:
    """Without R/W, without U/S, with NX or without P no fault turns into a success. The one exception
    is in the manual: without U/S a page is a supervisor page, which SMEP and SMAP let the supervisor
    use (5.6.5, 5.6.6)."""
    assume(case.faults())
    clear, set = data.draw(st.sampled_from([(P, 0), (RW, 0), (US, 0), (0, NX)]))
    at = data.draw(st.sampled_from(case.own))
    if clear == US and at in case.guest.values():
        assume(case.access.user or not (case.paging.smep or case.paging.smap))
    assume(not (set and not (case.space.guest_nxe and case.space.host_nxe)))
    case.space.change(at, set=set, clear=clear)
    assert case.faults()


@given(cases())
def test_a_walk_changes_nothing(case: Case) -> None:
    before = case.space.snapshot()
    case.walk()
    assert case.space.snapshot() == before


@given(cases())
def test_write_back_sets_a_and_d_where_the_walk_read(case: Case) -> None:
    walk = case.walk()
    words = case.space.memory.words
    before = {at: words[at >> 3] for at in range(0, case.space.next_page, 8) if words[at >> 3]}
    old = write_back(words, walk.updates)
    read = {step.address for step in walk.steps}
    assert old.keys() <= read
    for at in range(0, case.space.next_page, 8):
        now, then = words[at >> 3], before.get(at, 0)
        assert now & ~(A | D) == then & ~(A | D) and now & then == then
        assert (now != then) == (at in old) and old.get(at, then) == then
        assert now == then or now & P  # 5.4.1: never in an entry that is not present


@given(cases())
def test_write_back_is_idempotent_and_a_repeated_walk_agrees(case: Case) -> None:
    first = case.walk()
    words = case.space.memory.words
    write_back(words, first.updates)
    after = case.space.snapshot()
    assert write_back(words, first.updates) == {}
    second = case.walk()
    assert (second.outcome, second.rule, second.updates) == (first.outcome, first.rule, first.updates)
    assert [s[:4] for s in second.trail] == [s[:4] for s in first.trail]
    assert write_back(words, second.updates) == {} and case.space.snapshot() == after


@given(cases(nested=False), st.sampled_from([12, 21]))
def test_one_dimension_is_two_under_identity(case: Case, shift: int) -> None:
    """The nested table that maps every gPA to itself, with all rights, changes no outcome."""
    alone = case.walk()
    space = case.space
    space.nested = True
    space.identity, space.identity_shift = True, shift
    tables_end = space.next_page
    space.ncr3 = space.page()
    for gpa in range(0, SIZE if shift > 12 else tables_end, 1 << shift):
        space.map_nested(gpa, gpa, shift)
    if isinstance(alone.outcome, Reached):
        assume(alone.outcome.spa < SIZE)
        if shift == 12 and alone.outcome.spa >= tables_end:
            space.map_nested(alone.outcome.spa & ~0xFFF, alone.outcome.spa & ~0xFFF)
    nested = space.paging().nested
    both = translate(case.paging._replace(nested=nested, ncr3=space.ncr3), space.memory.words, case.gva, case.access)
    assert (both.outcome, both.rule) == (alone.outcome, alone.rule)
    assert [s for s in both.trail if s[0] != NESTED] == alone.trail
    own = {s[3] for s in alone.trail}
    assert [u for u in both.updates if u[0] in own] == alone.updates


@given(cases(), st.booleans())
def test_splitting_a_large_page(case: Case, guest: bool) -> None:
    """A large page as a table of 512 smaller ones with the same rights: only the steps differ."""
    entries, shift = (case.guest, case.shifts[0]) if guest else (case.nested, case.shifts[1])
    assume(shift > 12)
    space = case.space
    name = LEVELS[shift][-1]
    leaf = space.get(entries[name])
    assume(not leaf & FRAME & (1 << shift) - 1)  # else it is a fault that the smaller pages would not have
    assume(not leaf & 1 << 51 and leaf & PS != 0)
    before = case.walk()
    table = space.guest_page() if guest else space.page()
    below = shift - 9
    for index in range(512):
        entry = leaf & ~PS | index << below | (PS if below > 12 else 0)
        space.set((space.spa_of(table) if guest else table) + 8 * index, entry)
    space.set(entries[name], table | USER | leaf & NX if leaf & P else leaf & ~FRAME | table)
    after = case.walk()
    assert (after.outcome, after.rule) == (before.outcome, before.rule)
    assert LEVEL_NAMES.index(name) >= 1


@given(cases())
def test_granting_everything_reaches_the_page(case: Case) -> None:
    for at in case.own:
        entry = case.space.get(at) | USER
        case.space.set(at, entry & ~(NX | 1 << 51 | 1 << 8 | (1 << 13 if entry & PS else 0)))
    paging = case.paging._replace(smep=False, smap=False)
    outcome = translate(paging, case.space.memory.words, case.gva, case.access).outcome
    assert isinstance(outcome, Reached)
    assert outcome.gpa == case.gpa and outcome.spa & 0xFFF == case.gva & 0xFFF


def _code(outcome: Outcome) -> int:
    return 0 if isinstance(outcome, Reached | GeneralProtection) else outcome.error_code


@given(cases())
def test_error_codes_say_what_was_tried(case: Case) -> None:
    outcome = case.walk().outcome
    code, access, paging = _code(outcome), case.access, case.paging
    match outcome:
        case PageFault():
            assert bool(code & ErrorCode.W) == access.write
            assert bool(code & ErrorCode.U) == access.user
            assert bool(code & ErrorCode.ID) == (access.fetch and paging.guest_id)
            assert not code >> 5 and outcome.address == case.gva
        case NestedPageFault() if code & ErrorCode.FINAL:
            assert bool(code & ErrorCode.W) == access.write and code & ErrorCode.U
            assert bool(code & ErrorCode.ID) == access.fetch
            assert outcome.address == case.gpa
        case NestedPageFault():
            assert code & ErrorCode.W and code & ErrorCode.U and not code & ErrorCode.ID
            assert not outcome.address & 7
    if code & ErrorCode.RSVD:
        assert code & ErrorCode.P


@given(cases())
def test_the_dimension_of_a_nested_fault(case: Case) -> None:
    """Exactly one of bits 32 and 33; and it is the one of the walk's last step."""
    walk = case.walk()
    assume(isinstance(walk.outcome, NestedPageFault))
    where = _code(walk.outcome) & (ErrorCode.FINAL | ErrorCode.GUEST_TABLE)
    assert where in (ErrorCode.FINAL, ErrorCode.GUEST_TABLE)
    last = walk.steps[-1]
    assert last.dimension == NESTED
    assert (where == ErrorCode.FINAL) == (last.purpose == "final")


@given(cases())
def test_the_rule_is_of_the_dimension_of_the_fault(case: Case) -> None:
    walk = case.walk()
    kind = {Reached: "reached", PageFault: "guest.", NestedPageFault: "nested.", GeneralProtection: "canonical"}
    assert walk.rule.startswith(kind[type(walk.outcome)])
    assert all(step.entry == case.space.get(step.address) for step in walk.steps)
    assert len(walk.steps) <= 24


@given(cases(), st.integers(48, 63))
def test_not_canonical_reads_nothing(case: Case, bit: int) -> None:
    case.gva ^= 1 << bit
    walk = case.walk()
    assert walk.outcome == GeneralProtection(0) and not walk.trail and not walk.updates


@pytest.mark.parametrize("rule", [
    "reached", "guest.present", "guest.reserved", "guest.write", "guest.user", "guest.execute",
    "nested.present", "nested.reserved", "nested.user", "nested.write",
])
def test_random_tables_lead_everywhere(rule: str) -> None:
    """Properties over walks that all end in the same way would prove nothing."""
    search = settings(max_examples=20_000, phases=[Phase.generate], deadline=None)
    find(cases(), lambda case: case.walk().rule == rule, settings=search)
