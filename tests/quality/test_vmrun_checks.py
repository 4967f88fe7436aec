"""Each consistency check of VMRUN has scenarios: one that breaks its rule and no other, and one that just
does not; and a machine without that check is found by them.

The CPU has every feature here, so that checks of what no QEMU at hand has are tried too. The machine is the
model behind the real rings (tests/lockstep/fake.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from harness.lockstep import quirks
from harness.lockstep.active import Active
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import Quirk
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.machine.tcg import LIBERTIES
from harness.model import consistency
from harness.model.consistency import CHECKS
from harness.model.registers import Cpu
from harness.model.universe import NO_CELLS
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from harness.wire.image import Image
from harness.wire.layout import FEATURES
from harness.wire.program import Step
from tests.conftest import LIBRARY
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake

PLANTED: Final = "planted"

SCENARIOS: Final = {
    "vmrun.efer-svme": ("efer-svme", "efer-sce[0x1d00]"),
    "vmrun.cr0-nw": ("cr0-nw[4-level]", "cr0-cd[0xe0050031]"),
    "vmrun.cr0-high": ("cr0-high[0x180050031]", "cr0-high-legal[0x90050031]"),
    "vmrun.cr3-mbz": ("cr3-mbz[bit40]", "cr3-last[0x8000000000]"),
    "vmrun.cr4-mbz": ("cr4-mbz-each[bit24]", "cet-wp-legal"),
    "vmrun.dr6-high": ("dr6-high[bit32]", "efer-sce[0x1d00]"),
    "vmrun.dr7-high": ("dr7-high[bit32]", "dr7-high-legal[0x80000400]"),
    "vmrun.efer-mbz": ("efer-reserved[0x401d01]", "efer-feature[aibrse]"),
    "vmrun.long-pae": ("long-pae", "long-pae-off"),
    "vmrun.long-pe": ("long-pe", "cr0-cd[0xc0050031]"),
    "vmrun.cs-l-d": ("cs-l-d", "cs-l"),
    "vmrun.intercept": ("intercept", "cs-l"),
    "vmrun.permission-maps": ("iopm[0xffffffe000]", "iopm-last[0xffffffd000,0xffffffd000]"),
    "vmrun.eventinj": ("eventinj-reserved[0x80000309]", "eventinj-invalid[0x7fffffff]"),
    "vmrun.eventinj-mode": ("eventinj-64-bit[0x80000305]", "eventinj-invalid[0x302]"),
    "vmrun.asid": ("asid", "asid-other[1]"),
    "vmrun.s-cet": ("s-cet[bit2]", "s-cet-legal[bit1]"),
    "vmrun.cet-wp": ("cet-wp[0,0x80040031]", "cet-wp-legal"),
    "vmrun.pdpe": ("pdpe[bit62]", "pdpe-absent[bit63]"),
    "vmrun.v-nmi": ("v-nmi[not intercepted,0x81000000]", "v-nmi-intercepted"),
    "vmrun.x2avic": ("x2avic", "avic-index[255]"),
    "vmrun.avic-pointers": ("avic-pointers[avic_backing_page,0x8000000000000000]", "avic-index[255]"),
    "vmrun.avic-index": ("avic-index[256]", "avic-index[255]"),
    "vmrun.host-paging": ("host-paging", "host-paging-unused[4-level]"),
    "vmrun.ncr3-mbz": ("ncr3-mbz[bit63]", "ncr3-unused[bit63]"),
    "vmrun.g-pat": ("g-pat[0x0007040600070402]", "g-pat-legal[0x0706050401000706]"),
    "vmrun.sss": ("sss", "sss-legal"),
}
"""By rule, in scenarios/vmrun: one that breaks it, and its nearest legal neighbour."""

NOT_SHOWN: Final = {rule for rule in NO_CELLS if rule.startswith("vmrun.")}


class Unchecked(Plant):
    """A machine with the quirk PLANTED."""

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        fake.twin.quirks = Active([PLANTED])
        try:
            return fake.twin.predict(step, first)
        finally:
            fake.twin.quirks = Active()


@pytest.fixture(scope="module")
def cpu() -> Cpu:
    return Cpu(40, True, 16, frozenset(FEATURES))


@pytest.fixture(scope="module")
def compiler(image: Image, cpu: Cpu) -> Compiler:
    return Compiler(image, cpu)


@pytest.fixture(scope="module")
def twin(image: Image, cpu: Cpu) -> Twin:
    return Twin(image, cpu, LIBERTIES)


def _scenario(name: str) -> Scenario:
    stem = name.partition("[")[0]
    return next(s for s in files.read(LIBRARY / "vmrun" / f"{stem}.toml") if s.name == name)


def test_all_are_there() -> None:
    assert SCENARIOS.keys() | NOT_SHOWN == {check.rule for check in CHECKS} | {"vmrun.legal"}
    assert not SCENARIOS.keys() & NOT_SHOWN


@pytest.mark.parametrize("rule", SCENARIOS)
def test_broken_alone_and_just_not(
    rule: str, compiler: Compiler, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []
    real = consistency.violations

    def recorded(*args: object) -> Iterator[str]:
        found.append(list(real(*args)))  # type: ignore[arg-type]
        return iter(found[-1])

    monkeypatch.setattr(consistency, "violations", recorded)
    for name, expected in zip(SCENARIOS[rule], ([rule], []), strict=True):
        found.clear()
        rehearse(twin, compiler.compile(_scenario(name)))
        assert found[0] == expected, name


@pytest.mark.parametrize("rule", SCENARIOS)
def test_a_machine_without_the_check_is_found(
    rule: str, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    quirk = Quirk(accepts=lambda broken, vmcb, host: broken == rule)
    monkeypatch.setitem(quirks.QUIRKS, PLANTED, quirk)
    programs = [compiler.compile(_scenario(name)) for name in SCENARIOS[rule]]
    for plant, expected in ((Plant(), set()), (Unchecked(), {("C3", "outcome", rule)})):
        results = run_on_fake(image, cpu, twin, programs, plant)
        assert [result.lost for result in results] == [None, None]
        assert {(d.check, d.field, d.rule) for d in results[0].divergences if d.check == "C3"} == expected
        assert results[1].divergences == []


@pytest.mark.parametrize("rule", SCENARIOS)
def test_a_machine_that_refuses_too_much_is_found(
    rule: str, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quirks.QUIRKS, PLANTED, Quirk(refuses=lambda vmcb: "vmrun.any"))
    legal = compiler.compile(_scenario(SCENARIOS[rule][1]))
    found = run_on_fake(image, cpu, twin, [legal], Unchecked())[0].divergences
    assert any(d.field == "outcome" and d.observed not in ("", d.expected) for d in found)
