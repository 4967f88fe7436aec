"""C5: every entry of the tables that the KVM under L1 runs L1 and L2 with, justified, at each switch.

L1 stands still at its records: before VMRUN the direct map is audited, and of the shadow what KVM holds to be in step
with L1's nested table; behind #VMEXIT, of which L2 has run on it since its last flush, all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple, Protocol

from harness.errors import MachineLost
from harness.lockstep.audited import Evidence, Look, Ran, divergence, field_of, gather
from harness.lockstep.compare import Context, Divergence
from harness.model.backing import Kvm, Shape
from harness.model.memory import Memory
from harness.model.registers import Cpu
from harness.model.shadow import Auditor, Breach
from harness.model.vmcb import ExitCode
from harness.wire.layout import RECORDS, VMRUN_RAISED
from harness.wire.records import Record

_INVALID: Final = 0xFFFF_FFFF
_TOLD: Final = 4096


class L0(Protocol):
    """The kernel under L1, as it lies in its memory."""

    @property
    def memory(self) -> Memory:
        """All of it."""

    @property
    def shape(self) -> Shape:
        """Of the tables that it builds."""

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
        self._auditor = Auditor(l0.memory, *l0.shape.formats())
        self._switches = 0
        self._control = b""
        self._then: tuple[int, bytes] = 0, b""
        self._ran: Ran | None = None
        self._looks: tuple[Look, ...] = ()
        self._found: list[_Found] = []
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
            self._ran = None  # KVM may have begun with it
            return
        self._ran = Ran(self._control, host["cr0"], host["cr4"], host["efer"])
        if due:
            self._audit(sink, where, entering=False)

    def evidence(self, of: Divergence) -> Evidence:
        """What a divergence of the latest audit was made of; to be asked before the machine goes on."""
        one = next(one for one in self._found if (field_of(one.breach), one.breach.rule, one.breach.observed) == (
            of.field, of.rule, of.observed))
        return gather(self._l0.memory, self._l0.shape, self._cpu, one.breach, one.of_l2, self._looks, self._auditor.was)

    def _is_due(self) -> bool:
        self._switches += 1
        return not self._switches % self._every

    def _audit(self, sink: Sink, where: Context, entering: bool) -> None:
        auditor = self._auditor
        try:
            kvm = self._l0.look()
            look = Look(kvm, self._ran, entering)
            self._looks = (*self._looks[-1:], look)
            auditor.begin(kvm)
            auditor.leaves = 0
            self._found = [_Found(False, one) for one in auditor.direct(kvm.l1_root)]
            self._found += [_Found(True, one) for one in self._of_l2(kvm, entering)]
        except (ValueError, IndexError) as reason:
            raise self._lost(f"the shadow cannot be audited: {reason}") from None
        sink.shadow_audits += 1
        sink.shadow_leaves += auditor.leaves
        sink.divergences += self._divergences(where, look)

    def _of_l2(self, kvm: Kvm, entering: bool) -> Iterable[Breach]:
        """What L2 runs on: a shadow or, without nested paging, a direct map."""
        if not kvm.l2_root:
            return ()
        memory = self._l0.memory
        nested = self._ran.nested(self._auditor, memory, self._cpu) if self._ran is not None else None
        if self._ran is None or nested is None:
            return () if entering else self._auditor.direct(kvm.l2_root)
        if entering:
            known = kvm.tables.get(kvm.l2_root)
            there = kvm.l2_root in kvm.stitched or (known is not None and not known.invalid)
            return () if not there else self._auditor.shadow(kvm.l2_root, nested, synced=True)
        earlier = self._ran.nested(self._auditor, memory, self._cpu, self._before)
        return self._auditor.shadow(kvm.l2_root, nested, earlier)

    def _before(self, spa: int) -> int | None:
        """What was in a quadword of L1's tables at VMRUN."""
        start, data = self._then
        return int.from_bytes(data[spa - start : spa - start + 8], "little") if 0 <= spa - start < len(data) else None

    def _divergences(self, where: Context, look: Look) -> Iterator[Divergence]:
        """Each entry once, however often it is found."""
        for of_l2, one in self._found:
            key = one.rule, one.address, one.entry
            if key not in self._told:
                if len(self._told) > _TOLD:
                    self._told.clear()
                self._told.add(key)
                place = where.scenario, where.op
                yield divergence(place, one, self._auditor, self._l0.memory, look, self._cpu, of_l2)


class _Found(NamedTuple):
    """A breach, in what L2 runs on or in what L1 does."""

    of_l2: bool
    breach: Breach


def _ran(code: int) -> bool:
    """Whether the processor surely ran L2: VMRUN was neither refused nor raised an exception; nor did it come to a
    shutdown, which KVM makes of a table that it can build no root for, without running L2."""
    return code & _INVALID not in (_INVALID, ExitCode.SHUTDOWN) and code >> 32 != VMRUN_RAISED >> 32
