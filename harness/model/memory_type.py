"""Memory types: what the PAT bits of both dimensions, the MTRRs and CR0.CD make of an access (sections 7.8 and
15.25.8).

An access has a type of its own at each step of a walk: an entry is read with the type that the entry above
it, or CR3, gives to its table; the page itself has that of the two leaves. A guest's type comes from gPAT, a
nested one from L1's PAT; together they make one by table 15-19, and that one and the MTRR's the effective one by
table 15-20 (which has table 7-11 in it). The MTRRs are L0's: the model is told what they say.

This is computed, and compared with nothing. A type changes how long an access takes, and what another
processor or a device sees of it; no machine here shows either: QEMU has no caches, and KVM folds L1's types
into its own tables. Silicon would: a timed loop over pages of both kinds, or a device that does not snoop.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from harness.model.access import Reached
from harness.model.entries import PAT_4K, PAT_LARGE, PCD, PWT, Format
from harness.model.walk import GUEST, Paging, Walk

UC: Final = "UC"
UC_MINUS: Final = "UC-"
WC: Final = "WC"
WC_PLUS: Final = "WC+"
WP: Final = "WP"
WT: Final = "WT"
WB: Final = "WB"
CD: Final = "CD"

_ENCODED: Final = {0: UC, 1: WC, 4: WT, 5: WP, 6: WB, 7: UC_MINUS}  # table 7-9
_CACHEABLE: Final = (WP, WT, WB)  # table 7-3

_HOST_TYPES: Final = (UC, UC_MINUS, WC, WP, WT, WB)
_COMBINED: Final = {  # table 15-19: by the guest's type, for each of _HOST_TYPES
    UC: (UC, UC, UC, UC, UC, UC),
    UC_MINUS: (UC, UC_MINUS, WC, UC, UC, UC),
    WC: (WC, WC, WC, WC_PLUS, WC_PLUS, WC_PLUS),
    WP: (UC, UC, UC, WP, UC, WP),
    WT: (UC, UC, UC, UC, WT, WT),
    WB: (UC, UC, WC, WP, WT, WB),
}

MTRR_TYPES: Final = (UC, WC, WP, WT, WB)
_EFFECTIVE: Final = {  # table 15-20: by the PAT type, for each of MTRR_TYPES
    UC: (UC, CD, CD, CD, CD),
    UC_MINUS: (UC, WC, CD, CD, CD),
    WC: (WC, WC, WC, WC, WC),
    WC_PLUS: (WC, WC, WC_PLUS, WC_PLUS, WC_PLUS),
    WP: (UC, CD, WP, CD, WP),
    WT: (UC, CD, CD, WT, WT),
    WB: (UC, WC, WP, WT, WB),
}


class Caching(NamedTuple):
    """What decides over memory types beside the tables. `guest_pat` is gPAT, or the one PAT that there is
    without nested paging; `disabled` whether a CR0.CD that is in force is 1; `mtrr` the type that the MTRRs give to
    all of L1's memory, WB where firmware has set it up."""

    guest_pat: int
    host_pat: int
    disabled: bool
    mtrr: str = WB


def of_index(pat: int, index: int) -> str:
    """Rule type.pat: the type in field `index` (0 to 7) of a PAT register (section 7.8.1). Raises KeyError for an
    illegal one."""
    return _ENCODED[pat >> 8 * index & 0xFF]


def index_of_table(above: int) -> int:
    """The PAT index of a table, by the entry that points to it or by CR3 (7.8.4): there is no PAT bit in those."""
    return (above & (PCD | PWT)) // PWT


def index_of_page(leaf: int, shift: int) -> int:
    """The PAT index of a page of 1 << `shift` bytes (7.8.2): its PAT bit is 7 in a PTE, 12 in a larger one's entry."""
    return index_of_table(leaf) | (4 if leaf & (PAT_4K if shift == 12 else PAT_LARGE) else 0)


def combine(guest: str, host: str) -> str:
    """Rule type.combined: table 15-19."""
    return _COMBINED[guest][_HOST_TYPES.index(host)]


def with_mtrr(pat: str, mtrr: str) -> str:
    """Rule type.mtrr: table 15-20; where `pat` is of one dimension, table 7-11."""
    return _EFFECTIVE[pat][MTRR_TYPES.index(mtrr)]


def effective(pat: str, caching: Caching) -> str:
    """With the MTRRs; rule type.disabled: with caches disabled cacheable memory is of type CD (section 7.4)."""
    found = with_mtrr(pat, caching.mtrr)
    return CD if caching.disabled and found in _CACHEABLE else found


def of_walk(paging: Paging, caching: Caching, walk: Walk) -> tuple[str, ...]:
    """The effective type of each reference of `walk`, in the order of its steps; and behind them, if it was
    reached, that of the page itself. Raises KeyError for a PAT that VMRUN refuses."""
    found: list[str] = []
    guest_type = nested_type = WB  # what one dimension leaves open is the other's to say
    guest_above = nested_above = 0
    for dimension, name, _, _, entry in walk.trail:
        fmt = paging.guest if dimension == GUEST else paging.nested
        assert fmt is not None
        root = name == fmt.levels[0].name
        if dimension == GUEST:
            guest_type = of_index(caching.guest_pat, index_of_table(paging.gcr3 if root else guest_above))
            found.append(effective(combine(guest_type, nested_type) if paging.nested else guest_type, caching))
            guest_above, guest_type = entry, _of_what_it_maps(fmt, name, entry, caching.guest_pat)
        else:
            table = of_index(caching.host_pat, index_of_table(paging.ncr3 if root else nested_above))
            found.append(effective(table, caching))
            nested_above, nested_type = entry, _of_what_it_maps(fmt, name, entry, caching.host_pat)
    if isinstance(walk.outcome, Reached):
        found.append(effective(combine(guest_type, nested_type) if paging.nested else guest_type, caching))
    return tuple(found)


def _of_what_it_maps(fmt: Format, name: str, entry: int, pat: int) -> str:
    """The type that an entry of level `name` gives to its page, or to its table."""
    level = next(level for level in fmt.levels if level.name == name)
    return of_index(pat, index_of_page(entry, level.shift) if entry & level.leaf else index_of_table(entry))
