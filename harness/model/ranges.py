"""L1's nested table walked by ranges: what it says of a large page of gPAs, or of a 4K page, one level at a time.

The walk of a single access is harness.model.walk; this is the same table seen from beside a shadow of it, whose levels
are not the same: L0's has four or five, L1's five to two.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from harness.model.backing import Backing
from harness.model.entries import ALL_RIGHTS, FRAME, NX, PSE36_SHIFT, RW, US, A, D, Format, P
from harness.model.memory import Words

RIGHTS: Final = RW | US | A | D
"""What every entry on the way must have for a page to be used in full."""

IS_PAGE, IS_NOTHING = -1, -2
"""In place of a level's number: the walk has come to a page, or to nothing."""

_PHYSICAL_BITS: Final = 52
_ENTRIES: Final = struct.Struct("<512Q")


Before = Callable[[int], int | None]
"""What was in a quadword (sPA) at an earlier moment, None for what was the same."""


class Reach(NamedTuple):
    """How far the walk of a range has come: to the table at `base` (sPA) of the level with the number `depth`; with
    IS_PAGE, to the page of 1 << `shift` bytes there. `rights` are those of RIGHTS that all entries so far have, `nx` is
    NX if one of them has it."""

    base: int
    depth: int
    shift: int = 0
    rights: int = RIGHTS
    nx: int = 0

    def at(self, gpa: int) -> int:
        """Where `gpa` lies in that page (sPA); or that table."""
        return self.base + (gpa & (1 << self.shift) - 1)


NOTHING: Final = Reach(0, IS_NOTHING)


class Source(Protocol):
    """What a shadow stands for."""

    @property
    def reserved(self) -> int:
        """Bits that are reserved in its last level."""

    def root(self) -> Reach:
        """Where a walk begins."""

    def down(self, reach: Reach, gpa: int, shift: int) -> Reach:
        """The walk of `gpa` from `reach` on, as far as entries say something of 1 << `shift` bytes or more."""

    def read_at(self, reach: Reach, shift: int) -> int | None:
        """The hPA of the page that `down` reads an entry from; None if from none. For what lies under one entry of a
        shadow it is one at most."""

    def plain(self, reach: Reach, gpa: int, shift: int, nested: bytes) -> Sequence[int]:
        """The 512 entries of pages of 1 << `shift` bytes from `gpa` on, for a table of a shadow that stands beside all
        of them, if nothing above them withholds anything; else none. `nested` is what is at `read_at`."""

    def steps(self, gpa: int) -> list[tuple[str, int, int]]:
        """The entries of the walk of `gpa`: name, sPA and value of each."""


def _of_page(reach: Reach, gpa: int, shift: int) -> Sequence[int]:
    """Those of a large page, as if it were split."""
    whole = reach.depth == IS_PAGE and reach.rights == RIGHTS and not reach.nx
    base = reach.at(gpa) | RIGHTS | P
    return range(base, base + (512 << shift), 1 << shift) if whole else ()


class Identity:
    """What a direct map stands for: every address is its own, and every right is there."""

    reserved = 0

    def root(self) -> Reach:
        return Reach(0, IS_PAGE, _PHYSICAL_BITS)

    def down(self, reach: Reach, gpa: int, shift: int) -> Reach:
        return reach

    def read_at(self, reach: Reach, shift: int) -> int | None:
        return None

    def plain(self, reach: Reach, gpa: int, shift: int, nested: bytes) -> Sequence[int]:
        return _of_page(reach, gpa, shift)

    def steps(self, gpa: int) -> list[tuple[str, int, int]]:
        return []


class NestedTable:
    """L1's nested table at `ncr3`, in the format of L1's mode at VMRUN; `words` are L0's memory. `before` is of an
    earlier moment, if it is wanted as it was then."""

    def __init__(self, fmt: Format, ncr3: int, backing: Backing, words: Words,
                 before: Before | None = None) -> None:
        self.format, self.ncr3, self.reserved = fmt, ncr3, fmt.levels[-1].reserved_leaf
        self._backing, self._words, self._before = backing, words, before

    def root(self) -> Reach:
        return Reach(self.ncr3 & self.format.root_mask, 0)

    def down(self, reach: Reach, gpa: int, shift: int) -> Reach:
        levels = self.format.levels
        while reach.depth >= 0 and levels[reach.depth].shift >= shift:
            reach = self._step(reach, gpa)
        return reach

    def read_at(self, reach: Reach, shift: int) -> int | None:
        if reach.depth < 0 or self.format.levels[reach.depth].shift < shift:
            return None
        found = self._backing.frame(reach.base)
        return None if found is None else found & FRAME

    def plain(self, reach: Reach, gpa: int, shift: int, nested: bytes) -> Sequence[int]:
        if reach.depth < 0:
            return _of_page(reach, gpa, shift)
        whole = reach.rights == RIGHTS and not reach.nx and self.format.levels[reach.depth].shift == shift
        return _ENTRIES.unpack(nested) if whole and nested and self.format.entry_shift == 3 else ()

    def steps(self, gpa: int) -> list[tuple[str, int, int]]:
        reach, out = self.root(), []
        while reach.depth >= 0:
            at = self._address(reach, gpa)
            out.append((self.format.levels[reach.depth].name, at, self._entry(at) or 0))
            reach = self._step(reach, gpa)
        return out

    def _address(self, reach: Reach, gpa: int) -> int:
        fmt = self.format
        indexed = gpa if fmt.address_bits > 32 else gpa & 0xFFFF_FFFF
        return reach.base + (indexed >> fmt.levels[reach.depth].down & fmt.index_mask << fmt.entry_shift)

    def _entry(self, spa: int) -> int | None:
        """None where L1 has no memory."""
        found = self._backing.frame(spa)
        if found is None:
            return None
        word = self._before(spa & ~7) if self._before else None
        if word is None:
            word = self._words[(found & FRAME | spa & 0xFFF) >> 3]
        return word if self.format.entry_shift == 3 else word >> (spa & 4) * 8 & 0xFFFF_FFFF

    def _step(self, reach: Reach, gpa: int) -> Reach:
        """Through one entry (sections 5.3.3 and 15.25.5)."""
        level, entry = self.format.levels[reach.depth], self._entry(self._address(reach, gpa))
        if entry is None or not entry & P:
            return NOTHING
        leaf = entry & level.leaf
        if entry & (level.reserved_leaf if leaf else level.reserved_table):
            return NOTHING
        granted = level.granted | (0 if level.accessed or leaf else A) | (0 if leaf else D)
        rights, nx = reach.rights & (entry | granted), reach.nx | entry & NX
        if not leaf:
            return Reach(entry & FRAME, reach.depth + 1, 0, rights, nx)
        frame = entry & FRAME & ALL_RIGHTS << level.shift
        if level.shift == PSE36_SHIFT:
            frame |= (entry >> 13 & 0xFF) << 32
        return Reach(frame, IS_PAGE, level.shift, rights, nx)
