"""`twinwalk replay`: reproduced, not reproduced, or cannot be tested here; with real guests."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.bundling import our_version
from harness.errors import UsageError
from harness.machine import kvm_on_tcg
from harness.options import add_target
from harness.replay import targeted
from harness.report.bundle import Bundle, read, write
from tests.quality.mutants import plant
from tests.report.test_bundle import ABOUT, BUNDLE
from tests.scenario.texts import HEAD, one, run

RESERVED = f"""{HEAD}guest = "5-level"

[[op]]
host = "cr4"
set = ["smep"]

[[op]]
entry = "nested.c.pte"
set = ["bit51"]

[[op]]
run = ["read b", "read c", "read a"]
"""
"""What QEMU from 7.0 on reports wrongly: qemu-tcg-reserved-without-p."""


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_target(parser)
    parser.set_defaults(machine=None, cpu=None, l1_pages=None)
    return parser.parse_args(arguments)


def of(**target: Any) -> Bundle:
    return replace(BUNDLE, about=replace(ABOUT, target=target))


class TestTarget:
    """By default a machine like the bundle's, without its programs."""

    def test_as_in_the_bundle(self) -> None:
        bundle = of(machine="kvm-on-tcg", cpu="EPYC,+svm", kvm_parameters=["npt=0"], l1_pages="4k", qemu="/evil",
                    kernel="/evil", modules="/evil", qemu_args=["-evil"])
        target = targeted(options(), bundle, Path("x.twin"))
        assert (target.machine, target.cpu, target.qemu, target.qemu_args) == ("kvm-on-tcg", "EPYC,+svm", None, ())
        assert target.l0 == kvm_on_tcg.Options(None, None, ("npt=0",), "4k")

    def test_as_said(self) -> None:
        bundle = of(machine="kvm-on-tcg", cpu="EPYC", kvm_parameters=["npt=0"], l1_pages="4k")
        said = options("--machine", "tcg", "--qemu", "q", "--cpu", "max", "--qemu-arg=-S")
        target = targeted(said, bundle, Path("x"))
        assert (target.machine, target.cpu, target.qemu, target.qemu_args) == ("tcg", "max", "q", ("-S",))
        target = targeted(options("--kernel", "k", "--kvm-param", "npt=1", "--l1-pages", "2m"), bundle, Path("x"))
        assert target.l0 == kvm_on_tcg.Options(Path("k"), None, ("npt=1",), "2m")

    def test_what_does_not_go_together(self) -> None:
        with pytest.raises(UsageError, match="are for --machine kvm-on-tcg"):
            targeted(options("--kernel", "k"), of(machine="tcg", cpu="max"), Path("x"))

    def test_a_finding_in_kvms_tables_is_audited(self) -> None:
        found = replace(BUNDLE, about=replace(ABOUT, check="C5", target={
            "machine": "kvm-on-tcg", "cpu": "max", "kvm_parameters": [], "l1_pages": "2m"}))
        assert targeted(options(), found, Path("x")).l0.audit == 1
        assert targeted(options("--audit=4"), found, Path("x")).l0.audit == 4
        with pytest.raises(UsageError, match="only --machine kvm-on-tcg"):
            targeted(options("--machine", "tcg"), found, Path("x"))

    @pytest.mark.parametrize(
        "bad",
        [
            {"machine": "ssh"}, {"machine": None}, {"cpu": "max -S"}, {"cpu": ""}, {"cpu": 7}, {"l1_pages": "1g"},
            {"kvm_parameters": ["npt=0 evil=1"]}, {"kvm_parameters": [7]}, {"kvm_parameters": "npt=0"},
        ],
    )
    def test_hostile(self, bad: dict[str, Any]) -> None:
        good = {"machine": "kvm-on-tcg", "cpu": "max", "kvm_parameters": [], "l1_pages": "2m"}
        with pytest.raises(UsageError, match=rf"x\.twin: its {next(iter(bad))} cannot be .*: give it as an option"):
            targeted(options(), of(**good | bad), Path("x.twin"))


def test_a_damaged_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, BUNDLE)
    (path / "walks.txt").write_text("")
    assert cli.main(["replay", str(path)]) == 2
    assert "walks.txt: it was changed" in capsys.readouterr().err


@pytest.mark.guest
class TestReal:
    @pytest.fixture
    def path(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
        (tmp_path / "reserved.toml").write_text(RESERVED)
        out = tmp_path / "bundles"
        assert cli.main(["run", "--machine", "tcg", "--strict", str(tmp_path / "reserved.toml"),
                         "--bundles", str(out)]) == 1
        told = capsys.readouterr()
        (path,) = out.iterdir()
        assert f"try it with `./twinwalk replay {path}`" in told.err
        return path

    def test_reproduced(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = read(path)
        assert len(found.scenario.ops) == 2 and found.about.ops == 3 and found.about.strict
        assert found.about.machine["microcode"] and found.about.machine["features"]
        assert cli.main(["replay", str(path)]) == 1
        shown = capsys.readouterr().out
        assert "finding  C1 exitinfo1, rule nested.reserved; stable" in shown
        assert "EXITINFO1 is wrong: P is missing" in shown and shown.endswith("\nreproduced\n")
        assert cli.main(["replay", str(path), "--quiet"]) == 1 and capsys.readouterr().out == "reproduced\n"

    def test_not_reproduced(
        self, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A model that shares what the machine does: now it agrees."""
        with monkeypatch.context() as patch:
            plant(patch, "model.walk", "ErrorCode.P | ErrorCode.RSVD", "ErrorCode.RSVD")
            assert cli.main(["replay", str(path)]) == 0
        assert "not reproduced: " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("scenario", "arguments", "why"),
        [
            (BUNDLE.scenario, ("--qemu", "/none"), "cannot be tested here: .*/none"),
            (one(run("read a"), head='guest = "5-level"\n', name="five"), ("--cpu", "max,-la57"),
             "cannot be tested here: .*5-level paging needs la57"),
            (BUNDLE.scenario, ("--cpu", "max,-svm"), "cannot be tested here: .*has no svm"),
        ],
    )
    def test_cannot_be_tested(
        self, scenario: Any, arguments: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path, replace(BUNDLE, scenario=scenario, before=()))
        assert cli.main(["replay", str(path), *arguments]) == 125
        shown = " ".join(capsys.readouterr().out.split())
        assert re.search(why, shown), shown

    def test_something_else_is_seen(self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = read(path)
        other = write(tmp_path, replace(found, about=replace(found.about, field="exitinfo2", twinwalk="0.0")))
        assert cli.main(["replay", str(other)]) == 0
        shown = capsys.readouterr().out
        assert shown.endswith("not reproduced: 1 other findings\n") and "P is missing" in shown
        assert f"written by twinwalk 0.0, this is {our_version()}" in shown


@pytest.mark.guest
def test_a_run_says_how_to_make_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reserved.toml").write_text(RESERVED)
    assert cli.main(["run", "--machine", "tcg", "--strict", str(tmp_path / "reserved.toml")]) == 1
    assert "\nbundles of what is new: ./twinwalk " in capsys.readouterr().out
