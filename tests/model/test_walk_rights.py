"""Rights beyond R/W, U/S and NX: protection keys, implicit references, shadow stacks, GMET, SSS."""

from __future__ import annotations

import pytest

from harness.model.access import Access, Reached, StackFault
from harness.model.entries import NX, RW, US, D, P
from harness.model.walk import FINAL, Walk, translate
from tests.model.tables import GVA, E, Space

GPA = 7 << 30 | 0x1234000
KEY_5 = 5 << 59
READ, WRITE, FETCH = Access(), Access(write=True), Access(fetch=True)
USER_READ, USER_WRITE, USER_FETCH = (a._replace(user=True) for a in (READ, WRITE, FETCH))
SHADOW_READ, SHADOW_WRITE = (a._replace(shadow_stack=True) for a in (READ, WRITE))


def walk(space: Space, access: Access, gva: int = GVA, **paging: object) -> Walk:
    """`access` with fields of Paging as given."""
    return translate(space.paging()._replace(**paging), space.memory.words, gva, access)  # type: ignore[arg-type]


def code(found: Walk) -> int | None:
    """The error code; None if the access went through."""
    return None if isinstance(found.outcome, Reached) else found.outcome.error_code


def user_page() -> tuple[Space, dict[str, int]]:
    """A page of all rights at GVA, and the sPAs of its entries in L2's tables."""
    space = Space()
    space.map_nested(GPA, 0x5000)
    return space, space.map_guest(GVA, GPA)


def nested_leaf(space: Space) -> dict[str, int]:
    """The sPAs of the nested entries of that page."""
    return {step.level: step.address for step in walk(space, READ).steps if step.purpose == FINAL}


class TestKeys:
    """Section 5.6.7."""

    @pytest.mark.parametrize(
        ("pkru", "access", "wp", "expected"),
        [
            (1 << 10, READ, True, E.P | E.PK),
            (1 << 10, WRITE, False, E.P | E.PK | E.W),
            (1 << 10, USER_READ, True, E.P | E.PK | E.U),
            (1 << 10, FETCH, True, None),
            (1 << 10, USER_FETCH, True, None),
            (1 << 11, READ, True, None),
            (1 << 11, WRITE, True, E.P | E.PK | E.W),
            (1 << 11, WRITE, False, None),
            (1 << 11, USER_WRITE, False, E.P | E.PK | E.W | E.U),
            (0xFFFF_F3FF, USER_WRITE, True, None),
        ],
    )
    def test_of_a_user_page(self, pkru: int, access: Access, wp: bool, expected: int | None) -> None:
        space, entries = user_page()
        space.change(entries["pte"], set=KEY_5)
        found = walk(space, access, pkru=pkru, wp=wp)
        assert (code(found), found.rule) == (expected, "guest.key" if expected else "reached")

    @pytest.mark.parametrize("level", ["pml4e", "pdpte", "pde", "pte"])
    def test_a_supervisor_page_has_none(self, level: str) -> None:
        space, entries = user_page()
        space.change(entries["pte"], set=KEY_5)
        space.change(entries[level], clear=US)
        assert code(walk(space, READ, pkru=0xFFFF_FFFF)) is None
        assert code(walk(space, USER_READ, pkru=0xFFFF_FFFF)) == E.P | E.U

    def test_reported_beside_another_reason(self) -> None:
        space, entries = user_page()
        space.change(entries["pte"], set=KEY_5, clear=RW)
        found = walk(space, USER_WRITE, pkru=1 << 11)
        assert (found.rule, code(found)) == ("guest.write", E.P | E.W | E.U | E.PK)

    def test_no_bit_of_a_table_entry_or_of_the_nested_dimension_is_a_key(self) -> None:
        space, entries = user_page()
        for level in ("pml4e", "pdpte", "pde"):
            space.change(entries[level], set=KEY_5)
        assert code(walk(space, WRITE, pkru=0xFFFF_FFFC)) is None


def test_implicit_references_obey_smap_whatever_ac() -> None:
    """Section 5.6.6."""
    space, _ = user_page()
    for ac in (False, True):
        assert code(walk(space, Access(implicit=True), smap=True, ac=ac)) == E.P
    assert code(walk(space, READ, smap=True, ac=True)) is None


def test_the_stack_segment_has_a_fault_of_its_own() -> None:
    """Section 8.2.13."""
    space, _ = user_page()
    found = walk(space, Access(stack=True), gva=1 << 47)
    assert (found.outcome, found.rule, found.trail) == (StackFault(), "canonical.stack", [])
    assert str(found.outcome) == "#SS 0x0"


class TestShadowStacks:
    """Section 18.3: the leaf has R/W=0 and D=1, all above it R/W=1, and the privilege is the access's own."""

    @pytest.mark.parametrize("access", [SHADOW_READ, SHADOW_WRITE])
    @pytest.mark.parametrize("user", [False, True])
    def test_its_own(self, access: Access, user: bool) -> None:
        space, entries = user_page()
        space.change(entries["pte"], set=D, clear=RW | (0 if user else US))
        wrote = E.W if access.write else 0
        assert code(walk(space, access._replace(user=user))) is None
        other = walk(space, access._replace(user=not user))
        assert (other.rule, code(other)) == ("guest.shadow-stack", E.P | E.SS | wrote | (0 if user else E.U))

    @pytest.mark.parametrize(("bits", "cleared", "level"), [(0, RW, "pte"), (D, 0, "pte"), (0, RW, "pde")])
    def test_any_other_page(self, bits: int, cleared: int, level: str) -> None:
        space, entries = user_page()
        space.change(entries["pte"], set=D, clear=RW) if level != "pte" else None
        space.change(entries[level], set=bits, clear=cleared)
        assert code(walk(space, SHADOW_READ._replace(user=True))) == E.P | E.SS | E.U

    def test_is_read_only_to_others(self) -> None:
        space, entries = user_page()
        space.change(entries["pte"], set=D, clear=RW)
        assert code(walk(space, USER_WRITE)) == E.P | E.W | E.U and code(walk(space, USER_READ)) is None


class TestGmet:
    """Section 15.25.13: a fetch at CPL 0 to 2 needs U/S=0, and nothing else looks at U/S."""

    @pytest.mark.parametrize("us", [US, 0])
    @pytest.mark.parametrize("access", [READ, WRITE, FETCH, USER_READ, USER_WRITE, USER_FETCH])
    def test_user_bit(self, us: int, access: Access) -> None:
        space, _ = user_page()
        space.change(nested_leaf(space)["pte"], clear=US ^ us)
        found = walk(space, access, gmet=True)
        if access == FETCH and us:
            assert (found.rule, code(found)) == ("nested.gmet", E.P | E.ID | E.FINAL)
        else:
            assert code(found) is None

    def test_the_error_code_tells_the_cpl_of_a_fetch_only(self) -> None:
        space, _ = user_page()
        space.change(nested_leaf(space)["pte"], clear=P)
        codes = [code(walk(space, a, gmet=True)) for a in (READ, WRITE, FETCH, USER_FETCH)]
        assert codes == [E.U | E.FINAL, E.U | E.W | E.FINAL, E.ID | E.FINAL, E.U | E.ID | E.FINAL]


class TestSupervisorShadowStackCheck:
    """Section 15.25.14: NX=1 and U/S=0 in the nested leaf, R/W=1 above it; EXITINFO1 bit 37 (15.25.6)."""

    def page(self, set: int = 0, clear: int = 0, level: str = "pte") -> Space:
        """A supervisor's shadow stack of L2, with that change to a nested entry of it."""
        space, entries = user_page()
        nested = nested_leaf(space)
        space.change(entries["pte"], set=D, clear=RW | US)
        space.change(nested[level], set, clear)
        return space

    def test_designated(self) -> None:
        for clear in (US, US | RW):
            space = self.page(NX, clear)
            assert code(walk(space, SHADOW_WRITE, sss=True)) is None
            assert code(walk(space, SHADOW_WRITE)) == E.P | E.W | E.U | E.SS | E.FINAL

    @pytest.mark.parametrize(("set", "clear"), [(0, 0), (0, US), (NX, 0)])
    def test_not_designated(self, set: int, clear: int) -> None:
        found = walk(self.page(set, clear), SHADOW_READ, sss=True)
        assert (found.rule, code(found)) == ("nested.sss", E.P | E.U | E.SS | E.FINAL)

    def test_a_table_above_is_read_only(self) -> None:
        space = self.page(0, RW, "pde")
        space.change(nested_leaf(space)["pte"], NX, US)
        assert code(walk(space, SHADOW_READ, sss=True)) == E.P | E.U | E.SS | E.FINAL | E.SSS

    def test_others_find_a_page_out_of_reach(self) -> None:
        space = self.page(NX, US)
        assert code(walk(space, READ, sss=True)) == E.P | E.U | E.FINAL | E.SSS
        assert code(walk(space, READ)) == E.P | E.U | E.FINAL
