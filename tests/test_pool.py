"""Several machines at once, without QEMU: the same results in the same order as with one, whatever happens to them;
and workers that end before their work does."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from harness import pool
from harness import run as runner
from harness.errors import LaunchFailed, MachineLost, TwinwalkError, UsageError, WorkerLost
from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.machine.l1 import L1Machine
from harness.model.registers import Cpu
from harness.report import jsonfile
from harness.report.summary import summarize
from harness.run import Outcome, run
from harness.scenario.ops import Scenario
from harness.session import MAX_LOST
from harness.sweeping import Plan, Record
from harness.target import Target
from harness.wire.image import PAGE, Image
from harness.wire.program import Step
from tests.lockstep.fake import FakeMachine, Plant
from tests.scenario.texts import one
from tests.test_run import Death, FakeTarget
from tests.test_sweeping import small

SCENARIOS = [one(f"read a+{0x400 + 8 * n:#x}; write b", name=f"s{n}") for n in range(40)]
CASES = 200
"""They read other places, from a+0 on."""


def at(number: int) -> int:
    """The offset that a scenario reads."""
    return 0x400 + 8 * number


jobs = pytest.mark.parametrize("jobs", [1, 2, 3])


class At(Plant):
    """What happens at VMRUNs whose first probe reads one of some offsets of a page."""

    def __init__(
        self, dies: Set[int] = frozenset(), lies: Set[int] = frozenset(), spoils: Set[int] = frozenset(),
        does: Callable[[], object] = lambda: None, when: int = -1,
    ) -> None:
        self.dies, self.lies, self.spoils, self.does, self.when = dies, lies, spoils, does, when
        self.offset = 0

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        self.offset = step.probes[0].address & 0xFFF
        if self.offset in self.dies:
            raise Death
        if self.offset == self.when:
            self.does()

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        out = super().predict(fake, step, first)
        if out.results and self.offset in self.lies:
            out.results[0] ^= 1
        return out

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        if self.offset in self.spoils:
            fake.memory[fake.image.data.end - PAGE] = 0x77


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_UNIT", 7)


@pytest.fixture
def target(image: Image, cpu: Cpu) -> FakeTarget:
    return FakeTarget(image=image, of=cpu)


def runs(
    target: Target, jobs: int, stop: int | None = None, fail_fast: bool = False, scenarios: list[Scenario] = SCENARIOS,
    record: Record | None = None,
) -> tuple[Outcome, list[Result], BaseException | None]:
    """The outcome, all results in their order, and what ended the run; Ctrl-C comes with the result of number
    `stop`."""
    seen: list[Result] = []
    ended: BaseException | None = None

    def take(result: Result) -> None:
        seen.append(result)
        if len(seen) == stop:
            raise KeyboardInterrupt

    outcome, plan = Outcome(), Plan([small("one", 40)], CASES, record=record)
    try:
        run(target, scenarios, (), True, fail_fast, on_result=take, outcome=outcome, sweeps=plan, jobs=jobs)
    except (TwinwalkError, KeyboardInterrupt) as reason:
        ended = reason
    assert multiprocessing.active_children() == []
    return outcome, seen, ended


def told(outcome: Outcome, seen: list[Result]) -> tuple[str, list[object]]:
    """All that a run leaves: its JSON, and its journal. The last record of a lost machine has a number, which says how
    many that machine had posted before."""
    for result in seen:
        if result.lost is not None:
            result.lost = replace(result.lost, last_record=result.lost.last_record.partition(" ")[2])
    summary = summarize(outcome.identity, [*SCENARIOS, *outcome.cases.values()], outcome.results, (), 0.0, False,
                        outcome.coverage.cells, outcome.tallies)
    return jsonfile.text(summary), [jsonfile.entry(result) for result in seen]


EVERYTHING = At({at(10)}, {at(11), at(20), 16}, {at(12), at(3), 32})


@pytest.mark.parametrize(
    "plant", [At(), At(lies={16, at(15), at(21)}), At(dies={at(0), at(25)}), At(spoils={24, at(33)}), EVERYTHING],
    ids=["agrees", "lies", "dies", "spoils", "all"],
)
def test_the_same_for_any_number(target: FakeTarget, plant: Plant) -> None:
    target.plants.append(plant)
    alone = told(*runs(target, 1)[:2])
    assert len(alone[1]) == len(SCENARIOS) + CASES
    for number in (2, 3):
        assert told(*runs(target, number)[:2]) == alone


def test_something_was_found(target: FakeTarget) -> None:
    """What the test above compares is not nothing."""
    target.plants.append(EVERYTHING)
    outcome, seen, ended = runs(target, 2)
    assert ended is None and outcome.exit_code() == 1 and outcome.lost and not outcome.not_run
    found = {result.scenario for result in outcome.results if result.divergences}
    assert {"s3", "s11", "s12", "s20"} < found and any(name.startswith("one[") for name in found)
    assert [result.scenario for result in seen[:7]] == [f"s{n}" for n in range(7)]
    assert len({result.scenario for result in seen}) == len(seen)


@jobs
def test_fail_fast(target: FakeTarget, jobs: int) -> None:
    """Nothing follows on the first divergence, however far other machines are."""
    target.plants.append(At(lies={at(17), at(18), at(39)}))
    outcome, seen, _ = runs(target, jobs, fail_fast=True)
    assert [result.scenario for result in seen] == [f"s{n}" for n in range(18)]
    assert outcome.exit_code() == 1


@jobs
def test_lost_again_and_again(target: FakeTarget, jobs: int) -> None:
    target.plants.append(At(dies={at(n) for n in range(10, 30)}))
    outcome, seen, _ = runs(target, jobs)
    lost = [result.scenario for result in seen if result.lost]
    assert lost == ["s10", "s11", "s12", "s13", "s14"] and len(lost) == MAX_LOST
    assert seen[-1].scenario == "s14" and outcome.not_run == len(SCENARIOS) - len(seen)


class TestTheEndOfAWorker:
    def ended(self, target: FakeTarget, does: Callable[[], object]) -> str:
        target.plants.append(At(does=does, when=at(18)))
        outcome, seen, ended = runs(target, 2)
        assert isinstance(ended, WorkerLost) and ended.exit_code == 3
        names = [result.scenario for result in seen]
        assert names[:14] == [f"s{n}" for n in range(14)] and "s18" not in names
        assert outcome.results == seen[: len(outcome.results)] and outcome.not_run
        return str(ended)

    def test_killed(self, target: FakeTarget) -> None:
        text = self.ended(target, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert "was killed by SIGKILL, somewhere from s14 to s20" in text

    def test_exits(self, target: FakeTarget) -> None:
        assert "exited with status 7" in self.ended(target, lambda: os._exit(7))

    def test_a_fault_of_its_own(self, target: FakeTarget) -> None:
        text = self.ended(target, lambda: os.environ["PLANTED_HERE"])
        assert "Traceback" in text and "KeyError: 'PLANTED_HERE'" in text and "test_pool.py" in text

    def test_killed_while_it_waits(self, target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before it has had any work at all."""
        target.plants.append(At())
        monkeypatch.setattr(pool, "_work", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        outcome, seen, ended = runs(target, 2)
        assert isinstance(ended, WorkerLost) and not seen and outcome.not_run == len(SCENARIOS)


@dataclass(frozen=True)
class Refuses(FakeTarget):
    def start(self) -> AbstractContextManager[L1Machine]:
        raise LaunchFailed("planted")


@jobs
def test_a_machine_that_does_not_start(image: Image, cpu: Cpu, jobs: int) -> None:
    _, seen, ended = runs(Refuses(image=image, of=cpu), jobs)
    assert isinstance(ended, LaunchFailed) and str(ended) == "planted" and not seen


@jobs
def test_no_sense(target: FakeTarget, jobs: int) -> None:
    """What is before it is told, and nothing behind."""
    target.plants.append(At())
    bad = one('entry = "nested.a.pte"\nvalue = 0x1007', "read a", name="bad")
    _, seen, ended = runs(target, jobs, scenarios=[*SCENARIOS[:20], bad, *SCENARIOS[20:]])
    assert isinstance(ended, UsageError) and "bad.toml:" in str(ended)
    names = [result.scenario for result in seen]
    assert names[:14] == [f"s{n}" for n in range(14)] and "bad" not in names


@jobs
def test_ctrl_c(target: FakeTarget, jobs: int, tmp_path: Path) -> None:
    """All that was checked is told, each once, what was ahead of its turn too; the next run does the rest."""
    target.plants.append(At())
    record = tmp_path / "record"
    outcome, seen, ended = runs(target, jobs, stop=61, record=Record(record, "t"))
    assert isinstance(ended, KeyboardInterrupt) and len(seen) >= 61
    assert len({result.scenario for result in seen}) == len(seen)
    assert outcome.tallies[0].done == len(seen) - len(SCENARIOS)
    again, rest, _ = runs(target, jobs, scenarios=[], record=Record(record, "t"))
    cases = {result.scenario for result in (*seen, *rest) if "[" in result.scenario}
    assert len(cases) >= CASES and again.tallies[0].done == CASES


def test_ctrl_c_while_it_waits(target: FakeTarget) -> None:
    """Sent to the parent alone, by a worker in the middle of a unit."""
    parent = os.getpid()

    def does() -> None:
        os.kill(parent, signal.SIGINT)
        signal.pause()

    target.plants.append(At(does=does, when=at(18)))
    outcome, seen, ended = runs(target, 2)
    assert isinstance(ended, KeyboardInterrupt)
    names = [result.scenario for result in seen]
    first, second = ([f"s{n}" for n in range(start, start + 7)] for start in (0, 7))  # one is done: who did it has s18
    assert names[:7] in (first, second) and "s18" not in names and outcome.not_run


def test_an_answer_is_taken_whole(target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C that comes while the parent takes one."""
    recv = Connection.recv

    def interrupted(pipe: Connection) -> object:
        answer = recv(pipe)
        if multiprocessing.parent_process() is None:
            os.kill(os.getpid(), signal.SIGINT)
        return answer

    target.plants.append(At())
    monkeypatch.setattr(Connection, "recv", interrupted)
    _, seen, ended = runs(target, 2)
    assert isinstance(ended, KeyboardInterrupt) and len(seen) >= 7


def test_a_lost_machine_comes_through_a_pipe() -> None:
    lost = replace(MachineLost("why"), argv=["qemu", "-S"], log="log", last_record="r")
    again = pickle.loads(pickle.dumps(lost))
    assert (again, str(again)) == (lost, str(lost))


@pytest.mark.parametrize(
    ("machine", "cores", "work", "expected"),
    [("tcg", 1, 10_000, 1), ("tcg", 2, 10_000, 1), ("tcg", 8, 10_000, 4), ("tcg", 8, 20, 1), ("tcg", 256, 10_000, 50),
     ("kvm-on-tcg", 8, 10_000, 1)],
)
def test_how_many(machine: str, cores: int, work: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert pool.jobs_for(Target(machine), work) == expected
