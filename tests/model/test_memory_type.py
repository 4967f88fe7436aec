"""Memory types: every cell of tables 7-9, 7-10, 7-11, 15-19 and 15-20, and which bits of a walk choose."""

from __future__ import annotations

from typing import Final

import pytest

from harness.model.access import Reached
from harness.model.entries import PAT_4K, PAT_LARGE, PCD, PWT, RW, US, P
from harness.model.memory_type import (
    MTRR_TYPES,
    Caching,
    combine,
    effective,
    index_of_page,
    index_of_table,
    of_index,
    of_walk,
    with_mtrr,
)
from harness.model.registers import CR0
from harness.model.vmrun import Host, caching, load
from tests.model.tables import GVA, Space
from tests.model.test_vmrun import HOST, vmcb

RESET: Final = 0x0007_0406_0007_0406
"""PAT after reset (table 7-10)."""
EACH: Final = 0x0000_0706_0504_0100
"""Fields 0 to 5: UC, WC, WT, WP, WB, UC-."""
OF_EACH: Final = ("UC", "WC", "WT", "WP", "WB", "UC-")
EACH_BACKWARDS: Final = 0x0000_0001_0405_0607
GPA: Final = 1 << 39 | 7 << 30 | 0x45_6000
SPA: Final = 0x65_4000


@pytest.mark.parametrize(("code", "name"), [(0, "UC"), (1, "WC"), (4, "WT"), (5, "WP"), (6, "WB"), (7, "UC-")])
@pytest.mark.parametrize("field", range(8))
def test_encodings(code: int, name: str, field: int) -> None:
    """Table 7-9; 2, 3 and what has a reserved bit set are none."""
    assert of_index(code << 8 * field, field) == name
    for bad in (2, 3, 8 | code, 0x80 | code):
        with pytest.raises(KeyError):
            of_index(bad << 8 * field, field)


@pytest.mark.parametrize(("pat", "pcd", "pwt", "name"), [
    (0, 0, 0, "WB"), (0, 0, 1, "WT"), (0, 1, 0, "UC-"), (0, 1, 1, "UC"),
    (1, 0, 0, "WB"), (1, 0, 1, "WT"), (1, 1, 0, "UC-"), (1, 1, 1, "UC"),
])
def test_indexing(pat: int, pcd: int, pwt: int, name: str) -> None:
    """Table 7-10, with the reset value of PAT; the PAT bit is 7 in a PTE and 12 in larger pages' entries."""
    wanted = 4 * pat + 2 * pcd + pwt
    low = P | RW | US | (PCD if pcd else 0) | (PWT if pwt else 0)
    for shift, bit, other in ((12, PAT_4K, PAT_LARGE), (21, PAT_LARGE, PAT_4K), (22, PAT_LARGE, PAT_4K),
                              (30, PAT_LARGE, PAT_4K)):
        assert index_of_page(low | (bit if pat else 0) | other, shift) == wanted
    assert index_of_table(low | PAT_4K | PAT_LARGE) == wanted & 3
    assert of_index(RESET, wanted) == name


@pytest.mark.parametrize(("guest", "row"), [
    # host:  UC     UC-     WC     WP      WT      WB
    ("UC", ("UC", "UC", "UC", "UC", "UC", "UC")),
    ("UC-", ("UC", "UC-", "WC", "UC", "UC", "UC")),
    ("WC", ("WC", "WC", "WC", "WC+", "WC+", "WC+")),
    ("WP", ("UC", "UC", "UC", "WP", "UC", "WP")),
    ("WT", ("UC", "UC", "UC", "UC", "WT", "WT")),
    ("WB", ("UC", "UC", "WC", "WP", "WT", "WB")),
])
def test_table_15_19(guest: str, row: tuple[str, ...]) -> None:
    assert tuple(combine(guest, host) for host in ("UC", "UC-", "WC", "WP", "WT", "WB")) == row


@pytest.mark.parametrize(("pat", "row"), [
    # MTRR: UC    WC    WP     WT     WB
    ("UC", ("UC", "CD", "CD", "CD", "CD")),
    ("UC-", ("UC", "WC", "CD", "CD", "CD")),
    ("WC", ("WC", "WC", "WC", "WC", "WC")),
    ("WC+", ("WC", "WC", "WC+", "WC+", "WC+")),
    ("WP", ("UC", "CD", "WP", "CD", "WP")),
    ("WT", ("UC", "CD", "CD", "WT", "WT")),
    ("WB", ("UC", "WC", "WP", "WT", "WB")),
])
def test_table_15_20(pat: str, row: tuple[str, ...]) -> None:
    """Rows without WC+ are table 7-11."""
    assert tuple(with_mtrr(pat, mtrr) for mtrr in MTRR_TYPES) == row
    assert MTRR_TYPES == ("UC", "WC", "WP", "WT", "WB")


@pytest.mark.parametrize(("pcd", "pwt", "row"), [
    # table 7-8, by MTRR type UC, WC, WP, WT, WB; UC stands for any type that is not cached
    (0, 0, ("UC", "WC", "WP", "WT", "WB")),
    (0, 1, ("UC", "CD", "CD", "WT", "WT")),
    (1, 0, ("UC", "WC", "CD", "CD", "CD")),
    (1, 1, ("UC", "CD", "CD", "CD", "CD")),
])
def test_unmodified_pat(pcd: int, pwt: int, row: tuple[str, ...]) -> None:
    """The reset value of PAT through tables 7-10 and 7-11."""
    pat = of_index(RESET, 2 * pcd + pwt)
    assert tuple(with_mtrr(pat, mtrr) for mtrr in MTRR_TYPES) == row


@pytest.mark.parametrize("mtrr", MTRR_TYPES)
@pytest.mark.parametrize("pat", ["UC", "UC-", "WC", "WC+", "WP", "WT", "WB"])
def test_caches_disabled(pat: str, mtrr: str) -> None:
    """7.4: what is cacheable becomes CD, what is not stays."""
    before = effective(pat, Caching(0, 0, False, mtrr))
    after = effective(pat, Caching(0, 0, True, mtrr))
    assert before == with_mtrr(pat, mtrr)
    assert after == ("CD" if before in ("WP", "WT", "WB") else before)


class TestWalk:
    """Which bits choose the type of which reference (7.8.2, 7.8.4, 15.25.8), over real walks."""

    def _types(
        self, *changes: tuple[str, str, int], gcr3: int = 0, ncr3: int = 0, caching: Caching | None = None,
    ) -> dict[str, str]:
        """Types by step, `guest pte` or `pte for final`, and by `page`: those that are not WB. `changes` are
        bits to set in the entry of a level and a purpose, which is `guest` for the guest's own."""
        space = Space()
        space.map_guest(GVA, GPA)
        space.map_nested(GPA, SPA)
        for step in space.walk(GVA).steps:
            for level, purpose, bits in changes:
                if (step.level, step.purpose or "guest") == (level, purpose):
                    space.change(step.address, set=bits)
        paging = space.paging()
        paging = paging._replace(gcr3=paging.gcr3 | gcr3, ncr3=paging.ncr3 | ncr3)
        walk = space.walk(GVA, paging=paging)
        assert isinstance(walk.outcome, Reached)
        found = of_walk(paging, caching or Caching(RESET, RESET, False), walk)
        names = [f"{s.level} for {s.purpose}" if s.purpose else f"guest {s.level}" for s in walk.steps]
        return {name: one for name, one in zip((*names, "page"), found, strict=True) if one != "WB"}

    def test_plain(self) -> None:
        assert self._types() == {}

    @pytest.mark.parametrize(("level", "below"), [
        ("pml4e", "guest pdpte"), ("pdpte", "guest pde"), ("pde", "guest pte"), ("pte", "page"),
    ])
    def test_guest_entries(self, level: str, below: str) -> None:
        """PWT of an entry is for what it points to (7.8.4)."""
        assert self._types((level, "guest", PWT)) == {below: "WT"}

    @pytest.mark.parametrize(("level", "below"), [("pml4e", "pdpte for final"), ("pdpte", "pde for final"),
                                                  ("pde", "pte for final"), ("pte", "page")])
    def test_nested_entries(self, level: str, below: str) -> None:
        assert self._types((level, "final", PWT)) == {below: "WT"}

    @pytest.mark.parametrize("table", ["pml4e", "pdpte", "pde", "pte"])
    def test_a_guest_table_has_the_type_of_its_nested_leaf(self, table: str) -> None:
        assert self._types(("pte", table, PWT)) == {f"guest {table}": "WT"}

    def test_roots(self) -> None:
        assert self._types(gcr3=PWT) == {"guest pml4e": "WT"}
        assert self._types(ncr3=PWT) == {
            f"pml4e for {purpose}": "WT" for purpose in ("pml4e", "pdpte", "pde", "pte", "final")
        }

    @pytest.mark.parametrize("guest", [0, PWT, PCD, PCD | PWT, PAT_4K, PAT_4K | PWT])
    @pytest.mark.parametrize("nested", [0, PWT, PCD, PCD | PWT, PAT_4K, PAT_4K | PWT])
    def test_both_leaves(self, guest: int, nested: int) -> None:
        """Each from the PAT of its own dimension; PAT fields 0 to 5 have all six types, in two orders."""
        mine, theirs = Caching(EACH, EACH_BACKWARDS, False), {0: 0, PWT: 1, PCD: 2, PCD | PWT: 3, PAT_4K: 4,
                                                              PAT_4K | PWT: 5}
        found = self._types(("pte", "guest", guest), ("pte", "final", nested), caching=mine).get("page", "WB")
        combined = combine(OF_EACH[theirs[guest]], OF_EACH[5 - theirs[nested]])
        assert found == with_mtrr(combined, "WB")

    def test_mtrr(self) -> None:
        assert set(self._types(caching=Caching(RESET, RESET, False, "UC")).values()) == {"UC"}

    def test_large_pages(self) -> None:
        """The PAT bit of each page's own size; bit 7 of such an entry is PS."""
        for shift in (21, 30):
            space = Space()
            entries = space.map_guest(GVA, GPA, shift)
            space.map_nested(GPA >> shift << shift | GVA & (1 << shift) - 1 & ~0xFFF, SPA)
            wp_at_4 = Caching(RESET & ~(0xFF << 32) | 5 << 32, RESET, False)
            leaf = entries["pde" if shift == 21 else "pdpte"]
            for bits, wanted in ((0, "WB"), (PAT_LARGE, "WP")):
                space.change(leaf, set=bits)
                assert of_walk(space.paging(), wp_at_4, space.walk(GVA))[-1] == wanted

    def test_no_nested_paging(self) -> None:
        space = Space(nested=False)
        leaf = space.map_guest(GVA, SPA)["pte"]
        space.change(leaf, set=PCD)
        found = of_walk(space.paging(), Caching(0x0007_0406_0001_0406, RESET, False), space.walk(GVA))
        assert found == ("WB",) * 4 + ("WC",)

    def test_paging_off(self) -> None:
        """L2 has no PAT bits then: the nested type alone counts."""
        space = Space()
        leaf = space.map_nested(GPA, SPA)["pte"]
        space.change(leaf, set=PWT)
        paging = space.paging()._replace(guest=None)
        assert of_walk(paging, Caching(0, RESET, False), space.walk(GPA, paging=paging))[-1] == "WT"

    def test_a_walk_that_faults_reaches_no_page(self) -> None:
        space = Space()
        space.map_guest(GVA, GPA)
        walk = space.walk(GVA)
        assert len(of_walk(space.paging(), Caching(RESET, RESET, False), walk)) == len(walk.trail)


class TestCaching:
    """What of L1 and of L2 counts (15.25.2, 15.25.8)."""

    def _caching(self, np_control: int, guest_cd: int, host_cd: int) -> Caching:
        block = vmcb(np_control=np_control, g_pat=EACH, cr0=CR0.PG | CR0.PE | guest_cd)
        host = Host(HOST.cr0 | host_cd, HOST.cr4, HOST.efer, RESET, 0)
        return caching(load(block, host), block, host)

    @pytest.mark.parametrize("guest_cd", [0, CR0.CD])
    @pytest.mark.parametrize("host_cd", [0, CR0.CD])
    def test_cd(self, guest_cd: int, host_cd: int) -> None:
        assert self._caching(1, guest_cd, host_cd) == (EACH, RESET, bool(guest_cd or host_cd), "WB")
        assert self._caching(0, guest_cd, host_cd) == (RESET, RESET, bool(guest_cd), "WB")
