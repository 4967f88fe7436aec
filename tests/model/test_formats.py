"""The other table formats: five levels, PAE, and the 32-bit entries of legacy mode (5.2.2, 5.2.3, 5.3.3)."""

from __future__ import annotations

import pytest

from harness.model.access import Access, GeneralProtection, NestedPageFault, PageFault, Reached
from harness.model.dirty import write_back
from harness.model.entries import Format, legacy, long_mode, pae
from harness.model.memory import Memory
from harness.model.walk import NESTED, Paging, Walk, translate
from tests.model.tables import FETCH, NX, PS, READ, RW, US, USER, USER_WRITE, WRITE, A, D, E, P

ROOT = 0x1000


class Tables:
    """One dimension of any format, in 4 MiB of memory: tables follow each other from 1000h."""

    def __init__(self, fmt: Format, dimension: str = "guest") -> None:
        self.fmt, self.dimension = fmt, dimension
        self.memory = Memory(4 << 20)
        self.width = 1 << fmt.entry_shift
        self.next = ROOT + 0x1000

    def at(self, table: int, address: int, shift: int) -> int:
        return table + (address >> shift & self.fmt.index_mask) * self.width

    def map(self, address: int, frame: int, leaf_shift: int = 12, bits: int = USER) -> dict[str, int]:
        table, entries = ROOT, {}
        for level in self.fmt.levels:
            at = entries[level.name] = self.at(table, address, level.shift)
            if level.shift == leaf_shift:
                self.set(at, frame | bits | (PS if leaf_shift > 12 else 0))
                return entries
            if not self.get(at):
                # 5.2.3: a PDPTE of PAE mode has no rights, and bits that would be them are reserved
                self.set(at, self.next | (P if self.fmt.name == "PAE" and level.name == "pdpte" else USER))
                self.next += 0x1000
            table = self.get(at) & ~0xFFF
        raise AssertionError(leaf_shift)

    def get(self, at: int) -> int:
        return self.memory.read(at, self.width)

    def set(self, at: int, value: int) -> None:
        self.memory.write(at, value, self.width)

    def walk(self, address: int, access: Access = READ) -> Walk:
        one = self.dimension == "guest"
        guest, nested = (self.fmt, None) if one else (None, self.fmt)
        paging = Paging(guest, ROOT, True, False, False, False, True, nested, ROOT)
        return translate(paging, self.memory.words, address, access)

    def faulted(self, address: int, access: Access, code: int) -> PageFault | NestedPageFault:
        """The fault with that code, as the dimension reports it."""
        if self.dimension == "guest":
            return PageFault(code, address)
        return NestedPageFault(code | E.U | E.FINAL, address)


def test_shapes() -> None:
    """Names, index shifts and entry sizes (figures 5-3, 5-9 and 5-17)."""
    shapes = {
        "5-level": [("pml5e", 48), ("pml4e", 39), ("pdpte", 30), ("pde", 21), ("pte", 12)],
        "4-level": [("pml4e", 39), ("pdpte", 30), ("pde", 21), ("pte", 12)],
        "PAE": [("pdpte", 30), ("pde", 21), ("pte", 12)],
        "32-bit": [("pde", 22), ("pte", 12)],
    }
    for fmt in (long_mode(48, True, la57=True), long_mode(48, True), pae(40, True), legacy(40, True)):
        assert [(level.name, level.shift) for level in fmt.levels] == shapes[fmt.name]
        assert fmt.entry_shift == (2 if fmt.name == "32-bit" else 3)


class TestFiveLevels:
    GVA = 0x0052_3C5A_9D7E_6000

    @pytest.mark.parametrize("dimension", ["guest", "nested"])
    def test_walk(self, dimension: str) -> None:
        tables = Tables(long_mode(52, True, la57=True), dimension)
        entries = tables.map(self.GVA, 0x20_0000)
        walk = tables.walk(self.GVA | 0xABC)
        assert isinstance(walk.outcome, Reached) and walk.outcome.spa == 0x20_0ABC
        assert [s.address for s in walk.steps] == list(entries.values()) and len(entries) == 5
        assert [at >> 3 & 0x1FF for at in entries.values()] == [0x52, 120, 362, 235, 486]

    @pytest.mark.parametrize("bit", range(64))
    def test_pml5e_reserved(self, bit: int) -> None:
        """Figure 5-19: MBZ over 8:7, like a PML4E."""
        tables = Tables(long_mode(48, False, la57=True))
        at = tables.map(self.GVA, 0x20_0000)["pml5e"]
        tables.set(at, tables.get(at) | 1 << bit)
        try:
            outcome = tables.walk(self.GVA).outcome
        except IndexError:
            outcome = None  # an address bit, out of this memory
        reserved = bit in {7, 8, 63} or 48 <= bit < 52
        assert (outcome == PageFault(E.P | E.RSVD, self.GVA)) == reserved

    @pytest.mark.parametrize(("gva", "canonical"), [
        (0x00FF_FFFF_FFFF_F000, True), (0xFF00_0000_0000_0000, True), (0x0000_8000_0000_0000, True),
        (0x0100_0000_0000_0000, False), (0xFEFF_FFFF_FFFF_FFFF, False), (1 << 63, False)])
    def test_canonical(self, gva: int, canonical: bool) -> None:
        """5.3.1: with five levels bits 63:56 are all alike."""
        outcome = Tables(long_mode(52, True, la57=True)).walk(gva).outcome
        assert (outcome == GeneralProtection(0)) != canonical


class TestPae:
    GVA = 0xC5A7_E000

    @pytest.mark.parametrize("dimension", ["guest", "nested"])
    @pytest.mark.parametrize(("shift", "frame", "spa"), [(12, 0x20_0000, 0x20_0ABC), (21, 0x20_0000, 0x27_EABC)])
    def test_walk(self, dimension: str, shift: int, frame: int, spa: int) -> None:
        tables = Tables(pae(40, True), dimension)
        entries = tables.map(self.GVA, frame, shift)
        walk = tables.walk(self.GVA | 0xABC, WRITE)
        assert isinstance(walk.outcome, Reached)
        assert walk.outcome.spa == (spa if shift == 12 else frame | (self.GVA | 0xABC) & 0x1F_FFFF)
        assert (entries["pdpte"] - ROOT) >> 3 == 3
        write_back(tables.memory.words, walk.updates)
        assert not tables.get(entries["pdpte"]) & (A | D)  # 5.2.3: a PDPTE has no A
        assert tables.get(entries["pde"]) & (A | D) == (A if shift == 12 else A | D)

    def test_a_pdpte_has_no_rights(self) -> None:
        """5.6.3: U/S and R/W count from the PDE down."""
        tables = Tables(pae(40, True))
        entries = tables.map(self.GVA, 0x20_0000)
        assert tables.get(entries["pdpte"]) & (RW | US) == 0
        assert isinstance(tables.walk(self.GVA, USER_WRITE).outcome, Reached)
        tables.set(entries["pde"], tables.get(entries["pde"]) & ~US)
        assert tables.walk(self.GVA, USER_WRITE).outcome == PageFault(E.P | E.W | E.U, self.GVA)

    @pytest.mark.parametrize("dimension", ["guest", "nested"])
    @pytest.mark.parametrize(("nxe", "maxphyaddr"), [(True, 40), (False, 40), (True, 52)])
    @pytest.mark.parametrize(("kind", "shift", "always"), [
        ("pdpte", 12, {1, 2, 5, 6, 7, 8, 63} | set(range(52, 63))),  # figure 5-10
        ("pde", 12, set(range(52, 63))), ("pde", 21, set(range(52, 63)) | set(range(13, 21))),
        ("pte", 12, set(range(52, 63))),
    ])
    def test_reserved_bits(
        self, kind: str, shift: int, always: set[int], nxe: bool, maxphyaddr: int, dimension: str
    ) -> None:
        tables = Tables(pae(maxphyaddr, nxe), dimension)
        at = tables.map(self.GVA, 0x20_0000, shift)[kind]
        entry, found = tables.get(at), set()
        for bit in range(64):
            if bit == 7 and kind == "pde" and shift == 12:
                continue
            tables.set(at, entry | 1 << bit)
            try:
                outcome = tables.walk(self.GVA).outcome
            except IndexError:
                continue
            if outcome == tables.faulted(self.GVA, READ, E.P | E.RSVD):
                found.add(bit)
        assert found == always | set(range(maxphyaddr, 52)) | (set() if nxe else {63})

    @pytest.mark.parametrize("dimension", ["guest", "nested"])
    @pytest.mark.parametrize("bits", [RW | US, RW | US | A, RW | US | PS])
    def test_reserved_bits_together(self, bits: int, dimension: str) -> None:
        """R/W and U/S both: in any other entry that is the usual thing."""
        tables = Tables(pae(40, True), dimension)
        at = tables.map(self.GVA, 0x20_0000)["pdpte"]
        tables.set(at, tables.get(at) & ~0x1E6 | bits)
        assert tables.walk(self.GVA).outcome == tables.faulted(self.GVA, READ, E.P | E.RSVD)

    def test_not_present(self) -> None:
        """15.25.10, 5.5.3: the PDPTE is read at the walk; not present is P=0, and nothing else is looked at."""
        tables = Tables(pae(40, True))
        at = tables.map(self.GVA, 0x20_0000)["pdpte"]
        tables.set(at, 0x1E6)
        assert tables.walk(self.GVA).outcome == PageFault(0, self.GVA)

    @pytest.mark.parametrize("low", [0, 0x20, 0xFE0])
    def test_the_root_is_aligned_to_32(self, low: int) -> None:
        """5.2.1: CR3 31:5 is the table's address; 4:0 are not."""
        fmt = pae(40, True)
        memory = Memory(1 << 20)
        memory.words[(0x1000 | low) + 8 * 3 >> 3] = 0x3000 | P
        memory.words[0x3000 + 8 * (self.GVA >> 21 & 0x1FF) >> 3] = USER | PS
        paging = Paging(fmt, 0x1000 | low | 0x1F, True, False, False, False, True, None, 0)
        outcome = translate(paging, memory.words, self.GVA, READ).outcome
        assert outcome == Reached(self.GVA & 0x1F_FFFF, self.GVA & 0x1F_FFFF)

    def test_under_nested_paging_the_pdpte_is_a_guest_table(self) -> None:
        """15.25.10: its read is a nested user write at gPA CR3 + 8 * index: bit 33."""
        guest = Tables(pae(40, True))
        guest.map(self.GVA, 0x20_0000)
        nested = long_mode(40, True)
        paging = Paging(guest.fmt, ROOT, True, False, False, False, True, nested, 0x10_0000)
        walk = translate(paging, guest.memory.words, self.GVA, FETCH)
        assert walk.outcome == NestedPageFault(E.U | E.W | E.GUEST_TABLE, ROOT + 24)
        assert walk.steps[0].dimension == NESTED and walk.steps[0].purpose == "pdpte"


class TestLegacy:
    GVA = 0xC5A7_E000

    @pytest.mark.parametrize("dimension", ["guest", "nested"])
    def test_4k(self, dimension: str) -> None:
        tables = Tables(legacy(40, False), dimension)
        entries = tables.map(self.GVA, 0x20_0000)
        walk = tables.walk(self.GVA | 0xABC, WRITE)
        assert isinstance(walk.outcome, Reached) and walk.outcome.spa == 0x20_0ABC
        assert (entries["pde"] - ROOT) >> 2 == 0xC5A7_E000 >> 22
        assert [s.entry for s in walk.steps] == [tables.get(at) for at in entries.values()]
        write_back(tables.memory.words, walk.updates)
        assert [tables.get(at) & (A | D) for at in entries.values()] == [A, A | D]

    def test_neighbours_are_left_alone(self) -> None:
        """Entries of four bytes: A and D go to the right half of a quadword, odd index and even."""
        tables = Tables(legacy(40, False))
        for page in (0, 1):
            tables.map(self.GVA + page * 0x1000, 0x20_0000 + page * 0x1000)
        at = tables.map(self.GVA, 0x20_0000)["pte"]
        other = at ^ 4
        before = tables.get(other)
        old = write_back(tables.memory.words, tables.walk(self.GVA, WRITE).updates)
        assert tables.get(at) & (A | D) == A | D and tables.get(other) == before
        assert at & ~7 in old

    def test_4m(self) -> None:
        """5.2.2: bits 20:13 are address bits 39:32."""
        tables = Tables(legacy(40, True), "nested")
        at = tables.map(self.GVA, 0, 22)["pde"]
        walk = tables.walk(self.GVA | 0xABC)
        assert isinstance(walk.outcome, Reached) and walk.outcome.spa == (self.GVA | 0xABC) & 0x3F_FFFF
        tables.set(at, tables.get(at) | 0xA5 << 13 | 0x1240_0000)
        walk = tables.walk(self.GVA | 0xABC)
        assert isinstance(walk.outcome, Reached)
        assert walk.outcome.spa == 0xA5_1240_0000 | (self.GVA | 0xABC) & 0x3F_FFFF

    def test_ps_is_ignored_without_pse(self) -> None:
        """5.2.2: with CR4.PSE=0 bit 7 of a PDE means nothing."""
        tables = Tables(legacy(40, False))
        at = tables.map(self.GVA, 0x20_0000)["pde"]
        tables.set(at, tables.get(at) | PS)
        assert tables.walk(self.GVA).outcome == Reached(0x20_0000, 0x20_0000)

    @pytest.mark.parametrize(("maxphyaddr", "reserved"), [(40, {21}), (52, {21}), (36, {21, 17, 18, 19, 20}),
                                                          (32, {21, *range(13, 21)})])
    def test_reserved_bits(self, maxphyaddr: int, reserved: set[int]) -> None:
        """Figure 5-8: bit 21 of a 4M entry; address bits that the CPU has not; nothing in a 4K entry."""
        for shift, expected in ((22, reserved), (12, set[int]())):
            tables = Tables(legacy(maxphyaddr, True))
            entries = tables.map(self.GVA, 0, shift)
            for at in entries.values() if shift == 12 else [entries["pde"]]:
                entry, found = tables.get(at), set()
                for bit in range(32):
                    if bit == 7 and shift == 12 and at == entries["pde"]:
                        continue
                    tables.set(at, entry | 1 << bit)
                    try:
                        outcome = tables.walk(self.GVA).outcome
                    except IndexError:
                        continue
                    if outcome == PageFault(E.P | E.RSVD, self.GVA):
                        found.add(bit)
                tables.set(at, entry)
                assert found == expected

    def test_everything_can_be_executed(self) -> None:
        """5.6.3: there is no NX in entries of 32 bits."""
        tables = Tables(legacy(40, True))
        tables.map(self.GVA, 0x20_0000)
        assert isinstance(tables.walk(self.GVA, FETCH).outcome, Reached)
        assert NX >> 63

    def test_rights(self) -> None:
        tables = Tables(legacy(40, True))
        entries = tables.map(self.GVA, 0x20_0000)
        for at in entries.values():
            entry = tables.get(at)
            tables.set(at, entry & ~RW)
            assert tables.walk(self.GVA, USER_WRITE).outcome == PageFault(E.P | E.W | E.U, self.GVA)
            tables.set(at, entry & ~US)
            assert tables.walk(self.GVA, USER_WRITE).outcome == PageFault(E.P | E.W | E.U, self.GVA)
            tables.set(at, entry & ~P)
            assert tables.walk(self.GVA, USER_WRITE).outcome == PageFault(E.W | E.U, self.GVA)
            tables.set(at, entry)

    def test_gpa_of_a_guest_entry(self) -> None:
        """15.25.6: EXITINFO2 is the entry's gPA, aligned to four bytes here."""
        gva = self.GVA | 1 << 22  # an odd index
        paging = Paging(legacy(40, True), ROOT, True, False, False, False, False, long_mode(40, True), 0x10_0000)
        outcome = translate(paging, Memory(4 << 20).words, gva, READ).outcome
        assert outcome == NestedPageFault(E.U | E.W | E.GUEST_TABLE, ROOT + 4 * (gva >> 22))
        assert outcome.address & 7 == 4
