"""The command: its exit codes, what it refuses, what it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.cli import parser
from harness.errors import UsageError
from harness.options import targeted
from harness.scenario import files, sweepfiles
from harness.scenario.ops import Scenario
from harness.selection import matches
from tests.conftest import LIBRARY, ROOT
from tests.quality.mutants import plant
from tests.scenario.texts import run, text

GOOD = text(run("read a; write b"))
FAULTING = text('entry = "nested.a.pte"\nclear = ["us"]', run("read a; read b"))

TCG = ("--machine", "tcg")

guest = pytest.mark.guest


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def faulting(tmp_path: Path) -> Path:
    path = tmp_path / "faulting.toml"
    path.write_text(FAULTING)
    return path


class TestExpression:
    @pytest.mark.parametrize(
        ("expression", "names"),
        [
            ("", ["nested-write", "nested-read", "guest-write"]),
            ("   ", ["nested-write", "nested-read", "guest-write"]),
            ("write", ["nested-write", "guest-write"]),
            ("nested-write", ["nested-write"]),
            ("not write", ["nested-read"]),
            ("nested and write", ["nested-write"]),
            ("nested and not write", ["nested-read"]),
            ("guest or read", ["nested-read", "guest-write"]),
            ("nested and write or guest and read", ["nested-write"]),
            ("guest or nested and read", ["nested-read", "guest-write"]),
            ("not nested and not read", ["guest-write"]),
            ("zebra", []),
        ],
    )
    def test_selects(self, expression: str, names: list[str]) -> None:
        assert [n for n in ("nested-write", "nested-read", "guest-write") if matches(expression, n)] == names

    @pytest.mark.parametrize(
        "expression", ["and", "or", "not", "a and", "or a", "a b", "a not b", "a and and b", "not not a"]
    )
    def test_makes_no_sense(self, expression: str) -> None:
        with pytest.raises(UsageError, match="-k"):
            [matches(expression, name) for name in ("a", "b", "ab", "")]

    def test_matches_nothing(self, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["list", str(good), "-k", "zebra"]) == 2
        assert "zebra" in capsys.readouterr().err


class TestList:
    def test_one(self, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["list", str(good)]) == 0
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1 and out.startswith("good") and "t" in out and "15.25" in out

    def test_the_library(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        known = [s.name for path in files.find([LIBRARY]) for s in files.read(path)]
        assert len(lines) >= len(known) >= 30
        listed = "\n".join(lines)
        assert [name for name in known if name not in listed] == []

    def test_a_folder(self, tmp_path: Path, good: Path, faulting: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["list", str(tmp_path), "-k", "not good"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["faulting"]

    def test_only_what_is_asked_for_is_read(
        self, good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reading the library takes longer than running one scenario of it."""
        made: list[str] = []
        whole = files.File.scenario

        def counted(file: files.File, data: Mapping[str, Any], name: str) -> Scenario:
            made.append(name)
            return whole(file, data, name)

        monkeypatch.setattr(files.File, "scenario", counted)
        monkeypatch.setattr(sweepfiles, "read", lambda path, name: pytest.fail(f"{name} was read"))
        assert cli.main(["list", str(LIBRARY), "-k", "first-access-user[fetch or first-light"]) == 0
        assert made == ["ad/first-access-user[fetch a+0x20]", "first-light"]
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [n.split()[0] for n in made]


class TestWrongUse:
    @pytest.mark.parametrize(
        "argv",
        [[], ["fly"], ["run", "--nonsense"], ["run", "--machine", "toaster"], ["run", "--lockstep", "--pipelined"],
         ["run", "--json"]],
        ids=" ".join,
    )
    def test_arguments(self, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        assert "usage: twinwalk" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("source", "line", "reason"),
        [
            ("nonsense", 1, "not TOML"),
            (text('jump = "a"'), 5, "an op has exactly one of"),
            (text(run("read a"), 'entry = "nested.z.pte"\nset = ["p"]'), 9, "no entry is called 'nested.z.pte'"),
            (text(run("fetch a+0xFFE")), 5, "no code that returns"),
            (text('entry = "nested.a.pte"\nvalue = 0x1007', run("read a")), 9, "no page of tables or data"),
            (text(f"{run('read a')}\nexpect = [\"#PF 0x4\"]"), 5, "the scenario expects '#PF 0x4'"),
        ],
    )
    @guest
    def test_a_bad_file(
        self, source: str, line: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Exit code 2, with file, line and reason."""
        path = tmp_path / "bad.toml"
        path.write_text(source)
        assert cli.main(["run", *TCG, str(path)]) == 2
        out = capsys.readouterr()
        assert out.err.startswith(f"twinwalk: {path}:{line}: ") and reason in out.err
        assert "Traceback" not in out.err

    def test_no_such_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for command in ("run", "list"):
            assert cli.main([command, str(tmp_path / "nowhere.toml")]) == 2
            assert "nowhere.toml: no such file" in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--json", "--junit"])
    @pytest.mark.parametrize("place", ["no/such/folder/x", "folder"])
    def test_an_unwritable_report(
        self, option: str, place: str, tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Said before the run, so that no result is lost."""
        (tmp_path / "folder").mkdir()
        path = tmp_path / place
        assert cli.main(["run", *TCG, str(good), option, str(path), "--qemu", "/no/such/qemu"]) == 2
        assert str(path) in capsys.readouterr().err


@guest
class TestRun:
    def test_agreement(self, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", *TCG, str(good)]) == 0
        assert "Traceback" not in capsys.readouterr().err

    def test_pipelined(self, good: Path, faulting: Path) -> None:
        assert cli.main(["run", *TCG, "--pipelined", str(good), str(faulting)]) == 0

    def test_a_new_divergence(
        self, faulting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Exit code 1, and both sides are shown."""
        plant(monkeypatch, "model.walk", "if access.user or not (access.fetch and paging.gmet):", "if False:")
        assert cli.main(["run", *TCG, str(faulting)]) == 1
        out = capsys.readouterr().out
        assert "faulting" in out and "0x100000005" in out and "0x100000001" in out

    def test_fail_fast(
        self, faulting: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plant(monkeypatch, "model.walk", "if access.user or not (access.fetch and paging.gmet):", "if False:")
        report = tmp_path / "out.json"
        assert cli.main(["run", *TCG, "--fail-fast", "--json", str(report), str(faulting), str(good)]) == 1
        assert json.loads(report.read_text())["totals"]["scenarios"] == 1

    def test_json(self, good: Path, faulting: Path, tmp_path: Path) -> None:
        report = tmp_path / "out.json"
        assert cli.main(["run", *TCG, "--json", str(report), str(good), str(faulting)]) == 0
        data = json.loads(report.read_text())
        assert {"machine", "totals", "divergences"} <= data.keys()
        totals = data["totals"]
        assert (totals["scenarios"], totals["vmruns"], totals["probes"]) == (2, 3, 4)
        assert totals["table_bytes_compared"] > 0 and totals["seconds"] > 0
        assert (totals["divergences_new"], totals["divergences_known"], data["divergences"]) == (0, 0, [])
        assert data["machine"]["qemu_version"] and data["machine"]["cpu_model"] == "max"

    def test_coverage_of_files(
        self, good: Path, faulting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The cells of two runs, taken together."""
        reports = [tmp_path / "one.json", tmp_path / "two.json"]
        for report, scenario in zip(reports, (good, faulting), strict=True):
            assert cli.main(["run", *TCG, "--json", str(report), str(scenario)]) == 0
        merged = tmp_path / "coverage.json"
        assert cli.main(["coverage", "--json", str(merged), *map(str, reports)]) == 0
        data = json.loads(merged.read_text())
        reached = {cell["rule"] for cell in data["cells"] if cell["state"] == "reached"}
        assert {"reached", "nested.user", "write", "ad"} <= reached and "guest.smep" not in reached
        assert 0 < data["reached"] < data["reachable"]
        assert f"{data['reached']} of {data['reachable']:,} reachable cells" in capsys.readouterr().out

    def test_json_of_a_divergence(self, faulting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, "model.walk", "if access.user or not (access.fetch and paging.gmet):", "if False:")
        report = tmp_path / "out.json"
        assert cli.main(["run", *TCG, "--json", str(report), str(faulting)]) == 1
        data = json.loads(report.read_text())
        (found,) = data["divergences"]
        assert (found["scenario"], found["op"], found["probe"], found["check"]) == ("faulting", 1, 0, "C1")
        assert found["field"] == "exitinfo1" and found["erratum"] is None
        assert data["totals"]["divergences_new"] == 1

    def test_junit(self, good: Path, faulting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, "model.walk", "if access.user or not (access.fetch and paging.gmet):", "if False:")
        report = tmp_path / "out.xml"
        assert cli.main(["run", *TCG, "--junit", str(report), str(good), str(faulting)]) == 1
        cases = {case.get("name"): case for case in ET.parse(report).iter("testcase")}
        assert cases.keys() == {"good", "faulting"}
        assert cases["good"].find("failure") is None and cases["faulting"].find("failure") is not None

    def test_a_lost_machine(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Exit code 3, with what there is to know of it."""
        path = tmp_path / "lost.toml"
        path.write_text(text('host = "cr4"\nvalue = 0x600', run("read a")))
        assert cli.main(["run", *TCG, str(path)]) == 3
        out = capsys.readouterr()
        assert "lost" in out.out + out.err and "triple fault" in out.out + out.err

    def test_strict(self, tmp_path: Path) -> None:
        """A known erratum of stock QEMU is 0; with --strict it is 1."""
        path = tmp_path / "known.toml"
        path.write_text(text('entry = "nested.a.pte"\nset = ["bit51"]', run("read a")))
        assert cli.main(["run", *TCG, str(path)]) == 0
        assert cli.main(["run", *TCG, "--strict", str(path)]) == 1

    def test_as_a_command(self, good: Path) -> None:
        """No terminal: plain text, no escape sequences, nothing on stderr."""
        done = subprocess.run([sys.executable, "-m", "harness.cli", "run", *TCG, str(good)],
                              capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd="/", timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "machine"),
    [
        ([], "kvm-on-tcg"), (["--qemu", "/opt/qemu"], "tcg"), (["--cpu", "EPYC-Rome"], "tcg"),
        (["--qemu-arg=-name", "--qemu-arg=x"], "tcg"), (["--machine", "kvm-on-tcg"], "kvm-on-tcg"),
        (["--machine", "tcg"], "tcg"), (["--qemu", "/opt/qemu", "--kernel", "bzImage"], "kvm-on-tcg"),
        (["--kernel", "bzImage", "--modules", "lib"], "kvm-on-tcg"), (["--kvm-param", "npt=0"], "kvm-on-tcg"),
        (["--machine", "tcg", "--kernel", "bzImage"], None),
    ],
)
def test_which_machine(arguments: list[str], machine: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given says which machine is meant."""
    monkeypatch.setattr("harness.machine.kvm.why_not", lambda: ("no SVM", "another host"))
    monkeypatch.setattr("harness.machine.kvm_on_tcg.prepare", lambda say: (Path("kernel"), Path("root")))
    options = parser().parse_args(["run", *arguments])
    if machine is None:
        with pytest.raises(UsageError, match="are for --machine kvm-on-tcg"):
            targeted(options)
    else:
        assert targeted(options).chosen().machine == machine


def test_this_host_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.machine.kvm.why_not", lambda: ("", ""))
    for arguments, machine in (([], "kvm"), (["--kernel", "bzImage"], "kvm-on-tcg"), (["--qemu", "/opt/qemu"], "tcg")):
        assert targeted(parser().parse_args(["run", *arguments])).chosen().machine == machine


@pytest.mark.parametrize("missing", ["apt", "package", "busybox", "cache"])
def test_without_a_kernel_it_is_tcg_and_the_reason_is_told(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host where nothing can be fetched, an unprivileged user, a folder that cannot be written."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("gcc", "qemu-system-x86_64", "as", "ld", "sh", "ldd", "bash"):
        (tools / tool).symlink_to(shutil.which(tool) or "/missing")
    scripts = {"apt-cache": "exit 0", "apt-get": "echo 'no mirror answers' >&2; exit 100"}
    if missing == "busybox":
        scripts["apt-cache"] = 'case "$*" in *busybox*) exit 0;; *) echo linux-image-6.1.0-1-cloud-amd64;; esac'
    if missing != "apt":
        for name, script in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if missing == "cache":
        (cache / "twinwalk").write_text("a file where the folder should be")
    assert targeted(parser().parse_args(["run"])).chosen().machine == "tcg"
    told = capsys.readouterr().err
    assert "no KVM is tested, only QEMU (--machine tcg)" in told
    assert "--kernel" in told


@pytest.mark.parametrize(
    ("arguments", "pipelined"),
    [(TCG, False), ((*TCG, "--pipelined"), True), (("--machine", "kvm-on-tcg"), True),
     (("--machine", "kvm-on-tcg", "--lockstep"), False)],
)
def test_l1_waits_at_each_record_where_that_is_cheap(
    arguments: tuple[str, ...], pipelined: bool, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(cli, "run", lambda target, scenarios, errata, pipelined, *rest: seen.append(pipelined))
    cli.main(["run", *arguments, str(good)])
    assert seen == [pipelined]
