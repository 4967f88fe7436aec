"""`twinwalk campaign` on real workers: processes of this host, some of which are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.machine.sshd import serving

pytestmark = pytest.mark.guest

PYTHON = sys.executable


class Fleet:
    """A scheduler and workers of one thread each."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.environment = os.environ | {"DASK_TEMPORARY_DIRECTORY": str(folder), "TMPDIR": str(folder)}
        file = folder / "scheduler.json"
        self._start("dask_scheduler", f"--scheduler-file={file}", "--port=0", "--host=127.0.0.1")
        _until(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler")
        self.address: str = json.loads(file.read_text())["address"]
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self) -> subprocess.Popen[bytes]:
        started = self._start("dask_worker", self.address, "--nthreads=1", "--no-nanny", "--host=127.0.0.1")
        self.workers.append(started)
        return started

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [PYTHON, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"], env=self.environment,
            stdout=subprocess.DEVNULL, stderr=(self.folder / f"{module}.log").open("ab"), cwd=self.folder)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def campaign(self, *arguments: object, **more: Any) -> subprocess.Popen[str]:
        """`-k walk/` in shards, with what is given beside."""
        return subprocess.Popen(
            [PYTHON, "-m", "harness.cli", "campaign", "--scheduler", self.address, "--machine", "tcg", "--budget", "0",
             "--json", str(self.folder / "result.json"), *map(str, arguments)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)

    def result(self) -> Any:
        return json.loads((self.folder / "result.json").read_text())

    def shards(self) -> list[int]:
        """Pids of processes that do shards, and of their machines."""
        return [int(entry.name) for entry in Path("/proc").iterdir()
                if entry.name.isdigit() and self._is_ours(entry)]

    def _is_ours(self, entry: Path) -> bool:
        try:
            argv = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            return False
        return f"TMPDIR={self.folder}".encode() in environment and (b"shardworker" in argv or b"-accel" in argv)

    def left(self) -> list[str]:
        """Folders of shards that are there."""
        return [path.name for path in self.folder.glob("twinwalk-*")]


def _until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited for {what} in vain"
        time.sleep(0.05)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


def test_a_worker_dies_and_nothing_is_lost_or_counted_twice(fleet: Fleet) -> None:
    alone = subprocess.run([PYTHON, "-m", "harness.cli", "run", "--machine", "tcg", "--budget", "0", "-k", "walk/table",
                            "--json", str(fleet.folder / "alone.json")], cwd=ROOT, check=True, capture_output=True)
    assert alone.returncode == 0
    whole = json.loads((fleet.folder / "alone.json").read_text())["totals"]
    first, _ = fleet.worker(), fleet.worker()
    running = fleet.campaign("-k", "walk/table", "--shards", 4, "--journal", fleet.folder / "journal")
    _until(lambda: len(fleet.shards()) >= 4, "two shards with machines")
    first.kill()
    out, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    totals = fleet.result()["totals"]
    assert totals["shards"] == 4
    for name in ("scenarios", "vmruns", "probes", "table_bytes_compared", "divergences_known"):
        assert totals[name] == whole[name], name
    assert "nothing new found" in out and fleet.result()["left"] == []
    journal = [json.loads(line) for line in (fleet.folder / "journal").read_text().splitlines()]
    assert len(journal) == 5 and len({tuple(one["shard"]) for one in journal[1:]}) == 4
    _until(lambda: not fleet.shards() and not fleet.left(), "the killed worker's shard to end", 30)


def test_the_campaign_dies_and_goes_on(fleet: Fleet) -> None:
    fleet.worker()
    journal = fleet.folder / "journal"
    arguments = ("-k", "walk/table", "--shards", 3, "--fuzz", "3", "--programs", 20, "--journal", journal)
    running = fleet.campaign(*arguments)
    _until(lambda: journal.exists() and journal.read_text().count("\n") >= 2, "a shard")
    running.kill()
    running.communicate()
    done = journal.read_text().count("\n") - 1
    _until(lambda: not fleet.shards(), "the worker to see that nobody wants it any more", 60)
    running = fleet.campaign(*arguments)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert f"{done} of 4 shards are done" in said and fleet.result()["totals"]["shards"] == 4


def test_ctrl_c_ends_what_runs_there(fleet: Fleet) -> None:
    fleet.worker()
    running = fleet.campaign("--shards", 1)
    _until(lambda: len(fleet.shards()) >= 2, "a shard with a machine")
    running.send_signal(signal.SIGINT)
    out, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "0 of 1" in out, said
    assert fleet.shards() == [] and fleet.left() == []


def test_what_is_found_is_found_once(fleet: Fleet) -> None:
    """With errata counted, many shards show the same."""
    fleet.worker()
    out, said = fleet.campaign("-k", "modes/nested-pae", "--shards", 2, "--strict").communicate(timeout=120)
    found = fleet.result()["findings"]
    assert found and len({(one["check"], one["field"], one["rule"]) for one in found}) == len(found), said
    assert sum(one["count"] for one in found) > len(found)
    assert all(one["shard"][0] == "run" and one["what"] in " ".join(out.split()) for one in found)


@pytest.mark.parametrize(("arguments", "code", "why"), [
    (("-k", "walk/table-read-only", "--qemu", "/nowhere/qemu"), 3, "no shard could be done: twinwalk: no QEMU at"),
    (("--machine", "ssh://other/tcg"), 2, "here only"),
    (("-k", "zebra"), 2, "matches none"),
])
def test_wrong_use(fleet: Fleet, arguments: tuple[str, ...], code: int, why: str) -> None:
    fleet.worker()
    running = fleet.campaign(*arguments)
    _, said = running.communicate(timeout=60)
    assert running.returncode == code and why in said


def test_no_scheduler() -> None:
    running = subprocess.run(
        [PYTHON, "-m", "harness.cli", "campaign", "--scheduler", "tcp://127.0.0.1:1", "--machine", "tcg", "-k",
         "walk/table-read-only"], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert running.returncode == 3 and "no scheduler answers at tcp://127.0.0.1:1" in running.stderr


def test_workers_over_ssh(tmp_path: Path) -> None:
    with serving(tmp_path / "sshd") as server:
        line = f"{server.user}@127.0.0.1:{server.port}\n"
        (tmp_path / "hosts").write_text(line)
        command = [PYTHON, "-m", "harness.cli", "campaign", "--hosts", str(tmp_path / "hosts"), "--machine", "tcg",
                   "-k", "walk/table", "--budget", "0", "--shards", "2"]
        running = subprocess.run(command, cwd=ROOT, env=server.environment, capture_output=True, text=True, timeout=180)
        assert running.returncode == 0 and "2 of 2" in running.stdout, running.stderr
        _until(lambda: not server.processes(), "the workers to end", 60)
        server.known.write_text("")
        running = subprocess.run(command, cwd=ROOT, env=server.environment, capture_output=True, text=True, timeout=180)
        assert running.returncode == 3 and "no workers could be started on 127.0.0.1" in running.stderr
