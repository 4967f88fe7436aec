"""One contiguous view of memory that lies in pieces in a file: L1's RAM, in pages of L0's RAM."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from typing import Final

from harness.errors import LaunchFailed
from harness.wire.image import PAGE

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


def view(file: int, size: int, pages: Iterable[tuple[int, int]]) -> memoryview:
    """`size` bytes of memory in which the page at each first number (a multiple of 4096) is the page at the
    second one in `file`; the rest reads as zeros. It is unmapped with the last view of it. Raises LaunchFailed."""
    return of_runs(file, size, _runs(pages))


def of_runs(file: int, size: int, runs: Iterable[tuple[int, int, int]]) -> memoryview:
    """The same of `runs` of pages: where each begins in memory, how many bytes it has, and where it begins in
    `file`. Raises LaunchFailed."""
    whole = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    for start, length, offset in runs:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        got = _libc.mmap(base + start, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset)
        if got == _FAILED:
            raise LaunchFailed(f"cannot map L1's memory: {os.strerror(ctypes.get_errno())}")
    return memoryview(whole)


def _runs(pages: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """Pages that follow each other in both, as one: start, length, offset."""
    start = length = offset = 0
    for at, where in pages:
        if length and (at, where) == (start + length, offset + length):
            length += PAGE
            continue
        if length:
            yield start, length, offset
        start, length, offset = at, PAGE, where
    if length:
        yield start, length, offset
