"""The sentence that says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from harness.model.access import Access
from harness.model.entries import NX, PS, RW, US, A, P
from harness.report.headline import cited, headline, kind
from harness.wire.image import tag
from tests.model.tables import WRITE
from tests.report.cases import SCENARIO, Case, divergence, entry, extra_d, missing_a, only, went_through

READ_ONLY = "the nested pte for the page itself has R/W=0; manual 15.25.7."


def test_another_access_faults() -> None:
    """It is not the probe that faulted where RIP is another too."""
    case = Case()
    case.space.change(case.final["pte"], clear=RW)
    walk = case.walk(WRITE)
    fields = (divergence(walk, field="exitinfo2", expected=1, observed=2),
              divergence(walk, check="C3", field="rip", expected=1, observed=2))
    assert headline(only(*fields), SCENARIO) == (
        "L2 faults at another instruction than `write a+0x8`, and EXITINFO2 is wrong: it is 0x2, and must be 0x1; "
        "manual 15.25.7.")


@pytest.mark.parametrize(
    ("expected", "observed", "faults", "sentence"),
    [
        ("#NPF 0x7 (P|W|U) at gPA 0x1", "done, result 0x1", True,
         f"The machine let L2 write sPA 0x654000: {READ_ONLY}"),
        ("sPA 0x1000", "#PF 0x2 (W) at gVA 0x1", False,
         "The machine raised #PF 0x2 (W) at gVA 0x1 for `write a+0x8`, which every entry of its walk permits; "
         "manual 15.25.5."),
        ("#NPF 0x7 (P) at gPA 0x1", "#PF 0x2 (W) at gVA 0x1", True,
         f"`write a+0x8` ended in #PF, not in #NPF: {READ_ONLY}"),
        ("#NPF 0x7 (P) at gPA 0x1", "#NPF 0x2 (W) at gPA 0x1", True,
         "`write a+0x8` ended in #NPF 0x2 (W) at gPA 0x1, not in #NPF 0x7 (P) at gPA 0x1; manual 15.25.7."),
        ("#NPF 0x7 (P) at gPA 0x1", "VMEXIT_SHUTDOWN, EXITINFO1 0x0, EXITINFO2 0x0", True,
         f"`write a+0x8` ended in VMEXIT_SHUTDOWN, not in #NPF: {READ_ONLY}"),
        ("VMEXIT_INVALID", "done, result 0x1", False,
         "The machine ran L2 (done, result 0x1); VMRUN must be refused; manual 15.25.5."),
        ("VMEXIT_INVALID", "VMEXIT 0xffffffff, EXITINFO1 0x0, EXITINFO2 0x0", False,
         "VMRUN was refused as it must be, but EXITCODE is 0xffffffff, half of VMEXIT_INVALID; "
         "manual 15.25.5."),
        ("sPA 0x1000", "VMEXIT_INVALID, EXITINFO1 0x0, EXITINFO2 0x0", False,
         "VMRUN was refused, and must not be; manual 15.5.1."),
        ("sPA 0x1000", "VMEXIT 0xffffffff, EXITINFO1 0x0, EXITINFO2 0x0", False,
         "VMRUN was refused, and must not be; manual 15.5.1."),
        ("sPA 0x1000", "VMEXIT_HLT, EXITINFO1 0x0, EXITINFO2 0x0", False,
         "`write a+0x8` ended in VMEXIT_HLT; it must go through; manual 15.25.5."),
        ("VMEXIT_RDTSCP", "done, result 0x2", False,
         "The machine let `write a+0x8` through, which must end in VMEXIT_RDTSCP; manual 15.25.5."),
        ("VMEXIT_XSETBV", "#GP 0x0", False, "`write a+0x8` ended in #GP, not in VMEXIT_XSETBV; manual 15.25.5."),
        ("VMEXIT_#GP", "#PF 0x14 (U|ID) at gVA 0x1", False,
         "`write a+0x8` ended in #PF, not in #GP; manual 15.25.5."),
    ],
)
def test_outcomes(expected: str, observed: str, faults: bool, sentence: str) -> None:
    case = Case()
    if faults:
        case.space.change(case.final["pte"], clear=RW)
    assert headline(only(divergence(case.walk(WRITE), expected=expected, observed=observed)), SCENARIO) == sentence


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"check": "C3", "field": "l1.cr4", "expected": 0x20, "observed": 0xA0},
         "#VMEXIT did not give L1 its CR4 back: PGE must not be set; manual 15.6."),
        ({"check": "C3", "field": "l2.r12", "expected": 1, "observed": 2},
         "R12 of L2 is not what it must be after #VMEXIT: it is 0x2, and must be 0x1; manual 15.6."),
        ({"check": "C3", "field": "cr0", "expected": 1, "observed": 0},
         "After `write a+0x8` the VMCB's cr0 is wrong: PE is missing; manual 15.6."),
        ({"check": "C3", "field": "cr2", "expected": 1, "observed": 0, "probe": 4},
         "The VMCB's cr2 is wrong: it is 0x0, and must be 0x1; manual 15.6."),
        ({"check": "C3", "field": "reserved+0CCh", "expected": 1, "observed": 0, "probe": -1},
         "The VMCB's reserved+0CCh is wrong: it is 0x0, and must be 0x1; manual 15.6."),
        ({"check": "C3", "field": "vmcb.efer before VMRUN", "expected": 0x1000, "observed": 0},
         "Before VMRUN the VMCB's efer was wrong: SVME is missing; manual 15.6."),
        ({"check": "C3", "field": "rdcr2", "expected": 1, "observed": 0, "probe": 3},
         "`rdcr2` returned a wrong value: it is 0x0, and must be 0x1; manual 15.6."),
        ({"check": "C3", "field": "first probe", "expected": 1, "observed": 0, "probe": -1},
         "first probe is wrong: it is 0x0, and must be 0x1; manual 15.6."),
        ({"field": "exitinfo2", "expected": 1, "observed": 0},
         "`write a+0x8` faults as it must, but EXITINFO2 is wrong: it is 0x0, and must be 0x1; manual 15.6."),
        ({"field": "memory at sPA 0x9000", "expected": "unchanged", "observed": 7},
         "`write a+0x8` or another access changed memory at sPA 0x9000, which must stay as it was; manual 15.6."),
        ({"field": "memory at sPA 0x9000", "expected": 7, "observed": "unchanged"},
         "`write a+0x8` did not reach memory at sPA 0x9000, which it must change; manual 15.6."),
        ({"field": "memory at sPA 0x9000", "expected": 7, "observed": 8},
         "Memory at sPA 0x9000 is wrong: it is 0x8, and must be 0x7; manual 15.6."),
        ({"check": "C2", "rule": "ad", "field": "entry at sPA 0x9000 at the end", "expected": 7, "observed": 0x27,
          "probe": -1},
         "The entry at sPA 0x9000 at the end is wrong: A must not be set; manual 5.4.2, 15.25.5."),
        ({"check": "C3", "field": "l1.early", "expected": 0, "observed": 2, "rule": "exit.host", "probe": -1},
         "L1 took an NMI or an interrupt while GIF was 0; manual 15.6."),
        ({"check": "C3", "field": "l1.early", "expected": 0, "observed": 0xD04, "rule": "exit.host", "probe": -1},
         "L1 took exception 13 behind the #VMEXIT: nothing of its own raised it; manual 15.6."),
    ],
)
def test_state(values: dict[str, Any], sentence: str) -> None:
    assert headline(only(divergence(**values)), SCENARIO) == sentence


def test_entries() -> None:
    case = Case()
    walk = case.walk()
    guest = next(s.address for s in walk.steps if s.purpose == "pde" and s.level == "pte")
    assert headline(only(missing_a(case, case.guest["pde"], walk)), SCENARIO) == (
        "`write a+0x8` left the guest pde wrong: A is missing; manual 5.4.2, 15.25.5.")
    assert headline(only(extra_d(case, case.final["pte"], walk)), SCENARIO) == (
        "`write a+0x8` left the nested pte for the page itself wrong: D must not be set; manual 5.4.2, 15.25.5.")
    assert headline(only(missing_a(case, guest, walk)), SCENARIO) == (
        "`write a+0x8` left the nested pte for the guest's pde wrong: A is missing; manual 5.4.2, 15.25.5.")
    assert headline(only(missing_a(case, guest, walk)), None).startswith("L2 left")


def test_value() -> None:
    walk = Case().walk()
    one = divergence(walk, probe=0, field="value", expected=tag(0x65_4000), observed=tag(0x65_5000))
    assert headline(only(one), SCENARIO) == (
        "`read a` came to sPA 0x655000; it must come to sPA 0x654000; manual 15.25.5.")
    other = divergence(walk, probe=0, field="value", expected=tag(0x65_4000), observed=0)
    assert headline(only(other), SCENARIO) == (
        "`read a` returned a wrong value: it is 0x0, and must be 0x90e3ff000ca800b8; manual 15.25.5.")


def test_kind_is_the_same_for_the_same_sort() -> None:
    kinds = set()
    for probe in (0, 1):
        case = Case()
        case.space.change(case.final["pte"], clear=RW)
        kinds.add(kind(only(went_through(case, case.walk(WRITE, 8 * probe), probe))))
    assert kinds == {
        "The machine let L2 write sPA ...: the nested pte for the page itself has R/W=0 (rule nested.write)"}
    other = kind(only(entry(None, 0x9000, 7, 7 | A)))
    assert other == kind(only(entry(None, 0xA000, 3, 3 | A))) and other not in kinds and "0x" not in other


class TestLetThrough:
    """What the machine let L2 do, where to, and which entry forbids it."""

    def said(self, case: Case, access: Access, probe: int, observed: str = "done, result 0x77") -> str:
        walk = case.walk(access, 8 if probe == 1 else 0)
        return headline(only(went_through(case, walk, probe)._replace(observed=observed)), SCENARIO)

    def test_a_read_tells_where_it_came_to(self) -> None:
        case = Case()
        case.space.change(case.final["pde"], clear=P)
        assert self.said(case, Access(user=True), 0, f"done, result {tag(0x777000):#x}") == (
            "The machine let L2 read sPA 0x777000: the nested pde for the page itself has P=0; manual 15.25.6.")

    def test_it_may_not_tell(self) -> None:
        case = Case()
        case.space.change(case.final["pde"], clear=P)
        assert self.said(case, Access(user=True), 0) == (
            "The machine let `read a` through: the nested pde for the page itself has P=0; manual 15.25.6.")

    def test_an_upper_entry_is_to_blame(self) -> None:
        """The rights of all levels count, and the walk goes on to the leaf."""
        case = Case()
        case.space.change(case.final["pdpte"], clear=US)
        assert self.said(case, WRITE, 1) == (
            "The machine let L2 write sPA 0x654008: the nested pdpte for the page itself has U/S=0; "
            "manual 15.25.7.")

    def test_a_fetch(self) -> None:
        case = Case()
        case.space.change(case.final["pte"], set=NX)
        assert self.said(case, Access(fetch=True, user=True), 2, "done, result 0x12345") == (
            f"The machine let L2 fetch from sPA {0x12345 * 8:#x}: the nested pte for the page itself has NX=1; "
            "manual 15.25.7.")

    def test_l2s_own_tables_forbid_it(self) -> None:
        case = Case()
        case.space.change(case.guest["pte"], clear=RW)
        walk = case.walk(Access(write=True, user=True), 8)
        said = headline(only(went_through(case, walk)), SCENARIO)
        assert said.startswith("The machine let L2 write gPA 0x") and "the guest pte has R/W=0; manual 5.6.2" in said

    def test_a_table_of_l2s(self) -> None:
        """L2 has no access to it of its own, so there is no address of one."""
        case = Case()
        table = next(s.address for s in case.walk().steps if s.purpose == "pde" and s.level == "pte")
        case.space.change(table, clear=RW)
        assert self.said(case, WRITE, 1) == (
            "The machine let `write a+0x8` through: the nested pte for the guest's pde has R/W=0; manual 15.25.7.")


@pytest.mark.parametrize(("set_", "said"), [(1 << 51, "bits 51, 15 and 13"), (7 << 49, "bits 51:49, 15 and 13")])
def test_reserved_bits_are_named(set_: int, said: str) -> None:
    """Of a table's frame bits 15 and 13 are set, which a PDE that maps 2M has reserved; addresses have 48 bits."""
    case = Case()
    case.space.change(case.final["pde"], set=set_ | PS)
    finding = only(divergence(case.walk(), expected="#NPF 0xd", observed="done, result 0x1"))
    assert f": the nested pde for the page itself has reserved {said} set; manual 15.25.6" in headline(finding, None)


def test_memory_that_an_event_did_not_reach() -> None:
    """The exit is wrong too, which says more of it."""
    found = (divergence(field="memory at sPA 0x9000", expected=7, observed="unchanged"),
             divergence(field="exitinfo1", expected=0x15, observed=7))
    assert headline(only(*found), None) == (
        "L2 did not reach memory at sPA 0x9000, which it must change; the exit differs too: EXITINFO1; manual 15.6.")


def test_what_is_cited() -> None:
    """Not the rule that L2 left by, for what it left behind."""
    walk = Case().walk()
    assert cited(divergence(walk, check="C3", field="cr2", rule="nested.write")) == "15.6"
    assert cited(divergence(walk, check="C3", field="exitintinfo", rule="guest.present")) == "15.7.2"
    assert cited(divergence(check="C4", field="level", rule="context.nested")) == ""
    assert cited(divergence(walk, field="exitinfo1", rule="guest.write")) == "8.4.2"


def test_which_check_of_vmrun() -> None:
    """The rule that must refuse it is told, not only that one must."""
    one = divergence(check="C3", rule="vmrun.asid", expected="VMEXIT_INVALID", observed="done, result 0x1")
    assert headline(only(one), None) == (
        "The machine ran L2 (done, result 0x1), though VMRUN is refused if ASID is 0, which is the host's; "
        "manual 15.5.1, 15.25.1.")


@pytest.mark.parametrize(("expected", "rest"), [
    ("VMEXIT_INVALID", ", though VMRUN is refused if ASID is 0, which is the host's"),
    ("sPA 0x1000", "; it must run L2")])
def test_a_vmrun_that_raises(expected: str, rest: str) -> None:
    one = divergence(check="C3", rule="vmrun.asid", expected=expected, observed="exception 6 of VMRUN, in L1")
    assert headline(only(one), None) == f"VMRUN raised exception 6 in L1{rest}; manual 15.5.1, 15.25.1."
