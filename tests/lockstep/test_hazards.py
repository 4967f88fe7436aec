"""What a machine does not survive: found on the model, before any machine sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.lockstep.errata import load
from harness.lockstep.hazards import Hazards
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.scenario import files
from harness.scenario.program import Compiler
from tests.conftest import LIBRARY

HAZARDS = Hazards([("nested-pdpte-high-bits", "e1"), ("lma-without-pae", "e2")])


def names(twin: Twin, compiler: Compiler, name: str) -> None:
    [scenario] = files.load([LIBRARY], lambda one: one == name)
    rehearse(twin, compiler.compile(scenario), HAZARDS.see, enter=HAZARDS.enter)


@pytest.mark.parametrize("bit", [52, 63])
def test_a_nested_pdpte_with_high_bits(twin: Twin, compiler: Compiler, bit: int) -> None:
    with pytest.raises(UsageError, match="the machine would be lost: see erratum e1"):
        names(twin, compiler, f"modes/nested-pae-pdpte-reserved[bit{bit}]")


def test_lma_without_pae(twin: Twin, compiler: Compiler) -> None:
    with pytest.raises(UsageError, match="the machine would be lost: see erratum e2"):
        names(twin, compiler, "vmrun/efer-lma-set")


@pytest.mark.parametrize("name", ["vmrun/efer-lma[0x1901]", "regressions/nested-pdpte-beyond[bit51]",
                                  "modes/nested-pae-accesses[4K]",
                                  "modes/pae-pdpte-reserved[bit63]", "walk/nested-no-execute[pdpte]"])
def test_no_other(twin: Twin, compiler: Compiler, name: str) -> None:
    """Low bits, L2's own PDPTEs, and PDPTEs of long mode are none."""
    names(twin, compiler, name)


def test_there_are_none_of_a_machine_without(twin: Twin) -> None:
    assert not Hazards([]) and HAZARDS


def test_an_erratum_names_it(tmp_path: Path) -> None:
    entry = '[[erratum]]\nid = "e"\ntitle = "t"\nmachine = "kvm"\nexplanation = "e"\nreference = "r"\nhazard = "{}"\n'
    (tmp_path / "a.toml").write_text(entry.format("nested-pdpte-high-bits"))
    assert load(tmp_path)[0].hazard == "nested-pdpte-high-bits"
    (tmp_path / "a.toml").write_text(entry.format("heat"))
    with pytest.raises(UsageError, match="no hazard is called 'heat'"):
        load(tmp_path)
