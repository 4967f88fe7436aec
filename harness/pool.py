"""Several machines at once: processes, each with a session of its own.

Units of work are given out one by one, as workers come free; what comes back is told in the order of the units. So
results, and their order, are the same however many workers there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from types import FrameType, TracebackType
from typing import Final, NamedTuple, Self

from harness import far
from harness.errors import TwinwalkError, WorkerLost
from harness.far import AnySession
from harness.lockstep.coverage import Coverage
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.machine.l1 import Identity
from harness.machine.qemu import die_with
from harness.model.coverage import Cell
from harness.session import Done, Unit
from harness.target import Target

_AHEAD: Final = 16
"""Units, by the worker, that may be given out before the first that is not done."""
_SHARE: Final = 200
"""Scenarios that are worth another worker's boot."""
_END_TIMEOUT: Final = 3.0
_THEIRS: Final = {signal.SIGINT, signal.SIGTERM}
FORK: Final = multiprocessing.get_context("fork")
"""Workers begin with all that was read and planned; they are there before a report begins threads."""


def jobs_for(target: Target, work: int) -> int:
    """How many machines at once are best for that many scenarios. Each takes two cores: L1 does not sleep while it
    waits. Where a host is played as well, QEMU has enough to do with one."""
    if target.machine != "tcg" or target.host:  # whose cores are not known
        return 1
    return max(1, min(len(os.sched_getaffinity(0)) // 2, work // _SHARE))


@contextmanager
def _later() -> Iterator[None]:
    """Ctrl-C waits until the block is done, whichever thread of this process is told of it."""
    came = False

    def comes(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, comes)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


class _Answer(NamedTuple):
    """What a worker says of a unit: with each result the cells that it had not reached before; with an `error` it
    has ended, and the unit's rest was not done."""

    results: deque[tuple[Result, set[Cell]]]
    identity: Identity | None = None
    error: TwinwalkError | None = None


class _Worker:
    """A process, and this end of its pipe. `unit` is what it does, and `number` that unit's; None while it waits."""

    def __init__(self, session: AnySession) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process: ForkProcess = FORK.Process(target=_work, args=(session, theirs, os.getpid()), daemon=True)
        self.number = 0
        self.unit: Unit | None = None
        self.process.start()
        theirs.close()

    def give(self, number: int, unit: Unit) -> None:
        self.number, self.unit = number, unit
        with suppress(OSError):  # it is dead: its answer says so
            self.pipe.send(unit)

    def answer(self) -> _Answer:
        assert self.unit is not None
        try:
            answer: _Answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_END_TIMEOUT)
            names = [scenario.name for batch in self.unit.batches for scenario in batch]
            return _Answer(deque(), error=WorkerLost(
                f"a process of this run {_how(self.process.exitcode)}, somewhere from {names[0]} to {names[-1]}"))
        return answer


def _how(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its pipe"
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exited with status {exitcode}"


class Pool:
    """A context manager: workers, machines and all are gone at the block's end. Otherwise like a session."""

    def __init__(self, jobs: int, target: Target, errata: Sequence[Erratum], pipelined: bool) -> None:
        self._jobs, self._session = jobs, far.session(target, errata, pipelined)
        self._workers: list[_Worker] = []
        self._answers: dict[int, tuple[Unit, _Answer]] = {}
        self._due = 0
        """The number of the unit that is told, or to be told next."""
        self.identity: Identity | None = None
        self.coverage = Coverage()

    def __enter__(self) -> Self:
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _THEIRS)  # until a worker knows what to do with them
            try:
                for _ in range(self._jobs):
                    self._workers.append(_Worker(self._session))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_END_TIMEOUT)
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def run(self, units: Iterable[Unit]) -> Iterator[Done]:
        """See Session.run. Raises WorkerLost in place of what a worker was about when it ended."""
        todo = enumerate(units)
        while True:
            self._give(todo)
            busy = {worker.pipe: worker for worker in self._workers if worker.unit is not None}
            if not busy and self._due not in self._answers:
                return
            for pipe in wait(busy, 0 if self._due in self._answers else None):
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                assert worker.unit is not None
                with _later():
                    self._answers[worker.number], worker.unit = (worker.unit, worker.answer()), None
            self._give(todo)
            if self._due in self._answers:
                yield from self._tell()

    def held(self) -> Iterator[Done]:
        """What is there already, behind what is missing."""
        for number in sorted(self._answers):
            self._due = number
            with suppress(TwinwalkError):
                yield from self._tell()

    def _give(self, todo: Iterator[tuple[int, Unit]]) -> None:
        given = sum(worker.unit is not None for worker in self._workers) + len(self._answers)
        for worker in self._workers:
            if worker.unit is None and given < _AHEAD * self._jobs:
                if (following := next(todo, None)) is None:
                    return
                worker.give(*following)
                given += 1

    def _tell(self) -> Iterator[Done]:
        unit, answer = self._answers[self._due]
        self.identity = self.identity or answer.identity
        scenarios = {scenario.name: scenario for batch in unit.batches for scenario in batch}
        while answer.results:
            result, cells = answer.results.popleft()
            self.coverage.cells |= cells
            yield Done(scenarios[result.scenario], result, unit.cases)
        del self._answers[self._due]
        self._due += 1
        if answer.error is not None:
            raise answer.error


def _work(session: AnySession, pipe: Connection, parent: int) -> None:
    """A worker: does units until it is ended. Ctrl-C is for the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    die_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _THEIRS)
    told: set[Cell] = set()
    with session:
        while True:
            session.rest()
            unit: Unit = pipe.recv()
            results: deque[tuple[Result, set[Cell]]] = deque()
            error: TwinwalkError | None = None
            try:
                for done in session.work(unit):
                    reached = session.coverage.cells
                    new = reached - told if len(reached) > len(told) else set()
                    told |= new
                    results.append((done.result, new))
            except TwinwalkError as reason:
                error = reason
            except Exception:
                error = WorkerLost(f"a process of this run failed:\n{traceback.format_exc()}")
            pipe.send(_Answer(results, session.identity, error))
            if error is not None:
                return
