"""`twinwalk coverage`: which cells were reached, which were not, and which cannot be.

The `--json` object:

    machines   the machines that were run on, each in a line of text
    reachable  how many cells those machines can reach
    reached    how many of them were
    cells      each: rule, dimension, level, mode, outcome, state (reached, not reached, not reachable) and, of
               one that is not reachable, reason; where a rule cannot decide at all its outcome is null
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from harness.errors import UsageError
from harness.lockstep.errata import Erratum, Version
from harness.model.coverage import Cell
from harness.model.registers import Cpu
from harness.model.rules import RULES
from harness.model.universe import Gap, gaps, universe
from harness.report.styled import BAD, DIM, GOOD, HEAD, KNOWN, Line, Span, line, wrap
from harness.report.summary import describe_machine, identity_of

SHOWN: Final = 80
"""Groups of cells that were not reached, as they are named on the terminal; `--json` has them all."""


@dataclass(frozen=True)
class Covered:
    """What one run reached: `machine` is its identity in a line, `cpu` what it can do, `layers` what errata are of."""

    machine: str
    cpu: Cpu
    cells: frozenset[Cell]
    layers: tuple[tuple[str, Version], ...] = ()

    @classmethod
    def of(cls, identity: object | None, cells: Iterable[Cell]) -> Self:
        """From a machine's identity, a dataclass. Raises UsageError if the machine never came up."""
        return cls.made(identity_of(identity), cells)

    @classmethod
    def made(cls, machine: Mapping[str, Any] | None, cells: Iterable[Cell]) -> Self:
        """From a machine's identity by name. Raises as `of`."""
        if machine is None:
            raise UsageError("the machine never came up: nothing was reached")
        features = frozenset(machine["features"])
        cpu = Cpu(int(machine["maxphyaddr"]), "page1g" in features, int(machine["asids"]), features)
        layers = tuple((str(name), tuple(map(int, version))) for name, version in machine["layers"])
        return cls(describe_machine(machine), cpu, frozenset(cells), layers)


@dataclass(frozen=True)
class Coverage:
    """Several runs taken together. `lacking` are cells that none of the machines can reach, each with the
    reason; `gaps` are places where a rule cannot decide on any of them."""

    machines: tuple[str, ...]
    reachable: frozenset[Cell]
    reached: frozenset[Cell]
    lacking: Mapping[Cell, str]
    gaps: tuple[Gap, ...]

    @property
    def missing(self) -> frozenset[Cell]:
        """Reachable, and not reached."""
        return self.reachable - self.reached


def read(path: Path) -> Covered:
    """What a file of `twinwalk run --json` says was reached. Raises UsageError, saying what to do, for any other."""
    again = "make it with this version's `twinwalk run --json`"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as reason:
        raise UsageError(f"{path}: cannot be read: {reason}") from None
    except json.JSONDecodeError as reason:
        raise UsageError(f"{path}:{reason.lineno}: not JSON, or not all of it: {reason.msg}: {again}") from None
    try:
        cells = [Cell(*map(str, cell)) for cell in data["cells"]]
        return Covered.made(data["machine"], cells)
    except UsageError as reason:
        raise UsageError(f"{path}: {reason}") from None
    except (KeyError, TypeError, ValueError) as reason:
        raise UsageError(f"{path}: not the results of a run, or of another version ({reason!r}): {again}") from None


def merge(runs: Iterable[Covered], errata: Iterable[Erratum] = ()) -> Coverage:
    """Runs on any machines, taken together: a cell is reachable if one of them can reach it, its errata considered."""
    runs = list(runs)
    reachable: frozenset[Cell] = frozenset()
    lacking: dict[Cell, str] = {}
    cells: frozenset[Cell] = frozenset()
    for run in runs:
        found = universe(run.cpu)
        known = [e for e in errata if e.unreachable and any(e.holds_for(*layer) for layer in run.layers)]
        barred = {cell: f"{e.id}: {e.title}" for e in known for cell in found.reachable if e.bars(cell)}
        reachable |= found.reachable - barred.keys()
        lacking |= barred | {cell: f"the processor lacks {feature}" for cell, feature in found.lacking.items()}
        cells |= run.cells
    common = set.intersection(*(set(gaps(run.cpu)) for run in runs))
    return Coverage(
        machines=tuple(dict.fromkeys(run.machine for run in runs)),
        reachable=reachable,
        reached=reachable & cells,
        lacking={cell: reason for cell, reason in lacking.items() if cell not in reachable},
        gaps=tuple(sorted(common)),
    )


def text(coverage: Coverage) -> str:
    """The `--json` object as text, one cell a line."""
    cells = ",\n".join(f"  {json.dumps(cell)}" for cell in _cells(coverage))
    return (f'{{\n "machines": {json.dumps(coverage.machines)},\n "reachable": {len(coverage.reachable)},\n'
            f' "reached": {len(coverage.reached)},\n "cells": [\n{cells}\n ]\n}}\n')


def _cells(coverage: Coverage) -> Iterator[dict[str, str | None]]:
    for cell in sorted(coverage.reachable):
        yield cell._asdict() | {"state": "reached" if cell in coverage.reached else "not reached"}
    for cell, reason in sorted(coverage.lacking.items()):
        yield cell._asdict() | {"state": "not reachable", "reason": reason}
    for gap in coverage.gaps:
        yield gap._asdict() | {"outcome": None, "state": "not reachable"}


def table(coverage: Coverage, width: int) -> list[Line]:
    """How much of each rule was reached; then what was not; then what cannot be, and why."""
    lines: list[Line] = []
    for machine in coverage.machines:
        lines += wrap(machine, width, "machine  ")
    lines += [line(""), *_rules(coverage), line(""), *_missing(coverage, width), *_unreachable(coverage, width)]
    total, reached = len(coverage.reachable), len(coverage.reached)
    style = GOOD if reached == total else BAD
    return [*lines, line(f"{reached:,} of {total:,} reachable cells reached ({_percent(reached, total)})", style)]


def _percent(part: int, whole: int) -> str:
    """Rounded down: 100 % is all of them."""
    return f"{1000 * part // whole / 10 if whole else 100:.1f} %"


def _rules(coverage: Coverage) -> Iterator[Line]:
    reachable = Counter((cell.rule, cell.dimension) for cell in coverage.reachable)
    reached = Counter((cell.rule, cell.dimension) for cell in coverage.reached)
    yield line(f"{'rule':24}{'dimension':14}{'reachable':>10}{'reached':>10}", HEAD)
    for rule in RULES:
        for key in sorted(key for key in reachable if key[0] == rule):
            some, whole = reached[key], reachable[key]
            style = GOOD if some == whole else BAD if not some else KNOWN
            yield (Span(f"{rule:24}{key[1]:14}{whole:>10,}"), Span(f"{some:>10,}", style),
                   Span(f"{_percent(some, whole):>10}", DIM))


def _missing(coverage: Coverage, width: int) -> list[Line]:
    """Cells that were not reached, those of a kind together."""
    groups = _grouped(coverage.missing)
    if not groups:
        return []
    lines = [line("Not reached", HEAD)]
    before = ""
    for (rule, dimension, outcomes, levels), modes in groups[:SHOWN]:
        head = f"{rule}  {dimension}".rstrip()
        if head != before:
            lines.append(line(f"  {head}", KNOWN))
            before = head
        at = f"at {', '.join(levels)}: " if any(levels) else ""
        where = f" in {', '.join(modes)}" if any(modes) else ""
        lines += wrap(f"{at}{', '.join(outcomes)}{where}", width, "    ", " " * 8)
    if len(groups) > SHOWN:
        rest = sum(len(key[2]) * len(key[3]) * len(modes) for key, modes in groups[SHOWN:])
        lines.append(line(f"  and {rest:,} cells more, in {len(groups) - SHOWN} groups: --json has them all", DIM))
    return [*lines, line("")]


Group = tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], list[str]]
"""Rule, dimension, outcomes and levels; and the modes in which all those are missing."""


def _grouped(cells: Iterable[Cell]) -> list[Group]:
    outcomes = defaultdict(set)
    for rule, dimension, level, mode, outcome in cells:
        outcomes[rule, dimension, level, mode].add(outcome)
    levels = defaultdict(set)
    for (rule, dimension, level, mode), found in outcomes.items():
        levels[rule, dimension, mode, tuple(sorted(found))].add(level)
    modes = defaultdict(list)
    for (rule, dimension, mode, found_outcomes), found in levels.items():
        modes[rule, dimension, found_outcomes, tuple(sorted(found))].append(mode)
    order = list(RULES)
    return sorted(((key, sorted(found)) for key, found in modes.items()), key=lambda g: (order.index(g[0][0]), g))


def _unreachable(coverage: Coverage, width: int) -> list[Line]:
    """What cannot be reached: by the reason, with the rules and levels that it is about."""
    lines = []
    lacking = Counter(coverage.lacking.values())
    reasons: dict[tuple[str, str], set[str]] = defaultdict(set)
    for gap in coverage.gaps:
        reasons[gap.rule, gap.reason].add(gap.level)
    if lacking or reasons:
        lines.append(line("Not reachable", HEAD))
    for reason, count in sorted(lacking.items()):
        lines += wrap(f"{count:,} cells: {reason}", width, "  ", " " * 8)
    for (rule, reason), levels in sorted(reasons.items()):
        at = f" at {', '.join(sorted(levels))}" if any(levels) else ""
        lines += wrap(f"{rule}{at}: {reason}", width, "  ", " " * 8, style=DIM)
    return [*lines, line("")] if lines else []
