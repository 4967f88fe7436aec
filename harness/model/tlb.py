"""The TLB: in which ways an access may be translated other than by the tables as they are (sections 5.5 and 15.16).

This simulates no TLB. It keeps a log of what happened since all was last flushed, and reads from it which
translations a processor may still have:

    moment       a point in the log at which a guest ran: what the tables held then may have been loaded
    translation  gVA to sPA, whole: loaded at one moment, and gone with the next flush that covers it
    piece        an entry of an upper level of the guest's tables, or a nested translation: may have been loaded
                 earlier than the translation that was made with it, and be used once more after that is gone

A processor loads what it likes of "any linear address for which valid entries exist" (5.5.3), so it does not matter
what the guest accessed. What it cannot have is what no table held while that guest ran, what is not present, what
has A=0 (5.4.2), for a write what has D=0, and what would fault: a fault is confirmed by a walk of the tables as they
are (5.5.3). So where that reaches a page `Tlb.stale` only yields walks that reach one too; where it faults, the walk
that found the fault may have come there by old pieces. The walk by the tables as they are (`harness.model.walk`) is
always permitted beside them. At first reading leave this module out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from harness.model.access import Access, Reached
from harness.model.entries import FRAME, PS, P
from harness.model.liberties import WIDEST, Caches
from harness.model.memory import Words
from harness.model.tlb_events import ASID, CONTROL, UPGRADE, VMRUN, Event, Flushed, Ran, Wrote
from harness.model.tlb_search import Moment, Search, Shared, over_vmrun, running
from harness.model.walk import GUEST, NESTED, Walk, translate

Mark = tuple[list[Event], int, bool, int]

_LEADS: Final = FRAME | PS
"""Bits of an entry that say where it leads."""
_LEADS_SHORT: Final = (0xFFFF_F000 | PS | P) * 0x1_0000_0001 | _LEADS
"""The same of a quadword where some have two entries of 32 bits; and P, since one may lead on and the other not."""


class Tlb:
    """What one processor's TLB may hold, by `log`: what happened since all was last flushed. `past` is what happened
    before."""

    def __init__(self) -> None:
        self.log: list[Event] = []
        self.past: list[Event] = []
        self.changed = False
        """Whether anything in the log may make a translation come out otherwise than by the tables as they are."""

    def forget(self) -> None:
        """Begin anew: nothing ran that matters."""
        self.log, self.past, self.changed = [], [], False

    def mark(self) -> Mark:
        """What `rewind` goes back to."""
        return self.log, len(self.log), self.changed, len(self.past)

    def rewind(self, mark: Mark) -> None:
        """Forget what came behind `mark`."""
        self.log, length, self.changed, past = mark
        del self.log[length:], self.past[past:]

    def vmrun(self, control: int, asid: int) -> None:
        """VMRUN with TLB_CONTROL (table 15-9); a reserved encoding is taken for 0."""
        if control == 1:
            self.past += self.log
            self.log, self.changed = [], False
        elif control in (3, 7) and self.log:
            self.log.append(Flushed(CONTROL, asid, keeps_global=control == 7, nested=True))

    def add(self, event: Event) -> None:
        """Note an event; nothing is of interest before a guest ran."""
        if self.log:
            self.log.append(event)
            self.changed |= type(event) is Wrote or (type(event) is Ran and _differs(event, self.log[0]))
        elif type(event) is Ran:
            self.log.append(event)
        elif self.past:
            self.past.append(event)

    def stale(self, words: Words, gva: int, access: Access, fresh: Walk, caches: Caches = WIDEST) -> list[Walk]:
        """The walks that `access` to `gva` may make, beside `fresh`, the one by the tables as they are in
        `words`, on a machine with such `caches`. Their `updates` are the bits to set in entries that were not
        cached. Each that comes to something else, outcome or bits, is there once."""
        found = {_effect(words, fresh): fresh}
        for search in self._searches(words, gva, fresh, caches):
            for walk in search.walks(gva, access):
                found.setdefault(_effect(words, walk), walk)
            if UPGRADE in caches.ignores:
                walk = translate(search.paging, _Snapshot(search.log, search.load, words), gva, access)
                found.setdefault(_effect(words, walk), walk)
        return list(found.values())[1:]

    def parts(self, gva: int, fresh: Walk, caches: Caches = WIDEST) -> bool:
        """Whether `stale` has to look for other walks than `fresh` at all: none, often, is plain at once."""
        return bool(self.changed or caches.ignores) and _parts(self._as_seen_by(caches), gva, fresh, caches)

    def differs(self, words: Words, gva: int, access: Access, fresh: Walk) -> bool:
        """Whether any processor may end the access otherwise than `fresh` does: in another fault or, where that reaches
        a page, in another page."""
        if not self.changed:
            return False
        reached = fresh.outcome.spa if isinstance(fresh.outcome, Reached) else None
        if reached is not None and self._leads_on(words, fresh):
            return False
        return any(
            walk.outcome != fresh.outcome if reached is None else
            isinstance(walk.outcome, Reached) and walk.outcome.spa != reached
            for search in self._searches(words, gva, fresh, WIDEST)
            for walk in search.walks(gva, access, reached)
        )

    def _leads_on(self, words: Words, fresh: Walk) -> bool:
        """Whether every entry of `fresh` always led to where it leads now, if anywhere: then all old ones do."""
        first = self.log[0]
        assert type(first) is Ran
        short = any(fmt is not None and fmt.entry_shift == 2 for fmt in (first.paging.guest, first.paging.nested))
        read = {step[3] & ~7 for step in fresh.trail}
        for event in self.log:
            if type(event) is Wrote:
                if event.address in read:
                    changed = event.old ^ words[event.address >> 3]
                    if changed & _LEADS_SHORT if short else event.old & P and changed & _LEADS:
                        return False
            elif type(event) is Ran and _differs(event, first):
                return False
        return True

    def _searches(self, words: Words, gva: int, fresh: Walk, caches: Caches) -> Iterator[Search]:
        """Where to look for other walks than `fresh`: what may have been loaded at each moment."""
        if not self.parts(gva, fresh, caches):
            return
        log = self._as_seen_by(caches)
        writes: dict[int, list[tuple[int, int]]] = {}
        for place, event in enumerate(log):
            if type(event) is Wrote:
                writes.setdefault(event.address, []).append((place, event.old))
        moments = list(running(log))
        shared = Shared(writes, words)
        faults = not isinstance(fresh.outcome, Reached)
        for load in _loads(log, moments, caches):
            yield Search(log, writes, moments, load, words, caches, faults, shared)

    def rules(self) -> list[str]:
        """The rules that may be broken where a machine uses what it should not have any more."""
        events = [*self.past, *self.log]
        if not self.changed and not any(type(event) is Wrote for event in events):
            return []
        rules = [event.by for event in events if type(event) is Flushed]
        rules += [CONTROL] if self.past else []
        rules += [ASID] if len({event.asid for event in events if type(event) is Ran}) > 1 else []
        return [*dict.fromkeys(rules), VMRUN, UPGRADE]

    def _as_seen_by(self, caches: Caches) -> list[Event]:
        """The log of a machine that breaks rules."""
        ignores = caches.ignores
        if not ignores:
            return self.log
        log = [*(self.past if CONTROL in ignores else ()), *self.log]
        if ASID in ignores:
            log = [event._replace(asid=0) if isinstance(event, Ran | Flushed) else event for event in log]
        return [event for event in log if type(event) is not Flushed or event.by not in ignores]


def _parts(log: list[Event], gva: int, fresh: Walk, caches: Caches) -> bool:
    """Whether ways may part from `fresh`: at an entry that was written since what led to it was flushed, or at the
    root."""
    since = 0 if over_vmrun(caches) else max(
        place for place, event in enumerate(log) if type(event) is Ran and event.by_vmrun)
    guest = nested = since
    first, wrote = log[since], []
    assert type(first) is Ran
    for place in range(since + 1, len(log)):
        event = log[place]
        if type(event) is Wrote:
            wrote.append((place, event.address))
        elif type(event) is Flushed:
            whole = not event.keeps_global if event.gva is None else event.gva >> 12 == gva >> 12 and not event.narrow
            if whole and event.asid == first.asid and event.pcid in (None, first.pcid):
                guest = place
                nested = place if event.nested else nested
        elif type(event) is Ran and _differs(event, first):
            return True
    if not wrote:
        return False
    floors = {step[3] & ~7: guest for step in fresh.trail if step[0] is GUEST}
    floors |= {step[3] & ~7: nested for step in fresh.trail if step[0] is NESTED}
    return any(address in floors and place > floors[address] for place, address in wrote)


def _differs(one: Event, other: Event) -> bool:
    """Whether a guest is translated for otherwise, as far as that outlives the moment: what L2 itself does to its
    controls (CR0.WP and the like) holds at once for all that is cached."""
    assert type(one) is Ran and type(other) is Ran
    if one.paging is other.paging or one.paging == other.paging:
        return one[0::3] != other[0::3]  # ASID, PCID
    return one.by_vmrun or one.asid != other.asid or one.paging[:2] + one.paging[7:9] != (
        other.paging[:2] + other.paging[7:9])


def _effect(words: Words, walk: Walk) -> object:
    """What a walk comes to: its outcome, and the bits that it sets and that were not set."""
    return walk.outcome, frozenset(
        (at, bits & ~(words[at >> 3] >> (at & 4) * 8)) for at, bits, _ in walk.updates
    ) - {(at, 0) for at, _, _ in walk.updates}


def _loads(log: list[Event], moments: list[Moment], caches: Caches) -> list[int]:
    """The moments at which a translation may have been loaded that the guest that runs now can use."""
    asid, oldest = moments[-1][1].asid, 0
    kept = over_vmrun(caches)
    for place, event in enumerate(log):
        if type(event) is Flushed:
            if event.asid == asid and event.gva is None and not event.keeps_global and event.pcid is None:
                oldest = place
        elif type(event) is Ran and event.by_vmrun and not kept:
            oldest = place
    return [place for place, ran in moments if ran.asid == asid and place >= oldest]


class _Snapshot:
    """Memory as it was at a moment."""

    def __init__(self, log: list[Event], moment: int, words: Words) -> None:
        self._words = words
        self._old: dict[int, int] = {}
        for event in log[moment + 1 :]:
            if type(event) is Wrote:
                self._old.setdefault(event.address >> 3, event.old)

    def __getitem__(self, index: int) -> int:
        return self._old[index] if index in self._old else self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        raise TypeError("what was is not written to")
