"""What a run looks like: progress while it goes on, and a table at its end.

On a terminal there is a progress bar, and colour unless NO_COLOR is set; elsewhere plain lines, the same
in content, fit for a log.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from harness.lockstep.driver import Result
from harness.lockstep.signature import LOST, Signature
from harness.report.findings import findings, headline
from harness.report.styled import BAD, DIM, GOOD, HEAD, KNOWN, PLAIN, Line, Span, clamp, harmless, line, plain, wrap
from harness.report.summary import Known, Summary, describe_machine, is_new
from harness.report.walks import draw
from harness.scenario.ops import Scenario

DRAWN: Final = 5
"""Findings that are drawn in full while a run goes on, one of a sort."""
NAMED: Final = 40
"""Further scenarios with new divergences that are named."""
KINDS: Final = 12
"""Sorts of findings in the table at the end."""
_REFRESH: Final = 8  # a second; the checker has better things to do
_QUIET: Final = 10.0  # seconds between plain lines, while nothing is found


class Screen:
    """Where reports go: `stream`, by default stdout, with what it can do. Prints nothing by itself."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self.terminal = self.stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self.width = clamp(shutil.get_terminal_size((100, 24)).columns)
        self.console = Console(
            file=self.stream, force_terminal=self.terminal, force_jupyter=False, legacy_windows=False, highlight=False,
            color_system="standard" if self.colour else None, width=shutil.get_terminal_size((100, 24)).columns,
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
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
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
            what = f"{len(self._scenarios)} scenarios{cases}" if self._total else "generated programs"
            self.screen.show([line(f"checking {what}")])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def result(self, result: Result, case: Scenario | None = None) -> None:
        """Take note of a result, perhaps that of a `case` of a sweep; what is new in it is shown."""
        if case is not None:
            self._scenarios[case.name] = case
        new = sum(is_new(d, self._strict) for d in result.divergences)
        self._done += 1
        self._new += new
        self._known += len(result.divergences) - new
        if new:
            self.screen.show(self._finding(result))
        if result.lost is not None:
            reason = harmless(f"{result.scenario}: the machine was lost: {result.lost.reason}")
            self.screen.show(wrap(reason, self.screen.width, style=BAD))
        if self._progress is not None:
            self._progress.start()  # not before there is a result: it begins a thread, and a run may still fork
            self._progress.update(self._task, completed=self._done, found=self._found(), rate=self._rate())
        else:
            self._line()

    def _finding(self, result: Result) -> list[Line]:
        """The first new finding: in full where it is of a sort not seen before, else in a line, and after
        enough of them not at all."""
        scenario = self._scenarios.get(result.scenario)
        new = [finding for finding in findings(result.divergences) if finding.is_new(self._strict)]
        if len(self._drawn) < DRAWN and new[0].signature not in self._drawn:
            self._drawn.add(new[0].signature)
            more = [line(f"  and {len(new) - 1} more in this scenario", DIM)] if len(new) > 1 else []
            return [*draw(new[0], scenario, self.screen.width), *more, line("")]
        self._named += 1
        if self._named <= NAMED:
            return wrap(f"{result.scenario}: {headline(new[0], scenario)}", self.screen.width, rest="    ", style=BAD)
        if self._named == NAMED + 1:
            return [line("More scenarios differ. They are counted; -k shows one of them, --json has all.", DIM)]
        return []

    def _found(self) -> str:
        return f"{self._new} new, {self._known} known"

    def _rate(self) -> str:
        return f"{self._done / max(0.001, time.monotonic() - self._begun):,.0f}/s"

    def _line(self) -> None:
        now, total = time.monotonic(), self._total
        tenth = total >= 100 and self._done * 10 // total > (self._done - 1) * 10 // total
        if tenth or now - self._spoken > _QUIET:
            self._spoken = now
            done = f"{self._done} of {total} scenarios" if total else f"{self._done:,} programs"
            self.screen.show([line(f"{done}, divergences: {self._found()}, {now - self._begun:.1f} s")])


def show(summary: Summary, screen: Screen | None = None) -> None:
    """Print the table at the end of a run."""
    screen = screen if screen is not None else Screen()
    screen.show(table(summary, screen.width))


def table(summary: Summary, width: int, found: Sequence[Line] = ()) -> list[Line]:
    """The machine, the totals, the errata that were met, the machines that were lost, the verdict. `found` is what is
    new, where somebody else has more to say of it."""
    lines = wrap(describe_machine(summary.machine), width, "machine  ")
    lines += [line(""), *_totals(summary)]
    lines += _sweeps(summary)
    lines += _stale(summary)
    lines += _skipped(summary, width)
    lines += found or _kinds(summary, width)
    if summary.known:
        lines += [line(""), line(_known_heading(summary), HEAD)]
        for known in summary.known:
            lines += _known(known, width)
    lines += _outdated(summary, width)
    if summary.lost:
        lines += [line(""), line("Lost machines", HEAD)]
        for result in summary.lost:
            lines.append(line(f"  {result.scenario}", BAD))
            lines += [line(f"    {text}") for text in harmless(str(result.lost)).splitlines()]
    said, bad = verdict(summary)
    return [*lines, line(""), line(said, BAD if bad else GOOD)]


def totals(summary: Summary) -> list[tuple[str, str, str, str]]:
    """The figures of a run: name, figure, what else there is to say of it, and its style."""
    totals = summary.totals
    wanted = totals.scenarios + len(summary.not_run)
    cases_skipped = sum(tally.skipped for tally in summary.sweeps)
    return [
        *([("scenarios", f"{totals.scenarios:,}", f"of {wanted:,}" if summary.not_run else "", PLAIN)]
          if _are_sweeps(summary) or not summary.sweeps else [("programs", f"{totals.sweep_cases:,}", "", PLAIN)]),
        *([("cases of sweeps", f"{totals.sweep_cases:,}", "", PLAIN)] if _are_sweeps(summary) else []),
        *([("skipped", f"{len(summary.skipped) + cases_skipped:,}", "which this CPU cannot run", PLAIN)]
          if summary.skipped or cases_skipped else []),
        ("VMRUNs checked", f"{totals.vmruns:,}", "", PLAIN),
        ("probes checked", f"{totals.probes:,}", "", PLAIN),
        ("table bytes compared", f"{totals.table_bytes_compared:,}", "", PLAIN),
        *([("MMU contexts checked", f"{totals.contexts_checked:,}", f"in {totals.trace_events:,} trace events", PLAIN)]
          if totals.contexts_checked else []),
        ("divergences: new", f"{totals.divergences_new:,}", "", BAD if totals.divergences_new else GOOD),
        ("divergences: known", f"{totals.divergences_known:,}", "", KNOWN if totals.divergences_known else PLAIN),
        ("seconds", f"{totals.seconds:,.2f}", "", PLAIN),
    ]


def _totals(summary: Summary) -> Iterator[Line]:
    rows = totals(summary)
    column = max(len(figure) for _, figure, _, _ in rows)
    for name, figure, note, style in rows:
        yield Span(f"  {name:22}"), Span(f"{figure:>{column}}", style), Span(f" {note}" if note else "")


def _are_sweeps(summary: Summary) -> bool:
    """Whether cases are those of sweeps; generated programs are of none, and nobody knows how many there are."""
    return any(tally.total for tally in summary.sweeps)


def _sweeps(summary: Summary) -> list[Line]:
    """How much of each sweep was done: cases, and pairs and triples of values, of how many."""
    if not _are_sweeps(summary):
        return []
    rows = [("Sweeps", "cases done", "of", "pairs", "of", "triples", "of")]
    for tally in summary.sweeps:
        numbers = (tally.done, tally.total, tally.pairs, tally.pairs_total, tally.triples, tally.triples_total)
        rows.append((tally.name, *map("{:,}".format, numbers)))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [line("")]
    for number, (name, *figures) in enumerate(rows):
        text = "  ".join(f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True))
        lines.append(line(f"{'' if not number else '  '}{name:{widths[0] + (2 if not number else 0)}}  {text}",
                          PLAIN if number else HEAD))
    if any(tally.before for tally in summary.sweeps):
        before = ", ".join(f"{tally.before:,} of {tally.name}" for tally in summary.sweeps if tally.before)
        lines.append(line(f"  Pairs and triples include those of earlier runs, by the record: {before}", DIM))
    return lines


def _stale(summary: Summary) -> list[Line]:
    """In how many probes the machine could use a translation that was changed since, and in how many it did."""
    if not summary.stale:
        return []
    rows = [("Old translations", "permitted", "seen"), *(
        (name, f"{permitted:,}", f"{seen:,}") for name, (permitted, seen) in summary.stale.items())]
    first, second, third = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [line("")]
    for number, (name, permitted, seen) in enumerate(rows):
        text = f"{'  ' if number else ''}{name:{first + (0 if number else 2)}}  {permitted:>{second}}  {seen:>{third}}"
        lines.append(line(text, PLAIN if number else HEAD))
    return lines


def _skipped(summary: Summary, width: int) -> list[Line]:
    """Why scenarios were skipped, the most frequent reason first; cases of sweeps are only counted."""
    reasons = Counter(reason.partition(": ")[2] or reason for reason in summary.skipped.values())
    if not reasons:
        return []
    lines = [line(""), line("Skipped", HEAD)]
    for reason, count in reasons.most_common(NAMED):
        lines += wrap(f"{count:>8,}  {reason}", width, rest=" " * 10)
    if (more := sum(reasons.values()) - sum(count for _, count in reasons.most_common(NAMED))):
        lines.append(line(f"{more:>8,}  for other reasons: see --json or --junit"))
    return lines


def _kinds(summary: Summary, width: int) -> list[Line]:
    """New findings by signature, the most frequent first, each with a scenario that shows it."""
    kinds = [one for one in summary.found if one.signature.check != LOST]
    if not kinds:
        return []
    lines = [line(""), line("What differs", HEAD)]
    for one in kinds[:KINDS]:
        lines += wrap(f"{one.what}; first in {one.scenario}", width, f"  {one.count:>6,}  ")
    if len(kinds) > KINDS:
        lines.append(line(f"  {sum(one.count for one in kinds[KINDS:]):>6,}  of other sorts", DIM))
    return lines


def _outdated(summary: Summary, width: int) -> list[Line]:
    """Errata that claim this version, and did not show in a scenario that shows them."""
    if not summary.outdated:
        return []
    lines = [line(""), line("Stale errata: said to be of this version, and did not show", HEAD)]
    for erratum in summary.outdated:
        lines += wrap(f"{erratum.id}: not in {', '.join(erratum.shown)}", width, "  ", " " * 10)
    return lines


def _known_heading(summary: Summary) -> str:
    return "Known errata (counted as new: --strict)" if summary.strict else "Known errata"


def _known(known: Known, width: int) -> list[Line]:
    erratum = known.erratum
    where = f"{known.scenarios} scenario{'' if known.scenarios == 1 else 's'}"
    head = (Span(f"  {known.count:>6,}  "), Span(erratum.id, KNOWN), Span(f"  in {where}{_versions(known)}", DIM))
    indent = " " * 10
    lines = [head, *wrap(erratum.title, width, indent)]
    lines += wrap(" ".join(erratum.explanation.split()), width, indent, style=DIM) if erratum.explanation else []
    lines += wrap(" ".join(erratum.severity.split()), width, f"{indent}severity: ", indent) if erratum.severity else []
    lines += wrap(" ".join(erratum.reference.split()), width, f"{indent}see ", style=DIM) if erratum.reference else []
    return lines


def _versions(known: Known) -> str:
    """The machine and the versions that an erratum is of: `; qemu-tcg 7.2 to 10.0`."""
    erratum = known.erratum
    since, until = (".".join(map(str, v)) if v is not None else "" for v in (erratum.since, erratum.until))
    span = f" {since} to {until}" if since and until else f" from {since} on" if since else f" up to {until}"
    return f"; {erratum.machine}{span if since or until else ''}" if erratum.machine else ""


def verdict(summary: Summary) -> tuple[str, bool]:
    """What a run comes to, and whether that is bad."""
    totals = summary.totals
    if totals.divergences_new:
        failed = sum(any(is_new(d, summary.strict) for d in result.divergences) for result in summary.results)
        what = "new divergence" if totals.divergences_new == 1 else "new divergences"
        of = totals.scenarios + totals.sweep_cases
        text, style = f"{totals.divergences_new:,} {what} in {failed:,} of {of:,} scenarios", BAD
        if summary.lost:
            text += ", and the machine was lost"
    elif summary.lost:
        text, style = "no new divergence, but the machine was lost", BAD
    elif summary.not_run or any(tally.done + tally.skipped < tally.asked for tally in summary.sweeps):
        text, style = "no new divergence, but not all scenarios were run", BAD
    elif totals.divergences_known:
        text, style = "agreed, but for known errata", GOOD
    else:
        text, style = "agreed", GOOD
    return text, style == BAD
