"""Machines that die, hang or are left behind: an error of its own kind, in time, and no process left."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pexpect
import pytest
from elftools.elf.elffile import ELFFile

from harness.errors import MachineLost
from harness.lockstep.driver import Lockstep
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine import tcg
from harness.scenario.program import Compiler
from harness.target import Target
from harness.wire.program import Step, encode
from tests.conftest import ROOT
from tests.machine.processes import gone, named, unique, wait_for
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest
ENV = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "dumb"}


@contextmanager
def own_machine() -> Iterator[tuple[tcg.TcgMachine, int, str]]:
    """A machine of the test's own, its QEMU's pid and its name."""
    name = unique()
    with tcg.start(extra=["-name", name]) as machine:
        yield machine, wait_for(name), name
    assert gone(name, 0)


def endless(machine: tcg.TcgMachine, strict: bool = True) -> Iterator[Result]:
    compiler = Compiler(machine.image, machine.cpu)
    program = compiler.compile(one("read a; write b", 'entry = "nested.a.pte"\nclear = ["p"]', "read a; fetch c"))
    twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    return Lockstep(machine, machine.channel, twin, strict).run(repeat(program))


def last(results: Iterator[Result]) -> MachineLost:
    """What ended the run; fails if nothing does in a while."""
    for result in results:
        if result.lost is not None:
            assert not result.divergences  # a loss is no divergence
            assert next(results, None) is None
            return result.lost
    raise AssertionError("the run ended")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_qemu_killed(strict: bool) -> None:
    with own_machine() as (machine, pid, name):
        results = endless(machine, strict)
        for _ in range(3):
            assert next(results).lost is None
        killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
        killer.start()
        start = time.monotonic()
        lost = last(results)
        assert time.monotonic() - start < 60
        killer.join()
        assert "QEMU exited with status -9" in lost.reason
        assert machine.identity.qemu in lost.argv and name in lost.argv
        assert (lost.last_record.startswith("#") and "ENTER" in lost.last_record) or "EXIT" in lost.last_record or (
            "SYNC" in lost.last_record)
        text = str(lost)
        assert "machine lost" in text and name in text and lost.last_record in text


def test_qemu_hangs() -> None:
    with own_machine() as (machine, pid, _):
        results = endless(machine)
        assert next(results).lost is None
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        lost = last(results)
        assert 4 < time.monotonic() - start < 60
        assert "hangs" in lost.reason and lost.last_record
        start = time.monotonic()
    assert time.monotonic() - start < 60  # to end a QEMU that does not answer


def test_l1_takes_an_exception(kernel: Path) -> None:
    """A UD2 in L1 itself, where the benchmark's loop is: which exception it was, and where, is told."""
    with kernel.open("rb") as file:
        table: Any = ELFFile(file).get_section_by_name(".symtab")
        (spin,) = table.get_symbol_by_name("l1_spin")
    with own_machine() as (machine, _, _):
        at = spin["st_value"]
        machine.memory[at : at + 2] = b"\x0f\x0b"
        machine.channel.post(encode([Step("SPIN", a=machine.image.vmcbs.start, b=1)]))
        start = time.monotonic()
        with pytest.raises(MachineLost, match=f"L1 took exception 6 at RIP {at:#x}"):
            machine.channel.next_record(machine.idle)
        assert time.monotonic() - start < 60


def test_l1_triple_faults() -> None:
    """L1 without PAE in its own CR4 is at an end; QEMU, told not to reboot, exits."""
    with own_machine() as (machine, _, _):
        program = Compiler(machine.image, machine.cpu).compile(one('host = "cr4"\nvalue = 0x600', "read a"))
        twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
        (result,) = Lockstep(machine, machine.channel, twin, strict=True).run([program])
        assert result.lost is not None and "triple fault" in result.lost.reason


def test_qemu_quits_by_itself() -> None:
    with own_machine() as (machine, _, _):
        results = endless(machine)
        assert next(results).lost is None
        machine._process.command("quit")
        assert "QEMU" in last(results).reason


class Mine(Exception):
    pass


def _raise_if(up: bool) -> None:
    assert up
    raise Mine


def test_no_qemu_left_after_an_exception() -> None:
    name = unique()
    with pytest.raises(Mine), tcg.start(extra=["-name", name]):
        _raise_if(len(named(name)) == 1)
    assert named(name) == []


def test_nothing_leaks() -> None:
    """Neither descriptors nor mappings of the guest's memory, boot after boot."""

    def held() -> tuple[int, int]:
        gc.collect()
        with open("/proc/self/maps", encoding="ascii") as maps:
            return len(os.listdir("/proc/self/fd")), sum("twinwalk-ram" in line for line in maps)

    def boot() -> None:
        with tcg.start() as machine:
            assert machine.cpu.maxphyaddr

    boot()
    before = held()
    for _ in range(3):
        boot()
    assert held() == before


BOOT = """
import sys, time
from harness.machine import tcg
with tcg.start(extra=["-name", sys.argv[1]]):
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_no_qemu_left_after_the_parents_end(end: signal.Signals) -> None:
    name = unique()
    parent = subprocess.Popen([sys.executable, "-c", BOOT, name], env=ENV, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    assert len(named(name)) == 1
    parent.send_signal(end)
    assert parent.wait(60) != 0
    assert gone(name, 60)
    parent.stdout.close()


def test_ctrl_c() -> None:
    """On a terminal: the run ends at once, with 130, no traceback, and no QEMU."""
    name = unique()
    argv = ["-m", "harness.cli", "run", "--qemu-arg=-name", f"--qemu-arg={name}"]
    child = pexpect.spawn(sys.executable, argv, env=ENV, cwd=str(ROOT), timeout=120, encoding="utf-8")
    wait_for(name)
    time.sleep(0.5)
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130, child.before
    assert "Traceback" not in (child.before or "")
    assert gone(name, 60)


TALKATIVE = """
import sys
from harness import cli
from harness.report import terminal
terminal._PAUSE = 0.1
sys.exit(cli.main())
"""
CASES = 30_000


def _told(child: subprocess.Popen[str], cases: int) -> None:
    """Wait until so many cases are done."""
    assert child.stdout is not None
    told = (re.match(rf"([\d,]+) of {CASES:,} scenarios", line) for line in child.stdout)
    assert any(match and int(match[1].replace(",", "")) >= cases for match in told)


def test_ctrl_c_in_a_sweep(tmp_path: Path) -> None:
    """What was done is told, and recorded: the next run goes on in front of the first case that is missing."""
    name, record = unique(), tmp_path / "record"
    argv = [sys.executable, "-c", TALKATIVE, "run", "-k", "sweeps/table", "--budget", str(CASES), "--pipelined",
            "--record", str(record), "--qemu-arg=-name", f"--qemu-arg={name}"]
    child = subprocess.Popen(argv, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)
    _told(child, 300)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130 and "Traceback" not in err
    assert gone(name, 60)
    (done,) = (int(line.split()[-1].replace(",", "")) for line in out.splitlines() if "cases of sweeps" in line)
    assert 300 <= done < CASES
    before = json.loads(record.read_text())["done"] if record.read_text() else 0
    assert 0 <= before <= done
    again = subprocess.run([*argv, "--budget", "5"], env=ENV, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not before or f"{before:,} of sweeps/table" in again.stdout


def _workers(parent: int) -> list[int]:
    """Pids of the processes that a run with --jobs has made, QEMUs left out."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"-accel" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _lives(pid: int) -> bool:
    """Whether there is such a process, and no mere zombie that waits for init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("whom", ["group", "parent", "killed parent", "worker"])
def test_no_orphan_of_many_jobs(whom: str, tmp_path: Path) -> None:
    """However a run with several machines ends: no process is left of it, and what was checked is told."""
    name, report = unique(), tmp_path / "out.json"
    argv = [sys.executable, "-c", TALKATIVE, "run", "-k", "sweeps/table", "--budget", str(CASES), "--pipelined",
            "--jobs", "2", "--json", str(report), "--qemu-arg=-name", f"--qemu-arg={name}"]
    child = subprocess.Popen(argv, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)
    _told(child, 400)
    workers = _workers(child.pid)
    assert len(workers) == 2 == len(named(name))
    match whom:
        case "group":
            os.killpg(child.pid, signal.SIGINT)
        case "parent":
            os.kill(child.pid, signal.SIGINT)
        case "killed parent":
            os.kill(child.pid, signal.SIGKILL)
        case _:
            os.kill(workers[0], signal.SIGKILL)
    out, err = child.communicate(timeout=120)
    assert gone(name, 60) and not any(_lives(pid) for pid in workers)
    assert child.returncode == {"killed parent": -signal.SIGKILL, "worker": 3}.get(whom, 130)
    assert "Traceback" not in err and ("was killed by SIGKILL" in err) == (whom == "worker")
    if whom != "killed parent":
        assert "cases of sweeps" in out and 400 <= json.loads(report.read_text())["totals"]["sweep_cases"] < CASES


def test_a_reboot_costs_one_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    """harness.run: a machine that is lost is booted anew, and the rest goes on."""
    from harness import run as runner

    scenarios = [one("read a", name=f"s{n}") for n in range(4)]
    scenarios[1] = one('host = "cr4"\nvalue = 0x600', "read a", name="s1")
    outcome = runner.run(Target(), scenarios)
    assert [r.scenario for r in outcome.results] == ["s0", "s1", "s2", "s3"]
    assert [r.lost is not None for r in outcome.results] == [False, True, False, False]
    assert outcome.lost and outcome.not_run == 0 and outcome.exit_code() == 3
    assert all(not r.divergences for r in outcome.results)


def test_a_machine_that_is_lost_again_and_again() -> None:
    from harness import run as runner
    from harness.session import MAX_LOST

    bad = [one('host = "cr4"\nvalue = 0x600', run("read a"), name=f"s{n}") for n in range(7)]
    outcome = runner.run(Target(), bad)
    assert len(outcome.results) == MAX_LOST and outcome.not_run == 7 - MAX_LOST
    assert outcome.exit_code() == 3

