"""What L2 starts with (15.5.1), its translation, and what a #VMEXIT leaves (15.6, 15.7.1)."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from harness.model.entries import FRAME
from harness.model.memory import Memory
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.vmcb import CONTROL, FIELDS, NP_ENABLE, SAVE, STATE, ExitCode, Vmcb
from harness.model.vmrun import LOADED, Host, load, paging, save

HOST = Host(cr0=CR0.PG | CR0.PE, cr4=CR4.PAE, efer=EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME, pat=0, dr7=0x400)
PAT = 0x0007_0406_0007_0406

LEGAL = {
    "intercept_misc2": 1, "asid": 1, "np_control": NP_ENABLE, "ncr3": 0x1000, "cr3": 0x2000, "g_pat": PAT,
    "cr0": CR0.PG | CR0.PE, "cr4": CR4.PAE, "efer": EFER.LME | EFER.LMA | EFER.SVME, "rflags": 2,
}


def vmcb(**changes: int) -> Vmcb:
    """A legal VMCB with `changes`; `cs_attrib` stands for cs.attrib."""
    out = Vmcb(Memory(0x2000), 0x1000)
    for name, value in (LEGAL | changes).items():
        out[name.replace("cs_attrib", "cs.attrib")] = value
    return out


class TestLoad:
    def test_gpat_is_l1s_without_nested_paging(self) -> None:
        """15.25.4: gPAT is loaded with nested paging only."""
        host = Host(HOST.cr0, HOST.cr4, HOST.efer, 0x0706, HOST.dr7)
        assert load(vmcb(g_pat=PAT), host).g_pat == PAT
        assert load(vmcb(g_pat=PAT, np_control=0), host).g_pat == 0x0706

    def test_names(self) -> None:
        """Those that L2 can change by itself and that VMRUN loads (15.5.1)."""
        assert set(LOADED) == {"cr0", "cr2", "cr3", "cr4", "efer", "dr6", "dr7", "rflags", "rip", "rsp", "rax", "cpl",
                               "g_pat"}

    def test_each_from_its_field(self) -> None:
        block = vmcb()
        for number, name in enumerate(("cr2", "cr3", "rip", "rsp", "rax", "g_pat")):
            block[name] = 0x1111_0000 + number
        regs = load(block, HOST)
        assert [regs.cr2, regs.cr3, regs.rip, regs.rsp, regs.rax, regs.g_pat] == [0x1111_0000 + n for n in range(6)]

    @pytest.mark.parametrize("lma", [0, EFER.LMA])
    @pytest.mark.parametrize("lme", [0, EFER.LME])
    @pytest.mark.parametrize("pg", [0, CR0.PG])
    def test_lma_is_lme_and_pg(self, lma: int, lme: int, pg: int) -> None:
        """15.5.1: EFER.LMA of the VMCB is not consulted."""
        regs = load(vmcb(efer=EFER.SVME | lma | lme, cr0=CR0.PE | pg), HOST)
        assert bool(regs.efer & EFER.LMA) == bool(lme and pg)

    def test_fixed_bits(self) -> None:
        """13.1.1, 3.1.1, 3.1.6: DR6, DR7, CR0.ET and RFLAGS bit 1 read with their fixed bits."""
        regs = load(vmcb(dr6=0, dr7=0, rflags=0), HOST)
        assert (regs.dr6, regs.dr7, regs.rflags) == (0xFFFF_0FF0, 0x400, RFLAGS.ONE)
        assert regs.cr0 & CR0.ET


class TestSave:
    def test_writes_all_back(self) -> None:
        block = vmcb()
        regs = load(block, HOST)
        for number, name in enumerate(LOADED):
            setattr(regs, name, 3 if name == "cpl" else 0x2222_0000 + number)
        save(block, regs)
        assert {name: block[name] for name in LOADED} == {name: getattr(regs, name) for name in LOADED}

    def test_gpat_only_with_nested_paging(self) -> None:
        """15.25.4."""
        block = vmcb(np_control=0, g_pat=0x55)
        regs = load(block, HOST)
        regs.g_pat = 0x66
        save(block, regs)
        assert block["g_pat"] == 0x55

    def test_nothing_else_is_written(self) -> None:
        """15.6: nCR3 is not written back (15.25.4), nor intercepts, ASID, TLB_CONTROL, FS to TR."""
        block = vmcb()
        for name in FIELDS.keys() - set(LOADED):
            if name != "fetched_bytes":
                block[name] = 0x5A
        before = {name: block[name] for name in FIELDS.keys() - set(LOADED) - {"fetched_bytes"}}
        save(block, load(block, HOST))
        assert {name: block[name] for name in before} == before


class TestPaging:
    """What of the VMCB and of L1 the translation depends on (15.25.3, 15.25.7)."""

    def _paging(self, host: Host = HOST, cpu: Cpu | None = None, **changes: int) -> Any:
        block = vmcb(**changes)
        return paging(load(block, host), block, host, cpu or Cpu(40))

    def test_plain(self) -> None:
        out = self._paging(cr3=0x12_3018)
        assert (out.gcr3, out.ncr3) == (0x12_3018, 0x1000)
        assert (out.wp, out.smep, out.smap, out.ac) == (False,) * 4
        assert out.guest is not None and out.guest.root_mask == FRAME

    @pytest.mark.parametrize(("field", "changes"), [
        ("wp", {"cr0": CR0.PG | CR0.PE | CR0.WP}), ("smep", {"cr4": CR4.PAE | CR4.SMEP}),
        ("smap", {"cr4": CR4.PAE | CR4.SMAP}), ("ac", {"rflags": RFLAGS.ONE | RFLAGS.AC}),
    ])
    def test_guest_switches(self, field: str, changes: dict[str, Any]) -> None:
        assert getattr(self._paging(**changes), field) is True

    def test_each_dimension_has_its_own_nxe(self) -> None:
        no_host = Host(HOST.cr0, HOST.cr4, HOST.efer & ~EFER.NXE, 0, 0)
        lme = EFER.LME | EFER.SVME
        nx_reserved = [
            [bool(fmt.levels[-1].reserved_leaf >> 63) for fmt in (out.guest, out.nested)]
            for out in (self._paging(), self._paging(efer=lme | EFER.NXE), self._paging(no_host),
                        self._paging(no_host, efer=lme | EFER.NXE))
        ]
        assert nx_reserved == [[True, False], [False, False], [True, True], [False, True]]

    @pytest.mark.parametrize(("changes", "reported"), [
        ({}, False), ({"efer": EFER.LME | EFER.SVME | EFER.NXE}, True), ({"cr4": CR4.PAE | CR4.SMEP}, True),
    ])
    def test_when_a_fetch_is_reported_by_a_page_fault(self, changes: dict[str, Any], reported: bool) -> None:
        """8.4.2: I/D iff L2 has EFER.NXE or CR4.SMEP, whatever L1 has."""
        assert self._paging(HOST, **changes).guest_id == reported

    def test_no_nested_paging(self) -> None:
        assert self._paging(np_control=0).nested is None

    def test_maxphyaddr_is_one_for_both(self) -> None:
        """Nothing replicates MAXPHYADDR for the guest (15.25.4 names what is)."""
        for bits in (40, 52):
            out = self._paging(cpu=Cpu(bits))
            assert [bool(f.levels[-1].reserved_leaf >> 51 & 1) for f in (out.guest, out.nested)] == [bits == 40] * 2

    @pytest.mark.parametrize(("name", "changes"), [
        ("4-level", {}),
        ("5-level", {"cr4": CR4.PAE | CR4.LA57}),
        ("PAE", {"efer": EFER.SVME}),
        ("32-bit", {"efer": EFER.SVME, "cr4": 0}),
        ("32-bit", {"efer": EFER.SVME, "cr4": CR4.LA57}),
    ])
    def test_the_format_follows_the_mode(self, name: str, changes: dict[str, Any]) -> None:
        """5.2 and 5.3: EFER.LMA, then CR4.PAE; CR4.LA57 counts in long mode only."""
        guest = self._paging(**changes).guest
        assert guest is not None and guest.name == name

    def test_paging_off(self) -> None:
        assert self._paging(cr0=CR0.PE, efer=EFER.SVME).guest is None


class TestLayout:
    """Appendix B: offsets that software everywhere relies on, and that no two fields share a byte."""

    @pytest.mark.parametrize(("name", "offset", "width"), [
        ("intercept_misc2", 0x10, 4), ("iopm_base", 0x40, 8), ("msrpm_base", 0x48, 8), ("asid", 0x58, 4),
        ("tlb_control", 0x5C, 1), ("v_intr", 0x60, 8), ("interrupt_shadow", 0x68, 8), ("exitcode", 0x70, 8),
        ("exitinfo1", 0x78, 8), ("exitinfo2", 0x80, 8), ("exitintinfo", 0x88, 8), ("np_control", 0x90, 8),
        ("eventinj", 0xA8, 8), ("ncr3", 0xB0, 8), ("clean", 0xC0, 4), ("nrip", 0xC8, 8), ("fetched_count", 0xD0, 1),
        ("es.selector", 0x400, 2), ("cs.attrib", 0x412, 2), ("ss.limit", 0x424, 4), ("ds.base", 0x438, 8),
        ("gdtr.base", 0x468, 8), ("idtr.limit", 0x484, 4), ("tr.selector", 0x490, 2), ("cpl", 0x4CB, 1),
        ("efer", 0x4D0, 8), ("cr4", 0x548, 8), ("cr3", 0x550, 8), ("cr0", 0x558, 8), ("dr7", 0x560, 8),
        ("dr6", 0x568, 8), ("rflags", 0x570, 8), ("rip", 0x578, 8), ("rsp", 0x5D8, 8), ("rax", 0x5F8, 8),
        ("kernel_gs_base", 0x620, 8), ("sysenter_eip", 0x638, 8), ("cr2", 0x640, 8), ("g_pat", 0x668, 8),
        ("debugctl", 0x670, 8), ("last_excp_to", 0x690, 8),
    ])
    def test_offset(self, name: str, offset: int, width: int) -> None:
        assert FIELDS[name] == (offset, width)

    def test_fields_are_apart(self) -> None:
        taken: dict[int, str] = {}
        for name, (offset, width) in FIELDS.items():
            for byte in range(offset, offset + width):
                assert byte not in taken, f"{name} and {taken[byte]}"
                taken[byte] = name
        assert all(field.offset < SAVE for field in CONTROL.values())
        assert all(field.offset >= SAVE for field in STATE.values())

    def test_access(self) -> None:
        block = vmcb()
        for name, (_, width) in FIELDS.items():
            if name != "fetched_bytes":
                block[name] = (1 << 8 * width) - 1
                assert block[name] == (1 << 8 * width) - 1
                with pytest.raises(struct.error):
                    block[name] = 1 << 8 * width

    def test_exit_codes(self) -> None:
        """Appendix C."""
        assert (ExitCode.VMMCALL, ExitCode.NPF, ExitCode.INVALID) == (0x81, 0x400, 0xFFFF_FFFF_FFFF_FFFF)
        assert [ExitCode.describe(c) for c in (0x81, 0x400, ExitCode.INVALID, 0x4E, 0x4D, 0x46, 0x999)] == [
            "VMEXIT_VMMCALL", "VMEXIT_NPF", "VMEXIT_INVALID", "VMEXIT_#PF", "VMEXIT_#GP", "VMEXIT_EXCP6",
            "VMEXIT 0x999",
        ]
