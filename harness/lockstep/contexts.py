"""C4: the MMU context that the hypervisor under L1 is in, at each of the processor's entries into L1 or L2.

What the trace says is cut into visits of L2, from a VMRUN to the #VMEXIT that L1 sees. Each belongs to the
pair of records that L1 posted around that VMRUN; in it every entry must be into L2's context, before and
behind it into L1's. A trace that does not fit the records is no divergence: nothing can be said then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, NamedTuple, Protocol

from harness.errors import MachineLost
from harness.lockstep.compare import Context as Where
from harness.lockstep.compare import Divergence
from harness.lockstep.result import Switch, Told
from harness.model.mmu_context import PAE_LEVELS, Capability, Context, Maps, Mode, Role, Vcpu
from harness.model.vmcb import FIELDS, NP_ENABLE, ExitCode
from harness.model.vmcb import SAVE as SAVE_AT
from harness.wire.layout import VMRUN_RAISED
from harness.wire.records import Record
from harness.wire.trace import Entry, Event, InUse, NewPage, Vmexit, Vmrun

SHOWN: Final = 12
"""Events that a divergence shows: those that led up to it, and a few behind."""

_BEHIND: Final = 3
_KEPT: Final = 4096
_TIMEOUT: Final = 15.0
_NAP: Final = 200e-6
_INVALID: Final = 0xFFFF_FFFF
_ENCRYPTION: Final = 46
"""Memory encryption marks hPAs with a bit from here up."""

_Difference = tuple[str, str, int | str, int | str]
"""Field, rule, expected, observed."""


class Trace(Protocol):
    """What the kernel under L1 tells of itself."""

    @property
    def capability(self) -> Capability:
        """What the host can do, as the kernel says."""

    def poll(self) -> list[Event]:
        """Events since the last call, in order. Raises MachineLost if any were lost."""


class Sink(Protocol):
    """Where the findings of a scenario go."""

    contexts: int
    trace_events: int
    divergences: list[Divergence]
    switches: list[Switch | None]


class Pair(NamedTuple):
    """The two records around one VMRUN, as far as contexts depend on them."""

    sink: Sink
    where: Where
    vmcb: int
    rip: int
    np_enable: bool
    ncr3: int
    l1: Mode
    l2: Mode
    exitcode: int
    np_control: int = 0

    @property
    def np_shown(self) -> bool:
        """What the tracepoint makes of np_control: that NP_ENABLE is 1 if any bit of it is."""
        return self.np_enable or self.np_control != 0

    @property
    def refused(self) -> bool:
        """Whether KVM did not run L2: a VMRUN that is refused, or one that raises an exception."""
        return self.exitcode & _INVALID == _INVALID or self.exitcode >> 32 == VMRUN_RAISED >> 32


@dataclass
class Visit:
    """L2 from a VMRUN to its #VMEXIT. `events` are all of it, those of L1 before it included, and the first
    entry into L1 behind it."""

    vmrun: Vmrun | None = None
    vmexit: Vmexit | None = None
    events: list[Event] = field(default_factory=list)
    entered: bool = False
    """Whether the processor was entered between the two."""
    before: InUse | None = None
    """The context of the last entry into L1 that belongs to the visit before."""


class Contexts:
    """Holds the trace against the model. `visible` is the end of L1's memory: a root beyond it is not
    shadowed at all. `lost` makes the error that the machine is lost."""

    def __init__(self, trace: Trace, visible: int, lost: Callable[[str], MachineLost]) -> None:
        self._trace = trace
        self._host = trace.capability
        self._visible = visible
        self._lost = lost
        self._pairs: deque[Pair] = deque()
        self._visits: deque[Visit] = deque()
        self._now = Visit()
        self._same: dict[tuple[Context, int], tuple[InUse, tuple[_Difference, ...]]] = {}
        self._words: dict[int, tuple[InUse, Told]] = {}

    def ran(self, sink: Sink, where: Where, enter: tuple[bytes, bytes], record: Record) -> None:
        """Note a VMRUN: the VMCB's two areas before it, and the record behind it."""
        def get(name: str) -> int:
            at = FIELDS[name]
            data, base = (enter[1], SAVE_AT) if at.offset >= SAVE_AT else (enter[0], 0)
            return int.from_bytes(data[at.offset - base : at.offset - base + at.width], "little")

        before = record.before
        self.note(Pair(
            sink, where, record.vmcb, get("rip"), bool(get("np_control") & NP_ENABLE), get("ncr3"),
            Mode(before["cr0"], before["cr3"], before["cr4"], before["efer"]),
            Mode(get("cr0"), get("cr3"), get("cr4"), get("efer")), record.exitcode,
            get("np_control"),
        ))

    def note(self, pair: Pair) -> None:
        """Note a VMRUN whose visit is to be checked once its events have come."""
        self._pairs.append(pair)

    @property
    def due(self) -> Sink | None:
        """Where the findings of the first VMRUN go that has not been checked; None if all have been."""
        return self._pairs[0].sink if self._pairs else None

    def poll(self) -> None:
        """Check what has come. Raises MachineLost if the trace lost events, or does not fit the records."""
        for event in self._trace.poll():
            self._take(event)
        while self._pairs:
            pair = self._pairs[0]
            while self._visits and not pair.refused and _refused(self._visits[0]):
                self._visits.popleft()  # KVM had begun with a VMRUN that it then refused
            if pair.refused:
                # most are refused before anything is traced; the visit, if there is one, is dropped above
                self._pairs.popleft()
                pair.sink.switches.append(None)
            elif self._visits:
                self._pairs.popleft()
                self._check(self._visits.popleft(), pair)
            else:
                return

    def settle(self) -> None:
        """Wait until every VMRUN that was noted has been checked. Raises MachineLost if its events do not
        come."""
        start = time.monotonic()
        self.poll()
        while self._pairs:
            if time.monotonic() - start > _TIMEOUT:
                first = self._pairs[0]
                raise self._lost(f"no trace of {len(self._pairs)} VMRUNs in {_TIMEOUT:.0f} s; the first is in "
                                 f"{first.where.scenario}, op {first.where.op + 1}")
            time.sleep(_NAP)
            self.poll()

    def _take(self, event: Event) -> None:
        visit = self._now
        if isinstance(event, Vmrun):
            if visit.vmrun is not None:
                raise self._lost(f"the trace is out of step: a second VMRUN ({event}) in a visit of L2")
            visit.vmrun = event
        elif isinstance(event, Vmexit):
            if visit.vmrun is None:
                raise self._lost(f"the trace is out of step: a #VMEXIT without VMRUN ({event})")
            visit.vmexit = event
        elif isinstance(event, Entry):
            visit.entered |= visit.vmrun is not None and visit.vmexit is None
        visit.events.append(event)
        if visit.vmexit is not None and isinstance(event, Entry):
            self._visits.append(visit)
            self._now = Visit(before=event.context)
        elif visit.vmrun is None and len(visit.events) > 2 * SHOWN:
            self._thin(visit)

    def _thin(self, visit: Visit) -> None:
        """L1 may run for long between two VMRUNs: keep what is wrong, and the last."""
        keep = visit.events[-SHOWN:]
        visit.events = [e for e in visit.events[:-SHOWN]
                        if isinstance(e, Entry) and self._differs(self._l1(e.context), e.context)][:SHOWN] + keep

    def _check(self, visit: Visit, pair: Pair) -> None:
        vmrun, vmexit, sink = visit.vmrun, visit.vmexit, pair.sink
        assert vmrun is not None
        assert vmexit is not None
        if (vmrun.vmcb, vmrun.rip) != (pair.vmcb, pair.rip):
            raise self._lost(f"the trace is out of step with the records: {vmrun} where L1 ran the VMCB at "
                             f"{pair.vmcb:#x}, RIP {pair.rip:#x}")
        # KVM enters L2 once at least: nested_run_pending; unless it can make no root, which is a triple fault
        if not visit.entered and pair.exitcode != ExitCode.SHUTDOWN:
            raise self._lost(f"the trace is out of step: no entry into L2 behind {vmrun}, though L2 ran")
        sink.trace_events += len(visit.events)
        sink.switches.append(self._switch(visit))
        vcpu = Vcpu(self._host, pair.l1).vmrun(pair.l2, pair.np_enable, pair.ncr3)
        told: set[str] = set()

        def tell(index: int, rule: str, name: str, want: int | str, got: int | str) -> None:
            if name not in told:
                told.add(name)
                sink.divergences.append(Divergence(pair.where.scenario, pair.where.op, -1, "C4", name, want, got, rule,
                                                   events=around(visit.events, index)))

        inside, entered = False, False
        for index, event in enumerate(visit.events):
            if event is vmrun:
                inside = True
                if vmrun.np_enable != pair.np_shown:
                    tell(index, "context.vmrun", "NP_ENABLE", int(pair.np_shown), int(vmrun.np_enable))
                root = pair.ncr3 if pair.np_shown else pair.l2.cr3
                if vmrun.root is not None and vmrun.root != root:
                    tell(index, "context.vmrun", "nCR3" if pair.np_shown else "CR3", root, vmrun.root)
            elif event is vmexit:
                inside = False
                if vmexit.exitcode & _INVALID != pair.exitcode & _INVALID:
                    tell(index, "context.back", "exit code", pair.exitcode & _INVALID, vmexit.exitcode & _INVALID)
            elif isinstance(event, Entry):
                sink.contexts += 1
                if not inside:
                    wanted = self._l1(event.context)
                elif entered:
                    wanted = self._later(vcpu.handled_by_l0(), event.context)
                else:
                    wanted = vcpu.context
                    entered = True
                for what, rule, want, got in self._differs(wanted, event.context):
                    back = not inside and event is visit.events[-1]
                    tell(index, "context.back" if back else rule, what, want, got)
            elif isinstance(event, NewPage) and inside:
                wrong = self._root(vcpu.context, event)
                if wrong:
                    tell(index, _rule(vcpu.context), *wrong)

    def _switch(self, visit: Visit) -> Switch:
        at = next(index for index, event in enumerate(visit.events) if event is visit.vmrun)
        l1 = [event.context for event in visit.events[:at] if isinstance(event, Entry)]
        before = l1[-1] if l1 else visit.before
        *inside, behind = (self._told(event.context) for event in visit.events[at:] if isinstance(event, Entry))
        return Switch(self._told(before) if before is not None else None, tuple(one for one, _ in groupby(inside)),
                      behind, len(inside))

    def _told(self, seen: InUse) -> Told:
        """A context is seen thousands of times, and put into words once."""
        found = self._words.get(id(seen))
        if found is None:
            if len(self._words) > _KEPT:
                self._words.clear()
            found = self._words[id(seen)] = seen, Told(bool(seen.role.get("direct")), str(seen))
        return found[1]

    def _root(self, context: Context, page: NewPage) -> tuple[str, int, int] | None:
        """A root built for L2 must be one of the table that its context shadows. A root's own table is
        at the level of the shadowed one; below it, pages come from anywhere."""
        level = page.role.get("level")
        if (context.maps is not Maps.NESTED_TABLE or context.walked_level < 4 or page.role.get("direct")
                or level != context.walked_level or context.root is None):
            return None
        wanted = context.root >> 12
        return None if page.gfn == wanted else ("new root's gfn", wanted, page.gfn)

    def _l1(self, seen: InUse) -> Context:
        """L1's context. Without tdp_usable it follows from L1's registers at that moment, which only the
        context itself tells."""
        if self._host.tdp_usable:
            return Vcpu(self._host, _UNKNOWN).context
        return _of_itself(seen, 0)

    def _later(self, vcpu: Vcpu, seen: InUse) -> Context:
        """L2's context when it has run: its own registers may have changed, nCR3 cannot have."""
        return vcpu.context if self._host.tdp_usable else _of_itself(seen, 1)

    def _differs(self, wanted: Context, seen: InUse) -> tuple[_Difference, ...]:
        """Field, rule, expected and observed of all that differs. A context is seen thousands of times."""
        key = (wanted, id(seen))
        found = self._same.get(key)
        if found is None:
            found = seen, tuple(_compare(wanted, seen, self._visible))
            if len(self._same) > _KEPT:
                self._same.clear()
            self._same[key] = found  # which keeps `seen` alive, so that its id is nobody else's
        return found[1]


_UNKNOWN: Final = Mode(0, 0, 0, 0)


def _vmcb(guest_mode: int) -> str:
    return "VMCB02" if guest_mode else "VMCB01"


def _refused(visit: Visit) -> bool:
    return visit.vmexit is not None and visit.vmexit.exitcode & _INVALID == _INVALID


def _rule(context: Context) -> str:
    if context.maps is Maps.NESTED_TABLE:
        return "context.nested"
    if context.maps is Maps.GUEST_TABLE:
        return "context.guest-table"
    return "context.direct-l2" if context.role.guest_mode else "context.direct-l1"


def _of_itself(seen: InUse, guest_mode: int) -> Context:
    """Without tdp_usable: what follows from the levels of the running guest's tables alone."""
    levels = seen.walked.get("level", 0)
    if not levels:
        return Context(Maps.L1_PHYSICAL, None, 0, Role(PAE_LEVELS, 1, guest_mode))
    role = Role(max(levels, PAE_LEVELS), 0, guest_mode, has_4_byte_gpte=int(levels == 2))
    return Context(Maps.GUEST_TABLE, None, levels, role)


def _compare(wanted: Context, seen: InUse, visible: int) -> Iterator[_Difference]:
    rule = _rule(wanted)
    nested = wanted.maps is Maps.NESTED_TABLE
    if seen.guest_mode != bool(wanted.role.guest_mode):
        yield "VMCB in use", rule, _vmcb(wanted.role.guest_mode), _vmcb(seen.guest_mode)
    for name, want, got in (
        ("context in use", "guest_mmu" if nested else "root_mmu", seen.mmu),
        ("context of software walks", "nested_mmu" if wanted.two_dimensional else "root_mmu", seen.walk_mmu),
    ):
        if want != got:
            yield name, rule, want, got
    for name, want_bit in wanted.role._asdict().items():
        if want_bit is not None and seen.role.get(name, want_bit) != want_bit:
            yield f"role.{name}", rule, want_bit, seen.role[name]
    if not wanted.direct_map and seen.walked.get("level") != wanted.walked_level:
        yield "levels of the shadowed table", rule, wanted.walked_level, seen.walked.get("level", 0)
    root = wanted.root
    if root is not None and root < visible and seen.root >> 12 != root >> 12:
        yield "root's gfn", rule, root >> 12, seen.root >> 12
    if (seen.root_hpa ^ seen.hardware_root) & (1 << _ENCRYPTION) - 1 >> 12 << 12:
        yield "table that the processor walks", rule, seen.root_hpa, seen.hardware_root


def around(events: list[Event], index: int) -> tuple[str, ...]:
    """The events around the one at `index`, as text, marked `>`; runs of the same are told once."""
    lines: list[tuple[str, int, bool]] = []
    for at, event in enumerate(events[: index + 1 + _BEHIND]):
        text, marked = str(event), at == index
        if lines and lines[-1][0] == text and not marked and not lines[-1][2]:
            lines[-1] = text, lines[-1][1] + 1, False
        else:
            lines.append((text, 1, marked))
    start = max(0, next(i for i, line in enumerate(lines) if line[2]) + 1 + _BEHIND - SHOWN)
    return tuple(f"{'>' if marked else ' '} {text}{f'  ({count} times)' if count > 1 else ''}"
                 for text, count, marked in lines[start : start + SHOWN])
