"""The `--json` object.

    machine      the machine's identity by name; null if it never came up
    totals       scenarios, sweeps, sweep_cases, vmruns, probes, table_bytes_compared, divergences_new,
                 divergences_known, seconds, contexts_checked, trace_events (both 0 where no KVM is under L1),
                 stale_permitted (probes for which the manual permits a translation that was changed since),
                 stale_seen (those in which the machine used it), shadow_audits (switches at which KVM's tables were
                 audited) and shadow_leaves_checked (both 0 without --audit)
    stale        stale_permitted and stale_seen by family: by sweep, or by scenario file
    sweeps       each: name, total (its cases), before (those of a record), done (in this run), skipped (cannot be run
                 on this CPU), pairs and triples
                 (covered), pairs_total, triples_total, vmruns, probes, table_bytes_compared, divergences_new,
                 divergences_known (by the id of the erratum)
    divergences  each: scenario, op, probe, check, field, expected, observed, rule, erratum (an id or null); of
                 cases of sweeps only where there is a new one; with check C4 also events, what KVM's kernel
                 said around it, the event in question marked `>`;
                 with check C5 the entries of all tables instead, and severity: `isolation` for what lets a guest reach
                 memory that it must not
    findings     what is new, by signature, the most frequent first; each: check (`lost` for lost machines), field,
                 rule, count, scenario (the first one), what (in a sentence), bundle (the path of its bundle, or null)
    outdated     errata, by id, that are said to be of this version and did not show where they should have
    skipped      scenarios that cannot be run on this CPU, by name, with the reason
    lost         each: scenario, reason, argv, log, last_record
    cells        what was checked, for `twinwalk coverage`; each: [rule, dimension, level, mode, outcome]

`op` and `probe` are indices in the scenario, -1 where there is none. `expected` and `observed` are always
strings, integers as 0x..., since 64 bits are more than many readers of JSON keep.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.lockstep.compare import Divergence
from harness.lockstep.result import Result
from harness.lockstep.tally import Tally
from harness.model.shadow import BREAK_ISOLATION, ISOLATION
from harness.report import output
from harness.report.summary import Found, Summary


def write(path: Path, summary: Summary) -> None:
    """After a run: all of the file or nothing. Raises TwinwalkError if that fails after all."""
    output.write(path, text(summary))


def text(summary: Summary) -> str:
    """The object as text, one divergence a line: a diff of two runs is then one of divergences."""
    parts = document(summary)
    body = []
    for name, value in parts.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(item)}" for item in value)
            body.append(f' "{name}": [{chr(10) + lines + chr(10) + " " if lines else ""}]')
        else:
            body.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(body) + "\n}\n"


def document(summary: Summary) -> dict[str, Any]:
    """The object in plain values."""
    return {
        "machine": dict(summary.machine) if summary.machine is not None else None,
        "totals": asdict(summary.totals) | {"seconds": round(summary.totals.seconds, 3)},
        "stale": {name: {"permitted": permitted, "seen": seen} for name, (permitted, seen) in summary.stale.items()},
        "sweeps": [_sweep(tally) for tally in summary.sweeps],
        "divergences": [divergence(d) for result in summary.results for d in result.divergences],
        "findings": [_found(one) for one in summary.found],
        "outdated": [erratum.id for erratum in summary.outdated],
        "skipped": dict(summary.skipped),
        "lost": [_lost(result) for result in summary.lost],
        "cells": [list(cell) for cell in summary.cells],
    }


def _found(one: Found) -> dict[str, Any]:
    return one.signature._asdict() | {
        "count": one.count, "scenario": one.scenario, "what": one.what, "bundle": one.bundle or None}


def _sweep(tally: Tally) -> dict[str, Any]:
    return {
        "name": tally.name,
        "total": tally.total,
        "before": tally.before,
        "done": tally.done,
        "skipped": tally.skipped,
        "pairs": tally.pairs,
        "pairs_total": tally.pairs_total,
        "triples": tally.triples,
        "triples_total": tally.triples_total,
        "vmruns": tally.vmruns,
        "probes": tally.probes,
        "table_bytes_compared": tally.table_bytes,
        "divergences_new": tally.divergences_new,
        "divergences_known": dict(tally.known),
    }


def entry(result: Result) -> dict[str, Any]:
    """One result in plain values, as the journal has it."""
    return {
        "scenario": result.scenario,
        "vmruns": result.vmruns,
        "probes": result.probes,
        "table_bytes_compared": result.table_bytes,
        "contexts_checked": result.contexts,
        "trace_events": result.trace_events,
        "stale_permitted": result.stale_permitted,
        "stale_seen": result.stale_seen,
        "shadow_audits": result.shadow_audits,
        "shadow_leaves_checked": result.shadow_leaves,
        "divergences": [divergence(one) for one in result.divergences],
        "lost": _lost(result) if result.lost is not None else None,
        "skipped": result.skipped or None,
    }


def divergence(one: Divergence) -> dict[str, Any]:
    """One divergence in plain values."""
    return {
        "scenario": one.scenario,
        "op": one.op,
        "probe": one.probe,
        "check": one.check,
        "field": one.field,
        "expected": _text(one.expected),
        "observed": _text(one.observed),
        "rule": one.rule,
        "erratum": one.erratum,
    } | ({"events": list(one.events)} if one.events else {}) | (
        {"severity": ISOLATION} if one.rule in BREAK_ISOLATION else {})


def _text(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value:#x}"


def _lost(result: Result) -> dict[str, Any]:
    lost = result.lost
    assert lost is not None
    return {
        "scenario": result.scenario,
        "reason": lost.reason,
        "argv": lost.argv,
        "log": lost.log,
        "last_record": lost.last_record,
    }
