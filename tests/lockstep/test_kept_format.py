"""The format in which KVM up to 5.13 has L1's nested table, by the VMRUNs before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.lockstep.kept_format import KeptFormat
from harness.model.access import Access, ErrorCode, NestedPageFault, Reached
from harness.model.entries import KEY_SHIFT, RW, US, P, legacy, long_mode, pae
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmcb import CONTROL, SAVE, STATE
from harness.model.vmrun import Host
from harness.model.walk import FINAL, GUEST, NESTED, Paging, Walk

CPU = Cpu(40)
LONG = EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME
L1 = Host(CR0.PG | CR0.PE, CR4.PAE, LONG, 0, 0x400)
L1_PAE = replace(L1, efer=EFER.NXE)
L1_LEGACY = replace(L1, cr4=CR4.PSE, efer=EFER.NXE)


def vmcb(cr4: int = CR4.PAE, efer: int = LONG, np: int = 1, cr0: int = CR0.PG | CR0.PE) -> tuple[bytes, bytes]:
    control, save = bytearray(0x400), bytearray(0x300)
    control[CONTROL["np_control"].offset] = np
    for name, value in {"cr0": cr0, "cr4": cr4, "efer": efer}.items():
        at = STATE[name].offset - SAVE
        save[at : at + 8] = value.to_bytes(8, "little")
    return bytes(control), bytes(save)


@pytest.fixture
def kept() -> KeptFormat:
    return KeptFormat(CPU)


@pytest.mark.parametrize(("cr4", "efer", "levels", "nxe"), [
    (CR4.PAE, LONG, "4-level", True), (CR4.PAE | CR4.LA57, LONG, "5-level", True),
    (CR4.PAE | CR4.LA57, EFER.SVME, "4-level", False), (CR4.PAE, LONG & ~EFER.NXE, "4-level", False)])
def test_long_mode_by_l2(kept: KeptFormat, cr4: int, efer: int, levels: str, nxe: bool) -> None:
    """Levels and NX are L2's, whatever L1 has."""
    kept.entered(*vmcb(cr4, efer), L1)
    assert kept.format == long_mode(40, nxe, True, levels == "5-level")
    assert kept.tells_fetches == nxe


def test_the_kind_is_l1s(kept: KeptFormat) -> None:
    kept.entered(*vmcb(), L1_PAE)
    assert kept.format == pae(40, True)
    kept.entered(*vmcb(CR4.PSE, EFER.SVME), L1_LEGACY)
    assert kept.format == legacy(40, True) and not kept.tells_fetches
    kept.entered(*vmcb(CR4.SMEP, EFER.SVME), L1_LEGACY)
    assert kept.format == legacy(40, False) and kept.tells_fetches


def test_it_stays_while_l2_is_as_it_was(kept: KeptFormat) -> None:
    """Also where L1 is in another mode now; a VMRUN without nested paging changes nothing."""
    kept.entered(*vmcb(), L1)
    kept.entered(*vmcb(), L1_PAE)
    assert kept.format == long_mode(40, True, True, False)
    kept.entered(*vmcb(CR4.PAE | CR4.LA57, np=0), L1)
    assert kept.format == long_mode(40, True, True, False)
    kept.entered(*vmcb(CR4.PAE | CR4.SMAP), L1_PAE)
    assert kept.format == pae(40, True)


def test_none_before_the_first(kept: KeptFormat) -> None:
    assert kept.format is None


def test_a_vmrun_that_is_refused(kept: KeptFormat) -> None:
    kept.entered(*vmcb(), L1)
    kept.entered(*vmcb(CR4.PAE | CR4.LA57), L1)
    kept.refused()
    assert kept.format == long_mode(40, True, True, False)


PAGING = Paging(long_mode(40, True), 0x5000, True, False, False, False, True, long_mode(40, True), 0x1000)
KEY_3 = 3 << KEY_SHIFT
READ, WRITE, FETCH = Access(), Access(write=True), Access(fetch=True)


def walk(table_key: int = 0, page_key: int = 0) -> Walk:
    """By one level of each: enough to be asked for keys."""
    bits = P | RW | US
    return Walk(Reached(0x9123, 0x7123), "reached", [
        (NESTED, "pte", "pte", 0x1028, 0x8000 | bits | table_key), (GUEST, "pte", "", 0x8123, 0x7000 | bits),
        (NESTED, "pte", FINAL, 0x1038, 0x9000 | bits | page_key)], [])


@pytest.mark.parametrize(("one", "access", "pkru", "code", "gpa"), [
    (walk(page_key=KEY_3), READ, 1 << 6, ErrorCode.P | ErrorCode.U | ErrorCode.PK | ErrorCode.FINAL, 0x7123),
    (walk(page_key=KEY_3), WRITE, 2 << 6,
     ErrorCode.P | ErrorCode.U | ErrorCode.W | ErrorCode.PK | ErrorCode.FINAL, 0x7123),
    (walk(table_key=KEY_3), FETCH, 2 << 6,
     ErrorCode.P | ErrorCode.U | ErrorCode.W | ErrorCode.PK | ErrorCode.GUEST_TABLE, 0x5123),
])
def test_keys(kept: KeptFormat, one: Walk, access: Access, pkru: int, code: int, gpa: int) -> None:
    kept.entered(*vmcb(CR4.PAE | CR4.PKE), L1)
    assert kept.keyed(PAGING, one, access, pkru).outcome == NestedPageFault(code, gpa)


@pytest.mark.parametrize(("one", "access", "pkru", "cr4"), [
    (walk(page_key=KEY_3), READ, 2 << 6, CR4.PKE), (walk(page_key=KEY_3), FETCH, 3 << 6, CR4.PKE),
    (walk(page_key=KEY_3), WRITE, 3 << 4, CR4.PKE), (walk(page_key=KEY_3), WRITE, 3 << 6, 0)])
def test_keys_that_permit_it(kept: KeptFormat, one: Walk, access: Access, pkru: int, cr4: int) -> None:
    kept.entered(*vmcb(CR4.PAE | cr4), L1)
    assert kept.keyed(PAGING, one, access, pkru) is one


def test_what_is_not_seen_of_what_l1_writes(kept: KeptFormat) -> None:
    def missed() -> tuple[bool, bool]:
        return kept.keeps_tables, kept.takes_entries_for_long

    assert missed() == (False, False)
    kept.entered(*vmcb(CR4.PAE | CR4.LA57), L1)
    assert missed() == (True, False)
    kept.entered(*vmcb(), L1_LEGACY)
    assert missed() == (False, True)
    kept.entered(*vmcb(CR4.PSE, EFER.SVME), L1_LEGACY)
    assert missed() == (False, False)
