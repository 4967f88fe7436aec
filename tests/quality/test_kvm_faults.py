"""Classes of faults that KVM's nested SVM had, or could have: a field not loaded or not saved, an intercept that is
not merged, what an exit tells of its cause, and instructions that are emulated otherwise than a processor does them.

Each is planted in a machine that the model plays (tests/lockstep/fake.py); the scenarios that are for it must find it,
in the field that it is in.
"""

from __future__ import annotations

from typing import Final

import pytest

from harness.lockstep import quirks
from harness.lockstep.active import Active
from harness.lockstep.prediction import Prediction
from harness.lockstep.twin import Twin
from harness.model.registers import Cpu
from harness.scenario import files
from harness.scenario.program import Compiler
from harness.wire.image import Image
from harness.wire.program import Step
from tests.conftest import LIBRARY
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake


class NotLoaded(Plant):
    """A field of VMCB12 does not reach VMCB02: it stays as it was at the first VMRUN."""

    def __init__(self, field: str) -> None:
        self.field, self.first = field, -1

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        vmcb = fake.twin.vmcb
        if self.first < 0:
            self.first = vmcb[self.field]
        vmcb[self.field] = self.first
        return fake.twin.predict(step, first)


class NotSaved(Plant):
    """#VMEXIT leaves a field of VMCB12 as it was."""

    def __init__(self, field: str) -> None:
        self.field = field

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        before = fake.twin.vmcb[self.field]
        out = fake.twin.predict(step, first)
        fake.twin.vmcb[self.field] = before
        return out


class NotTold(Plant):
    """Bits of what #VMEXIT tells are lost."""

    def __init__(self, field: str, bits: int) -> None:
        self.field, self.bits = field, bits

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        fake.twin.vmcb[self.field] = fake.twin.vmcb[self.field] & ~self.bits


class NotMerged(Plant):
    """Bits of VMCB12 are not looked at while L2 runs, and are L1's again behind it."""

    def __init__(self, field: str, bits: int) -> None:
        self.field, self.bits = field, bits

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        vmcb = fake.twin.vmcb
        asked = vmcb[self.field] & self.bits
        vmcb[self.field] = vmcb[self.field] & ~self.bits
        try:
            return fake.twin.predict(step, first)
        finally:
            vmcb[self.field] = vmcb[self.field] | asked


class Emulated(Plant):
    """The machine has a quirk that no erratum of it names."""

    def __init__(self, quirk: str) -> None:
        self.quirk = quirk

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        healthy, fake.twin.quirks = fake.twin.quirks, Active([self.quirk])
        try:
            return fake.twin.predict(step, first)
        finally:
            fake.twin.quirks = healthy


_ALL: Final = (1 << 32) - 1
FAULTS: Final[tuple[tuple[Plant, str, str, str], ...]] = (
    (NotLoaded("rsp"), "state/load-rsp", "C3", "rdrsp"),
    (NotLoaded("cr2"), "state/load-cr2", "C3", "rdcr2"),
    (NotLoaded("dr7"), "state/clean-bits-one", "C3", "rddr7"),
    (NotLoaded("gdtr.limit"), "state/clean-bits-one", "C3", "rdgdtl"),
    (NotLoaded("es.selector"), "state/clean-bits-one", "C3", "rdseg"),
    (NotLoaded("fs.base"), "devices/string-fs", "C1", "outcome"),
    (NotSaved("cr2"), "state/save-cr2", "C3", "cr2"),
    (NotSaved("cr4"), "state/save-cr4", "C3", "cr4"),
    (NotSaved("rflags"), "state/save-rflags", "C3", "rflags"),
    (NotSaved("idtr.base"), "state/save-idtr", "C3", "idtr.base"),
    (NotSaved("v_intr"), "state/save-cr8", "C3", "v_intr"),
    (NotTold("exitinfo1", 1 << 32), "walk/nested-not-present", "C1", "exitinfo1"),
    (NotTold("exitinfo1", 1 << 2), "walk/nested-supervisor", "C1", "exitinfo1"),
    (NotTold("exitinfo2", 0xFFF), "walk/npf-addresses", "C1", "exitinfo2"),
    (NotTold("exitintinfo", 1 << 31), "events/delivery-cut", "C3", "exitintinfo"),
    (NotTold("exitintinfo", _ALL << 32), "events/inject-double-fault", "C3", "exitintinfo"),
    (NotMerged("intercept_cr", _ALL), "intercepts/cr-bits", "C1", "outcome"),
    (NotMerged("intercept_dr", _ALL), "intercepts/dr-bits", "C1", "outcome"),
    (NotMerged("intercept_exceptions", 1 << 14), "walk/guest-not-present", "C1", "outcome"),
    (NotMerged("intercept_misc1", 1 << 28), "intercepts/msr", "C1", "outcome"),
    (NotMerged("intercept_misc1", 1 << 5), "intercepts/selective-cd", "C1", "outcome"),
    (NotMerged("v_intr", 1 << 24), "events/physical-interrupt", "C1", "outcome"),
    (Emulated(quirks.REPEATED_INS_LOST), "devices/string-repeated-faults", "C3", "l2.rcx"),
    (Emulated(quirks.CR4_HIGH_DROPPED), "state/illegal-cr4", "C1", "outcome"),
    (Emulated(quirks.INTERCEPT_BEFORE_ILLEGAL), "state/illegal-cr4", "C1", "outcome"),
    (Emulated(quirks.EFER_RESERVED_DROPPED), "state/illegal-efer", "C1", "outcome"),
    (Emulated(quirks.VM_STATE_WANTS_NPT), "state/vmload-of-l2", "C1", "outcome"),
    (Emulated(quirks.INTERRUPT_BEHIND_ANOTHER), "events/virtual-behind-physical", "C3", "v_intr"),
)


@pytest.mark.parametrize(("plant", "name", "check", "field"), FAULTS, ids=lambda it: (
    f"{type(it).__name__}-{'-'.join(map(str, vars(it).values()))}" if isinstance(it, Plant) else ""))
def test_it_is_found(
    plant: Plant, name: str, check: str, field: str, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin
) -> None:
    programs = [compiler.compile(scenario) for scenario in files.read(LIBRARY / f"{name}.toml")]
    good = run_on_fake(image, cpu, twin, programs, strict=False)
    assert [d for result in good for d in result.divergences] == []
    results = run_on_fake(image, cpu, twin, programs, plant, strict=False)
    found = {(d.check, d.field) for result in results for d in result.divergences}
    assert (check, field) in found, sorted(found)
