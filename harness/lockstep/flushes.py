"""Whether a foreign L1 flushes what it must: it took something away in its nested tables, or went over to others, and
runs the same ASID again (sections 15.16.1, 15.16.2 and 15.25.5).

Only entries with A=1 count, of others no translation was made. INVLPGA is taken for enough, for all that the walk of
its gVA leads over: whether L2 has the same gPA at another gVA too is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from harness.lockstep.nested_tables import Change, NestedTables
from harness.model.entries import A, Format

Key = tuple[int, str]
"""nCR3, and the name of the format that its tables have."""

_ROOTS: Final = 16
"""Nested tables that are remembered, those used last."""
_NAMED: Final = 4
"""Changed entries that a finding names."""
_ALL: Final = 1


class Missing(NamedTuple):
    """A flush that was due at a VMRUN: of `what`, named in `examples`; of `changes`, or of the tables at `other`."""

    field: str
    what: str
    examples: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    other: Key | None = None


class Flushes:
    """`memory` is L1's from sPA 0 on; `by_asid`: this CPU has TLB_CONTROL=3."""

    def __init__(self, memory: memoryview, by_asid: bool) -> None:
        self._memory = memory
        self._by_asid = by_asid
        self._tables: dict[Key, NestedTables] = {}
        self._ran: dict[int, dict[Key, None]] = {}
        self._taken_away: dict[int, list[Change]] = {}
        self.table_bytes = 0

    def vmrun(self, asid: int, control: int, key: Key, fmt: Format) -> list[Missing]:
        """What should have been flushed before this VMRUN, and was not."""
        self._note(key, self.look(key, fmt))
        if control and (control == _ALL or self._by_asid):
            for other in [asid] if control != _ALL else list(self._ran):
                self._ran.pop(other, None)
                self._taken_away.pop(other, None)
        found = []
        if lost := self._taken_away.pop(asid, None):
            named = tuple(f"entry at sPA {one.address:#x}: was {one.old:#x}, is {one.new:#x}" for one in lost[:_NAMED])
            found.append(Missing("tlb_control", f"{len(lost)} changed nested entries", named, tuple(lost)))
        before = self._ran.setdefault(asid, {})
        if before and key not in before:
            found += self._other_tables(before, key)
            before.clear()
        before[key] = None
        return found

    def _other_tables(self, before: dict[Key, None], key: Key) -> list[Missing]:
        """nCR3 has changed under the same ASID: what was translated by the old tables must be so by the new."""
        found = []
        for old in before:
            if old in self._tables and (lost := self._tables[old].lost_in(self._tables[key])):
                named = tuple(f"gPA {gpa:#x}: was sPA {was:#x}, is {f'sPA {now:#x}' if now >= 0 else 'not there'}"
                              for gpa, was, now in lost[:_NAMED])
                what = f"{len(lost)} pages that nCR3 {old[0]:#x} translated otherwise"
                found.append(Missing("ncr3", what, named, other=old))
        return found

    def invlpga(self, asid: int, walked: Callable[[], set[int]]) -> None:
        """L1 flushes a gVA in that ASID; `walked` finds the sPAs of all entries that its walk reads."""
        for key in self._ran.get(asid, ()):
            if key in self._tables:
                self._note(key, self.look(key, self._tables[key].fmt))
        if lost := self._taken_away.get(asid):
            entries = walked()
            left = [one for one in lost if one.address not in entries]
            if left:
                self._taken_away[asid] = left
            else:
                del self._taken_away[asid]

    def _note(self, key: Key, changes: list[Change]) -> None:
        for change in changes:
            if change.lost and change.old & A:
                for asid, roots in self._ran.items():
                    if key in roots:
                        self._taken_away.setdefault(asid, []).append(change)

    def look(self, key: Key, fmt: Format) -> list[Change]:
        """What changed in those tables since they were last looked at; the tables are known from now on."""
        tables = self._tables.pop(key, None)
        changes: list[Change] = []
        if tables is None:
            tables = NestedTables(key[0], fmt, self._memory)
        else:
            before = tables.bytes_compared
            changes = tables.refresh()
            self.table_bytes += tables.bytes_compared - before
        self._tables[key] = tables
        if len(self._tables) > _ROOTS:
            del self._tables[next(iter(self._tables))]
        return changes

    def pages(self, key: Key) -> list[int]:
        """sPAs of the pages that those tables are in."""
        return self._tables[key].pages() if key in self._tables else []

    def wrong_bits(self, key: Key, change: Change) -> int:
        """The bits of a change that a processor which walks those tables must not have made."""
        return self._tables[key].wrong_bits(change)
