"""Page-table entries, and the formats of the tables they stand in (sections 5.3.3 and 5.4.1)."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

P: Final = 1 << 0
RW: Final = 1 << 1
US: Final = 1 << 2
PWT: Final = 1 << 3
PCD: Final = 1 << 4
A: Final = 1 << 5
D: Final = 1 << 6
PS: Final = 1 << 7
G: Final = 1 << 8
PAT_4K: Final = 1 << 7
PAT_LARGE: Final = 1 << 12
NX: Final = 1 << 63

FRAME: Final = 0x000F_FFFF_FFFF_F000
"""Bits 51:12, the widest physical address that an entry can hold."""

BITS: Final[dict[str, int]] = {
    "p": P, "rw": RW, "us": US, "pwt": PWT, "pcd": PCD, "a": A, "d": D, "ps": PS, "g": G,
    "pat": PAT_LARGE, "nx": NX,
} | {f"bit{n}": 1 << n for n in range(64)}
"""Entry bits by name: the vocabulary of scenario files. `bitN` names any bit."""


class Level(NamedTuple):
    """One level of a table format.

    `shift` is the lowest address bit of the index. An entry with a bit of `leaf` set maps a page of
    1 << shift bytes (a PTE always does: its `leaf` is P); else it points to a table. A set bit of
    `reserved_table` or `reserved_leaf` respectively is a reserved-bit fault.
    """

    name: str
    shift: int
    leaf: int
    reserved_table: int
    reserved_leaf: int


class Format(NamedTuple):
    """The tables of one paging mode, root first, and the address bits that they translate."""

    name: str
    levels: tuple[Level, ...]
    address_bits: int


LEVEL_NAMES: Final = ("pte", "pde", "pdpte", "pml4e", "pml5e")
"""Names of entries by height: 0 maps a 4K page."""

PAGE_SHIFTS: Final = {"4K": 12, "2M": 21, "1G": 30}


@lru_cache(maxsize=64)
def long_mode(maxphyaddr: int, nxe: bool, page1g: bool = True) -> Format:
    """The 4-level tables of long mode (section 5.3.3).

    `maxphyaddr` in bits, 32..52; `nxe` is EFER.NXE of the dimension's owner, without which NX is
    reserved (section 5.6.1); `page1g` is CPUID 8000_0001h EDX[26].
    """
    high = FRAME & ~((1 << maxphyaddr) - 1)
    if not nxe:
        high |= NX
    return Format(
        "4-level",
        (
            Level("pml4e", 39, 0, high | PS | G, 0),
            Level("pdpte", 30, PS if page1g else 0, high | (0 if page1g else PS), high | _below(30)),
            Level("pde", 21, PS, high, high | _below(21)),
            Level("pte", 12, P, 0, high),
        ),
        48,
    )


def _below(shift: int) -> int:
    """Frame bits that a page of 1 << shift bytes leaves unused, but for bit 12, its PAT bit."""
    return ((1 << shift) - 1) & FRAME & ~PAT_LARGE
