"""`twinwalk fuzz` on machines without QEMU; and a run that is killed, on a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from harness import fuzzing
from harness.errors import UsageError
from harness.fuzz_journal import FuzzJournal
from harness.fuzzing import Budget, Programs
from harness.lockstep.compare import Divergence
from harness.lockstep.result import Result
from harness.lockstep.signature import LOST, Signature
from harness.model.registers import Cpu
from harness.model.vmcb import ExitCode
from harness.run import Outcome, run
from harness.scenario import files
from harness.steering import CPU
from harness.target import Target
from harness.wire.image import Image
from tests.conftest import ROOT
from tests.lockstep.fake import Plant
from tests.quality.test_machine_faults import _Fault, field
from tests.test_run import FakeTarget, Loses

TCG = "--machine=tcg"


@pytest.fixture
def target(image: Image, cpu: Cpu) -> FakeTarget:
    return FakeTarget(image=image, of=cpu, plants=[Plant()])


def fuzz(
    target: Target, programs: int, journal: Path | None = None, pipelined: bool = False, seed: int = 0,
    corpus: Path | None = None, kept: int = 20,
) -> tuple[Outcome, FuzzJournal, Programs]:
    with FuzzJournal(journal, seed, "a target") as log:
        source = Programs(log, seed, Budget(programs=programs), corpus, kept)
        outcome = Outcome()
        run(target, [], (), pipelined, outcome=outcome, sweeps=source, max_lost=fuzzing.MAX_LOST)
    return outcome, log, source


both = pytest.mark.parametrize("pipelined", [False, True], ids=["strict", "pipelined"])


@both
def test_a_machine_that_does_as_it_should(target: FakeTarget, pipelined: bool) -> None:
    outcome, log, programs = fuzz(target, 150, pipelined=pipelined)
    (tally,) = programs.tallies
    assert (tally.done, outcome.new(), log.catches, tally.skipped, programs.left_off) == (150, 0, {}, 0, 0)
    assert tally.vmruns > 500
    assert len(target.boots) == 1


LOST_RIGHT = field("exitinfo1", lambda value: value & ~4, ExitCode.NPF)


@both
def test_a_fault_is_told_once(target: FakeTarget, pipelined: bool) -> None:
    target.plants[0] = _Fault(None, LOST_RIGHT)
    outcome, log, programs = fuzz(target, 150, pipelined=pipelined, kept=3)
    rules = {signature.rule for signature in log.catches}
    assert {(s.check, s.field) for s in log.catches} == {("C1", "exitinfo1")}
    assert rules > {"nested.present"} and all(rule.startswith("nested.") for rule in rules)
    assert sum(one.count for one in log.catches.values()) > 20
    kept = Counter(next(one.rule for one in result.divergences) for result in outcome.results)
    assert max(kept.values()) == 3
    assert programs.tallies[0].done == 150


def test_the_same_findings_whatever_machine(image: Image, cpu: Cpu) -> None:
    """What a machine does has no say in what is made."""
    names: list[set[str]] = []
    plants: tuple[Plant, ...] = (Plant(), _Fault(None, LOST_RIGHT))
    for plant in plants:
        target = FakeTarget(image=image, of=cpu, plants=[plant])
        with FuzzJournal(None, 3, "") as log:
            programs = Programs(log, 3, Budget(programs=60))
            seen: list[Result] = []
            run(target, [], on_result=seen.append, sweeps=programs)
        names.append({result.scenario for result in seen})
    assert names[0] == names[1] and len(names[0]) == 60


def test_a_machine_that_dies_is_a_finding_and_a_boot(image: Image, cpu: Cpu) -> None:
    target = FakeTarget(image=image, of=cpu, plants=[Loses(70), Loses(90), Plant()])
    outcome, log, programs = fuzz(target, 100)
    assert len(target.boots) == 3
    (catch,) = log.catches.values()
    assert (catch.signature.check, catch.count) == (LOST, 2)
    assert programs.tallies[0].done == 100
    assert outcome.exit_code() == 3


def test_another_cpu_is_asked_first(image: Image, cpu: Cpu) -> None:
    """What it cannot run is skipped and counted."""
    small = cpu._replace(features=cpu.features - {"la57", "second"})
    _, log, programs = fuzz(FakeTarget(image=image, of=small, plants=[Plant()]), 120)
    (tally,) = programs.tallies
    assert tally.skipped > 10 and tally.done + tally.skipped == 120
    assert not log.catches


def test_what_cannot_be_followed_behind_an_erratum_is_no_finding(image: Image) -> None:
    one = Divergence("x", 0, 0, "C1", "outcome", "sPA", "done", "nested.present", erratum="known")
    course = Divergence("x", 1, -1, "C1", "course", "one that can be followed", "why", "lockstep")
    with FuzzJournal(None, 0, "") as log:
        programs = Programs(log, 0, Budget(programs=1))
        (scenario,) = files.parse('title = "t"\nmanual = "1"\nshows = "s"\n[[op]]\nrun = ["read a"]\n', "x", "x")
        assert not programs.took(scenario, Result("x", divergences=[one, course]), False)
        assert programs.left_off == 1 and not log.catches
        assert programs.took(scenario, Result("x", divergences=[one._replace(erratum=None), course]), False)
        assert programs.left_off == 1 and len(log.catches) == 1


class TestCampaign:
    def test_a_full_disk(self, tmp_path: Path) -> None:
        def done() -> None:
            with FuzzJournal(tmp_path / "j", 3, "a target") as log:
                log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (the journal closes it)
                log.agreed("fuzz[3,0,0,1]")

        with pytest.raises(UsageError, match="make room, and start the same command again"):
            done()

    def test_goes_on(self, target: FakeTarget, tmp_path: Path) -> None:
        journal = tmp_path / "journal"
        target.plants[0] = _Fault(None, LOST_RIGHT)
        _, whole, _ = fuzz(target, 120)
        _, first, _ = fuzz(target, 50, journal)
        assert 0 < sum(one.count for one in first.catches.values()) < sum(one.count for one in whole.catches.values())
        _, second, programs = fuzz(target, 70, journal)
        assert (second.before, programs.tallies[0].done) == (50, 70)
        assert {s: one.count for s, one in second.catches.items()} == {s: one.count for s, one in whole.catches.items()}
        assert [one.scenario.ops for one in second.catches.values()] == [
            one.scenario.ops for one in whole.catches.values()]

    def test_over_the_end_of_a_block(
        self, target: FakeTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("harness.steering.BLOCK", 2)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        fuzz(target, 200, whole)
        for _ in range(4):
            fuzz(target, 50, parts)
        assert _programs(parts) == _programs(whole)
        assert len(set(_programs(whole))) == 200

    def test_half_a_line(self, target: FakeTarget, tmp_path: Path) -> None:
        whole, journal = tmp_path / "whole", tmp_path / "journal"
        fuzz(target, 60, whole)
        journal.write_bytes(whole.read_bytes()[:700])
        assert not journal.read_bytes().endswith(b"\n")
        before = len(_programs(journal))
        _, log, _ = fuzz(target, 60 - before, journal)
        assert log.before == before
        assert sorted(_programs(journal)) == sorted(_programs(whole))

    @pytest.mark.parametrize(("text", "says"), [
        ("{\"journal\": \"twinwalk fuzz\"}\n", ":1: this is no line of a journal"),
        ("hello\n", ":1: this is no line of a journal"),
        ('{"journal": "twinwalk fuzz", "programs": 0, "seed": 0, "target": "a target"}\n', ":1: this journal is of"),
        ("HEAD17\n", ":2: this is no line of a journal"),
        ('HEAD{"program": "fuzz[0,0,0,0]"}\n', ":2: this is no line of a journal"),
    ])
    def test_another_file(self, target: FakeTarget, tmp_path: Path, text: str, says: str) -> None:
        journal = tmp_path / "journal"
        fuzz(target, 1, journal)
        head = journal.read_text().splitlines(keepends=True)[0]
        journal.write_text(text.replace("HEAD", head))
        with pytest.raises(UsageError, match=says):
            fuzz(target, 1, journal)

    def test_another_seed(self, target: FakeTarget, tmp_path: Path) -> None:
        fuzz(target, 1, tmp_path / "journal")
        with pytest.raises(UsageError, match="of seed 0, not of 1"):
            fuzz(target, 1, tmp_path / "journal", seed=1)


def _programs(journal: Path) -> list[str]:
    """Those that are told in whole lines."""
    lines = journal.read_text().split("\n")
    entries = [json.loads(line) for line in lines[1:-1]]
    return [one if isinstance(one, str) else one["program"] for one in entries
            if isinstance(one, str) or "program" in one]


def test_a_corpus(target: FakeTarget, tmp_path: Path) -> None:
    """What reaches new cells is kept, and is run first the next time."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    _, _, first = fuzz(target, 60, corpus=corpus)
    kept = len(list(corpus.glob("*.toml")))
    assert 20 < kept <= 100
    _, _, second = fuzz(target, kept, corpus=corpus, seed=9)
    assert len(second.cells) > 0.8 * len(first.cells)
    assert len(list(corpus.glob("*.toml"))) == kept
    (corpus / "bad.toml").write_text("title = 3\n")
    with pytest.raises(UsageError, match=r"bad\.toml"):
        fuzz(target, 10, corpus=corpus)


@pytest.mark.parametrize(("text", "budget"), [
    ("20s", Budget(seconds=20)), ("5m", Budget(seconds=300)), ("1h", Budget(seconds=3600)), ("1_000", Budget(1000)),
])
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.of(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "3d", "1.5s", "0s"])
def test_no_budgets(text: str) -> None:
    with pytest.raises(Exception, match="no budget"):
        Budget.of(text)


def test_programs_are_made_for_what_all_machines_have(cpu: Cpu) -> None:
    assert cpu._replace(features=cpu.features - {"second"}) == CPU


# --- the command -----------------------------------------------------------------------------------


def command(*arguments: str, journal: Path | None = None, lines: int = 0) -> subprocess.CompletedProcess[str]:
    """`twinwalk fuzz`; with a `journal` it is killed as soon as that has more than so many lines."""
    argv = [sys.executable, "-m", "harness.cli", "fuzz", TCG, *arguments]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while journal is not None and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    output, _ = process.communicate()
    return subprocess.CompletedProcess(argv, process.returncode, output)


@pytest.mark.guest
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """kill -9, three times; then the run is what one that nobody killed is, and no process is left."""
    others = _children_of(os.getpid())
    whole, journal = tmp_path / "whole", tmp_path / "journal"
    total = 200
    command("--budget", str(total), "--journal", str(whole))
    for lines in (20, 60, 110):
        killed = command("--budget", "1000000", "--journal", str(journal), journal=journal, lines=lines)
        assert killed.returncode == -signal.SIGKILL
    before = len(_programs(journal))
    assert before < total
    last = command("--budget", str(total - before), "--journal", str(journal), "--json", str(tmp_path / "j"))
    assert last.returncode in (0, 1, 3), last.stdout
    assert sorted(_programs(journal)) == sorted(_programs(whole))
    assert _found(journal) == _found(whole)
    assert json.loads((tmp_path / "j").read_text())["fuzz"]["before"] == before
    assert _children_of(os.getpid()) == others


def _found(journal: Path) -> Counter[Signature]:
    entries = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    return Counter(Signature(*one["signature"]) for one in entries if isinstance(one, dict) and "signature" in one)


def _children_of(parent: int) -> list[str]:
    """Command lines of processes of this session that were started by nobody else."""
    listed = subprocess.run(["ps", "-o", "args=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    return [one for one in listed.stdout.splitlines() if "qemu" in one or "harness.cli" in one]


@pytest.mark.guest
def test_an_exact_number_of_programs(tmp_path: Path) -> None:
    done = command("--budget", "37", "--seed", "4", "--pipelined", "--json", str(tmp_path / "j"))
    result = json.loads((tmp_path / "j").read_text())
    assert result["fuzz"]["programs"] == 37 and result["totals"]["vmruns"] > 100
    assert done.returncode == (1 if result["totals"]["divergences_new"] else 0)
    assert "37 of seed 4" in done.stdout
