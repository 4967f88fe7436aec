"""What lies under L1's memory in L0: KVM's memory slots, L0's page map, and the tables that KVM keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from harness.model.entries import FRAME, RW, Format, P, long_mode
from harness.model.memory import Room, Words

PAGE: Final = 4096
_WINDOW_SHIFT: Final = 21
_WINDOW: Final = 1 << _WINDOW_SHIFT
"""What one of L0's tables of PTEs maps."""


_HOST_BITS: Final = 52
"""Bits of a physical address that the kernel's own tables may have, whatever the processor has."""


class Shape(NamedTuple):
    """Of the tables that L0 builds: its physical address bits, and how many levels they have, 4 or 5."""

    maxphyaddr: int
    levels: int

    def formats(self) -> tuple[Format, Format]:
        """That of its KVM's tables, and that of its own."""
        la57 = self.levels == 5
        return long_mode(self.maxphyaddr, True, la57=la57), long_mode(_HOST_BITS, True, la57=la57)


class Slot(NamedTuple):
    """A memory slot: L1's memory from sPA `start` up to `end` is what the process that L1 runs in has from its own
    address `process` on."""

    start: int
    end: int
    process: int
    writable: bool

    def __str__(self) -> str:
        return (f"sPA {self.start:#x} to {self.end - 1:#x} is {self.process:#x} of L1's process"
                f"{'' if self.writable else ', read-only'}")


class Table(NamedTuple):
    """A table that KVM keeps for a shadow (struct kvm_mmu_page). `gfn` is the number of the page of L1's that it stands
    for or, if it is `direct`, of the first page that it maps; `level` 1 is that of 4K pages. `unsync`: L1 may write to
    its page, and KVM will look before the next VMRUN. `invalid`: it is used no more. `passthrough`: it stands above
    L1's root, which has a level less, and for none of its entries."""

    gfn: int
    level: int
    direct: bool
    unsync: bool
    invalid: bool = False
    passthrough: bool = False

    @property
    def tracked(self) -> bool:
        """Whether KVM relies on being told of each write to L1's page."""
        return not (self.direct or self.unsync or self.invalid or self.passthrough)

    def __str__(self) -> str:
        flags = f"{', unsync' if self.unsync else ''}{', invalid' if self.invalid else ''}"
        return f"level {self.level}, {'direct map from' if self.direct else 'shadow of'} gfn {self.gfn:#x}{flags}"


class Kvm(NamedTuple):
    """What KVM has for L1 and L2 at a moment. `l1_root` and `l2_root` are the tables of VMCB01 and VMCB02 that the
    processor walks, 0 where there is no such VMCB; `page_map` the root of the page map of the process that L1 runs in;
    all hPAs. `tables` are those of shadows by their hPA, `stitched` those that KVM puts above an L1's table that has
    fewer levels."""

    l1_root: int
    l2_root: int
    page_map: int
    slots: tuple[Slot, ...]
    tables: Mapping[int, Table]
    stitched: frozenset[int] = frozenset()


class Backed(NamedTuple):
    """Where a byte of memory lies: its hPA, whether L0 lets it be written, and the shift of the size of L0's page."""

    address: int
    writable: bool
    shift: int


class Backing:
    """From sPAs to hPAs, as L0 has it now; `host` is the format of L0's own tables. What was looked up is remembered
    as long as the tables that said so have the same bytes: in `frames`, by the number of a page of L1's, its hPA, with
    RW if L0 lets it be written."""

    def __init__(self, memory: Room, host: Format) -> None:
        self._bytes, self._words, self._host = memory.bytes, memory.words, host
        self._slots: tuple[Slot, ...] = ()
        self._root = 0
        self._seen: dict[int, bytes] = {}
        self.frames: dict[int, int] = {}
        self._large: set[int] = set()
        self._absent: set[int] = set()

    def is_current(self, kvm: Kvm) -> bool:
        """Go by `kvm` from now on; whether nothing has changed under what was looked up."""
        same = kvm.slots == self._slots and kvm.page_map == self._root and all(
            self._bytes[at : at + PAGE].tobytes() == data for at, data in self._seen.items())
        if not same:
            self._slots, self._root = kvm.slots, kvm.page_map
            self._seen.clear()
            self.frames.clear()
            self._large.clear()
            self._absent.clear()
        return same

    def frame(self, spa: int) -> int | None:
        """The hPA of the page that `spa` is in, with RW if it may be written; None where L1 has no memory, or L0 has
        given it none yet."""
        number = spa >> 12
        if number not in self.frames and number not in self._absent:
            self._fill(spa)
        return self.frames.get(number)

    def range(self, spa: int, size: int) -> int | None:
        """The same of `size` bytes from `spa` on; None where they do not lie in one piece."""
        first = self.frame(spa)
        if first is None or size == PAGE:
            return first
        together, at = first, spa
        while at < spa + size:
            one = self.frame(at)
            if one is None or (one ^ first + at - spa) & FRAME:
                return None
            together &= one
            at += _WINDOW if at >> _WINDOW_SHIFT in self._large and not at & _WINDOW - 1 else PAGE
        return first & FRAME | together & RW

    def slot(self, spa: int) -> Slot | None:
        """The slot that `spa` is in."""
        return next((slot for slot in self._slots if slot.start <= spa < slot.end), None)

    def walk(self, spa: int) -> list[tuple[str, int, int]]:
        """L0's entries that say where `spa` lies: name, hPA and value of each."""
        slot, trail = self.slot(spa), list[tuple[str, int, int]]()
        if slot is not None:
            look_up(self._words, self._host, self._root, slot.process + spa - slot.start, trail)
        return trail

    def _fill(self, spa: int) -> None:
        """Look up `spa`, and what else is under the same one of L0's tables of PTEs, or in the same large page."""
        slot, trail = self.slot(spa), list[tuple[str, int, int]]()
        self._absent.add(spa >> 12)
        if slot is None:
            return
        address = slot.process + spa - slot.start
        found = look_up(self._words, self._host, self._root, address, trail)
        for _, at, _ in trail:
            table = at & ~(PAGE - 1)
            if table not in self._seen:
                self._seen[table] = self._bytes[table : table + PAGE].tobytes()
        if found is None:
            return
        window = address & -_WINDOW
        first, end = max(window, slot.process), min(window + _WINDOW, slot.process + slot.end - slot.start)
        number = slot.start + first - slot.process >> 12
        allowed = RW if slot.writable else 0
        if found.shift > 12:
            base = found.address - (address - first) | (allowed if found.writable else 0)
            self.frames.update(zip(range(number, number + (end - first >> 12)), range(base, base + end - first, PAGE),
                                   strict=True))
            if end - first == _WINDOW and not number & _WINDOW - 1 >> 12:
                self._large.add(number << 12 >> _WINDOW_SHIFT)
            return
        for _, _, entry in trail[:-1]:
            allowed &= entry
        table = trail[-1][1] & ~(PAGE - 1)
        for offset in range(0, end - first, PAGE):
            entry = self._words[table + (first + offset >> 9 & PAGE - 8) >> 3]
            if entry & P:
                self.frames[number + (offset >> 12)] = entry & FRAME | entry & allowed


def look_up(words: Words, host: Format, root: int, address: int, trail: list[tuple[str, int, int]]) -> Backed | None:
    """L0's own walk of the virtual `address` by its tables from `root` (hPA) on, with each entry read added to `trail`:
    name, hPA, value. None where there is no page."""
    table, rights = root & FRAME, RW
    for level in host.levels:
        at = table + (address >> level.down & host.index_mask << host.entry_shift)
        entry = words[at >> 3]
        trail.append((level.name, at, entry))
        if not entry & P:
            return None
        rights &= entry
        if entry & level.leaf:
            inside = (1 << level.shift) - 1
            return Backed(entry & FRAME & ~inside | address & inside, bool(rights), level.shift)
        table = entry & FRAME
    raise AssertionError("the last level has leaves alone")
