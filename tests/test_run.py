"""Whole runs on a machine without QEMU: what is found at a batch's end, machines lost in the middle of one, runs
that are cut short; what of it is counted, told, and recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.machine.l1 import Identity, L1Machine, Layer
from harness.machine.tcg import LIBERTIES
from harness.model.registers import Cpu
from harness.run import Outcome, run
from harness.session import MAX_LOST
from harness.sweeping import Plan, Record
from harness.target import Target
from harness.wire.image import PAGE, Image
from harness.wire.layout import HOST, RECORD
from harness.wire.program import Step
from harness.wire.records import KIND_NAMES
from tests.lockstep.fake import FakeMachine, Plant
from tests.test_sweeping import names, small

CASES = 80
NAMES = names(small("one"), CASES)

both = pytest.mark.parametrize("pipelined", [False, True], ids=["strict", "pipelined"])


class Death(Exception):
    """Of a machine, planted."""


class Machine(FakeMachine):
    """What `run` needs beyond what lockstep does."""

    liberties = LIBERTIES
    trace = kvm = None
    identity = Identity("tcg", "fake-machine", (7, 2, 0), "max", (Layer("qemu-tcg", (7, 2, 0)),))

    def __init__(self, image: Image, cpu: Cpu, plant: Plant) -> None:
        super().__init__(image, cpu, plant)
        self.cpu = cpu
        self.dead = False

    def work(self) -> None:
        try:
            if not self.dead:
                super().work()
        except Death:  # what was posted before it is there to be checked
            self.dead = True

    def rest(self) -> None:
        pass

    def idle(self, waited: float) -> None:
        if self.dead:
            raise self.lost("planted")
        super().idle(waited)


@dataclass(frozen=True)
class FakeTarget(Target):
    """Boots a machine with the next of `plants` in it; of the last one again and again."""

    image: Image | None = None
    of: Cpu | None = None
    plants: list[Plant] = field(default_factory=list)
    boots: list[Plant] = field(default_factory=list)

    def start(self) -> AbstractContextManager[L1Machine]:
        return self._start()

    def _machine(self, image: Image, cpu: Cpu, plant: Plant) -> Machine:
        return Machine(image, cpu, plant)

    @contextmanager
    def _start(self) -> Iterator[L1Machine]:
        assert self.image is not None and self.of is not None
        self.boots.append(self.plants[min(len(self.boots), len(self.plants) - 1)])
        machine = self._machine(self.image, self.of, self.boots[-1])
        if isinstance(self.boots[-1], SpoilsCr4):
            machine.channel.spare()
        try:
            yield cast(L1Machine, machine)
        finally:
            machine.close()


@pytest.fixture
def target(image: Image, cpu: Cpu) -> FakeTarget:
    return FakeTarget(image=image, of=cpu)


class Spoils(Plant):
    """Behind a VMRUN whose first probe reads `offset` of page a, a quadword that nobody watches is another; at
    most `times` times."""

    def __init__(self, offset: int, times: int = 1_000_000) -> None:
        self.offset, self.times, self.hit = offset, times, False

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        self.hit = step.probes[0].address & 0xFFF == self.offset

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        if self.hit and self.times:
            self.times -= 1
            fake.memory[fake.image.data.end - PAGE] = 0x77


class SpoilsCr4(Plant):
    """Behind a VMRUN whose first probe reads `offset` of page a L1's CR4 is another; at most `times` times. A sparing
    L1 finds that at the program's end."""

    def __init__(self, offset: int, times: int = 1_000_000) -> None:
        self.offset, self.times, self.hit, self.spoilt = offset, times, False, False

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        self.hit = step.probes[0].address & 0xFFF == self.offset and self.times > 0
        self.times -= self.hit

    def record(self, fake: FakeMachine, data: bytearray) -> None:
        kind = KIND_NAMES[int.from_bytes(data[:4], "little")]
        sparing = fake.channel.is_sparing
        if kind == "EXIT":
            self.spoilt |= self.hit
            if self.hit and not sparing:
                data[RECORD.offsets["after"] + HOST.offsets["cr4"]] ^= 1
            data[RECORD.offsets["after"] + HOST.offsets["all_read"]] = not sparing
        if kind == "SYNC":
            if self.spoilt and sparing:
                data[RECORD.offsets["after"] + HOST.offsets["cr4"]] ^= 1
            self.spoilt = False


class Loses(Plant):
    """The machine dies before its VMRUN of that number, counted from 1."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        if fake.runs == self.at:
            raise Death


class Lies(Plant):
    """What a probe read, where it reads `offset`, is told wrong."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        out = fake.twin.predict(step, first)
        if out.results and step.probes[0].address & 0xFFF == self.offset:
            out.results[0] ^= 1
        return out


def runs(
    target: FakeTarget, pipelined: bool, stop: int | None = None, fail_fast: bool = False, record: Record | None = None
) -> tuple[Outcome, list[Result]]:
    """The outcome, and all results in their order; Ctrl-C comes with the result of number `stop`."""
    seen: list[Result] = []

    def take(result: Result) -> None:
        seen.append(result)
        if len(seen) == stop:
            raise KeyboardInterrupt

    outcome = Outcome()
    plan = Plan([small("one")], CASES, record=record)
    try:
        run(target, [], (), pipelined, fail_fast, on_result=take, outcome=outcome, sweeps=plan)
    except KeyboardInterrupt:
        assert stop is not None
    return outcome, seen


def _in_order() -> list[str]:
    """The cases as a run has them: by world."""
    return sorted(NAMES, key=lambda name: "5-level" in name)


def reads(offset: int) -> set[str]:
    """The cases that read that offset."""
    return {name for name in NAMES if f",p{offset // 8}]" in name}


@both
class TestAtABatchsEnd:
    def test_whose_it_is(self, target: FakeTarget, pipelined: bool) -> None:
        """Memory is wrong at the end of each batch: those that spoil it are found by running each alone, and no
        other is accused."""
        target.plants.append(Spoils(8))
        outcome, seen = runs(target, pipelined)
        assert {result.scenario for result in outcome.results} == reads(8)
        for result in outcome.results:
            assert [(one.op, one.check) for one in result.divergences] == [(-1, "C1")]
            assert "at the end" in result.divergences[0].field
        assert Counter(result.scenario for result in seen) == Counter(NAMES)
        assert outcome.tallies[0].done == CASES and outcome.exit_code() == 1

    def test_nobodys(self, target: FakeTarget, pipelined: bool) -> None:
        """It does not come again when each runs alone: it is told all the same, with the last of its batch."""
        target.plants.append(Spoils(8, times=1))
        outcome, seen = runs(target, pipelined)
        (result,) = outcome.results
        assert [one.op for one in result.divergences] == [-1] and result.scenario in NAMES
        assert Counter(one.scenario for one in seen) == Counter(NAMES)
        world = "4-level" if "4-level" in result.scenario else "5-level"
        assert result is [one for one in seen if world in one.scenario][-1]

    def test_a_register_of_l1s(self, target: FakeTarget, pipelined: bool) -> None:
        """An L1 that spares finds it at the end, and is run once more without: the VMRUN is told."""
        target.plants.append(SpoilsCr4(8))
        outcome, seen = runs(target, pipelined)
        assert {result.scenario for result in outcome.results} == reads(8)
        for result in outcome.results:
            assert {(one.op >= 0, one.check, one.field) for one in result.divergences} == {(True, "C3", "l1.cr4")}
        assert Counter(result.scenario for result in seen) == Counter(NAMES)

    def test_a_register_that_is_spoilt_no_more(self, target: FakeTarget, pipelined: bool) -> None:
        """It does not come again when L1 looks closer: what was seen at the end is told."""
        target.plants.append(SpoilsCr4(8, times=2 * len(reads(8))))
        outcome, seen = runs(target, pipelined)
        assert outcome.results and Counter(result.scenario for result in seen) == Counter(NAMES)
        fields = {(one.op, one.field) for result in outcome.results for one in result.divergences}
        assert (-1, "l1.cr4 at the end") in fields

    def test_the_machine_dies_while_it_is_looked_for(self, target: FakeTarget, pipelined: bool) -> None:
        """Nothing is told twice, and nothing is lost: also those are found that had run in the batch that was lost."""
        in_a_batch = sum("4-level" in name for name in NAMES)

        class Both(Spoils):
            def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
                super().before_run(fake, step, first)
                if fake.runs == in_a_batch + 7:
                    raise Death

        target.plants.extend([Both(8), Spoils(8)])
        outcome, seen = runs(target, pipelined)
        assert len(target.boots) > 1
        lost = [result for result in outcome.results if result.lost]
        assert len(lost) == 1 and Counter(result.scenario for result in seen) == Counter(NAMES)
        assert {result.scenario for result in outcome.results} - {lost[0].scenario} == (
            reads(8) - {lost[0].scenario})


@both
class TestALoss:
    def test_in_the_middle_of_a_batch(self, target: FakeTarget, pipelined: bool) -> None:
        """The case in which it happens says so; all others of its batch run on the next machine, those before it too:
        what is compared at the batch's end was not."""
        target.plants.extend([Loses(8), Plant()])
        outcome, seen = runs(target, pipelined)
        (lost,) = outcome.results
        assert lost.lost is not None and lost.lost.reason == "planted" and not lost.divergences
        assert lost is seen[0] and len(target.boots) == 2
        in_order = [name for name in _in_order() if name != lost.scenario]
        assert lost.scenario == _in_order()[7] and [result.scenario for result in seen[1:]] == in_order
        assert Counter(result.scenario for result in seen) == Counter(NAMES)
        assert outcome.exit_code() == 3 and outcome.not_run == 0

    def test_in_the_first_and_in_the_last_case(self, target: FakeTarget, pipelined: bool) -> None:
        target.plants.extend([Loses(1), Loses(CASES - 1), Plant()])
        outcome, seen = runs(target, pipelined)
        assert [result.scenario for result in outcome.results] == [_in_order()[0], _in_order()[-1]]
        assert Counter(result.scenario for result in seen) == Counter(NAMES)

    def test_again_and_again(self, target: FakeTarget, pipelined: bool, tmp_path: Path) -> None:
        """The run is given up; what was not run is neither counted nor recorded as done."""
        target.plants.append(Loses(3))
        record = tmp_path / "record"
        outcome, seen = runs(target, pipelined, record=Record(record, "t"))
        assert sum(result.lost is not None for result in seen) == MAX_LOST and len(seen) == MAX_LOST
        assert outcome.tallies[0].done == len(seen)
        target.plants[:] = [Plant()]
        _, rest = runs(target, pipelined, record=Record(record, "t"))
        assert {result.scenario for result in (*seen, *rest)} == set(NAMES)


@both
class TestCutShort:
    def test_fail_fast(self, target: FakeTarget, pipelined: bool, tmp_path: Path) -> None:
        """Nothing follows on the first divergence, in the middle of a batch; what was done is counted and recorded."""
        target.plants.append(Lies(16))
        record = tmp_path / "record"
        outcome, seen = runs(target, pipelined, fail_fast=True, record=Record(record, "t"))
        (found,) = outcome.results
        assert found is seen[-1] and found.scenario in reads(16) and 0 < len(seen) < CASES
        assert not {result.scenario for result in seen[:-1]} & reads(16)
        tally = outcome.tallies[0]
        assert (tally.done, tally.divergences_new) == (len(seen), 1) and 0 < tally.pairs < tally.pairs_total
        assert outcome.exit_code() == 1 and outcome.not_run == 0
        target.plants[:] = [Plant()]
        _, rest = runs(target, pipelined, record=Record(record, "t"))
        assert {result.scenario for result in (*seen, *rest)} == set(NAMES)

    @pytest.mark.parametrize("stop", [1, 23, CASES - 1])
    def test_ctrl_c(self, target: FakeTarget, pipelined: bool, stop: int, tmp_path: Path) -> None:
        """A chunk that is not finished is done again from its first case that is missing, never from behind it."""
        target.plants.append(Plant())
        record = tmp_path / "record"
        outcome, seen = runs(target, pipelined, stop, record=Record(record, "t"))
        assert len(seen) == stop == outcome.tallies[0].done
        done = {result.scenario for result in seen}
        missing = next(n for n, name in enumerate(NAMES) if name not in done)
        assert Record(record, "t").place(small("one"), 0).done == missing
        again, rest = runs(target, pipelined, record=Record(record, "t"))
        assert {result.scenario for result in rest} == set(NAMES[missing:])
        tally = again.tallies[0]
        assert (tally.before, tally.done, tally.pairs) == (missing, CASES - missing, tally.pairs_total)
