"""The time-stamp counter of this host, which QEMU's TCG hands on to its guests as it is.

A Linux in such a guest finds out how fast it counts by the emulated timer chip. Where QEMU has to wait for its turn
meanwhile it may find a fraction of that, and its clock runs several times too fast from then on: it, and who runs in
it, has to do with little but timers. So it is told.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Final

_CODE: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret"""
_APART: Final = 0.1
_TRIES: Final = 50


def known() -> list[str]:
    """Words for the command line of a Linux: its TSC's frequency; none where that is not to be had here."""
    found = frequency()
    return [f"tsc_early_khz={found}"] if found else []


@cache
def frequency() -> int:
    """In kHz; 0 where this host has no such counter, or does not let it be read."""
    if platform.machine() != "x86_64":
        return 0
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return 0
    page.write(_CODE)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    first = _moment(read)
    time.sleep(_APART)
    last = _moment(read)
    return round((last[1] - first[1]) * 1_000_000 / (last[0] - first[0]))


def _moment(read: Callable[[], int]) -> tuple[float, int]:
    """The time in nanoseconds, and the counter then: of several tries the one in which the least time passed."""
    tries = []
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        count = read()
        tries.append((time.monotonic_ns() - before, before, count))
    took, before, count = min(tries)
    return before + took / 2, count
