"""A finding made small: repeated and classed first, then its scenario shrunk on the machine that showed it.

The machine decides, by the signature alone: a candidate is taken if it shows the same one. What makes no sense is never
run; a machine that dies for another reason than the finding's shows nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import islice
from types import TracebackType
from typing import Final, NamedTuple, Self

from harness import far
from harness.lockstep.errata import Erratum
from harness.lockstep.signature import LOST, Signature
from harness.report.findings import signatures
from harness.scenario.ops import Scenario
from harness.scenario.shrink import bare, candidates, cost, without_chunks
from harness.session import Done, Unit
from harness.target import Target

_FIRST: Final = 8
_BATCH: Final = 64
"""Candidates in one round trip: at first, where bold cuts often succeed, and at most. Where each that shows it costs a
boot, they are tried one by one."""
_ALONE: Final = 10
"""Times that a finding is tried alone: first on a fresh boot, then on the same one."""
_BOOTS: Final = 3
"""Times that what costs a boot each is tried."""
MAX_TRIES: Final = 20_000
"""Candidates that are tried for one finding at most."""
MAX_BOOTS: Final = 100
"""Boots for one finding at most."""
MAX_SECONDS: Final = 600.0
"""Time for one finding, after which no more is tried."""
_MAX_TIMES: Final = 20
"""Times that one candidate of a flaky finding is tried at most."""
_MISS: Final = 0.01
"""How often a candidate of a flaky finding may be missed."""


class Kind(StrEnum):
    """How a finding repeats."""

    STABLE = "stable"
    DEPENDS = "depends on what ran before"
    FLAKY = "flaky"


class Repeated(NamedTuple):
    """How often it was `seen` in how many tries, and with which scenarios before it (on a fresh boot) if it needs
    that: none of them means that it shows only right after the boot."""

    kind: Kind
    seen: int
    tried: int
    before: tuple[Scenario, ...] = ()

    @property
    def fresh(self) -> bool:
        """Whether each try needs a boot."""
        return self.kind == Kind.DEPENDS

    @property
    def times(self) -> int:
        """Tries after which one that shows nothing can be taken for one that has not got it."""
        if self.seen == self.tried:
            return 1
        return min(_MAX_TIMES, math.ceil(math.log(_MISS) / math.log(1 - self.seen / self.tried))) if self.seen else 1

    def __str__(self) -> str:
        rate = f" (in {self.seen} of {self.tried} tries)" if self.seen < self.tried else ""
        if self.kind == Kind.DEPENDS and not self.before:
            return f"only on a machine that was just booted{rate}"
        return f"{self.kind}{rate}"


class Trials:
    """Tries scenarios for a signature, on a machine of its own: a context manager. `tries` and `boots` count, and so
    does the time since it was made."""

    def __init__(self, target: Target, errata: Sequence[Erratum], pipelined: bool, strict: bool) -> None:
        self._session = far.session(target, errata, pipelined)
        self._strict = strict
        self.tries = self.boots = 0
        self._until = time.monotonic() + MAX_SECONDS

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._session.__exit__(kind, error, at)

    def spent(self) -> bool:
        """Whether enough was tried."""
        return self.tries >= MAX_TRIES or self.boots >= MAX_BOOTS or time.monotonic() >= self._until

    def fresh(self) -> None:
        """What is tried next begins on a fresh boot."""
        self._session.shut_down()
        self.boots += 1

    def shown(self, wanted: Signature, scenarios: Iterable[Scenario]) -> Iterator[Scenario]:
        """Those of `scenarios` that show it, as they are run one behind the other."""
        unit = Unit(tuple((one,) for one in scenarios), cases=False, doubtful=True)
        for done in self._session.work(unit):
            self.tries += 1
            self.boots += done.result.lost is not None
            if self._shows(wanted, done):
                yield done.scenario

    def _shows(self, wanted: Signature, done: Done) -> bool:
        result = done.result
        return not result.skipped and not result.senseless and wanted in signatures(result, self._strict)

    def after(self, wanted: Signature, before: Sequence[Scenario], scenario: Scenario, times: int = 1) -> int:
        """In how many of `times` fresh boots `scenario` shows it behind those `before`."""
        seen = 0
        for _ in range(times):
            self.fresh()
            for _ in self.shown(wanted, before):
                pass
            seen += any(True for _ in self.shown(wanted, [scenario]))
        return seen


def repeat(trials: Trials, wanted: Signature, scenario: Scenario, before: Sequence[Scenario] = ()) -> Repeated:
    """Class a finding of `scenario`, which ran behind those `before`, the last of them right before it."""
    times = _BOOTS if wanted.check == LOST else _ALONE
    trials.fresh()
    first = _count(trials, wanted, scenario, 1)
    seen = first + _count(trials, wanted, scenario, times - 1)
    if seen == times:
        return Repeated(Kind.STABLE, seen, times)
    fresh = trials.after(wanted, (), scenario, _BOOTS)
    if fresh == _BOOTS and seen == first:
        return Repeated(Kind.DEPENDS, fresh, _BOOTS)
    if seen + fresh:
        return Repeated(Kind.FLAKY, seen + fresh, times + _BOOTS)
    if before and (seen := trials.after(wanted, before, scenario, _BOOTS)):
        found = Repeated(Kind.DEPENDS, seen, _BOOTS, tuple(before))
        return found._replace(before=_needed(trials, wanted, scenario, found))
    return Repeated(Kind.FLAKY, 0, times + _BOOTS)


def _count(trials: Trials, wanted: Signature, scenario: Scenario, times: int) -> int:
    return sum(1 for _ in trials.shown(wanted, [scenario] * times))


def _needed(trials: Trials, wanted: Signature, scenario: Scenario, found: Repeated) -> tuple[Scenario, ...]:
    """Those before it that it needs."""
    before = found.before
    while not trials.spent():
        fewer = (
            some for some in without_chunks(before)
            if not trials.spent() and trials.after(wanted, some, scenario, found.times)
        )
        if (some := next(fewer, None)) is None:
            break
        before = some
    return before


def shrink(trials: Trials, wanted: Signature, scenario: Scenario, repeated: Repeated) -> Scenario:
    """The smallest scenario that was found to show `wanted`: of each round the one that costs least. What was not
    seen again stays as it is."""
    current = bare(scenario)
    if not repeated.seen or not _accepts(trials, wanted, [current], repeated):
        return scenario
    alone = wanted.check == LOST or repeated.fresh
    while not trials.spent():
        for batch in _batches(candidates(current), alone):
            if found := _accepts(trials, wanted, batch, repeated):
                current = min(found, key=cost)
                break
            if trials.spent():
                break
        else:
            break
    return current


def _batches(scenarios: Iterator[Scenario], alone: bool) -> Iterator[list[Scenario]]:
    size = 1 if alone else _FIRST
    while batch := list(islice(scenarios, size)):
        yield batch
        size = size if alone else min(_BATCH, 2 * size)


def _accepts(trials: Trials, wanted: Signature, batch: Sequence[Scenario], repeated: Repeated) -> list[Scenario]:
    """Those of a batch that show it, in their order."""
    if repeated.fresh:
        return [one for one in batch if trials.after(wanted, repeated.before, one, repeated.times)]
    tries = [one for one in batch for _ in range(repeated.times)]
    found = Counter(trials.shown(wanted, tries))
    return [one for one in batch if found[one]]
