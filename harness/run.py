"""Running scenarios on a machine: boot, rehearse, run; what every face of twinwalk does.

A machine that is lost costs one reboot: the scenario it was lost in says so, and the rest goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from harness.errors import LaunchFailed, MachineLost, UsageError
from harness.lockstep.compare import Divergence
from harness.lockstep.contexts import Contexts
from harness.lockstep.coverage import Coverage
from harness.lockstep.driver import Lockstep, Result
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.rehearse import rehearse
from harness.lockstep.tally import Tally
from harness.lockstep.twin import Twin
from harness.machine.l1 import Identity, L1Machine
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler, Program
from harness.sweeping import Plan
from harness.target import Target

MAX_LOST = 5
"""Reboots before a run is given up."""


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

    @property
    def lost(self) -> bool:
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
    sweeps: Plan | None = None,
) -> Outcome:
    """Run `scenarios`, then the cases of `sweeps`, on `target`. `on_result` sees each result as it comes;
    `outcome`, if given, is filled as the run goes, so that an interrupted one keeps what was checked.
    `strict` counts known errata as divergences, for `fail_fast`.

    Raises UsageError for a scenario that makes no sense, before it is run (for a case of a sweep, at the
    end); LaunchFailed if the machine cannot be started at all.
    """
    out = outcome if outcome is not None else Outcome()
    start = time.monotonic()
    queue = _Queue(scenarios, sweeps)
    out.tallies = sweeps.tallies if sweeps else []
    losses, alone, senseless = 0, 0, ""
    try:
        while losses < MAX_LOST and queue.more():
            for scenario, result in _boot_and_run(target, queue, errata, pipelined, out):
                notable = True
                if sweeps is not None and scenario.name in queue.cases:
                    queue.cases.remove(scenario.name)
                    notable = sweeps.took(scenario, result, strict)
                    if notable:
                        out.cases[scenario.name] = scenario
                else:
                    alone += 1
                if notable:
                    out.results.append(result)
                if result.senseless and not senseless:
                    senseless = f"{result.senseless} (in {scenario.name})"
                on_result(result)
                losses += result.lost is not None
                if fail_fast and (result.lost or any(strict or d.erratum is None for d in result.divergences)):
                    return out
    finally:
        out.not_run = len(scenarios) - alone if not fail_fast else 0
        if sweeps is not None:
            sweeps.close()
        out.seconds = time.monotonic() - start
    if senseless:
        raise UsageError(senseless)
    return out


class _Queue:
    """What is still to be run, in batches: scenarios one by one, cases of sweeps by their world. Results come
    in the order in which programs were handed out."""

    def __init__(self, scenarios: Sequence[Scenario], sweeps: Plan | None) -> None:
        batches = sweeps.batches() if sweeps is not None else iter(())
        self._rest = chain(((scenario,) for scenario in scenarios), map(self._case_batch, batches))
        self._first: deque[tuple[Scenario, ...]] = deque()
        """To be handed out before the rest."""
        self._out: deque[tuple[Scenario, ...]] = deque()
        """Handed out; of the first one `_results` are there."""
        self._results: list[Result] = []
        self.skipped: list[tuple[Scenario, Result]] = []
        """Those that cannot be run on this CPU, with the reason."""
        self.cases: set[str] = set()
        """Cases of sweeps that were handed out."""
        self._doubts: list[_Doubt] = []

    def _case_batch(self, batch: tuple[Scenario, ...]) -> tuple[Scenario, ...]:
        self.cases.update(scenario.name for scenario in batch)
        return batch

    def more(self) -> bool:
        """Whether anything is left; what was handed out without a result is handed out again."""
        self._first.extendleft(reversed(self._out))
        self._out.clear()
        if not self._first and (batch := next(self._rest, None)) is not None:
            self._first.append(batch)
        return bool(self._first)

    def programs(self, compiler: Compiler, twin: Twin) -> Iterator[Program]:
        """A scenario is tried on the model just before the machine gets it. Lockstep asks for the next program
        only between two, so both may use one twin."""
        while batch := self._first.popleft() if self._first else next(self._rest, None):
            if not compiler.usual:
                batch = tuple(scenario for scenario in batch if self._fits(scenario, compiler, twin))
                if not batch:
                    continue
            self._out.append(batch)
            if batch[0].name in self.cases:
                yield from compiler.batch(batch)
            else:
                program = compiler.compile(batch[0])
                rehearse(twin, program, expectations=compiler.usual)
                yield program

    def _fits(self, scenario: Scenario, compiler: Compiler, twin: Twin) -> bool:
        """Whether a scenario makes sense on another CPU than that which expectations are written for."""
        try:
            rehearse(twin, compiler.compile(scenario), expectations=False)
        except UsageError as reason:
            self.skipped.append((scenario, Result(scenario.name, skipped=str(reason))))
            return False
        return True

    def not_for_this_cpu(self) -> Iterator[tuple[Scenario, Result]]:
        """What was skipped since the last call."""
        skipped, self.skipped = self.skipped, []
        yield from skipped

    def next(self) -> Scenario:
        """The scenario that is next, handed out without a program."""
        first, *rest = self._first.popleft()
        if rest:
            self._first.appendleft(tuple(rest))
        return first

    def take(self, result: Result) -> Iterator[tuple[Scenario, Result]]:
        """The next result; returns those that are final. What is found at the end of a batch may be any
        one's doing: its scenarios are run again, each alone. Where a batch does not come to its end, since the machine
        is lost, those before are run again with those behind."""
        batch = self._out[0]
        self._results.append(result)
        if result.lost is None and len(self._results) < len(batch):
            return
        results, self._results = self._results, []
        self._out.popleft()
        at_end = [one for one in result.divergences if one.op < 0]
        if result.lost is not None:
            at = len(results) - 1
            if rest := batch[:at] + batch[at + 1 :]:
                self._out.appendleft(rest)
            batch, results = (batch[at],), [result]
        elif len(batch) > 1 and at_end:
            self._first.extend((scenario,) for scenario in batch)
            self._doubts.append(_Doubt({scenario.name for scenario in batch}, at_end))
            return
        for doubt in self._doubts:
            if result.scenario in doubt.names:
                doubt.settle(result)
        yield from zip(batch, results, strict=False)


@dataclass
class _Doubt:
    """A batch at whose end memory was wrong: its scenarios (`names` are those still to be run again), and
    what was found. If none of them shows it alone, it is told with the last of them."""

    names: set[str]
    found: list[Divergence]

    def settle(self, result: Result) -> None:
        self.names.discard(result.scenario)
        if any(one.op < 0 for one in result.divergences):
            self.found = []
        if not self.names:
            result.divergences += self.found


def _contexts(machine: L1Machine) -> Contexts | None:
    return Contexts(machine.trace, machine.image.ram_end, machine.lost) if machine.trace is not None else None


def _boot_and_run(
    target: Target, queue: _Queue, errata: Sequence[Erratum], pipelined: bool, out: Outcome
) -> Iterator[tuple[Scenario, Result]]:
    """Results from one boot, until the queue is empty or the machine is lost."""
    try:
        with target.start() as machine:
            out.identity = machine.identity
            known = of_layers(errata, machine.identity.layers)
            compiler = Compiler(machine.image, machine.cpu)
            twin = Twin(machine.image, machine.cpu, machine.liberties)
            lockstep = Lockstep(machine, machine.channel, twin, not pipelined, known, out.coverage,
                                _contexts(machine))
            for result in lockstep.run(queue.programs(compiler, twin)):
                yield from queue.not_for_this_cpu()
                yield from queue.take(result)
            yield from queue.not_for_this_cpu()
    except LaunchFailed as failed:
        if out.identity is None:
            raise
        scenario = queue.next()
        yield scenario, Result(scenario.name, lost=MachineLost(f"it could not be started again: {failed}"))
