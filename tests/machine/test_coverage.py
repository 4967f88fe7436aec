"""The library reaches every cell that a run on QEMU can reach, so that a new rule without a scenario fails here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.lockstep.coverage import Coverage
from harness.lockstep.errata import Erratum
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.machine import tcg
from harness.model.coverage import Cell
from harness.model.universe import universe
from harness.report.coverage import Covered, merge
from harness.run import run
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from harness.target import Target
from tests.conftest import LIBRARY, Machines

pytestmark = pytest.mark.guest


Rehearsed = list[tuple[Scenario, frozenset[Cell]]]


def rehearse_all(machine: tcg.TcgMachine) -> Iterator[tuple[Scenario, frozenset[Cell]]]:
    """Each scenario of the library with what it reaches on the model."""
    compiler, twin = Compiler(machine.image, machine.cpu), Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    for scenario in files.load([LIBRARY]):
        coverage = Coverage()
        rehearse(twin, compiler.compile(scenario), lambda seen, to=coverage: to.add(seen, twin.host.dr7))  # type: ignore[misc]
        yield scenario, frozenset(coverage.cells)


@pytest.fixture(scope="module")
def library(machines: Machines) -> Rehearsed:
    return list(rehearse_all(machines.get()))


def enough(scenarios: Rehearsed) -> list[Scenario]:
    """Scenarios that reach together what all reach: each of them something that those before it do not."""
    known: set[Cell] = set()
    chosen = []
    for scenario, cells in sorted(scenarios, key=lambda each: -len(each[1])):
        if not cells <= known:
            known |= cells
            chosen.append(scenario)
    return chosen


def test_every_reachable_cell_is_reached(library: Rehearsed, errata: list[Erratum]) -> None:
    """On the machine itself. Of scenarios that reach the same the model says which are enough; where the machine
    goes another way, by a known erratum, all of them may be needed."""
    reached: set[Cell] = set()
    todo = enough(library)
    for _ in range(2):
        outcome = run(Target(), todo, errata, pipelined=True)
        assert not outcome.lost and outcome.new() == 0
        reached |= outcome.coverage.cells
        merged = merge([Covered.of(outcome.identity, reached)], errata)
        todo = [scenario for scenario, cells in library if cells & merged.missing and scenario not in todo]
    missing = sorted(merged.missing)
    assert missing == [], (
        f"{len(missing)} cells are reached by no scenario of the library: write those that do (scenarios/pairs has the "
        "walk's, in every pair of modes). `twinwalk coverage` shows them in groups."
    )
    barred = {cell for cell in reached if cell in merged.lacking}
    assert barred == set(), "an erratum or a feature is said to keep these from being reached"


def test_every_cell_that_is_reached_is_known(machine: tcg.TcgMachine, library: Rehearsed) -> None:
    """What a walk reaches and the universe does not have would be missed by nobody."""
    found = universe(machine.cpu)
    known = found.reachable | found.lacking.keys()
    rules = {cell.rule for cell in known if cell.level}
    seen = {cell for _, cells in library for cell in cells if cell.rule in rules}
    assert sorted(seen - known) == [], "harness/model/universe.py does not come to these"
