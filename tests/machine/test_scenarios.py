"""Scenarios on guests that really boot: agreement, in both modes, in any order, after any other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

import pytest

from harness.lockstep import errata as errata_files
from harness.lockstep.compare import Divergence
from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine import tcg
from harness.run import run as run_all
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler, world_key
from harness.target import Target
from tests.conftest import LIBRARY
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest

_DEADLY = {LIBRARY / f"{name.partition('[')[0]}.toml" for known in errata_files.load(LIBRARY / files.ERRATA_FOLDER)
           if known.hazard and known.machine == "qemu-tcg" for name in known.shown}

SAMPLE = [files.read(path)[-1] for path in files.find([LIBRARY]) if path not in _DEADLY]
"""One scenario of each file, but such as end a QEMU; all of them are what `twinwalk run` is for."""

FEW = SAMPLE[::4]


def check(
    machine: tcg.TcgMachine, scenarios: Sequence[Scenario], errata: Sequence[Erratum] = (), strict: bool = True
) -> list[Result]:
    compiler = Compiler(machine.image, machine.cpu)
    twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    known = [e for e in errata if e.holds_for("qemu-tcg", machine.identity.qemu_version)]
    programs = [compiler.compile(s) for s in scenarios]
    results = list(Lockstep(machine, machine.channel, twin, strict, known).run(programs))
    assert [str(r.lost) for r in results if r.lost] == []
    return results


def verdict(result: Result) -> tuple[object, ...]:
    found = [(d.op, d.probe, d.check, d.field, d.expected,
              "done" if str(d.expected).startswith("VMEXIT_RDTSC") else d.observed,  # what a TSC says is never the same
              d.erratum) for d in result.divergences]
    return result.scenario, result.vmruns, result.probes, result.lost, found


def test_first_light(machine: tcg.TcgMachine) -> None:
    scenario = one("read a; write b+8; rmw c; fetch d+0x20", run("read a; write b+8; rmw c; fetch d+0x20", 3))
    (result,) = check(machine, [scenario])
    assert (result.divergences, result.lost, result.vmruns, result.probes) == ([], None, 2, 8)


def test_what_it_is(machine: tcg.TcgMachine) -> None:
    identity = machine.identity
    assert identity.machine == "tcg" and identity.qemu_version >= (5, 2, 0) and identity.cpu_model == "max"
    assert identity.maxphyaddr == machine.cpu.maxphyaddr >= 36 and identity.asids > 1 and identity.svm_revision == 1
    assert {"nx", "page1g"} <= set(identity.features) and machine.cpu.page1g


def test_l1_says_whether_it_is_well(machine: tcg.TcgMachine) -> None:
    assert machine.channel.panic() == ""
    hello = machine.channel.hello()
    assert hello is not None and hello["maxphyaddr"] == machine.cpu.maxphyaddr


def _new(results: Sequence[Result]) -> list[Divergence]:
    return [d for r in results for d in r.divergences if d.erratum is None]


@pytest.fixture(scope="module")
def strict_verdicts(machines: object, errata: list[Erratum]) -> dict[str, tuple[object, ...]]:
    return {r.scenario: verdict(r) for r in check(machines.get(), FEW, errata)}  # type: ignore[attr-defined]


def test_the_sample_agrees(machine: tcg.TcgMachine, errata: list[Erratum]) -> None:
    """On stock QEMU: nothing but known errata."""
    results = check(machine, SAMPLE, errata)
    assert [(d.scenario, d.op, d.probe, d.check, d.field, d.expected, d.observed) for d in _new(results)] == []
    assert all(r.lost is None for r in results) and len(results) == len(SAMPLE)


def test_pipelined_gives_the_same_verdicts(
    machine: tcg.TcgMachine, errata: list[Erratum], strict_verdicts: dict[str, tuple[object, ...]]
) -> None:
    """Design, lockstep contract 2. (Live memory is compared in strict mode alone; what a record shows is the same.)"""
    for result in check(machine, FEW, errata, strict=False):
        assert verdict(result) == strict_verdicts[result.scenario]


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order(
    seed: int, machine: tcg.TcgMachine, errata: list[Erratum], strict_verdicts: dict[str, tuple[object, ...]]
) -> None:
    """Contract 4: the same after any other."""
    shuffled = random.Random(seed).sample(FEW, len(FEW))
    for result in check(machine, shuffled, errata, strict=bool(seed & 1)):
        assert verdict(result) == strict_verdicts[result.scenario]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_in_batches(
    strict: bool, machine: tcg.TcgMachine, errata: list[Erratum], strict_verdicts: dict[str, tuple[object, ...]]
) -> None:
    """A batch has one reset for many scenarios: each puts back what it changed, so that it makes no difference."""
    compiler = Compiler(machine.image, machine.cpu)
    twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    known = [e for e in errata if e.holds_for("qemu-tcg", machine.identity.qemu_version)]
    shuffled = sorted(random.Random(4).sample(FEW, len(FEW)), key=world_key)
    batches = [list(batch) for _, batch in groupby(shuffled, key=world_key)]
    assert max(map(len, batches)) > 10
    programs = (program for batch in batches for program in compiler.batch(batch))
    for result in Lockstep(machine, machine.channel, twin, strict, known).run(programs):
        assert verdict(result) == strict_verdicts[result.scenario] and not result.senseless


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_one_that_makes_no_sense(strict: bool, machine: tcg.TcgMachine) -> None:
    """L2 reads what is no page of its own, and nobody can say what it finds there: the others do not mind."""
    compiler = Compiler(machine.image, machine.cpu)
    twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    good = ("write a; read b", run("read a", 3))
    senseless = one('entry = "nested.a.pte"\nvalue = 0x1007', run("read a; write b"), run("read b"), name="senseless")
    batch = [one(*good), senseless, one(*good), senseless, senseless, one(*good), senseless]
    lockstep = Lockstep(machine, machine.channel, twin, strict)
    results = [*lockstep.run(compiler.batch(batch)), *lockstep.run(map(compiler.compile, batch))]
    for result, scenario in zip(results, batch * 2, strict=True):
        assert (result.divergences, result.lost, bool(result.senseless)) == ([], None, scenario is senseless)
    assert "senseless.toml:9: an access of gVA" in results[1].senseless


def test_alone_and_again(
    machine: tcg.TcgMachine, errata: list[Erratum], strict_verdicts: dict[str, tuple[object, ...]]
) -> None:
    for scenario in random.Random(3).sample(FEW, min(10, len(FEW))):
        for result in check(machine, [scenario], errata) + check(machine, [scenario] * 2, errata):
            assert verdict(result) == strict_verdicts[result.scenario]


def test_a_fresh_boot_gives_the_same(errata: list[Erratum], strict_verdicts: dict[str, tuple[object, ...]]) -> None:
    with tcg.start() as fresh:
        for result in check(fresh, FEW[::3], errata):
            assert verdict(result) == strict_verdicts[result.scenario]


def test_run(errata: list[Erratum]) -> None:
    """The whole way: boot, rehearse, run, explain."""
    seen: list[Result] = []
    outcome = run_all(Target(), SAMPLE[:5], errata, on_result=seen.append)
    assert outcome.results == seen and len(seen) == 5
    assert outcome.identity is not None and outcome.seconds > 0
    assert outcome.exit_code() in (0, 1) and not outcome.lost


@pytest.mark.parametrize("cpu", ["max,phys-bits=36", "max,phys-bits=48", "EPYC-Milan,+svm,+npt", "max,-pdpe1gb"])
def test_other_cpus(cpu: str, errata: list[Erratum]) -> None:
    """What CPUID says changes what is reserved, in the model as on the machine."""
    scenarios = [
        one("read a; write b; fetch c; rmw d"),
        one('entry = "guest.a.pte"\nset = ["bit47"]', "read a; write a"),
        one("read a; write a", head='nested_page = "2M"\nguest_page = "2M"\n'),
        one('entry = "nested.b.pde"\nclear = ["rw"]', run("read b; write b", 3)),
    ]
    with tcg.start(cpu_model=cpu) as fresh:
        assert fresh.cpu.page1g == ("pdpe1gb" not in cpu)
        if "phys-bits" in cpu:
            assert fresh.cpu.maxphyaddr == int(cpu[-2:])
        assert _new(check(fresh, scenarios, errata)) == []


def test_many(machine: tcg.TcgMachine) -> None:
    """Around both rings, several times."""
    scenario = one(*[run("read a; write b; read c; read d")] * 40)
    results = check(machine, [scenario] * 20, strict=False)
    assert [r.divergences for r in results] == [[]] * 20
    assert sum(r.vmruns for r in results) == 800


def test_what_l2_wrote_where_nobody_watches_is_gone(machine: tcg.TcgMachine) -> None:
    """L1 resets the pages that it watches; the checker sees to the others."""
    far = machine.image.arena.start + (1 << 20)
    stray = one(f'entry = "nested.a.pte"\nvalue = {far | 7:#x}', "write a", name="stray")
    first, second = check(machine, [stray, one("read a", name="next")])
    assert first.divergences == [] and second.divergences == []


def test_what_a_machine_wrote_that_cannot_be_followed_is_gone(machine: tcg.TcgMachine) -> None:
    """The model gives up on a program, the machine goes on and writes: the next program is none the wiser."""
    far = machine.image.arena.start + (1 << 20)
    lost = one(f'entry = "nested.b.pte"\nvalue = {far | 7:#x}', f'entry = "nested.a.pte"\nvalue = {1 << 39 | 7:#x}',
               "read a", run("write b"), name="lost")
    first, second = check(machine, [lost, one("read a", name="next")])
    assert first.senseless and second.divergences == []


def test_a_quirk_that_leads_where_nobody_can_follow(machine: tcg.TcgMachine, errata: list[Erratum]) -> None:
    """QEMU does not check the low bits of a nested PDPTE of PAE, and so comes to L2's page, which is a table. What it
    did until then is known, and so is that the rest goes unchecked. Of a machine not known for that all is new."""
    fetched = one('entry = "nested.a.pdpte"\nset = ["us"]', 'entry = "guest.a.pte"\nframe = "alt"', "read b; fetch a",
                  head='nested = "PAE"\n')
    (result,) = check(machine, [fetched], errata)
    *known, course = result.divergences
    assert known and all(one.erratum == "qemu-tcg-pae-pdpte" for one in known)
    assert (course.field, course.rule, course.erratum) == ("course", "lockstep", "qemu-tcg-pae-pdpte")
    (result,) = check(machine, [fetched], [one for one in errata if one.id != "qemu-tcg-pae-pdpte"])
    assert len(result.divergences) > 1 and _new([result]) == result.divergences


def test_where_entries_without_a_frame_lead_to(machine: tcg.TcgMachine) -> None:
    """The model has zeros there, firmware had its vectors."""
    assert bytes(machine.memory[:4096]) == bytes(4096)
    (result,) = check(machine, [one('entry = "guest.a.pde"\nvalue = 0x67', "read a")])
    assert result.divergences == []
