"""Old translations on guests that really boot: no verdict depends on timing, a flush that is not done is found."""

from __future__ import annotations

from itertools import islice
from typing import Final

import pytest

from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine import tcg
from harness.model.tlb_events import INVLPG
from harness.scenario import sweepfiles
from harness.scenario.cover import sequence
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler, world_key
from tests.conftest import LIBRARY
from tests.machine.test_scenarios import check, verdict
from tests.scenario.texts import one

pytestmark = pytest.mark.guest

TIMES: Final = 100
FAMILIES: Final = ("litmus-own", "litmus-exit", "litmus-second")


def cases(family: str, count: int) -> list[Scenario]:
    sweep = sweepfiles.read(LIBRARY / "sweeps" / f"{family}.toml")
    return [sweep.scenario(case) for _, case in islice(sequence(sweep.space, 5), count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_times(family: str, machine: tcg.TcgMachine, errata: list[Erratum]) -> None:
    """Each time the same verdict, whichever of the permitted outcomes the machine had."""
    compiler, twin = Compiler(machine.image, machine.cpu), Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    known = [e for e in errata if e.holds_for("qemu-tcg", machine.identity.qemu_version)]
    programs = [program for case in sorted(cases(family, 6), key=world_key)
                for program in [compiler.compile(case)] * TIMES]
    seen: dict[str, list[Result]] = {}
    for result in Lockstep(machine, machine.channel, twin, False, known).run(programs):
        assert result.lost is None and not result.senseless
        seen.setdefault(result.scenario, []).append(result)
    for name, results in seen.items():
        assert len(results) == TIMES
        assert all(verdict(result) == verdict(results[0]) for result in results), name
        assert {result.stale_permitted for result in results} == {results[0].stale_permitted}


@pytest.mark.parametrize("before", ["read a", "write a+8"])
@pytest.mark.parametrize("change", ["&guest.b.pte", "&guest.a.pte-p", "&guest.a.pte-rw", "&guest.a.pte+nx"])
def test_a_flush_that_is_not_done(change: str, before: str, machine: tcg.TcgMachine) -> None:
    """L2 is given a program with INVLPG of another page, and the checker believes that it was this one."""
    last = "write a+0x10" if change.endswith("-rw") else "fetch a+0x20" if change.endswith("nx") else "read a+0x10"
    done, believed = (f"{before}; write guest.a.pte = {change}; invlpg {page}; {last}" for page in "ca")
    compiler, twin = Compiler(machine.image, machine.cpu), Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    program = compiler.compile(one(believed))
    program.__dict__["encoded"] = compiler.compile(one(done)).encoded
    (result,) = Lockstep(machine, machine.channel, twin, True).run([program])
    if change.endswith("-rw") and before == "read a":  # a clean translation is no use to a write
        assert result.divergences == []
    else:
        assert {divergence.rule for divergence in result.divergences} == {INVLPG}
    (right,) = check(machine, [one(believed)])
    assert right.divergences == []


@pytest.mark.parametrize("entry", ["guest.a.pte", "nested.a.pte"])
def test_a_second_processor(entry: str, machine: tcg.TcgMachine) -> None:
    """What it writes is not seen in the TLB of the first one; a VMRUN behind its NMI flushes."""
    write = f'entry = "{entry}"\nframe = "b"\nby = "second"'
    (alone,) = check(machine, [one(write, "read a; remote; read a+8")])
    assert (alone.divergences, alone.stale_permitted, alone.stale_seen) == ([], 1, 1)
    intercept = 'vmcb = "intercept_misc1"\nset = ["bit1"]'
    (shot,) = check(machine, [one(intercept, write, "read a; remotenmi; read a+8")])
    assert (shot.divergences, shot.vmruns, shot.stale_seen) == ([], 2, 0)
