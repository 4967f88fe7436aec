"""What is collected of a run: from predictions as they are checked, each case once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.lockstep import coverage as coverage_module
from harness.lockstep.active import Active
from harness.lockstep.coverage import Coverage
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.model.access import Access
from harness.model.coverage import Cell, cells_of
from harness.model.walk import Paging, Walk
from harness.scenario.program import Compiler
from tests.scenario.texts import one, run

MODE = "4-level/4-level"


@pytest.fixture
def cells(twin: Twin, compiler: Compiler):  # type: ignore[no-untyped-def]
    """The cells of a scenario, run on the model alone."""

    def collect(*ops: str, rule: str = "", head: str = "") -> set[tuple[str, ...]]:
        coverage = Coverage()
        rehearse(twin, compiler.compile(one(*ops, head=head)), lambda p: coverage.add(p, twin.host.dr7))
        return {tuple(cell[1:]) for cell in coverage.cells if cell.rule == rule}

    return collect


def test_probes(cells) -> None:  # type: ignore[no-untyped-def]
    ops = 'entry = "nested.a.pde"\nclear = ["rw"]', run("read a; write a; fetch b", 3)
    assert cells(*ops, rule="nested.write") == {
        ("nested page", "pde", MODE, "#NPF write"), ("nested page", "pde", MODE, "permitted, other access"),
    }
    assert ("both", "pte/pte", MODE, "user fetch") in cells(*ops, rule="reached")


def test_refused(cells) -> None:  # type: ignore[no-untyped-def]
    assert cells('vmcb = "asid"\nvalue = 0', "read a", rule="vmrun.asid") == {("", "", "", "refused")}


def test_exits(cells) -> None:  # type: ignore[no-untyped-def]
    assert cells("read a", rule="exit.vmmcall") == {("", "", MODE, "VMEXIT_VMMCALL")}
    assert cells(run("rdcr0", 3), rule="exit.privileged") == {("", "", MODE, "VMEXIT_#GP")}
    assert cells("read a", rule="exit.host-dr7") == set()
    assert cells('host = "dr7"\nset = ["bit0"]', "read a", rule="exit.host-dr7") == {("", "", MODE, "#VMEXIT")}


def test_deliveries(cells) -> None:  # type: ignore[no-untyped-def]
    own = 'vmcb = "intercept_exceptions"\nclear = ["pf"]'
    missing = 'entry = "guest.a.pte"\nclear = ["p"]'
    assert cells(own, missing, "read a", rule="exit.delivered") == {("", "", MODE, "#PF")}
    assert cells(own, missing, 'entry = "nested.idt.pte"\nclear = ["p"]', "read a", rule="exit.delivered") == {
        ("", "", MODE, "#PF cut short by VMEXIT_NPF"),
    }
    assert cells('vmcb = "eventinj"\nvalue = 0x80000202', "read a", rule="exit.delivered") == {("", "", MODE, "NMI")}


def test_modes(cells) -> None:  # type: ignore[no-untyped-def]
    head = 'guest = "PAE"\nnested = "32-bit"\n'
    assert cells("read a", rule="exit.vmmcall", head=head) == {("", "", "PAE/32-bit", "VMEXIT_VMMCALL")}


def test_what_was_seen_costs_little(twin: Twin, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of a walk are worked out once, however often it comes; also when what was seen is forgotten."""
    worked_out = []

    def count(paging: Paging, access: Access, walk: Walk) -> Iterator[Cell]:
        worked_out.append(walk)
        return cells_of(paging, access, walk)

    monkeypatch.setattr(coverage_module, "cells_of", count)
    program = compiler.compile(one(*["read a"] * 10))
    coverage = Coverage()
    for _ in range(2):
        rehearse(twin, program, lambda p: coverage.add(p, 0))
    assert len(worked_out) <= 5  # L2's own pages before and after their bits are set, page a
    assert Cell("reached", "both", "pte/pte", MODE, "supervisor read") in coverage.cells
    before = set(coverage.cells)
    monkeypatch.setattr(coverage_module, "_MAX_SEEN", 2)
    rehearse(twin, program, lambda p: coverage.add(p, 0))
    assert coverage.cells == before


def test_quirks(twin: Twin, compiler: Compiler) -> None:
    """Where a machine's quirk was needed to agree, its walks count too, but not as those of another mode."""
    coverage = Coverage()
    step = (program := compiler.compile(one("read a", head='nested = "32-bit"\n'))).steps
    twin.reset(program.world)
    for op in step:
        if op.code == "RUN":
            vmcb = bytes(twin.memory.bytes[op.a : op.a + 4096])
            manual = twin.predict(op, 0)
            agreed = twin.predict_again(manual, vmcb, op, Active(["no-legacy-nested"]))
            assert agreed.accesses and agreed.accesses[0][0].nested is None
            coverage.add_again(manual, agreed, 0)
            assert coverage.cells == set()
            coverage.add_again(manual, twin.predict_again(agreed, vmcb, op, Active()), 0)
            assert any(cell.rule == "reached" for cell in coverage.cells)
        elif op.code != "SYNC":
            twin.apply(op)
