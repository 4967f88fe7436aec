"""Running scenarios on a machine: boot, rehearse, run; what every face of twinwalk does.

A machine that is lost costs one reboot: the scenario it was lost in says so, and the rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from harness.errors import LaunchFailed, MachineLost, UsageError
from harness.lockstep.coverage import Coverage
from harness.lockstep.driver import Lockstep, Result
from harness.lockstep.errata import Erratum
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.machine import tcg
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler, Program

MAX_LOST = 5
"""Reboots before a run is given up."""


@dataclass(frozen=True)
class Target:
    """What is to be tested: the machine, and the binaries and options it is made of."""

    machine: str = "tcg"
    qemu: str | None = None
    cpu: str = "max"
    qemu_args: tuple[str, ...] = ()

    def start(self) -> AbstractContextManager[tcg.TcgMachine]:
        """Boot it; raises LaunchFailed, saying what to do."""
        return tcg.start(self.qemu, self.cpu, self.qemu_args)


@dataclass
class Outcome:
    """What a run came to. `identity` is None if the machine never came up; `coverage` is of all that was checked."""

    identity: tcg.Identity | None = None
    results: list[Result] = field(default_factory=list)
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
) -> Outcome:
    """Run `scenarios` on `target`. `on_result` sees each result as it comes; `outcome`, if given, is
    filled as the run goes, so that an interrupted one keeps what was checked. `strict` counts known
    errata as divergences, for `fail_fast`.

    Raises UsageError for a scenario that makes no sense, before it is run; LaunchFailed if the machine
    cannot be started at all.
    """
    out = outcome if outcome is not None else Outcome()
    start = time.monotonic()
    todo = list(scenarios)
    losses = 0
    try:
        while todo:
            done = len(out.results)
            for result in _boot_and_run(target, todo, errata, pipelined, out):
                out.results.append(result)
                on_result(result)
                if fail_fast and (result.lost or any(strict or d.erratum is None for d in result.divergences)):
                    todo = todo[: len(out.results) - done]
                    break
            todo = todo[len(out.results) - done :]
            if out.results and out.results[-1].lost:
                losses += 1
                if losses >= MAX_LOST:
                    break
    finally:
        out.not_run = len(scenarios) - len(out.results) if not fail_fast else 0
        out.seconds = time.monotonic() - start
    return out


def _rehearsed(compiler: Compiler, twin: Twin, scenarios: Sequence[Scenario]) -> Iterator[Program]:
    """Programs, each tried on the model just before the machine gets it. Lockstep asks for the next one
    only between programs, so both may use one twin."""
    for scenario in scenarios:
        program = compiler.compile(scenario)
        rehearse(twin, program)
        yield program


def _boot_and_run(
    target: Target, scenarios: Sequence[Scenario], errata: Sequence[Erratum], pipelined: bool, out: Outcome
) -> Iterator[Result]:
    """Results from one boot, until the scenarios are done or the machine is lost."""
    try:
        with target.start() as machine:
            out.identity = machine.identity
            known = [e for e in errata if e.holds_for("qemu-tcg", machine.identity.qemu_version)]
            compiler = Compiler(machine.image, machine.cpu)
            twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
            programs = _rehearsed(compiler, twin, scenarios)
            lockstep = Lockstep(machine, machine.channel, twin, not pipelined, known, out.coverage)
            for result in lockstep.run(programs):
                if result.senseless:
                    raise UsageError(result.senseless)
                yield result
    except LaunchFailed as failed:
        if not out.results:
            raise
        yield Result(scenarios[0].name, lost=MachineLost(f"it could not be started again: {failed}"))
