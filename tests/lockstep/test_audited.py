"""Findings in KVM's tables are judged again by what was gathered of them: alone, and written as a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import cli
from harness.lockstep.audited import Evidence, judge_again
from harness.lockstep.compare import Divergence
from harness.lockstep.signature import signature
from harness.model.entries import NX, PCD, RW, D, P
from harness.model.registers import Cpu
from harness.report import audits, stops
from harness.report.stops import About
from tests.lockstep.test_audit import Run

CPU = Cpu(40, True, 16, frozenset({"page1g"}))


def changed(*entries: tuple[str, dict[str, int]]) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for name, bits in entries:
            run.world.change(name, **bits)
    return change


def without_nested_paging(run: Run) -> None:
    run.l0.changes = {"l2_root": run.world.direct_root}
    run.enter(np_enable=0)
    changed(("direct.5000", {"set": 0x1000}), ("direct.5000", {"clear": 0x2000}))(run)


def another_table(run: Run) -> None:
    del run.world.tables[run.world.shadow_root]


FINDINGS: dict[str, tuple[Callable[[Run], None], str]] = {
    "another frame": (changed(("shadow.1", {"set": 0x1000, "clear": 0x2000})), "shadow.frame"),
    "a right": (changed(("shadow.0", {"set": D}), ("l1.0.pte", {"set": NX})), "shadow.rights"),
    "a type": (changed(("shadow.2", {"set": PCD})), "shadow.type"),
    "a part of a large page": (changed(("shadow.large+3000", {"set": 0x1000, "clear": 0x2000})), "shadow.frame"),
    "a table": (another_table, "shadow.table"),
    "the direct map": (changed(("direct.5000", {"set": 0x1000}), ("direct.5000", {"clear": 0x2000})), "shadow.direct"),
    "L2's direct map": (without_nested_paging, "shadow.direct"),
    "a page that was taken away": (changed(("l1.0.pte", {"clear": P})), "shadow.stale"),
    "a right that was taken away": (changed(("l1.3.pte", {"clear": RW})), "shadow.stale"),
    "a branch that was taken away": (changed(("l1.0.pde", {"clear": P})), "shadow.stale"),
}


def found(change: Callable[[Run], None]) -> tuple[Divergence, Evidence]:
    run = Run()
    run.enter()
    run.exit()
    run.enter()
    assert run.rules() == []
    change(run)
    run.exit()
    one = run.sink.divergences[0]
    return one, run.audit.evidence(one)


@pytest.mark.parametrize("name", FINDINGS)
def test_judged_again(name: str) -> None:
    change, rule = FINDINGS[name]
    one, evidence = found(change)
    assert one.rule == rule
    again = judge_again("s", evidence, CPU)
    same = [new for new in again if signature(new) == signature(one)]
    assert same and (same[0].field, same[0].expected, same[0].observed, same[0].events) == (
        one.field, one.expected, one.observed, one.events)
    assert len(evidence.looks) == 2 and 8 < len(evidence.looks[0].pages) < 40


def test_what_is_right_is_not_found_again() -> None:
    """The pages of a finding, put right."""
    one, evidence = found(FINDINGS["a page that was taken away"][0])
    first, last = evidence.looks
    assert last.pages
    assert judge_again("s", evidence._replace(looks=(first, last._replace(pages={}))), CPU) == []
    assert [new.rule for new in judge_again("s", evidence._replace(looks=(last._replace(
        pages={**first.pages, **last.pages}),)), CPU)] == ["shadow.frame"], "stale is what was right before"
    assert one.rule == "shadow.stale"


def test_a_finding_at_the_first_audit() -> None:
    run = Run()
    run.world.change("direct.5000", clear=0x2000)
    run.enter()
    evidence = run.audit.evidence(run.sink.divergences[0])
    assert len(evidence.looks) == 1
    assert [one.rule for one in judge_again("s", evidence, CPU)] == ["shadow.direct"]


@pytest.mark.parametrize("name", FINDINGS)
def test_bundles(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, evidence = found(FINDINGS[name][0])
    made = audits.Audited(About(*signature(one), "s", {}, "", ""), evidence, CPU, "the entries\n")
    path = audits.write(tmp_path, made)
    assert audits.is_one(path) and audits.read(path) == made
    assert cli.main(["explain", str(path)]) == 0
    text = capsys.readouterr().out
    assert "the entries" in text and "judged again by the model alone: the same finding" in text
    assert cli.main(["explain", str(path), "0x1000"]) == 2
    assert cli.main(["explain", str(path), "--svg", str(tmp_path / "x.svg")]) == 2
    assert cli.main(["replay", str(path)]) == 2


def test_another_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, evidence = found(FINDINGS["another frame"][0])
    about = About("C5", signature(one).field, "shadow.rights", "s", {}, "", "")
    path = audits.write(tmp_path, audits.Audited(about, evidence, CPU, ""))
    assert cli.main(["explain", str(path)]) == 0
    assert "another finding: C5 4K leaf for gPA ... in the shadow, rule shadow.frame" in capsys.readouterr().out


@pytest.mark.parametrize("part", [audits.KVM, stops.MEMORY, "bundle.json"])
def test_damaged(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, evidence = found(FINDINGS["another frame"][0])
    path = audits.write(tmp_path, audits.Audited(About(*signature(one), "s", {}, "", ""), evidence, CPU, ""))
    text = (path / part).read_text()
    (path / part).write_text(text.replace("0", "1", 1))
    assert cli.main(["explain", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [
    ("kvm", {"l1_root": -1}), ("kvm", {"slots": [[0, 1, 2]]}), ("kvm", {"tables": [[1, 2]]}),
    ("ran", {"control": "00"}), ("ran", {"cr0": "x"}),
])
def test_nonsense(name: str, value: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with digests that fit."""
    one, evidence = found(FINDINGS["another frame"][0])
    dumps = json.dumps

    def spoilt(what: object, **how: int) -> str:
        if isinstance(what, list) and what and "kvm" in what[0]:
            what = [{**what[0], name: what[0][name] | value}, *what[1:]]
        return dumps(what, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(audits.json, "dumps", spoilt)  # type: ignore[attr-defined]
    path = audits.write(tmp_path, audits.Audited(About(*signature(one), "s", {}, "", ""), evidence, CPU, ""))
    monkeypatch.undo()
    assert cli.main(["explain", str(path)]) == 2
    assert "it is damaged" in capsys.readouterr().err
