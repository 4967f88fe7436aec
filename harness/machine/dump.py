"""Memory of a machine in a file: a plain copy from sPA 0 on (QEMU's `pmemsave 0 SIZE FILE`), or an ELF file with a
segment for each range (QEMU's `dump-guest-memory FILE`). It is read where a walk leads, never as a whole.
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from harness.errors import UsageError

_PACKED: Final = (b"KDUMP   ", b"makedumpfile")
_WORD: Final = struct.Struct("<Q")


class Dump:
    """Memory by quadword index, as the model's walks read it: IndexError for what is not in the file. Raises UsageError
    for a file that cannot be read, or is no dump."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < _WORD.size:
                    raise UsageError(f"{path}: it has {size} bytes: no memory is that small")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._ranges = sorted(_ranges(path, self._data[:16]))
        except (OSError, ValueError) as reason:
            raise UsageError(f"{path}: cannot be read: {reason}") from None
        self._starts = [start for start, _, _ in self._ranges]

    def __getitem__(self, index: int) -> int:
        at = self._place(index * _WORD.size, _WORD.size)
        if at is None:
            raise IndexError(f"sPA {index * _WORD.size:#x} is not in the dump")
        return int(_WORD.unpack_from(self._data, at)[0])

    def __setitem__(self, index: int, value: int) -> None:
        raise TypeError("a dump is only read")

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at sPA `address`, in one range. Raises IndexError."""
        at = self._place(address, size)
        if at is None:
            raise IndexError(f"sPA {address:#x} is not in the dump")
        return self._data[at : at + size]

    def _place(self, address: int, size: int) -> int | None:
        number = bisect_right(self._starts, address) - 1
        if number < 0:
            return None
        start, length, offset = self._ranges[number]
        return offset + address - start if address + size <= start + length else None


def _ranges(path: Path, head: bytes) -> list[tuple[int, int, int]]:
    """sPA, bytes and place in the file of each range."""
    size = path.stat().st_size
    if head.startswith(_PACKED):
        raise UsageError(f"{path}: it is packed: make it anew by `dump-guest-memory FILE`, without -z, -l, -s or -w")
    if not head.startswith(b"\x7fELF"):
        return [(0, size, 0)]
    try:
        with path.open("rb") as file:
            found = [(int(one["p_paddr"]), int(one["p_filesz"]), int(one["p_offset"]))
                     for one in ELFFile(file).iter_segments() if one["p_type"] == "PT_LOAD"]
    except (ELFError, KeyError, ValueError) as reason:
        raise UsageError(f"{path}: an ELF file that is damaged: {reason}") from None
    if not found or any(offset + length > size for _, length, offset in found):
        raise UsageError(f"{path}: its memory is not whole: the dump was cut off, or the file is no dump")
    return found
