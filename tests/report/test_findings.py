"""Divergences of one probe taken together, and the sentence that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.model.access import NestedPageFault, PageFault
from harness.model.entries import RW, A
from harness.report.findings import findings, headline, kind, place
from harness.wire.image import tag
from tests.model.tables import WRITE, E
from tests.report.cases import SCENARIO, Case, divergence, entry, extra_d, missing_a, only, went_through


def test_one_finding_for_each_probe() -> None:
    case = Case()
    walk = case.walk()
    one = missing_a(case, case.final["pte"], walk)
    two = divergence(walk, probe=2, field="value", expected=1, observed=2)
    three = missing_a(case, case.final["pde"], walk)
    host = divergence(probe=-1, check="C3", field="l1.cr4", expected=1, observed=0)
    later = divergence(walk, op=2)
    found = findings([one, two, three, host, later])
    assert [(f.op, f.probe, f.divergences) for f in found] == [
        (1, 1, (one, three)), (1, 2, (two,)), (1, -1, (host,)), (2, 1, (later,))
    ]
    assert found[1].entries == {case.final["pte"]: one, case.final["pde"]: three}
    assert found[3].entries == {}


def test_what_became_of_a_probe_comes_first() -> None:
    walk = Case().walk()
    register = divergence(walk, check="C3", field="cr0", expected=1, observed=0)
    table = entry(walk, 0x9000, 7, 0x27)
    fault = divergence(walk, field="exitinfo1", expected=1, observed=2)
    refused = divergence(walk, check="C3", field="outcome", expected="VMEXIT_INVALID", observed="done")
    assert only(register, table, refused, fault).divergences == (refused, fault, table, register)


def test_another_access_faults() -> None:
    """It is not the probe that faulted where RIP is another too."""
    case = Case()
    case.space.change(case.final["pte"], clear=RW)
    walk = case.walk(WRITE)
    fields = (divergence(walk, field="exitinfo2", expected=1, observed=2),
              divergence(walk, check="C3", field="rip", expected=1, observed=2))
    assert headline(only(*fields), SCENARIO) == "L2 faults at another instruction than `write a+0x8`."


def test_new_or_known() -> None:
    new, known = divergence(), divergence(erratum="e1")
    assert only(new).is_new() and only(new, known).is_new()
    assert not only(known).is_new()
    assert only(known).is_new(strict=True)


def test_the_first_is_new_if_any_is() -> None:
    """What is known already is not what a new finding is about."""
    known, new = divergence(erratum="e1"), divergence(check="C3", field="l1.cr4", expected=0x20, observed=0)
    assert only(known, new).first == new and only(known).first == known
    assert "CR4" in headline(only(known, new), SCENARIO)


class TestObserved:
    """What the machine made of a probe, put together from the fields that differ."""

    def setup_method(self) -> None:
        case = Case()
        case.space.change(case.final["pte"], clear=RW)
        self.walk = case.walk(WRITE, 8)
        assert isinstance(self.walk.outcome, NestedPageFault)
        self.outcome = self.walk.outcome

    def test_nothing_of_its_own(self) -> None:
        assert only(divergence(self.walk, check="C3", field="cr2", expected=1, observed=2)).observed is None

    def test_another_fault(self) -> None:
        assert only(divergence(self.walk, observed="#PF 0x2 (W) at gVA 0x1000")).observed == PageFault(2, 0x1000)

    def test_no_fault(self) -> None:
        assert only(divergence(self.walk, observed="done, result 0x1")).observed == "done, result 0x1"

    def test_fields(self) -> None:
        code = divergence(self.walk, field="exitinfo1", expected=self.outcome.error_code, observed=E.W)
        address = divergence(self.walk, field="exitinfo2", expected=self.outcome.address, observed=0x123)
        assert only(code).observed == NestedPageFault(E.W, self.outcome.address)
        assert only(address).observed == NestedPageFault(self.outcome.error_code, 0x123)
        assert only(code, address).observed == NestedPageFault(E.W, 0x123)


@pytest.mark.parametrize(
    ("expected", "observed", "faults", "sentence"),
    [
        ("#NPF 0x7 (P|W|U) at gPA 0x1", "done, result 0x1", True, "`write a+0x8` went through; it must end in #NPF."),
        ("sPA 0x1000", "#PF 0x2 (W) at gVA 0x1", False, "`write a+0x8` ended in #PF; it must go through."),
        ("#NPF 0x7 (P) at gPA 0x1", "#PF 0x2 (W) at gVA 0x1", True, "`write a+0x8` ended in #PF, not in #NPF."),
        ("#NPF 0x7 (P) at gPA 0x1", "#NPF 0x2 (W) at gPA 0x1", True,
         "`write a+0x8` ended in another #NPF than it must."),
        ("#NPF 0x7 (P) at gPA 0x1", "VMEXIT_SHUTDOWN, EXITINFO1 0x0, EXITINFO2 0x0", True,
         "`write a+0x8` ended in VMEXIT_SHUTDOWN, not in #NPF."),
        ("VMEXIT_INVALID", "done, result 0x1", False,
         "VMRUN must be refused, and was not: the machine ran L2 (done, result 0x1)."),
        ("VMEXIT_INVALID", "VMEXIT 0xffffffff, EXITINFO1 0x0, EXITINFO2 0x0", False,
         "VMRUN was refused as it must be, but EXITCODE is 0xffffffff, half of VMEXIT_INVALID."),
        ("sPA 0x1000", "VMEXIT_INVALID, EXITINFO1 0x0, EXITINFO2 0x0", False,
         "VMRUN was refused, and must not be."),
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
         "#VMEXIT did not give L1 its CR4 back: PGE must not be set."),
        ({"check": "C3", "field": "l2.r12", "expected": 1, "observed": 2},
         "R12 of L2 is not what it must be after #VMEXIT."),
        ({"check": "C3", "field": "cr0", "expected": 1, "observed": 0},
         "After `write a+0x8` the VMCB's cr0 is wrong: PE is missing."),
        ({"check": "C3", "field": "cr2", "expected": 1, "observed": 0, "probe": 4}, "The VMCB's cr2 is wrong."),
        ({"check": "C3", "field": "reserved+0CCh", "expected": 1, "observed": 0, "probe": -1},
         "The VMCB's reserved+0CCh is wrong."),
        ({"check": "C3", "field": "vmcb.efer before VMRUN", "expected": 0x1000, "observed": 0},
         "Before VMRUN the VMCB's efer was wrong: SVME is missing."),
        ({"check": "C3", "field": "rdcr2", "expected": 1, "observed": 0, "probe": 3},
         "`rdcr2` returned a wrong value."),
        ({"check": "C3", "field": "first probe", "expected": 1, "observed": 0, "probe": -1}, "first probe is wrong."),
        ({"field": "exitinfo2", "expected": 1, "observed": 0},
         "`write a+0x8` faults as it must, but EXITINFO2 is wrong."),
        ({"field": "memory at sPA 0x9000", "expected": "unchanged", "observed": 7},
         "`write a+0x8` or another access changed memory at sPA 0x9000, which must stay as it was."),
        ({"field": "memory at sPA 0x9000", "expected": 7, "observed": "unchanged"},
         "`write a+0x8` did not reach memory at sPA 0x9000, which it must change."),
        ({"field": "memory at sPA 0x9000", "expected": 7, "observed": 8},
         "Memory at sPA 0x9000 does not hold what it must."),
        ({"check": "C2", "field": "entry at sPA 0x9000 at the end", "expected": 7, "observed": 0x27, "probe": -1},
         "The entry at sPA 0x9000 at the end is wrong: A must not be set."),
    ],
)
def test_state(values: dict[str, Any], sentence: str) -> None:
    assert headline(only(divergence(**values)), SCENARIO) == sentence


def test_entries() -> None:
    case = Case()
    walk = case.walk()
    guest = next(s.address for s in walk.steps if s.purpose == "pde" and s.level == "pte")
    assert headline(only(missing_a(case, case.guest["pde"], walk)), SCENARIO) == (
        "`write a+0x8` left the guest pde wrong: A is missing.")
    assert headline(only(extra_d(case, case.final["pte"], walk)), SCENARIO) == (
        "`write a+0x8` left the nested pte for the page itself wrong: D must not be set.")
    assert headline(only(missing_a(case, guest, walk)), SCENARIO) == (
        "`write a+0x8` left the nested pte for the guest's pde wrong: A is missing.")
    assert headline(only(missing_a(case, guest, walk)), None).startswith("L2 left")


def test_value() -> None:
    walk = Case().walk()
    one = divergence(walk, probe=0, field="value", expected=tag(0x65_4000), observed=tag(0x65_5000))
    assert headline(only(one), SCENARIO) == "`read a` came to sPA 0x655000; it must come to sPA 0x654000."
    other = divergence(walk, probe=0, field="value", expected=tag(0x65_4000), observed=0)
    assert headline(only(other), SCENARIO) == "`read a` returned a wrong value."


def test_kind_is_the_same_for_the_same_sort() -> None:
    kinds = set()
    for probe in (0, 1):
        case = Case()
        case.space.change(case.final["pte"], clear=RW)
        kinds.add(kind(only(went_through(case, case.walk(WRITE, 8 * probe), probe))))
    assert kinds == {"L2 went through; it must end in #NPF. (rule nested.write)"}
    other = kind(only(entry(None, 0x9000, 7, 7 | A)))
    assert other == kind(only(entry(None, 0xA000, 3, 3 | A))) and other not in kinds and "0x" not in other


def test_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert place(only(divergence()), SCENARIO) == (
        "op 1 (/somewhere/scenarios/walk/nested-write.toml:9), probe 1: write a+0x8 at CPL 3")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/somewhere"))
    assert place(only(divergence(probe=4)), SCENARIO) == (
        "op 1 (scenarios/walk/nested-write.toml:9), the VMMCALL behind the last probe")
    assert place(only(divergence(probe=-1)), SCENARIO) == "op 1 (scenarios/walk/nested-write.toml:9)"
    assert place(only(divergence()), None) == "op 1, probe 1"
    assert place(only(divergence(op=0, probe=0)), None) == "op 0, probe 0"
    assert place(only(divergence(op=-1, probe=-1)), SCENARIO) == "the end of the scenario"
