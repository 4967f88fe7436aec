"""Where a foreign L1 has VMRUN instructions: in its ELF file, and in memory by its own page tables. No symbols.

The bytes alone prove nothing: data may have them. Whether a place is one is seen when a processor stops there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from harness.model.entries import FRAME, NX, PSE36_SHIFT, Format, P
from harness.model.memory import Words
from harness.model.registers import CR0, Cpu
from harness.model.vmrun import table_format

VMRUN: Final = b"\x0f\x01\xd8"
LENGTH: Final = len(VMRUN)

_EXECUTABLE: Final = 1
_CHUNK: Final = 4 << 20


class Mapped(NamedTuple):
    """A page, of any size, that may be executed: where it begins, to L1 and in memory."""

    virtual: int
    physical: int
    size: int


def in_elf(path: Path) -> set[int]:
    """Addresses of VMRUNs in the executable segments of an ELF file, by virtual and by physical address; empty for any
    other file."""
    found: set[int] = set()
    try:
        with path.open("rb") as file:
            for segment in ELFFile(file).iter_segments():
                if segment["p_type"] == "PT_LOAD" and segment["p_flags"] & _EXECUTABLE:
                    for at in _find(segment.data()):
                        found |= {segment["p_vaddr"] + at, segment["p_paddr"] + at}
    except (ELFError, ValueError, KeyError, OSError):
        return set()
    return found


def in_memory(file: int, size: int) -> Iterator[int]:
    """sPAs of VMRUN's bytes in a file that is a machine's RAM; what was never written is not looked at."""
    at = 0
    while at < size:
        try:
            at = os.lseek(file, at, os.SEEK_DATA)
            end = os.lseek(file, at, os.SEEK_HOLE)
        except OSError:  # ENXIO: there is nothing more
            return
        while at < end:
            data = os.pread(file, min(_CHUNK + LENGTH - 1, end - at), at)
            yield from (at + offset for offset in _find(data))
            at += _CHUNK
        at = end


def to_l1(physical: Iterable[int], words: Words, cr0: int, cr3: int, cr4: int, efer: int, cpu: Cpu) -> set[int]:
    """The virtual addresses at which L1, with these registers, can execute what is at those sPAs."""
    physical = sorted(physical)
    fmt = table_format(cr0, cr4, efer, cpu) if cr0 & CR0.PG else None
    if fmt is None:
        return {at for at in physical if at < 1 << 32}
    found = set()
    for page in executable(words, fmt, cr3) if physical else ():
        found |= {page.virtual + at - page.physical for at in physical if 0 <= at - page.physical < page.size}
    return found


def executable(words: Words, fmt: Format, cr3: int) -> Iterator[Mapped]:
    """All pages of these tables that may be executed."""
    short = fmt.entry_shift == 2
    top = 1 << fmt.address_bits - 1
    left = [(cr3 & fmt.root_mask, 0, 0)]
    while left:
        table, depth, base = left.pop()
        level = fmt.levels[depth]
        count = 1 << min(fmt.address_bits - level.shift, fmt.index_mask.bit_length())
        for index in range(count):
            address = table + (index << fmt.entry_shift)
            try:
                entry = words[address >> 3]
            except IndexError:
                break
            if short:
                entry = entry >> (address & 4) * 8 & 0xFFFF_FFFF
            if not entry & P or entry & NX:
                continue
            virtual = base | index << level.shift
            if not entry & level.leaf:
                left.append((entry & FRAME, depth + 1, virtual))
                continue
            frame = entry & FRAME & ~((1 << level.shift) - 1)
            if level.shift == PSE36_SHIFT:
                frame |= (entry >> 13 & 0xFF) << 32
            wide = fmt.address_bits > 32 and virtual & top
            yield Mapped(virtual | (1 << 64) - 2 * top if wide else virtual, frame, 1 << level.shift)


def _find(data: bytes) -> Iterator[int]:
    at = data.find(VMRUN)
    while at >= 0:
        yield at
        at = data.find(VMRUN, at + 1)
