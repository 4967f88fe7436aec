"""System-physical memory as the model sees it: quadwords, all zero at first, cheap where untouched."""

from __future__ import annotations

import mmap
from typing import Final, Protocol, Self

_MAP_NORESERVE: Final = 0x4000  # Linux; the mmap module of 3.11 does not name it


class Words(Protocol):
    """Memory by quadword index (sPA / 8). Reading beyond its end raises IndexError."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class Bytes(Protocol):
    """Memory by bytes, a slice of it at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> memoryview: ...


class Room(Protocol):
    """Memory that is read."""

    @property
    def words(self) -> Words:
        """By quadwords."""

    @property
    def bytes(self) -> Bytes:
        """By bytes."""


class Memory:
    """`size` bytes of sparse memory. `words` is the same memory by quadwords, `bytes` by bytes."""

    def __init__(self, size: int) -> None:
        # the system gives a page at its first write, and promises no more: most of this is never written
        self._pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self.bytes = memoryview(self._pages)
        self.words = self.bytes.cast("Q")

    @classmethod
    def over(cls, view: memoryview) -> Self:
        """Memory that is already there, from sPA 0 on: a machine's own."""
        self = cls.__new__(cls)
        self.bytes = view
        self.words = view.cast("Q")
        return self

    def write(self, address: int, value: int, width: int) -> None:
        """Store the low `width` bytes of `value`, little-endian, at sPA `address`."""
        self.bytes[address : address + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    def read(self, address: int, width: int) -> int:
        """The `width` bytes at sPA `address` as a little-endian integer."""
        return int.from_bytes(self.bytes[address : address + width], "little")
