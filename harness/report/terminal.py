"""What a run looks like while it goes on: a line for each family of scenarios, and what is found as it is found.

On a terminal there is a progress bar, and colour unless NO_COLOR is set; elsewhere plain lines, the same
in content, fit for a log. What is said at the end is harness.report.table's.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from harness.lockstep.result import Result
from harness.lockstep.signature import Signature
from harness.report.findings import findings
from harness.report.headline import headline
from harness.report.styled import BAD, DIM, GOOD, KNOWN, Line, Span, clamp, harmless, line, plain, wrap
from harness.report.summary import is_new
from harness.report.walks import draw
from harness.scenario.ops import Scenario

DRAWN: Final = 5
"""Findings that are drawn in full while a run goes on, one of a sort."""
NAMED: Final = 40
"""Further scenarios with new divergences that are named."""
_REFRESH: Final = 8  # a second; the checker has better things to do
_PAUSE: Final = 20.0  # seconds between plain lines, while nothing is found
_SWEEPS: Final = "sweeps"


class Volume(IntEnum):
    """How much is said."""

    QUIET = 0
    """What is new, a line each, and the verdict."""
    NORMAL = 1
    VERBOSE = 2
    """All there is: whole walks, and every erratum with its reason."""


class Screen:
    """Where reports go: `stream`, by default stdout, with what it can do, and how much is said there. Prints nothing
    by itself."""

    def __init__(self, stream: TextIO | None = None, volume: Volume = Volume.NORMAL) -> None:
        self.volume = volume
        self.stream = stream if stream is not None else sys.stdout
        self.terminal = self.stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        size = shutil.get_terminal_size((100, 24))
        self.width = clamp(size.columns)
        self.height = size.lines - 2 if self.terminal and volume < Volume.VERBOSE else None
        """Lines that a finding should fit in, above a progress bar; None where there is no such limit."""
        self.console = Console(
            file=self.stream, force_terminal=self.terminal, force_jupyter=False, legacy_windows=False, highlight=False,
            color_system="standard" if self.colour else None, width=size.columns,
        )

    def show(self, lines: Iterable[Line]) -> None:
        """Print lines, with their styles where they can be shown."""
        lines = list(lines)
        if not lines:
            return
        if self.terminal:  # by the console also without colour: it keeps a progress bar below
            text = Text("\n").join(Text.assemble(*((self._printable(s.text), s.style) for s in one)) for one in lines)
            self.console.print(text, soft_wrap=True)
            return
        try:
            print(self._printable(plain(lines)), file=self.stream, flush=True)
        except BrokenPipeError:  # the reader, `head` say, has seen enough; the run and its files go on
            self._nobody_listens()

    def _printable(self, text: str) -> str:
        """`text` with what the stream's encoding lacks as escapes: no character may end a run."""
        encoding = self.stream.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _nobody_listens(self) -> None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


class Watch:
    """Shows a run as it goes: a context manager, whose `result` sees each result."""

    def __init__(
        self, scenarios: Iterable[Scenario], strict: bool = False, screen: Screen | None = None, cases: int = 0
    ) -> None:
        """`cases` of sweeps follow on `scenarios`; with neither there are programs, nobody knows how many."""
        self.screen = screen if screen is not None else Screen()
        self._scenarios = {scenario.name: scenario for scenario in scenarios}
        self._cases = cases
        self._total = len(self._scenarios) + cases
        self._strict = strict
        self._done = self._new = self._known = self._named = 0
        self._drawn: set[Signature] = set()
        self._begun = self._spoken = time.monotonic()
        self._first: float | None = None
        """When the first result came: what was before is a boot, and says nothing of the rate."""
        self._families = Families(self._scenarios, cases)
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if self.screen.volume == Volume.QUIET:
            return self
        if self.screen.terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("scenarios"),
                TextColumn("{task.fields[found]}"), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
                *([TextColumn("left"), TimeRemainingColumn()] if self._total else []), console=self.screen.console,
                transient=True, refresh_per_second=_REFRESH, redirect_stdout=False, redirect_stderr=False,
            )
            self._task = self._progress.add_task("checking", total=self._total or None, found="", rate="")
        else:
            cases = f" and {self._cases:,} cases of sweeps" if self._cases else ""
            count = len(self._scenarios)
            what = f"{count:,} scenario{'' if count == 1 else 's'}{cases}" if self._total else "generated programs"
            self.screen.show([line(f"checking {what}")])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self.screen.volume > Volume.QUIET:
            self.screen.show([*self._families.unfinished(), line("")])

    def result(self, result: Result, case: Scenario | None = None) -> None:
        """Take note of a result, perhaps that of a `case` of a sweep; what is new in it is shown."""
        is_case = result.scenario not in self._scenarios
        if case is not None:
            self._scenarios[case.name] = case
        new = sum(is_new(d, self._strict) for d in result.divergences)
        self._first = self._first or time.monotonic()
        self._done += 1
        self._new += new
        self._known += len(result.divergences) - new
        if new:
            self.screen.show(self._finding(result))
        if result.lost is not None:
            reason = harmless(f"{result.scenario}: the machine was lost: {result.lost.reason}")
            self.screen.show(wrap(reason, self.screen.width, style=BAD))
        finished = self._families.take(result, new, is_case)
        if self.screen.volume == Volume.QUIET:
            return
        if finished:
            self.screen.show([finished])
            self._spoken = time.monotonic()
        if self._progress is not None:
            self._progress.start()  # not before there is a result: it begins a thread, and a run may still fork
            self._progress.update(self._task, completed=self._done, found=self._found(), rate=self._rate())
        elif time.monotonic() - self._spoken > _PAUSE:
            self._spoken = time.monotonic()
            self.screen.show([line(self._progress_line())])

    def _finding(self, result: Result) -> list[Line]:
        """The first new finding: in full where it is of a sort not seen before, else in a line, and after
        enough of them not at all."""
        scenario, screen = self._scenarios.get(result.scenario), self.screen
        new = [finding for finding in findings(result.divergences) if finding.is_new(self._strict)]
        if screen.volume > Volume.QUIET and len(self._drawn) < DRAWN and new[0].signature not in self._drawn:
            self._drawn.add(new[0].signature)
            more = [line(f"  and {len(new) - 1} more in this scenario", DIM)] if len(new) > 1 else []
            return [*draw(new[0], scenario, screen.width, screen.height), *more, line("")]
        self._named += 1
        if self._named <= NAMED:
            return wrap(f"{result.scenario}: {headline(new[0], scenario)}", screen.width, rest="    ", style=BAD)
        if self._named == NAMED + 1:
            return [line("More scenarios differ. They are counted; -k shows one of them, --json has all.", DIM)]
        return []

    def _found(self) -> str:
        return f"{self._new:,} new, {self._known:,} known"

    def _speed(self) -> float:
        """Results a second."""
        assert self._first is not None
        return (self._done - 1) / max(0.001, time.monotonic() - self._first)

    def _rate(self) -> str:
        return f"{self._speed():,.0f}/s"

    def _progress_line(self) -> str:
        done = f"{self._done:,} of {self._total:,} scenarios" if self._total else f"{self._done:,} programs"
        left = self._total - self._done
        due = left / self._speed() if left > 0 and self._speed() else 0
        rest = f", {due / 60:,.0f} min left" if due >= 90 else f", {due:.0f} s left" if due else ""
        seconds = time.monotonic() - self._begun
        return f"{done}, divergences: {self._found()}, {self._rate()}, {seconds:,.0f} s{rest}"


@dataclass
class _Family:
    """`wanted` of its scenarios are to be run."""

    wanted: int
    done: int = 0
    vmruns: int = 0
    new: int = 0
    known: int = 0
    skipped: int = 0
    lost: int = 0


class Families:
    """How far each family came, which is a folder of the library, or the cases of all sweeps: a line for each."""

    def __init__(self, names: Iterable[str], cases: int) -> None:
        names = list(names)
        files = {name.partition("[")[0] for name in names if not _folder(name)}
        self._alone = files.pop() if len(files) == 1 else "others"
        wanted = Counter(map(self._family, names)) + Counter({_SWEEPS: cases})
        self._families = {name: _Family(count) for name, count in wanted.items()}
        self._width = max(map(len, wanted), default=0)
        self._since = time.monotonic()

    def take(self, result: Result, new: int, is_case: bool) -> Line:
        """Count a result with so many new divergences; the family's line, if that was its last one, else nothing."""
        name = _SWEEPS if is_case else self._family(result.scenario)
        one = self._families.get(name)
        if one is None:
            return ()  # of a generated program, of which nobody knows how many there are
        one.done += 1
        one.vmruns += result.vmruns
        one.new += new
        one.known += len(result.divergences) - new
        one.skipped += bool(result.skipped)
        one.lost += result.lost is not None
        return self._line(name, one) if one.done == one.wanted else ()

    def _family(self, scenario: str) -> str:
        """Its folder; files that are in none are one family."""
        return _folder(scenario) or self._alone

    def unfinished(self) -> list[Line]:
        """Those that were begun, and not ended."""
        return [self._line(name, one) for name, one in self._families.items() if 0 < one.done < one.wanted]

    def _line(self, name: str, one: _Family) -> Line:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        what = ("case" if name == _SWEEPS else "scenario") + ("" if one.done == 1 else "s")
        done = f"{one.done:,} of {one.wanted:,}" if one.done < one.wanted else f"{one.done:,}"
        head = f"  {name:{self._width}} {done:>6} {what:9} {one.vmruns:>8,} VMRUNs {seconds:>6.1f} s  "
        said = [Span(f"{count:,} {word}", style) for count, word, style in (
            (one.lost, "times lost", BAD), (one.new, "new", BAD), (one.known, "known", KNOWN),
            (one.skipped, "skipped", DIM)) if count]
        parts = [part for span in said for part in (Span(", "), span)][1:] or [Span("agreed", GOOD)]
        return Span(head), *parts


def _folder(scenario: str) -> str:
    """`walk` of `walk/table-read-only[pml4,pml4e]`."""
    return scenario.partition("[")[0].rpartition("/")[0]
