"""Budgets: which cases of which sweeps are run, in which order, and how far each sweep came.

Every sweep has one fixed sequence of its cases for a seed (harness.scenario.cover); a budget is a prefix
of it. Cases are run by the chunk, sorted by the world that they play in, since a machine does many of one
world in one batch. A record file says after each chunk how far each sweep is, so that the next run goes on
behind it; a run that is interrupted loses its last chunk and no more. A shard has each so many of the cases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import groupby, islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from harness.errors import UsageError
from harness.lockstep.result import Result
from harness.lockstep.tally import Tally
from harness.model.registers import Cpu
from harness.scenario.cover import Coverage, sequence
from harness.scenario.ops import Scenario
from harness.scenario.program import world_key
from harness.scenario.space import Case
from harness.scenario.sweep import Sweep

T = TypeVar("T")
BUDGET: Final = 8_000
"""Cases of all sweeps together, where nobody says otherwise."""
MAX_EXHAUSTIVE: Final = 10_000_000
"""Cases: an hour's work. More is refused."""
_CHUNK: Final = 8_000
_BATCH: Final = 200
"""Cases in one batch at most: several machines share the work by the batch."""
_VERSION: Final = 1
"""Of the order of cases: one more whenever harness.scenario.cover makes another of the same sweep."""


def shares(budget: int, sizes: Sequence[int]) -> list[int]:
    """`budget` shared fairly: as much for each as for any other, but no more than its size."""
    low, high = 0, max(sizes, default=0)
    while low < high:  # the highest level at which all of it suffices
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(min(size, level) for size in sizes) <= budget else (low, level - 1)
    out = [min(size, low) for size in sizes]
    more = [n for n, size in enumerate(sizes) if size > low]
    for n in more[: budget - sum(out)]:
        out[n] += 1
    return out


class Shard(NamedTuple):
    """Part `number`, from 1, of `of` parts, in which all of a run is done once."""

    number: int = 1
    of: int = 1

    def share(self, whole: int) -> int:
        """How many of `whole` things are in this part, if it has each `of`-th."""
        return (whole + self.of - self.number) // self.of

    def of_all(self, things: Sequence[T]) -> list[T]:
        """Those of `things` that are in this part."""
        return list(things[self.number - 1 :: self.of])


WHOLE: Final = Shard()


def shard(text: str) -> Shard:
    """An option's value: `3/8`. Raises ValueError."""
    number, _, of = text.partition("/")
    out = Shard(int(number), int(of))
    if not 1 <= out.number <= out.of:
        raise ValueError
    return out


class Place(NamedTuple):
    """A position in a sweep's sequence, and how many cases are before it."""

    position: int
    done: int


_START: Final = Place(0, 0)


class Record:
    """A file that says how far earlier runs came: a line of JSON for each chunk of each sweep. `target` is
    what was tested, in words: a record is of one target."""

    def __init__(self, path: Path, target: str) -> None:
        self.path, self._target = path, target
        self._known: dict[tuple[str, str, int], Place] = {}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            with path.open("a", encoding="utf-8") as file:
                if text and not text.endswith("\n"):
                    file.write("\n")  # a run that was killed left half a line
        except (OSError, UnicodeDecodeError) as reason:
            raise UsageError(f"--record: cannot use {path}: {reason}") from None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry = json.loads(line)
                key, place = (entry["sweep"], entry["digest"], entry["seed"]), Place(entry["next"], entry["done"])
                target_then = entry["target"]
            except (ValueError, KeyError, TypeError) as reason:
                if isinstance(reason, json.JSONDecodeError) and line.startswith("{"):
                    continue  # half a line
                raise UsageError(f"{path}:{number}: this is no line of a record of sweeps") from None
            if target_then != target:
                raise UsageError(f"{path}:{number}: this record is of another target, {target_then!r}, not of "
                                 f"{target!r}: give --record another file")
            self._known[key] = max(place, self._known.get(key, _START))

    def place(self, sweep: Sweep, seed: int) -> Place:
        """Where in the sequence of `sweep` the next run begins."""
        return self._known.get((sweep.name, digest(sweep), seed), _START)

    def note(self, sweep: Sweep, seed: int, place: Place) -> None:
        """All cases before `place` are done. Raises UsageError if that cannot be written."""
        key = (sweep.name, digest(sweep), seed)
        if place <= self._known.get(key, _START):
            return
        self._known[key] = place
        entry = {"sweep": key[0], "digest": key[1], "seed": seed, "next": place.position, "done": place.done,
                 "target": self._target}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as reason:
            raise UsageError(f"--record: cannot write {self.path}: {reason.strerror}") from None


def digest(sweep: Sweep) -> str:
    """By which a record knows that a sweep still has the same sequence of cases."""
    axes = [[axis.name, [value.name for value in axis.values]] for axis in sweep.axes]
    return blake2b(json.dumps([_VERSION, axes, sweep.space.size]).encode(), digest_size=16).hexdigest()


class _Progress:
    """One sweep on its way."""

    def __init__(self, sweep: Sweep, seed: int, start: Place, budget: int, shard: Shard) -> None:
        self.sweep, self.seed, self.next, self._shard = sweep, seed, start, shard
        self.left = shard.share(budget)
        if shard.of > 1 and budget == sweep.space.size:  # then each of its cases is done, however they are spread
            self.left = sum(1 for _ in self._sequence())
        self.tally = Tally(sweep.name, sweep.space.size, start.done, self.left)
        self.coverage = Coverage(sweep.space)
        self._cases = self._sequence(start.position, self.coverage)
        self._due: dict[str, Place] = {}
        self._skipped: set[int] = set()
        """Positions of cases that cannot be run on this CPU."""

    def _sequence(self, start: int = 0, coverage: Coverage | None = None) -> Iterator[tuple[int, Case]]:
        return sequence(self.sweep.space, self.seed, start + self._shard.number - 1, coverage, self._shard.of)

    def take(self, count: int) -> Iterator[Scenario]:
        """The next cases as scenarios."""
        for position, case in islice(self._cases, count):
            scenario = self.sweep.scenario(case)
            self._due[scenario.name] = Place(position, self.next.done)
            self.next = Place(position + 1, self.next.done + 1)
            yield scenario
        self.left = max(0, self.left - count)

    def took(self, scenario: Scenario, result: Result, strict: bool) -> bool:
        place = self._due.pop(scenario.name, None)
        if result.skipped and place is not None:
            self._skipped.add(place.position)
        return self.tally.add(result, strict)

    @property
    def done(self) -> Place:
        """All cases before it are done."""
        return min(self._due.values(), default=self.next)

    def close(self) -> None:
        """Fill in what was covered: what was skipped is not, nor, in a run that was cut short, all that was taken."""
        had, due = self.coverage, {place.position for place in self._due.values()} | self._skipped
        if due or self._shard.of > 1:
            had = Coverage(self.sweep.space)
            for position, case in self._sequence():
                if position >= self.next.position:
                    break
                if position not in due:
                    had.add(case)
        tally = self.tally
        tally.pairs, tally.pairs_total = had.pairs - had.pairs_left, had.pairs
        tally.triples, tally.triples_total = had.triples - had.triples_left, had.triples


class Plan:
    """The part of a run that is sweeps: `budget` cases of them, None for all, and of those one shard's. Raises
    UsageError for more than anybody can wait for. A record is of whole runs, not of shards."""

    def __init__(
        self, sweeps: Sequence[Sweep], budget: int | None, seed: int = 0, record: Record | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        starts = [record.place(sweep, seed) if record else _START for sweep in sweeps]
        sizes = [sweep.space.size - start.done for sweep, start in zip(sweeps, starts, strict=True)]
        if budget is None:
            _refuse_too_many(sweeps, sum(sizes))
            budget = sum(sizes)
        self.seed, self._record, self._since = seed, record, 0
        self._sweeps = {
            sweep.name: _Progress(sweep, seed, start, share, shard)
            for sweep, start, share in zip(sweeps, starts, shares(budget, sizes), strict=True)
        }
        self.cases = sum(one.left for one in self._sweeps.values())
        """How many cases are to be run."""

    @property
    def made_for(self) -> Cpu | None:
        """None of them was rehearsed."""
        return None

    @property
    def tallies(self) -> list[Tally]:
        """One for each sweep, in order."""
        return [one.tally for one in self._sweeps.values()]

    def batches(self) -> Iterator[tuple[Scenario, ...]]:
        """Scenarios that share a world, by the chunk. Each chunk is made little by little, while the one before is
        handed out: with several machines, they would all wait for it."""
        chunk = list(self._chunk())
        while chunk:
            following = self._chunk()
            ahead: list[Scenario] = []
            for _, cases in groupby(sorted(chunk, key=world_key), key=world_key):
                while batch := tuple(islice(cases, _BATCH)):
                    yield batch
                    ahead += islice(following, len(batch))
            chunk = [*ahead, *following]

    def _chunk(self) -> Iterator[Scenario]:
        left = sum(one.left for one in self._sweeps.values())
        for one in self._sweeps.values():
            if one.left:
                yield from one.take(-(-min(_CHUNK, left) * one.left // left))

    def took(self, scenario: Scenario, result: Result, strict: bool) -> bool:
        """Count a result; whether there is more to say of it."""
        self._since += 1
        if self._since >= _CHUNK:
            self._note()
        return self._sweeps[scenario.name.partition("[")[0]].took(scenario, result, strict)

    def close(self) -> None:
        """At the end of the run, however it came. Raises UsageError if the record cannot be written."""
        for one in self._sweeps.values():
            one.close()
        self._note()

    def _note(self) -> None:
        self._since = 0
        if self._record is not None:
            for one in self._sweeps.values():
                self._record.note(one.sweep, self.seed, one.done)


def _refuse_too_many(sweeps: Sequence[Sweep], cases: int) -> None:
    if cases > MAX_EXHAUSTIVE:
        largest = max(sweeps, key=lambda sweep: sweep.space.size)
        raise UsageError(
            f"--exhaustive would be {cases:,} cases, {largest.space.size:,} of them of {largest.name}; at most "
            f"{MAX_EXHAUSTIVE:,} are done: take smaller sweeps with -k, or as many cases as you have time for with "
            "--budget N"
        )
