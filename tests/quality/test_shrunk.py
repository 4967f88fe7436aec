"""Planted faults, found in the middle of a long scenario and shrunk on real guests: little is left but what shows
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Final

import pytest

from harness.lockstep.errata import Erratum
from harness.lockstep.signature import Signature
from harness.report.findings import signatures
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.shrink import bare, cost
from harness.session import Session, Unit
from harness.shrinking import Kind, Repeated, Trials, shrink
from harness.target import Target
from tests.conftest import LIBRARY
from tests.quality.mutants import Mutant, plant
from tests.quality.test_model_mutants import MUTANTS
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest

BEFORE: Final = one(
    run("read c; write d"), 'entry = "nested.c.pte"\nset = ["pwt"]', 'entry = "guest.d.pte"\nset = ["bit9"]',
    run("write c+0x18; read2 d+0x40"), 'vmcb = "cr2"\nvalue = 0x1234', 'entry = "nested.d.pte"\nclear = ["a"]',
    run("fetch c+8; rdcr2"),
).ops
BEHIND: Final = one(run("read d+0x88"), 'entry = "nested.c.pte"\nset = ["bit10"]', run("write d+0x90; read c")).ops
MODULES: Final = ("model.walk", "model.dirty", "model.vmrun", "model.consistency", "lockstep.l2")
SAMPLE: Final = [name for name, mutant in MUTANTS.items() if mutant.module in MODULES][::12]
MOST: Final = 6
"""Ops, in the median: what a person can take in at a glance."""


def in_the_middle(scenario: Scenario) -> Scenario:
    """Ten ops more, that have nothing to do with it."""
    return bare(replace(scenario, ops=(*BEFORE, *scenario.ops, *BEHIND)))


def scenarios_of(mutant: Mutant) -> list[Scenario]:
    return [in_the_middle(scenario) for each in mutant.scenarios
            for scenario in ([each] if isinstance(each, Scenario) else files.read(LIBRARY / f"{each}.toml"))]


def found(session: Session, mutant: Mutant) -> tuple[Scenario, Signature] | None:
    """The first scenario that shows the fault, with its signature."""
    unit = Unit(tuple((scenario,) for scenario in scenarios_of(mutant)), cases=False, doubtful=True)
    for done in session.work(unit):
        for signature in sorted(signatures(done.result, strict=False)):
            if signature.check == mutant.check and signature.field.startswith(mutant.field):
                return done.scenario, signature
    return None


def test_they_are_shrunk(
    monkeypatch: pytest.MonkeyPatch, errata: list[Erratum], record_property: Callable[[str, object], None]
) -> None:
    sizes: dict[str, tuple[int, ...]] = {}
    missed = []
    for name in SAMPLE:
        mutant = MUTANTS[name]
        with monkeypatch.context() as patch:
            plant(patch, mutant.module, mutant.old, mutant.new, mutant.number)
            with Session(Target("tcg"), errata, pipelined=True) as session:
                first = found(session, mutant)
            if first is None:
                missed.append(name)
                continue
            scenario, wanted = first
            with Trials(Target("tcg"), errata, pipelined=True, strict=False) as trials:
                small = shrink(trials, wanted, scenario, Repeated(Kind.STABLE, 1, 1))
            assert len(small.ops) < len(scenario.ops), name
            sizes[name] = cost(small)
    shown = "\n".join(f"{size} {name}" for name, size in sorted(sizes.items(), key=lambda item: item[1]))
    print(shown, missed)
    ops = [size[0] for size in sizes.values()]
    for count in ops:  # for `twinwalk bench --faults`
        record_property("ops", count)
    assert median(ops) <= MOST and max(ops) <= 2 * MOST, shown
    assert len(ops) >= 7, missed
