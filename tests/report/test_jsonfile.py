"""The `--json` object: its names, its values, its place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.lockstep.tally import Tally
from harness.report import jsonfile
from harness.report.output import MIN_FREE
from tests.report.cases import NAME, divergence, result
from tests.report.test_summary import summary


def document(**values: Any) -> Any:
    return json.loads(jsonfile.text(summary(**values)))


def test_names() -> None:
    one = document()
    assert list(one) == ["machine", "totals", "stale", "sweeps", "divergences", "findings", "outdated", "skipped",
                         "lost", "cells"]
    assert list(one["totals"]) == ["scenarios", "sweeps", "sweep_cases", "vmruns", "probes", "table_bytes_compared",
                                   "divergences_new", "divergences_known", "seconds", "contexts_checked",
                                   "trace_events", "stale_permitted", "stale_seen", "shadow_audits",
                                   "shadow_leaves_checked"]
    names = ["scenario", "op", "probe", "check", "field", "expected", "observed", "rule", "erratum"]
    assert [list(d) for d in one["divergences"]] == [names] * 5


def test_totals() -> None:
    assert document()["totals"] == {
        "scenarios": 2, "sweeps": 0, "sweep_cases": 0, "vmruns": 6, "probes": 24, "table_bytes_compared": 8192,
        "divergences_new": 2, "divergences_known": 3, "seconds": 2.5, "contexts_checked": 0, "trace_events": 0,
        "stale_permitted": 0, "stale_seen": 0, "shadow_audits": 0, "shadow_leaves_checked": 0,
    }


def test_stale() -> None:
    """By family: those of a sweep's cases, and those of the scenarios of one file."""
    one, other = result(), result()
    one.scenario, other.scenario = "flush/x[1]", "flush/x[2]"
    one.stale_permitted, other.stale_permitted, other.stale_seen = 3, 2, 1
    tally = Tally("sweeps/litmus-x", total=9, stale_permitted=20, stale_seen=10)
    found = document(results=[one, other], sweeps=[tally])
    assert found["stale"] == {"flush/x": {"permitted": 5, "seen": 1}, "sweeps/litmus-x": {"permitted": 20, "seen": 10}}
    assert (found["totals"]["stale_permitted"], found["totals"]["stale_seen"]) == (25, 11)


def test_contexts() -> None:
    """C4: how many were checked, and with a divergence what KVM did around it."""
    wrong = divergence(check="C4", field="role.direct", expected=0, observed=1, rule="context.nested", probe=-1,
                       events=("  VMRUN", "> run"))
    case = result(wrong)
    case.contexts, case.trace_events = 5, 8
    tally = Tally("sweeps/x", total=9, contexts=100, trace_events=150)
    one = document(results=[case], sweeps=[tally])
    assert (one["totals"]["contexts_checked"], one["totals"]["trace_events"]) == (105, 158)
    assert one["divergences"][0]["events"] == ["  VMRUN", "> run"]


def test_shadows() -> None:
    """C5: how many audits and leaves; what is not isolation but bits has no severity."""
    wrong = divergence(check="C5", field="4K leaf for gPA 0x1000 in the shadow", expected="no writes", observed="RW",
                       rule="shadow.rights", probe=-1, events=("  L1's table", "> the shadow"))
    case = result(wrong, wrong._replace(rule="shadow.ad"), divergence())
    case.shadow_audits, case.shadow_leaves = 2, 900
    tally = Tally("sweeps/x", total=9, shadow_audits=10, shadow_leaves=5000)
    one = document(results=[case], sweeps=[tally])
    assert (one["totals"]["shadow_audits"], one["totals"]["shadow_leaves_checked"]) == (12, 5900)
    assert [d.get("severity") for d in one["divergences"]] == ["isolation", None, None]
    assert one["divergences"][0]["events"] == ["  L1's table", "> the shadow"]


def test_sweeps() -> None:
    """Of a sweep's cases there are counts; only those of which there is more to say are listed."""
    case = result(divergence(), scenario="sweeps/x[a,b]")
    tally = Tally("sweeps/x", total=10**15, done=5, pairs=7, pairs_total=8, triples=9, triples_total=10, vmruns=6,
                  probes=5, table_bytes=4096, known=Counter({"e1": 4}), known_cases=Counter({"e1": 3}))
    one = document(results=[case], sweeps=[tally])
    assert one["sweeps"] == [{
        "name": "sweeps/x", "total": 10**15, "before": 0, "done": 5, "skipped": 0, "pairs": 7,
        "pairs_total": 8, "triples": 9,
        "triples_total": 10, "vmruns": 6, "probes": 5, "table_bytes_compared": 4096, "divergences_new": 0,
        "divergences_known": {"e1": 4},
    }]
    totals = one["totals"]
    assert (totals["scenarios"], totals["sweeps"], totals["sweep_cases"], totals["vmruns"]) == (0, 1, 5, 6)
    assert (totals["divergences_new"], totals["divergences_known"]) == (1, 4)
    assert [d["scenario"] for d in one["divergences"]] == ["sweeps/x[a,b]"]
    met = summary(results=[case], sweeps=[tally]).known
    assert [(known.erratum.id, known.count, known.scenarios) for known in met] == [("e1", 4, 3)]


def test_machine() -> None:
    machine = document()["machine"]
    assert (machine["machine"], machine["qemu_version"], machine["cpu_model"]) == ("tcg", "7.2.22", "max")
    assert machine["features"] == ["nx", "page1g"]
    assert document(identity=None)["machine"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0x0"), ((1 << 64) - 1, "0xffffffffffffffff"), ("unchanged", "unchanged"), ("#PF 0x3 (P|W) at gVA 0x1",) * 2],
)
def test_values_are_strings(value: int | str, text: str) -> None:
    """53 bits are all that many readers keep of a number."""
    one = document(results=[result(divergence(expected=value, observed=value))])["divergences"][0]
    assert one["expected"] == one["observed"] == text


def test_a_divergence() -> None:
    values: dict[str, Any] = {
        "op": 3, "probe": -1, "check": "C3", "field": "l1.cr4", "rule": "exit.host", "erratum": "e1",
    }
    one = divergence(expected=0x20, observed=0xA0, **values)
    assert document(results=[result(one)])["divergences"] == [
        {"scenario": NAME, "expected": "0x20", "observed": "0xa0"} | values
    ]
    assert document()["divergences"][0]["erratum"] is None


def test_lost() -> None:
    lost = MachineLost("gone", ["qemu", "-S"], "last \x1b words\udc80", "#1 ENTER, probe 0")
    assert document(results=[result(lost=lost)])["lost"] == [{
        "scenario": NAME, "reason": "gone", "argv": ["qemu", "-S"], "log": "last \x1b words\udc80",
        "last_record": "#1 ENTER, probe 0",
    }]
    assert document()["lost"] == []


def test_one_divergence_a_line() -> None:
    """So that a diff of two files is one of divergences."""
    lines = jsonfile.text(summary()).splitlines()
    assert sum(line.startswith('  {"scenario": ') for line in lines) == 5
    assert '"divergences": []' in jsonfile.text(summary(results=[]))


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    jsonfile.write(path, summary())
    assert json.loads(path.read_text()) == document()
    assert len(path.read_bytes()) < MIN_FREE


def test_findings() -> None:
    """What is new, by signature."""
    twice = [divergence(field="value", expected=1, observed=2, probe=n) for n in (0, 1)]
    found = document(results=[result(*twice), result(lost=MachineLost("it hangs"))])["findings"]
    assert found == [
        {"check": "C1", "field": "value", "rule": "exit.host", "count": 2, "scenario": NAME,
         "what": "L2 returned a wrong value (rule exit.host)", "bundle": None},
        {"check": "lost", "field": "it hangs", "rule": "", "count": 1, "scenario": NAME,
         "what": "The machine was lost: it hangs", "bundle": None},
    ]
