"""What a machine does not survive: found on the model, before any machine sees it."""

from __future__ import annotations

from functools import partial
from operator import eq
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.lockstep.errata import load
from harness.lockstep.hazards import HAZARDS as ALL
from harness.lockstep.hazards import Hazards, Peril
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.scenario import files
from harness.scenario.program import Compiler
from tests.conftest import LIBRARY

HAZARDS = Hazards([("nested-pdpte-high-bits", "e1"), ("lma-without-pae", "e2"), ("cr8-with-v-irq", "e3")])


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


@pytest.mark.parametrize("v", ["0x1f01060100", "0x1f01050105", "0x1f01130107"])
def test_cr8_is_written_while_a_virtual_interrupt_is_pending(twin: Twin, compiler: Compiler, v: str) -> None:
    with pytest.raises(Peril, match="the machine would be lost: see erratum e3"):
        names(twin, compiler, f"regressions/cr8-virtual-interrupt[{v}]")


@pytest.mark.parametrize(("hazard", "name", "other"), [
    ("nested-root-outside", "regressions/ncr3-beyond[bit40]", "first-light"),
    ("nested-root-outside", "vmrun/ncr3-mbz[bit63]", "modes/nested-pae-accesses[4K]"),
    ("nested-root-outside", "modes/nested-pae-pdpte-reserved[bit52]", "modes/nested-pae-pdpte-reserved[bit1]"),
    ("beyond-nested-pae", "regressions/beyond-nested-pae[bit32]", "modes/nested-pae-accesses[4K]"),
    ("interrupt-held-back", "events/physical-interrupt[0x0,0x2,0xad7,bit0]",
     "events/physical-interrupt[0x0,0x2,0xad7,bit1]"),
    ("nmi-with-event", "events/physical-injected[nmi,0x80000010]", "events/physical-injected[interrupt,0x80000010]"),
    ("nested-nx-at-table", "contexts/nested-kept-set[pte,nx,pt]", "contexts/nested-kept-set[pte,nx,a]"),
    ("vmrun-unchecked", "vmrun/asid", "first-light"),
    ("busy-tss", "events/legacy-busy-tss[0x80000010]", "events/legacy-injected[32-bit,0x80000010,3]"),
    ("delivery-in-shadow", "regressions/delivery-by-nested-table[0x80000202]",
     "regressions/delivery-by-nested-table[0x80000010]"),
    ("nmi-with-event", "events/nmi-and-interrupt[bit0]", "events/physical-injected[interrupt,0x80000010]"),
    ("pae-sysenter", "regressions/pae-stepped-over[wrmsr 0x175 = 0x1234]", "regressions/pae-stepped-over[cpuid]"),
    ("pae-stepped-over", "regressions/pae-stepped-over[cpuid]", "regressions/pae-stepped-over[wrmsr 0x175 = 0x1234]"),
    ("pae-stepped-over", "regressions/pae-stepped-over[rdmsr 0x277]", "modes/pae-state"),
    ("legacy-invlpg", "regressions/invlpg-without-npt[32-bit]", "regressions/invlpg-without-npt[4-level]"),
    ("legacy-invlpg", "regressions/invlpg-without-npt[PAE]", "pairs/exits-off[off,4-level,none]"),
    ("other-paging", "pairs/exits-off[off,5-level,none]", "pairs/exits-off[off,4-level,none]"),
    ("other-paging", "pairs/first-off-on-32-bit[off,4K,32-bit,none,read a]", "contexts/guests[none,4-level]"),
])
def test_of_old_versions(twin: Twin, compiler: Compiler, hazard: str, name: str, other: str) -> None:
    known = Hazards([(hazard, "e")])
    [scenario], [harmless] = (files.load([LIBRARY], partial(eq, one)) for one in (name, other))
    assert known.suspect(scenario)
    with pytest.raises(Peril, match="see erratum e"):
        rehearse(twin, compiler.compile(scenario), known.see, enter=known.enter)
    rehearse(twin, compiler.compile(harmless), known.see, enter=known.enter)


@pytest.mark.parametrize("name", ["vmrun/efer-lma[0x1901]", "regressions/nested-pdpte-beyond[bit51]",
                                  "regressions/cr8-virtual-interrupt[0x1f01010107]",
                                  "state/v-irq-pending[0x1f01030105,0x2]",
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


@pytest.mark.parametrize("hazard", ALL)
def test_whatever_comes_to_it_is_suspected(twin: Twin, compiler: Compiler, hazard: str) -> None:
    """Only suspects are rehearsed for it: of the library none that is lost is none."""
    hazards = Hazards([(hazard, "e")])
    lost = 0
    for scenario in files.load([*(LIBRARY / name for name in ("regressions", "modes", "vmrun", "state")),
                                *LIBRARY.glob("events/physical-*.toml"), *LIBRARY.glob("events/legacy-*.toml"),
                                *LIBRARY.glob("pairs/exits-off.toml")]):
        try:
            rehearse(twin, compiler.compile(scenario), hazards.see, enter=hazards.enter)
        except Peril:
            assert hazards.suspect(scenario), scenario.name
            lost += 1
    assert lost > 1
    (plain,) = files.parse('title = "t"\nmanual = "1"\nshows = "s"\n[[op]]\nrun = ["read a"]\n', "x", "x")
    by_any = hazard in ("nested-nx-at-table", "vmrun-unchecked", "other-paging")  # perhaps
    assert hazards.suspect(plain) == by_any


def test_a_machine_gets_further_by_a_quirk(twin: Twin, compiler: Compiler) -> None:
    """It does not look at the bit that ends the walk by rights, and comes to what it does not survive."""
    [scenario] = files.load([LIBRARY], lambda one: one == "regressions/nested-pdpte-behind[a]")
    program, (plain, further) = compiler.compile(scenario), HAZARDS.courses
    rehearse(twin, program, HAZARDS.see, enter=HAZARDS.enter, quirks=plain)
    with pytest.raises(Peril, match="erratum e1"):
        rehearse(twin, program, HAZARDS.see, enter=HAZARDS.enter, quirks=further)
    rehearse(twin, program, HAZARDS.see, enter=HAZARDS.enter)  # nothing of them is left
