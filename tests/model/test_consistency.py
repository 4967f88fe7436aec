"""VMRUN's consistency checks: each of 15.5.1, 15.20, 15.21.10, 15.25.3, 15.25.4, 15.25.14 and 15.29.4, violated
alone, and the nearest VMCB that is legal."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from harness.model.consistency import CHECKS, violations
from harness.model.entries import P
from harness.model.memory import Memory
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.rules import RULES
from harness.model.vmrun import Host
from harness.wire.layout import FEATURES
from tests.model.test_vmrun import HOST, LEGAL, PAT, vmcb

M40 = 1 << 40
EVERYTHING = frozenset(FEATURES)
PDPT = 0x40


def verdict(cpu: Cpu | None = None, host: Host = HOST, pdpes: tuple[int, ...] = (), **changes: int) -> str:
    """The first rule that is broken, with `pdpes` at PDPT."""
    ram = Memory(0x1000)
    for number, entry in enumerate(pdpes):
        ram.words[PDPT // 8 + number] = entry
    return next(violations(vmcb(**changes), host, cpu or Cpu(40, features=EVERYTHING), ram.words), "")


def test_legal() -> None:
    assert verdict() == ""


def test_each_check_has_its_rule() -> None:
    """Each is in the table of rules, none twice; and a VMCB that breaks several breaks all of them."""
    assert {check.rule for check in CHECKS} == {rule for rule in RULES if rule.startswith("vmrun.")} - {"vmrun.legal"}
    assert len({check.rule for check in CHECKS}) == len(CHECKS)
    broken = list(violations(vmcb(efer=0, asid=0, cr0=CR0.NW), HOST, Cpu(), Memory(8).words))
    assert broken == ["vmrun.efer-svme", "vmrun.cr0-nw", "vmrun.asid"]


@pytest.mark.parametrize(
    ("rule", "bad", "just_legal"),
    [
        ("vmrun.efer-svme", {"efer": EFER.LME | EFER.LMA}, {"efer": EFER.LME | EFER.SVME}),
        ("vmrun.cr0-nw", {"cr0": CR0.PG | CR0.PE | CR0.NW}, {"cr0": CR0.PG | CR0.PE | CR0.NW | CR0.CD}),
        ("vmrun.cr0-nw", {"cr0": CR0.PG | CR0.PE | CR0.NW}, {"cr0": CR0.PG | CR0.PE | CR0.CD}),
        ("vmrun.cr0-high", {"cr0": CR0.PG | CR0.PE | 1 << 32}, {"cr0": CR0.PG | CR0.PE | 1 << 28}),
        ("vmrun.cr0-high", {"cr0": CR0.PG | CR0.PE | 1 << 63}, {"cr0": CR0.PG | CR0.PE | 0x1FFA_FFC0}),
        ("vmrun.cr3-mbz", {"cr3": M40}, {"cr3": M40 - 0x1000}),
        ("vmrun.cr3-mbz", {"cr3": 1 << 63}, {"cr3": 0xFFF}),  # 3.1.2: PWT, PCD and PCID or available bits
        ("vmrun.cr3-mbz", {"cr3": 1 << 52}, {"cr3": 0}),
        ("vmrun.cr4-mbz", {"cr4": CR4.PAE | 1 << 13}, {"cr4": CR4.PAE | CR4.LA57}),
        ("vmrun.cr4-mbz", {"cr4": CR4.PAE | 1 << 15}, {"cr4": CR4.PAE | CR4.FSGSBASE}),
        ("vmrun.cr4-mbz", {"cr4": CR4.PAE | 1 << 19}, {"cr4": CR4.PAE | CR4.OSXSAVE}),
        ("vmrun.cr4-mbz", {"cr4": CR4.PAE | 1 << 24}, {"cr4": CR4.PAE | CR4.PKE}),
        ("vmrun.cr4-mbz", {"cr4": CR4.PAE | 1 << 32}, {"cr4": CR4.PAE | CR4.SMEP | CR4.SMAP}),
        ("vmrun.cr4-mbz", {"cr4": CR4.PAE | 1 << 63}, {"cr4": 0x7FF}),
        ("vmrun.dr6-high", {"dr6": 1 << 32}, {"dr6": 0xFFFF_FFFF}),
        ("vmrun.dr7-high", {"dr7": 1 << 32}, {"dr7": 0xFFFF_FFFF}),
        ("vmrun.dr7-high", {"dr7": 1 << 63}, {"dr7": 0}),
        ("vmrun.efer-mbz", {"efer": EFER.LME | EFER.SVME | 1 << 9}, {"efer": EFER.LME | EFER.SVME | EFER.SCE}),
        ("vmrun.efer-mbz", {"efer": EFER.LME | EFER.SVME | 1 << 16}, {"efer": EFER.LME | EFER.SVME | EFER.NXE}),
        ("vmrun.efer-mbz", {"efer": EFER.LME | EFER.SVME | 1 << 19}, {"efer": EFER.LME | EFER.SVME | EFER.FFXSR}),
        ("vmrun.efer-mbz", {"efer": EFER.LME | EFER.SVME | 1 << 22}, {"efer": EFER.LME | EFER.SVME | EFER.LMA}),
        ("vmrun.efer-mbz", {"efer": EFER.LME | EFER.SVME | 1 << 63}, {"efer": EFER.LME | EFER.SVME}),
        ("vmrun.efer-mbz", {"efer": EFER.LME | EFER.SVME | 1 << 9}, {"efer": EFER.LME | EFER.SVME | 0xFE}),
        ("vmrun.long-pae", {"cr4": 0}, {"cr4": 0, "efer": EFER.SVME}),
        ("vmrun.long-pae", {"cr4": CR4.PGE}, {"cr4": 0, "cr0": CR0.PE}),
        ("vmrun.long-pe", {"cr0": CR0.PG}, {"cr0": CR0.PG, "efer": EFER.SVME}),  # paged real mode (15.19)
        ("vmrun.cs-l-d", {"cs_attrib": 0x600}, {"cs_attrib": 0x200}),
        ("vmrun.cs-l-d", {"cs_attrib": 0xFFF}, {"cs_attrib": 0xDFF}),
        ("vmrun.intercept", {"intercept_misc2": 0xFFFF_FFFE}, {"intercept_misc2": 1}),
        ("vmrun.permission-maps", {"msrpm_base": M40 - 0x1000}, {"msrpm_base": M40 - 0x3000}),
        ("vmrun.permission-maps", {"iopm_base": M40 - 0x2000}, {"iopm_base": M40 - 0x3000}),
        ("vmrun.permission-maps", {"iopm_base": M40 - 0x2000 + 0xFFF}, {"iopm_base": M40 - 0x3000 + 0xFFF}),
        ("vmrun.permission-maps", {"iopm_base": 1 << 63}, {"iopm_base": 0xFFF}),
        ("vmrun.eventinj", {"eventinj": 1 << 31 | 1 << 8}, {"eventinj": 1 << 8}),  # type 1; not valid
        ("vmrun.eventinj", {"eventinj": 1 << 31 | 5 << 8}, {"eventinj": 1 << 31 | 4 << 8 | 0xFF}),
        ("vmrun.eventinj", {"eventinj": 1 << 31 | 6 << 8}, {"eventinj": 1 << 31 | 2}),  # an external interrupt
        ("vmrun.eventinj", {"eventinj": 1 << 31 | 7 << 8}, {"eventinj": 1 << 31 | 2 << 8 | 99}),  # an NMI
        ("vmrun.eventinj", {"eventinj": 1 << 31 | 3 << 8 | 2}, {"eventinj": 1 << 31 | 3 << 8 | 3}),
        ("vmrun.eventinj", {"eventinj": 1 << 31 | 3 << 8 | 32}, {"eventinj": 1 << 31 | 3 << 8 | 14}),
        *(("vmrun.eventinj", {"eventinj": 1 << 31 | 3 << 8 | n}, {"eventinj": 1 << 31 | 3 << 8 | m})
          for n, m in ((9, 8), (15, 14), (20, 19), (22, 21), (27, 28), (31, 30))),  # table 8-1
        ("vmrun.eventinj-mode", {"eventinj": 1 << 31 | 3 << 8 | 5, "cs_attrib": 0x200},
         {"eventinj": 1 << 31 | 3 << 8 | 5}),
        ("vmrun.eventinj-mode", {"eventinj": 1 << 31 | 3 << 8 | 4, "cs_attrib": 0x200},
         {"eventinj": 1 << 31 | 4 << 8 | 4, "cs_attrib": 0x200}),
        ("vmrun.eventinj-mode", {"eventinj": 1 << 31 | 3 << 8 | 5, "cs_attrib": 0x200},
         {"eventinj": 1 << 31 | 3 << 8 | 5, "cs_attrib": 0x200, "efer": EFER.SVME}),
        ("vmrun.asid", {"asid": 0}, {"asid": 1}),
        ("vmrun.asid", {"asid": 0}, {"asid": 0xFFFF_FFFF}),
        ("vmrun.s-cet", {"s_cet": 1 << 2}, {"s_cet": 3}),
        ("vmrun.s-cet", {"s_cet": 1 << 63}, {"s_cet": 0}),
        ("vmrun.cet-wp", {"cr4": CR4.PAE | CR4.CET}, {"cr4": CR4.PAE | CR4.CET, "cr0": CR0.PG | CR0.PE | CR0.WP}),
        ("vmrun.v-nmi", {"v_intr": 1 << 26}, {"v_intr": 1 << 26, "intercept_misc1": 2}),
        ("vmrun.v-nmi", {"v_intr": 1 << 26, "intercept_misc1": 0xFFFF_FFFD}, {"v_intr": 1 << 24}),
        ("vmrun.x2avic", {"v_intr": 1 << 30}, {"v_intr": 3 << 30}),
        ("vmrun.avic-pointers", {"v_intr": 1 << 31, "avic_backing_page": M40},
         {"v_intr": 1 << 31, "avic_backing_page": M40 - 0x1000}),
        ("vmrun.avic-pointers", {"v_intr": 1 << 31, "avic_physical_table": M40},
         {"v_intr": 1 << 31, "avic_physical_table": M40 - 0x1000}),
        ("vmrun.avic-pointers", {"v_intr": 1 << 31, "avic_logical_table": M40},
         {"v_intr": 3 << 30, "avic_logical_table": M40}),
        ("vmrun.avic-pointers", {"v_intr": 1 << 31, "avic_backing_page": 1 << 63},
         {"v_intr": 0, "avic_backing_page": 1 << 63}),
        ("vmrun.avic-index", {"v_intr": 1 << 31, "avic_physical_table": 256},
         {"v_intr": 1 << 31, "avic_physical_table": 255}),
        ("vmrun.avic-index", {"v_intr": 1 << 31, "avic_physical_table": 256},
         {"v_intr": 3 << 30, "avic_physical_table": 4095}),
        ("vmrun.ncr3-mbz", {"ncr3": M40}, {"ncr3": M40 - 1}),
        ("vmrun.ncr3-mbz", {"ncr3": 1 << 63}, {"ncr3": 1 << 63, "np_control": 0}),
        ("vmrun.g-pat", {"g_pat": PAT | 2 << 56}, {"g_pat": 0x0706_0504_0100_0706}),
        ("vmrun.g-pat", {"g_pat": PAT & ~0xFF | 3}, {"g_pat": 0}),
        ("vmrun.g-pat", {"g_pat": PAT & ~0xFF00 | 0x800}, {"g_pat": PAT}),
        ("vmrun.g-pat", {"g_pat": PAT | 1 << 31}, {"g_pat": PAT | 1 << 31, "np_control": 0}),
        ("vmrun.sss", {"np_control": 1 << 4}, {"np_control": 1 << 4 | 1}),
        ("vmrun.sss", {"np_control": 1 << 4}, {"np_control": 1 << 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rule(rule: str, bad: dict[str, Any], just_legal: dict[str, Any]) -> None:
    """Each rule of 15.5.1, 15.20 and 15.25.3/4, violated alone; and the nearest that is not."""
    assert verdict(**bad) == rule
    assert verdict(**just_legal) == ""


@pytest.mark.parametrize(("cr0", "legal"), [(CR0.PG | CR0.PE, True), (CR0.PE, False)])
def test_nested_paging_needs_paging_in_the_host(cr0: int, legal: bool) -> None:
    """15.25.3: NP_ENABLE=1 with L1's CR0.PG=0 is illegal."""
    host = Host(cr0, HOST.cr4, HOST.efer, HOST.pat, HOST.dr7)
    assert verdict(host=host) == ("" if legal else "vmrun.host-paging")
    assert verdict(host=host, np_control=0) == ""


@pytest.mark.parametrize(("feature", "bit"), [
    ("umip", 11), ("la57", 12), ("fsgsbase", 16), ("pcid", 17), ("xsave", 18), ("smep", 20), ("smap", 21), ("pku", 22),
    ("cet", 23),
])
def test_cr4_bits_of_missing_features_are_reserved(feature: str, bit: int) -> None:
    cr0, cr4 = LEGAL["cr0"] | CR0.WP, CR4.PAE | 1 << bit
    assert verdict(Cpu(40, features=EVERYTHING), cr4=cr4, cr0=cr0) == ""
    assert verdict(Cpu(40, features=EVERYTHING - {feature}), cr4=cr4, cr0=cr0) == "vmrun.cr4-mbz"


@pytest.mark.parametrize("maxphyaddr", [36, 40, 48, 52])
def test_the_limit_is_the_cpus(maxphyaddr: int) -> None:
    cpu, limit = Cpu(maxphyaddr, features=EVERYTHING), 1 << maxphyaddr
    assert verdict(cpu, cr3=limit - 0x1000, ncr3=limit - 0x1000, iopm_base=limit - 0x3000) == ""
    cases: tuple[dict[str, Any], ...] = ({"cr3": limit}, {"ncr3": limit}, {"iopm_base": limit}, {"msrpm_base": limit})
    for changes in cases:
        assert verdict(cpu, **changes)


@pytest.mark.parametrize(("feature", "bit"), [
    ("nx", 11), ("lmsle", 13), ("ffxsr", 14), ("tce", 15), ("mcommit", 17), ("intwb", 18), ("uai", 20), ("aibrs", 21),
])
def test_efer_bits_of_missing_features_are_reserved(feature: str, bit: int) -> None:
    efer = EFER.LME | EFER.SVME | 1 << bit
    assert verdict(Cpu(40, features=EVERYTHING), efer=efer) == ""
    assert verdict(Cpu(40, features=EVERYTHING - {feature}), efer=efer) == "vmrun.efer-mbz"


def test_cr3_is_not_checked_outside_long_mode() -> None:
    """Bits 63:32 of CR3 are not used there; the check of 15.5.1 is on the reserved bits of the mode."""
    assert verdict(cr3=1 << 45, efer=EFER.SVME) == ""


@pytest.mark.parametrize(("feature", "changes"), [
    ("cet", {"s_cet": 1 << 63}), ("vnmi", {"v_intr": 1 << 26}), ("avic", {"v_intr": 1 << 31, "avic_backing_page": M40}),
    ("x2avic", {"v_intr": 1 << 30}), ("sss", {"np_control": 1 << 4}),
])
def test_what_the_cpu_lacks_is_not_looked_at(feature: str, changes: dict[str, Any]) -> None:
    assert verdict(**changes) != ""
    assert verdict(Cpu(40, features=EVERYTHING - {feature}), **changes) == ""


def test_the_index_of_x2avic_where_it_is_not_extended() -> None:
    """15.29.4.3: above 511."""
    cpu = Cpu(40, features=EVERYTHING - {"x2avic_ext"})
    assert verdict(cpu, v_intr=3 << 30, avic_physical_table=512) == "vmrun.avic-index"
    assert verdict(cpu, v_intr=3 << 30, avic_physical_table=511) == ""


@pytest.mark.parametrize("bit", [EFER.LME, EFER.LMA])
def test_no_long_mode(bit: int) -> None:
    """15.5.1: of a processor that has none; paging is off, so that no other rule is broken."""
    cpu = Cpu(40, features=EVERYTHING, long_mode=False)
    assert verdict(cpu, cr0=CR0.PE, efer=EFER.SVME | bit) == "vmrun.no-long-mode"
    assert verdict(cpu, cr0=CR0.PE, efer=EFER.SVME) == ""
    assert verdict(cr0=CR0.PE, efer=EFER.SVME | bit) == ""


@pytest.mark.parametrize("missing", ["cet", "ss", "vm", None])
def test_shadow_stacks_in_virtual_8086_mode(missing: str | None) -> None:
    """15.5.1: CR4.CET, U_CET's shadow stack enable and RFLAGS.VM: all three."""
    host = Host(HOST.cr0, HOST.cr4, HOST.efer, 0, 0, u_cet=0 if missing == "ss" else 1)
    found = verdict(
        host=host, cr0=LEGAL["cr0"] | CR0.WP, cr4=CR4.PAE | (0 if missing == "cet" else CR4.CET),
        rflags=RFLAGS.ONE | (0 if missing == "vm" else RFLAGS.VM),
    )
    assert found == ("" if missing else "vmrun.cet-vm")


class TestPdpes:
    """15.5.1: VMRUN into PAE paging without nested paging reads the four PDPEs; reserved bits of 5.2.3."""

    PAE: ClassVar[dict[str, Any]] = {"efer": EFER.SVME, "np_control": 0, "cr3": PDPT}

    @pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 51, 52, 62, 63])
    @pytest.mark.parametrize("number", range(4))
    def test_reserved_bits(self, number: int, bit: int) -> None:
        pdpes = tuple(P | (1 << bit if n == number else 0) for n in range(4))
        assert verdict(pdpes=pdpes, **self.PAE) == "vmrun.pdpe"
        absent = tuple(entry & ~P for entry in pdpes)
        assert verdict(pdpes=absent, **self.PAE) == ""

    @pytest.mark.parametrize("bit", [3, 4, 9, 11, 12, 39])
    def test_others(self, bit: int) -> None:
        assert verdict(pdpes=(P | 1 << bit,), **self.PAE) == ""

    def test_only_four(self) -> None:
        assert verdict(pdpes=(P, P, P, P, P | 1 << 63), **self.PAE) == ""

    @pytest.mark.parametrize("changes", [
        {"np_control": 1}, {"efer": EFER.SVME | EFER.LME}, {"cr0": CR0.PE}, {"cr4": 0},
    ])
    def test_only_there(self, changes: dict[str, Any]) -> None:
        """With nested paging they are read in the walk (15.25.10)."""
        assert verdict(pdpes=(P | 1 << 63,), **self.PAE | changes) == ""

    def test_paged_real_mode(self) -> None:
        assert verdict(pdpes=(P | 1 << 63,), **self.PAE | {"cr0": CR0.PG}) == "vmrun.pdpe"

    def test_where_cr3_points(self) -> None:
        """Bits 31:5 locate it."""
        assert verdict(pdpes=(P | 1 << 63,), **self.PAE | {"cr3": PDPT | 0x1F | 1 << 40}) == "vmrun.pdpe"
        with pytest.raises(IndexError):
            verdict(**self.PAE | {"cr3": 0x8000_0000})
