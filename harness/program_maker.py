"""A process that makes the programs of a fuzzing run ahead of the one that checks them: each takes half of the work.

What it makes depends on nothing but what it was started with (harness.steering); it is never far ahead, since its pipe
is short.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from itertools import count
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Final, NamedTuple, Self

from harness.errors import WorkerLost
from harness.machine.qemu import die_with
from harness.model.coverage import Cell
from harness.model.universe import universe
from harness.pool import FORK
from harness.scenario.ops import Scenario
from harness.steering import CPU, Made, Steering
from harness.wire.image import Image

_END_TIMEOUT: Final = 3.0
_THEIRS: Final = {signal.SIGINT, signal.SIGTERM}


class Batch(NamedTuple):
    """Programs of one world, the cells that they reached and none before them, and which of them did."""

    programs: tuple[Scenario, ...]
    new: frozenset[str]
    cells: frozenset[Cell]


class End(NamedTuple):
    """A block is made: how many programs, and which cells they reached that none before it did."""

    block: int
    programs: int
    cells: frozenset[Cell]
    made: Made


class _Failed(NamedTuple):
    reason: str


class Maker:
    """A context manager. `reached` are the cells that were reached before block `first`; `corpus` is made first, if
    there is one, as block -1."""

    def __init__(
        self, image: Image, seed: int, reached: Collection[Cell] = (), first: int = 0, corpus: Sequence[Scenario] = ()
    ) -> None:
        self._arguments = image, seed, frozenset(reached), first, tuple(corpus)

    def __enter__(self) -> Self:
        universe(CPU)  # once, for both processes
        self._pipe, theirs = FORK.Pipe(duplex=False)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _THEIRS)  # until it knows what to do with them
        try:
            self._process = FORK.Process(target=_work, args=(theirs, os.getpid(), *self._arguments), daemon=True)
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join(_END_TIMEOUT)
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def made(self) -> Iterator[Batch | End]:
        """All there is, without end. Raises WorkerLost if the process failed or was killed."""
        while True:
            try:
                item: Batch | End | _Failed = self._pipe.recv()
            except (EOFError, OSError):
                raise WorkerLost("the process that makes programs ended before the run did") from None
            if isinstance(item, _Failed):
                raise WorkerLost(item.reason)
            yield item


def _work(
    pipe: Connection, parent: int, image: Image, seed: int, reached: frozenset[Cell], first: int,
    corpus: tuple[Scenario, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    die_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _THEIRS)
    steering = Steering(image, seed, reached)
    try:
        if corpus:
            _block(pipe, -1, steering, steering.corpus(corpus))
        for number in count(first):
            _block(pipe, number, steering, steering.block(number))
    except BrokenPipeError:  # the run is over
        pass
    except Exception:
        pipe.send(_Failed(f"no program could be made behind {steering.at}:\n{traceback.format_exc()}"))


def _block(pipe: Connection, number: int, steering: Steering, batches: Iterator[tuple[Scenario, ...]]) -> None:
    before, programs = frozenset(steering.coverage.cells), 0
    known = before
    for batch in batches:
        programs += len(batch)
        cells = frozenset(steering.coverage.cells)
        pipe.send(Batch(batch, frozenset(steering.fresh), cells - known))
        known = cells
        steering.fresh.clear()
    pipe.send(End(number, programs, known - before, steering.made))
