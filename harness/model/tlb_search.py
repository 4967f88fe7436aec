"""The search for translations that a TLB may hold: ways through entries as they were at some moment. What is held, and
what is not any more, is explained in harness.model.tlb; this is its other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from harness.model.access import Access, Reached
from harness.model.entries import FRAME, PSE36_SHIFT, A, D, Format, G, Level, P
from harness.model.liberties import Caches
from harness.model.memory import Words
from harness.model.tlb_events import CONTROL, VMRUN, Event, Flushed, Left, Ran
from harness.model.walk import Paging, Walk, translate

Moment = tuple[int, Ran]
"""A place in the log, and as what a guest runs behind it."""


_Read = tuple[int, int, bool]
"""An entry that a walk read, or that a TLB held: its sPA, the whole quadword, and whether it is as in memory now."""


def running(log: list[Event]) -> Iterator[Moment]:
    """All moments."""
    ran: Ran | None = None
    for place, event in enumerate(log):
        if type(event) is Ran:
            ran = event
        elif type(event) is Left:
            ran = None
        if ran is not None:
            yield place, ran


def over_vmrun(caches: Caches) -> bool:
    """Whether what is held outlives VMRUN."""
    return caches.over_vmrun or not caches.ignores.isdisjoint((VMRUN, CONTROL))


class _Way(NamedTuple):
    """One through L1's nested table; `complete` if all entries have the bits that may be cached."""

    reads: tuple[_Read, ...]
    spa: int
    complete: bool


class Shared:
    """What the searches of all loads have in common."""

    def __init__(self, writes: Mapping[int, object], words: Words) -> None:
        self._writes, self._words = writes, words
        self._known: dict[tuple[int, int, int, bool], _Way | None] = {}
        self._pagings: list[Paging] = []
        self._replayed: set[tuple[int, bool, tuple[_Read, ...]]] = set()

    def is_first(self, paging: Paging, reads: tuple[_Read, ...], faults: bool) -> bool:
        """Whether no search asked before what comes of these entries."""
        if paging not in self._pagings:
            self._pagings.append(paging)
        key = self._pagings.index(paging), faults, reads
        if key in self._replayed:
            return False
        self._replayed.add(key)
        return True

    # Nested walks that meet no entry that was written: there is one way, at all moments. Most are like that, and are
    # walked once for all loads. This is `Search._nested_level` where nothing parts.

    def way(self, fmt: Format, ncr3: int, gpa: int, write: bool) -> _Way | None:
        """The one way of `gpa`, or None where there may be more, or none."""
        key = id(fmt), ncr3, gpa, write  # a format is many numbers, and the log keeps it
        if key not in self._known:
            self._known[key] = self._walk(fmt, ncr3 & fmt.root_mask, gpa, write)
        return self._known[key]

    def _walk(self, fmt: Format, table: int, gpa: int, write: bool) -> _Way | None:
        reads, complete = [], True
        for level in fmt.levels:
            address = table + ((gpa >> level.shift & fmt.index_mask) << fmt.entry_shift)
            if address & ~7 in self._writes:
                return None
            try:
                quadword = self._words[address >> 3]
            except IndexError:
                return None
            entry = quadword if fmt.entry_shift == 3 else quadword >> (address & 4) * 8 & 0xFFFF_FFFF
            reads.append((address, quadword, True))
            leaf = entry & level.leaf
            if not entry & P or entry & (level.reserved_leaf if leaf else level.reserved_table):
                return None
            needed = level.accessed if not leaf else A | D if write else A
            complete = complete and entry & needed == needed
            if leaf:
                return _Way(tuple(reads), _frame(entry, level.shift) | gpa & (1 << level.shift) - 1, complete)
            table = entry & FRAME
        return None


class Search:
    """The translations that may have been loaded at the moment `load`."""

    def __init__(
        self, log: list[Event], writes: Mapping[int, list[tuple[int, int]]], moments: list[Moment], load: int,
        words: Words, caches: Caches, faults: bool, shared: Shared,
    ) -> None:
        self.log, self.load = log, load
        self._writes, self._words = writes, words
        self._shared = shared
        self._now, self._current = moments[-1]
        self.paging = self._current.paging
        """Of the guest that runs now."""
        self._faults = faults and load == self._now
        asid = self._current.asid
        self._ran = ran = next(ran for place, ran in moments if place == load)
        old, now = ran.paging, self._current.paging
        self._controls = [now._replace(guest=old.guest, nested=old.nested, gcr3=old.gcr3, ncr3=old.ncr3)]
        if old != self._controls[0] and any(type(e) is Ran and e.by_vmrun for e in log[load + 1 :]):
            self._controls.append(old)
        since = 0 if over_vmrun(caches) else max(
            place for place, event in enumerate(log[: load + 1]) if type(event) is Ran and event.by_vmrun)
        own = [(place, one) for place, one in moments if since <= place <= load and one.asid == asid]
        self._nested_moments = [(p, one) for p, one in (own if caches.nested else own[-1:])
                                if one.paging.nested == ran.paging.nested]
        self._moments = [(p, one) for p, one in (own if caches.upper else own[-1:])
                         if (one.paging.guest, one.paging.nested, one.pcid) == (
                             ran.paging.guest, ran.paging.nested, ran.pcid)]
        covering = [(p, e) for p, e in enumerate(log[: load + 1]) if type(e) is Flushed and self._covers(e)]
        self._narrow = [(p, e.gva) for p, e in covering if e.gva is not None and e.narrow]
        self._upper_floor = max((p for p, e in covering if e.gva is None or not e.narrow), default=0)
        """Since when upper-level entries of the guest may be held, but for those that lead to a page in `_narrow`."""
        self._nested_floor = max((p for p, e in covering if e.nested), default=0)
        """Since when nested translations may be held."""

    def walks(self, gva: int, access: Access, but: int | None = None) -> Iterator[Walk]:
        """All of them that `access` to `gva` can use now, but for those to the sPA `but`."""
        fmt = self._ran.paging.guest
        if fmt is None:
            if not self._flushed(gva, 12, False):
                yield from self._verdicts(gva, gva, access, (), but)
            return
        for reads, gpa, leaf, shift in self._guest(fmt, gva, access.write):
            if gpa is None:
                yield from self._replayed(gva, access, reads)
            elif not self._flushed(gva, shift, self._ran.pge and bool(leaf & G)):
                yield from self._verdicts(gva, gpa, access, reads, but)

    def _verdicts(
        self, gva: int, gpa: int, access: Access, reads: tuple[_Read, ...], but: int | None
    ) -> Iterator[Walk]:
        """What comes of the access with these entries: under the controls (CR0.WP and the like) of now and, where L1
        has changed them without a flush, also those that the translation was loaded under (15.16, Software Rule)."""
        for below, spa, _ in self._nested(gpa, access.write):
            if spa is None or spa != but:
                yield from self._replayed(gva, access, (*reads, *below))

    def _replayed(self, gva: int, access: Access, reads: tuple[_Read, ...]) -> Iterator[Walk]:
        for paging in self._controls:
            if self._shared.is_first(paging, reads, self._faults):
                walk = translate(paging, _Replay(reads), gva, access)
                if self._faults or isinstance(walk.outcome, Reached):
                    yield _as_read(walk, reads)

    # --- the guest's tables -----------------------------------------------------------------------

    def _guest(self, fmt: Format, gva: int, write: bool) -> Iterator[tuple[tuple[_Read, ...], int | None, int, int]]:
        """Ways through the guest's tables: the entries read, the gPA, the leaf, and its page's size as a shift; without
        a gPA where the last entry read ends the walk in a fault."""
        floor, roots = self._floor(gva, fmt.levels[0].shift), set()
        for place, ran in self._moments:
            if place >= floor and ran.paging.gcr3 not in roots:
                roots.add(ran.paging.gcr3)
                yield from self._guest_level(fmt, 0, ran.paging.gcr3 & fmt.root_mask, place, gva, write, ())

    def _guest_level(
        self, fmt: Format, number: int, table: int, since: int, gva: int, write: bool, reads: tuple[_Read, ...]
    ) -> Iterator[tuple[tuple[_Read, ...], int | None, int, int]]:
        """The ways on from `table`, which may be known since the moment `since`: an entry is never read before the one
        that leads to it."""
        level = fmt.levels[number]
        gpa = table + ((gva >> level.shift & fmt.index_mask) << fmt.entry_shift)
        for below, address, loaded in self._nested(gpa, True):
            if address is None:
                yield (*reads, *below), None, 0, 0
                continue
            floor = max(since, loaded, self._floor(gva, level.shift))
            for read, entry, moment, until in self._versions(address, fmt, floor, self._moments):
                so_far = (*reads, *below, read)
                if self._ends(read, entry, level):
                    yield so_far, None, 0, 0
                elif entry & P and entry & level.leaf:
                    known = self._known(read, entry, A | D if write else A, moment)
                    if known is not None and until > self.load and not entry & level.reserved_leaf:
                        yield so_far, _frame(entry, level.shift) | gva & (1 << level.shift) - 1, entry, level.shift
                elif entry & P and not entry & level.reserved_table:
                    known = self._known(read, entry, level.accessed, moment)
                    if known is not None:
                        yield from self._guest_level(fmt, number + 1, entry & FRAME, known, gva, write, so_far)

    # --- L1's nested table ------------------------------------------------------------------------

    def _nested(self, gpa: int, write: bool) -> Iterator[tuple[tuple[_Read, ...], int | None, int]]:
        """Ways through L1's nested table: the entries read, the sPA, and the moment since which that may be known;
        without an sPA where the last entry read ends the walk in a fault."""
        fmt = self._ran.paging.nested
        if fmt is None:
            yield (), gpa, 0
            return
        floor, roots = self._nested_floor, set()
        gpa &= (1 << fmt.address_bits) - 1
        for place, ran in self._nested_moments:
            if place >= floor and ran.paging.ncr3 not in roots:
                roots.add(ran.paging.ncr3)
                way = self._shared.way(fmt, ran.paging.ncr3, gpa, write)
                if way is None:
                    yield from self._nested_level(fmt, 0, ran.paging.ncr3 & fmt.root_mask, place, gpa, write, ())
                elif way.complete:
                    yield way.reads, way.spa, place
                elif self.load == self._now:
                    yield way.reads, way.spa, self._now

    def _nested_level(
        self, fmt: Format, number: int, table: int, since: int, gpa: int, write: bool, reads: tuple[_Read, ...]
    ) -> Iterator[tuple[tuple[_Read, ...], int | None, int]]:
        level = fmt.levels[number]
        address = table + ((gpa >> level.shift & fmt.index_mask) << fmt.entry_shift)
        floor = max(since, self._nested_floor)
        for read, entry, moment, _ in self._versions(address, fmt, floor, self._nested_moments):
            so_far = (*reads, read)
            if self._ends(read, entry, level):
                yield so_far, None, self._now
            elif entry & P and entry & level.leaf:
                known = self._known(read, entry, A | D if write else A, moment)
                if known is not None and not entry & level.reserved_leaf:
                    yield so_far, _frame(entry, level.shift) | gpa & (1 << level.shift) - 1, known
            elif entry & P and not entry & level.reserved_table:
                known = self._known(read, entry, level.accessed, moment)
                if known is not None:
                    yield from self._nested_level(fmt, number + 1, entry & FRAME, known, gpa, write, so_far)

    # --- entries, and what was flushed ------------------------------------------------------------

    def _versions(
        self, address: int, fmt: Format, floor: int, moments: list[Moment]
    ) -> Iterator[tuple[_Read, int, int, int]]:
        """What the entry at `address` held at one of `moments` from `floor` on: as read, its value, the first such
        moment, and the place in the log from which it held something else."""
        quadword = address & ~7
        try:
            now = self._words[quadword >> 3]
        except IndexError:  # an entry that leads out of L1's memory, and so to nothing that a scenario has use for
            return
        since = 0
        for until, old in (*self._writes.get(quadword, ()), (len(self.log), None)):
            held = next((place for place, _ in moments if max(since, floor) <= place < until), None)
            if held is not None:
                value = now if old is None else old
                entry = value if fmt.entry_shift == 3 else value >> (address & 4) * 8 & 0xFFFF_FFFF
                yield (address, value, old is None), entry, held, until
            since = until

    def _ends(self, read: _Read, entry: int, level: Level) -> bool:
        """Whether the entry, read right now, ends a walk in a fault that may be reported."""
        if not (self._faults and read[2]):
            return False
        leaf = entry & level.leaf
        return not entry & P or bool(entry & (level.reserved_leaf if leaf else level.reserved_table))

    def _known(self, read: _Read, entry: int, needed: int, moment: int) -> int | None:
        """Since when the entry may be held, that was there at `moment`: one without the bits `needed` (A, and D for a
        write) is not, and can only be read right now, by the walk of this access itself."""
        if entry & needed == needed:
            return moment
        return self._now if read[2] and self.load == self._now else None

    def _floor(self, gva: int, shift: int) -> int:
        """Since when the guest's entries at a level may be held that lead to `gva`."""
        if not self._narrow:
            return self._upper_floor
        return max(self._upper_floor, *(p for p, page in self._narrow if page >> shift == gva >> shift), 0)

    def _covers(self, event: Flushed, is_global: bool = False) -> bool:
        return event.asid == self._current.asid and (event.pcid in (None, self._ran.pcid) or is_global)

    def _flushed(self, gva: int, shift: int, is_global: bool) -> bool:
        """Whether the translation, of a guest's page of 1 << `shift` bytes, is gone since it was loaded, or is of
        another address space than the current one."""
        if self._ran.pcid != self._current.pcid and not is_global:
            return True
        return any(
            type(event) is Flushed and self._covers(event, is_global) and not (event.keeps_global and is_global)
            and (event.gva is None or event.gva >> shift == gva >> shift)
            for event in self.log[self.load + 1 :]
        )


class _Replay:
    """Memory that yields these entries in this order, whatever the address."""

    def __init__(self, reads: tuple[_Read, ...]) -> None:
        self._rest = iter(reads)

    def __getitem__(self, index: int) -> int:
        return next(self._rest)[1]

    def __setitem__(self, index: int, value: int) -> None:
        raise TypeError("a replay is not written to")


def _as_read(walk: Walk, reads: tuple[_Read, ...]) -> Walk:
    """`walk`, a replay, with the addresses of the entries as they were, and the updates of those in memory."""
    trail, updates, todo = [], [], list(walk.updates)
    for (dimension, name, purpose, address, entry), (where, _, current) in zip(walk.trail, reads, strict=False):
        trail.append((dimension, name, purpose, where, entry))
        if todo and todo[0][0] == address:
            _, bits, use = todo.pop(0)
            if current:
                updates.append((where, bits, use))
    return walk._replace(trail=trail, updates=updates)


def _frame(entry: int, shift: int) -> int:
    """Where the page of 1 << `shift` bytes lies that the leaf `entry` maps."""
    frame = entry & FRAME & ~((1 << shift) - 1)
    return frame | (entry >> 13 & 0xFF) << 32 if shift == PSE36_SHIFT else frame
