"""What the manual leaves to the machine, by name: a machine's profile says what it makes of each."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple


class Takes(Enum):
    """What a machine does with a liberty over accessed and dirty bits."""

    ALWAYS = "always"
    SOMETIMES = "sometimes"
    NEVER = "never"


class Caches(NamedTuple):
    """What a machine's TLB is like; the default is the widest that the manual permits."""

    upper: bool = True
    """It keeps upper-level entries of the guest's tables by themselves."""
    nested: bool = True
    """It keeps nested translations by themselves."""
    over_vmrun: bool = True
    """What it holds outlives VMRUN and #VMEXIT, where TLB_CONTROL does not flush it."""
    ignores: frozenset[str] = frozenset()
    """Rules that it breaks: flushes that it does not do, and whether it tells ASIDs apart. No machine's profile has
    any; it is how a machine that breaks one is found out."""


WIDEST: Final = Caches()


class Liberties(NamedTuple):
    """What a machine makes of the room that the manual leaves; the default is the widest. All but `caches` is about
    walks that fault. There is no room for nested walks that ended well: those of the guest's tables set their bits
    before the guest's entries are looked at (section 15.25.6, steps 1 and 2).

    `nested_cut`: bits of the entries that a nested walk used before it faulted itself.
    `guest_cut`: bits of the guest's table entries, where the walk faults further down in either dimension.
    `page_not_reached`: bits of the guest's leaf entry when the nested walk of the page itself faults.
    `other_page`: all bits of one page's walk, where an access touches two and the other one faults.
    `speculates`: it also sets accessed bits of entries that no access needs, since it may walk the guest's tables for
    one that is never made (section 5.4.2).
    `caches`: what is held of translations that were changed since (see harness.model.tlb).
    """

    nested_cut: Takes = Takes.SOMETIMES
    guest_cut: Takes = Takes.SOMETIMES
    page_not_reached: Takes = Takes.SOMETIMES
    other_page: Takes = Takes.SOMETIMES
    caches: Caches = WIDEST
    speculates: bool = False

    @classmethod
    def each(cls, takes: Takes, caches: Caches = WIDEST) -> Liberties:
        """The same for all walks that fault."""
        return cls(takes, takes, takes, takes, caches)
