"""Faults of a machine, planted in its records, in its memory and in its rules: the fuzzer finds each within a number of
programs.

No scenario was written for any of them here. The programs are those of one seed, made once; the machine is the model
behind the real rings (tests/lockstep/fake.py).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import pytest

from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.model.registers import Cpu
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from harness.steering import Steering
from harness.wire.image import Image
from harness.wire.program import Step
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake
from tests.quality.mutants import modules, mutated
from tests.quality.test_machine_faults import FAULTS, _Fault
from tests.quality.test_model_mutants import MUTANTS

Took = Callable[[int, float], None]
BUDGET: Final = 50
"""Programs within which each fault of records and memory is found."""
_BATCHES: Final = 12
BUDGET_OF_RULES: Final = 25 * _BATCHES
"""Programs within which each changed rule is."""
RULES: Final = (
    "only the nested leaf's rights count", "only the guest leaf's rights count", "guest U/S ignored",
    "guest NX ignored", "CR0.WP taken for set", "EXITINFO1 bits 32 and 33 swapped", "#PF without U", "#NPF without I/D",
    "A of a nested table entry not set", "D of the nested leaf not set", "D set by reads", "not canonical, and walked",
    "nCR3 cut to 32 bits", "offset of a nested large page", "RSP at a fault of PUSH is decremented",
)
"""Of tests/quality/test_model_mutants.py."""
_SEED: Final = 1


@pytest.fixture(scope="module")
def batches(image: Image) -> list[tuple[Scenario, ...]]:
    return list(islice(Steering(image, _SEED).block(0), _BATCHES))


def results(
    batches: list[tuple[Scenario, ...]], image: Image, cpu: Cpu, twin: Twin, plant: Plant
) -> Iterator[Result]:
    compiler = Compiler(image, cpu)
    for batch in batches:
        yield from run_on_fake(image, cpu, twin, compiler.batch(batch), plant, strict=False)


@pytest.fixture
def took(record_property: Callable[[str, object], None]) -> Took:
    """For `twinwalk bench --faults`: how many programs it took to find a fault, and how many seconds."""
    def note(programs: int, seconds: float) -> None:
        record_property("programs", programs)
        record_property("seconds", seconds)

    return note


def test_without_a_fault_nothing_is_found(
    batches: list[tuple[Scenario, ...]], image: Image, cpu: Cpu, twin: Twin
) -> None:
    assert not any(one.divergences or one.lost for one in results(batches, image, cpu, twin, Plant()))


@pytest.mark.parametrize("name", FAULTS)
def test_found(
    name: str, batches: list[tuple[Scenario, ...]], image: Image, cpu: Cpu, twin: Twin, took: Took
) -> None:
    fault = FAULTS[name]
    programs, begun = 0, time.perf_counter()
    for result in results(batches, image, cpu, twin, _Fault(fault.after_run, fault.on_exit)):
        programs += 1
        if any(one.check == fault.check and one.field.startswith(fault.field) for one in result.divergences):
            break
    else:
        pytest.fail(f"not found in {programs} programs")
    took(programs, time.perf_counter() - begun)
    assert programs <= BUDGET


class _Mutant(Plant):
    """A machine in which one rule is another one."""

    def __init__(self, name: str, old: str, new: str, number: int) -> None:
        module = importlib.import_module(f"harness.{name}")
        theirs = vars(mutated(module, old, new, number))
        mine = [(key, real) for key, real in vars(module).items() if callable(real) and not isinstance(real, type)
                and getattr(real, "__module__", "") == module.__name__]
        if name.startswith("lockstep"):
            mine += [(key, real) for key, real in vars(module).items() if isinstance(real, type)
                     and real.__module__ == module.__name__]
        self._swaps = [(vars(user), key, real, theirs[key]) for key, real in mine for user in modules()
                       if vars(user).get(key) is real]

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        for user, key, _, other in self._swaps:
            user[key] = other
        try:
            return super().predict(fake, step, first)
        finally:
            for user, key, real, _ in self._swaps:
                user[key] = real


@pytest.mark.parametrize("name", RULES)
def test_a_changed_rule_is_found(
    name: str, batches: list[tuple[Scenario, ...]], image: Image, cpu: Cpu, twin: Twin, took: Took
) -> None:
    mutant = MUTANTS[name]
    programs, begun = 0, time.perf_counter()
    for result in results(batches, image, cpu, twin, _Mutant(mutant.module, mutant.old, mutant.new, mutant.number)):
        programs += 1
        if any(one.rule != "lockstep" for one in result.divergences):
            break
    else:
        pytest.fail(f"not found in {programs} programs")
    took(programs, time.perf_counter() - begun)
    assert programs <= BUDGET_OF_RULES


def test_there_are_enough() -> None:
    assert len(FAULTS) + len(RULES) >= 45
