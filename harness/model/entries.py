"""Page-table entries, and the formats of the tables they stand in (sections 5.3.3 and 5.4.1)."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple, Self

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
KEY_SHIFT: Final = 59
"""Bits 62:59 of a long-mode leaf are its protection key, while CR4.PKE is 1 (section 5.6.7)."""
NX: Final = 1 << 63

FRAME: Final = 0x000F_FFFF_FFFF_F000
"""Bits 51:12, the widest physical address that an entry can hold."""

OPEN: Final = P | RW | US
"""What an entry has that is present and grants all rights that are granted by 1; NX, which is granted by 0, is not
among them."""

BITS: Final[dict[str, int]] = {
    "p": P, "rw": RW, "us": US, "pwt": PWT, "pcd": PCD, "a": A, "d": D, "ps": PS, "g": G,
    "pat": PAT_LARGE, "nx": NX,
} | {f"bit{n}": 1 << n for n in range(64)}
"""Entry bits by name: the vocabulary of scenario files. `bitN` names any bit."""


class Level(NamedTuple):
    """One level of a table format.

    `shift` is the lowest address bit of the index. An entry with a bit of `leaf` set maps a page of
    1 << shift bytes (a PTE always does: its `leaf` is P); else it points to a table. A set bit of
    `reserved_table` or `reserved_leaf` respectively is a reserved-bit fault. `granted` are the rights
    that the entry does not decide over, `accessed` the bit that use of it as a pointer sets. `plain` are
    the bits of which an entry has those of OPEN alone if it points to a table, with nothing wrong with it and no
    right withheld: most entries are that, and the walk asks one question of them. 0 is always right: it then asks
    them all. `down` is how far an address is shifted for the index to count bytes.
    """

    name: str
    shift: int
    leaf: int
    reserved_table: int
    reserved_leaf: int
    granted: int = 0
    accessed: int = A
    plain: int = 0
    down: int = 0


class Format(NamedTuple):
    """The tables of one paging mode, root first.

    `address_bits` of an address are translated. Entries have 1 << `entry_shift` bytes; `index_mask`
    is of one table; `root_mask` are the bits of CR3 that locate the root.
    """

    name: str
    levels: tuple[Level, ...]
    address_bits: int
    entry_shift: int = 3
    index_mask: int = 0x1FF
    root_mask: int = FRAME

    @classmethod
    def of(cls, name: str, levels: tuple[Level, ...], address_bits: int, entry_shift: int = 3, **shape: int) -> Self:
        """A format of these levels, with their `plain` and `down` filled in."""
        plain = (0 if level.leaf == P or level.reserved_table & OPEN else OPEN | NX | level.leaf | level.reserved_table
                 for level in levels)
        filled = (level._replace(plain=bits, down=level.shift - entry_shift)
                  for level, bits in zip(levels, plain, strict=True))
        return cls(name, tuple(filled), address_bits, entry_shift, **shape)


LEVEL_NAMES: Final = ("pte", "pde", "pdpte", "pml4e", "pml5e")
"""Names of entries by height: 0 maps a 4K page."""

PAGE_SHIFTS: Final = {"4K": 12, "2M": 21, "4M": 22, "1G": 30}

PSE36_SHIFT: Final = 22
"""The size of legacy mode's large page, whose entry holds address bits 39:32 in its bits 20:13."""

ALL_RIGHTS: Final = (1 << 64) - 1


def _high(maxphyaddr: int, nxe: bool) -> int:
    """Reserved in every entry of eight bytes: frame bits that the CPU has not, and NX without NXE."""
    return FRAME & ~((1 << maxphyaddr) - 1) | (0 if nxe else NX)


@lru_cache(maxsize=64)
def long_mode(maxphyaddr: int, nxe: bool, page1g: bool = True, la57: bool = False) -> Format:
    """The tables of long mode, of four levels or, with CR4.LA57, of five (section 5.3.3).

    `maxphyaddr` in bits, 32..52; `nxe` is EFER.NXE of the dimension's owner, without which NX is
    reserved (section 5.6.3); `page1g` is CPUID 8000_0001h EDX[26].
    """
    high = _high(maxphyaddr, nxe)
    top = Level("pml5e", 48, 0, high | PS | G, 0)
    levels = (
        Level("pml4e", 39, 0, high | PS | G, 0),
        Level("pdpte", 30, PS if page1g else 0, high | (0 if page1g else PS), high | _below(30)),
        Level("pde", 21, PS, high, high | _below(21)),
        Level("pte", 12, P, 0, high),
    )
    return Format.of("5-level", (top, *levels), 57) if la57 else Format.of("4-level", levels, 48)


@lru_cache(maxsize=64)
def pae(maxphyaddr: int, nxe: bool) -> Format:
    """The tables of legacy PAE mode (section 5.2.3). PDPTEs have no rights and no accessed bit; under
    nested paging they are read like any other entry (section 15.25.10)."""
    high = _high(maxphyaddr, nxe) | 0x7FF << 52 & ~FRAME & ~NX
    return Format.of(
        "PAE",
        (
            Level("pdpte", 30, 0, high | NX | 0x1E6, 0, ALL_RIGHTS, 0),
            Level("pde", 21, PS, high, high | _below(21)),
            Level("pte", 12, P, 0, high),
        ),
        32,
        root_mask=0xFFFF_FFE0,
    )


@lru_cache(maxsize=64)
def legacy(maxphyaddr: int, pse: bool) -> Format:
    """The two levels of 32-bit entries of legacy mode without PAE (section 5.2.2); `pse` is CR4.PSE,
    without which there are no 4M pages. Bits 20:13 of a 4M entry are address bits 39:32 (PSE-36)."""
    beyond = 0x1F_E000 & ~((1 << max(0, min(maxphyaddr, 40) - 32)) - 1 << 13)
    return Format.of(
        "32-bit",
        (
            Level("pde", 22, PS if pse else 0, 0, 1 << 21 | beyond),
            Level("pte", 12, P, 0, 0),
        ),
        32,
        entry_shift=2,
        index_mask=0x3FF,
        root_mask=0xFFFF_F000,
    )


def _below(shift: int) -> int:
    """Frame bits that a page of 1 << shift bytes leaves unused, but for bit 12, its PAT bit."""
    return ((1 << shift) - 1) & FRAME & ~PAT_LARGE
