"""The journal: lines as results come, gone when they are safe elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import MachineLost, UsageError
from harness.lockstep.compare import Divergence
from harness.lockstep.result import Result
from harness.report.journal import Journal

WRONG = Result("two", 3, 2, 4096, [Divergence("two", 0, 1, "C1", "value", 1, 2, "reached")])


def test_each_result_is_there_at_once(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    lines = tmp_path / "out.json.journal"
    with Journal(target) as journal:
        journal.result(Result("one", 1, 1, 4096))
        assert [json.loads(line)["scenario"] for line in lines.read_text().splitlines()] == ["one"]
        journal.result(WRONG)
        journal.result(Result("three", lost=MachineLost("it died", ["qemu"], "log", "#1 ENTER")))
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert entries[1]["divergences"][0]["observed"] == "0x2" and entries[1]["vmruns"] == 3
    assert entries[2]["lost"]["reason"] == "it died"
    journal.done()
    assert not lines.exists()


def test_no_file_no_journal() -> None:
    with Journal(None) as journal:
        journal.result(WRONG)
    journal.done()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*gone"), Journal(tmp_path / "gone" / "out.json"):
        pass


def test_a_full_disk_ends_the_journal_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Journal(tmp_path / "out.json") as journal:
        journal._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - the journal closes it
        journal.result(WRONG)
        journal.result(WRONG)
