"""What cannot be written to a register, case by case, beside what can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.model.illegal import is_illegal
from harness.model.registers import CR4, EFER, Cpu
from harness.model.vmrun import Registers

CPU = Cpu(maxphyaddr=40, features=frozenset({"nx", "smep", "smap", "la57", "lmsle"}))
_REST = dict.fromkeys(("cpl", "dr7", "dr6", "rflags", "rip", "rsp", "rax", "cr2", "g_pat"), 0)
LONG = Registers(cr0=0x8005_0033, cr3=0x1000, cr4=CR4.PAE, efer=EFER.LME | EFER.LMA | EFER.SVME, **_REST)


@pytest.mark.parametrize(("name", "legal", "illegal"), [
    ("cr0", 0x8005_0033, 0x1_8005_0033), ("cr0", 0x8005_0033, 0x8005_0032), ("cr0", 0xE005_0033, 0xA005_0033),
    ("cr3", (1 << 40) - 1, 1 << 40), ("cr3", 0, 1 << 63),
    ("cr4", CR4.PAE | CR4.SMEP, CR4.PAE | CR4.PKE), ("cr4", CR4.PAE, 0), ("cr4", CR4.PAE, CR4.PAE | CR4.LA57),
    ("cr4", CR4.PAE, CR4.PAE | 1 << 32), ("cr8", 15, 16), ("dr6", 0xFFFF_0FF0, 1 << 32),
    ("dr7", 0x400, 1 << 63 | 0x400),
    ("efer", LONG.efer | EFER.NXE, LONG.efer | 1 << 9), ("efer", LONG.efer, LONG.efer & ~EFER.LME),
])
def test_each_rule_alone(name: str, legal: int, illegal: int) -> None:
    assert not is_illegal(name, legal, LONG, CPU) and is_illegal(name, illegal, LONG, CPU)


def test_what_long_mode_wants_only_it_wants() -> None:
    legacy = replace(LONG, efer=EFER.SVME, cr0=0x33)
    assert not is_illegal("cr4", 0, legacy, CPU) and not is_illegal("cr3", 1 << 40, legacy, CPU)
    assert not is_illegal("efer", EFER.LME, legacy, CPU)


def test_bit_63_of_cr3_is_pcids() -> None:
    assert not is_illegal("cr3", 1 << 63, replace(LONG, cr4=CR4.PAE | CR4.PCIDE), CPU)


@pytest.mark.parametrize("name", ["", "star", "cr2", "flags"])
def test_other_registers_are_not_decided(name: str) -> None:
    assert not is_illegal(name, (1 << 64) - 1, LONG, CPU)
