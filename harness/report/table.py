"""What a run came to: the machine, the figures, what is new, the errata that were met, the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from harness.lockstep.signature import LOST
from harness.report.styled import BAD, DIM, GOOD, HEAD, KNOWN, PLAIN, Line, Span, harmless, line, wrap
from harness.report.summary import Known, Summary, describe_machine, is_new
from harness.report.terminal import Screen, Volume

KINDS: Final = 12
"""Sorts of findings that are told."""
ERRATA: Final = 10
"""Errata that are told, unless all are."""
_REASONS: Final = 40
"""Reasons for skipping that are told."""


def show(summary: Summary, screen: Screen, found: Sequence[Line] = ()) -> None:
    """Print it, as loud as the screen is. `found` is what is new, where somebody else has more to say of it."""
    screen.show(table(summary, screen.width, found, screen.volume))


def table(summary: Summary, width: int, found: Sequence[Line] = (), volume: Volume = Volume.NORMAL) -> list[Line]:
    """The machine, the totals, the errata that were met, the machines that were lost, the verdict; quiet, that alone.
    For `found` see `show`."""
    said, bad = verdict(summary)
    if volume == Volume.QUIET:
        return [line(said, BAD if bad else GOOD)]
    whole = volume == Volume.VERBOSE
    lines = wrap(describe_machine(summary.machine), width, "machine  ")
    lines += [line(""), *_totals(summary)]
    lines += _sweeps(summary)
    lines += _stale(summary) if whole else []
    lines += _skipped(summary, width)
    lines += found or _kinds(summary, width)
    if summary.known:
        lines += [line(""), line(_known_heading(summary), HEAD)]
        lines += [text for known in summary.known for text in _known(known, width)] if whole else (
            _known_briefly(summary.known, width))
    lines += _outdated(summary, width)
    if summary.lost:
        lines += [line(""), line("Lost machines", HEAD)]
        for result in summary.lost:
            lines.append(line(f"  {result.scenario}", BAD))
            lines += [line(f"    {text}") for text in harmless(str(result.lost)).splitlines()]
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
        *([("old translations seen", f"{totals.stale_seen:,}", f"of {totals.stale_permitted:,} permitted", PLAIN)]
          if totals.stale_permitted else []),
        *([("shadow audits", f"{totals.shadow_audits:,}", f"of {totals.shadow_leaves_checked:,} leaves", PLAIN)]
          if totals.shadow_audits else []),
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
    for reason, count in reasons.most_common(_REASONS):
        lines += wrap(f"{count:>8,}  {reason}", width, rest=" " * 10)
    if (more := sum(reasons.values()) - sum(count for _, count in reasons.most_common(_REASONS))):
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


def _known_briefly(known: Sequence[Known], width: int) -> list[Line]:
    """A line for each of those that were met most often, and one for the rest."""
    first, rest = known[:ERRATA], known[ERRATA:]
    lines = [text for one in first for text in wrap(
        f"{one.erratum.id}: {one.erratum.title}", width, f"  {one.count:>6,}  ", " " * 12)]
    if rest:
        lines.append(line(f"  {sum(one.count for one in rest):>6,}  of {len(rest)} others"))
    return [*lines, line("          each with its reason: --verbose, --html", DIM)]


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
