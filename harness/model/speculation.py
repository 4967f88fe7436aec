"""Accessed bits of accesses that are never made (section 5.4.2).

"The Accessed bit may be set by instructions in a mispredicted branch path even though those instructions are never
retired." So a processor that runs ahead may set A in any present entry that the guest's tables lead to, whatever the
guest does; D it may not ("the Dirty bit is not updated speculatively"). At first reading leave this module out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from harness.model.access import Access
from harness.model.entries import FRAME, A, Format, P
from harness.model.memory import Words
from harness.model.walk import Fault, Paging, walk_nested

_TABLE: Final = 4096
_TABLE_ACCESS: Final = Access(write=True, user=True)


def may_be_set(paging: Paging, ram: Words, old: Mapping[int, int]) -> dict[int, int]:
    """The bits that may be set without any access, by the quadword (sPA) that they are in. `old` has what entries held,
    by quadword, that have changed while the guest ran: they lead to where they led."""
    found: dict[int, int] = {}
    if paging.guest is not None:
        for address, bit in _reachable(paging, paging.guest, ram, old):
            found[address & ~7] = found.get(address & ~7, 0) | bit << (address & 4) * 8
    return found


def _reachable(paging: Paging, fmt: Format, ram: Words, old: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Each present entry, by its sPA, that some address leads to, and its accessed bit."""
    size = 1 << fmt.entry_shift
    tables = {paging.gcr3 & fmt.root_mask}
    for level in fmt.levels:
        below: set[int] = set()
        for table in tables:
            start = _spa(paging, table, ram)
            if start is None:
                continue
            for address in range(start, start + (fmt.index_mask + 1) * size, size):
                for entry in _versions(address, size, ram, old):
                    if entry & P:
                        leaf = entry & level.leaf
                        yield address, A if leaf else level.accessed
                        if not leaf and not entry & level.reserved_table:
                            below.add(entry & FRAME)
        tables = below


def _versions(address: int, size: int, ram: Words, old: Mapping[int, int]) -> Iterator[int]:
    quadword = address & ~7
    for value in (ram[quadword >> 3], old.get(quadword, 0)):
        yield value if size == 8 else value >> (address & 4) * 8 & 0xFFFF_FFFF


def _spa(paging: Paging, table: int, ram: Words) -> int | None:
    """Where the table at that gPA lies, if the guest can use it."""
    try:
        spa = table
        if paging.nested is not None:
            spa = walk_nested(paging, paging.nested, ram, table, _TABLE_ACCESS, "", [], [])
        ram[spa + _TABLE - 8 >> 3]
    except (Fault, IndexError):
        return None
    return spa
