"""Divergences of one probe taken together."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.model.access import NestedPageFault, PageFault
from harness.model.entries import RW
from harness.report.findings import findings, place
from tests.model.tables import WRITE, E
from tests.report.cases import SCENARIO, Case, divergence, entry, missing_a, only


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


def test_new_or_known() -> None:
    new, known = divergence(), divergence(erratum="e1")
    assert only(new).is_new() and only(new, known).is_new()
    assert not only(known).is_new()
    assert only(known).is_new(strict=True)


def test_the_first_is_new_if_any_is() -> None:
    """What is known already is not what a new finding is about."""
    known, new = divergence(erratum="e1"), divergence(check="C3", field="l1.cr4", expected=0x20, observed=0)
    assert only(known, new).first == new and only(known).first == known


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
