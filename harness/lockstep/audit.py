"""C5: every entry of the tables that the KVM under L1 runs L1 and L2 with, justified, at each switch.

L1 stands still at its records: before VMRUN the direct map is audited, and of the shadow what KVM holds to be in step
with L1's nested table; behind #VMEXIT, of which L2 has run on it since its last flush, all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Final, Protocol

from harness.errors import MachineLost
from harness.lockstep.compare import Context, Divergence
from harness.model.backing import Kvm, look_up
from harness.model.entries import PAGE_SHIFTS, Format
from harness.model.memory import Memory
from harness.model.ranges import NestedTable
from harness.model.registers import Cpu
from harness.model.shadow import Auditor, Breach
from harness.model.vmcb import FIELDS, NP_ENABLE, ExitCode
from harness.model.vmrun import table_format
from harness.wire.layout import RECORDS, VMRUN_RAISED
from harness.wire.records import Record

_INVALID: Final = 0xFFFF_FFFF
_SIZES: Final = {shift: name for name, shift in PAGE_SHIFTS.items()}
_TOLD: Final = 4096


class L0(Protocol):
    """The kernel under L1, as it lies in its memory."""

    @property
    def memory(self) -> Memory:
        """All of it."""

    @property
    def shadow_format(self) -> Format:
        """Of the tables that it builds for the processor."""

    @property
    def host_format(self) -> Format:
        """Of its own."""

    def look(self) -> Kvm:
        """What its KVM has now. Raises ValueError for what makes no sense."""


class Sink(Protocol):
    """Where findings of a scenario go, and counts."""

    shadow_audits: int
    shadow_leaves: int
    divergences: list[Divergence]


class Audit:
    """Audits one in `every` switches. `memory` is L1's, `cpu` L1's; `lost` makes the error that the machine is lost."""

    def __init__(self, l0: L0, memory: memoryview, cpu: Cpu, every: int, lost: Callable[[str], MachineLost]) -> None:
        self._l0, self._memory, self._cpu, self._every, self._lost = l0, memory, cpu, every, lost
        self._auditor = Auditor(l0.memory, l0.shadow_format, l0.host_format)
        self._switches = 0
        self._control = b""
        self._then: tuple[int, bytes] = 0, b""
        self._last: NestedTable | None = None
        self._told: set[tuple[str, int, int]] = set()

    def saw(self, sink: Sink, where: Context, record: Record) -> None:
        """A record of a VMRUN, at which L1 stands still."""
        if record.kind == RECORDS["ENTER"]:
            self.entering(sink, where, record.control)
        elif record.kind == RECORDS["EXIT"]:
            self.left(sink, where, record.before, record.exitcode)

    def entering(self, sink: Sink, where: Context, control: bytes) -> None:
        """L1 is about to execute VMRUN, with that control area in its VMCB."""
        start, end = where.tables
        self._control, self._then = control, (start, self._memory[start:end].tobytes())
        if self._is_due():
            self._audit(sink, where, entering=True)

    def left(self, sink: Sink, where: Context, host: Mapping[str, int], code: int) -> None:
        """L1 is behind that VMRUN: with its registers `host`, and the exit code."""
        due = self._is_due()
        if not _ran(code):
            self._last = None  # KVM may have begun with it
            return
        self._last = self._nested(host)
        if due:
            self._audit(sink, where, entering=False)

    def _is_due(self) -> bool:
        self._switches += 1
        return not self._switches % self._every

    def _audit(self, sink: Sink, where: Context, entering: bool) -> None:
        auditor = self._auditor
        try:
            kvm = self._l0.look()
            auditor.begin(kvm)
            auditor.leaves = 0
            found = [*auditor.direct(kvm.l1_root), *self._of_l2(kvm, entering)]
        except (ValueError, IndexError) as reason:
            raise self._lost(f"the shadow cannot be audited: {reason}") from None
        sink.shadow_audits += 1
        sink.shadow_leaves += auditor.leaves
        sink.divergences += self._divergences(where, kvm, found)

    def _of_l2(self, kvm: Kvm, entering: bool) -> Iterable[Breach]:
        """What L2 runs on: a shadow or, without nested paging, a direct map."""
        if not kvm.l2_root:
            return ()
        if self._last is None:
            return () if entering else self._auditor.direct(kvm.l2_root)
        if entering:
            known = kvm.tables.get(kvm.l2_root)
            there = kvm.l2_root in kvm.stitched or (known is not None and not known.invalid)
            return () if not there else self._auditor.shadow(kvm.l2_root, self._last, synced=True)
        earlier = NestedTable(self._last.format, self._last.ncr3, self._auditor.backing, self._l0.memory.words,
                              self._before)
        return self._auditor.shadow(kvm.l2_root, self._last, earlier)

    def _nested(self, host: Mapping[str, int]) -> NestedTable | None:
        """The table that L2 ran on; None without nested paging."""
        if not self._get("np_control") & NP_ENABLE:
            return None
        fmt = table_format(host["cr0"], host["cr4"], host["efer"], self._cpu)
        assert fmt is not None, "VMRUN is refused with paging off"
        return NestedTable(fmt, self._get("ncr3"), self._auditor.backing, self._l0.memory.words)

    def _get(self, name: str) -> int:
        at = FIELDS[name]
        return int.from_bytes(self._control[at.offset : at.offset + at.width], "little")

    def _before(self, spa: int) -> int | None:
        """What was in a quadword of L1's tables at VMRUN."""
        start, data = self._then
        return int.from_bytes(data[spa - start : spa - start + 8], "little") if 0 <= spa - start < len(data) else None

    def _divergences(self, where: Context, kvm: Kvm, found: Iterable[Breach]) -> Iterator[Divergence]:
        """Each entry once, however often it is found."""
        for one in found:
            key = one.rule, one.address, one.entry
            if key not in self._told:
                if len(self._told) > _TOLD:
                    self._told.clear()
                self._told.add(key)
                yield Divergence(where.scenario, where.op, -1, "C5", _field(one), one.expected, one.observed, one.rule,
                                 events=tuple(self._chain(kvm, one)))

    def _chain(self, kvm: Kvm, one: Breach) -> Iterator[str]:
        """The entries of all tables that have to do with it, the one in question marked."""
        if self._last is not None and not one.direct:
            for name, at, entry in self._last.steps(one.gpa):
                yield f"  L1's table       {name:6} at sPA {at:#x}: {entry:#x}"
        if one.spa >= 0:
            slot = self._auditor.backing.slot(one.spa)
            yield f"  L0's slot        {slot or f'none has sPA {one.spa:#x}'}"
            for name, at, entry in self._auditor.backing.walk(one.spa):
                yield f"  L0's page map    {name:6} at hPA {at:#x}: {entry:#x}"
        table, root = ("the direct map", kvm.l1_root) if one.direct else ("the shadow", kvm.l2_root)
        trail: list[tuple[str, int, int]] = []
        with suppress(IndexError):  # it leads out of L0's memory
            look_up(self._l0.memory.words, self._l0.shadow_format, root, one.gpa, trail)
        for name, at, entry in trail:
            yield f"{'>' if at == one.address else ' '} {table:16} {name:6} at hPA {at:#x}: {entry:#x}"


def _field(one: Breach) -> str:
    """Of which entry."""
    if one.rule == "shadow.table":
        return f"table for gPA {one.gpa:#x} in the shadow"
    kind = "direct map" if one.direct else "shadow"
    return f"{_SIZES.get(one.shift, f'2^{one.shift}')} leaf for gPA {one.gpa:#x} in the {kind}"


def _ran(code: int) -> bool:
    """Whether the processor surely ran L2: VMRUN was neither refused nor raised an exception; nor did it come to a
    shutdown, which KVM makes of a table that it can build no root for, without running L2."""
    return code & _INVALID not in (_INVALID, ExitCode.SHUTDOWN) and code >> 32 != VMRUN_RAISED >> 32
