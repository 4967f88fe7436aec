"""Making page tables of any format, in one dimension or the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from harness.model.entries import FRAME, PS, PSE36_SHIFT, RW, US, A, D, Format, P
from harness.wire.image import PAGE

RIGHTS = P | RW | US
KEPT = A | D
"""Set from the start in what is L2's own, so that only the pages under test change."""


@dataclass
class Arena:
    """Pages for tables, one after the other from sPA `start`, and the quadwords written to them."""

    start: int
    used: int = 0
    words: dict[int, int] = field(default_factory=dict)

    def page(self) -> int:
        """A new page, by its sPA."""
        self.used += PAGE
        return self.start + self.used - PAGE

    def read(self, address: int, width: int) -> int:
        """The entry of `width` bytes (4 or 8) at sPA `address`."""
        return self.words.get(address & ~7, 0) >> (address & 7) * 8 & (1 << 8 * width) - 1

    def write(self, address: int, value: int, width: int) -> None:
        """Set the entry of `width` bytes (4 or 8) at sPA `address`."""
        mask = (1 << 8 * width) - 1 << (address & 7) * 8
        self.words[address & ~7] = self.words.get(address & ~7, 0) & ~mask | value << (address & 7) * 8


@dataclass
class Tables:
    """The tables of one dimension: `fmt`, the root's address as the hardware is given it, and how that
    kind of address becomes an sPA. `entries` collects the sPAs of entries under the names asked for."""

    arena: Arena
    fmt: Format
    root: int
    to_spa: Callable[[int], int]
    entries: dict[str, int] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Bytes of one entry."""
        return 1 << self.fmt.entry_shift

    def map(
        self,
        address: int,
        target: int,
        shift: int,
        name: str = "",
        bits: int = RIGHTS,
        upper: int = RIGHTS,
        tables: Iterable[int] = (),
    ) -> None:
        """Map `address` to the page of 1 << `shift` bytes at `target`, with `bits` in the leaf.

        Tables that are missing on the way are taken from `tables`, by the kind of address that entries
        hold, and from the arena when that is exhausted (then such an address is an sPA); their entries
        get `upper`. Entries are named `name`.LEVEL. Raises ValueError for a size of page that `fmt` has not.
        """
        supply = iter(tables)
        table = self.root
        for level in self.fmt.levels:
            at = self.to_spa(table) + ((address >> level.shift & self.fmt.index_mask) << self.fmt.entry_shift)
            if name:
                self.entries.setdefault(f"{name}.{level.name}", at)
            if level.shift == shift:
                frame = target & ~((1 << shift) - 1)
                if shift == PSE36_SHIFT:
                    frame = frame & 0xFFC0_0000 | (frame >> 32 & 0xFF) << 13
                self.arena.write(at, frame | bits | (PS if shift > 12 else 0), self.width)
                return
            entry = self.arena.read(at, self.width)
            if not entry:
                granted = P if level.granted else upper  # a PAE PDPTE has no rights
                below = next(supply, None)
                entry = (self.arena.page() if below is None else below) | granted
                self.arena.write(at, entry, self.width)
            table = entry & FRAME
        raise ValueError(f"{self.fmt.name} has no pages of {1 << shift} bytes")

    def alternative(self, page: int, own: int, targets: Mapping[int, int], below: Mapping[int, int]) -> None:
        """Make the page at sPA `page`, which entries call `own`, a table that can stand in at any level: as the lowest
        it maps 4K pages, the addresses in `targets` and `below` to what they are there; else it leads to itself, at the
        two lowest levels for `below` too. As the root it has all else that the root has."""
        for level in reversed(self.fmt.levels):
            for address, target in ({**targets, **below} if level.shift < 30 else targets).items():
                at = page + ((address >> level.shift & self.fmt.index_mask) << self.fmt.entry_shift)
                entry = (target if level.shift == 12 else own) | (P if level.granted else RIGHTS)
                if not self.arena.read(at, self.width) and not entry >> 8 * self.width:
                    self.arena.write(at, entry, self.width)
        root = self.to_spa(self.root)
        for offset in range(0, self.fmt.index_mask + 1 << self.fmt.entry_shift, self.width):
            entry = self.arena.read(root + offset, self.width)
            if entry and not self.arena.read(page + offset, self.width):
                self.arena.write(page + offset, entry, self.width)
