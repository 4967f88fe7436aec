"""`twinwalk observe` of a hypervisor that knows nothing of it: foreign_l1.S, without symbols."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import cli
from harness.errors import LaunchFailed, MachineLost
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.observe import Observer, Seen
from harness.lockstep.signature import signature
from harness.machine import guests, observed
from harness.machine.observed import Options
from harness.model.memory import Memory
from harness.model.vmcb import Vmcb
from harness.report import stops
from harness.wire.stop import ACCESS, ENTER, Stop
from tests.conftest import ROOT
from tests.machine.foreign_l1 import build, disk, multiboot
from tests.machine.processes import gone, named, unique, wait_for

pytestmark = pytest.mark.guest

ROUNDS = 25
MEMORY = 64


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("foreign"))


def watch(kernel: Path | None, errata: list[Erratum], letter: str = "x", args: tuple[str, ...] = (),
          tamper: dict[int, object] | None = None) -> tuple[Seen, str]:
    """All that is seen of it, and how it ended. `tamper` has what is done to memory at which VMRUN."""
    with observed.start(Options(kernel, append=letter, memory=MEMORY, wait=20, args=args)) as machine:
        observer = Observer("foreign", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers))
        for stop in machine.stops(observer.plausible):
            observer.stop(stop)
            if stop.kind == ENTER and tamper and (change := tamper.get(observer.seen.vmruns)):
                assert callable(change)
                change(Memory.over(machine.memory), stop)
        return observer.seen, machine.ended


def found_at(bundle: stops.Observed) -> int:
    """The gVA of its access."""
    return bundle.evidence.moments[-1].stop.gva


class TestRight:
    def test_all_of_it(self, foreign: Path, errata: list[Erratum]) -> None:
        seen, ended = watch(foreign, errata)
        assert seen.divergences == [] and seen.vmruns == 5 * ROUNDS and not seen.unpaired and not seen.elsewhere
        assert seen.exits == {"VMEXIT_NPF": 2 * ROUNDS, "VMEXIT_CPUID": ROUNDS, "VMEXIT_#PF": ROUNDS,
                              "VMEXIT_VMMCALL": ROUNDS}
        assert seen.table_bytes and "reset" in ended
        assert seen.accesses == 3 * ROUNDS and not seen.invlpga

    def test_several_processors(self, foreign: Path, errata: list[Erratum]) -> None:
        """The second one halts: L2's accesses are judged all the same, since no other has run behind VMRUN."""
        seen, _ = watch(foreign, errata, args=("-smp", "2"))
        assert seen.divergences == [] and seen.vmruns == 5 * ROUNDS and not seen.unpaired
        assert seen.accesses + seen.disturbed == 3 * ROUNDS and seen.accesses > 2 * ROUNDS

    def test_a_processor_that_runs_meanwhile(self, foreign: Path, errata: list[Erratum]) -> None:
        """The second one counts, and changes nothing: what is judged is right, and the rest is told."""
        seen, _ = watch(foreign, errata, "s", args=("-smp", "2"))
        assert seen.divergences == [] and seen.vmruns == 5 * ROUNDS and not seen.unpaired
        assert seen.accesses + seen.disturbed == 3 * ROUNDS

    def test_both_processors_run_guests(self, foreign: Path, errata: list[Erratum]) -> None:
        """Each its own: the stops of one are not taken for the other's."""
        seen, _ = watch(foreign, errata, "b", args=("-smp", "2"))
        assert seen.divergences == [] and seen.vmruns == 9 * ROUNDS and not seen.unpaired
        assert seen.accesses + seen.disturbed == 7 * ROUNDS

    def test_a_refusal(self, foreign: Path, errata: list[Erratum]) -> None:
        seen, _ = watch(foreign, errata, "r")
        assert seen.refused == 1 and seen.vmruns == 5 * ROUNDS + 1
        assert {one.erratum for one in seen.divergences} <= {"qemu-tcg-invalid-high-half"}

    def test_the_plugin_for_each_version(self) -> None:
        """The interface that QEMU has for plugins is another one in 9.0 and in 11.1: it builds for all."""
        assert len({guests.build_plugin(api) for api in (1, 2, 7)}) == 3

    def test_multiboot(self, tmp_path: Path, errata: list[Erratum]) -> None:
        seen, ended = watch(multiboot(tmp_path), errata)
        assert seen.vmruns == 5 * ROUNDS and seen.divergences == [] and "reset" in ended

    def test_a_disk(self, tmp_path: Path, errata: list[Erratum]) -> None:
        """Nothing is given to QEMU but a disk, which the BIOS boots."""
        drive = ("-drive", f"file={disk(tmp_path)},format=raw")
        with observed.start(Options(None, memory=MEMORY, wait=60, args=drive)) as machine:
            observer = Observer("disk", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers))
            for stop in machine.stops(observer.plausible):
                observer.stop(stop)
        assert observer.seen.vmruns == 5 * ROUNDS and observer.seen.divergences == [] and "reset" in machine.ended

    def test_what_l2_executes_itself(self, foreign: Path, errata: list[Erratum]) -> None:
        """L2's own VMRUN, which L1 intercepts, is no VMRUN of L1's."""
        seen, _ = watch(foreign, errata, "v")
        assert seen.divergences == [] and not seen.unpaired and seen.exits["VMEXIT_VMRUN"] == ROUNDS
        assert seen.vmruns == 6 * ROUNDS

    def test_flushed_by_invlpga(self, foreign: Path, errata: list[Erratum]) -> None:
        seen, _ = watch(foreign, errata, "g")
        assert seen.divergences == [] and seen.invlpga == ROUNDS


class TestFindings:
    def test_a_flush_forgotten(self, foreign: Path, errata: list[Erratum]) -> None:
        seen, _ = watch(foreign, errata, "f")
        assert {(one.check, one.field, one.rule) for one in seen.divergences} == {("L1", "tlb_control", "tlb.control")}
        assert len(seen.divergences) == ROUNDS - 1

    def test_another_nested_table_under_the_same_asid(self, foreign: Path, errata: list[Erratum]) -> None:
        """The page that L2 has used is not in it yet."""
        seen, _ = watch(foreign, errata, "c")
        assert {(one.check, one.field, one.rule) for one in seen.divergences} == {("L1", "ncr3", "tlb.control")}
        assert len(seen.divergences) == ROUNDS - 1
        assert seen.divergences[0].events == ("gPA 0x3fe00000: was sPA 0x1000000, is not there",)

    @pytest.mark.parametrize("processors", [1, 2])
    def test_an_access_that_went_elsewhere(self, processors: int, foreign: Path, errata: list[Erratum]) -> None:
        """As a machine whose translation is another one, or an old one."""
        args = ("-smp", str(processors))
        with observed.start(Options(foreign, append="x", memory=MEMORY, wait=20, args=args)) as machine:
            observer = Observer("foreign", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers))
            for stop in machine.stops(observer.plausible):
                observer.stop(stop._replace(spa=stop.spa ^ 0x1000) if observer.seen.accesses == 7 else stop)
        assert [(one.check, one.field, one.rule) for one in observer.seen.divergences] == [("C1", "outcome", "reached")]

    @pytest.mark.parametrize(("bits", "check"), [(1 << 9, "C2"), (1 << 52, "C2")])
    def test_a_table_changed_while_l2_runs(self, bits: int, check: str, foreign: Path, errata: list[Erratum]) -> None:
        """As a machine that sets bits which it must not."""
        def change(memory: Memory, stop: Stop) -> None:
            vmcb = Vmcb(memory, stop.host["rax"])
            pdpt = memory.words[vmcb["ncr3"] >> 3] & ~0xFFF
            table = memory.words[pdpt >> 3] & ~0xFFF
            memory.words[(table >> 3) + 5] |= bits

        seen, _ = watch(foreign, errata, tamper={7: change})
        assert [(one.check, one.op, one.rule) for one in seen.divergences] == [(check, 6, "ad")]

    def test_a_field_changed_while_l2_runs(self, foreign: Path, errata: list[Erratum]) -> None:
        def change(memory: Memory, stop: Stop) -> None:
            Vmcb(memory, stop.host["rax"])["tsc_offset"] = 5

        seen, _ = watch(foreign, errata, tamper={9: change})
        assert [(one.check, one.field, one.op) for one in seen.divergences] == [("C3", "tsc_offset", 8)]


class TestEnds:
    """What is no hypervisor, or cannot be read."""

    def test_no_vmrun(self, foreign: Path) -> None:
        with pytest.raises(MachineLost, match="ended without any VMRUN: it reset") as caught:
            watch(foreign, [], "n")
        assert "the foreign L1 is done" in caught.value.log and caught.value.exit_code == 3

    def test_hangs(self, foreign: Path) -> None:
        name = unique()
        with pytest.raises(MachineLost, match="no VMRUN in 1 s"), observed.start(
                Options(foreign, append="h", memory=MEMORY, wait=1, args=("-name", name))) as machine:
            list(machine.stops(lambda stop: True))
        assert gone(name, 60)

    @pytest.mark.parametrize(("letter", "stops"), [("h", 0), ("e", 10)])
    def test_qemu_ends(self, letter: str, stops: int, foreign: Path) -> None:
        name = unique()
        with observed.start(Options(foreign, append=letter, memory=MEMORY, args=("-name", name))) as machine:
            process = named(name)[0]
            seen = machine.stops(lambda stop: True)
            for _ in range(stops):
                next(seen)
            os.kill(process, signal.SIGKILL)
            with pytest.raises(MachineLost, match=r"QEMU ended with status -9|monitor failed") as caught:
                list(seen)
            assert caught.value.exit_code == 3

    def test_files(self, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["observe", "--kernel", str(tmp_path / "none")]) == 2
        assert "--kernel" in capsys.readouterr().err
        assert cli.main(["observe", "--kernel", str(foreign), "--initrd", str(tmp_path)]) == 2
        assert cli.main(["observe"]) == 2
        assert cli.main(["observe", "linux", "--kernel", str(foreign)]) == 2
        assert cli.main(["observe", "--kernel", str(foreign), "--memory", "4096"]) == 2
        assert cli.main(["observe", "--kernel", str(foreign), "--json", str(tmp_path / "no" / "x")]) == 2

    def test_no_kernel(self, tmp_path: Path) -> None:
        """QEMU takes anything for a kernel, or says why not."""
        text = tmp_path / "kernel"
        text.write_bytes(b"no kernel\n" * 200)
        with pytest.raises((LaunchFailed, MachineLost)):
            watch(text, [])


    @pytest.mark.parametrize(("version", "says", "advice"), [
        ("5.2.0", "", "observing needs 6.0 or later"),
        ("8.2.0", "qemu: -plugin x: invalid option", "takes no TCG plugins"),
        ("8.2.0", "qemu: Could not load plugin x: error code 1", "lets them read no registers"),
    ])
    def test_no_plugins(self, version: str, says: str, advice: str, foreign: Path, tmp_path: Path) -> None:
        qemu = tmp_path / "qemu"
        qemu.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo QEMU emulator version {version} && exit\n"
                        f"echo '{says}'; exit 1\n")
        qemu.chmod(0o755)
        with pytest.raises(LaunchFailed, match=advice), observed.start(Options(foreign, qemu=str(qemu))):
            pass


class TestCommand:
    def test_right(self, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "out.json"
        argv = ["observe", "--kernel", str(foreign), "--memory", str(MEMORY), "--json", str(target)]
        assert cli.main([*argv, "--append", "x", "--vmruns", "10", "--", "-icount", "shift=3,sleep=off"]) == 0
        text = capsys.readouterr().out
        assert "agreed" in text and "20 stops" in text
        assert json.loads(target.read_text())["totals"]["vmruns"] == 10
        assert cli.main([*argv, "--append", "f"]) == 1
        text = capsys.readouterr().out
        assert "console: the foreign L1 is done" in text
        assert "a flush of ASID 1" in text and "24 of L1 tlb_control" in text
        assert json.loads(target.read_text())["totals"]["divergences_new"] == 24


    @pytest.mark.parametrize(("letter", "rule"), [("f", "tlb.control"), ("c", "tlb.control")])
    def test_bundles(self, letter: str, rule: str, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                     ) -> None:
        """One of each finding; the model alone finds the same in it."""
        argv = ["observe", "--kernel", str(foreign), "--memory", str(MEMORY), "--append", letter]
        assert cli.main([*argv, "--bundles", str(tmp_path / "found")]) == 1
        assert "bundle: " in capsys.readouterr().out
        (bundle,) = (tmp_path / "found").iterdir()
        assert cli.main(["explain", str(bundle)]) == 0
        text = capsys.readouterr().out
        assert rule in text and "judged again by the model alone: the same finding" in text
        assert cli.main(["explain", str(bundle), "0x101000"]) == 2, "L2's tables are not in it"
        assert "the pages of its finding" in capsys.readouterr().err
        assert cli.main(["explain", str(bundle), "--vmcb", "0x1000"]) == 2
        assert cli.main(["replay", str(bundle)]) == 2

    def test_a_bundle_of_a_walk(self, foreign: Path, errata: list[Erratum], tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
        with observed.start(Options(foreign, append="x", memory=MEMORY, wait=20)) as machine:
            observer = Observer("foreign", machine.memory, machine.cpu)
            for stop in machine.stops(observer.plausible):
                wrong = stop.kind == ACCESS and observer.seen.accesses == 7
                if found := observer.stop(stop._replace(spa=stop.spa ^ 0x1000) if wrong else stop):
                    about = stops.About(*signature(found[0]), "foreign", {}, "", "")
                    made = stops.Observed(about, observer.evidence(), machine.cpu, "the walks\n")
                    path = stops.write(tmp_path, made)
        assert stops.read(path) == made
        assert cli.main(["explain", str(path), "--svg", str(tmp_path / "walk.svg")]) == 0
        assert "the same finding" in capsys.readouterr().out and (tmp_path / "walk.svg").exists()
        assert cli.main(["explain", str(path), f"{found_at(made):#x}"]) == 0
        assert "reached" in capsys.readouterr().out
        for name in (stops.STOPS, stops.MEMORY):
            text = (path / name).read_text()
            (path / name).write_text(text.replace("0", "1", 1))
            assert cli.main(["explain", str(path)]) == 2
            (path / name).write_text(text)

    def test_interrupted(self, foreign: Path, tmp_path: Path) -> None:
        """What was seen is told and written; nothing is left running."""
        target, name = tmp_path / "out.json", unique()
        argv = [sys.executable, "-m", "harness.cli", "observe", "--kernel", str(foreign), "--memory", str(MEMORY),
                "--append", "e", "--json", str(target), "--", "-name", name]
        for seconds in (4, 20, 90):  # until it has seen a stop, which on a busy machine takes a while
            with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
                wait_for(name)
                time.sleep(seconds)
                process.send_signal(signal.SIGINT)
                text, _ = process.communicate(timeout=120)
            assert process.returncode == 130
            if text:
                break
        assert "stops," in text
        assert json.loads(target.read_text())["totals"]["vmruns"] > 10
        assert gone(name, 60)

    def test_seconds(self, foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["observe", "--kernel", str(foreign), "--memory", str(MEMORY), "--append", "e", "--seconds", "2"]
        assert cli.main(argv) == 0
        assert "agreed" in capsys.readouterr().out
