"""A finding repeated, classed and shrunk, on machines without QEMU that have a fault planted in them."""

from __future__ import annotations

import pytest

from harness.errors import MachineLost
from harness.lockstep.compare import Divergence
from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.lockstep.signature import LOST, Signature
from harness.model.registers import Cpu
from harness.report.findings import signatures
from harness.scenario import writer
from harness.scenario.ops import Scenario
from harness.shrinking import Kind, Repeated, Trials, repeat, shrink
from harness.wire.image import Image
from harness.wire.program import Step
from tests.lockstep.fake import FakeMachine, Plant
from tests.report.cases import divergence, result
from tests.scenario.texts import one, run
from tests.test_run import Death, FakeTarget

VALUE = Signature("C1", "value", "exit.vmmcall")
DIES = Signature(LOST, "planted", "")
BIG = one('host = "cr4"\nset = ["smep"]', 'entry = "nested.c.pte"\nset = ["pwt"]', run("write b; read b+0x450", 3),
          'entry = "guest.d.pte"\nset = ["nx"]', run("write a+8"), name="big")
SHORT = one(run("write a; read a+0x450"), name="short")
SMALL = ['run = ["read a+0x450"]\n']


def at(step: Step, offset: int = 0x450) -> bool:
    return any(probe.kind == "read" and probe.address & 0xFFF == offset for probe in step.probes)


class Errs(Plant):
    """Where L2 reads such an offset it reads another value; every `nth` time only, and only if it is `armed`."""

    def __init__(self, nth: int = 1) -> None:
        self.nth, self.runs = nth, 0

    def armed(self, fake: FakeMachine) -> bool:
        self.runs += 1
        return self.runs % self.nth == 0

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        out = fake.twin.predict(step, first)
        if at(step) and self.armed(fake):
            for index, probe in enumerate(step.probes):
                if index in out.results and probe.address & 0xFFF == 0x450:
                    out.results[index] ^= 1
        return out


class Dies(Plant):
    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        if at(step):
            raise Death


class ErrsAfter(Errs):
    """Only once another scenario has read a+0x778 since the boot."""

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        if at(step, 0x778):
            self.seen = fake

    def armed(self, fake: FakeMachine) -> bool:
        return getattr(self, "seen", None) is fake


class ErrsAtFirst(Errs):
    """Only in the first reads after a boot."""

    def armed(self, fake: FakeMachine) -> bool:
        fresh, self.last = getattr(self, "last", None) is not fake, fake
        return fresh


class ErrsOrDies(Errs):
    """A scenario without the first two reads kills it."""

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        if at(step) and not any(probe.kind == "write" for probe in step.probes):
            raise Death


@pytest.fixture
def target(image: Image, cpu: Cpu) -> FakeTarget:
    return FakeTarget(image=image, of=cpu)


def trials(target: FakeTarget, plant: Plant) -> Trials:
    target.plants[:] = [plant]
    return Trials(target, (), pipelined=True, strict=False)


def ops_of(scenario: Scenario) -> list[str]:
    return writer.text(scenario).split("\n\n[[op]]\n")[1:]


class TestSignatures:
    def test_those_of_new_findings(self) -> None:
        known, new = divergence(erratum="e1", field="exitinfo1"), divergence(check="C3", field="rsp", probe=2)
        found = result(known, new)
        assert signatures(found, strict=False) == {Signature("C3", "rsp", "exit.host")}
        assert len(signatures(found, strict=True)) == 2

    def test_a_loss_is_all_that_is_said(self) -> None:
        """What was seen of a machine before it died may have the same cause."""
        lost = Result("s", divergences=[divergence()], lost=MachineLost("planted"))
        assert signatures(lost, strict=False) == {DIES}


class TestRepeat:
    def test_stable(self, target: FakeTarget) -> None:
        with trials(target, Errs()) as on:
            found = repeat(on, VALUE, BIG)
        assert found == Repeated(Kind.STABLE, 10, 10) and str(found) == "stable"
        assert len(target.boots) == 1

    def test_flaky(self, target: FakeTarget) -> None:
        with trials(target, Errs(nth=2)) as on:
            found = repeat(on, VALUE, SHORT)
        assert (found.kind, found.seen, found.tried) == (Kind.FLAKY, 6, 13)
        assert str(found) == "flaky (in 6 of 13 tries)" and found.times == 8

    def test_not_seen_again(self, target: FakeTarget) -> None:
        with trials(target, Plant()) as on:
            found = repeat(on, VALUE, SHORT, [one("read a")])
            assert shrink(on, VALUE, SHORT, found) is SHORT
        assert found == Repeated(Kind.FLAKY, 0, 13) and str(found) == "flaky (in 0 of 13 tries)"

    def test_what_ran_before(self, target: FakeTarget) -> None:
        """Of those before it the one that it needs is left."""
        before = [one(f"read a+{8 * n:#x}", name=f"s{n}") for n in range(20)]
        before[7] = one("read c", "read a+0x778", name="needed")
        with trials(target, ErrsAfter()) as on:
            found = repeat(on, VALUE, SHORT, before)
            assert found == Repeated(Kind.DEPENDS, 3, 3, (before[7],))
            small = shrink(on, VALUE, SHORT, found)
        assert ops_of(small) == SMALL and str(found) == "depends on what ran before"

    def test_only_after_a_boot(self, target: FakeTarget) -> None:
        with trials(target, ErrsAtFirst()) as on:
            found = repeat(on, VALUE, SHORT)
            assert (found.kind, found.before) == (Kind.DEPENDS, ())
            assert ops_of(shrink(on, VALUE, SHORT, found)) == SMALL
        assert str(found) == "only on a machine that was just booted"

    def test_a_loss(self, target: FakeTarget) -> None:
        with trials(target, Dies()) as on:
            found = repeat(on, DIES, SHORT)
            assert found == Repeated(Kind.STABLE, 3, 3)
            assert ops_of(shrink(on, DIES, SHORT, found)) == SMALL


class TestShrink:
    @pytest.mark.parametrize("pipelined", [True, False])
    def test_stable(self, target: FakeTarget, pipelined: bool) -> None:
        target.plants[:] = [Errs()]
        with Trials(target, (), pipelined, strict=False) as on:
            small = shrink(on, VALUE, BIG, Repeated(Kind.STABLE, 10, 10))
        assert ops_of(small) == SMALL and small.name == "big" and len(target.boots) == 1

    def test_the_same_every_time(self, target: FakeTarget) -> None:
        def once() -> tuple[Scenario, int]:
            with trials(target, Errs()) as on:
                return shrink(on, VALUE, BIG, Repeated(Kind.STABLE, 10, 10)), on.tries

        assert once() == once()

    def test_flaky(self, target: FakeTarget) -> None:
        with trials(target, Errs(nth=2)) as on:
            small = shrink(on, VALUE, SHORT, Repeated(Kind.FLAKY, 6, 13))
        assert ops_of(small) == SMALL

    def test_a_machine_that_died_for_another_reason_shows_nothing(self, target: FakeTarget) -> None:
        """It gets no smaller than where it would kill the machine, whatever is seen before that."""
        with trials(target, ErrsOrDies()) as on:
            small = shrink(on, VALUE, SHORT, Repeated(Kind.STABLE, 10, 10))
        (text,) = ops_of(small)
        assert "write" in text and "read a+0x450" in text

    def test_what_makes_no_sense_is_not_run(self, target: FakeTarget) -> None:
        """With the first op left out L2 would have no pages of its own; the machine sees none of it."""
        scenario = one('entry = "nested.code.pte"\nclear = ["p"]', 'entry = "nested.code.pte"\nset = ["p"]',
                       'entry = "nested.mailbox.pte"\nclear = ["rw"]', 'entry = "nested.mailbox.pte"\nset = ["rw"]',
                       "read a+0x450")
        with trials(target, Errs()) as on:
            assert ops_of(shrink(on, VALUE, scenario, Repeated(Kind.STABLE, 10, 10))) == SMALL
        assert len(target.boots) == 1

    def test_another_finding_does_not_count(self, target: FakeTarget) -> None:
        """Shrunk to what shows this one, not to what shows any."""

        class Two(Errs):
            def record(self, fake: FakeMachine, data: bytearray) -> None:
                pass

            def after_run(self, fake: FakeMachine, out: Prediction) -> None:
                for address in out.old:
                    if fake.image.in_data(address):
                        fake.memory.cast("Q")[address >> 3] ^= 1 << 40

        with trials(target, Two()) as on:
            assert ops_of(shrink(on, VALUE, SHORT, Repeated(Kind.STABLE, 10, 10))) == SMALL
            memory = Signature("C1", "memory", "write")
            assert ops_of(shrink(on, memory, SHORT, Repeated(Kind.STABLE, 10, 10))) == ['run = ["write a"]\n']


def test_an_end_to_tries(target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.shrinking.MAX_TRIES", 20)
    with trials(target, Errs()) as on:
        small = shrink(on, VALUE, BIG, Repeated(Kind.STABLE, 10, 10))
        assert on.tries < 100 and len(small.ops) <= len(BIG.ops)


def test_an_end_to_the_time(target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.shrinking.MAX_SECONDS", 0.0)
    with trials(target, Errs()) as on:
        assert len(shrink(on, VALUE, BIG, Repeated(Kind.STABLE, 10, 10)).ops) == len(BIG.ops) and on.tries == 1


def test_kinds_are_words() -> None:
    assert isinstance(divergence(), Divergence)
    assert [str(Repeated(kind, 1, 2, (BIG,))) for kind in Kind] == [
        "stable (in 1 of 2 tries)", "depends on what ran before (in 1 of 2 tries)", "flaky (in 1 of 2 tries)"]
