"""L1's nested tables as they were when last looked at: what changed in them since, and what that takes away.

Only tables are read that the root leads to, each page that changed once: a table of a guest with some hundred megabytes
costs as much as comparing its pages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from harness.model.entries import FRAME, NX, OPEN, PS, PSE36_SHIFT, RW, A, D, Format, Level, P

Table = tuple[int, ...]
"""A table's entries, in their order."""

_PAGE: Final = 4096
_LETTERS: Final = {2: "I", 3: "Q"}


class Change(NamedTuple):
    """An entry (its sPA and the depth of its table, 0 for the root's) that was `old`, and is `new`. `lost`: what it
    translated before it does not translate to the same, with the same rights, any more."""

    address: int
    depth: int
    old: int
    new: int
    lost: bool


class _Seen(NamedTuple):
    data: bytes
    entries: Table
    children: tuple[int, ...]


class _Page(NamedTuple):
    """`size` bytes from `gpa` on that are at sPA `frame`, with RW and US of `rights`."""

    gpa: int
    size: int
    frame: int
    rights: int
    nx: int


class NestedTables:
    """The tables at `root` (nCR3) in format `fmt`; `memory` is L1's, from sPA 0."""

    def __init__(self, root: int, fmt: Format, memory: memoryview) -> None:
        self.fmt = fmt
        self._root = root & fmt.root_mask
        self._memory = memory
        self._sizes = [(fmt.index_mask + 1) << fmt.entry_shift for _ in fmt.levels]
        if fmt.address_bits == 32 and fmt.entry_shift == 3:
            self._sizes[0] = 4 << 3  # PAE's root has four entries
        self._pages: dict[tuple[int, int], _Seen] = {}
        self.bytes_compared = 0
        self.refresh()

    def refresh(self) -> list[Change]:
        """What changed since the last time, or since this was made. Entries of a table that was not one then are not
        among it: the entry that leads to it is."""
        before, now = self._pages, dict[tuple[int, int], _Seen]()
        differing: list[tuple[int, int]] = []
        left = [(self._root, 0)]
        while left:
            key = left.pop()
            if key in now:
                continue
            address, depth = key
            data = bytes(self._memory[address : address + self._sizes[depth]])
            seen = before.get(key)
            self.bytes_compared += len(data)
            if seen is None or seen.data != data:
                if seen is not None:
                    differing.append(key)
                entries = struct.unpack(f"<{len(data) >> self.fmt.entry_shift}{_LETTERS[self.fmt.entry_shift]}", data)
                seen = _Seen(data, entries, self._children(entries, depth))
            now[key] = seen
            left += ((child, depth + 1) for child in seen.children)
        self._pages = now
        return [change for key in sorted(differing) for change in self._differences(key, before, now)]

    def _children(self, entries: Table, depth: int) -> tuple[int, ...]:
        level = self.fmt.levels[depth]
        if level.leaf == P:
            return ()
        end = len(self._memory)
        return tuple({frame for entry in entries if entry & P and not entry & level.leaf
                      and (frame := entry & FRAME) < end})

    def _differences(
        self, key: tuple[int, int], before: Mapping[tuple[int, int], _Seen], now: Mapping[tuple[int, int], _Seen]
    ) -> list[Change]:
        address, depth = key
        found = []
        pairs = zip(before[key].entries, now[key].entries, strict=True)
        for index, (old, new) in enumerate(pairs):
            if old != new:
                lost = self._lost(old, new, depth, before, now)
                found.append(Change(address + (index << self.fmt.entry_shift), depth, old, new, lost))
        return found

    def _lost(self, old: int, new: int, depth: int, before: Mapping[tuple[int, int], _Seen],
              now: Mapping[tuple[int, int], _Seen]) -> bool:
        level = self.fmt.levels[depth]
        if not old & P:
            return False
        if not new & P or old & OPEN & ~new & ~level.granted or new & ~old & NX:
            return True
        was_leaf, is_leaf = bool(old & level.leaf), bool(new & level.leaf)
        if was_leaf == is_leaf:
            return bool((old ^ new) & self._frame(level, was_leaf))
        table, below = (now if was_leaf else before).get(((new if was_leaf else old) & FRAME, depth + 1)), depth + 1
        if table is None:
            return True
        return any(self._part_lost(*((old, part) if was_leaf else (part, new)), n, below, was_leaf)
                   for n, part in enumerate(table.entries))

    def _part_lost(self, old: int, new: int, index: int, depth: int, was_large: bool) -> bool:
        """Of a large page that became a table with one of these, or the other way round."""
        level = self.fmt.levels[depth]
        part, large = (new, old) if was_large else (old, new)
        if not old & P:
            return False
        if not part & P or not part & level.leaf:
            return True  # a table further down: more than one step at once is taken for a loss
        here = (large & FRAME & ~((1 << self.fmt.levels[depth - 1].shift) - 1)) + (index << level.shift)
        return bool(part & self._frame(level, True) ^ here & self._frame(level, True)
                    or old & OPEN & ~new or new & ~old & NX)

    def _frame(self, level: Level, leaf: bool) -> int:
        """The bits of an entry that say where it leads."""
        if not leaf:
            return FRAME | (level.leaf if level.leaf != P else 0)
        if self.fmt.entry_shift == 2 and level.leaf == PS:
            return 0xFFFF_E000 & ~(1 << 21)  # with bits 39:32 of the address in 20:13 (PSE-36)
        return FRAME & ~((1 << level.shift) - 1)

    def pages(self) -> list[int]:
        """sPAs of the pages that they are in."""
        return sorted({address & -_PAGE for address, _ in self._pages})

    def lost_in(self, other: NestedTables) -> list[tuple[int, int, int]]:
        """What was translated here, so that A=1, and is not the same or has fewer rights in the other tables: the gPA
        of each page, and its sPA here and there; -1: nothing."""
        found = []
        for page in self._leaves():
            at = 0
            while at < page.size:
                there = other._leaf_at(page.gpa + at)
                if there is None:
                    found.append((page.gpa + at, page.frame + at, -1))
                    break
                spa = there.frame + page.gpa + at - there.gpa
                if spa != page.frame + at or page.rights & ~there.rights or there.nx & ~page.nx:
                    found.append((page.gpa + at, page.frame + at, spa))
                    break
                at = there.gpa + there.size - page.gpa
        return found

    def _leaves(self) -> Iterator[_Page]:
        """All pages with A=1."""
        left = [(self._root, 0, 0, OPEN, 0)]
        while left:
            table, depth, base, rights, nx = left.pop()
            seen, level = self._pages.get((table, depth)), self.fmt.levels[depth]
            for index, entry in enumerate(seen.entries if seen is not None else ()):
                if not entry & P:
                    continue
                page = self._page(entry, depth, base | index << level.shift, rights, nx)
                if not entry & level.leaf:
                    left.append((entry & FRAME, depth + 1, page.gpa, page.rights, page.nx))
                elif entry & A:
                    yield page

    def _leaf_at(self, gpa: int) -> _Page | None:
        table, rights, nx = self._root, OPEN, 0
        for depth, level in enumerate(self.fmt.levels):
            seen, index = self._pages.get((table, depth)), gpa >> level.shift & self.fmt.index_mask
            if seen is None or index >= len(seen.entries) or not (entry := seen.entries[index]) & P:
                return None
            page = self._page(entry, depth, gpa & ~((1 << level.shift) - 1), rights, nx)
            if entry & level.leaf:
                return page
            table, rights, nx = entry & FRAME, page.rights, page.nx
        return None

    def _page(self, entry: int, depth: int, gpa: int, rights: int, nx: int) -> _Page:
        """What an entry makes of the address that it is for."""
        level = self.fmt.levels[depth]
        frame = entry & FRAME & ~((1 << level.shift) - 1)
        if level.shift == PSE36_SHIFT:
            frame |= (entry >> 13 & 0xFF) << 32
        return _Page(gpa, 1 << level.shift, frame, rights & (entry | level.granted), nx | entry & NX)

    def wrong_bits(self, change: Change) -> int:
        """The bits that a processor which walks this table must not have changed (sections 15.25.5 and 5.4.2): it
        sets A where P=1, and D in what maps a page that may be written; and clears nothing."""
        level = self.fmt.levels[change.depth]
        allowed = 0
        if change.old & P:
            allowed = A if level.accessed or change.old & level.leaf else 0
            if change.old & level.leaf and change.old & RW:
                allowed |= D
        return (change.old ^ change.new) & ~(allowed & change.new)
