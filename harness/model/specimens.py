"""Small tables in which every access is permitted, for each pair of formats and page sizes, and the same with one
entry changed: what harness.model.universe walks through.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Final, NamedTuple

from harness.model.coverage import reserved
from harness.model.entries import PS, PSE36_SHIFT, RW, US, Format, Level, P, legacy, long_mode, pae
from harness.model.registers import Cpu
from harness.model.walk import Paging


def formats(cpu: Cpu, nxe: bool = True) -> list[Format]:
    """The table formats of one dimension."""
    long = [long_mode(cpu.maxphyaddr, nxe, cpu.page1g, la57) for la57 in (False, True)]
    return [*long, pae(cpu.maxphyaddr, nxe), legacy(cpu.maxphyaddr, True)]


def pairs(cpu: Cpu) -> Iterator[tuple[Format | None, Format | None]]:
    """Every guest format under every nested one, None for paging off, or no nested paging."""
    return product((*formats(cpu), None), (*formats(cpu), None))


def name_of(fmt: Format | None) -> str:
    """As the manual calls it; empty for None."""
    return fmt.name if fmt is not None else ""


class Words(dict[int, int]):
    """Memory by quadword index, zero where nothing was written."""

    def __missing__(self, index: int) -> int:
        return 0

    def put(self, fmt: Format, address: int, entry: int) -> None:
        """Write one entry of a table of `fmt`."""
        mask = (1 << (8 << fmt.entry_shift)) - 1
        shift = (address & 4) * 8
        self[address >> 3] = self[address >> 3] & ~(mask << shift) | (entry & mask) << shift


class Tables(NamedTuple):
    """Tables in which every access is permitted: `words` by index, and the access's gVA."""

    paging: Paging
    words: Words
    gva: int


TABLES: Final = 1 << 30
"""gPA of L2's tables, a page each; the page itself is as far from them as its format and the CPU permit."""
_NESTED_ROOT: Final = 1 << 24


def reserved_bits(fmt: Format, name: str, entry: int) -> Iterator[int]:
    """One bit for each reason for which this entry could be a reserved one."""
    level = next(level for level in fmt.levels if level.name == name)
    told: set[str] = set()
    for bit in range(8 << fmt.entry_shift):
        reasons = reserved(level, entry ^ 1 << bit)
        if len(reasons) == 1 and not reasons <= told:
            told |= reasons
            yield 1 << bit


def changed(words: Words, address: int, entry: int, fmt: Format) -> Words:
    """`words` with another entry at `address`."""
    words = Words(words)
    words.put(fmt, address, entry)
    return words


def leaves(fmt: Format | None) -> list[int]:
    """The shifts of a format's page sizes, the smallest first."""
    return sorted(level.shift for level in fmt.levels if level.leaf) if fmt is not None else [12]


def build(cpu: Cpu, guest: Format | None, nested: Format | None, guest_leaf: int, nested_leaf: int) -> Tables:
    """Identity in the nested dimension; in the guest's, all indices are 2."""
    words = Words()
    width = cpu.maxphyaddr if nested is None or nested.address_bits > 32 else 32
    if guest is None or (guest.entry_shift == 2 and guest_leaf != PSE36_SHIFT):
        width = 32
    elif guest.entry_shift == 2:
        width = min(width, 40)
    page = 1 << width - 1
    gva = page
    used: list[int] = [TABLES]
    if guest is not None:
        gva = sum(2 << level.shift for level in guest.levels)
        for number, level in enumerate(guest.levels):
            at = TABLES + (number << 12)
            used.append(at)
            leaf = level.shift == guest_leaf
            words.put(guest, at + (2 << guest.entry_shift), _entry(level, page if leaf else at + 0x1000, leaf))
            if leaf:
                break
    if nested is not None:
        _identity(words, nested, nested_leaf, [page | gva & (1 << guest_leaf) - 1, *used])
    paging = Paging(guest, TABLES, wp=True, smep=False, smap=False, ac=False, guest_id=True, nested=nested,
                    ncr3=_NESTED_ROOT)
    return Tables(paging, words, gva)


def _identity(words: Words, fmt: Format, leaf_shift: int, used: list[int]) -> None:
    """Nested tables for the gPAs of `used`, from `_NESTED_ROOT` on."""
    tables: dict[int, int] = {}
    for address in used:
        table = _NESTED_ROOT
        for level in fmt.levels:
            at = table + ((address >> level.shift & fmt.index_mask) << fmt.entry_shift)
            if level.shift == leaf_shift:
                words.put(fmt, at, _entry(level, address & ~((1 << leaf_shift) - 1), True))
                break
            if at not in tables:
                tables[at] = _NESTED_ROOT + (len(tables) + 1 << 12)
                words.put(fmt, at, _entry(level, tables[at], False))
            table = tables[at]


def _entry(level: Level, target: int, leaf: bool) -> int:
    """An entry that permits everything, with A and D clear; a PAE PDPTE has no rights."""
    rights = P if level.granted else P | RW | US
    if leaf and level.shift == PSE36_SHIFT:
        target = target & 0xFFC0_0000 | (target >> 32 & 0xFF) << 13
    return target | rights | (PS if leaf and level.shift > 12 else 0)
