"""A small L0 for tests of the audit: its memory, L1's in it, L1's nested table, and a shadow as KVM builds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from harness.model.access import Access
from harness.model.backing import Kvm, Slot, Table
from harness.model.entries import FRAME, NX, PS, RW, US, A, D, Format, P, legacy, long_mode, pae
from harness.model.memory import Memory
from harness.model.ranges import NestedTable
from harness.model.shadow import Auditor, Breach
from harness.model.walk import FINAL, Fault, Paging, walk_nested

SIZE: Final = 32 << 20
ALL: Final = P | RW | US | A | D
FORMATS: Final = {
    "5-level": long_mode(40, True, la57=True), "4-level": long_mode(40, True), "PAE": pae(40, True),
    "32-bit": legacy(40, True),
}
PROCESS: Final = 0x7F12_3440_0000
L1_AT: Final = 16 << 20
"""Where L1's memory begins in L0's; its pages are in another order there."""
L1_SIZE: Final = 8 << 20
LARGE: Final = 4 << 20
PARTS: Final = (0, 0x3000, 0x1F_F000)
"""What of the large page is in the shadow."""
PRESENT: Final = (*range(0, 0x30000, 4096), *range(2 << 20, (2 << 20) + 0x8000, 4096),
                  *(LARGE + part for part in PARTS), L1_SIZE - 4096)
"""Pages of L1's (sPAs) that L0 has given it."""


class World:
    """L1's table maps gPA GPA + n pages to sPA 2M + n pages, n from 0 to 3, and a large page to sPA 4M; the shadow maps
    the same. Entries are known by names: `l1.0.pte` is that of page 0 in L1's table, `shadow.large` the leaf of the
    large page."""

    def __init__(self, fmt: str, levels: int = 5) -> None:
        self.fmt: Format = FORMATS[fmt]
        self.memory = Memory(SIZE)
        self.l0 = long_mode(40, True, la57=levels == 5)
        self.next = 0x1000
        self.l1_next = 0x1000
        self.at: dict[str, int] = {}
        self.tables: dict[int, Table] = {}
        self.stitched: set[int] = set()
        self.gpa = 0x5_4040_0000 if self.fmt.address_bits > 32 else 0x5440_0000
        self.host = self.page()
        for spa in PRESENT:
            self.map_host(PROCESS + spa, self.hpa(spa))
        self.nested_root = self.l1_page()
        self.direct_root = self.page()
        self.shadow_root = self.keep(self.page(), self.nested_root, levels)
        for spa in PRESENT:
            self.shadow(self.direct_root, "direct", spa, self.hpa(spa), 12, P | RW | US, lambda gpa, level, page: page)
        for number in range(4):
            gpa, spa = self.gpa + number * 4096, (2 << 20) + number * 4096
            self.map_l1(f"l1.{number}", gpa, spa, 12)
            self.shadow(self.shadow_root, f"shadow.{number}", gpa, self.hpa(spa), 12, P | RW | US, self.of_l1)
        self.large = self.gpa + (8 << 20)
        shift = 22 if fmt == "32-bit" else 21
        self.map_l1("l1.large", self.large, LARGE, shift)
        for offset in PARTS:
            self.shadow(self.shadow_root, f"shadow.large+{offset:x}", self.large + offset,
                        self.hpa(LARGE + offset), 12, P | RW | US, self.of_large)
        for table in list(self.tables.values()):
            if table.tracked:
                at = self.at[f"direct.{table.gfn << 12:x}"]
                self.memory.words[at >> 3] &= ~RW

    def page(self) -> int:
        self.next += 0x1000
        assert self.next <= L1_AT
        return self.next - 0x1000

    def l1_page(self) -> int:
        """A page of L1's for a table."""
        self.l1_next += 0x1000
        return self.l1_next - 0x1000

    @staticmethod
    def hpa(spa: int) -> int:
        """Where L1's memory is: pages in reverse order, so that no large one is in one piece."""
        return L1_AT + (L1_SIZE - 4096 - (spa & ~0xFFF)) + (spa & 0xFFF)

    def keep(self, table: int, spa: int, level: int, direct: bool = False) -> int:
        top = level > len(self.fmt.levels)
        if top and len(self.fmt.levels) < 4:
            self.stitched.add(table)
        else:
            self.tables[table] = Table(spa >> 12, level, direct, False, passthrough=top)
        return table

    def map_host(self, address: int, hpa: int) -> None:
        table = self.host
        for level in self.l0.levels:
            at = table + (address >> level.down & 0xFF8)
            if level.shift == 12:
                self.memory.words[at >> 3] = hpa | P | RW | US | NX
                return
            if not self.memory.words[at >> 3]:
                self.memory.words[at >> 3] = self.page() | P | RW | US
            table = self.memory.words[at >> 3] & FRAME

    def map_l1(self, name: str, gpa: int, spa: int, shift: int) -> None:
        fmt, table = self.fmt, self.nested_root
        for level in fmt.levels:
            at = table + (gpa >> level.down & fmt.index_mask << fmt.entry_shift)
            self.at[f"{name}.{level.name}"] = at
            if level.shift == shift:
                self.set_l1(at, spa | ALL | (PS if shift > 12 else 0))
                return
            if not self.l1(at):
                self.set_l1(at, self.l1_page() | (P if not level.accessed else P | RW | US | A))
            table = self.l1(at) & FRAME

    def l1(self, spa: int) -> int:
        word = self.memory.words[self.hpa(spa) >> 3]
        return word if self.fmt.entry_shift == 3 else word >> (spa & 4) * 8 & 0xFFFF_FFFF

    def set_l1(self, spa: int, entry: int) -> None:
        self.memory.write(self.hpa(spa), entry, 1 << self.fmt.entry_shift)

    def of_l1(self, gpa: int, level: int, page: int) -> int:
        """A table of the shadow of that level stands for L1's table there."""
        table = self.nested_root
        for number, one in enumerate(self.fmt.levels):
            if len(self.fmt.levels) - number <= level:
                break
            fmt = self.fmt
            table = self.l1(table + (gpa >> one.down & fmt.index_mask << fmt.entry_shift)) & FRAME
        return self.keep(page, table, level)

    def of_large(self, gpa: int, level: int, page: int) -> int:
        if level > 1:
            return self.of_l1(gpa, level, page)
        return self.keep(page, LARGE + ((gpa & ~0x1F_FFFF) - self.large), 1, direct=True)

    def shadow(self, root: int, name: str, gpa: int, hpa: int, shift: int, bits: int,
               keep: Callable[[int, int, int], int]) -> None:
        table = root
        for number, level in enumerate(self.l0.levels):
            at = table + (gpa >> level.down & 0xFF8)
            self.at[f"{name}.{level.name}"] = at
            if level.shift == shift:
                self.at[name if name != "direct" else f"direct.{gpa:x}"] = at
                self.memory.words[at >> 3] = hpa | bits | (PS if shift > 12 else 0)
                return
            if not self.memory.words[at >> 3]:
                below = keep(gpa, len(self.l0.levels) - number - 1, self.page())
                self.memory.words[at >> 3] = below | P | RW | US
            table = self.memory.words[at >> 3] & FRAME

    def kvm(self) -> Kvm:
        half = L1_SIZE // 2
        slots = (Slot(0, half, PROCESS, True), Slot(half, L1_SIZE, PROCESS + half, True))
        return Kvm(self.direct_root, self.shadow_root, self.host, slots, dict(self.tables), frozenset(self.stitched))

    def auditor(self) -> Auditor:
        return Auditor(self.memory, self.l0, self.l0)

    def nested(self, auditor: Auditor, before: Callable[[int], int | None] | None = None) -> NestedTable:
        return NestedTable(self.fmt, self.nested_root, auditor.backing, self.memory.words, before)

    def audit(self, auditor: Auditor | None = None, kvm: Kvm | None = None, synced: bool = False) -> list[Breach]:
        auditor, kvm = auditor or self.auditor(), kvm or self.kvm()
        auditor.begin(kvm)
        return [*auditor.direct(kvm.l1_root), *auditor.shadow(kvm.l2_root, self.nested(auditor), synced=synced)]

    def change(self, name: str, set: int = 0, clear: int = 0) -> None:
        """Bits of an entry of a shadow, or of L1's table."""
        at = self.at[name]
        if name.startswith("l1."):
            self.set_l1(at, self.l1(at) & ~clear | set)
        else:
            self.memory.words[at >> 3] = self.memory.words[at >> 3] & ~clear | set

    # --- an oracle of its own: single accesses, by the model's walk ---------------------------------------------------

    def gpas(self) -> Iterator[int]:
        yield from (self.gpa + number * 4096 for number in range(5))
        yield from (self.large + offset for offset in (0, 0x3000, 0x4000, 0x1F_F000))

    def through_shadow(self, gpa: int, access: Access) -> int | None:
        """The hPA that the processor comes to, None for a fault."""
        return _walk(self.l0, self.shadow_root, self.memory, gpa, access)

    def permitted(self, gpa: int, access: Access) -> int | None:
        """The hPA that it may come to."""
        mirror = Memory(L1_SIZE)
        for spa in PRESENT:
            mirror.bytes[spa : spa + 4096] = self.memory.bytes[self.hpa(spa) : self.hpa(spa) + 4096]
        spa = _walk(self.fmt, self.nested_root, mirror, gpa, access)
        return self.hpa(spa) if spa is not None and spa & ~0xFFF in PRESENT else None


def _walk(fmt: Format, root: int, memory: Memory, gpa: int, access: Access) -> int | None:
    paging = Paging(None, 0, True, False, False, False, False, fmt, root)
    try:
        return walk_nested(paging, fmt, memory.words, gpa, access, FINAL, [], [])
    except (Fault, IndexError):
        return None
