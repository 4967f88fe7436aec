"""docs/library.md: its code is run, and says what stands there. And what the functions for dumps make of registers."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from harness.model import Cpu, Memory, NestedPageFault, Vmcb, by_cr3, by_vmcb, translate
from harness.model.given import FORMATS, OFF
from harness.model.registers import CR0, CR4, EFER
from tests.conftest import ROOT
from tests.model.tables import ALL_ACCESSES, GVA, RW, Space

PAGE = 0x5000_0000
SPA = 0x65_4000
VMCB = 0x20000


def dump() -> Space:
    """Memory with both tables, a page that L1 has made read-only, and a VMCB."""
    space = Space()
    space.map_guest(GVA, PAGE)
    space.change(space.map_nested(PAGE, SPA)["pte"], clear=RW)
    vmcb = Vmcb(space.memory, VMCB)
    values = {"np_control": 1, "ncr3": space.ncr3, "cr3": space.gcr3, "cr0": CR0.PE | CR0.PG | CR0.WP, "cr4": CR4.PAE,
              "efer": EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME}
    for name, value in values.items():
        vmcb[name] = value
    return space


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.bin").write_bytes(dump().memory.bytes)
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "library.md"), module_relative=False, verbose=False)
    assert tried > 10 and not failed


def test_by_cr3_is_by_vmcb() -> None:
    """Both ways to the same translation."""
    space = dump()
    one, other = by_cr3(space.gcr3, space.ncr3, cpu=Cpu(48)), by_vmcb(Vmcb(space.memory, VMCB), cpu=Cpu(48))
    assert one == other
    for access in ALL_ACCESSES:
        ours = translate(one, space.memory.words, GVA, access)
        assert ours == space.walk(GVA, access)
        assert isinstance(ours.outcome, NestedPageFault) == access.write


def test_registers_count() -> None:
    paging = by_cr3(0x1000, None, wp=False, smep=True, nxe=False)
    assert (paging.wp, paging.smep, paging.guest_id, paging.nested) == (False, True, True, None)
    assert not by_cr3(0x1000, None, nxe=False).guest_id
    assert by_cr3(0x1000, 0x2000, OFF).guest is None
    assert by_cr3(0, 0, "PAE", pkru=3).pkru == 0 and by_cr3(0, 0, pkru=3).pkru == 3


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    """Of L1 by the name: the same that its registers would select."""
    memory = Memory(1 << 16)
    Vmcb(memory, 0)["np_control"] = 1
    paging = by_vmcb(Vmcb(memory, 0), name)
    assert paging.nested == by_cr3(0, 0, nested=name).nested and paging.nested is not None
    assert paging.nested.name == name and paging.guest is None


def test_a_format_that_there_is_not() -> None:
    with pytest.raises(KeyError):
        by_cr3(0, 0, "6-level")
