"""The one-dimensional walk: translation, permissions and #PF error codes (chapter 5 and section 8.4.2)."""

from __future__ import annotations

import pytest

from harness.model.access import Access, GeneralProtection, PageFault, Reached
from harness.model.walk import GUEST
from tests.model.tables import (
    ALL_ACCESSES,
    FETCH,
    GVA,
    LEVELS,
    NX,
    READ,
    RW,
    TOP_DOWN,
    US,
    USER,
    USER_FETCH,
    USER_READ,
    USER_WRITE,
    WRITE,
    A,
    D,
    E,
    P,
    Space,
)

FRAME_OF = 0x20_0000


def _space(shift: int = 12, bits: int = USER) -> tuple[Space, dict[str, int]]:
    space = Space(nested=False)
    return space, space.map_guest(GVA, FRAME_OF if shift < 30 else 0, shift, bits)


@pytest.mark.parametrize(("shift", "spa"), [(12, 0x20_0ABC), (21, 0x3E_6ABC), (30, 0x1D7E_6ABC)])
def test_address(shift: int, spa: int) -> None:
    """5.3.3 to 5.3.5: the index of each level is nine bits; the page's offset is the rest."""
    space, entries = _space(shift)
    walk = space.walk(GVA | 0xABC)
    assert walk.outcome == Reached(spa, spa)
    assert walk.rule == "reached"
    assert [(s.dimension, s.level, s.address) for s in walk.steps] == [
        (GUEST, level, entries[level]) for level in LEVELS[shift]
    ]


def test_indices_by_hand() -> None:
    """Bits 47:39, 38:30, 29:21, 20:12 of 3C5A9D7E6000h are 120, 362, 235 and 486."""
    _, entries = _space()
    assert [entries[level] >> 3 & 0x1FF for level in TOP_DOWN] == [120, 362, 235, 486]


@pytest.mark.parametrize("level", TOP_DOWN)
@pytest.mark.parametrize(
    ("access", "code"),
    [(READ, 0), (WRITE, E.W), (FETCH, E.ID), (USER_READ, E.U), (USER_WRITE, E.W | E.U), (USER_FETCH, E.U | E.ID)],
)
def test_not_present(level: str, access: Access, code: int) -> None:
    """8.4.2: P is 0; W, U and I/D say what was tried."""
    space, entries = _space()
    space.set(entries[level], 0xFFFF_FFFF_FFFF_FFFE)  # nothing else in the entry is looked at (5.4.1)
    walk = space.walk(GVA + 5, access)
    assert walk.outcome == PageFault(code, GVA + 5)
    assert walk.rule == "guest.present"
    assert walk.steps[-1].address == entries[level] and len(walk.steps) == TOP_DOWN.index(level) + 1


@pytest.mark.parametrize(("shift", "level"), [(s, level) for s, levels in LEVELS.items() for level in levels])
class TestRights:
    """5.6: R/W and U/S are the AND over all levels, NX the OR; 5.8."""

    def test_supervisor_page(self, shift: int, level: str) -> None:
        space, entries = _space(shift)
        space.change(entries[level], clear=US)
        for access in ALL_ACCESSES:
            outcome = space.walk(GVA, access).outcome
            if access.user:
                code = E.P | E.U | (E.W if access.write else 0) | (E.ID if access.fetch else 0)
                assert outcome == PageFault(code, GVA)
            else:
                assert isinstance(outcome, Reached)

    def test_read_only(self, shift: int, level: str) -> None:
        """5.6.4: with CR0.WP=0 the supervisor writes to any page; users never to a read-only one."""
        space, entries = _space(shift)
        space.change(entries[level], clear=RW)
        for wp in (True, False):
            paging = space.paging(wp=wp)
            assert space.walk(GVA, USER_WRITE, paging).outcome == PageFault(E.P | E.W | E.U, GVA)
            supervisor = space.walk(GVA, WRITE, paging).outcome
            assert supervisor == PageFault(E.P | E.W, GVA) if wp else isinstance(supervisor, Reached)
            for access in (READ, FETCH, USER_READ, USER_FETCH):
                assert isinstance(space.walk(GVA, access, paging).outcome, Reached)

    def test_no_execute(self, shift: int, level: str) -> None:
        space, entries = _space(shift)
        space.change(entries[level], set=NX)
        assert space.walk(GVA, FETCH).outcome == PageFault(E.P | E.ID, GVA)
        assert space.walk(GVA, USER_FETCH).outcome == PageFault(E.P | E.U | E.ID, GVA)
        for access in (READ, WRITE, USER_READ, USER_WRITE):
            assert isinstance(space.walk(GVA, access).outcome, Reached)

    def test_no_execute_is_reserved_without_nxe(self, shift: int, level: str) -> None:
        """5.4.1; and a fetch is not reported as one without NXE and SMEP (8.4.2)."""
        space, entries = _space(shift)
        space.change(entries[level], set=NX)
        space.guest_nxe = False
        assert space.walk(GVA, READ).outcome == PageFault(E.P | E.RSVD, GVA)
        assert space.walk(GVA, FETCH).outcome == PageFault(E.P | E.RSVD, GVA)
        assert space.walk(GVA, FETCH, space.paging(smep=True)).outcome == PageFault(E.P | E.RSVD | E.ID, GVA)

    def test_smep(self, shift: int, level: str) -> None:
        """5.6.5: no fetch from a user page at CPL 0-2, whatever NX; from a supervisor page it may."""
        space, entries = _space(shift)
        paging = space.paging(smep=True)
        walk = space.walk(GVA, FETCH, paging)
        assert (walk.outcome, walk.rule) == (PageFault(E.P | E.ID, GVA), "guest.smep")
        assert isinstance(space.walk(GVA, USER_FETCH, paging).outcome, Reached)
        assert isinstance(space.walk(GVA, READ, paging).outcome, Reached)
        space.change(entries[level], clear=US)  # one level is enough to make it a supervisor page
        assert isinstance(space.walk(GVA, FETCH, paging).outcome, Reached)

    def test_smap(self, shift: int, level: str) -> None:
        """5.6.6: no data access to a user page at CPL 0-2 while RFLAGS.AC is 0; fetches are not affected."""
        space, entries = _space(shift)
        paging = space.paging(smap=True)
        for access, code in ((READ, E.P), (WRITE, E.P | E.W)):
            walk = space.walk(GVA, access, paging)
            assert (walk.outcome, walk.rule) == (PageFault(code, GVA), "guest.smap")
            assert isinstance(space.walk(GVA, access, space.paging(smap=True, ac=True)).outcome, Reached)
        for access in (FETCH, USER_READ, USER_WRITE, USER_FETCH):
            assert isinstance(space.walk(GVA, access, paging).outcome, Reached)
        space.change(entries[level], clear=US)
        assert isinstance(space.walk(GVA, READ, paging).outcome, Reached)


@pytest.mark.parametrize(
    ("nxe", "smep", "reported"), [(True, False, True), (False, True, True), (True, True, True), (False, False, False)]
)
def test_when_a_fetch_is_reported(nxe: bool, smep: bool, reported: bool) -> None:
    """8.4.2: I/D is defined with EFER.NXE and CR4.PAE; processors with SMEP set it for CR4.SMEP too."""
    space, entries = _space()
    space.guest_nxe = nxe
    space.set(entries["pte"], 0)
    outcome = space.walk(GVA, FETCH, space.paging(smep=smep)).outcome
    assert outcome == PageFault(E.ID if reported else 0, GVA)


def test_permission_is_judged_behind_the_leaf() -> None:
    """15.25.6, steps 2 and 3: what is not present or reserved further down comes before any right."""
    space, entries = _space()
    space.change(entries["pml4e"], set=NX, clear=RW | US)
    space.change(entries["pte"], clear=P)
    assert space.walk(GVA, USER_WRITE).outcome == PageFault(E.W | E.U, GVA)
    space.change(entries["pte"], set=P | 1 << 51)
    assert space.walk(GVA, USER_WRITE).outcome == PageFault(E.P | E.W | E.U | E.RSVD, GVA)
    space.change(entries["pml4e"], set=1 << 51)
    assert len(space.walk(GVA, USER_WRITE).steps) == 1


@pytest.mark.parametrize("gva", [0x0000_7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0, 0xFFFF_FFFF_FFFF_F000])
def test_canonical(gva: int) -> None:
    """5.3.1: bits 63:47 all alike."""
    space = Space(nested=False)
    space.map_guest(gva, 0x5000)
    assert space.walk(gva | 7).outcome == Reached(0x5007, 0x5007)


@pytest.mark.parametrize(
    "gva",
    [0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63, 1 << 48, 0x7FFF_8000_0000_0000, 0x8000_7FFF_FFFF_FFFF],
)
def test_not_canonical(gva: int) -> None:
    """5.3.1: #GP(0), before any entry is read."""
    space = Space(nested=False)
    space.map_guest(gva, 0x5000)
    walk = space.walk(gva, USER_WRITE)
    assert (walk.outcome, walk.rule, walk.trail, walk.updates) == (GeneralProtection(0), "canonical", [], [])


def test_ignored_bits_do_nothing() -> None:
    """5.4.1: available bits, PWT, PCD, D of an entry that is no leaf; CR3's low bits (5.3.2)."""
    space, entries = _space()
    for level in TOP_DOWN:
        ignored = 0x7FF0_0000_0000_0E18 | D | A | (0x100 if level != "pml4e" else 0)
        space.change(entries[level], set=ignored)
    assert space.walk(GVA, USER_WRITE).outcome == Reached(FRAME_OF, FRAME_OF)
    paging = space.paging()._replace(gcr3=space.gcr3 | 0xFFF)
    assert space.walk(GVA, USER_WRITE, paging).outcome == Reached(FRAME_OF, FRAME_OF)


def test_a_table_beyond_memory() -> None:
    space, entries = _space()
    space.change(entries["pde"], set=1 << 46)
    with pytest.raises(IndexError):
        space.walk(GVA)
