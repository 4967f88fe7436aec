"""`twinwalk matrix`: the library on several versions of QEMU and of KVM, and which findings each of them shows."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from harness.errors import LaunchFailed, TwinwalkError, UsageError
from harness.lockstep import errata as errata_files
from harness.lockstep.errata import of_layers
from harness.machine import kvm_on_tcg
from harness.options import LIBRARY, add_results, add_volume, check_results, count
from harness.pool import jobs_for
from harness.report import matrix as report
from harness.report import output
from harness.report.summary import summarize
from harness.report.terminal import Volume
from harness.run import Outcome, run
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.sweep import Sweep
from harness.selection import selected, selection
from harness.sweeping import Plan
from harness.target import Target, say

BUDGET: Final = 1000
"""Cases of sweeps on each machine, where nobody says otherwise."""
_FILES: Final = {"json": report.document, "html": report.html, "markdown": report.markdown}


class Machine(NamedTuple):
    """A column: its name, and what is to be tested."""

    name: str
    target: Target


def add(commands: Any) -> None:
    """The command, to argparse's sub-commands."""
    parser = commands.add_parser("matrix", help="run several versions of QEMU and of KVM: which findings each shows")
    selection(parser)
    parser.add_argument("--qemu", default="", metavar="V,V,...", help="versions of QEMU to test (or paths)")
    parser.add_argument("--kernel", default="", metavar="V,V,...", help="versions of KVM's kernel to test (or paths)")
    parser.add_argument("--under", metavar="V",
                        help="the QEMU that plays the host of these kernels (default: the last of --qemu, else that on "
                             "PATH)")
    parser.add_argument("--cpu", default="max", metavar="MODEL", help="the CPU of that host (default: max)")
    parser.add_argument("--budget", type=count, default=BUDGET, metavar="N",
                        help=f"cases of sweeps on each machine (default: {BUDGET}; 0 for none)")
    add_results(parser, *_FILES)
    add_volume(parser)
    parser.set_defaults(command=_matrix)


def machines(qemus: Sequence[str], kernels: Sequence[str], under: str | None, cpu: str) -> Iterator[Machine]:
    """The columns, in their order; several paths that end alike are numbered."""
    seen: Counter[str] = Counter()

    def named(layer: str, path: str) -> str:
        name = f"{layer} {Path(path).name}"
        seen[name] += 1
        return name if seen[name] == 1 else f"{name} ({seen[name]})"

    for one in qemus:
        yield Machine(named("QEMU", one), Target("tcg", qemu=one, say=say))
    for one in kernels:
        host = replace(kvm_on_tcg.DEFAULT, kernel=Path(one))
        yield Machine(named("KVM", one), Target("kvm-on-tcg", qemu=under, cpu=cpu, l0=host, say=say))


def _matrix(options: argparse.Namespace) -> int:
    qemus, kernels = (list(filter(None, text.split(","))) for text in (options.qemu, options.kernel))
    if not qemus and not kernels:
        raise UsageError("say which versions: --qemu 7.2,10.0 --kernel 6.1,6.12")
    files = {name: path for name in _FILES if (path := getattr(options, name)) is not None}
    check_results(options)
    picked = selected(options.paths, options.expression)
    errata = errata_files.load(LIBRARY / "errata")
    columns: list[report.Column] = []
    for one in machines(qemus, kernels, options.under or (qemus[-1] if qemus else None), options.cpu):
        if options.volume > Volume.QUIET:
            say(f"{one.name} ...")
        columns.append(column(one, picked.scenarios, picked.sweeps, options.budget, errata))
        if options.volume > Volume.QUIET:
            say(f"{one.name}: {columns[-1].failed.partition(chr(10))[0] or _told(columns[-1])}")
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    command = shlex.join(["twinwalk", *sys.argv[1:]])
    matrix = report.Matrix(tuple(columns), tuple(errata), f"Made on {when} by `{command}`.")
    for line in _shown(matrix, options.volume):
        print(line)
    for name, path in files.items():
        output.write(path, _FILES[name](matrix))
    if all(one.failed for one in columns):
        return LaunchFailed.exit_code
    return 1 if matrix.unexplained() else 0


def _shown(matrix: report.Matrix, volume: Volume) -> Iterator[str]:
    """The table, and with `volume` VERBOSE why cells are x; QUIET, what no erratum explains, a line each, and the
    verdict."""
    if volume == Volume.QUIET:
        yield from matrix.unexplained()
        yield report.verdict(matrix)
        return
    yield from report.table(matrix)
    if volume == Volume.VERBOSE:
        yield from matrix.reasons()


def _loses(machine: Machine, erratum: errata_files.Erratum, errata: Sequence[errata_files.Erratum]) -> str:
    """How the machine is lost by what it is known not to survive, or what else shows of it; an empty string if neither
    is."""
    say(f"{machine.name}: is it still lost by {erratum.shown[0]}?")
    [scenario] = files.load([LIBRARY], lambda name: name == erratum.shown[0])
    outcome = run(machine.target, [scenario], errata, pipelined=True, careful=False)
    lost = next((result.lost for result in outcome.results if result.lost is not None), None)
    if lost is None and outcome.new():
        return f"{scenario.name}, not lost, but as {erratum.id} says: {outcome.new()} divergences else unexplained"
    return f"{scenario.name}, as {erratum.id} says: {lost.reason}" if lost is not None else ""


def _told(one: report.Column) -> str:
    new = sum(count for row, count in one.found.items() if row.startswith("new: "))
    return f"{one.scenarios:,} scenarios, {one.cases:,} cases, {len(one.found)} findings, {new} unexplained"


def column(machine: Machine, scenarios: Sequence[Scenario], sweeps: Sequence[Sweep], budget: int,
           errata: Sequence[errata_files.Erratum]) -> report.Column:
    """Run one machine. What makes it untestable is said in the column."""
    plan = Plan(sweeps, budget) if sweeps and budget else None
    outcome = Outcome()
    pipelined = machine.target.machine == "kvm-on-tcg"
    try:
        jobs = jobs_for(machine.target, len(scenarios) + (plan.cases if plan else 0))
        run(machine.target, scenarios, errata, pipelined, outcome=outcome, sweeps=plan, jobs=jobs)
    except TwinwalkError as reason:
        if not outcome.results or outcome.identity is None:
            return report.Column(machine.name, failed=str(reason))
        say(f"{machine.name}: {reason}")
    summary = summarize(outcome.identity, [*scenarios, *outcome.cases.values()], outcome.results, errata,
                        outcome.seconds, sweeps=outcome.tallies)
    layers = outcome.identity.layers if outcome.identity is not None else ()
    found = report.column(machine.name, summary, layers)
    for erratum in of_layers(errata, layers):
        if not erratum.hazard:
            continue
        if how := _loses(machine, erratum, errata):
            found = replace(found, found={**found.found, erratum.id: 1}, lost=(*found.lost, how))
        else:
            found = replace(found, stale=found.stale | {erratum.id}, ran=found.ran | set(erratum.shown))
    if outcome.not_run:
        found = replace(found, lost=(*found.lost, f"the rest: {outcome.not_run} scenarios were not run"))
    return found
