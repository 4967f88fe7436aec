"""Findings by version: what a cell says, and the table in each form."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.lockstep.tally import Tally
from harness.report import matrix
from harness.report.matrix import Cell, Column, Matrix
from harness.report.summary import summarize
from tests.conftest import ROOT
from tests.report.cases import SCENARIO, divergence

TCG = (("qemu-tcg", (7, 2)),)
KVM = (("kvm", (6, 1)), ("qemu-tcg", (7, 2)))


def erratum(name: str, **changes: Any) -> Erratum:
    values = {"id": name, "title": f"about | {name}", "machine": "qemu-tcg", "explanation": "e", "reference": "r"}
    return Erratum(**values | changes)


def col(name: str, layers: Any = TCG, ran: str = "a b", **changes: Any) -> Column:
    return Column(name, "machine", layers, ran=frozenset(ran.split()), **changes)


ERRATA = (erratum("e1", shown=("a",)), erratum("e2", surfaces=True), erratum("k1", machine="kvm", shown=("b",)))
NEW = "new: C1 exitinfo1, rule nested.write"

MATRIX = Matrix(
    (
        col("Q1", found={"e1": 3, "e2": 1}, where={"e2": frozenset({"c"})}),
        col("Q2", ran="b", found={NEW: 2}, where={NEW: frozenset({"b"})}),
        col("Q3", stale=frozenset({"e1"})),
        col("K1", KVM, found={"k1": 1}),
        Column("K2", failed="no mirror has kernel 9.9; <none>\nmore"),
    ),
    ERRATA, "Made on a day by `a command`.")


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        ("e1", "3 x -* x x"),  # Q2 ran nothing that shows it; on KVM it does not surface
        ("e2", "1 x x x x"),
        ("k1", "x x x 1 x"),  # QEMU has nothing of KVM's
        (NEW, "- 2 - - x"),
    ],
)
def test_cells(row: str, cells: str) -> None:
    assert " ".join(str(MATRIX.cell(row, one)) for one in MATRIX.columns) == cells


def test_what_is_new_comes_first() -> None:
    assert MATRIX.rows() == [NEW, "e1", "e2", "k1"] and MATRIX.unexplained() == [NEW]


def test_reasons_are_told_once_with_their_columns() -> None:
    assert "e1: no scenario that shows it ran (Q2)" in list(MATRIX.reasons())
    assert "k1: an erratum of kvm, which does not show on this machine (Q1, Q2, Q3)" in list(MATRIX.reasons())
    assert not any("K2" in text for text in MATRIX.reasons())
    assert any(text.startswith("K2: not tested: no mirror has kernel 9.9") for text in MATRIX.notes())


def test_every_form_has_every_cell() -> None:
    lines = list(matrix.table(MATRIX))
    assert lines[0].split() == ["Q1", "Q2", "Q3", "K1", "K2"] and lines[2].split() == ["e1", "3", "x", "-*", "x", "x"]
    page = matrix.markdown(MATRIX)
    assert "| e1 | about \\| e1 | 3 | x | -* | x | x |" in page and "`a command`" in page and "&lt;none>" in page
    html = matrix.html(MATRIX)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None and "<none>" not in html
    told = json.loads(found[1])["matrix"]
    assert [row["name"] for row in told["rows"]] == MATRIX.rows()
    assert told["columns"] == [one.name for one in MATRIX.columns]
    cells = {row["name"]: row["cells"] for row in told["rows"]}
    assert [cell["text"] for cell in cells["e1"]] == ["3", "x", "-*", "x", "x"] and cells["e1"][2]["stale"]
    assert any(cell["kind"] == "new" for cell in cells[NEW])
    data = json.loads(matrix.document(MATRIX))
    assert [row["finding"] for row in data["rows"]] == MATRIX.rows()
    assert data["rows"][0]["explained"] is False and data["rows"][1]["cells"]["Q1"]["count"] == 3
    assert data["columns"][4]["failed"].startswith("no mirror")


def test_a_column_is_made_of_a_run() -> None:
    results = [
        Result("s1", divergences=[divergence(scenario="s1", erratum=name) for name in ("e1+e2", "e1")]),
        Result("s2", divergences=[divergence(scenario="s2", field="exitinfo1")]),
        Result("s3", skipped="no la57"),
        Result("s4", lost=MachineLost("it hangs after 5 s\nin L0: more")),
        Result("sweep[1]", divergences=[divergence(scenario="sweep[1]", field="exitinfo1")]),
    ]
    tally = Tally("sweep", 9, done=3)
    tally.known_cases.update({"e1": 2})
    names = [result.scenario for result in results[:4]]
    summary = summarize(None, [replace(SCENARIO, name=name) for name in names], results, ERRATA, 1.5, sweeps=[tally])
    made = matrix.column("Q", summary, TCG)
    [lost] = [row for row in made.found if row.startswith("new: lost")]
    new = "new: C1 exitinfo1, rule exit.host"
    assert dict(made.found) == {"e1": 3, "e2": 1, new: 2, lost: 1} and "it hangs" in lost
    assert made.where["e1"] == {"s1"} and made.where[new] == {"s2"}
    assert made.ran == {"s1", "s2"} and made.lost == ("s4: it hangs after 5 s\nin L0: more",)


def test_states() -> None:
    assert [str(Cell(matrix.SHOWS, 7)), str(Cell(matrix.ABSENT)), str(Cell(matrix.UNTESTED))] == ["7", "-", "x"]


def test_the_repositorys_own_is_explained(errata: list[Erratum]) -> None:
    """docs/matrix.md: at least three QEMUs and three kernels in which every finding is an erratum of the library's."""
    text = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    head, *rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    new = [row for row in rows if row[0].strip().startswith("new: ")]
    assert {row[0].strip() for row in rows if row not in new} <= {erratum.id for erratum in errata}
    clean = [name.strip() for at, name in enumerate(head) if at > 1 and all(row[at].strip() in "-x" for row in new)]
    for layer in ("QEMU ", "KVM "):
        assert sum(name.startswith(layer) for name in clean) >= 3, clean
    assert "twinwalk matrix --qemu" in text and "not tested:" not in text
