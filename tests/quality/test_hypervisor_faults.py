"""Faults of a hypervisor under L1, in what is not a walk: events that are held back or let in wrongly, state taken from
another VMCB, string I/O, a table that is kept though L1 changed it.

Each is planted in a machine that the model plays (tests/lockstep/fake.py); the scenarios that are for it must find it.
"""

from __future__ import annotations

from typing import Final

import pytest

from harness.lockstep.prediction import Prediction
from harness.lockstep.twin import Twin
from harness.model.registers import RFLAGS, Cpu
from harness.scenario import files
from harness.scenario.program import Compiler
from harness.wire.image import Image
from harness.wire.program import Step
from tests.conftest import LIBRARY
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake


class NmiLost(Plant):
    """GIF stays 0 in L2."""

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        fake.twin.outside.pop("nmi", None)
        return fake.twin.predict(step, first)


class NmiTakenByL1(Plant):
    """GIF is 1 behind a #VMEXIT: what comes then is L1's at once."""

    left = 0

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        if self.left:
            fake.twin.outside.pop("nmi", None)
        self.left = fake.twin.host.gif
        return fake.twin.predict(step, first)


class InterruptsByL2(Plant):
    """V_INTR_MASKING is ignored: L2's own IF lets L1's interrupts in."""

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        host, vmcb = fake.twin.host, fake.twin.vmcb
        flags, host.rflags = host.rflags, host.rflags & ~RFLAGS.IF | vmcb["rflags"] & RFLAGS.IF
        try:
            return fake.twin.predict(step, first)
        finally:
            host.rflags = flags


class CleanBitsBelieved(Plant):
    """What a clean bit covers is not read anew, though it is another VMCB's."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        vmcb = fake.twin.vmcb
        for name in ("es.attrib", "ds.limit"):
            if vmcb["clean"] and name in self.held:
                vmcb[name] = self.held[name]
            self.held[name] = vmcb[name]
        return fake.twin.predict(step, first)


class StringInterceptLost(Plant):
    """The port of string I/O is not looked up in L1's map."""

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        vmcb = fake.twin.vmcb
        asked = vmcb["intercept_misc1"]
        vmcb["intercept_misc1"] = asked & ~(1 << 27)
        try:
            return fake.twin.predict(step, first)
        finally:
            vmcb["intercept_misc1"] = asked


class BreakpointsOfTheVmcb(Plant):
    """DR0 to DR3 are forgotten at VMRUN."""

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        fake.twin.outside = {name: 0 if name.startswith("dr") else value for name, value in fake.twin.outside.items()}
        return fake.twin.predict(step, first)


class TableNotInStep(Plant):
    """Once an entry was used with A and D set, what L1 clears in it does not count."""

    def __init__(self) -> None:
        self.used: dict[int, int] = {}

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        words, now = fake.twin.memory.words, {}
        for address, entry in self.used.items():
            now[address] = words[address >> 3]
            if now[address] & 0x60 == 0x60 and now[address] >> 12 == entry >> 12:
                words[address >> 3] = entry
        out = fake.twin.predict(step, first)
        for address, entry in now.items():
            words[address >> 3] = entry
        for walk in out.walks.values():
            self.used |= {s.address: s.entry for s in walk.steps if s.entry & 0x67 == 0x67}
        return out


FAULTS: Final = {
    NmiLost: ("events/physical-nmi", "C1", "outcome"),
    NmiTakenByL1: ("events/gif", "C1", "outcome"),
    InterruptsByL2: ("events/physical-interrupt", "C1", "outcome"),
    CleanBitsBelieved: ("state/clean-bits", "C3", "es.attrib"),
    StringInterceptLost: ("devices/string-intercepted", "C1", "outcome"),
    BreakpointsOfTheVmcb: ("state/debug-addresses", "C3", "rddr0"),
    TableNotInStep: ("contexts/nested-kept-clear", "C1", "outcome"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_it_is_found(plant: type[Plant], image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    name, check, field = FAULTS[plant]
    programs = [compiler.compile(scenario) for scenario in files.read(LIBRARY / f"{name}.toml")]
    good = run_on_fake(image, cpu, twin, programs, strict=False)
    assert [d for result in good for d in result.divergences] == []
    results = run_on_fake(image, cpu, twin, programs, plant(), strict=False)
    found = {(d.check, d.field) for result in results for d in result.divergences}
    assert (check, field) in found, sorted(found)
