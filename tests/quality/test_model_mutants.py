"""A rule of the model is changed, and real guests under QEMU must disagree: with the right check and field.

This shows, rule by rule, that the library and the checks would notice: what is wrong between model and
machine shows whichever of the two it is in. Where stock QEMU itself is known to be wrong, its own
divergences (the same without the change) are set aside.
"""

from __future__ import annotations

from typing import Final

import pytest

from harness.lockstep import twin as twin_module
from harness.lockstep.compare import Divergence
from harness.lockstep.driver import Lockstep
from harness.lockstep.result import Result
from harness.machine import tcg
from harness.run import Outcome
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from tests.conftest import LIBRARY
from tests.quality import mutants_of_events, mutants_of_exits, mutants_of_walks
from tests.quality.mutants import plant

pytestmark = pytest.mark.guest


MUTANTS: Final = mutants_of_walks.MUTANTS | mutants_of_exits.MUTANTS | mutants_of_events.MUTANTS


def _scenarios(wanted: tuple[str | Scenario, ...]) -> list[Scenario]:
    out: list[Scenario] = []
    for each in wanted:
        out += files.read(LIBRARY / f"{each}.toml") if isinstance(each, str) else [each]
    return out


def _run(machine: tcg.TcgMachine, scenarios: list[Scenario]) -> list[Result]:
    compiler = Compiler(machine.image, machine.cpu)
    twin = twin_module.Twin(machine.image, machine.cpu, tcg.LIBERTIES)  # a planted one, if there is one
    return list(Lockstep(machine, machine.channel, twin, strict=True).run(map(compiler.compile, scenarios)))


def _key(divergence: Divergence) -> tuple[object, ...]:
    return divergence.scenario, divergence.op, divergence.probe, divergence.check, divergence.field, divergence.expected


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_found(name: str, machine: tcg.TcgMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    scenarios = _scenarios(mutant.scenarios)
    stock = {_key(d) for r in _run(machine, scenarios) for d in r.divergences}
    plant(monkeypatch, mutant.module, mutant.old, mutant.new, mutant.number)
    results = _run(machine, scenarios)
    for result in results:
        assert result.lost is None
        result.divergences = [d for d in result.divergences if _key(d) not in stock]
    found = [d for r in results for d in r.divergences]
    assert any(d.check == mutant.check and d.field.startswith(mutant.field) for d in found), (
        sorted({(d.check, d.field) for d in found}))
    assert Outcome(results=results).exit_code() == 1
    monkeypatch.undo()
    assert {_key(d) for r in _run(machine, scenarios) for d in r.divergences} == stock


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 25
    assert {m.check for m in MUTANTS.values()} == {"C1", "C2", "C3"}
