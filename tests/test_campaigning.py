"""Shards and what they come to: pure parts of `twinwalk campaign`. The fleet itself is in test_fleet.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from harness import campaigning, cli, fleet, shards
from harness.campaigning import Journal
from harness.errors import UsageError
from harness.lockstep.signature import Signature
from harness.shards import SUMS, Answer, Find, Merged
from harness.sweeping import Shard

ONE, OTHER = ("run", "--shard=1/2"), ("run", "--shard=2/2")
WRONG = Signature("C1", "exitinfo1", "nested.write")


def options(*given: str) -> argparse.Namespace:
    return cli.parser().parse_args(["campaign", "--scheduler", "tcp://h:1", "--machine", "tcg", *given])


def document(**changes: Any) -> dict[str, Any]:
    return {
        "machine": {"machine": "tcg", "qemu_version": "7.2.22", "kernel": ""},
        "totals": dict.fromkeys(SUMS, 3) | {"seconds": 1.5},
        "findings": [WRONG._asdict() | {"count": 2, "scenario": "a[x]", "what": "It is wrong."}],
        "cells": [["nested.write", "nested", "pte", "4-level", "#NPF"]],
    } | changes


class TestPlan:
    def test_each_shard_is_a_command(self) -> None:
        work = campaigning.plan(options("-k", "walk/", "--budget", "0", "--shards", "3", "--fuzz", "4..5",
                                        "--programs", "10", "--strict"))
        assert [one[:2] for one in work] == [
            ("run", "--shard=1/3"), ("run", "--shard=2/3"), ("run", "--shard=3/3"), ("fuzz", "--seed=4"),
            ("fuzz", "--seed=5")]
        for one in work:
            parsed = cli.parser().parse_args(one)
            assert parsed.machine == "tcg" and parsed.jobs == 1
        first = cli.parser().parse_args(work[0])
        assert (first.expression, first.strict, first.budget, first.shard) == ("walk/", True, 0, Shard(1, 3))

    def test_a_boot_is_for_thousands(self) -> None:
        assert len(list(shards.of_run([], 3 * shards.WORTH - 1, None))) == 3

    @pytest.mark.parametrize("wrong", ["", "x", "3..2", "1..", "-1"])
    def test_no_seeds(self, wrong: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match="names no seeds"):
            campaigning.seeds(wrong)

    @pytest.mark.parametrize("wrong", ["0/3", "4/3", "1", "1/0", "a/b", "/"])
    def test_no_shard(self, wrong: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            cli.parser().parse_args(["run", "--shard", wrong])

    def test_a_record_is_of_whole_runs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", "--machine", "tcg", "--shard", "1/2", "--record", str(tmp_path / "r")]) == 2
        assert "--record is of whole runs" in capsys.readouterr().err


class TestAnswer:
    def test_what_is_taken(self) -> None:
        one = shards.answer(document())
        assert one.machine == "machine tcg, qemu_version 7.2.22" and one.totals["vmruns"] == 3
        assert one.finds == [Find(WRONG, 2, "a[x]", "It is wrong.")] and len(one.cells) == 1

    @pytest.mark.parametrize("changes", [
        {"totals": {}}, {"totals": dict.fromkeys(SUMS, "3")}, {"totals": dict.fromkeys(SUMS, -3)}, {"findings": [{}]},
        {"findings": [WRONG._asdict() | {"count": 2, "scenario": 7, "what": ""}]}, {"cells": [["a"]]}, {"cells": 5},
        {"machine": 5}, {"totals": None},
    ])
    def test_what_makes_no_sense_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"wanted|Error"):
            shards.answer(document(**changes))

    def test_nothing_that_a_terminal_obeys(self) -> None:
        bad = WRONG._asdict() | {"count": 1, "scenario": "\x1b[2Jx", "what": "\x1b]0;t\x07y"}
        (find,) = shards.answer(document(findings=[bad])).finds
        assert (find.scenario, find.what) == ("x", "y")


def test_a_shard_counts_once() -> None:
    merged, one = Merged(), shards.answer(document())
    assert [find.signature for find in merged.add(ONE, one)] == [WRONG]
    assert merged.add(ONE, one) == [] and merged.add(OTHER, one) == []
    assert merged.totals["vmruns"] == 6
    find, where = merged.finds[WRONG]
    assert (find.times, where) == (4, ONE)


class TestJournal:
    def journal(self, path: Path, merged: Merged) -> Journal:
        return Journal(path, [ONE, OTHER], merged)

    def test_the_same_again(self, tmp_path: Path) -> None:
        path, before, after = tmp_path / "journal", Merged(), Merged()
        with self.journal(path, before) as journal:
            journal.done(ONE, shards.answer(document()))
            journal.done(OTHER, shards.answer(document(findings=[])))
        with path.open("a") as file:
            file.write('{"shard": ["run", "--sh')  # killed
        with self.journal(path, after):
            assert after == before
        with self.journal(path, again := Merged()):
            assert again == before

    def test_another_campaign(self, tmp_path: Path) -> None:
        path = tmp_path / "journal"
        with self.journal(path, Merged()):
            pass
        with pytest.raises(UsageError, match="another campaign"), Journal(path, [ONE], Merged()):
            pass

    @pytest.mark.parametrize("line", ["nonsense", "{}", "[]", '{"shard": [], "answer": {}}', '{"shard": 1}'])
    def test_no_journal(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "journal"
        with self.journal(path, Merged()):
            pass
        for text, number in ((path.read_text() + line, 2), (line, 1)):
            path.write_text(text + "\n")
            with pytest.raises(UsageError, match=f"{path}:{number}: this is no line"), self.journal(path, Merged()):
                pass

    def test_a_full_disk(self, tmp_path: Path) -> None:
        with self.journal(tmp_path / "journal", Merged()) as journal:
            journal._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (the journal closes it)
            with pytest.raises(UsageError, match="make room"):
                journal.done(ONE, shards.answer(document()))


def test_table_and_json() -> None:
    merged = Merged()
    merged.add(ONE, Answer("machine tcg", dict.fromkeys(SUMS, 1000), [Find(WRONG, 2, "a[x]", "It is wrong.")], set()))
    merged.fail(OTHER, "the workers that it was given to died")
    shown = "\n".join("".join(span.text for span in one) for one in campaigning.table(merged, 2, 5.0, 100))
    assert "of 2" in shown and "It is wrong. (C1 exitinfo1, rule nested.write)" in shown
    assert "run --shard=1/2" in shown and "not done" in shown and "died" in shown
    whole = json.loads(campaigning.text(merged, [ONE, OTHER]))
    assert whole["left"] == [list(OTHER)] and whole["findings"][0]["shard"] == list(ONE)
    assert whole["failed"][0]["reason"].endswith("died") and whole["totals"]["shards"] == 1


class TestHosts:
    def write(self, tmp_path: Path, text: str) -> Path:
        (tmp_path / "hosts").write_text(text)
        return tmp_path / "hosts"

    def test_a_file(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "# ours\nme@one:2222\n\ntwo  # the quick one\n")
        assert fleet.hosts(path) == [{"host": "one", "username": "me", "port": 2222}, {"host": "two"}]

    @pytest.mark.parametrize(("text", "why"), [
        ("", "there is no host in it"), ("one\nme:hush@two", ":2: no password"), ("one/tcg", "--machine"),
        ("a b", "no host or user"),
    ])
    def test_no_hosts(self, tmp_path: Path, text: str, why: str) -> None:
        with pytest.raises(UsageError, match=why) as error:
            fleet.hosts(self.write(tmp_path, text))
        assert "hush@" not in str(error.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot read"):
            fleet.hosts(tmp_path / "nowhere")
