"""What a finding about a foreign L1 was made of, so that it can be judged again with no machine: the stops that it
takes, and of memory what is read at each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from harness.model.memory import Memory
from harness.wire.stop import Stop

PAGE = 4096


class Moment(NamedTuple):
    """A stop, and the pages of L1's memory, by sPA, that are others now than at the moment before."""

    stop: Stop
    pages: Mapping[int, bytes]


class Evidence(NamedTuple):
    """The moments of a finding, in their order; it is found at the last. `memory` is L1's RAM in bytes."""

    memory: int
    moments: tuple[Moment, ...]

    def again(self) -> Iterator[tuple[Memory, Stop]]:
        """The same moments once more: memory as far as it is known, zeros elsewhere, and the stop."""
        memory = Memory(self.memory)
        for moment in self.moments:
            for spa, data in moment.pages.items():
                memory.bytes[spa : spa + PAGE] = data
            yield memory, moment.stop

    def known(self) -> set[int]:
        """sPAs of the pages that are known."""
        return {spa for moment in self.moments for spa in moment.pages}


class Touched:
    """Words of memory, and the sPAs of pages that were read through this."""

    def __init__(self, memory: Memory) -> None:
        self.bytes = memory.bytes
        self.pages: set[int] = set()
        self._of = memory.words
        self.words = self

    def __getitem__(self, index: int) -> int:
        value = self._of[index]
        self.pages.add(index * 8 & -PAGE)
        return value

    def __setitem__(self, index: int, value: int) -> None:
        raise TypeError("an observer only reads")


def with_entries(page: bytes, at: int, entries: Mapping[int, tuple[int, int]]) -> bytes:
    """A page at sPA `at` in which the entries at these sPAs have other values, each of so many bytes."""
    data = bytearray(page)
    for address, (value, size) in entries.items():
        if address & -PAGE == at:
            data[address - at : address - at + size] = value.to_bytes(size, "little")
    return bytes(data)
