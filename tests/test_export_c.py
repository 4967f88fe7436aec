"""C tests of findings: built with a compiler alone, and run. One of a bug of stock QEMU fails; where the machine is
right, it passes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.machine import qemu, versions
from harness.report.bundle import Bundle, write
from harness.scenario import files
from harness.scenario.ops import RunOp, Scenario
from harness.scenario.shrink import bare
from tests.conftest import LIBRARY
from tests.report.test_bundle import ABOUT
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest
_TOOLS = [name for name in ("make", "cc") if shutil.which(name) is None]
needs_tools = pytest.mark.skipif(bool(_TOOLS), reason=f"what an exported test is built with is not here: {_TOOLS}")

FEATURES = ["nx", "page1g", "smep", "smap", "pku", "la57", "umip", "fsgsbase", "xsave", "lmsle", "second"]
MACHINE = {"machine": "tcg", "qemu_version": "7.2.22", "qemu": "qemu", "cpu_model": "max", "maxphyaddr": 40,
           "asids": 16, "svm_features": 1, "features": FEATURES}


def bundle(scenario: Scenario, *fields: str, op: int | None = None, probe: int = 0, **about: Any) -> Bundle:
    """Of a finding at the last run, in those fields."""
    last = max(n for n, each in enumerate(scenario.ops) if isinstance(each, RunOp))
    found = [{"op": last if op is None else op, "probe": probe, "field": name} for name in fields]
    return Bundle(replace(ABOUT, divergences=found, machine=MACHINE, **about), bare(scenario))


def exported(made: Bundle, tmp_path: Path) -> Path:
    folder = tmp_path / "test"
    assert cli.main(["replay", str(write(tmp_path, made)), "--export-c", str(folder)]) == 0
    return folder


def build_and_run(folder: Path, program: str = "qemu-system-x86_64") -> tuple[int, str]:
    """Without anything of ours, and without a warning."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C"}
    built = subprocess.run(["make", "-s"], cwd=folder, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, ""), built.stderr
    ran = subprocess.run(["make", "-s", "run", f"QEMU={program}"], cwd=folder, env=environment, capture_output=True,
                         text=True, timeout=240)
    return ran.returncode, ran.stdout


RESERVED = one('entry = "nested.pt.pte"\nset = ["bit51"]', run("read b; read a"), name="reserved")


@needs_tools
class TestRun:
    def test_a_bug_of_stock_qemu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """qemu-tcg-reserved-without-p, from a bundle that was made on it."""
        (tmp_path / "in.toml").write_text(
            'title = "t"\nmanual = "1"\nshows = "s"\n[[op]]\nentry = "nested.c.pte"\nset = ["bit51"]\n'
            '[[op]]\nrun = ["read b", "read c"]\n')
        assert cli.main(["run", "--machine", "tcg", "--strict", str(tmp_path / "in.toml"), "--bundles",
                         str(tmp_path / "found")]) == 1
        (path,) = (tmp_path / "found").iterdir()
        assert cli.main(["replay", str(path), "--export-c", str(tmp_path / "test")]) == 0
        code, said = build_and_run(tmp_path / "test")
        assert code != 0 and said.endswith("FAIL\n")
        assert re.findall(r"WRONG (.*)", said) == ["exitinfo1: expected 0x10000000d, observed 0x10000000c"]
        text = (tmp_path / "test" / "test.c").read_text()
        assert "EXITINFO1 is wrong: P is missing" in text and "rule nested.reserved" in text and "twinwalk" not in text

    @pytest.mark.parametrize(
        ("scenario", "bad", "good"),
        [
            (one('entry = "guest.a.pte"\nset = ["bit51"]', "read a"), "7.2", "5.2"),
            (one('vmcb = "asid"\nvalue = 0', "read a"), "7.2", "10.0"),
        ],
        ids=["reserved-without-p", "half-of-invalid"],
    )
    def test_it_fails_on_one_version_and_passes_on_another(
        self, scenario: Scenario, bad: str, good: str, tmp_path: Path
    ) -> None:
        folder = exported(bundle(scenario, "exitinfo1"), tmp_path)
        programs = {versions.dotted(one.version): one.path for one in versions.fetched("qemu")}
        programs[versions.dotted(qemu.version("qemu-system-x86_64"))] = Path("qemu-system-x86_64")
        found = {wanted: str(path) for wanted in (bad, good) for number, path in programs.items()
                 if number.startswith(f"{wanted}.")}
        if len(found) < 2:
            pytest.skip(f"of QEMU {bad} and {good} only {', '.join(found) or 'none'} is here: see `twinwalk fetch`")
        assert build_and_run(folder, found[bad])[1].endswith("FAIL\n")
        code, said = build_and_run(folder, found[good])
        assert code == 0 and said.endswith("PASS\n"), said

    @pytest.mark.parametrize(
        ("scenario", "fields", "probe"),
        [
            (one('entry = "nested.a.pte"\nclear = ["rw"]', run("read a; write a+8; rmw b; fetch a; write a", 3)),
             ("rip", "rax", "rflags", "cr2", "cpl", "rsp"), 4),
            (one(run("read a+0x20; read2 b; push c; pop d; rmw4 a = 7; fetch a+0x28; rdcr3")),
             ("value", "rip", "cr3"), 5),
            (one('entry = "guest.b.pde"\nclear = ["us"]', run("write b+0xffd", 3), head='guest = "PAE"\n'),
             ("rip", "cr2"), 0),
            (one(run("write a; fetch b+0x18; read a"), head='guest = "32-bit"\nnested_page = "2M"\n'), ("value",), 1),
            (one(run("write a; read b"), head='guest = "off"\n'), ("value", "cr0"), 1),
            (one('host = "efer"\nclear = ["nxe"]', 'vmcb = "cr4"\nset = ["smep"]', "fetch a",
                 head='guest = "5-level"\n'), ("rip", "l1.efer", "l1.cr4"), 0),
            (one("use = 2", 'vmcb = "cr0"\nclear = ["wp"]', "write a", "use = 1", "read a"), ("value", "cr0"), 0),
            (one(run("lar = 0x28; divide; rdcr8; rdtr; rdrsp; smsw")), ("rip", "rax", "l1.dr6", "l1.dr7"), 5),
            (one('entry = "iopm.0x5432"\nset = ["any"]', run("cpuid; out2 0x5432 = 7")), ("rip", "rax"), 1),
            (one("rdmsr 0xc0000080; wrcr2 = 0x1234; undefined"), ("rip", "rax", "cr2"), 2),
            (one('entry = "nested.code.pte"\nset = ["nx"]', "read a"), ("rip", "exitinfo2"), 0),
            (one('entry = "nested.a.pml5e"\nclear = ["us"]', "read a", head='nested = "5-level"\n'),
             ("rip", "l1.cr4"), 0),
            (one(run("write a; read b+8"), 'entry = "nested.b.pte"\nclear = ["rw"]', run("write b"),
                 head='guest = "PAE"\nnested = "PAE"\n'), ("rip", "cr2"), 0),
            (one(run("read a+8"), head='nested = "PAE"\n'), ("value", "cr3"), 0),
            (one("read a", head='guest = "32-bit"\nnested = "off"\nnested_page = "none"\n'), ("value",), 0),
        ],
        ids=lambda value: words(value) if isinstance(value, Scenario) else "",
    )
    def test_it_agrees_where_the_machine_does(
        self, scenario: Scenario, fields: tuple[str, ...], probe: int, tmp_path: Path
    ) -> None:
        code, said = build_and_run(exported(bundle(scenario, *fields, probe=probe), tmp_path))
        assert code == 0 and said.endswith("PASS\n"), said

    def test_an_l1_in_32_bit_paging(self, tmp_path: Path) -> None:
        """There QEMU is wrong always: qemu-tcg-legacy-nested."""
        code, said = build_and_run(exported(bundle(one("write a", head='nested = "32-bit"\n'), "cr0"), tmp_path))
        assert code != 0 and "WRONG exitcode: expected 0x81, observed 0x4e\n" in said

    def test_tables_and_memory(self, tmp_path: Path, image: Any) -> None:
        """What a write leaves: A and D on its way, and the value where it went."""
        (scenario,) = files.read(LIBRARY / "walk" / "four-pages.toml")[:1]
        made = bundle(scenario, "entry at sPA 0x101004188", "memory at sPA 0x1674f2020 at the end")
        code, said = build_and_run(exported(made, tmp_path))
        assert code == 0 and said.count("ok    ") == 3, said

    def test_a_loss(self, tmp_path: Path) -> None:
        """Whether it comes to its end at all."""
        made = bundle(one("read a", "write b"), check="lost", field="it hangs", rule="")
        code, said = build_and_run(exported(made, tmp_path))
        assert code == 0 and said == "ok    exitcode: expected 0x81, observed 0x81\nPASS\n"


def words(scenario: Scenario) -> str:
    probes = [str(probe) for op in scenario.ops if isinstance(op, RunOp) for probe in op.probes]
    return f"{scenario.guest}: {'; '.join(probes)}"


class TestRefused:
    """Exit code 2, where and why."""

    def refused(self, path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
        assert cli.main(["replay", str(path), "--export-c", str(folder)]) == 2
        return capsys.readouterr().err

    def test_what_is_there_already(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made = bundle(RESERVED, "exitinfo1")
        exported(made, tmp_path)
        text = self.refused(write(tmp_path, made), tmp_path / "test", capsys)
        assert f"--export-c: {tmp_path / 'test' / 'test.c'} is there already" in text

    def test_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        text = self.refused(write(tmp_path, bundle(RESERVED, "exitinfo1")), tmp_path / "file" / "x", capsys)
        assert "cannot write there" in text

    def test_what_no_c_test_can_hold(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path, bundle(one("read a", head='guest = "real"\n'), "exitinfo1"))
        assert "this finding cannot be a C test: L2 would have to run in real mode" in self.refused(
            path, tmp_path / "test", capsys)
        assert not (tmp_path / "test").exists()

    @pytest.mark.parametrize("bad", [
        {"maxphyaddr": 99}, {"asids": "16"}, {"svm_features": -1}, {"features": ["nx", "evil"]}, {"features": None},
        {"machine": "ssh"},
    ])
    def test_a_machine_that_cannot_be(
        self, bad: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = bundle(RESERVED, "exitinfo1")
        path = write(tmp_path, replace(made, about=replace(made.about, machine=MACHINE | bad)))
        assert f"its {next(iter(bad))} cannot be" in self.refused(path, tmp_path / "test", capsys)
