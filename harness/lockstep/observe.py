"""A foreign L1 and its L2, held against the model at each VMRUN and each #VMEXIT. Nobody scripted them: what they do is
taken as it comes, and only what no correct processor, or no correct L1, could have done is a divergence.

Findings about the processor have the checks that they have elsewhere: C1 outcomes, C2 tables, C3 state. `L1` is a
finding about L1 itself: it took something away in its nested tables, and runs the same ASID again with no flush.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from harness.lockstep import exits
from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum, Known, explain, quirks_of
from harness.lockstep.exits import Entered, Exit
from harness.lockstep.nested_tables import Change, NestedTables
from harness.lockstep.quirks import Active
from harness.lockstep.signature import signature
from harness.model.consistency import violations
from harness.model.entries import A
from harness.model.memory import Memory
from harness.model.registers import Cpu
from harness.model.vmcb import NP_ENABLE, ExitCode, Vmcb
from harness.model.vmrun import Host, table_format
from harness.wire.stop import ENTER, EXIT, Stop

KEPT: Final = 50
"""Divergences of one signature that are kept; the others are counted."""

_ROOTS: Final = 16
"""Nested tables that are remembered, those used last."""
_NAMED: Final = 4
"""Changed entries that a finding about L1 names."""
_PAGE: Final = 4096


@dataclass
class Seen:
    """What was seen, in figures."""

    vmruns: int = 0
    refused: int = 0
    exits: Counter[str] = field(default_factory=Counter)
    by_signature: Counter[str] = field(default_factory=Counter)
    unpaired: int = 0
    """#VMEXITs whose VMRUN nobody saw, and VMRUNs whose #VMEXIT nobody saw."""
    elsewhere: int = 0
    """Walks that led out of L1's RAM, so that nothing can be said of them."""
    overtaken: int = 0
    """#VMEXITs before which another processor changed nested tables: faults are not judged then."""
    table_bytes: int = 0
    divergences: list[Divergence] = field(default_factory=list)


class Observer:
    """`memory` is L1's RAM from sPA 0 on; `errata` those of the machine, the most specific first."""

    def __init__(self, name: str, memory: memoryview, cpu: Cpu, errata: Sequence[Erratum] = ()) -> None:
        self.seen = Seen()
        self._name = name
        self._memory = Memory.over(memory)
        self._cpu = cpu
        self._errata = Known(errata)
        self._quirks = quirks_of(errata)
        self._entered: dict[int, Entered] = {}
        self._tables: dict[tuple[int, str], NestedTables] = {}
        self._ran: dict[int, set[tuple[int, str]]] = {}
        self._taken_away: dict[int, list[Change]] = {}

    @property
    def inside(self) -> bool:
        """Whether a VMRUN was seen whose #VMEXIT has not been."""
        return bool(self._entered)

    def plausible(self, stop: Stop) -> bool:
        """Whether RAX can be the address of a VMCB."""
        rax = stop.host["rax"]
        return not rax % _PAGE and rax + _PAGE <= len(self._memory.bytes)

    def stop(self, stop: Stop) -> list[Divergence]:
        """What is wrong at this stop, which follows on the last one; the first of each sort is kept in `seen`."""
        if stop.kind not in (ENTER, EXIT):
            return []
        vmcb = Vmcb(self._memory, stop.host["rax"])
        found = list(self._enter(stop, vmcb)) if stop.kind == ENTER else self._exit(stop, vmcb)
        for one in found:
            sort = str(signature(one)) + (f" ({one.erratum})" if one.erratum else "")
            self.seen.by_signature[sort] += 1
            if self.seen.by_signature[sort] <= KEPT:
                self.seen.divergences.append(one)
        return found

    def _enter(self, stop: Stop, vmcb: Vmcb) -> Iterator[Divergence]:
        seen, registers = self.seen, stop.host
        seen.unpaired += stop.vcpu in self._entered
        host = Host(registers["cr0"], registers["cr4"], registers["efer"], pat=0, dr7=0)
        try:
            broken = tuple(violations(vmcb, host, self._cpu, self._memory.words))
        except IndexError:
            broken = ()
            seen.elsewhere += 1
        entered = Entered(seen.vmruns, vmcb.address, *exits.halves(vmcb), broken, registers, host)
        self._entered[stop.vcpu] = entered
        seen.vmruns += 1
        if broken:
            seen.refused += 1
        elif vmcb["np_control"] & NP_ENABLE:
            yield from self._flushes(entered, vmcb)

    def _flushes(self, entered: Entered, vmcb: Vmcb) -> Iterator[Divergence]:
        """What L1 took away in its nested tables since the ASID ran on them must be flushed (15.16.1, 15.25.5)."""
        asid, key = vmcb["asid"], self._key(vmcb, entered.host)
        for change in self._look(key, entered.host):
            if change.lost and change.old & A:  # without A no translation was made of it
                for other, roots in self._ran.items():
                    if key in roots:
                        self._taken_away.setdefault(other, []).append(change)
        control = vmcb["tlb_control"]
        if control and (control == 1 or "flushbyasid" in self._cpu.features):
            for other in [asid] if control != 1 else list(self._ran):
                self._ran.pop(other, None)
                self._taken_away.pop(other, None)
        if lost := self._taken_away.pop(asid, None):
            named = tuple(f"entry at sPA {one.address:#x}: was {one.old:#x}, is {one.new:#x}" for one in lost[:_NAMED])
            yield Divergence(self._name, entered.number, -1, "L1", "tlb_control",
                             f"a flush of ASID {asid}, of {len(lost)} changed nested entries", f"{control:#x}",
                             "tlb.control", events=named)
        self._ran.setdefault(asid, set()).add(key)

    def _key(self, vmcb: Vmcb, host: Host) -> tuple[int, str]:
        fmt = table_format(host.cr0, host.cr4, host.efer, self._cpu)
        return vmcb["ncr3"], fmt.name if fmt is not None else ""

    def _look(self, key: tuple[int, str], host: Host) -> list[Change]:
        """What changed in those tables since they were last looked at; the tables are known from now on."""
        tables = self._tables.pop(key, None)
        changes: list[Change] = []
        if tables is None:
            fmt = table_format(host.cr0, host.cr4, host.efer, self._cpu)
            assert fmt is not None  # VMRUN is refused else
            tables = NestedTables(key[0], fmt, self._memory.bytes)
        else:
            before = tables.bytes_compared
            changes = tables.refresh()
            self.seen.table_bytes += tables.bytes_compared - before
        self._tables[key] = tables
        if len(self._tables) > _ROOTS:
            oldest = next(iter(self._tables))
            del self._tables[oldest]
        return changes

    def _exit(self, stop: Stop, vmcb: Vmcb) -> list[Divergence]:
        entered = self._entered.pop(stop.vcpu, None)
        code = vmcb["exitcode"]
        self.seen.exits[ExitCode.describe(code)] += 1
        if entered is None or entered.vmcb != vmcb.address:
            self.seen.unpaired += 1
            return []
        it = Exit(self._name, entered, vmcb, self._memory, self._cpu)
        found = list(exits.host(it, stop.host)) + list(exits.unchanged(it)) + list(exits.saved(it))
        judged = True
        if vmcb["np_control"] & NP_ENABLE and not entered.broken:
            tables, key = [], self._key(vmcb, entered.host)
            changes = self._look(key, entered.host)
            wrong = [(one, self._tables[key].wrong_bits(one)) for one in changes]
            if stop.alone:
                tables = [it.found("C2", f"entry at sPA {one.address:#x}", one.new ^ bits, one.new, "ad")
                          for one, bits in wrong if bits]
            elif any(bits for _, bits in wrong):
                judged = False
                self.seen.overtaken += 1
            found += tables
        if judged:
            found += self._judged(it)
        return explain(found, self._errata)

    def _judged(self, it: Exit) -> list[Divergence]:
        """By the model; where that fails, once more with what is known of this machine's MMU."""
        try:
            found = self._judge(it, Active())
            if found and self._quirks:
                quirks = Active(self._quirks)
                if not self._judge(it, quirks) and quirks.played:
                    return [one.explained_by("+".join(sorted(self._quirks[name] for name in quirks.played)))
                            for one in found]
            return found
        except IndexError:
            self.seen.elsewhere += 1
            return []

    def _judge(self, it: Exit, quirks: Active) -> list[Divergence]:
        found = list(exits.refusal(it, quirks))
        if not found and not exits.was_refused(it.vmcb["exitcode"]):
            found = list(exits.outcome(it, quirks))
        return found
