"""What a finding in the tables of the KVM under L1 was made of (C5), so that it can be judged again with no machine:
what KVM had at that audit and at the one before, and of L0's memory what is read on the way to the entry in question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

from harness.lockstep.compare import Divergence
from harness.lockstep.evidence import PAGE
from harness.model.backing import Kvm, Shape, look_up
from harness.model.entries import PAGE_SHIFTS
from harness.model.memory import Bytes, Memory, Room
from harness.model.ranges import Before, NestedTable
from harness.model.registers import Cpu
from harness.model.shadow import Auditor, Breach
from harness.model.vmcb import FIELDS, NP_ENABLE
from harness.model.vmrun import table_format

_SIZES: Final = {shift: name for name, shift in PAGE_SHIFTS.items()}


class Ran(NamedTuple):
    """What L2 ran by: the control area of its VMCB, and L1's CR0, CR4 and EFER."""

    control: bytes
    cr0: int
    cr4: int
    efer: int

    def nested(self, auditor: Auditor, memory: Room, cpu: Cpu, before: Before | None = None) -> NestedTable | None:
        """L1's nested table; None without nested paging."""
        if not self._get("np_control") & NP_ENABLE:
            return None
        fmt = table_format(self.cr0, self.cr4, self.efer, cpu)
        assert fmt is not None, "VMRUN is refused with paging off"
        return NestedTable(fmt, self._get("ncr3"), auditor.backing, memory.words, before)

    def _get(self, name: str) -> int:
        at = FIELDS[name]
        return int.from_bytes(self.control[at.offset : at.offset + at.width], "little")


class Look(NamedTuple):
    """An audit: what KVM had, what L2 ran by (None where it had not), whether tables that are out of step were left
    out; and pages of L0's memory, by hPA: of the second look, those that are others than at the first."""

    kvm: Kvm
    ran: Ran | None
    synced: bool
    pages: Mapping[int, bytes] = {}


class Evidence(NamedTuple):
    """Of an entry by which `gpa` is translated, in what L2 runs on (`of_l2`) or L1 does. L0 has `memory` bytes. The
    entry is found at the last of the `looks`, of which there are one or two."""

    memory: int
    shape: Shape
    of_l2: bool
    gpa: int
    looks: tuple[Look, ...]


class Reading:
    """L0's memory with some pages as they `were`; `pages` are those that were read, by hPA, as they are in it."""

    def __init__(self, memory: Memory, were: Mapping[int, bytes]) -> None:
        self._memory, self._were = memory, were
        self.pages: dict[int, bytes] = {}
        self.bytes: Bytes = _Bytes(self)
        self.words = self

    def __len__(self) -> int:
        return len(self._memory.bytes)

    def __getitem__(self, index: int) -> int:
        at = index * 8
        return int.from_bytes(self.page(at & -PAGE)[at % PAGE : at % PAGE + 8], "little")

    def __setitem__(self, index: int, value: int) -> None:
        raise TypeError("an audit only reads")

    def page(self, hpa: int) -> bytes:
        if hpa not in self.pages:
            data = self._were.get(hpa) or self._memory.bytes[hpa : hpa + PAGE].tobytes()
            if len(data) < PAGE:
                raise IndexError(hpa)
            self.pages[hpa] = data
        return self.pages[hpa]


class _Bytes:
    def __init__(self, of: Reading) -> None:
        self._of = of

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, at: slice) -> memoryview:
        """Of one page at most."""
        page = at.start & -PAGE
        return memoryview(self._of.page(page))[at.start - page : at.stop - page]


def gather(memory: Memory, shape: Shape, cpu: Cpu, breach: Breach, of_l2: bool, looks: Iterable[Look],
           were: Mapping[int, bytes]) -> Evidence:
    """The evidence of a breach at the last of these looks, which have no pages yet; `were` are pages as they were at
    the look before it, where they are others now."""
    looks = tuple(looks)
    seen = [Reading(memory, were if one is not looks[-1] else {}) for one in looks]
    for one, view in zip(looks, seen, strict=True):
        with suppress(IndexError, ValueError):  # at the look before there may have been less
            auditor = Auditor(view, *shape.formats())
            for found in _audit(auditor, view, one, cpu, of_l2, breach.gpa):
                divergence(("", 0), found, auditor, view, one, cpu, of_l2)
    needed = sorted({hpa for view in seen for hpa in view.pages})
    contents = [{hpa: view.page(hpa) for hpa in needed} for view in seen]
    for hpa in needed if len(contents) > 1 else ():
        if contents[0][hpa] == contents[1][hpa]:
            del contents[1][hpa]
    return Evidence(len(memory.bytes), shape, of_l2, breach.gpa,
                    tuple(one._replace(pages=pages) for one, pages in zip(looks, contents, strict=True)))


def judge_again(name: str, evidence: Evidence, cpu: Cpu) -> list[Divergence]:
    """What the model says to the tables of a finding, as far as they are on the way to it. Raises ValueError and
    IndexError for evidence that makes no sense."""
    memory, auditor, out = Memory(evidence.memory), None, list[Divergence]()
    for look in evidence.looks:
        for hpa, data in look.pages.items():
            memory.bytes[hpa : hpa + PAGE] = data
        auditor = auditor or Auditor(memory, *evidence.shape.formats())
        found = list(_audit(auditor, memory, look, cpu, evidence.of_l2, evidence.gpa))
        out = [divergence((name, 0), one, auditor, memory, look, cpu, evidence.of_l2) for one in found]
    return out


def _audit(auditor: Auditor, memory: Room, look: Look, cpu: Cpu, of_l2: bool, gpa: int) -> Iterator[Breach]:
    """What is wrong on the way to that gPA."""
    auditor.begin(look.kvm)
    root = look.kvm.l2_root if of_l2 else look.kvm.l1_root
    if not root:
        return
    nested = look.ran.nested(auditor, memory, cpu) if of_l2 and look.ran is not None else None
    yield from auditor.direct(root, gpa) if nested is None else auditor.shadow(root, nested, None, look.synced, gpa)


def divergence(where: tuple[str, int], one: Breach, auditor: Auditor, memory: Room, look: Look, cpu: Cpu, of_l2: bool
               ) -> Divergence:
    """A breach as one, of a scenario's op, with the entries of all tables that have to do with it."""
    nested = look.ran.nested(auditor, memory, cpu) if look.ran is not None else None
    root = look.kvm.l2_root if of_l2 else look.kvm.l1_root
    return Divergence(*where, -1, "C5", field_of(one), one.expected, one.observed, one.rule,
                      events=tuple(_chain(one, auditor, memory, nested, root)))


def _chain(one: Breach, auditor: Auditor, memory: Room, nested: NestedTable | None, root: int) -> Iterator[str]:
    """The entries of all tables, the one in question marked."""
    if nested is not None and not one.direct:
        for name, at, entry in nested.steps(one.gpa):
            yield f"  L1's table       {name:6} at sPA {at:#x}: {entry:#x}"
    if one.spa >= 0:
        slot = auditor.backing.slot(one.spa)
        yield f"  L0's slot        {slot or f'none has sPA {one.spa:#x}'}"
        for name, at, entry in auditor.backing.walk(one.spa):
            yield f"  L0's page map    {name:6} at hPA {at:#x}: {entry:#x}"
    table = "the direct map" if one.direct else "the shadow"
    trail: list[tuple[str, int, int]] = []
    with suppress(IndexError):  # it leads out of L0's memory
        look_up(memory.words, auditor.format, root, one.gpa, trail)
    for name, at, entry in trail:
        yield f"{'>' if at == one.address else ' '} {table:16} {name:6} at hPA {at:#x}: {entry:#x}"


def field_of(one: Breach) -> str:
    """Of which entry it is, as the field of a divergence."""
    if one.rule == "shadow.table":
        return f"table for gPA {one.gpa:#x} in the shadow"
    kind = "direct map" if one.direct else "shadow"
    return f"{_SIZES.get(one.shift, f'2^{one.shift}')} leaf for gPA {one.gpa:#x} in the {kind}"
