"""Whether each entry of the table that KVM runs a guest with is justified: L1's nested table, L0's memory slots and
L0's own page map, composed, must permit it.

    L2's table       gVA -> gPA    the processor walks it, through the shadow
    L1's table       gPA -> sPA    KVM alone walks it
    L0's slots       sPA -> an address of the process that L1 runs in
    L0's page map    that address -> hPA
    the shadow       gPA -> hPA    what the processor walks in place of the last three

The direct map that L1 itself runs on is the shadow of a table that maps every address to itself. Only what the
processor makes of an entry counts: one with a reserved bit, as KVM marks MMIO with, maps nothing, and bits that the
processor ignores are not looked at, whatever a kernel keeps in them.

The shadow is walked entry by entry, and L1's table beside it. A table whose bytes are those of the last audit, and
L1's too, is not read again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Final, NamedTuple

from harness.model.backing import PAGE, Backing, Kvm, Table
from harness.model.entries import ALL_RIGHTS, FRAME, NX, PAT_4K, PCD, PWT, RW, US, A, D, Format, Level, P
from harness.model.memory import Room
from harness.model.memory_type import index_of_page
from harness.model.ranges import IS_NOTHING, IS_PAGE, RIGHTS, Identity, NestedTable, Reach, Source

ISOLATION: Final = "isolation"
"""How severe it is to break one of BREAK_ISOLATION: a guest comes to memory, or to a right, that is not its."""
BREAK_ISOLATION: Final = frozenset({"shadow.frame", "shadow.rights", "shadow.stale", "shadow.table", "shadow.tracked",
                                    "shadow.direct"})

_ENTRIES: Final = struct.Struct("<512Q")
_ENTRY: Final = 8
_LAST: Final = 12
"""The shift of pages that PTEs map."""
_OWN: Final = ALL_RIGHTS & ~(RW | US)
_MOST: Final = 4096
"""Tables that are remembered."""


_Wrong = tuple[str, str, str]
"""Rule, what is permitted, what there is."""


class Breach(NamedTuple):
    """An entry of a shadow that is not justified, by `rule`: that at `address` (hPA), by which the processor translates
    the 1 << `shift` bytes from `gpa` on, in a `direct` map or in a shadow. `spa` is where L1's table has `gpa`, -1 for
    nowhere."""

    rule: str
    gpa: int
    shift: int
    address: int
    entry: int
    expected: str
    observed: str
    spa: int
    direct: bool


class _Way(NamedTuple):
    """How the processor comes to a table: its hPA, the number of its level, the gPA that it begins at, how far L1's
    walk is there, and the rights that the entries above leave."""

    table: int
    depth: int
    gpa: int
    reach: Reach
    rights: int
    nx: int


class _Node(NamedTuple):
    """What came of a table: its bytes, the hPA and the bytes of L1's beside it, ways to those below it with the
    addresses of their entries, and its leaves: how many, and by the shift of its size and the number of the page of
    L1's that may be written through it, the index of its entry."""

    shadow: bytes
    beside: int | None
    nested: bytes
    below: tuple[tuple[int, _Way], ...]
    breaches: tuple[Breach, ...]
    leaves: int
    writable: Mapping[int, Mapping[int, int]]

    def was(self, index: int, entries: bytes) -> bool:
        """Whether the entry with that index was what it is in `entries`, and nothing was wrong with it."""
        at = slice(_ENTRY * index, _ENTRY * index + _ENTRY)
        return self.shadow[at] == entries[at] and all(one.address & PAGE - 1 != at.start for one in self.breaches)


class Auditor:
    """Audits tables in `memory`, which is all of L0's. `shadow` is the format of those that KVM builds for the
    processor, `host` that of L0's own. `leaves` counts what was held against L1's table, or found to be as before.
    `was` has pages of tables, by hPA, that are others than at the last audit, as they were then."""

    def __init__(self, memory: Room, shadow: Format, host: Format) -> None:
        self.backing = Backing(memory, host)
        self.leaves = 0
        self._bytes, self.format = memory.bytes, shadow
        self.was: dict[int, bytes] = {}
        self._nodes: dict[_Way, _Node] = {}
        self._last: dict[tuple[int, int], _Node] = {}
        self._kvm = Kvm(0, 0, 0, (), {})
        self._tracked: dict[int, Set[int]] = {}
        self._source: Source = Identity()
        self._earlier: Source | None = None
        self._leant = False

    def begin(self, kvm: Kvm) -> None:
        """An audit begins, of what KVM has now."""
        self._kvm = kvm
        self.was.clear()
        if not self.backing.is_current(kvm) or len(self._nodes) > _MOST:
            self._nodes.clear()
            self._last.clear()
        tracked = {table.gfn for table in kvm.tables.values() if table.tracked}
        self._tracked = {level.shift: {gfn >> level.shift - 12 for gfn in tracked} for level in self.format.levels}

    def direct(self, root: int, only: int | None = None) -> Iterator[Breach]:
        """What is wrong with the direct map whose root is at `root` (hPA); `only` in tables that translate that gPA."""
        self._source, self._earlier = Identity(), None
        return self._walk(root, False, only)

    def shadow(self, root: int, nested: NestedTable, earlier: NestedTable | None = None, synced: bool = False,
               only: int | None = None) -> Iterator[Breach]:
        """What is wrong with the shadow of `nested` whose root is at `root`. `earlier` is the same table as it was at
        the last flush, if it was written since: that is permitted too. With `synced` tables that KVM has marked as out
        of step are left out, as they are brought in step at L1's next VMRUN."""
        self._source, self._earlier = nested, earlier
        return self._walk(root, synced, only)

    @property
    def _is_direct(self) -> bool:
        return isinstance(self._source, Identity)

    def _walk(self, root: int, synced: bool, only: int | None) -> Iterator[Breach]:
        todo = [(root, _Way(root, 0, 0, self._source.root(), RIGHTS, 0))]
        while todo:
            address, way = todo.pop()
            breach = self._stands_for(way, address)
            if breach is not None:
                yield breach
                continue
            known = self._kvm.tables.get(way.table)
            if synced and known is not None and known.unsync:
                continue
            node = self._nodes.get(way)
            if node is None or not self._is_current(way.table, node):
                node = self._read(way)
            self.leaves += node.leaves
            yield from node.breaches
            for shift, pages in node.writable.items():
                for page in self._tracked[shift] & pages.keys():
                    yield self._untold(way, node, pages[page], page << shift)
            todo += node.below if only is None else [one for one in node.below if self._leads_to(one[1], only)]

    def _leads_to(self, way: _Way, gpa: int) -> bool:
        return not (way.gpa ^ gpa) >> self.format.levels[way.depth].shift + 9

    def _is_current(self, table: int, node: _Node) -> bool:
        at = node.beside
        return self._bytes[table : table + PAGE].tobytes() == node.shadow and (
            at is None or self._bytes[at : at + PAGE].tobytes() == node.nested)

    def _read(self, way: _Way) -> _Node:
        """Hold each entry of a table against L1's."""
        level = self.format.levels[way.depth]
        shadow = self._bytes[way.table : way.table + PAGE].tobytes()
        beside = self._source.read_at(way.reach, level.shift)
        nested = b"" if beside is None else self._bytes[beside : beside + PAGE].tobytes()
        before = self._last.get((way.table, way.gpa))
        below: list[tuple[int, _Way]] = []
        breaches: list[Breach] = []
        writable: dict[int, dict[int, int]] = {}
        if before is not None:
            self.was[way.table] = before.shadow
            if before.beside is not None:
                self.was[before.beside] = before.nested
        self._leant = False
        entries = _ENTRIES.unpack(shadow)
        leaves, left = self._quickly(way, level, entries, nested, writable)
        for index in left:
            entry = entries[index]
            gpa, address = way.gpa + (index << level.shift), way.table + _ENTRY * index
            rights, nx = way.rights & (entry | _OWN), way.nx | entry & NX
            if not entry & level.leaf:
                if not entry & level.reserved_table:
                    reach = self._source.down(way.reach, gpa, level.shift)
                    below.append((address, _Way(entry & FRAME, way.depth + 1, gpa, reach, rights, nx)))
            elif not entry & level.reserved_leaf and rights & US:  # else the processor faults: it maps nothing
                leaves += 1
                if field := index_of_page(entry, level.shift):
                    breaches.append(Breach("shadow.type", gpa, level.shift, address, entry, "PAT field 0: write-back",
                                           f"PAT field {field}", -1, self._is_direct))
                for breach in self._leaf(way.reach, gpa, level.shift, address, entry, rights, nx, writable):
                    if before is not None and before.was(index, shadow) and not self._is_direct:
                        breach = breach._replace(rule="shadow.stale")
                    breaches.append(breach)
        node = _Node(shadow, beside, nested, tuple(below), tuple(breaches), leaves, writable)
        self._last[way.table, way.gpa] = node
        if self._leant:
            self._nodes.pop(way, None)
        else:
            self._nodes[way] = node
        return node

    def _quickly(self, way: _Way, level: Level, entries: Sequence[int], nested: bytes,
                 writable: dict[int, dict[int, int]]) -> tuple[int, list[int]]:
        """Of a table of PTEs, how many leaves are in order by one look at L1's entry and at L0's page map; and the
        indices of what must be looked at again. Most are in order."""
        beside = () if level.shift != _LAST or way.nx or way.rights & RIGHTS != RIGHTS else self._source.plain(
            way.reach, way.gpa, level.shift, nested)
        if not beside:
            return 0, [index for index, entry in enumerate(entries) if entry & P]
        usable, closed = P | US | A | self._source.reserved, US | level.reserved_leaf | PWT | PCD | PAT_4K
        frame, written = self.backing.frames.get, writable.setdefault(_LAST, {})
        leaves, left = 0, []
        for index, (entry, own) in enumerate(zip(entries, beside, strict=True)):
            if not entry & P:
                continue
            page = (own & FRAME) >> _LAST
            if (backed := frame(page)) is None:
                backed = self.backing.frame(own & FRAME)
            if (backed is None or (backed ^ entry) & FRAME or entry & closed != US or own & usable != P | US | A
                    or own & ~entry & NX or (entry & RW and (own & (RW | D) != RW | D or not backed & RW))):
                left.append(index)
                continue
            leaves += 1
            if entry & RW:
                written[page] = index
        return leaves, left

    def _leaf(self, reach: Reach, gpa: int, shift: int, address: int, entry: int, rights: int, nx: int,
              writable: dict[int, dict[int, int]]) -> Iterator[Breach]:
        """Hold a leaf against what L1's table has of those gPAs, be that one page or several smaller ones."""
        found = self._source.down(reach, gpa, shift)
        if found.depth >= 0:
            self._leant = True  # on more pages of L1's than one
            for part in range(gpa, gpa + (1 << shift), 1 << shift - 9):
                yield from self._leaf(found, part, shift - 9, address, entry + (part - gpa), rights, nx, writable)
            return
        wrong = self._wrong(found, gpa, shift, entry, rights, nx)
        if wrong is not None and self._earlier is not None:
            earlier = self._earlier.down(self._earlier.root(), gpa, shift)
            if earlier.depth < 0 and self._wrong(earlier, gpa, shift, entry, rights, nx) is None:
                self._leant, wrong = True, None
        spa = found.at(gpa) if found.depth == IS_PAGE else -1
        if rights & RW and spa >= 0:
            writable.setdefault(shift, {})[spa >> shift] = (address & PAGE - 1) // _ENTRY
        if wrong is not None:
            yield Breach(wrong[0], gpa, shift, address, entry, wrong[1], wrong[2], spa, self._is_direct)

    def _wrong(self, found: Reach, gpa: int, shift: int, entry: int, rights: int, nx: int) -> _Wrong | None:
        """What is wrong with a leaf, the first of it."""
        frame = entry & FRAME & ALL_RIGHTS << shift
        rule = "shadow.direct" if self._is_direct else "shadow.frame"
        if found.depth == IS_NOTHING:
            return rule, "nothing", f"hPA {frame:#x}"
        spa = found.at(gpa)
        backed = self.backing.range(spa, 1 << shift)
        if backed is None:
            return rule, f"nothing, as L1 has no memory at sPA {spa:#x}", f"hPA {frame:#x}"
        if backed & FRAME != frame:
            return rule, f"sPA {spa:#x}, which is hPA {backed & FRAME:#x}", f"hPA {frame:#x}"
        if rights & RW and not backed & RW:
            return "shadow.direct" if self._is_direct else "shadow.rights", "no writes, as L0 permits none", "RW"
        if rights & RW and not found.rights & RW:
            return "shadow.rights", "no writes", "RW"
        if not found.rights & US:
            return "shadow.rights", "no access, as U/S is 0", "US"
        if found.nx and not nx:
            return "shadow.rights", "no fetches", "no NX"
        if not found.rights & A:
            return "shadow.ad", "nothing before A is set in L1's entries", f"hPA {frame:#x}"
        if rights & RW and not found.rights & D:
            return "shadow.ad", "no writes before D is set in L1's entry", "RW"
        return None

    def _untold(self, way: _Way, node: _Node, index: int, spa: int) -> Breach:
        """A leaf through which L1's table at `spa`, or in the large page there, can be written."""
        shift = self.format.levels[way.depth].shift
        entry = int.from_bytes(node.shadow[_ENTRY * index : _ENTRY * index + _ENTRY], "little")
        return Breach("shadow.tracked", way.gpa + (index << shift), shift, way.table + _ENTRY * index, entry,
                      "no writes, as L1's table there is in step", "RW", spa, self._is_direct)

    def _stands_for(self, way: _Way, address: int) -> Breach | None:
        """Whether KVM keeps the table for what L1 has there; what is not KVM's, or kept for something else, breaks
        shadow.table. Of a direct map, whether there is a table at all."""
        is_there = way.table + PAGE <= len(self._bytes)
        if is_there and (self._is_direct or way.reach.depth == IS_NOTHING):
            return None  # of the latter every leaf is told
        known, shift = self._kvm.tables.get(way.table), self.format.levels[way.depth].shift + 9
        wanted = self._kept_for(way, way.reach)
        if is_there:
            kept = known and known._replace(unsync=False, passthrough=False)
            if kept == wanted or (way.reach.depth == 0 and way.table in self._kvm.stitched):
                return None
            if self._earlier is not None and kept == self._kept_for(
                    way, self._earlier.down(self._earlier.root(), way.gpa, shift)):
                return None
        entry = int.from_bytes(self._bytes[address : address + _ENTRY], "little")
        return Breach("shadow.direct" if self._is_direct else "shadow.table", way.gpa, shift, address, entry,
                      str(wanted), str(known or f"no table of KVM's: hPA {way.table:#x}"),
                      wanted.gfn << 12 if wanted.direct else -1, self._is_direct)

    def _kept_for(self, way: _Way, reach: Reach) -> Table:
        """What KVM keeps a table for, where L1's walk is at `reach`."""
        level = len(self.format.levels) - way.depth
        return Table(reach.at(way.gpa) >> 12, level, direct=reach.depth == IS_PAGE, unsync=False)
