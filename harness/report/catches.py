"""What a fuzzing run found: one catch for each signature, with a count, and the report of it all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.lockstep.signature import LOST, Signature
from harness.report import html, jsonfile
from harness.report.styled import BAD, DIM, GOOD, HEAD, Line, harmless, line, wrap
from harness.report.summary import Summary
from harness.scenario import writer
from harness.scenario.ops import Scenario


@dataclass
class Catch:
    """Programs that show the same: how many, `what` is wrong in a sentence, and the first of them."""

    signature: Signature
    what: str
    scenario: Scenario
    count: int = 1


@dataclass(frozen=True)
class Hunt:
    """What a run came to, beside what every run has. `before` programs were checked by earlier runs of the campaign.
    `left_off` are programs whose rest was not checked, since the machine went, by a known erratum, where no model can
    follow. `cells` of the `reachable` ones of the coverage table were reached."""

    seed: int
    programs: int
    before: int
    left_off: int
    skipped: int
    cells: int
    reachable: int
    catches: tuple[Catch, ...]

    @property
    def findings(self) -> int:
        """How many signatures were caught."""
        return len(self.catches)


def table(hunt: Hunt, width: int) -> list[Line]:
    """The part of the report that is about generated programs."""
    earlier = f", {hunt.before:,} before this run" if hunt.before else ""
    lines = [line(""), line("Generated programs", HEAD)]
    reached = f"{hunt.cells:,} of {hunt.reachable:,} cells of the coverage table reached"
    lines += wrap(f"  {hunt.programs:,} of seed {hunt.seed}{earlier}; {reached}", width, rest="    ")
    if hunt.left_off:
        lines += wrap(f"  {hunt.left_off:,} not followed to their end, behind a known erratum", width, rest="    ",
                      style=DIM)
    if not hunt.catches:
        return [*lines, line("  nothing new found", GOOD)]
    for number, one in enumerate(_sorted(hunt.catches), 1):
        lines.append(line(""))
        lines += wrap(harmless(f"{number}. {one.what}"), width, rest="   ", style=BAD)
        lines += wrap(harmless(f"   {one.signature}"), width, rest="   ")
        times = "once" if one.count == 1 else f"in {one.count:,} programs"
        where = f"{one.scenario.name}, of {len(one.scenario.ops)} ops"
        lines += wrap(f"   seen {times}, first in {where}", width, rest="   ")
    return lines


def page_table(hunt: Hunt) -> html.Table:
    """What was generated, and each sort of finding with its first program: for the page."""
    figures = [("seed", f"{hunt.seed}"), ("programs", f"{hunt.programs:,}"), ("of earlier runs", f"{hunt.before:,}"),
               ("not followed to their end", f"{hunt.left_off:,}"),
               ("cells of the coverage table", f"{hunt.cells:,} of {hunt.reachable:,}")]
    found = [(one.what, f"{one.count:,} times, first in {one.scenario.name}") for one in _sorted(hunt.catches)]
    return html.Table("Generated programs", (), (*figures, *found))


def _sorted(catches: Sequence[Catch]) -> list[Catch]:
    """Divergences first, then losses; the most frequent first."""
    return sorted(catches, key=lambda one: (one.signature.check == LOST, -one.count))


def text(hunt: Hunt, summary: Summary) -> str:
    """The --json object: that of `run`, and `fuzz` with what is said here."""
    whole = jsonfile.document(summary) | {"fuzz": document(hunt)}
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items()) + "\n}\n"


def document(hunt: Hunt) -> dict[str, Any]:
    """What was generated and found, in plain values."""
    return {
        "seed": hunt.seed, "programs": hunt.programs, "before": hunt.before, "left_off": hunt.left_off,
        "skipped": hunt.skipped, "cells": hunt.cells, "cells_reachable": hunt.reachable,
        "findings": list(_findings(hunt.catches)),
    }


def _findings(catches: Sequence[Catch]) -> Iterator[dict[str, Any]]:
    for one in _sorted(catches):
        check, field, rule = one.signature
        yield {"check": check, "field": field, "rule": rule, "count": one.count, "what": one.what,
               "scenario": one.scenario.name, "ops": len(one.scenario.ops), "text": writer.text(one.scenario)}
