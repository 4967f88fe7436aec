"""Accessed and dirty bits: which of them a walk sets (sections 5.4.1 and 15.25.5).

A walk names the bits; this module says which of them the machine must have set, which it may have,
and writes them back. The manual leaves room only where a walk faults, and each kind of room has a
name here, so that a machine's profile can say what that machine does with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from harness.model.liberties import Liberties, Takes
from harness.model.memory import Words

NESTED_TABLE: Final = "nested"
"""The nested entry served a nested walk that ended well."""
CUT: Final = "cut"
"""The nested entry served the nested walk that faulted, further down."""
TABLE: Final = "table"
"""The guest's entry led to a table."""
PAGE: Final = "page"
"""The guest's entry is its leaf: it led to the page that the access is for."""

Update = tuple[int, int, str]
"""sPA of an entry, the bits to set, and what the entry was used for: one of the four above."""


def resolve(
    updates: Iterable[Update], faulted: bool, liberties: Liberties, other_faulted: bool = False
) -> tuple[list[Update], list[Update]]:
    """What a walk's `updates` come to on a machine that takes `liberties`: those that must be there
    now, and those that may be. `faulted` says that the walk did not reach its page, `other_faulted` that
    it did, but the access was not made for the sake of its other page."""
    if other_faulted and liberties.other_page is not Takes.ALWAYS:
        return [], list(updates) if liberties.other_page is Takes.SOMETIMES else []
    if not faulted:
        return list(updates), []
    room = {CUT: liberties.nested_cut, TABLE: liberties.guest_cut, PAGE: liberties.page_not_reached}
    required: list[Update] = []
    permitted: list[Update] = []
    for update in updates:
        takes = room.get(update[2], Takes.ALWAYS)
        if takes is Takes.ALWAYS:
            required.append(update)
        elif takes is Takes.SOMETIMES:
            permitted.append(update)
    return required, permitted


def write_back(ram: Words, updates: Iterable[Update]) -> dict[int, int]:
    """Set the bits of `updates` in `ram`; returns the old values of the quadwords that changed, by sPA."""
    changed: dict[int, int] = {}
    for address, bits, _ in updates:
        old = ram[address >> 3]
        new = old | bits << (address & 4) * 8
        if new != old:
            changed.setdefault(address & ~7, old)
            ram[address >> 3] = new
    return changed
