"""C4 against a trace whose every event is known: agreement in every order of contexts, and each planted fault."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.lockstep import contexts
from harness.lockstep.contexts import SHOWN, around
from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.model.mmu_context import Capability
from harness.model.registers import Cpu
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from harness.wire.image import Image
from harness.wire.program import Step
from harness.wire.trace import Entry, Event, InUse, NewPage, Vmexit, Vmrun
from tests.lockstep.fake import FakeMachine
from tests.lockstep.fake_kvm import Change, FakeKvm, run_traced
from tests.scenario.texts import one, run

TDP4, TDP5, NO_TDP = Capability(True, 4), Capability(True, 5), Capability(False, 4)
ORDERS = [
    one("read a; write b", 'entry = "nested.a.pte"\nclear = ["rw"]', "write a; read b; read c", name="twice"),
    one("read a", head='nested_page = "none"\n', name="none"),
    one("read a", head='nested = "PAE"\nguest = "PAE"\n', name="pae"),
    one("read a", head='nested = "32-bit"\nguest = "32-bit"\n', name="legacy"),
    one("read a", head='guest = "off"\n', name="off"),
    one("read a", 'vmcb = "asid"\nvalue = 0', "read a", name="refused"),
    one("read a", 'host = "efer"\nclear = ["nxe"]', "read a", 'host = "cr4"\nset = ["smep"]', "read a", name="host"),
]


@dataclass
class World:
    image: Image
    cpu: Cpu
    compiler: Compiler
    twin: Twin

    def run(self, scenarios: list[Scenario], kvm: FakeKvm, strict: bool = True) -> list[Result]:
        return run_traced(self.image, self.cpu, self.twin, map(self.compiler.compile, scenarios), kvm, strict)


@pytest.fixture
def world(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> World:
    return World(image, cpu, compiler, twin)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
@pytest.mark.parametrize("capability", [TDP4, TDP5], ids=["4-level L0", "5-level L0"])
@pytest.mark.parametrize("order", [ORDERS, ORDERS[::-1], [s for s in ORDERS for _ in (1, 2)]], ids=["all", "back", "2"])
def test_agreement(world: World, order: list[Scenario], capability: Capability, strict: bool) -> None:
    results = world.run(order, FakeKvm(capability), strict)
    assert [(r.scenario, r.divergences, r.lost) for r in results] == [(s.name, [], None) for s in order]
    for result in results:
        entered = result.vmruns - (result.scenario == "refused")
        assert result.contexts == 5 * entered
        assert result.trace_events >= 7 * entered
        assert [switch is None for switch in result.switches] == [
            visit.exitcode & 0xFFFF_FFFF == 0xFFFF_FFFF for visit in result.visits]
        for visit, switch in zip(result.visits, result.switches, strict=True):
            if switch is not None:
                assert (switch.before, switch.entries) == (switch.behind, 2)
                assert switch.behind.direct and switch.behind.words.startswith("L1 root_mmu direct, root level ")
                (inside,) = switch.inside
                assert inside.direct != bool(visit.under.nested)
                shadow = f"L2 guest_mmu shadow of {visit.under.ncr3:#x} "
                assert inside.words.startswith(shadow if visit.under.nested else "L2 root_mmu direct")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_without_tdp(world: World, strict: bool) -> None:
    """Every paged guest is shadowed; L1 has no nested paging to use, so L2 is run without."""
    order = [one("read a", head='nested_page = "none"\n', name="long"),
             one("read a", run("wrcr3 = &vmcb.cr3; read b"), head='nested_page = "none"\nguest = "PAE"\n', name="pae"),
             one("read a", head='nested_page = "none"\nguest = "32-bit"\n', name="legacy"),
             one("read a", head='nested_page = "none"\nguest = "off"\n', name="off")]
    results = world.run(order, FakeKvm(NO_TDP), strict)
    assert [(r.scenario, r.divergences, r.lost) for r in results] == [(s.name, [], None) for s in order]


def entry(event: Event, **change: Any) -> Entry:
    assert isinstance(event, Entry)
    return Entry(event.time, event.context._replace(**change))


def role(event: Event, **bits: int) -> Entry:
    assert isinstance(event, Entry)
    return entry(event, role=dict(event.context.role) | bits)


def at(index: int, **change: Any) -> Change:
    """The entry at `index` of [L1, L1, VMRUN, (new root,) L2, L2, #VMEXIT, L1], from the end, changed."""
    def apply(events: list[Event]) -> list[Event]:
        return [entry(e, **change) if n == len(events) + index else e for n, e in enumerate(events)]
    return apply


def bits(index: int, **change: int) -> Change:
    return lambda events: [role(e, **change) if n == len(events) + index else e for n, e in enumerate(events)]


def switched(index: int, like: int) -> Change:
    """The entry at `index` is made in the context of that at `like`."""
    def apply(events: list[Event]) -> list[Event]:
        model = events[like]
        assert isinstance(model, Entry)
        return [Entry(e.time, model.context) if n == len(events) + index else e for n, e in enumerate(events)]
    return apply


def fields(event: type, **change: Any) -> Change:
    return lambda events: [e._replace(**change) if isinstance(e, event) else e for e in events]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_what_it_was_is_kept_as_it_was(world: World, strict: bool) -> None:
    """Also where it is wrong: an exit that KVM handles, or the #VMEXIT, switches as it must not."""
    right, = world.run([one("read a")], Once(0, lambda events: events), strict)
    (usual,) = right.switches
    assert usual is not None and usual.before is not None
    assert [one.direct for one in (usual.before, *usual.inside, usual.behind)] == [True, False, True]
    for change, inside, behind in ((switched(SECOND, L1), (usual.inside[0], usual.before), usual.behind),
                                   (switched(BACK, FIRST), usual.inside, usual.inside[0])):
        (result,) = world.run([one("read a")], Once(0, change), strict)
        (seen,) = result.switches
        assert seen is not None and (seen.before, seen.entries) == (usual.before, 2)
        assert (seen.inside, seen.behind) == (inside, behind) and len(result.visits) == 1


BACK, SECOND, FIRST, L1 = -1, -3, -4, 0
FAULTS: dict[str, tuple[Change, str, set[str]]] = {
    "the shadow of another table": (at(FIRST, root=0x0123_4000), "context.nested", {"root's gfn"}),
    "a direct map with NP_ENABLE=1": (bits(FIRST, direct=1), "context.nested", {"role.direct"}),
    "L1's context with NP_ENABLE=1": (switched(FIRST, L1), "context.nested", {
        "VMCB in use", "context in use", "context of software walks", "role.direct", "role.guest_mode", "root's gfn"}),
    "no switch back": (switched(BACK, FIRST), "context.back", {
        "VMCB in use", "context in use", "context of software walks", "role.direct", "role.guest_mode"}),
    "the VMCB is switched back, the context is not": (
        at(BACK, mmu="guest_mmu"), "context.back", {"context in use"}),
    "software walks are not switched back": (
        at(BACK, walk_mmu="nested_mmu"), "context.back", {"context of software walks"}),
    "an exit that KVM handles switches": (switched(SECOND, L1), "context.nested", {
        "VMCB in use", "context in use", "context of software walks", "role.direct", "role.guest_mode", "root's gfn"}),
    "a root of the wrong level": (bits(FIRST, level=3), "context.nested", {"role.level"}),
    "a role without guest_mode": (bits(FIRST, guest_mode=0), "context.nested", {"role.guest_mode"}),
    "NX taken for reserved": (bits(FIRST, efer_nx=0), "context.nested", {"role.efer_nx"}),
    "entries of 4 bytes": (bits(FIRST, has_4_byte_gpte=1), "context.nested", {"role.has_4_byte_gpte"}),
    "rights lost at the root": (bits(FIRST, access_all=0), "context.nested", {"role.access_all"}),
    "a fifth level too few": (bits(FIRST, passthrough=1), "context.nested", {"role.passthrough"}),
    "the table of another format": (
        at(FIRST, walked={"level": 3}), "context.nested", {"levels of the shadowed table"}),
    "the VMCB keeps an old root": (
        at(FIRST, hardware_root=0x5555_5000), "context.nested", {"table that the processor walks"}),
    "L1 on a shadow": (bits(L1 - 7, direct=0), "context.direct-l1", {"role.direct"}),
    "NP_ENABLE read wrongly": (fields(Vmrun, np_enable=False), "context.vmrun", {"NP_ENABLE"}),
    "nCR3 read wrongly": (fields(Vmrun, root=0x1000), "context.vmrun", {"nCR3"}),
    "another exit code": (fields(Vmexit, exitcode=0x40), "context.back", {"exit code"}),
    "a root of another table": (fields(NewPage, gfn=0x77), "context.nested", {"new root's gfn"}),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(world: World, name: str, strict: bool) -> None:
    """In the second of three scenarios: told there, with its events, and nowhere else."""
    change, rule, wanted = FAULTS[name]
    kvm = Once(1, change)
    first, second, third = world.run([one("read a", name=n) for n in "xyz"], kvm, strict)
    assert first.divergences == [] == third.divergences
    assert first.lost is second.lost is third.lost is None
    found = second.divergences
    assert {d.field for d in found} >= wanted
    assert {(d.check, d.op, d.scenario) for d in found} == {("C4", 0, "y")}
    assert rule in {d.rule for d in found}
    for one_of in found:
        assert sum(line.startswith("> ") for line in one_of.events) == 1
        assert one_of.expected != one_of.observed


class Once(FakeKvm):
    """`change` applies to one VMRUN; a new root is told with each."""

    def __init__(self, number: int, change: Change, capability: Capability = TDP4) -> None:
        self._runs = -1

        def apply(events: list[Event]) -> list[Event]:
            self._runs += 1
            self._roots.clear()
            return change(events) if self._runs == number else events

        super().__init__(capability, apply)


@pytest.mark.parametrize(
    ("capability", "change", "field"),
    [
        (TDP4, switched(FIRST, L1), "VMCB in use"),
        (TDP4, bits(FIRST, direct=0), "role.direct"),
        (TDP4, at(FIRST, mmu="guest_mmu"), "context in use"),
        (TDP4, bits(FIRST, guest_mode=0), "role.guest_mode"),
        (NO_TDP, bits(FIRST, direct=1), "role.direct"),
        (NO_TDP, bits(SECOND, direct=1), "role.direct"),
        (NO_TDP, at(FIRST, root=0x1234_5000), "root's gfn"),
        (NO_TDP, bits(FIRST, level=3), "role.level"),
        (NO_TDP, bits(BACK, level=3), "role.level"),
        (NO_TDP, bits(BACK, direct=1), "role.direct"),
    ],
)
def test_a_planted_fault_without_nested_paging(
    world: World, capability: Capability, change: Change, field: str
) -> None:
    (result,) = world.run([one("read a", head='nested_page = "none"\n')], Once(0, change, capability))
    assert field in {d.field for d in result.divergences}
    assert {d.check for d in result.divergences} == {"C4"}


def drop(kind: type) -> Change:
    return lambda events: [e for e in events if not isinstance(e, kind)]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop(Vmrun), "out of step: a #VMEXIT without VMRUN"),
        (drop(Vmexit), "out of step: a second VMRUN|no trace of 1 VMRUNs"),
        (fields(Vmrun, vmcb=0x9000), "out of step with the records"),
        (fields(Vmrun, rip=0x9000), "out of step with the records"),
        (lambda events: [], "out of step|no trace of 1 VMRUNs"),
        (drop(Entry), "out of step|no trace of 1 VMRUNs"),
    ],
)
def test_events_that_are_missing_are_a_loss(
    world: World, monkeypatch: pytest.MonkeyPatch, change: Change, reason: str, strict: bool
) -> None:
    """Never silence, and never a divergence: what KVM did is not known."""
    monkeypatch.setattr(contexts, "_TIMEOUT", 0.05)
    scenarios = [one("read a", name="x"), one("write b; read c", name="y"), one("fetch a", "read a", name="z")]
    results = world.run(scenarios, Once(1, change), strict)
    assert results[-1].lost is not None
    assert len(results) <= 3
    assert all(r.divergences == [] for r in results)
    assert [r.lost for r in results[:-1]] == [None] * (len(results) - 1)
    assert re.search(reason, results[-1].lost.reason)


def test_a_loss_that_the_trace_reports(world: World) -> None:
    """What the reader of the ring raises goes out as it is."""
    class Overrun(FakeKvm):
        def poll(self) -> list[Event]:
            if len(self.events) > 3:
                raise fake_loss
            return super().poll()

    fake_loss = MachineLost("the trace lost 7 events")
    (result,) = world.run([one("read a")], Overrun())
    assert result.lost is fake_loss


def test_a_late_trace_decides_late(world: World) -> None:
    """Pipelined, results wait for their contexts, in order."""
    class Late(FakeKvm):
        def poll(self) -> list[Event]:
            self.polls = getattr(self, "polls", 0) + 1
            return super().poll() if self.polls % 4 == 0 else []

    results = world.run([one("read a", name=n) for n in "abcdefgh"], Late(change=at(FIRST, mmu="root_mmu")), False)
    assert [r.scenario for r in results] == list("abcdefgh")
    assert [[d.field for d in r.divergences] for r in results] == [["context in use"]] * 8


def test_what_the_model_cannot_follow_is_traced_all_the_same(world: World) -> None:
    """A machine that ruins a table: the rest of the program is skipped, and the trace stays in step."""
    program = world.compiler.compile(one("read a", run("read b"), run("read c")))
    entry = program.world.entries["nested.b.pte"]

    class Ruins(FakeKvm):
        def after_run(self, fake: FakeMachine, out: Prediction) -> None:
            super().after_run(fake, out)
            if fake.runs == 1:
                fake.memory.cast("Q")[entry >> 3] = 0x7F_FFFF_F007

        def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
            words = fake.memory.cast("Q")
            kept, words[entry >> 3] = words[entry >> 3], program.world.words[entry]
            out = super().predict(fake, step, first)
            words[entry >> 3] = kept
            return out

    bad, good = world.run([one("read a", run("read b"), run("read c")), one("read a")], Ruins())
    assert "course" in {d.field for d in bad.divergences}
    assert (bad.vmruns, bad.contexts) == (1, 15), "of two VMRUNs only the contexts can be checked"
    assert (len(bad.visits), len(bad.switches)) == (1, 3)
    assert (good.divergences, good.lost, good.contexts) == ([], None, 5)


def test_around() -> None:
    """Runs of the same event are told once; the one in question is marked, and stays in sight."""
    context = InUse(False, "root_mmu", "root_mmu", 0, 0x1000, 0x1000, {"level": 4, "direct": 1}, {"level": 4})
    many: list[Event] = [Entry(n, context) for n in range(40)]
    lines = around([*many, Vmrun(0, 0x1000, 2, True, 0x3000), Vmexit(0, 0x400, 6, 0x5000)], 40)
    assert len(lines) <= SHOWN
    assert lines[0].endswith("(40 times)")
    assert lines[1] == "> VMRUN       vmcb 0x1000 rip 0x2 NP_ENABLE=1 nCR3 0x3000"
    assert lines[2] == "  #VMEXIT     exit code 0x400 EXITINFO1 0x6 EXITINFO2 0x5000"
    assert around(many, 39)[-1].startswith("> run         L1 root_mmu direct, root level 4 at 0x1000")
