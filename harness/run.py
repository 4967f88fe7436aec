"""Running scenarios, on one machine or on several at once: what every face of twinwalk does."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from harness import far
from harness.errors import UsageError
from harness.lockstep.coverage import Coverage
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.lockstep.signature import Signature
from harness.lockstep.tally import Tally
from harness.machine.l1 import Identity
from harness.model.registers import Cpu
from harness.pool import Pool
from harness.report.findings import signatures
from harness.scenario.ops import Scenario
from harness.session import MAX_LOST, Done, Unit
from harness.target import Target

_UNIT: Final = 100
"""Scenarios, or cases of sweeps, that a machine does in one go: tenths of a second."""


class Cases(Protocol):
    """Where cases come from, beside scenarios: those of sweeps (harness.sweeping), generated programs
    (harness.fuzzing)."""

    @property
    def made_for(self) -> Cpu | None:
        """See harness.session.Unit."""

    @property
    def tallies(self) -> list[Tally]:
        """How far each kind of them came."""

    def batches(self) -> Iterator[tuple[Scenario, ...]]:
        """Cases that share a world."""

    def took(self, scenario: Scenario, result: Result, strict: bool) -> bool:
        """Count a result; whether there is more to say of it."""

    def close(self) -> None:
        """At the end of the run, however it came."""


@dataclass
class Outcome:
    """What a run came to. `identity` is None if the machine never came up; `coverage` is of all that was checked."""

    identity: Identity | None = None
    results: list[Result] = field(default_factory=list)
    """Of scenarios; of cases of sweeps only those of which there is more to say than that they were done."""
    cases: dict[str, Scenario] = field(default_factory=dict)
    """Those cases, by name."""
    tallies: list[Tally] = field(default_factory=list)
    """How far each sweep came."""
    not_run: int = 0
    seconds: float = 0.0
    coverage: Coverage = field(default_factory=Coverage)
    before: dict[str, tuple[Scenario, ...]] = field(default_factory=dict)
    """What ran before a scenario in which a signature was new, as far as it may have to do with it."""

    @property
    def lost(self) -> bool:
        """Whether a machine was lost."""
        return any(result.lost for result in self.results)

    def new(self, strict: bool = False) -> int:
        """Divergences that no erratum explains; with `strict` all of them."""
        return sum(1 for r in self.results for d in r.divergences if strict or d.erratum is None)

    def exit_code(self, strict: bool = False) -> int:
        """0 agreed or known errata only, 1 a new divergence, 3 a machine was lost. A divergence is a
        verdict, so it comes before a loss."""
        if self.new(strict):
            return 1
        return 3 if self.lost or self.not_run else 0


def run(
    target: Target,
    scenarios: Sequence[Scenario],
    errata: Sequence[Erratum] = (),
    pipelined: bool = False,
    fail_fast: bool = False,
    strict: bool = False,
    on_result: Callable[[Result], None] = lambda result: None,
    outcome: Outcome | None = None,
    sweeps: Cases | None = None,
    jobs: int = 1,
    careful: bool = True,
    max_lost: int = MAX_LOST,
) -> Outcome:
    """Run `scenarios`, then the cases of `sweeps`, on `target`, until the machine was lost `max_lost` times.
    `on_result` sees each result as it comes;
    `outcome`, if given, is filled as the run goes, so that an interrupted one keeps what was checked.
    `strict` counts known errata as divergences, for `fail_fast`. With `jobs` machines at once results, and
    their order, are the same as with one. Unless `careful`, what a machine is known not to survive is run as well.

    Raises UsageError for a scenario that makes no sense, before it is run (for a case of a sweep, at the
    end); LaunchFailed if the machine cannot be started at all; WorkerLost if a process with a machine ended.
    """
    out = outcome if outcome is not None else Outcome()
    start = time.monotonic()
    out.tallies = sweeps.tallies if sweeps else []
    losses, alone, senseless = 0, 0, ""
    latest: deque[Scenario] = deque(maxlen=_UNIT)
    known: set[Signature] = set()

    def take(done: Done) -> None:
        nonlocal losses, alone, senseless
        scenario, result, case = done
        if not case:
            alone += 1
            out.results.append(result)
        elif sweeps is not None and sweeps.took(scenario, result, strict):
            out.cases[scenario.name] = scenario
            out.results.append(result)
        if result.senseless and not senseless:
            senseless = f"{result.senseless} (in {scenario.name})"
        losses += result.lost is not None
        if new := signatures(result, strict) - known:
            known.update(new)
            out.before[scenario.name] = tuple(latest)
        latest.append(scenario)
        on_result(result)

    source = (Pool(jobs, target, errata, pipelined) if jobs > 1 else
              far.session(target, errata, pipelined, careful=careful))
    try:
        with source:
            try:
                for done in source.run(_units(scenarios, sweeps)):
                    take(done)
                    if losses == max_lost:
                        break
                    result = done.result
                    if fail_fast and (result.lost or any(strict or d.erratum is None for d in result.divergences)):
                        return out
            except BaseException:  # what was checked is told, however the run ends
                for done in source.held():
                    take(done)
                raise
    finally:
        out.identity, out.coverage = source.identity, source.coverage
        out.not_run = len(scenarios) - alone if not fail_fast else 0
        if sweeps is not None:
            sweeps.close()
        out.seconds = time.monotonic() - start
    if senseless:
        raise UsageError(senseless)
    return out


def _units(scenarios: Sequence[Scenario], sweeps: Cases | None) -> Iterator[Unit]:
    """The work, in its order, cut into units: the same cuts for any number of machines."""
    for at in range(0, len(scenarios), _UNIT):
        yield Unit(tuple((scenario,) for scenario in scenarios[at : at + _UNIT]), cases=False)
    if sweeps is None:
        return
    batches: list[tuple[Scenario, ...]] = []
    for batch in sweeps.batches():
        batches.append(batch)
        if sum(map(len, batches)) >= _UNIT:
            yield Unit(tuple(batches), cases=True, made_for=sweeps.made_for)
            batches = []
    if batches:
        yield Unit(tuple(batches), cases=True, made_for=sweeps.made_for)
