"""A processor that runs ahead: accessed bits of accesses that are never made are permitted where a machine's profile
says so, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine.kvm import LIBERTIES
from harness.model import speculation
from harness.model.entries import A, D, P
from harness.model.registers import Cpu
from harness.scenario import files
from harness.scenario.program import Compiler
from harness.wire.image import Image
from tests.conftest import LIBRARY
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake

CALM = LIBERTIES._replace(speculates=False)


class _Ahead(Plant):
    """Behind each VMRUN some bits of the guest's tables are set: those that `choose` picks of each present entry's."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose, self.changed = choose, 0

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        words = fake.twin.memory.words
        if out.paging is None:
            return
        for address, bits in speculation.may_be_set(out.paging, words, {}).items():
            new = words[address >> 3] | self._choose(bits)
            if address & ~0xFFF in fake.twin.watched and new != words[address >> 3]:
                self.changed += 1
                words[address >> 3] = new


def _run(image: Image, cpu: Cpu, plant: Plant, speculates: bool, strict: bool = True) -> list[Result]:
    liberties = LIBERTIES if speculates else CALM
    twin = Twin(image, cpu, liberties)
    compiler = Compiler(image, cpu)
    chosen = files.load([LIBRARY / "ad", LIBRARY / "events" / "inject-double-fault.toml"], lambda name: True)
    return run_on_fake(image, cpu, twin, [compiler.compile(one) for one in chosen], plant, strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_is_permitted(image: Image, cpu: Cpu, strict: bool) -> None:
    plant = _Ahead(lambda bits: bits)
    results = _run(image, cpu, plant, speculates=True, strict=strict)
    assert plant.changed > 100
    assert [one.divergences for one in results if one.divergences] == []


def test_on_a_machine_that_does_not_it_is_a_divergence(image: Image, cpu: Cpu) -> None:
    found = [one for result in _run(image, cpu, _Ahead(lambda bits: bits), speculates=False)
             for one in result.divergences]
    assert found and {one.check for one in found} == {"C2"}


def test_d_is_not(image: Image, cpu: Cpu) -> None:
    """Section 5.4.2: "The Dirty bit is not updated speculatively"."""
    def both(bits: int) -> int:
        return bits | (bits & (A | A << 32)) * (D // A)

    found = [one for result in _run(image, cpu, _Ahead(both), speculates=True) for one in result.divergences]
    assert found and all(one.check == "C2" for one in found)
    assert all(int(one.observed) & ~int(one.expected) & (D | D << 32) for one in found
               if not isinstance(one.expected, str))


def test_nor_in_an_entry_that_is_not_present(image: Image, cpu: Cpu) -> None:
    class Absent(Plant):
        def after_run(self, fake: FakeMachine, out: Prediction) -> None:
            words = fake.twin.memory.words
            page = min(fake.twin.watched)
            at = next(n for n in range(page >> 3, (page >> 3) + 512) if not words[n] & P)
            words[at] |= A

    found = [one for result in _run(image, cpu, Absent(), speculates=True) for one in result.divergences]
    assert found


def test_what_an_entry_led_to_before_it_was_changed_counts(image: Image, cpu: Cpu) -> None:
    """L2 takes its own table away: the processor may have been there before."""
    twin = Twin(image, cpu, LIBERTIES)
    program = Compiler(image, cpu).compile(files.load([LIBRARY / "ad" / "first-access.toml"], lambda name: True)[0])
    twin.reset(program.world)
    step = next(step for step in program.steps if step.code == "RUN")
    out = twin.predict(step, 0)
    assert out.paging is not None
    words = twin.memory.words
    before = speculation.may_be_set(out.paging, words, {})
    root = min(before)
    old, words[root >> 3] = words[root >> 3], 0
    assert root not in speculation.may_be_set(out.paging, words, {})
    assert speculation.may_be_set(out.paging, words, {root: old}).keys() == before.keys()
