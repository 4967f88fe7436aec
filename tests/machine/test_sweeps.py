"""Sweeps on guests that really boot: in batches and alone, strict and pipelined, forwards and backwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import groupby, islice
from pathlib import Path

import pytest

from harness import cli
from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine import tcg
from harness.run import run as run_all
from harness.scenario import files, sweepfiles
from harness.scenario.cover import sequence
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler, Program, world_key
from harness.sweeping import Plan
from harness.target import Target
from tests.conftest import LIBRARY
from tests.machine.test_scenarios import verdict

pytestmark = pytest.mark.guest

SWEEPS = sweepfiles.load([LIBRARY])
CASES = [sweep.scenario(case) for sweep in SWEEPS for _, case in islice(sequence(sweep.space, 0), 40)]


def check(
    machine: tcg.TcgMachine, scenarios: Iterable[Scenario], errata: list[Erratum], strict: bool, batches: bool
) -> dict[str, tuple[object, ...]]:
    compiler = Compiler(machine.image, machine.cpu)
    twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    known = [e for e in errata if e.holds_for("qemu-tcg", machine.identity.qemu_version)]

    def programs() -> Iterable[Program]:
        for batch in [list(batch) for _, batch in groupby(scenarios, key=world_key)]:
            yield from compiler.batch(batch) if batches else map(compiler.compile, batch)

    results: list[Result] = list(Lockstep(machine, machine.channel, twin, strict, known).run(programs()))
    assert [r.senseless for r in results if r.senseless] == []
    return {result.scenario: verdict(result) for result in results}


@pytest.fixture(scope="module")
def alone(machines: object, errata: list[Erratum]) -> dict[str, tuple[object, ...]]:
    """Each case from a reset of its own."""
    return check(machines.get(), CASES, errata, strict=True, batches=False)  # type: ignore[attr-defined]


def test_there_are_no_new_divergences(alone: dict[str, tuple[object, ...]]) -> None:
    assert len(alone) == len(CASES)
    for name, (_, _, _, lost, found) in alone.items():
        assert isinstance(found, list)
        assert lost is None and [one for one in found if one[-1] is None] == [], name


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_in_batches(
    strict: bool, backwards: bool, machine: tcg.TcgMachine, errata: list[Erratum], alone: dict[str, tuple[object, ...]]
) -> None:
    """The same verdict as alone, after any other."""
    order = sorted(CASES[::-1] if backwards else CASES, key=world_key)
    assert check(machine, order, errata, strict, batches=True) == alone


def test_a_run(errata: list[Erratum]) -> None:
    """The whole way: what was done is said, and a case that agrees leaves no result behind."""
    plan = Plan(SWEEPS, 20 * len(SWEEPS), seed=5)
    outcome = run_all(Target(), [], errata, pipelined=True, sweeps=plan)
    assert outcome.exit_code() == 0 and outcome.results == [] and outcome.not_run == 0
    assert [tally.done for tally in outcome.tallies] == [20] * len(SWEEPS)
    assert all(tally.probes >= 19 and 0 < tally.pairs < tally.pairs_total for tally in outcome.tallies)


def test_machines_at_once(errata: list[Erratum], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same JSON, and the same words, from one and from two."""
    reports = []
    for jobs in "1", "2":
        path = tmp_path / jobs
        assert cli.main(["run", "--machine", "tcg", "--pipelined", "-k", "sweeps/ or delivery/", "--budget", "600",
                         "--strict", "--jobs", jobs, "--json", str(path)]) == 1
        report = json.loads(path.read_text())
        del report["totals"]["seconds"]
        said = capsys.readouterr().out.splitlines()
        shown = [line for line in said if not re.search(r"\d s(  |$)|^  seconds ", line)]
        reports.append((report, shown))
    assert reports[0] == reports[1] and len(reports[0][0]["divergences"]) > 1000


class TestCommand:
    def run(self, tmp_path: Path, *argv: str) -> dict[str, object]:
        report = tmp_path / "out.json"
        assert cli.main(["run", "--machine", "tcg", "--pipelined", "--json", str(report), *argv]) == 0
        return dict(json.loads(report.read_text()))

    def test_budget(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = self.run(tmp_path, "-k", "sweeps/joint or sweeps/ad", "--budget", "60")
        assert data["totals"]["sweep_cases"] == 60 and data["totals"]["sweeps"] == 2  # type: ignore[index]
        assert [(s["name"], s["done"]) for s in data["sweeps"]] == [  # type: ignore[attr-defined]
            ("sweeps/ad", 30), ("sweeps/joint", 30)]
        out = capsys.readouterr().out
        assert "cases done" in out and "triples" in out and f"{data['sweeps'][1]['total']:,}" in out  # type: ignore[index]

    def test_record(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = "-k", "sweeps/table", "--budget", "25", "--record", str(tmp_path / "record")
        assert [self.run(tmp_path, *argv)["sweeps"][0]["before"] for _ in range(2)] == [0, 25]  # type: ignore[index]
        assert "by the record: 25 of sweeps/table" in capsys.readouterr().out

    def test_one_case(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """By its name, as it is told; and as a file."""
        name = CASES[50].name
        totals = self.run(tmp_path, "-k", name)["totals"]
        assert (totals["scenarios"], totals["sweep_cases"]) == (1, 0)  # type: ignore[index]
        capsys.readouterr()
        assert cli.main(["list", "-k", name, "--write", str(tmp_path / "new")]) == 0
        assert capsys.readouterr().out.startswith(name)
        (scenario,) = files.load([tmp_path / "new"])
        assert scenario.ops == CASES[50].ops
        assert self.run(tmp_path, str(tmp_path / "new"))["totals"]["scenarios"] == 1  # type: ignore[index]

    def test_exhaustive(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", "--machine", "tcg", "-k", "sweeps/joint", "--exhaustive"]) == 2
        err = capsys.readouterr().err
        assert "sweeps/joint" in err and "--budget N" in err
        path = tmp_path / "small.toml"
        path.write_text('title = "t"\nmanual = "15.25"\nshows = "s"\n[axis]\nprobe = ["read", "write", "fetch"]\n'
                        'cpl = [0, 3]\n[[op]]\nrun = ["{probe} a"]\ncpl = "{cpl}"\n')
        data = self.run(tmp_path, str(path), "--exhaustive")
        assert data["sweeps"][0]["done"] == data["sweeps"][0]["total"] == 6  # type: ignore[index]

    def test_no_such_case(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", "-k", "sweeps/ad[x]"]) == 2
        assert "1 values for the" in capsys.readouterr().err

    def test_a_case_that_makes_no_sense(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The others are run and reported, and then the file is to blame."""
        path = tmp_path / "far.toml"
        path.write_text('title = "t"\nmanual = "15.25"\nshows = "s"\n[axis]\nprobe = ["read", "write"]\n[axis.far]\n'
                        'no = {}\nyes = { value = 0x1007 }\n[[op]]\nentry = "nested.a.pte"\napply = ["far"]\n'
                        '[[op]]\nrun = ["{probe} a"]\n')
        assert cli.main(["run", "--machine", "tcg", str(path)]) == 2
        out = capsys.readouterr()
        assert "cases of sweeps" in out.out and f"{path}:12: " in out.err and "in far[" in out.err
