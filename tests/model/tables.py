"""Small tables of both dimensions in a small memory, for the model's tests.

L2's tables lie at gPAs unlike their sPAs, so that a walk that mixes the two up goes nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from harness.model.access import Access, ErrorCode, Reached
from harness.model.dirty import resolve, write_back
from harness.model.entries import FRAME, LEVEL_NAMES, NX, PS, RW, US, A, D, P, long_mode
from harness.model.liberties import Liberties, Takes
from harness.model.memory import Memory
from harness.model.walk import Paging, Walk, translate

__all__ = ["FRAME", "GVA", "LEVELS", "NX", "PS", "RW", "TOP_DOWN", "US", "A", "D", "E", "P", "Space"]

E = ErrorCode
SIZE: Final = 16 << 20
USER: Final = P | RW | US
TOP_DOWN: Final = ("pml4e", "pdpte", "pde", "pte")
LEVELS: Final = {12: TOP_DOWN, 21: TOP_DOWN[:3], 30: TOP_DOWN[:2]}
"""Names of the entries that a walk reads, root first, by the shift of the page's size."""

GVA: Final = 0x0000_3C5A_9D7E_6000
TABLE_OFFSET: Final = 3 << 36 | 5 << 30
"""gPA minus sPA of L2's tables."""

READ: Final = Access()
WRITE: Final = Access(write=True)
FETCH: Final = Access(fetch=True)
USER_READ: Final = Access(user=True)
USER_WRITE: Final = Access(write=True, user=True)
USER_FETCH: Final = Access(fetch=True, user=True)


def name(access: Access) -> str:
    """For the ids of tests."""
    return ("user-" if access.user else "") + ("fetch" if access.fetch else "write" if access.write else "read")


ALL_ACCESSES: Final = (READ, WRITE, FETCH, USER_READ, USER_WRITE, USER_FETCH)


@dataclass
class Space:
    """A memory with one nested table and one guest table in it."""

    nested: bool = True
    identity: bool = False
    """The nested table maps every gPA to itself."""
    maxphyaddr: int = 48
    guest_nxe: bool = True
    host_nxe: bool = True
    page1g: bool = True
    memory: Memory = field(default_factory=lambda: Memory(SIZE))
    next_page: int = 0x1000
    identity_shift: int = 12

    def __post_init__(self) -> None:
        self.ncr3 = self.page() if self.nested else 0
        self.gcr3 = self.guest_page()

    def page(self) -> int:
        self.next_page += 0x1000
        assert self.next_page <= SIZE
        return self.next_page - 0x1000

    def guest_page(self) -> int:
        """A page for a guest table; returns its gPA."""
        spa = self.page()
        gpa = spa if self.identity or not self.nested else spa + TABLE_OFFSET
        if self.nested:
            self.map_nested(gpa, spa, self.identity_shift if self.identity else 12)
        return gpa

    def spa_of(self, gpa: int) -> int:
        return gpa if self.identity or not self.nested else gpa - TABLE_OFFSET

    def map_nested(self, gpa: int, spa: int, shift: int = 12, bits: int = USER) -> dict[str, int]:
        """Returns the sPA of each entry by level."""
        return self._map(self.ncr3, gpa, spa, shift, bits, guest=False)

    def map_guest(self, gva: int, gpa: int, shift: int = 12, bits: int = USER) -> dict[str, int]:
        return self._map(self.gcr3, gva, gpa, shift, bits, guest=True)

    def _map(self, root: int, address: int, frame: int, shift: int, bits: int, guest: bool) -> dict[str, int]:
        entries: dict[str, int] = {}
        table = root
        for height in (3, 2, 1, 0):
            at = (self.spa_of(table) if guest else table) + (address >> 12 + 9 * height & 0x1FF) * 8
            entries[LEVEL_NAMES[height]] = at
            if shift == 12 + 9 * height:
                self.set(at, frame >> shift << shift | bits | (PS if height else 0))
                return entries
            if not self.get(at):
                self.set(at, (self.guest_page() if guest else self.page()) | USER)
            table = self.get(at) & FRAME
        raise AssertionError(shift)

    def get(self, spa: int) -> int:
        return self.memory.words[spa >> 3]

    def set(self, spa: int, entry: int) -> None:
        self.memory.words[spa >> 3] = entry

    def change(self, spa: int, set: int = 0, clear: int = 0) -> None:
        self.set(spa, (self.get(spa) | set) & ~clear)

    def snapshot(self) -> bytes:
        return bytes(self.memory.bytes[: self.next_page])

    def paging(
        self,
        wp: bool = True,
        smep: bool = False,
        smap: bool = False,
        ac: bool = False,
        guest_id: bool | None = None,
    ) -> Paging:
        return Paging(
            guest=long_mode(self.maxphyaddr, self.guest_nxe, self.page1g),
            gcr3=self.gcr3,
            wp=wp,
            smep=smep,
            smap=smap,
            ac=ac,
            guest_id=self.guest_nxe or smep if guest_id is None else guest_id,
            nested=long_mode(self.maxphyaddr, self.host_nxe, self.page1g) if self.nested else None,
            ncr3=self.ncr3,
        )

    def walk(self, gva: int, access: Access = READ, paging: Paging | None = None) -> Walk:
        return translate(paging or self.paging(), self.memory.words, gva, access)

    def walk_and_write(self, gva: int, access: Access = READ, takes: Takes = Takes.ALWAYS) -> Walk:
        """Walk, and write back what a machine would that takes every liberty so."""
        walk = self.walk(gva, access)
        required, _ = resolve(walk.updates, not isinstance(walk.outcome, Reached), Liberties.each(takes))
        write_back(self.memory.words, required)
        return walk
