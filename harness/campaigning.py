"""`twinwalk campaign`: the library, its sweeps and generated programs in shards over a fleet of hosts.

Its journal has a line for each shard, written as soon as its answer is there; the same command goes on behind them. So
no shard is lost with a worker, a host or this process, and none is counted twice.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import IO, Any, Final

from harness import places, shards
from harness.errors import LaunchFailed, TwinwalkError, UsageError
from harness.fleet import Came, Fleet
from harness.lockstep.signature import LOST
from harness.options import (
    add_mode,
    add_results,
    add_target,
    check_results,
    count,
    is_pipelined,
    local,
    positive,
)
from harness.report import output
from harness.report.styled import BAD, GOOD, HEAD, Line, harmless, line, wrap
from harness.report.terminal import Screen
from harness.selection import selected
from harness.shards import Answer, Find, Merged, Shard
from harness.sweeping import BUDGET
from harness.target import say

PROGRAMS: Final = 1_000
_KIND: Final = "twinwalk campaign"
_PAUSE: Final = 10.0
"""Seconds between two words of how far it is."""


def add(commands: Any) -> None:
    """The command, to argparse's sub-commands."""
    parser = commands.add_parser("campaign", help="share the library, sweeps and generated programs over many hosts")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--scheduler", metavar="ADDRESS",
                       help="of a scheduler of Dask's that runs, with workers, such as tcp://host:8786")
    where.add_argument("--hosts", type=Path, metavar="FILE",
                       help="start workers over SSH: [user@]host[:port] on each line, the scheduler on the first")
    parser.add_argument("-k", dest="expression", default="", metavar="EXPR",
                        help="only scenarios and sweeps of the library whose name contains EXPR: see `run`")
    add_target(parser)
    add_mode(parser)
    parser.add_argument("--strict", action="store_true", help="count known errata as divergences")
    parser.add_argument("--budget", type=count, default=BUDGET, metavar="N",
                        help=f"cases of sweeps in all (default: {BUDGET}; 0 for none)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of cases (default: 0)")
    parser.add_argument("--shards", type=positive, metavar="N",
                        help=f"into how many the run is cut (default: {shards.WORTH} scenarios and cases in each)")
    parser.add_argument("--fuzz", type=seeds, default=range(0), metavar="A..B",
                        help="generated programs as well, of these seeds: a shard for each")
    parser.add_argument("--programs", type=positive, default=PROGRAMS, metavar="N",
                        help=f"generated programs of each seed (default: {PROGRAMS})")
    parser.add_argument("--journal", type=Path, metavar="FILE",
                        help="take down each shard that is done; the same command goes on behind them")
    add_results(parser, "json")
    parser.set_defaults(command=command)


def seeds(text: str) -> range:
    """An option's value: `0..31`, or one seed."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no seeds: write 7, or 0..31")
    return found


def plan(options: argparse.Namespace) -> list[Shard]:
    """The shards, all of them. Raises UsageError where the options make no sense."""
    target = local(options).chosen()
    pipelined = is_pipelined(options, target)
    common = [*target.arguments(), f"--jobs={options.jobs or 1}", "--pipelined" if pipelined else "--lockstep"]
    picked = selected([], options.expression)
    things = len(picked.scenarios) + (options.budget if picked.sweeps else 0)
    ours = [f"--budget={options.budget}", *common, *([f"-k={options.expression}"] if options.expression else []),
            *(["--strict"] if options.strict else [])]
    return [*shards.of_run([f"--seed={options.seed}", *ours], things, options.shards),
            *shards.of_fuzz(common, options.fuzz, options.programs)]


class Journal:
    """A context manager: shards that are done, in `merged` from the beginning. `path` None keeps nothing."""

    def __init__(self, path: Path | None, work: Sequence[Shard], merged: Merged) -> None:
        self._path, self._merged = path, merged
        self._head = {"journal": _KIND, "edition": places.edition(), "shards": [list(one) for one in work]}
        self._file: IO[str] | None = None

    def __enter__(self) -> Journal:
        if self._path is not None:
            try:
                text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
                whole = text[: text.rfind("\n") + 1]
                self._read(self._path, whole.splitlines())
                if whole != text:  # a campaign that was killed left half a line
                    with self._path.open("r+b") as file:
                        file.truncate(len(whole.encode()))
                self._file = self._path.open("a", encoding="utf-8", buffering=1)  # a line at a time
            except (OSError, UnicodeDecodeError) as reason:
                raise UsageError(f"--journal: cannot use {self._path}: {reason}") from None
            if not whole:
                self._write(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a full disk, where half a line is left: that was said
                self._file.close()

    def _read(self, path: Path, lines: Sequence[str]) -> None:
        for number, text in enumerate(lines, 1):
            try:
                entry = json.loads(text)
                if number == 1:
                    if entry["journal"] != _KIND:
                        raise KeyError("journal")
                    if entry != self._head:
                        raise UsageError(f"{path}:1: this journal is of another campaign, or of another twinwalk: give "
                                         "--journal another file")
                    continue
                self._merged.add(tuple(map(str, entry["shard"])), shards.answer(entry["answer"]))
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{path}:{number}: this is no line of a journal of `twinwalk campaign`: name another "
                                 "file, or take the line out") from None

    def done(self, shard: Shard, one: Answer) -> list[Find]:
        """Take it down and count it; what is new in it."""
        cells = sorted(one.cells - self._merged.cells)
        self._write({"shard": list(shard), "answer": {
            "machine": one.machine, "totals": one.totals,
            "findings": [find.signature._asdict() | {"count": find.times, "scenario": find.scenario, "what": find.what}
                         for find in one.finds],
            "cells": [list(cell) for cell in cells],
        }})
        return self._merged.add(shard, one)

    def _write(self, entry: Any) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(entry) + "\n")
        except OSError as reason:
            raise UsageError(f"--journal: cannot write {self._path}: {reason.strerror}: make room, and start the same "
                             "command again: it goes on") from None


def command(options: argparse.Namespace) -> int:
    """Returns the exit code: 0 agreed, 1 something new, 3 where shards are left undone. Raises LaunchFailed where no
    worker can be started."""
    check_results(options)
    work, merged, screen = plan(options), Merged(), Screen()
    begun = time.monotonic()
    interrupted: BaseException | None = None
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(options.journal, work, merged))
        todo = [one for one in work if one not in merged.done]
        if merged.done:
            say(f"{len(merged.done)} of {len(work)} shards are done by {options.journal}")
        if todo:
            fleet = stack.enter_context(Fleet(options.scheduler, options.hosts))
            say(f"{len(todo)} shards, on {fleet.workers} workers")
            try:
                with closing(fleet.run(todo)) as coming:
                    for came in _told(coming, len(todo), merged):
                        if came.answer is None:
                            merged.fail(came.shard, came.reason)
                            say(harmless(f"{shlex.join(came.shard)}: {came.reason}"))
                            continue
                        for find in journal.done(came.shard, came.answer):
                            screen.show(_find(find, came.shard, screen.width))
            except (KeyboardInterrupt, TwinwalkError) as reason:
                interrupted = reason  # what was checked is reported all the same
    left = len(work) - len(merged.done)
    screen.show(table(merged, len(work), time.monotonic() - begun, screen.width))
    if options.json:
        output.write(options.json, text(merged, work))
    if interrupted is not None:
        raise interrupted
    if merged.failed and not merged.done:
        raise LaunchFailed(f"no shard could be done: {next(iter(merged.failed.values()))}")
    return 1 if any(one.check != LOST for one in merged.finds) else 3 if merged.finds or left else 0


def _told(coming: Iterator[Came], todo: int, merged: Merged) -> Iterator[Came]:
    """The same, and now and then how far it is."""
    begun = spoken = time.monotonic()
    for number, one in enumerate(coming, 1):
        yield one
        now = time.monotonic()
        if now - spoken > _PAUSE:
            spoken = now
            left = (now - begun) / number * (todo - number)
            say(f"{number} of {todo} shards, {len(merged.finds)} findings, about {left / 60:.0f} minutes left")


def _find(find: Find, shard: Shard, width: int) -> list[Line]:
    return [*wrap(f"{find.what} ({find.signature})", width, style=BAD),
            *wrap(f"first in {find.scenario}, by {places.command()} {shlex.join(shard)}", width, "    ")]


def table(merged: Merged, work: int, seconds: float, width: int) -> list[Line]:
    """What was done, by which machines, and what is new."""
    lines = [line(""), line("Campaign", HEAD)]
    for machine, times in merged.machines.most_common():
        lines += wrap(f"{machine} ({times} shards)", width, "  machine ")
    rows = [("shards", len(merged.done), f"of {work:,}"), ("seconds", round(seconds), "")]
    rows += [(name.replace("_", " "), merged.totals[name], "") for name in shards.SUMS if merged.totals[name]]
    rows += [("cells", len(merged.cells), "of the coverage table")]
    lines += [line(f"  {name:22}{figure:>16,} {more}") for name, figure, more in rows]
    for find, shard in sorted(merged.finds.values(), key=lambda one: -one[0].times):
        lines += [line(""), line(f"{find.times:,} times:", BAD), *_find(find, shard, width)]
    for shard, reason in merged.failed.items():
        lines += [line(""), *wrap(f"not done: {places.command()} {shlex.join(shard)}", width, style=BAD),
                  *wrap(reason, width, "    ")]
    if not merged.finds and not merged.failed:
        lines.append(line("  nothing new found", GOOD))
    return lines


def text(merged: Merged, work: Sequence[Shard]) -> str:
    """The --json object: machines, totals, findings (each with the shard that showed it first), failed, left, cells."""
    return json.dumps({
        "machines": dict(merged.machines),
        "totals": {"shards": len(merged.done)} | {name: merged.totals[name] for name in shards.SUMS},
        "findings": [find.signature._asdict() | {"count": find.times, "scenario": find.scenario, "what": find.what,
                                                 "shard": list(shard)} for find, shard in merged.finds.values()],
        "failed": [{"shard": list(shard), "reason": reason} for shard, reason in merged.failed.items()],
        "left": [list(one) for one in work if one not in merged.done],
        "cells": [list(cell) for cell in sorted(merged.cells)],
    }, indent=1) + "\n"
