"""A foreign L1 and its L2, held against the model at each VMRUN and each #VMEXIT. Nobody scripted them: what they do is
taken as it comes, and only what no correct processor, or no correct L1, could have done is a divergence.

Findings about the processor have the checks that they have elsewhere: C1 outcomes, C2 tables, C3 state. `L1` is a
finding about L1 itself: it took something away in its nested tables, and runs the same ASID again with no flush.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from harness.lockstep import audited, exits
from harness.lockstep.active import Active
from harness.lockstep.audit import Audit
from harness.lockstep.compare import Context, Divergence
from harness.lockstep.errata import Erratum, Known, explain, quirks_of
from harness.lockstep.evidence import PAGE, Evidence, Moment, Touched, with_entries
from harness.lockstep.exits import Entered, Exit
from harness.lockstep.flushes import Flushes
from harness.lockstep.nested_tables import Change
from harness.lockstep.result import Result, Under, Visit
from harness.lockstep.signature import signature
from harness.model.access import Access
from harness.model.consistency import violations
from harness.model.entries import Format
from harness.model.memory import Memory
from harness.model.registers import Cpu
from harness.model.vmcb import NP_ENABLE, ExitCode, Vmcb
from harness.model.vmrun import Host, load, paging, table_format
from harness.model.walk import translate
from harness.wire.image import Region
from harness.wire.stop import ACCESS, ENTER, INVLPGA, Stop

KEPT: Final = 50
"""Divergences of one signature that are kept; the others are counted."""
KEPT_VISITS: Final = 100_000
"""Visits of L2 that are kept, from the first."""


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
    accesses: int = 0
    """Memory accesses of L2 that were looked at."""
    disturbed: int = 0
    """Those that were not, since another processor had run meanwhile."""
    invlpga: int = 0
    table_bytes: int = 0
    shadow_audits: int = 0
    """Switches at which the tables of the KVM under L1 were audited, and leaves of these that were."""
    shadow_leaves: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)


class _Latest(NamedTuple):
    """The latest stop with something to judge, the VMRUN before it, and what L1's tables were then: the format, the
    entries that have changed since, the sPAs of their pages."""

    stop: Stop
    before: Entered
    fmt: Format | None = None
    changes: tuple[Change, ...] = ()
    tables: tuple[int, ...] = ()


class Observer:
    """`memory` is L1's RAM from sPA 0 on; `errata` those of the machine, the most specific first. `holds`: it may hold
    translations over VMRUN and #VMEXIT, so that accessed bits which L1 has cleared since may stay clear. `audit` is of
    the tables that the KVM under L1 builds (C5)."""

    def __init__(self, name: str, memory: memoryview, cpu: Cpu, errata: Sequence[Erratum] = (), holds: bool = False,
                 audit: Audit | None = None) -> None:
        self.seen = Seen()
        self.name = name
        self._memory = Memory.over(memory)
        self._cpu = cpu
        self._holds = holds
        self._audit = audit
        self._errata = Known(errata)
        self._quirks = quirks_of(errata)
        self._entered: dict[int, Entered] = {}
        self._flushes = Flushes(memory, "flushbyasid" in cpu.features)
        self._last: dict[int, Entered] = {}
        self._latest: _Latest | None = None

    @property
    def inside(self) -> bool:
        """Whether a VMRUN was seen whose #VMEXIT has not been."""
        return bool(self._entered)

    def plausible(self, stop: Stop) -> bool:
        """Whether RAX can be the address of a VMCB."""
        rax = stop.host["rax"]
        return not rax % PAGE and rax + PAGE <= len(self._memory.bytes)

    def stop(self, stop: Stop) -> list[Divergence]:
        """What is wrong at this stop, which follows on the last one; the first of each sort is kept in `seen`."""
        if stop.kind == INVLPGA:
            self._invlpga(stop)
            return []
        if stop.kind == ACCESS:
            found = self._access(stop)
        else:
            vmcb = Vmcb(self._memory, stop.host["rax"])
            found = list(self._enter(stop, vmcb)) if stop.kind == ENTER else self._exit(stop, vmcb)
        if self._audit is not None and stop.kind != ACCESS:
            found += explain(self._audited(self._audit, stop), self._errata)
        self.seen.table_bytes = self._flushes.table_bytes
        for one in found:
            sort = str(signature(one)) + (f" ({one.erratum})" if one.erratum else "")
            self.seen.by_signature[sort] += 1
            if self.seen.by_signature[sort] <= KEPT:
                self.seen.divergences.append(one)
        return found

    def _audited(self, audit: Audit, stop: Stop) -> list[Divergence]:
        """What is wrong in the tables of the KVM under L1."""
        vmcb, out = Vmcb(self._memory, stop.host["rax"]), Result(self.name)
        where = Context(self.name, self.seen.vmruns - 1, (), Region(0, 0))  # L2 has no way to L1's tables
        if stop.kind == ENTER:
            audit.entering(out, where, exits.halves(vmcb)[0])
        else:
            audit.left(out, where, stop.host, vmcb["exitcode"])
        self.seen.shadow_audits += out.shadow_audits
        self.seen.shadow_leaves += out.shadow_leaves
        return out.divergences

    def _enter(self, stop: Stop, vmcb: Vmcb) -> Iterator[Divergence]:
        seen, registers = self.seen, stop.host
        seen.unpaired += stop.vcpu in self._entered
        host = Host(registers["cr0"], registers["cr4"], registers["efer"], pat=0, dr7=0)
        try:
            broken = tuple(violations(vmcb, host, self._cpu, self._memory.words))
        except IndexError:
            broken = ()
            seen.elsewhere += 1
        entered = Entered(seen.vmruns, vmcb.address, *exits.halves(vmcb), broken, stop, host,
                          Under.of(vmcb, host))
        self._entered[stop.vcpu] = entered
        seen.vmruns += 1
        if broken:
            seen.refused += 1
        elif vmcb["np_control"] & NP_ENABLE:
            yield from self._flush(entered, vmcb)

    def _flush(self, entered: Entered, vmcb: Vmcb) -> Iterator[Divergence]:
        """What L1 should have flushed, and has not."""
        asid, host = vmcb["asid"], entered.host
        fmt = table_format(host.cr0, host.cr4, host.efer, self._cpu)
        assert fmt is not None  # VMRUN is refused else
        before, key = self._last.get(asid, entered), (vmcb["ncr3"], fmt.name)
        self._last[asid] = entered
        for one in self._flushes.vmrun(asid, vmcb["tlb_control"], key, fmt):
            tables = self._flushes.pages(key) + (self._flushes.pages(one.other) if one.other is not None else [])
            self._latest = _Latest(entered.stop, before, fmt, one.changes, tuple(tables))
            yield Divergence(self.name, entered.number, -1, "L1", one.field, f"a flush of ASID {asid}: {one.what}",
                             f"{vmcb['tlb_control']:#x}", "tlb.control", events=one.examples)

    def _invlpga(self, stop: Stop) -> None:
        self.seen.invlpga += 1
        if (last := self._last.get(stop.asid)) is not None:
            self._flushes.invlpga(stop.asid, lambda: self._walked(last, stop.gva))

    def _walked(self, last: Entered, gva: int) -> set[int]:
        """sPAs of the entries that a walk of `gva` reads, by L2's state as it was saved last."""
        vmcb = Vmcb(self._memory, last.vmcb)
        under = paging(load(vmcb, last.host), vmcb, last.host, self._cpu)
        try:
            return {step[3] for step in translate(under, self._memory.words, gva, Access()).trail}
        except IndexError:
            return set()

    def _access(self, stop: Stop) -> list[Divergence]:
        """Where L2's access went is where the model's walk leads, if no other processor could have changed tables."""
        entered = self._entered.get(stop.vcpu)
        if entered is None:
            return []
        if stop.others:
            self.seen.disturbed += 1
            return []
        self.seen.accesses += 1
        self._latest = _Latest(stop, entered)
        it = Exit(self.name, entered, Vmcb(self._memory, entered.vmcb), self._memory, self._cpu, self._holds)
        return explain(self._judged(lambda quirks: list(exits.accessed(it, quirks, stop))), self._errata)

    def _exit(self, stop: Stop, vmcb: Vmcb) -> list[Divergence]:
        entered = self._entered.pop(stop.vcpu, None)
        code = vmcb["exitcode"]
        self.seen.exits[ExitCode.describe(code)] += 1
        if entered is None or entered.vmcb != vmcb.address:
            self.seen.unpaired += 1
            return []
        if len(self.seen.visits) < KEPT_VISITS:
            self.seen.visits.append(Visit(entered.number, 0, code, vmcb["exitinfo1"], vmcb["exitinfo2"], entered.under))
        self._latest = _Latest(stop, entered)
        it = Exit(self.name, entered, vmcb, self._memory, self._cpu, self._holds)
        found = list(exits.host(it, stop.host)) + list(exits.unchanged(it)) + list(exits.saved(it))
        judged = True
        if vmcb["np_control"] & NP_ENABLE and not entered.broken:
            fmt = table_format(entered.host.cr0, entered.host.cr4, entered.host.efer, self._cpu)
            assert fmt is not None
            tables, key = [], (vmcb["ncr3"], fmt.name)
            wrong = [(one, self._flushes.wrong_bits(key, one)) for one in self._flushes.look(key, fmt)]
            if any(bits for _, bits in wrong):
                self._latest = _Latest(stop, entered, fmt, tuple(one for one, _ in wrong),
                                       tuple(self._flushes.pages(key)))
            if stop.alone:
                tables = [it.found("C2", f"entry at sPA {one.address:#x}", one.new ^ bits, one.new, "ad")
                          for one, bits in wrong if bits]
            elif any(bits for _, bits in wrong):
                judged = False
                self.seen.overtaken += 1
            found += tables
        if judged:
            found += self._judged(lambda quirks: self._judge(it, quirks))
        return explain(found, self._errata)

    def _judged(self, judge: Callable[[Active], list[Divergence]]) -> list[Divergence]:
        """By the model; where that fails, once more with what is known of this machine's MMU."""
        try:
            found = judge(Active())
            if found and self._quirks:
                quirks = Active(self._quirks)
                if not judge(quirks) and quirks.played:
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

    def evidence(self) -> Evidence:
        """What the findings at the stop before were made of; to be asked before the machine goes on."""
        assert self._latest is not None
        stop, before, fmt, changes, tables = self._latest
        touched = Touched(self._memory)
        it = Exit(self.name, before, Vmcb(self._memory, before.vmcb), touched, self._cpu, self._holds)
        with suppress(IndexError):
            list(violations(it.vmcb, before.host, self._cpu, touched.words))
        if stop.kind == ACCESS:
            self._judged(lambda quirks: list(exits.accessed(it, quirks, stop)))
        elif stop.kind != ENTER:
            self._judged(lambda quirks: self._judge(it, quirks))
        now = {spa: bytes(self._memory.bytes[spa : spa + PAGE])
               for spa in {*touched.pages, *tables, stop.host["rax"] if stop.kind == ENTER else before.vmcb}}
        size = 1 << fmt.entry_shift if fmt is not None else 0
        old = {one.address: (one.old, size) for one in reversed(changes)}
        then = {spa: with_entries(data, spa, old) for spa, data in now.items()}
        then[before.vmcb] = exits.page(before)
        now = {spa: data for spa, data in now.items() if then[spa] != data}
        return Evidence(len(self._memory.bytes), (Moment(before.stop, then), Moment(stop, now)))


    def audited(self, of: Divergence) -> audited.Evidence:
        """The same of a finding in the tables of the KVM under L1."""
        assert self._audit is not None
        return self._audit.evidence(of)


def judge_again(name: str, evidence: Evidence, cpu: Cpu) -> list[Divergence]:
    """What the model says to the moments of a finding; the divergences at the last."""
    observer, found = None, list[Divergence]()
    for memory, stop in evidence.again():
        observer = observer or Observer(name, memory.bytes, cpu)
        found = observer.stop(stop)
    return found
