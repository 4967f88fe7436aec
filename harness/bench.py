"""`twinwalk bench`: what checking costs, as ratios measured in one run on this machine."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from harness import bench_fuzz, places
from harness.lockstep import errata
from harness.lockstep.contexts import Contexts
from harness.lockstep.driver import Lockstep
from harness.lockstep.twin import Twin
from harness.machine.l1 import L1Machine
from harness.model import vmrun
from harness.model.access import Access
from harness.model.walk import translate
from harness.pool import jobs_for
from harness.run import run
from harness.scenario import files, sweepfiles
from harness.scenario.ops import RunOp, Scenario, parse_probe
from harness.scenario.program import Compiler, Program
from harness.sweeping import Plan
from harness.target import Target
from harness.wire.program import Step, encode

_RUNS_PER_PROGRAM = 500
_SPINS = 50_000
_ROUNDS = 50
"""The spins come in so many rounds, so that a slow machine is not said to hang."""
_WALKS = 100_000
_CASES = 12_000
_LITMUS_CASES = 3_000


@dataclass(frozen=True)
class Figure:
    """One measurement: `value` in `unit`, and what it means."""

    name: str
    value: float
    unit: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name:36} {self.value:>14,.3f} {self.unit:10} {self.note}".rstrip()


def bench(target: Target, pairs: int, library: Path, faults: bool = False) -> Iterator[Figure]:
    """Measure, figure by figure; `pairs` VMRUN/#VMEXIT pairs are checked in each mode, and cases of the sweeps
    of `library`, and generated programs; with `faults` those that the tests plant are looked for too."""
    yield _first_verdict(target)
    with target.start() as machine:
        compiler = Compiler(machine.image, machine.cpu)
        scenario = Scenario("bench", "a read", "", "", (RunOp((parse_probe("read a"),)),) * _RUNS_PER_PROGRAM)
        program = compiler.compile(scenario)
        twin = Twin(machine.image, machine.cpu, machine.liberties)
        yield _walks(twin, program)
        if machine.trace is not None:
            machine.trace.pause()
        unchecked = _unchecked(machine, program)
        yield Figure("unchecked", unchecked, "pairs/s", "VMRUN and #VMEXIT back to back, no record")
        for mode, strict in (("strict lockstep", True), ("pipelined", False)):
            before = _memory()
            rate = _checked(machine, twin, program, strict, pairs)
            yield Figure(f"checked, {mode}", rate, "pairs/s", f"1/{unchecked / rate:.1f} of unchecked")
            yield Figure(f"memory growth, {mode}", _memory() - before, "MiB", f"over {pairs:,} pairs")
        if machine.trace is not None:
            machine.trace.resume()
            contexts = Contexts(machine.trace, machine.image.ram_end, machine.lost)
            rate = _checked(machine, twin, program, False, pairs, contexts)
            yield Figure("checked, pipelined, MMU contexts too", rate, "pairs/s",
                         f"1/{unchecked / rate:.1f} of unchecked")
    yield from _sweeps(target, library)
    for measured in (*bench_fuzz.rates(target, errata.load(library / files.ERRATA_FOLDER)),
                     *(bench_fuzz.planted(places.root()) if faults else ())):
        yield Figure(*measured)


def _first_verdict(target: Target) -> Figure:
    """A whole command that runs one scenario, from its start to its end."""
    argv = [sys.executable, "-m", "harness.cli", "run", *target.arguments(), "-k", "first-light"]
    start = time.monotonic()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return Figure("one scenario, whole command", time.monotonic() - start, "s", "set-up done; first verdict and end")


def _walks(twin: Twin, program: Program) -> Figure:
    """The model alone: two-dimensional walks of a page mapped by 4K pages in both dimensions."""
    twin.reset(program.world)
    paging = vmrun.paging(vmrun.load(twin.vmcb, twin.host), twin.vmcb, twin.host, twin.cpu)
    words, gva, access = twin.memory.words, program.world.gva["a"], Access()
    start = time.perf_counter()
    for _ in range(_WALKS):
        translate(paging, words, gva, access)
    rate = _WALKS / (time.perf_counter() - start)
    return Figure("model, two-dimensional walks", rate, "walks/s", "24 references each")


def _unchecked(machine: L1Machine, program: Program) -> float:
    run = next(step for step in program.steps if step.code == "RUN")
    before = program.steps[: program.steps.index(run)]
    spin = Step("SPIN", a=run.a, b=_SPINS // _ROUNDS, c=run.c)
    machine.channel.post(program.prologue + encode([*before, Step("SYNC")]))
    machine.channel.next_record(machine.idle)
    machine.channel.release()
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        machine.channel.post(encode([spin, Step("SYNC")]))
        machine.channel.next_record(machine.idle)
        machine.channel.release()
    seconds = time.perf_counter() - start
    return _SPINS / seconds


def _checked(
    machine: L1Machine, twin: Twin, program: Program, strict: bool, pairs: int, contexts: Contexts | None = None
) -> float:
    lockstep = Lockstep(machine, machine.channel, twin, strict, contexts=contexts)
    start = time.perf_counter()
    done = 0
    for result in lockstep.run(repeat(program, max(1, pairs // _RUNS_PER_PROGRAM))):
        if result.lost:
            raise result.lost
        done += result.vmruns
    return done / (time.perf_counter() - start)


def _sweeps(target: Target, library: Path) -> Iterator[Figure]:
    """Cases of all sweeps, and of each family of litmus sweeps, from the plan to their verdicts, boots included: on one
    machine, and on as many at once as `run` would take, two at least."""
    known = errata.load(library / files.ERRATA_FOLDER)
    every = sweepfiles.load([library])
    families = [(sweep.name.rpartition("/")[2], [sweep]) for sweep in every if "litmus" in sweep.name]
    for name, sweeps in (("sweeps", every), *families):
        cases, alone = _CASES if sweeps is every else _LITMUS_CASES, 0.0
        for jobs in sorted({1, max(2, jobs_for(target, cases))}):
            start, busy = time.perf_counter(), time.process_time()
            plan = Plan(sweeps, cases)
            outcome = run(target, [], known, pipelined=True, sweeps=plan, jobs=jobs)
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            done = sum(tally.probes if sweeps is every else tally.done for tally in outcome.tallies)
            rate = done / seconds
            alone = alone or rate
            note = (f"1 machine; its checker takes {busy / done * 1e6:.0f} us of processor time each" if jobs == 1 else
                    f"{jobs} machines at once, {rate / alone:.2f} times as fast")
            yield Figure(f"{name}, pipelined", rate, "probes/s" if sweeps is every else "cases/s",
                         f"{plan.cases:,} cases, {note}")


def _memory() -> float:
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
