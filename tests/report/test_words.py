"""Values in words: entries, error codes, registers, outcomes, differences."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.model.access import GeneralProtection, NestedPageFault, Outcome, PageFault, Reached
from harness.model.entries import NX, PS, RW, US, A, D, P
from harness.report import words
from harness.scenario.ops import parse_probe
from harness.wire.image import tag
from tests.model.tables import WRITE
from tests.report.cases import SCENARIO, Case, divergence, entry, missing_a, narrow_walk

U64 = st.integers(0, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("value", "level", "names"),
    [
        (0, "pte", ()),
        (P | RW | US | A | D | PS | NX, "pde", ("P", "RW", "US", "A", "D", "PS", "NX")),
        (P | PS, "pte", ("P", "PAT")),
        (P | 1 << 3 | 1 << 4 | 1 << 8, "pte", ("P", "PWT", "PCD", "G")),
        (P | 1 << 11 | 1 << 52 | 1 << 62, "pte", ("P", "bit11", "bit52", "bit62")),
        (P | 0x000F_FFFF_FFFF_F000, "pte", ("P",)),  # a frame is no flags
    ],
)
def test_flags(value: int, level: str, names: tuple[str, ...]) -> None:
    assert words.flags(value, level) == names


@given(U64)
def test_flags_lose_no_bit(value: int) -> None:
    """Two entries with the same frame and the same names are the same entry."""
    named = {"P": 0, "RW": 1, "US": 2, "PWT": 3, "PCD": 4, "A": 5, "D": 6, "PS": 7, "G": 8, "NX": 63}
    bits = [named[n] if n in named else int(n.removeprefix("bit")) for n in words.flags(value, "pde")]
    assert sum(1 << bit for bit in bits) | value & 0x000F_FFFF_FFFF_F000 == value


FAULTS = st.one_of(
    st.builds(PageFault, U64, U64), st.builds(NestedPageFault, U64, U64), st.builds(GeneralProtection, U64)
)


@given(FAULTS)
def test_faults_are_read_back(outcome: Outcome) -> None:
    assert words.parse_outcome(str(outcome)) == outcome


@pytest.mark.parametrize("text", [str(Reached(0x1000, 0x2000)), "done, result 0x1", "VMEXIT_INVALID", "",
                                  "VMEXIT_SHUTDOWN, EXITINFO1 0x0, EXITINFO2 0x0"])
def test_other_outcomes_are_no_faults(text: str) -> None:
    assert words.parse_outcome(text) is None


@pytest.mark.parametrize(
    ("field", "address"),
    [("entry at sPA 0x1234", 0x1234), ("entry at sPA 0x1000 before VMRUN", 0x1000), ("memory at sPA 0x1000", None),
     ("entries changed by one VMRUN", None), ("cr0", None)],
)
def test_entry_address(field: str, address: int | None) -> None:
    assert words.entry_address(field) == address


@pytest.mark.parametrize(
    ("field", "expected", "observed", "value", "difference"),
    [
        ("cr0", 0x8001_0011, 0x8000_0011, "0x80010011 (PE|ET|WP|PG)", "WP is missing"),
        ("l1.cr4", 0x20, 0xA0, "0x20 (PAE)", "PGE must not be set"),
        ("vmcb.efer before VMRUN", 0x1000, 0x500, "0x1000 (SVME)", "SVME is missing, LME and LMA must not be set"),
        ("rdcr0", 1, 0, "0x1 (PE)", "PE is missing"),
        ("rdflags", 0x202, 2, "0x202 (bit1|IF)", "IF is missing"),
        ("rflags", 2, 0x40002, "0x2 (bit1)", "AC must not be set"),
        ("rip", 0x1000, 0x2000, "0x1000", ""),
        ("cr2", 7, 8, "0x7", ""),
        ("cr0", 0, 7, "0x0", "PE, MP and EM must not be set"),
        ("exitcode", 0x400, 0x4E, "0x400 (VMEXIT_NPF)", ""),
        ("outcome", "VMEXIT_INVALID", "done", "VMEXIT_INVALID", ""),
    ],
)
def test_registers(field: str, expected: Any, observed: Any, value: str, difference: str) -> None:
    one = divergence(check="C3", field=field, expected=expected, observed=observed)
    assert words.value(one, one.expected) == value
    assert words.difference(one) == difference


def test_error_code() -> None:
    """EXITINFO1 has an error code's bits only where a fault put one there."""
    case = Case()
    case.space.change(case.final["pte"], clear=RW)
    walk = case.walk(WRITE)
    one = divergence(walk, field="exitinfo1", expected=0x1_0000_0007, observed=0x2_0000_0006)
    assert words.value(one, one.expected) == "0x100000007 (P|W|U|FINAL)"
    assert words.difference(one) == "P and FINAL are missing, GUEST-TABLE must not be set"
    other = divergence(field="exitinfo1", expected=0x1_0000_0007, observed=6)
    assert words.value(other, other.expected) == "0x100000007"
    assert words.difference(other) == ""


def test_entry() -> None:
    case = Case()
    walk = case.walk()
    one = missing_a(case, case.final["pde"], walk)
    assert words.difference(one) == "A is missing"
    assert words.value(one, one.expected).endswith("(P|RW|US|A)")
    step = words.step_of(one)
    assert step is not None and (step.dimension, step.level, step.purpose) == ("nested", "pde", "final")


def test_unchanged_entry() -> None:
    """`unchanged` is what the walk read there; where it read nothing there is nothing to compare with."""
    case = Case()
    walk = case.walk(WRITE)
    read = words.step_of(entry(walk, case.guest["pte"], 0, 0))
    assert read is not None
    assert words.difference(entry(walk, case.guest["pte"], read.entry | A | D, "unchanged")) == "A and D are missing"
    assert words.difference(entry(walk, case.guest["pte"], "unchanged", read.entry | NX)) == "NX must not be set"
    assert words.difference(entry(walk, case.guest["pte"], read.entry, read.entry ^ 1 << 20)) == "its frame is another"
    assert words.difference(entry(walk, 0x8000, "unchanged", 7)) == "it must stay as it was"
    assert words.difference(entry(None, 0x8000, 7, "unchanged")) == "it must change"
    assert words.difference(entry(None, 0x8000, 7, 7 | 1 << 38)) == "it is 0x4000000007, and must be 0x7"


def test_entries_that_no_walk_read() -> None:
    """By name if they are in use; but two entries of four bytes are not one of eight."""
    one = entry(None, 0x8000, 0x27, 0x67 << 32)
    assert words.value(one, one.expected) == "0x27 (P|RW|US|A)"
    assert words.value(one, one.observed) == "0x6700000000"


def test_entries_of_four_bytes() -> None:
    """32-bit paging: a divergence is about a quadword, the entry is half of it."""
    space, walk = narrow_walk()
    pde = next(step.address for step in walk.steps if step.dimension == "guest")
    assert pde & 4
    quadword = space.get(pde & ~7)
    one = entry(walk, pde & ~7, quadword | A << 32, quadword)
    assert words.difference(one) == "A is missing"
    assert words.value(one, one.expected).endswith("(P|RW|US|A)")


@pytest.mark.parametrize(
    ("probe", "observed", "spa"),
    [("read a", tag(0x47_1008), 0x47_1008), ("fetch a", 0x47_1000 >> 3, 0x47_1000), ("read a", 0x1234, None),
     ("read4 a", tag(0x47_1008) & 0xFFFF_FFFF, None), ("rmw a", tag(0x47_1008), None)],
)
def test_where_a_value_is_from(probe: str, observed: int, spa: int | None) -> None:
    one = divergence(Case().walk(), field="value", expected=tag(0x65_4000), observed=observed)
    assert words.reached_instead(one, parse_probe(probe)) == spa


def test_probe_of() -> None:
    found = words.probe_of(SCENARIO, 1, 1)
    assert found is not None and (str(found[0]), found[1]) == ("write a+0x8", 3)
    for op, probe in ((0, 0), (1, 4), (1, -1), (2, 0), (-1, -1)):
        assert words.probe_of(SCENARIO, op, probe) is None
    assert words.probe_of(None, 1, 1) is None


@pytest.mark.parametrize(("mask", "said"), [
    (1 << 52, "bit 52"), (1, "bit 0"), (1 << 63 | 1, "bits 63 and 0"), (0xF << 48, "bits 51:48"),
    (0xF << 48 | 1 << 8 | 6, "bits 51:48, 8 and 2:1"), ((1 << 64) - 1, "bits 63:0")])
def test_bits_by_number(mask: int, said: str) -> None:
    assert words.bits(mask) == said
