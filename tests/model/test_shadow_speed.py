"""What an audit costs: a whole one of an L2 with 64 MB in 4K pages, and one behind it of which nothing has changed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from harness.model.backing import Kvm, Slot, Table
from harness.model.entries import FRAME, PS, RW, US, A, D, Format, P, long_mode
from harness.model.memory import Memory
from harness.model.ranges import NestedTable
from harness.model.shadow import Auditor

MB = 1 << 20
L2_SIZE = 64 * MB
L1_SIZE = 2 * L2_SIZE
L1_AT = 256 * MB
"""Where L1's memory begins in L0's."""
SPA = 32 * MB
"""Of L2's first page."""
PROCESS = 0x7F00_0000_0000
L0, L1 = long_mode(40, True, la57=True), long_mode(40, True)


class Big:
    """L1's table, KVM's shadow of it, and L0's page map, which has pages of 1 << `shift` bytes."""

    def __init__(self, shift: int) -> None:
        self.memory = Memory(L1_AT + L1_SIZE)
        self.next = MB
        self.l1_next = 0
        self.hpa: Callable[[int], int] = lambda spa: L1_AT + (spa if shift > 12 else spa ^ 0x1000)
        host, self.nested, shadow = self.page(), self.l1_page(), self.page()
        self.tables = {shadow: Table(self.nested >> 12, 5, False, False, passthrough=True)}
        for spa in range(0, L1_SIZE, 1 << shift):
            self.map(L0, host, PROCESS + spa, self.hpa(spa) | P | RW | US | (PS if shift > 12 else 0), shift, self.page)
        for gpa in range(0, L2_SIZE, 4096):
            self.map(L1, self.nested, gpa, SPA + gpa | P | RW | US | A | D, 12, self.l1_page, self.hpa)
        for gpa in range(0, L2_SIZE, 4096):
            self.map(L0, shadow, gpa, self.hpa(SPA + gpa) | P | RW | US, 12, self.page, note=self.note)
        self.kvm = Kvm(0, shadow, host, (Slot(0, L1_SIZE, PROCESS, True),), self.tables)

    def page(self) -> int:
        self.next += 4096
        return self.next - 4096

    def l1_page(self) -> int:
        self.l1_next += 4096
        return self.l1_next - 4096

    def map(self, fmt: Format, root: int, address: int, leaf: int, shift: int, page: Callable[[], int],
            hpa: Callable[[int], int] = lambda at: at, note: Callable[[int, int, int], None] = lambda *_: None) -> None:
        table = root
        for number, level in enumerate(fmt.levels):
            at = hpa(table) + (address >> level.down & 0xFF8) >> 3
            if level.shift == shift:
                self.memory.words[at] = leaf
                return
            if not self.memory.words[at]:
                self.memory.words[at] = page() | P | RW | US | A
                note(self.memory.words[at] & FRAME, len(fmt.levels) - number - 1, address)
            table = self.memory.words[at] & FRAME

    def note(self, table: int, level: int, gpa: int) -> None:
        """A new table of the shadow stands for L1's of that level."""
        spa = self.nested
        for one in L1.levels[: len(L1.levels) - level]:
            spa = self.memory.words[self.hpa(spa) + (gpa >> one.down & 0xFF8) >> 3] & FRAME
        self.tables[table] = Table(spa >> 12, level, False, False)

    def audit(self, auditor: Auditor) -> float:
        """Seconds of this process."""
        begun = time.process_time()
        auditor.begin(self.kvm)
        nested = NestedTable(L1, self.nested, auditor.backing, self.memory.words)
        assert list(auditor.shadow(self.kvm.l2_root, nested)) == []
        return time.process_time() - begun


@pytest.mark.parametrize("shift", [12, 21])
def test_64_mb(shift: int) -> None:
    big = Big(shift)
    whole, again = [], []
    for _ in range(3):
        auditor = Auditor(big.memory, L0, L0)
        whole.append(big.audit(auditor))
        assert auditor.leaves == L2_SIZE // 4096
        again.append(big.audit(auditor))
    assert min(whole) < 0.1 and min(again) < 0.005
