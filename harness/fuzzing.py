"""`twinwalk fuzz`: generated programs until a budget is spent; what they show is told once for each signature."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from harness import bundling, places
from harness.bundling import Setup
from harness.errors import TwinwalkError, UsageError
from harness.fuzz_journal import FuzzJournal
from harness.lockstep import errata as errata_files
from harness.lockstep.compare import Divergence
from harness.lockstep.result import Result
from harness.lockstep.signature import of_loss
from harness.lockstep.tally import Tally
from harness.machine import guests
from harness.model.coverage import Cell
from harness.model.registers import Cpu
from harness.model.universe import universe
from harness.options import (
    LIBRARY,
    add_bundles,
    add_mode,
    add_results,
    add_target,
    add_volume,
    check_results,
    is_pipelined,
    screen,
    targeted,
)
from harness.program_maker import Batch, End, Maker
from harness.report import catches, html, output, table, terminal
from harness.report.catches import Hunt
from harness.report.findings import findings
from harness.report.headline import kind
from harness.report.summary import summarize
from harness.report.timeline import Timeline
from harness.run import Outcome, run
from harness.scenario import files, writer
from harness.scenario.ops import Scenario
from harness.steering import CPU, NAME

MAX_LOST: Final = 50
"""Machines that a run may lose: each is a finding, and costs a boot."""
_KEPT: Final = 20
"""Results of one signature that are kept whole; more are counted."""


@dataclass(frozen=True)
class Budget:
    """How long a run goes on: `programs`, or `seconds` since the first of them was checked."""

    programs: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, text: str) -> Budget:
        """An option's value: `20s`, `5m` or `1000`."""
        match = re.fullmatch(r"(\d[\d_]*)([smh]?)", text)
        if match is None or not (number := int(match[1])):
            raise argparse.ArgumentTypeError(f"{text!r} is no budget: write seconds as 20s (or 5m, 1h), or a number of "
                                             "programs as 1000")
        return cls(seconds=number * {"s": 1, "m": 60, "h": 3600}[match[2]]) if match[2] else cls(programs=number)


def add(commands: Any) -> None:
    """Add the command to those of the command line."""
    parser = commands.add_parser("fuzz", help="check generated programs, until a budget is spent")
    add_target(parser)
    add_mode(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which programs are made (default: 0)")
    parser.add_argument("--budget", type=Budget.of, default=Budget(seconds=60), metavar="20s|1000",
                        help="seconds, or programs (default: 60s)")
    parser.add_argument("--corpus", type=Path, metavar="DIR",
                        help="run the programs in DIR first, and keep there what reaches what none did before")
    parser.add_argument("--journal", type=Path, metavar="FILE",
                        help="take down each program that was checked; the same command goes on behind them")
    add_bundles(parser)
    add_results(parser, "json", "html")
    add_volume(parser)
    parser.set_defaults(command=command)


class Programs:
    """Generated programs as `run` takes them (harness.run.Cases)."""

    made_for: Cpu | None = CPU

    def __init__(
        self, log: FuzzJournal, seed: int, budget: Budget, corpus: Path | None = None, kept: int = _KEPT
    ) -> None:
        self._log, self._seed, self._budget, self._corpus = log, seed, budget, corpus
        self._kept = kept
        self._tally = Tally(NAME, 0)
        self._deadline: float | None = None
        self._maker: Maker | None = None
        self.left_off = 0
        self.cells: set[Cell] = set(log.reached)

    @property
    def tallies(self) -> list[Tally]:
        """The one of all generated programs."""
        return [self._tally]

    def batches(self) -> Iterator[tuple[Scenario, ...]]:
        """See harness.run.Cases: batches of programs until the budget is spent."""
        log, left = self._log, self._budget.programs
        earlier = _read(self._corpus) if self._corpus and log.fresh else []
        self._maker = Maker(guests.load_image(guests.build_l1()), self._seed, log.reached, log.first, earlier)
        self._maker.__enter__()
        for item in self._maker.made():
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return
            if isinstance(item, End):
                log.block(item.block, item.programs, item.cells)
                continue
            self.cells |= item.cells
            self._keep(item)
            todo = tuple(one for one in item.programs if one.name not in log.done)[:left]
            if left is not None:
                left -= len(todo)
            if todo:
                yield todo
            if left == 0:
                return

    def _keep(self, batch: Batch) -> None:
        if self._corpus is None:
            return
        for one in batch.programs:
            path = self._corpus / writer.file_name(one)
            if one.name in batch.new and not path.exists():
                output.write(path, writer.text(one))

    def took(self, scenario: Scenario, result: Result, strict: bool) -> bool:
        """Count a result; whether there is more to say of it. A budget in seconds begins with the first."""
        if self._deadline is None and self._budget.seconds is not None:
            self._deadline = time.monotonic() + self._budget.seconds
        self._leave_off(result)
        more = self._tally.add(result, strict)
        found = [one for one in findings(result.divergences) if one.is_new(strict)]
        if result.lost is not None:
            signature, what = of_loss(result.lost), f"The machine was lost: {result.lost.reason}"
        elif found:
            signature, what = found[0].signature, kind(found[0])
        else:
            self._log.agreed(scenario.name)
            return more
        self._log.caught(scenario, signature, what)
        return self._log.catches[signature].count <= self._kept

    def _leave_off(self, result: Result) -> None:
        """A machine that went another way by a known erratum may come where the model does not follow: that the rest
        was not checked is counted, and says nothing of the machine."""
        found = result.divergences
        if len(found) > 1 and _is_course(found[-1]) and all(one.erratum for one in found[:-1]):
            found.pop()
            self.left_off += 1

    def close(self) -> None:
        """End the process that makes programs."""
        if self._maker is not None:
            self._maker.__exit__(None, None, None)
            self._maker = None


def _is_course(one: Divergence) -> bool:
    return one.rule == "lockstep" and one.field == "course"


def _read(corpus: Path) -> list[Scenario]:
    """The programs of a corpus, if there are any. Raises UsageError for what is none."""
    if not any(corpus.glob("*.toml")):
        return []
    return [replace(one, name=f"{NAME}[corpus,{one.name}]") for one in files.load([corpus])]


def command(options: argparse.Namespace) -> int:
    """Returns the exit code: as that of `run`. Raises UsageError."""
    check_results(options)
    if options.corpus:
        try:
            options.corpus.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise UsageError(f"--corpus {options.corpus}: {reason.strerror}") from None
    target = targeted(options).chosen()
    errata = errata_files.load(LIBRARY / files.ERRATA_FOLDER)
    outcome, shown, timeline = Outcome(), screen(options), Timeline()
    interrupted: BaseException | None = None
    with FuzzJournal(options.journal, options.seed, " ".join(target.arguments())) as log:
        programs = Programs(log, options.seed, options.budget, options.corpus)
        try:
            with terminal.Watch([], screen=shown) as watch:
                def take(result: Result) -> None:
                    timeline.add(result)
                    watch.result(result, outcome.cases.get(result.scenario))

                run(target, [], errata, is_pipelined(options, target), on_result=take, outcome=outcome, sweeps=programs,
                    jobs=options.jobs or 1, max_lost=MAX_LOST)
        except (KeyboardInterrupt, TwinwalkError) as reason:
            if not programs.tallies[0].done:
                raise
            interrupted = reason  # what was checked is reported all the same
    (tally,) = programs.tallies
    summary = summarize(outcome.identity, outcome.cases.values(), outcome.results, errata, outcome.seconds,
                        cells=outcome.coverage.cells, sweeps=[tally])
    hunt = Hunt(options.seed, tally.done, log.before, programs.left_off, tally.skipped, len(programs.cells),
                len(universe(CPU).reachable), tuple(log.catches.values()))
    table.show(summary, shown, catches.table(hunt, shown.width))
    if options.bundles and not isinstance(interrupted, KeyboardInterrupt):
        setup = Setup(target, errata, is_pipelined(options, target), False)
        summary = bundling.of_run(setup, summary, outcome.before, places.again(), options.bundles)
    if options.json:
        output.write(options.json, catches.text(hunt, summary))
    if options.html:
        html.write(options.html, summary, errata, [catches.page_table(hunt)], timeline)
    if interrupted is not None:
        raise interrupted
    return outcome.exit_code()
