"""Which programs a fuzzing run makes, in which order: the same for the same seed, whatever machine they run on.

Programs come by the block, blocks by the batch of one world. A program is aimed at a cell of the coverage table that no
program reached so far, rare ones first since all others have been; or it is one that showed something new, changed.
Each is rehearsed on the model, for a CPU as all machines here have it; what makes no sense there is made anew. What it
reaches there steers what follows, so that no machine has a say in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Final

from harness.errors import UsageError
from harness.lockstep.coverage import Coverage
from harness.lockstep.prediction import Prediction
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.model.coverage import Cell, mode_of
from harness.model.liberties import Liberties
from harness.model.registers import Cpu
from harness.model.universe import universe
from harness.scenario import generate
from harness.scenario.aims import Key, fits, place
from harness.scenario.draws import Draw, Ground
from harness.scenario.generate import scenario
from harness.scenario.ops import Op, Scenario
from harness.scenario.program import Compiler, world_key
from harness.wire.image import Image

CPU: Final = Cpu(40, True, 16, frozenset(
    ["nx", "page1g", "smep", "smap", "pku", "la57", "umip", "fsgsbase", "xsave", "lmsle"]))
"""What programs are made for: QEMU's `max`, without what only some machines have of it."""
NAME: Final = "fuzz"
"""Programs are called `fuzz[SEED,BLOCK,BATCH,NUMBER]`."""
VERSION: Final = 3
"""One more whenever the same seed makes other programs."""
BLOCK: Final = 40
"""Batches in a block, which is what a campaign goes on behind."""
_BATCH: Final = 25
_ATTEMPTS: Final = 4
_POOL: Final = 40
"""Programs of one world that are remembered as having shown something new."""
_CHANGED: Final = 0.3
_AIMED: Final = 0.9


@dataclass
class Made:
    """What steering came to, for the report."""

    programs: int = 0
    rejected: int = 0
    """Those that made no sense on the model, and were made anew."""
    aimed: int = 0
    hit: int = 0
    """Programs that were aimed at a cell, and those that reached it."""
    vmruns: int = 0
    ops: int = 0


def _aims(key: Key, todo: list[Cell]) -> Iterator[Cell]:
    """Those of `todo` that can be aimed at in that world, from the last on, as they are taken out."""
    for at in range(len(todo) - 1, -1, -1):
        if fits(todo[at], key):
            yield todo.pop(at)


class Steering:
    """Makes the programs of `seed`. `reached` are the cells that were reached before; it grows."""

    def __init__(self, image: Image, seed: int, reached: Collection[Cell] = ()) -> None:
        self._seed = seed
        self._compiler = Compiler(image, CPU)
        self._twin = Twin(image, CPU, Liberties())
        self._cells = sorted(universe(CPU).reachable)
        self._grounds: dict[Key, Ground] = {}
        self.coverage = Coverage()
        self.coverage.cells |= set(reached)
        self.made = Made()
        self.fresh: set[str] = set()
        """Programs that reached a cell that none before them did; whoever looks clears it."""
        self.at = "the start"

    def corpus(self, programs: Sequence[Scenario]) -> Iterator[tuple[Scenario, ...]]:
        """Programs of earlier runs, so that what they reach counts as reached. What makes no sense is left out."""
        for _, together in groupby(sorted(programs, key=world_key), key=world_key):
            some = [one for one in together if self._makes_sense(one, _Novelty())]
            for at in range(0, len(some), _BATCH):
                yield tuple(some[at : at + _BATCH])

    def block(self, number: int) -> Iterator[tuple[Scenario, ...]]:
        """The batches of one block; it begins with what was reached before it, and nothing else."""
        random = Random(f"{self._seed}/{number}")
        todo = [cell for cell in self._cells if cell not in self.coverage.cells] or list(self._cells)
        random.shuffle(todo)
        novelty = _Novelty()
        for batch in range(BLOCK):
            key = self._world(random, todo)
            draw, aims = Draw(self._ground(key), random), _aims(key, todo)
            made = (self._program(f"{NAME}[{self._seed},{number},{batch},{n}]", key, draw, aims, novelty)
                    for n in range(_BATCH))
            if programs := tuple(program for program in made if program is not None):
                yield programs

    def _world(self, random: Random, todo: list[Cell]) -> Key:
        """That of the next cell, and what else can be aimed at there."""
        while todo:
            key = place(todo[-1], random)
            if key is not None:
                return key
            todo.pop()
        todo += self._cells
        random.shuffle(todo)
        return self._world(random, todo)

    def _ground(self, key: Key) -> Ground:
        if key not in self._grounds:
            probe = self._compiler.compile(scenario("", key, []))
            self._grounds[key] = Ground.of(probe.world)
        return self._grounds[key]

    def _program(
        self, name: str, key: Key, draw: Draw, aims: Iterator[Cell], novelty: _Novelty
    ) -> Scenario | None:
        cell = next(aims, None) if draw.chance(_AIMED) else None
        for _ in range(_ATTEMPTS):
            own = Draw(draw.ground, draw.random)
            parents = novelty.pool.get(key)
            if cell is None and parents and own.chance(_CHANGED):
                ops = generate.changed(own, own.one(parents))
            else:
                ops = generate.program(own, cell)
            made = scenario(name, key, ops)
            before = len(self.coverage.cells)
            if not self._makes_sense(made, novelty):
                self.made.rejected += 1
                continue
            if len(self.coverage.cells) > before:
                self.fresh.add(name)
            if novelty.is_new() or name in self.fresh:
                novelty.keep(key, made.ops)
            self.made.programs += 1
            self.made.ops += len(ops)
            if cell is not None:
                self.made.aimed += 1
                self.made.hit += cell in self.coverage.cells
            return made
        return None

    def _makes_sense(self, made: Scenario, novelty: _Novelty) -> bool:
        def see(prediction: Prediction) -> None:
            self.coverage.add(prediction, self._twin.host.dr7)
            novelty.see(prediction)

        novelty.begin()
        self.at = made.name
        try:
            program = self._compiler.compile(made)
            self.made.vmruns += rehearse(self._twin, program, see, expectations=False)
        except UsageError:
            return False
        return self._is_put_back()

    def _is_put_back(self) -> bool:
        """Whether L1 watches every page that the program just rehearsed left changed."""
        twin = self._twin
        words = twin.memory.words
        return all(words[at >> 3] == twin.first(at) for at in twin.touched_unwatched())


@dataclass
class _Novelty:
    """Which outcomes followed on which, and the programs that showed such a pair first, by world."""

    seen: set[tuple[object, ...]] = field(default_factory=set)
    pool: dict[Key, list[tuple[Op, ...]]] = field(default_factory=dict)
    _last: tuple[object, ...] = ()
    _new: list[tuple[object, ...]] = field(default_factory=list)

    def begin(self) -> None:
        self._last, self._new = (), []

    def see(self, prediction: Prediction) -> None:
        mode = mode_of(prediction.paging) if prediction.paging is not None else ""
        info = int.from_bytes(prediction.control[0x78:0x80], "little") if prediction.exitcode in (0x400, 0x4E) else 0
        this = mode, prediction.rule, prediction.exitcode, info
        pair = *self._last, *this
        if pair not in self.seen:
            self._new.append(pair)
        self._last = this

    def is_new(self) -> bool:
        """Whether the program just rehearsed shows a pair that none showed before; it does no more."""
        self.seen.update(self._new)
        return bool(self._new)

    def keep(self, key: Key, ops: tuple[Op, ...]) -> None:
        pool = self.pool.setdefault(key, [])
        pool.append(ops)
        if len(pool) > _POOL:
            del pool[0]
