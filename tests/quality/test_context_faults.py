"""Faults planted in what real kernels did: each must be found, in the VMRUN that it is in, by its name.

The events are those of tests/machine/traces, recorded while L1 ran L2 with nested paging, through a nested page
fault, and without nested paging, on KVM of Linux 6.1, 6.12 and 7.2; as they are nothing is wrong with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import pytest

from harness.errors import MachineLost
from harness.lockstep.compare import Context as Where
from harness.lockstep.compare import Divergence
from harness.lockstep.contexts import Contexts, Pair
from harness.lockstep.result import Switch
from harness.machine.trace import Trace
from harness.model.mmu_context import Capability, Mode
from harness.model.registers import CR0, CR4, EFER
from harness.wire.image import Region
from harness.wire.trace import Entry, Event, InUse, NewPage, Vmexit, Vmrun
from tests.machine.test_trace import Kernel, kernel, lost

LONG = Mode(CR0.PG | CR0.PE | CR0.WP, 0, CR4.PAE, EFER.LME | EFER.LMA | EFER.NXE)
REFUSED = 0xFFFF_FFFF_FFFF_FFFF
KERNELS = ("6.1", "6.12", "7.2", "6.1-npt0")
NPT = KERNELS[:3]


@dataclass
class Sink:
    contexts: int = 0
    trace_events: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    switches: list[Switch | None] = field(default_factory=list)


class Recorded:
    """See harness.lockstep.contexts.Trace."""

    def __init__(self, capability: Capability, events: list[Event]) -> None:
        self.capability = capability
        self._events = events

    def poll(self) -> list[Event]:
        events, self._events = self._events, []
        return events


@lru_cache(maxsize=8)
def recorded(name: str) -> tuple[Event, ...]:
    fd = os.memfd_create("trace")
    os.write(fd, kernel(name)["raw"])
    try:
        return tuple(Trace(Kernel(name), fd, lost).poll())
    finally:
        os.close(fd)


def check(name: str, events: list[Event]) -> list[Sink]:
    """The findings of each VMRUN that L1 did, whatever `events` say; the last but one was refused."""
    contexts = Contexts(Recorded(Capability(*kernel(name)["capability"]), events), 0x7000_0000, lost)
    sinks = []
    told = [e for e in recorded(name) if isinstance(e, Vmrun | Vmexit)]
    runs = [(a, b) for a, b in pairwise(told) if isinstance(a, Vmrun) and isinstance(b, Vmexit)]
    for number, (vmrun, vmexit) in enumerate(runs):
        sinks.append(Sink())
        assert vmrun.root is not None
        where = Where("s", number, (), Region(0, 0))
        pair = Pair(sinks[-1], where, vmrun.vmcb, vmrun.rip, vmrun.np_enable, vmrun.root, LONG,
                    LONG._replace(cr3=vmrun.root), vmexit.exitcode)
        contexts.note(pair)
        contexts.note(pair._replace(sink=Sink(), exitcode=REFUSED))
    contexts.settle()
    return sinks


@pytest.mark.parametrize("name", KERNELS)
def test_as_they_are_nothing_is_wrong(name: str) -> None:
    sinks = check(name, list(recorded(name)))
    assert len(sinks) >= (1 if "npt0" in name else 5)
    assert all(sink.divergences == [] and sink.contexts >= 3 for sink in sinks)
    assert sum(sink.trace_events for sink in sinks) <= len(recorded(name))
    for number, sink in enumerate(sinks):
        (one,) = sink.switches
        assert one is not None and (one.before is not None or not number)
        assert one.behind.words.startswith("L1 ") and all(seen.words.startswith("L2 ") for seen in one.inside)
        assert one.entries + 2 <= sink.contexts + (number > 0)


Is = Callable[[Event], bool]


def inside(events: list[Event], run: int) -> range:
    """The indices from the VMRUN with that number, from 0, to its #VMEXIT."""
    start = [n for n, e in enumerate(events) if isinstance(e, Vmrun)][run]
    return range(start, next(n for n in range(start, len(events)) if isinstance(events[n], Vmexit)) + 1)


def nth_entry(events: list[Event], run: int, number: int) -> int:
    """An entry into L2; -1 is the last before the #VMEXIT."""
    return [n for n in inside(events, run) if isinstance(events[n], Entry)][number]


def behind(events: list[Event], run: int) -> int:
    """The first entry behind the #VMEXIT."""
    end = inside(events, run)[-1]
    return next(n for n in range(end, len(events)) if isinstance(events[n], Entry))


def context(events: list[Event], index: int) -> InUse:
    event = events[index]
    assert isinstance(event, Entry)
    return event.context


def put(events: list[Event], index: int, new: InUse) -> list[Event]:
    return [e._replace(context=new) if n == index and isinstance(e, Entry) else e for n, e in enumerate(events)]


Fault = Callable[[list[Event]], list[Event]]


def in_first(number: int, **change: object) -> Fault:
    def plant(events: list[Event]) -> list[Event]:
        index = nth_entry(events, 0, number)
        return put(events, index, context(events, index)._replace(**change))  # type: ignore[arg-type]
    return plant


def role_in_first(number: int, **change: int) -> Fault:
    def plant(events: list[Event]) -> list[Event]:
        index = nth_entry(events, 0, number)
        old = context(events, index)
        return put(events, index, old._replace(role=dict(old.role) | change))
    return plant


def l1_in_l2(number: int) -> Fault:
    """An exit that KVM handled, and that switched all the same."""
    return lambda events: put(events, nth_entry(events, 0, number), context(events, behind(events, 0)))


def l2_in_l1(events: list[Event]) -> list[Event]:
    return put(events, behind(events, 0), context(events, nth_entry(events, 0, 0)))


def half_back(events: list[Event]) -> list[Event]:
    """The VMCB is L1's again, the context is not."""
    return put(events, behind(events, 0), context(events, nth_entry(events, 0, 0))._replace(guest_mode=False))


def other_root(events: list[Event]) -> list[Event]:
    return [e._replace(gfn=e.gfn + 1) if isinstance(e, NewPage) and n in inside(events, 0) else e
            for n, e in enumerate(events)]


FAULTS: dict[str, tuple[Fault, str]] = {
    "wrong root gfn": (in_first(0, root=0x0100_1000), "root's gfn"),
    "wrong root gfn, later": (in_first(-1, root=0x0100_1000), "root's gfn"),
    "direct while NP_ENABLE=1": (role_in_first(0, direct=1), "role.direct"),
    "a role for another mode": (role_in_first(0, efer_nx=0), "role.efer_nx"),
    "a role that is L1's": (role_in_first(-1, guest_mode=0), "role.guest_mode"),
    "a root of another level": (role_in_first(0, level=4), "role.level"),
    "no fifth level above four": (role_in_first(0, passthrough=0), "role.passthrough"),
    "the root without all rights": (role_in_first(0, access_all=0), "role.access_all"),
    "the processor on an old table": (in_first(0, hardware_root=0x1000), "table that the processor walks"),
    "software walks of one dimension": (in_first(0, walk_mmu="guest_mmu"), "context of software walks"),
    "no switch": (l1_in_l2(0), "context in use"),
    "a switch by an exit that KVM handles": (l1_in_l2(-1), "context in use"),
    "no switch back": (l2_in_l1, "context in use"),
    "half a switch back": (half_back, "role.direct"),
    "a table of another gfn": (other_root, "new root's gfn"),
}


@pytest.mark.parametrize("name", NPT)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(name: str, fault: str) -> None:
    plant, wanted = FAULTS[fault]
    first, *others = check(name, plant(list(recorded(name))))
    assert wanted in {d.field for d in first.divergences}
    assert {d.check for d in first.divergences} == {"C4"}
    assert all(other.divergences == [] for other in others)
    for one in first.divergences:
        (marked,) = [line for line in one.events if line.startswith("> ")]
        assert marked


@pytest.mark.parametrize("name", NPT)
@pytest.mark.parametrize(
    ("change", "wanted"),
    [({"mmu": "guest_mmu"}, "context in use"), ({"walk_mmu": "nested_mmu"}, "context of software walks"),
     ({"guest_mode": False}, "VMCB in use")],
)
def test_a_fault_without_nested_paging_is_found(name: str, change: dict[str, object], wanted: str) -> None:
    """The VMRUN with NP_ENABLE=0."""
    events = list(recorded(name))
    runs = [e for e in events if isinstance(e, Vmrun)]
    number = next(n for n, e in enumerate(runs) if not e.np_enable)
    index = nth_entry(events, number, 0)
    sinks = check(name, put(events, index, context(events, index)._replace(**change)))  # type: ignore[arg-type]
    assert wanted in {d.field for d in sinks[number].divergences}
    assert {d.rule for d in sinks[number].divergences} == {"context.direct-l2"}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [({"root": 0x0777_7000}, "root's gfn"), ({"mmu": "guest_mmu"}, "context in use"),
     ({"hardware_root": 0x1000}, "table that the processor walks"),
     ({"walked": {"level": 5}}, "levels of the shadowed table")],
)
def test_a_fault_without_tdp_is_found(change: dict[str, object], wanted: str) -> None:
    events = list(recorded("6.1-npt0"))
    index = nth_entry(events, 0, 0)
    (sink, *_) = check("6.1-npt0", put(events, index, context(events, index)._replace(**change)))  # type: ignore[arg-type]
    assert wanted in {d.field for d in sink.divergences}


def _drop(kind: type, run: int) -> Fault:
    def plant(events: list[Event]) -> list[Event]:
        span = inside(events, run)
        return [e for n, e in enumerate(events) if not (n in span and isinstance(e, kind))]
    return plant


@pytest.mark.parametrize("name", NPT)
@pytest.mark.parametrize("kind", [Vmrun, Vmexit, Entry])
@pytest.mark.parametrize("run", [0, 2])
def test_lost_events_are_a_loss(name: str, kind: type, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never silence, and never a divergence."""
    monkeypatch.setattr("harness.lockstep.contexts._TIMEOUT", 0.02)
    with pytest.raises(MachineLost, match="trace"):
        check(name, _drop(kind, run)(list(recorded(name))))


@pytest.mark.parametrize("name", NPT)
@pytest.mark.parametrize("end", [1, 5, 60, -60])
def test_a_trace_that_ends_early_is_a_loss(name: str, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.lockstep.contexts._TIMEOUT", 0.02)
    with pytest.raises(MachineLost, match=r"no trace of \d+ VMRUNs"):
        check(name, list(recorded(name)[:end]))
