"""The page-table walk: of one dimension, and of two (sections 5.3.3 and 15.25.5).

`translate` returns a value and changes nothing: which accessed and dirty bits follow from a walk is
part of that value, and `dirty.write_back` writes them. At first reading, read `walk_nested`, then
`translate`; they are the same loop, once with every table reference translated by the other.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from harness.model.access import (
    Access,
    ErrorCode,
    GeneralProtection,
    NestedPageFault,
    Outcome,
    PageFault,
    Reached,
    StackFault,
)
from harness.model.dirty import CUT, NESTED_TABLE, PAGE, TABLE, Update
from harness.model.entries import ALL_RIGHTS, FRAME, KEY_SHIFT, NX, OPEN, PSE36_SHIFT, RW, US, A, D, Format, Level, P
from harness.model.memory import Words
from harness.model.registers import PKRU_AD, PKRU_WD

GUEST: Final = "guest"
NESTED: Final = "nested"
FINAL: Final = "final"
"""The purpose of a nested walk for the access itself; else it is the guest entry's level name."""

_TABLE_ACCESS: Final = Access(write=True, fetch=False, user=True)


class Paging(NamedTuple):
    """Everything but memory that decides a translation: taken from the VMCB and from L1 at VMRUN.

    `guest` is None where L2 has paging off, `nested` where NP_ENABLE is 0. `guest_id` says whether #PF
    reports a fetch as one. `pkru` is PKRU where CR4.PKE puts it in force, else 0. `gmet` and `sss` are the
    VMCB's guest mode execute trap and supervisor shadow stack check, each where the CPU has it.
    """

    guest: Format | None
    gcr3: int
    wp: bool
    smep: bool
    smap: bool
    ac: bool
    guest_id: bool
    nested: Format | None
    ncr3: int
    pkru: int = 0
    gmet: bool = False
    sss: bool = False


_ALL: Final = RW | US
"""Rights that are granted by 1."""

Trail = list[tuple[str, str, str, int, int]]
"""Entries read, as plain tuples in the order of `Step`: walks are many, and few are looked at."""


class Step(NamedTuple):
    """One entry read: `address` (sPA) and `entry` as read. `purpose` is what a nested walk is for."""

    dimension: str
    level: str
    purpose: str
    address: int
    entry: int


class Walk(NamedTuple):
    """A whole walk: its outcome, the rule that decided it, the entries read, the bits that follow; after a reserved-bit
    fault the reserved bits that are set in the last entry, else 0."""

    outcome: Outcome
    rule: str
    trail: Trail
    updates: list[Update]
    reserved: int = 0

    @property
    def steps(self) -> list[Step]:
        """The entries that were read, in order."""
        return [Step(*step) for step in self.trail]


class Fault(Exception):
    """Ends a walk: `translate` makes its outcome of it."""

    def __init__(self, rule: str, outcome: Outcome, reserved: int = 0) -> None:
        super().__init__(rule)
        self.rule = rule
        self.outcome = outcome
        self.reserved = reserved


class _Halves:
    """Memory by the entries of 32 bits that it holds."""

    def __init__(self, ram: Words) -> None:
        self._ram = ram

    def __getitem__(self, index: int) -> int:
        return self._ram[index >> 1] >> (index & 1) * 32 & 0xFFFF_FFFF


_RESERVED: Final = ErrorCode.P | ErrorCode.RSVD
_new: Any = tuple.__new__
"""Makes a named tuple as its class does, without the detour: walks are many."""


def translate(paging: Paging, ram: Words, gva: int, access: Access) -> Walk:
    """Translate `gva` for `access` under `paging`, reading entries from `ram` by quadword index.

    Raises IndexError if an entry lies outside of `ram`.
    """
    trail: Trail = []
    updates: list[Update] = []
    rule = "reached"
    reserved = 0
    outcome: Outcome
    try:
        gpa = gva if paging.guest is None else _walk_guest(paging, paging.guest, ram, gva, access, trail, updates)
        spa = gpa
        if paging.nested is not None:
            spa = walk_nested(paging, paging.nested, ram, gpa, access, FINAL, trail, updates)
        outcome = _new(Reached, (spa, gpa))
    except Fault as fault:
        rule, outcome, reserved = fault.rule, fault.outcome, fault.reserved
        if isinstance(outcome, NestedPageFault):
            updates = _cut_short(trail, updates)
    walk: Walk = _new(Walk, (outcome, rule, trail, updates, reserved))
    return walk


def walk_nested(
    paging: Paging,
    fmt: Format,
    ram: Words,
    gpa: int,
    access: Access,
    purpose: str,
    trail: Trail,
    updates: list[Update],
) -> int:
    """The nested dimension: from gPA to sPA through L1's table at nCR3 (section 15.25.5)."""
    _, levels, address_bits, entry_shift, index_mask, root_mask = fmt
    entries = ram if entry_shift == 3 else _Halves(ram)
    table = paging.ncr3 & root_mask
    index_mask <<= entry_shift
    indexed = gpa if address_bits > 32 else gpa & 0xFFFF_FFFF
    rights = ALL_RIGHTS
    no_execute = 0
    write, fetch, _, _, _, shadow = access
    for name, _, leaf, reserved_table, reserved_leaf, granted, accessed, plain, down in levels:
        address = table + (indexed >> down & index_mask)
        entry = entries[address >> entry_shift]
        trail.append((NESTED, name, purpose, address, entry))
        if entry & plain != OPEN:
            rights &= entry | granted
            no_execute |= entry
            if not entry & P:
                raise _nested_fault("present", paging, gpa, access, purpose, 0)
            if entry & leaf:
                if reserved := entry & reserved_leaf:
                    raise _nested_fault("reserved", paging, gpa, access, purpose, _RESERVED, reserved)
                break
            if reserved := entry & reserved_table:
                raise _nested_fault("reserved", paging, gpa, access, purpose, _RESERVED, reserved)
        if accessed:
            updates.append((address, accessed, NESTED_TABLE))
        table = entry & FRAME
    if shadow or fetch or rights & _ALL != _ALL:
        _check_nested(paging, levels, gpa, access, purpose, trail, rights, no_execute)
    updates.append((address, A | D if write else A, NESTED_TABLE))
    return entry & FRAME | gpa & 0xFFF if leaf == P else _in_large_page(entry, down + entry_shift, gpa)


def _in_large_page(leaf: int, shift: int, address: int) -> int:
    """Where `address` lies in the page of 1 << `shift` bytes that `leaf` maps."""
    offset = (1 << shift) - 1
    frame = leaf & FRAME & ~offset
    if shift == PSE36_SHIFT:
        frame |= (leaf >> 13 & 0xFF) << 32
    return frame | address & offset


def _check_nested(
    paging: Paging, levels: tuple[Level, ...], gpa: int, access: Access, purpose: str, trail: Trail, rights: int,
    no_execute: int,
) -> None:
    """Whether the nested entries grant the access. Every one is a user access in the nested dimension, whatever L2's
    CPL (but see 15.25.13 and 15.25.14)."""
    leaf = trail[-1][4]
    if access.shadow_stack and paging.sss and not access.user:
        if not _is_supervisor_shadow_stack(levels, trail, purpose):
            raise _denied("sss", paging, gpa, access, purpose, leaf)
    else:
        if not rights & US:
            if not paging.gmet:
                raise _denied("user", paging, gpa, access, purpose, leaf)
        elif access.fetch and not access.user and paging.gmet:
            raise _denied("gmet", paging, gpa, access, purpose, leaf)
        if access.write and not rights & RW:
            raise _denied("write", paging, gpa, access, purpose, leaf)
    if access.fetch and no_execute & NX:
        raise _denied("execute", paging, gpa, access, purpose, leaf)


def _cut_short(trail: Trail, updates: list[Update]) -> list[Update]:
    """`updates` with those of the nested walk that faulted told from the others: the last ones, by the entries
    that it read. Nested walks before it may have read the same entries."""
    purpose = trail[-1][2]
    first = len(updates)
    for _, _, what, address, _ in reversed(trail[:-1]):
        if what is not purpose:
            break
        if first and updates[first - 1][::2] == (address, NESTED_TABLE):  # else a PDPTE of PAE, with no bits to set
            first -= 1
    return updates[:first] + [(address, bits, CUT) for address, bits, _ in updates[first:]]


def _walk_guest(
    paging: Paging,
    fmt: Format,
    ram: Words,
    gva: int,
    access: Access,
    trail: Trail,
    updates: list[Update],
) -> int:
    """The guest dimension: from gVA to gPA through L2's table at gCR3; each entry's own address is
    a gPA, and is translated by the nested dimension as a user write (section 15.25.5)."""
    _, levels, address_bits, entry_shift, index_mask, root_mask = fmt
    entries = ram if entry_shift == 3 else _Halves(ram)
    write, fetch, user, implicit, stack, shadow = access
    if address_bits > 32 and gva >> address_bits - 1 not in (0, (1 << 65 - address_bits) - 1):
        if stack:
            raise Fault("canonical.stack", StackFault())
        raise Fault("canonical", GeneralProtection())
    nested = paging.nested
    table = paging.gcr3 & root_mask
    index_mask <<= entry_shift
    rights = ALL_RIGHTS
    no_execute = 0
    for name, _, leaf, reserved_table, reserved_leaf, granted, accessed, plain, down in levels:
        address = table + (gva >> down & index_mask)
        if nested is not None:
            address = walk_nested(paging, nested, ram, address, _TABLE_ACCESS, name, trail, updates)
        entry = entries[address >> entry_shift]
        trail.append((GUEST, name, "", address, entry))
        if entry & plain != OPEN:
            rights &= entry | granted
            no_execute |= entry
            if not entry & P:
                raise _guest_fault("present", paging, gva, access, 0)
            if entry & leaf:
                if reserved := entry & reserved_leaf:
                    raise _guest_fault("reserved", paging, gva, access, _RESERVED, reserved)
                break
            if reserved := entry & reserved_table:
                raise _guest_fault("reserved", paging, gva, access, _RESERVED, reserved)
        if accessed:
            updates.append((address, accessed, TABLE))
        table = entry & FRAME
    code = ErrorCode.P
    if paging.pkru and rights & US and not fetch and _key_denies(paging, entry, write, user):
        code |= ErrorCode.PK
    if shadow:
        if not _is_shadow_stack(levels, trail, user):
            raise _guest_fault("shadow-stack", paging, gva, access, code)
    elif user:
        if not rights & US:
            raise _guest_fault("user", paging, gva, access, code)
        if write and not rights & RW:
            raise _guest_fault("write", paging, gva, access, code)
    else:
        if rights & US:
            if fetch and paging.smep:
                raise _guest_fault("smep", paging, gva, access, code)
            if paging.smap and not fetch and (implicit or not paging.ac):
                raise _guest_fault("smap", paging, gva, access, code)
        if write and paging.wp and not rights & RW:
            raise _guest_fault("write", paging, gva, access, code)
    if fetch and no_execute & NX:
        raise _guest_fault("execute", paging, gva, access, code)
    if code & ErrorCode.PK:
        raise _guest_fault("key", paging, gva, access, code)
    updates.append((address, A | D if write else A, PAGE))
    return entry & FRAME | gva & 0xFFF if leaf == P else _in_large_page(entry, down + entry_shift, gva)


def _key_denies(paging: Paging, entry: int, write: bool, user: bool) -> bool:
    """Whether PKRU denies data of a user page whose leaf is `entry` (section 5.6.7): AD any access, WD
    writes; a supervisor's only while CR0.WP=1."""
    of_key = paging.pkru >> 2 * (entry >> KEY_SHIFT & 0xF)
    return bool(of_key & PKRU_AD or (write and of_key & PKRU_WD and (user or paging.wp)))


def _is_shadow_stack(levels: tuple[Level, ...], trail: Trail, user: bool) -> bool:
    """Whether the guest's entries of `trail` map a shadow stack of that privilege (section 5.7): R/W=0
    and D=1 in the leaf, R/W=1 in all above it that have one."""
    read = (step[4] for step in trail if step[0] is GUEST)
    *tables, leaf = (entry | level.granted for level, entry in zip(levels, read, strict=False))
    writable = all(entry & RW for entry in tables) and not leaf & RW and leaf & D
    return bool(writable) and all(entry & US for entry in (*tables, leaf)) == user


def _is_supervisor_shadow_stack(levels: tuple[Level, ...], trail: Trail, purpose: str) -> bool:
    """Whether the nested entries of `trail` designate the page for `purpose` as a supervisor's shadow stack
    (section 15.25.14): NX=1 and U/S=0 in the leaf, R/W=1 in all above it that have one."""
    read = (step[4] for step in trail if step[2] is purpose)
    *tables, leaf = (entry | level.granted for level, entry in zip(levels, read, strict=False))
    return bool(leaf & NX) and not leaf & US and all(entry & RW for entry in tables)


def _guest_fault(rule: str, paging: Paging, gva: int, access: Access, code: int, reserved: int = 0) -> Fault:
    """#PF (section 8.4.2): code bits that say what was tried, beside those that say what failed."""
    if access.write:
        code |= ErrorCode.W
    if access.user:
        code |= ErrorCode.U
    if access.fetch and paging.guest_id:
        code |= ErrorCode.ID
    if access.shadow_stack:
        code |= ErrorCode.SS
    return Fault(f"guest.{rule}", PageFault(code, gva), reserved)


def _denied(rule: str, paging: Paging, gpa: int, access: Access, purpose: str, leaf: int) -> Fault:
    """#NPF since a right is lacking; SSS where `leaf` marks a supervisor's shadow stack (section 15.25.14)."""
    sss = paging.sss and leaf & NX and not leaf & US
    return _nested_fault(rule, paging, gpa, access, purpose, ErrorCode.P | (ErrorCode.SSS if sss else 0))


def _nested_fault(
    rule: str, paging: Paging, gpa: int, access: Access, purpose: str, code: int, reserved: int = 0,
) -> Fault:
    """#NPF (section 15.25.6): the guest's table accesses report W and U, as the user writes they are. Only
    under GMET does U tell the CPL of a fetch."""
    code |= ErrorCode.FINAL if purpose == FINAL else ErrorCode.GUEST_TABLE
    if access.user or not (access.fetch and paging.gmet):
        code |= ErrorCode.U
    if access.write:
        code |= ErrorCode.W
    if access.fetch:
        code |= ErrorCode.ID
    if access.shadow_stack:
        code |= ErrorCode.SS
    return Fault(f"nested.{rule}", NestedPageFault(code, gpa), reserved)
