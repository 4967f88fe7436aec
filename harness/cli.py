"""The command line: `twinwalk run`, `list`, `coverage`, `doctor`, `fuzz`, `replay`, `fetch`, `matrix` and more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from harness import (
    bisect,
    bundling,
    campaigning,
    explaining,
    fetching,
    fuzzing,
    matrix,
    observing,
    places,
    replay,
    usage,
)
from harness.bundling import Setup
from harness.errors import TwinwalkError, UsageError
from harness.lockstep import errata as errata_files
from harness.lockstep.result import Result
from harness.options import (
    LIBRARY,
    add_bundles,
    add_mode,
    add_results,
    add_target,
    add_volume,
    check_results,
    count,
    is_pipelined,
    local,
    screen,
    targeted,
)
from harness.pool import jobs_for
from harness.report import html, jsonfile, junit, output, table, terminal
from harness.report.journal import Journal
from harness.report.styled import line
from harness.report.summary import summarize
from harness.report.timeline import Timeline
from harness.run import Outcome, run
from harness.scenario import files, sweepfiles, writer
from harness.scenario.sweep import Sweep
from harness.selection import selected, selection
from harness.sweeping import BUDGET, WHOLE, Plan, Record, shard
from harness.target import AUTO

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 agreed, 1 divergence, 2 wrong use, 3 machine lost, 130 Ctrl-C."""
    given, behind = observing.split(sys.argv[1:] if argv is None else argv)
    ours = parser()
    usage.complete(ours)
    options = ours.parse_args(given, argparse.Namespace(behind=behind))
    try:
        return int(options.command(options))
    except TwinwalkError as error:
        print(f"twinwalk: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    ours = argparse.ArgumentParser(
        prog="twinwalk", formatter_class=usage.Help,
        description="Checks nested paging: a model of the AMD64 MMU in lockstep with real guests.",
        epilog="exit codes: 0 agreed or known errata only, 1 a new divergence, 2 wrong use, 3 a machine was lost "
               "or could not be started; `replay` has its own: see its --help. `./twinwalk setup` and `./twinwalk "
               "test` belong to the checkout.\n\nexamples:\n\n" + "\n".join(usage.examples("")),
    )
    commands = ours.add_subparsers(required=True, metavar="COMMAND")

    runner = commands.add_parser("run", help="run scenarios in lockstep")
    selection(runner)
    add_target(runner)
    runner.add_argument("--strict", action="store_true", help="count known errata as divergences")
    runner.add_argument("--fail-fast", action="store_true", help="stop at the first new divergence")
    add_mode(runner)
    how_many = runner.add_mutually_exclusive_group()
    how_many.add_argument("--budget", type=count, default=BUDGET, metavar="N",
                          help=f"cases of sweeps to run, shared among them (default: {BUDGET}; 0 for none)")
    how_many.add_argument("--exhaustive", action="store_true", help="all cases of the sweeps that are selected")
    runner.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of cases (default: 0)")
    runner.add_argument("--record", type=Path, metavar="FILE",
                        help="go on behind the cases of earlier runs that FILE has, and add those of this one")
    runner.add_argument("--shard", type=shard, default=WHOLE, metavar="K/N",
                        help="the K-th of N parts: together they do what one run does, each of it once")
    add_results(runner, "json", "html", "junit")
    add_bundles(runner)
    add_volume(runner)
    runner.set_defaults(command=_run)

    lister = commands.add_parser("list", help="list scenarios")
    selection(lister)
    lister.add_argument("--write", type=Path, metavar="FOLDER", help="write each of them to a file in FOLDER")
    lister.set_defaults(command=_list)

    coverage = commands.add_parser("coverage", help="show which cases of which rule were reached, and which not")
    coverage.add_argument("results", nargs="*", type=Path, metavar="RESULT.json",
                          help="files of `run --json`, taken together (default: run the library and its sweeps)")
    add_target(coverage)
    coverage.add_argument("--json", type=Path, metavar="FILE", help="write all cells as JSON")
    coverage.set_defaults(command=_coverage)

    fuzzing.add(commands)
    replay.add(commands)
    explaining.add(commands)
    fetching.add(commands)
    matrix.add(commands)
    bisect.add(commands)
    observing.add(commands)
    campaigning.add(commands)
    doctor = commands.add_parser("doctor", help="say what works here, and what mends the rest")
    add_target(doctor)
    doctor.set_defaults(command=_doctor)

    bench = commands.add_parser("bench", help="measure what checking costs on this machine")
    add_target(bench)
    bench.add_argument("--pairs", type=int, default=100_000, metavar="N",
                       help="VMRUN/#VMEXIT pairs to check in each mode (default: 100000)")
    bench.add_argument("--faults", action="store_true",
                       help="measure too how soon planted faults are found, and how small they are shrunk: some "
                            "minutes, in a checkout")
    bench.set_defaults(command=_bench)
    usage.add(commands)
    usage.add_examples(commands)
    return ours


def _plan(options: argparse.Namespace, machine: str, sweeps: Sequence[Sweep]) -> Plan | None:
    """How many cases of which sweeps are run."""
    if not sweeps:
        return None
    target = " ".join([machine, options.qemu or "the QEMU in PATH", options.cpu, *options.qemu_arg])
    record = Record(options.record, target) if options.record else None
    return Plan(sweeps, None if options.exhaustive else options.budget, options.seed, record, options.shard)


def _run(options: argparse.Namespace) -> int:
    check_results(options)
    if options.record and options.shard != WHOLE:
        raise UsageError("--record is of whole runs: give each --shard another --seed instead, and it has other cases")
    picked, target = selected(options.paths, options.expression), targeted(options).chosen()
    scenarios, plan = options.shard.of_all(picked.scenarios), _plan(options, target.label, picked.sweeps)
    pipelined = is_pipelined(options, target)
    jobs = options.jobs or jobs_for(target, len(scenarios) + (plan.cases if plan else 0))
    errata = errata_files.load(LIBRARY / files.ERRATA_FOLDER)
    outcome, shown = Outcome(), screen(options)
    journal, timeline = Journal(options.json), Timeline(options.strict)
    interrupted: BaseException | None = None
    try:
        with terminal.Watch(scenarios, options.strict, shown, plan.cases if plan else 0) as watch, journal:
            def take(result: Result) -> None:
                if outcome.results and result is outcome.results[-1]:  # cases that agree are counted, not listed
                    journal.result(result)
                timeline.add(result)
                watch.result(result, outcome.cases.get(result.scenario))

            run(target, scenarios, errata, pipelined, options.fail_fast, options.strict, take, outcome, plan,
                jobs)
    except (KeyboardInterrupt, TwinwalkError) as reason:
        if not outcome.results and not any(tally.done for tally in outcome.tallies):
            raise
        interrupted = reason  # what was checked is reported all the same
    summary = summarize(outcome.identity, [*scenarios, *outcome.cases.values()], outcome.results, errata,
                        outcome.seconds, options.strict, outcome.coverage.cells, outcome.tallies)
    table.show(summary, shown)
    if options.bundles and not isinstance(interrupted, KeyboardInterrupt):
        setup = Setup(target, errata, pipelined, options.strict)
        summary = bundling.of_run(setup, summary, outcome.before, places.again(), options.bundles)
    elif summary.found and shown.volume > terminal.Volume.QUIET:
        shown.show([line(f"bundles of what is new: {places.again()} --bundles FOLDER")])
    if options.junit:
        try:
            junit.write(options.junit, summary)
        except TwinwalkError as reason:
            interrupted = interrupted or reason
    if options.json:
        jsonfile.write(options.json, summary)
        journal.done()
    if options.html:
        html.write(options.html, summary, errata, timeline=timeline)
    if interrupted is not None:
        raise interrupted
    return outcome.exit_code(options.strict)


def _list(options: argparse.Namespace) -> int:
    chosen = selected(options.paths, options.expression)
    names = [scenario.name for scenario in chosen.scenarios] + [sweep.name for sweep in chosen.sweeps]
    width = min(60, max(map(len, names)))
    for scenario in chosen.scenarios:
        print(f"{scenario.name:{width}}  {scenario.title} ({scenario.manual})")
    if options.write:
        writer.write(chosen.scenarios, options.write)
    for sweep in chosen.sweeps:
        print(f"{sweep.name:{width}}  {sweep.title} ({sweep.manual}): {sweep.space.size:,} cases")
    return 0


def _coverage(options: argparse.Namespace) -> int:
    from harness.report import coverage

    check_results(options)
    code = 0
    errata = errata_files.load(LIBRARY / files.ERRATA_FOLDER)
    if options.results:
        runs = [coverage.read(path) for path in options.results]
    else:
        scenarios, plan = files.load([LIBRARY]), Plan(sweepfiles.load([LIBRARY]), BUDGET)
        with terminal.Watch(scenarios, cases=plan.cases) as watch:
            target = targeted(options).chosen()
            jobs = jobs_for(target, len(scenarios) + plan.cases)
            outcome = run(target, scenarios, errata, pipelined=True, on_result=watch.result, sweeps=plan, jobs=jobs)
        code = outcome.exit_code()
        runs = [coverage.Covered.of(outcome.identity, outcome.coverage.cells)]
    merged = coverage.merge(runs, errata)
    shown = terminal.Screen()
    shown.show(coverage.table(merged, shown.width))
    if options.json:
        output.write(options.json, coverage.text(merged))
    return code


def _doctor(options: argparse.Namespace) -> int:
    from harness.doctor import examine

    works = True
    for finding in examine(local(options)):
        print(finding)
        needed = "tcg" if options.machine == AUTO else options.machine
        works = works and (finding.ok or finding.machine not in ("all", needed))
    return 0 if works else 3


def _bench(options: argparse.Namespace) -> int:
    from harness.bench import bench

    for figure in bench(local(options).chosen(), options.pairs, LIBRARY, options.faults):
        print(figure, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
