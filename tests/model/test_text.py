"""How the model's values read in messages, and the bit names that scenario files use."""

from __future__ import annotations

import pytest

from harness.model.access import ErrorCode, GeneralProtection, NestedPageFault, PageFault, Reached
from harness.model.memory import Memory
from harness.model.registers import REGISTER_BITS


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "0"), (0x1_0000_0007, "P|W|U|FINAL"), (0x2_0000_000F, "P|W|U|RSVD|GUEST-TABLE"), (1 << 10 | 1, "P|bit10"),
     (0x1F, "P|W|U|RSVD|ID"), (1 << 63, "bit63")],
)
def test_error_code(code: int, text: str) -> None:
    assert ErrorCode.describe(code) == text


def test_outcomes() -> None:
    assert str(Reached(0x7000, 0x5000)) == "sPA 0x7000"
    assert str(PageFault(3, 0x1234)) == "#PF 0x3 (P|W) at gVA 0x1234"
    assert str(NestedPageFault(0x1_0000_0004, 0x99)) == "#NPF 0x100000004 (U|FINAL) at gPA 0x99"
    assert str(GeneralProtection()) == "#GP 0x0"


def test_register_bits() -> None:
    """The manual's positions (3.1.1, 3.1.3, 3.1.6, 3.1.7)."""
    assert REGISTER_BITS["cr0"]["wp"] == 1 << 16 and REGISTER_BITS["cr0"]["pg"] == 1 << 31
    assert REGISTER_BITS["cr4"]["smep"] == 1 << 20 and REGISTER_BITS["cr4"]["smap"] == 1 << 21
    assert REGISTER_BITS["cr4"]["pae"] == 1 << 5 and REGISTER_BITS["cr4"]["la57"] == 1 << 12
    assert REGISTER_BITS["efer"]["nxe"] == 1 << 11 and REGISTER_BITS["efer"]["svme"] == 1 << 12
    assert REGISTER_BITS["rflags"]["ac"] == 1 << 18
    for bits in REGISTER_BITS.values():
        assert all(value.bit_count() == 1 for value in bits.values())


def test_memory() -> None:
    memory = Memory(1 << 31)  # sparse: nothing is allocated until it is written
    memory.write(0x7FFF_FFF0, 0x1122_3344_5566_7788_99, 8)
    assert memory.words[0x7FFF_FFF0 >> 3] == 0x2233_4455_6677_8899
    assert memory.read(0x7FFF_FFF1, 2) == 0x7788
    memory.write(0x1003, 0xAB, 1)
    assert memory.words[0x1000 >> 3] == 0xAB00_0000
    with pytest.raises(IndexError):
        memory.words[1 << 28]
