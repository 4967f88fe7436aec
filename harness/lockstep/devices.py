"""Accesses of L2 that are not just of RAM: INS and OUTS, and those of the registers of L1's local APIC.

A hypervisor under L1 carries them out itself, by walks of its own through both dimensions. What comes of them is
the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.lockstep import instructions
from harness.lockstep.delivery import Leave
from harness.lockstep.nested_tables import NestedTables
from harness.lockstep.quirks import (
    EMULATED_FAULT_PLACE,
    REPEATED_INS_LOST,
    SOFTWARE_WALK_FAULT,
    SOFTWARE_WALK_OFFSET,
    STRING_WRITE_HALVES,
)
from harness.model import local_apic
from harness.model.access import Access, ErrorCode, NestedPageFault
from harness.model.entries import FRAME
from harness.model.registers import RFLAGS
from harness.model.vmcb import ExitCode
from harness.model.walk import Walk
from harness.scenario.ops import REPEATED

if TYPE_CHECKING:
    from harness.lockstep.l2 import L2

_READ: Final = {cpl: Access(user=cpl == 3) for cpl in range(4)}
_WRITE: Final = {cpl: Access(write=True, user=cpl == 3) for cpl in range(4)}
_FETCH: Final = {cpl: Access(fetch=True, user=cpl == 3) for cpl in range(4)}
_IN_PAGE: Final = 0xFFF
_LOW: Final = 0xFFFF_FFFF
_FLAT: Final = 0xC93
"""Attributes of a flat data segment."""


def check(spa: int, width: int, written: int | None = None, rmw: bool = False) -> None:
    """Raises UsageError where an access of `width` bytes, in the local APIC if `spa` is, is none that is defined."""
    if not local_apic.has(spa):
        return
    bits = None if rmw else local_apic.writable(spa, width)
    if bits is None:
        raise UsageError(f"{width} bytes at sPA {spa:#x}: of the local APIC's registers only those that hold a value "
                         f"are modelled, {', '.join(map(hex, local_apic.WRITABLE))}, read or written by 4 bytes")
    if written is not None and written & ~bits:
        raise UsageError(f"{written:#x} at sPA {spa:#x} of the local APIC: it sets reserved bits")


def cannot_be_emulated(l2: L2, reached: Sequence[tuple[int, int, int]]) -> bool:
    """By a quirk: whether the access of the bytes `reached` is of a device and ends otherwise."""
    return any(local_apic.has(spa) for spa, _, _ in reached) and instructions.cannot_be_emulated(l2)


def fault(l2: L2, walk: Walk) -> Walk:
    """`walk`, which faults; by a quirk, a nested fault of a device's page is told at its first byte."""
    match walk.outcome:
        case NestedPageFault(code, gpa) if code & ErrorCode.FINAL and local_apic.has(walk.trail[-1][4] & FRAME):
            if gpa & _IN_PAGE and l2.state.quirks.has(SOFTWARE_WALK_OFFSET):
                return walk._replace(outcome=NestedPageFault(code, gpa & ~_IN_PAGE))
    return walk


def place(l2: L2, walk: Walk, code: int, gpa: int) -> tuple[int, int]:
    """EXITINFO1 and 2 of a nested fault. By a quirk, where L2's walks write to a page of which a hypervisor keeps a
    shadow, it carries out the instruction by walks of its own, and they are those of the entry that had it do so, or
    have its own walk's address. Which pages it has from earlier programs cannot be known, only seen."""
    seen, quirks = l2.state.seen, l2.state.quirks
    if not quirks or l2.paging.guest is None or seen is None or seen.exitcode != ExitCode.NPF:
        return code, gpa
    fetched = l2.walk(l2.regs.rip + l2.base & l2.mask, _FETCH[l2.regs.cpl])
    l2.out.accesses.pop()  # L2 makes none here
    stale = seen.fault_code == code & _LOW | ErrorCode.GUEST_TABLE and seen.fault_address != gpa
    if stale and seen.fault_address in (*_tables(l2, walk), *_tables(l2, fetched)) and quirks.has(EMULATED_FAULT_PLACE):
        return seen.fault_code, seen.fault_address
    if gpa & _IN_PAGE and SOFTWARE_WALK_OFFSET in quirks.names and l2.paging.nested is not None:
        kept = NestedTables(l2.paging.ncr3, l2.paging.nested, l2.state.memory.bytes).pages()
        own = {step[3] & ~_IN_PAGE for step in (*fetched.trail, *walk.trail) if step[0] == "guest"}
        if own.intersection(kept) and quirks.has(SOFTWARE_WALK_OFFSET):
            return code, gpa & ~_IN_PAGE
    return code, gpa


def _tables(l2: L2, walk: Walk) -> Iterator[int]:
    """The gPA of each entry of L2's own that `walk` reads."""
    assert l2.paging.guest is not None
    table = l2.paging.gcr3 & l2.paging.guest.root_mask
    for dimension, _, _, address, entry in walk.trail:
        if dimension == "guest":
            yield table & ~_IN_PAGE | address & _IN_PAGE
            table = entry & FRAME


def string(l2: L2, kind: str, size: int, address: int, count: int, index: int) -> int:
    """INS and OUTS (volume 3): the port is asked for before memory. Returns what rDI, or rSI, is behind it: with DF it
    goes down. Those that repeat do it `count` times, and a fault leaves them where they are (volume 3, REP)."""
    ins, repeated = kind in ("ins", "repins"), kind in REPEATED
    left, base = count if repeated else 1, _base(l2, kind[4:]) if kind in ("outsfs", "outsgs") else 0
    at = address
    _stands(l2, ins, address, at, left, repeated)
    instructions.string_port(l2, kind, size, left)
    while left:
        try:
            (_ins if ins else _outs)(l2, size, at + base & l2.mask, index)
        except Leave as leave:
            _by_software(l2, leave)
            at_once = ins and at != address and not l2.regs.rflags & RFLAGS.DF
            if at_once and l2.state.quirks.has(REPEATED_INS_LOST):
                _stands(l2, ins, address, address, count, repeated)
            raise
        at, left = at + (-size if l2.regs.rflags & RFLAGS.DF else size) & l2.mask, left - 1
        _stands(l2, ins, address, at, left, repeated)
    l2.registers = {"rsi": l2.step.c}
    return at


def _stands(l2: L2, ins: bool, address: int, at: int, left: int, repeated: bool) -> None:
    """Note the registers of a string instruction that has come to `at`, with `left` repetitions to do."""
    l2.registers = {"rsi": l2.step.c if ins else at}
    if repeated:
        l2.registers |= {"rcx": left, "rdi": at if ins else address}


def _base(l2: L2, segment: str) -> int:
    """The base of FS or GS; of legacy mode's segments only flat ones are modelled."""
    vmcb = l2.state.vmcb
    if not l2.state.mode.long and (vmcb[f"{segment}.attrib"], vmcb[f"{segment}.limit"]) != (_FLAT, 0xFFFF_FFFF):
        raise UsageError(f"OUTS through an {segment.upper()} that is not a flat data segment is not modelled")
    return vmcb[f"{segment}.base"]


def _ins(l2: L2, size: int, address: int, index: int) -> None:
    value = l2.state.written_outside("cf8")
    first = min(size, 0x1000 - (address & _IN_PAGE))
    begun = len(l2.out.accesses)
    try:
        _store(l2, value, size, address, index)
    except Leave as leave:
        second = first < size and len(l2.out.accesses) == begun + 2 and leave.event is None
        if not second or leave.code == ExitCode.HLT or not l2.state.quirks.has(STRING_WRITE_HALVES):
            raise
        _store(l2, value, first, address, index)
        _store(l2, value >> 8 * first, size - first, address + first & l2.mask, index)


def _store(l2: L2, value: int, size: int, address: int, index: int) -> None:
    l2.writes = value & (1 << 8 * size) - 1
    for spa, at, width in _reach(l2, _WRITE[l2.regs.cpl], size, address, index):
        mask = (1 << 8 * width) - 1
        l2.store(spa, value >> 8 * at & mask, mask)


def _outs(l2: L2, size: int, address: int, index: int) -> None:
    l2.writes = None
    l2.state.outside["cf8"] = l2.read(_reach(l2, _READ[l2.regs.cpl], size, address, index))


def _reach(l2: L2, access: Access, size: int, address: int, index: int) -> list[tuple[int, int, int]]:
    """As L2's own accesses do; by a quirk, under the translation that a hypervisor's own walks are under."""
    hardware = l2.paging
    with l2.state.quirks.by_software(hardware) as l2.paging:
        try:
            return l2.reach(access, address, size, index)
        finally:
            l2.paging = hardware


def _by_software(l2: L2, leave: Leave) -> None:
    """By a quirk: a nested fault of the hypervisor's own walk is told as one of the page itself, at its first byte."""
    if leave.code != ExitCode.NPF:
        return
    code, quirks = leave.info1 & ~ErrorCode.GUEST_TABLE | ErrorCode.FINAL, l2.state.quirks
    if (code, leave.info2 & ~_IN_PAGE) != (leave.info1, leave.info2) and quirks.has(SOFTWARE_WALK_FAULT):
        leave.info1, leave.info2 = code, leave.info2 & ~_IN_PAGE
    if leave.info2 & _IN_PAGE and quirks.has(SOFTWARE_WALK_OFFSET):
        leave.info2 &= ~_IN_PAGE
