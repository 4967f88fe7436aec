"""Accessed and dirty bits: which of them a walk sets (sections 5.4.1 and 15.25.5).

A walk names the bits; this module says which of them the machine must have set, which it may have,
and writes them back. The manual leaves room only where a walk faults, and each kind of room has a
name here, so that a machine's profile can say what that machine does with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Final, NamedTuple

from harness.model.memory import Words

TABLE: Final = 0
"""The entry led to a table (or is the nested leaf of a page) that was read or written."""
PAGE: Final = 1
"""The entry is the guest's leaf: it led to the page that the access is for."""

Update = tuple[int, int, int]
"""sPA of an entry, the bits to set, and TABLE or PAGE."""


class Takes(Enum):
    """What a machine does with a liberty."""

    ALWAYS = "always"
    SOMETIMES = "sometimes"
    NEVER = "never"


class Liberties(NamedTuple):
    """What a machine makes of the room that the manual leaves; the default is the widest.

    `walk_faulted`: bits of entries that were used before the walk faulted further down.
    `page_not_reached`: bits of the guest's leaf entry when the nested walk of the page itself faults.
    `other_page`: all bits of one page's walk, where an access touches two and the other one faults.
    """

    walk_faulted: Takes = Takes.SOMETIMES
    page_not_reached: Takes = Takes.SOMETIMES
    other_page: Takes = Takes.SOMETIMES


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
    required: list[Update] = []
    permitted: list[Update] = []
    for update in updates:
        takes = liberties.page_not_reached if update[2] == PAGE else liberties.walk_faulted
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
