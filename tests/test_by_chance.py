"""Errata that show by chance: a scenario that shows one is run again, and if it shows each time it is none."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from harness.lockstep.active import Active
from harness.lockstep.errata import load
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import FLEETING, SHADOW_LOST
from harness.machine.l1 import Identity, Layer
from harness.model.registers import Cpu
from harness.options import LIBRARY
from harness.run import Outcome, run
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.session import MAX_CHANCES
from harness.wire.image import Image
from harness.wire.program import Step
from tests.lockstep.fake import FakeMachine, Plant
from tests.test_run import FakeTarget, Machine, both

UNDER_KVM = Identity("kvm-on-tcg", "fake-machine", (6, 1, 0), "max",
                     (Layer("kvm", (6, 1, 0)), Layer("qemu-tcg", (7, 2, 0))))


class LosesShadow(Plant):
    """What an interrupt for the hypervisor below L1 makes of L2's interrupt shadow: in the first `times` VMRUNs."""

    def __init__(self, times: int) -> None:
        self.left = times

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        active = Active([SHADOW_LOST])
        if self.left:
            fake.twin.quirks = active
        try:
            return fake.twin.predict(step, first)
        finally:
            fake.twin.quirks = Active()
            self.left -= bool(active.played)


@dataclass(frozen=True)
class UnderKvm(FakeTarget):
    """As if KVM ran L1."""

    def _machine(self, image: Image, cpu: Cpu, plant: Plant) -> Machine:
        machine = Machine(image, cpu, plant)
        machine.identity = UNDER_KVM
        return machine


def scenario(name: str) -> Scenario:
    file = name.partition("[")[0]
    (found,) = files.read(LIBRARY / f"{file}.toml", file, lambda one: one == name)
    return found


NAMES = ["state/shadow-saved[0x2,PAE]", "state/shadow-mov-ss[0x202]", "state/v-irq-let-in[0x1f01060105]",
         "events/interrupt-let-in[bit0,0xad7]", "events/interrupt-let-in[bit1,0xad7]"]


def outcome_of(image: Image, cpu: Cpu, name: str, times: int, pipelined: bool, kind: type[FakeTarget]) -> Outcome:
    target = kind(image=image, of=cpu, plants=[LosesShadow(times)])
    return run(target, [scenario(name)], load(LIBRARY / "errata"), pipelined)


@both
@pytest.mark.parametrize("name", NAMES)
class TestShadowLost:
    def test_once(self, name: str, pipelined: bool, image: Image, cpu: Cpu) -> None:
        outcome = outcome_of(image, cpu, name, 1, pipelined, UnderKvm)
        (result,) = outcome.results
        assert {one.erratum for one in result.divergences} == {"qemu-tcg-shadow-lost"}

    def test_each_time(self, name: str, pipelined: bool, image: Image, cpu: Cpu) -> None:
        """A machine that never keeps the shadow has another fault than that."""
        outcome = outcome_of(image, cpu, name, 10 * MAX_CHANCES, pipelined, UnderKvm)
        (result,) = outcome.results
        assert {one.erratum for one in result.divergences} == {None} and outcome.exit_code() == 1

    def test_without_a_hypervisor_below(self, name: str, pipelined: bool, image: Image, cpu: Cpu) -> None:
        outcome = outcome_of(image, cpu, name, 1, pipelined, FakeTarget)
        assert {one.erratum for result in outcome.results for one in result.divergences} == {None}


def test_which_quirks_show_by_chance() -> None:
    """No erratum that a run can show at will is taken for one that shows by chance."""
    fleeting = [one for one in load(LIBRARY / "errata") if one.quirk in FLEETING]
    assert fleeting and not any(one.shown for one in fleeting) and all(one.below for one in fleeting)
