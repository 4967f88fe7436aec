"""Properties of walks in every pair of modes: L2 in 4-level, 5-level, PAE or 32-bit paging or none, over nested
tables of each format or none; good tables and broken ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st

from harness.model.access import Access, GeneralProtection, NestedPageFault, PageFault, Reached
from harness.model.dirty import write_back
from harness.model.entries import Format, legacy, long_mode, pae
from harness.model.walk import Paging, Walk, translate
from tests.model.golden import Sparse
from tests.model.tables import ALL_ACCESSES, Space

P, RW, US, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
BASE = 0x000F_FFFF_FFFF_F000
MODES = ("4-level", "5-level", "PAE", "32-bit")
SHIFTS = {"4-level": (12, 21, 30), "5-level": (12, 21, 30), "PAE": (12, 21), "32-bit": (12, 22)}
CPU = 46
RESERVED = {"4-level": 1 << 50, "5-level": 1 << 50, "PAE": 1 << 50, "32-bit": 1 << 21}
"""A bit that is reserved in an entry of the mode (in 32-bit mode, of a 4M page only)."""


def table_format(mode: str, nxe: bool) -> Format:
    if mode == "PAE":
        return pae(CPU, nxe)
    return legacy(CPU, True) if mode == "32-bit" else long_mode(CPU, nxe, la57=mode == "5-level")


class Reads(Sparse):
    """Memory that knows which quadwords were asked for."""

    def __init__(self, words: dict[int, int]) -> None:
        super().__init__(words)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return self.get(index, 0)


@dataclass
class Dimension:
    """The tables of one dimension: where they lie, and the entries that were written, by sPA of each."""

    mode: str
    fmt: Format
    root: int
    width: int
    entries: dict[int, str] = field(default_factory=dict)

    @property
    def rights(self) -> list[int]:
        """The sPAs of entries that have rights."""
        return [at for at, name in self.entries.items() if (self.mode, name) != ("PAE", "pdpte")]


@dataclass
class Tables:
    """An access, and the tables that it goes through."""

    memory: Sparse
    paging: Paging
    guest: Dimension | None
    nested: Dimension | None
    gva: int
    access: Access
    shifts: tuple[int, int]
    leaves: dict[str, int] = field(default_factory=dict)
    next: int = 0x10_0000
    where: dict[int, int] = field(default_factory=dict)
    """sPAs of the guest's tables by their gPAs."""

    def page(self) -> int:
        self.next += 0x1000
        return self.next - 0x1000

    def get(self, at: int, width: int) -> int:
        return self.memory[at >> 3] >> (at & 8 - width) * 8 & (1 << 8 * width) - 1

    def put(self, at: int, entry: int, width: int) -> None:
        shift = (at & 8 - width) * 8
        self.memory[at >> 3] = self.memory[at >> 3] & ~((1 << 8 * width) - 1 << shift) | entry << shift

    def flip(self, dimension: Dimension, at: int, bits: int) -> None:
        self.put(at, self.get(at, dimension.width) ^ bits, dimension.width)

    def map(self, dim: Dimension, address: int, frame: int, shift: int, what: str) -> int:
        """Returns the sPA of the entry that maps the page."""
        table = dim.root
        for level in dim.fmt.levels:
            spa = self.where.get(table, table) if dim is self.guest else table
            at = spa + (address >> level.shift & dim.fmt.index_mask) * dim.width
            dim.entries.setdefault(at, level.name)
            if level.shift == shift:
                self.put(at, frame | P | RW | US | (PS if shift > 12 else 0), dim.width)
                self.leaves[what] = at
                return at
            if not self.get(at, dim.width) & BASE:
                below = self.table(dim)
                self.put(at, below | P | (0 if (dim.mode, level.name) == ("PAE", "pdpte") else RW | US), dim.width)
            table = self.get(at, dim.width) & BASE
        raise AssertionError(shift)

    def table(self, dim: Dimension) -> int:
        """A new table, by the kind of address that entries hold; a guest's gets its nested entries."""
        spa = self.page()
        if dim is not self.guest or self.nested is None:
            return spa
        gpa = 0x4000_0000 + spa
        self.where[gpa] = spa
        self.map(self.nested, gpa, spa, 12, f"table {gpa:#x}")
        return gpa

    def walk(self, **changes: Any) -> Walk:
        return translate(self.paging._replace(**changes), self.memory, self.gva, self.access)

    @property
    def dimensions(self) -> list[Dimension]:
        return [dim for dim in (self.guest, self.nested) if dim is not None]


def entry_flaws(dim: Dimension, name: str) -> list[int]:
    if (dim.mode, name) == ("PAE", "pdpte"):
        return [P, 1 << 3, RESERVED["PAE"], 1 << 9]
    wide = [NX, NX] if dim.width == 8 else []
    return [P, RW, RW, US, US, A, D, A | D, RW | US, 1 << 9, RESERVED[dim.mode], *wide]


@st.composite
def tables(
    draw: st.DrawFn, guest: tuple[str | None, ...] = (*MODES, None), nested: tuple[str | None, ...] = (*MODES, None)
) -> Tables:
    """In one of the modes `guest` and `nested`; None is a dimension that is not there."""
    guest_mode = draw(st.sampled_from(guest))
    nested_mode = draw(st.sampled_from(nested if guest_mode else [mode for mode in nested if mode]))
    nxe = draw(st.booleans()), draw(st.booleans())
    wp, smep, smap, ac = (draw(st.booleans()) for _ in range(4))
    long = guest_mode in ("4-level", "5-level")
    gva = draw(st.integers(0, (1 << 47) - 1 if long else (1 << 32) - 1))
    guest_shift = draw(st.sampled_from(SHIFTS[guest_mode])) if guest_mode else 12
    nested_shift = draw(st.sampled_from(SHIFTS[nested_mode])) if nested_mode else 12
    fmt = table_format(guest_mode, nxe[0]) if guest_mode else None
    nested_fmt = table_format(nested_mode, nxe[1]) if nested_mode else None
    paging = Space(nested=False).paging(wp=wp, smep=smep, smap=smap, ac=ac)._replace(guest=fmt, nested=nested_fmt)
    access = draw(st.sampled_from(ALL_ACCESSES))
    out = Tables(Sparse(), paging, None, None, gva, access, (guest_shift, nested_shift))
    if nested_mode and nested_fmt:
        out.nested = Dimension(nested_mode, nested_fmt, out.page(), 1 << nested_fmt.entry_shift)
        out.paging = out.paging._replace(ncr3=out.nested.root)
    gpa = gva
    if guest_mode and fmt:
        out.guest = Dimension(guest_mode, fmt, 0, 1 << fmt.entry_shift)
        out.guest.root = out.table(out.guest)
        out.paging = out.paging._replace(gcr3=out.guest.root)
        # clear of the tables' own gPAs; of 32 bits, so that any nested table can map it
        frame = (draw(st.integers(0, (1 << 30) - 1)) | 1 << 31) >> guest_shift << guest_shift
        out.map(out.guest, gva, frame, guest_shift, "guest")
        gpa = frame | gva & (1 << guest_shift) - 1
    if out.nested:
        width = 32 if nested_mode == "32-bit" else CPU
        spa = draw(st.integers(0, (1 << width) - 1)) >> nested_shift << nested_shift
        out.map(out.nested, gpa, spa, nested_shift, "nested")
    way = [(dim, at) for dim in out.dimensions for at in dim.entries]
    for dim, at in draw(st.lists(st.sampled_from(way), max_size=3)):
        out.flip(dim, at, draw(st.sampled_from(entry_flaws(dim, dim.entries[at]))))
    return out


def fine(walk: Walk) -> bool:
    return isinstance(walk.outcome, Reached)


@given(tables(), st.data())
def test_more_rights_never_hurt(case: Tables, data: st.DataObject) -> None:
    """No success turns into a fault by R/W or U/S that is set, or NX that is cleared, in either dimension. But a
    page that becomes a user page is taken from supervisors by SMEP and SMAP (5.6.5, 5.6.6)."""
    assume(fine(case.walk()))
    dim, at = data.draw(st.sampled_from([(dim, at) for dim in case.dimensions for at in dim.rights]))
    bits = data.draw(st.sampled_from([RW, US, RW | US]))
    if bits & US and dim is case.guest and not case.access.user:
        assume(not case.paging.smep and not case.paging.smap)
    entry = case.get(at, dim.width)
    case.put(at, (entry | bits) & ~(NX if dim.width == 8 else 0), dim.width)
    assert fine(case.walk())


@given(tables())
def test_accessed_and_dirty_bits_are_never_read(case: Tables) -> None:
    before = case.walk()
    for flip in (A, D, A | D):
        other = replace(case, memory=Sparse(case.memory))
        for dim in case.dimensions:
            for at in dim.rights:
                other.flip(dim, at, flip)
        walk = other.walk()
        assert (walk.outcome, walk.rule, walk.updates) == (before.outcome, before.rule, before.updates)


@given(tables())
def test_a_second_access_changes_nothing(case: Tables) -> None:
    first = case.walk()
    write_back(case.memory, first.updates)
    memory = dict(case.memory)
    second = case.walk()
    assert (second.outcome, second.rule, second.updates) == (first.outcome, first.rule, first.updates)
    assert write_back(case.memory, second.updates) == {} and case.memory == memory


@given(tables())
def test_nothing_but_the_trail_is_read_or_written(case: Tables) -> None:
    reads = Reads(case.memory)
    walk = translate(case.paging, reads, case.gva, case.access)
    trail = [step[3] for step in walk.trail]
    assert reads.read == [at >> 3 for at in trail]
    assert {at for at, _, _ in walk.updates} <= set(trail)
    before = dict(case.memory)
    write_back(case.memory, walk.updates)
    for index, word in case.memory.items():
        here = [at for at in trail if at >> 3 == index]
        allowed = sum({(A | D) << (at & 4) * 8 for at in here}) if here else 0
        assert (word ^ before.get(index, 0)) & ~allowed == 0


@given(tables(), st.integers(0, (1 << 64) - 1))
def test_what_is_elsewhere_does_not_matter(case: Tables, garbage: int) -> None:
    walk = case.walk()

    class Elsewhere(Sparse):
        def __missing__(self, index: int) -> int:
            return garbage

    on_the_way = {at >> 3 for _, _, _, at, _ in walk.trail}
    memory = Elsewhere({index: word for index, word in case.memory.items() if index in on_the_way})
    for index in on_the_way:
        memory.setdefault(index, 0)
    assert translate(case.paging, memory, case.gva, case.access) == walk


@given(tables())
def test_the_order_of_the_dimensions(case: Tables) -> None:
    """15.25.5: the nested walk of each guest entry's gPA stands right before it, that of the page at the end; each
    from the root down. A walk is a beginning of the longest one that there can be, but for what a large page
    leaves out."""
    walk = case.walk()
    found = [(dimension, level, what) for dimension, level, what, _, _ in walk.trail]
    guest = [level.name for level in case.guest.fmt.levels] if case.guest else []
    nested = [level.name for level in case.nested.fmt.levels] if case.nested else []
    for purpose in (*guest, "final"):
        for level in nested:
            if found and found[0] == ("nested", level, purpose):
                found.pop(0)
        if found and found[0] == ("guest", purpose, ""):
            found.pop(0)
    assert not found
    if fine(walk) and case.nested:
        assert walk.trail[-1][2] == "final"


@given(tables())
def test_codes_fit_the_access(case: Tables) -> None:
    walk, access = case.walk(), case.access
    wrote, user = 2 if access.write else 0, 4 if access.user else 0
    match walk.outcome:
        case PageFault(code, address):
            assert address == case.gva and code & 6 == wrote | user and not code & ~0x1F
            assert walk.trail[-1][0] == "guest"
            fetch = code & 0x10
            assert not fetch or access.fetch
        case NestedPageFault(code, address) if code >> 32 == 1:
            assert code & 6 == wrote | 4 and not code & 0xFFFF_FFE0
            assert address & 0xFFF == case.gva & 0xFFF
            fetch = code & 0x10
            assert not fetch or access.fetch
        case NestedPageFault(code, address):
            assert code >> 32 == 2 and code & 0xFFFF_FFFF in (6, 7, 0xF)
            assert case.guest and address % case.guest.width == 0
        case GeneralProtection():
            assert not walk.trail
    if not isinstance(walk.outcome, Reached) and walk.trail:
        assert bool(walk.trail[-1][4] & P) == bool(walk.outcome.error_code & 1)


@given(tables(MODES, (None,)), st.sampled_from(MODES))
def test_one_dimension_is_two_under_identity(case: Tables, mode: str) -> None:
    alone = case.walk()
    if isinstance(alone.outcome, Reached):
        assume(alone.outcome.spa < 1 << 32)  # what a nested table of any mode can map
    fmt = table_format(mode, True)
    both = replace(case, memory=Sparse(case.memory), nested=Dimension(mode, fmt, 0x7000_0000, 1 << fmt.entry_shift),
                   next=0x7000_1000, where={})
    assert both.nested is not None
    pages = {step[3] & ~0xFFF for step in alone.trail}
    if isinstance(alone.outcome, Reached):
        pages.add(alone.outcome.spa & ~0xFFF)
    for page in pages:
        both.map(both.nested, page, page, 12, "identity")
    walk = both.walk(nested=fmt, ncr3=both.nested.root)
    assert (walk.outcome, walk.rule) == (alone.outcome, alone.rule)
    assert [step for step in walk.trail if step[0] == "guest"] == alone.trail
    own = {step[3] for step in alone.trail}
    assert [update for update in walk.updates if update[0] in own] == alone.updates


@given(tables(), st.booleans())
def test_a_large_page_is_a_table_of_small_ones(case: Tables, in_guest: bool) -> None:
    dim, shift = (case.guest, case.shifts[0]) if in_guest else (case.nested, case.shifts[1])
    assume(dim is not None and shift > 12)
    assert dim is not None
    at = case.leaves["guest" if in_guest else "nested"]
    leaf = case.get(at, dim.width)
    assume(not leaf & (1 << shift) - 1 & BASE and not leaf & 1 << 50 and not (dim.width == 4 and leaf & 1 << 21))
    before = case.walk()
    below = {30: 21, 22: 12, 21: 12}[shift]
    table = case.table(dim)
    spa = case.where.get(table, table)
    for index in range(1 << shift - below):
        small = leaf & ~PS | index << below | (PS if below > 12 else 0)
        case.put(spa + index * dim.width, small, dim.width)
    nx = leaf & NX if dim.width == 8 else 0
    case.put(at, table | P | RW | US | nx if leaf & P else leaf & ~BASE | table, dim.width)
    after = case.walk()
    assert (after.outcome, after.rule) == (before.outcome, before.rule)


@pytest.mark.parametrize("guest", [*MODES, None])
@pytest.mark.parametrize("nested", [*MODES, None])
def test_random_tables_lead_everywhere(guest: str | None, nested: str | None) -> None:
    """In every pair of modes: to the page, and to a fault of each dimension that there is."""
    if not guest and not nested:
        return
    search = settings(max_examples=2000, phases=[Phase.generate], deadline=None)
    for rule in ["reached", *(["guest."] if guest else []), *(["nested."] if nested else [])]:
        find(tables((guest,), (nested,)), partial(_ends_by, rule), settings=search)


def _ends_by(rule: str, case: Tables) -> bool:
    return case.walk().rule.startswith(rule)
