"""The universe of cells: every rule has its own, and what there is not has a reason."""

from __future__ import annotations

import pytest

from harness.model import universe as universe_module
from harness.model.coverage import Cell
from harness.model.registers import Cpu
from harness.model.rules import _LOCKSTEP, RULES, Rule
from harness.model.universe import FEATURES, GUEST_STATES, NO_CELLS, gaps, universe
from harness.model.walk import Paging

FULL = Cpu(40, True, 16, frozenset({"nx", "page1g", *FEATURES}))


@pytest.fixture(scope="module")
def reachable() -> frozenset[Cell]:
    return universe(FULL).reachable


@pytest.mark.parametrize("rule", [
    rule for rule in RULES if rule not in {rule.id for rule in _LOCKSTEP} | NO_CELLS.keys()
])
def test_every_rule_has_cells(rule: str, reachable: frozenset[Cell]) -> None:
    known = reachable | universe(FULL).lacking.keys()
    assert any(cell.rule == rule for cell in known), (
        f"no cell of the universe is of {rule}, so no coverage would miss it. In harness/model/universe.py: for a rule "
        "of the walk add to GUEST_STATES or NESTED_STATES the registers with which it decides (the CPUID feature "
        "goes beside the rule), to ACCESSES the kind of access, to _walks entry bits; one of #VMEXIT goes to _EXITS. "
        "Where harness/model/coverage.py must tell its cases apart, do so in _denied and _passed."
    )


def test_rules_without_cells(reachable: frozenset[Cell]) -> None:
    """They are rules, have a reason, and no cells."""
    assert NO_CELLS.keys() <= RULES.keys() and all(NO_CELLS.values())
    assert not {cell.rule for cell in reachable} & NO_CELLS.keys()


def test_every_cell_is_of_a_rule(reachable: frozenset[Cell]) -> None:
    assert {cell.rule for cell in reachable} <= RULES.keys()


def test_what_cannot_be_has_a_reason() -> None:
    missing = sorted({gap for gap in gaps(FULL) if not gap.reason})
    assert missing == [], "say why beside the rule, in `never` (harness/model/rules.py)"


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.never], ids=lambda rule: rule.id)
def test_every_reason_is_used(rule: Rule) -> None:
    """A reason for what is not so would excuse a missing test."""
    given = {gap.reason for gap in gaps(FULL) if gap.rule == rule.id}
    assert {reason for _, reason in rule.never} == given


def test_size(reachable: frozenset[Cell]) -> None:
    """Cells are for people to look through."""
    assert 1000 < len(reachable) < 10_000


@pytest.mark.parametrize("feature", FEATURES)
def test_what_a_processor_lacks(feature: str, reachable: frozenset[Cell]) -> None:
    found = universe(FULL._replace(features=FULL.features - {feature}))
    assert set(found.lacking.values()) == {feature}
    assert found.reachable | found.lacking.keys() == reachable and not found.reachable & found.lacking.keys()


def test_la57() -> None:
    found = universe(FULL._replace(features=FULL.features - {"la57"}))
    assert all("5-level" in cell.mode for cell in found.lacking)
    assert not any("5-level" in cell.mode for cell in found.reachable)


def test_one_gigabyte_pages(reachable: frozenset[Cell]) -> None:
    without = universe(FULL._replace(page1g=False)).reachable
    assert any("1G" in cell.level for cell in reachable) and not any("1G" in cell.level for cell in without)
    assert any(cell.level == "pdpte" and "PS" in cell.outcome for cell in without)


@pytest.mark.parametrize("bits", [36, 48, 52])
def test_address_widths(bits: int) -> None:
    """Where all gPAs go through one nested root entry, it is a table's walk that meets its faults first; with all
    52 bits no frame bit is reserved."""
    reachable = universe(FULL._replace(maxphyaddr=bits)).reachable
    beyond = {cell.mode for cell in reachable if "MAXPHYADDR" in cell.outcome}
    assert bool(beyond) == (bits < 52)
    page = {cell.level for cell in reachable
            if (cell.rule, cell.dimension, cell.mode) == ("nested.user", "nested page", "4-level/5-level")}
    assert ("pml4e" in page) == (bits > 39) and ("pml5e" in page) == (bits > 48)


def test_a_rule_that_never_decides_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above does fail for a rule of the walk that no register state of the universe leads to."""
    paging = Paging(None, 0, wp=True, smep=False, smap=False, ac=False, guest_id=True, nested=None, ncr3=0)
    states = tuple(state for state in GUEST_STATES if not state(paging).smep)
    monkeypatch.setattr(universe_module, "GUEST_STATES", states)
    cells = universe_module._all.__wrapped__(FULL)
    assert not any(cell.rule == "guest.smep" for cell in cells)
    assert any(cell.rule == "guest.smap" for cell in cells)
