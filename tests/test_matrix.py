"""`twinwalk matrix` on real machines: a small slice, and what becomes of a version that cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli
from harness.errors import LaunchFailed
from harness.machine import qemu, versions

pytestmark = pytest.mark.guest

SLICE = "vmrun/asid or intercepts/cr-bits or walk/descriptor[p] or walk/sizes"


def other_qemu() -> str:
    """Another release's QEMU, the newest; skips, with the reason, where none can be had."""
    try:
        found = versions.resolve("qemu", "10.0", print)
    except LaunchFailed as reason:
        pytest.skip(f"no other QEMU is to be had here: {reason}")
    return str(found.path)


def test_what_can_be_run_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(versions, "available", lambda kind, say: ([], ["sid: there is no network"]))
    out, page, table = tmp_path / "m.json", tmp_path / "m.md", tmp_path / "m.html"
    words = ["matrix", "--qemu", f"{qemu.find(None)},99.9", "--kernel", "98.7", "-k", SLICE, "--budget", "0",
             "--json", str(out), "--markdown", str(page), "--html", str(table)]
    assert cli.main(words) == 0
    data = json.loads(out.read_text())
    first, second, third = data["columns"]
    assert not first["failed"] and first["scenarios"] >= 4
    assert second["failed"].startswith("no mirror has qemu 99.9") and "there is no network" in third["failed"]
    assert all(row["explained"] for row in data["rows"])
    assert "not tested: no mirror has qemu 99.9" in page.read_text() and "no mirror has qemu 99.9" in table.read_text()
    assert "QEMU 99.9: not tested" in capsys.readouterr().out
    assert cli.main(["matrix", "--qemu", qemu.find(None), "-k", SLICE, "--budget", "0", "--quiet"]) == 0
    assert capsys.readouterr().out == "all is explained\n"


def test_nothing_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "available", lambda kind, say: ([], []))
    assert cli.main(["matrix", "--qemu", "99.9", "-k", SLICE]) == 3


@pytest.mark.parametrize("words", [[], ["--qemu", ","], ["--qemu", "7.2", "-k", "no-such-scenario"]])
def test_wrong_use(words: list[str]) -> None:
    assert cli.main(["matrix", *words]) == 2


def test_another_releases_qemu(tmp_path: Path) -> None:
    """It runs on this host by what it brings, and shows what is its own."""
    out = tmp_path / "m.json"
    path = other_qemu()
    assert cli.main(["matrix", "--qemu", f"{path},{qemu.find(None)}", "-k", SLICE, "--budget", "0",
                     "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    assert not any(column["failed"] for column in data["columns"])
    assert all(" says: " in lost for column in data["columns"] for lost in column["lost"])  # by what an erratum names
    row = next(row for row in data["rows"] if row["finding"] == "qemu-tcg-cr-reads-as-cr0")
    assert next(iter(row["cells"].values()))["state"] == "shows"
