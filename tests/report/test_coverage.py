"""`twinwalk coverage`: files of runs taken together, and what is shown of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UsageError
from harness.lockstep.errata import Erratum
from harness.model.coverage import Cell
from harness.model.universe import FEATURES, universe
from harness.report import jsonfile
from harness.report.coverage import Coverage, Covered, merge, read, table, text
from harness.report.styled import plain
from tests.report.test_summary import Identity, summary

READ = Cell("reached", "both", "pte/pte", "4-level/4-level", "user read")
WRITE = READ._replace(outcome="user write")
FULL = Identity(features=("nx", "page1g", *FEATURES))


def covered(*cells: Cell, identity: Identity = FULL) -> Covered:
    return Covered.of(identity, cells)


def show(coverage: Coverage) -> str:
    return plain(table(coverage, 100))


def saved(path: Path, **values: Any) -> Path:
    jsonfile.write(path, summary(**{"identity": FULL, "cells": [WRITE, READ]} | values))
    return path


class TestRead:
    def test_what_a_run_wrote(self, tmp_path: Path) -> None:
        run = read(saved(tmp_path / "run.json"))
        assert run == covered(READ, WRITE)
        assert run.cpu.maxphyaddr == 40 and run.cpu.page1g and run.machine.startswith("tcg: QEMU 7.2.22")

    def test_without_cells(self, tmp_path: Path) -> None:
        assert read(saved(tmp_path / "run.json", cells=[])).cells == frozenset()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", r"run.json:1: not JSON, or not all of it"),
            ("", r"run.json:1: not JSON, or not all of it"),
            ("[]", r"not the results of a run, or of another version"),
            ("{}", r"not the results of a run, or of another version \(KeyError\('cells'\)\)"),
            ('{"cells": [["a"]], "machine": null}', "not the results of a run"),
            ('{"cells": [], "machine": {}}', "not the results of a run"),
            ('{"cells": [], "machine": null}', "run.json: the machine never came up"),
        ],
    )
    def test_other_files(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "run.json"
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            read(path)

    def test_cut_short(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "run.json")
        path.write_text(path.read_text()[:-10])
        with pytest.raises(UsageError, match=r"not all of it.*make it with"):
            read(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"none.json: cannot be read: .*No such file"):
            read(tmp_path / "none.json")


class TestMerge:
    def test_one(self) -> None:
        merged = merge([covered(READ)])
        assert merged.reachable == universe(merged_cpu()).reachable
        assert merged.reached == {READ} and WRITE in merged.missing and READ not in merged.missing

    def test_several(self) -> None:
        merged = merge([covered(READ), covered(WRITE), covered(READ)])
        assert merged.reached == {READ, WRITE}
        assert len(merged.machines) == 1

    def test_cells_of_no_rule_are_not_counted(self) -> None:
        """A file of another version may have others."""
        assert merge([covered(READ, Cell("old", "", "", "", ""))]).reached == {READ}

    def test_several_processors(self) -> None:
        """What one of them can reach is reachable."""
        plain_one = covered(READ, identity=Identity())
        lacks = set(universe(plain_one.cpu).lacking.values())
        assert {"la57", "smep", "smap"} <= lacks <= set(FEATURES)
        lacking = merge([plain_one]).lacking
        assert set(lacking.values()) == {f"the processor lacks {feature}" for feature in lacks}
        both = merge([plain_one, covered()])
        assert both.lacking == {} and lacking.keys() <= both.reachable and both.reached == {READ}


def merged_cpu() -> Any:
    return covered().cpu


class TestErrata:
    """What L2 cannot do on a machine with an erratum is not asked of it."""

    BARS = Erratum("e1", "L2 does not run", "qemu-tcg", "", "",
                   unreachable=("off/32-bit", "exit.delivered PAE/none #PF"))

    def test_cells_that_no_scenario_reaches(self) -> None:
        merged = merge([covered(READ)], [self.BARS])
        gone = universe(merged_cpu()).reachable - merged.reachable
        assert gone == {cell for cell in universe(merged_cpu()).reachable if cell.mode == "off/32-bit"} != set()
        assert set(merged.lacking.values()) == {"e1: L2 does not run"}
        assert "e1: L2 does not run" in show(merged)

    def test_of_another_version(self) -> None:
        assert merge([covered(READ)], [replace(self.BARS, until=(7, 1))]).lacking == {}

    def test_another_machine_reaches_them(self) -> None:
        other = replace(FULL, layers=(("kvm", (6, 1)),))
        assert merge([covered(), covered(identity=other)], [self.BARS]).lacking == {}

    def test_words(self) -> None:
        cell = Cell("exit.delivered", "", "", "PAE/none", "#PF cut short by VMEXIT_NPF")
        assert self.BARS.bars(cell) and not self.BARS.bars(cell._replace(outcome="#GP"))
        assert not self.BARS.bars(cell._replace(mode="PAE/PAE")) and not Erratum("", "", "", "", "").bars(cell)


class TestText:
    def test_document(self) -> None:
        merged = merge([covered(READ, identity=Identity())])
        data = json.loads(text(merged))
        assert list(data) == ["machines", "reachable", "reached", "cells"]
        assert data["reached"] == 1 and data["reachable"] == len(merged.reachable)
        states: dict[str, list[Any]] = {}
        for cell in data["cells"]:
            states.setdefault(cell["state"], []).append(cell)
        assert len(states["reached"]) == 1 and len(states["not reached"]) == data["reachable"] - 1
        assert states["reached"][0] == READ._asdict() | {"state": "reached"}
        assert all(cell["reason"] for cell in states["not reachable"])
        assert {"rule", "dimension", "level", "mode", "outcome", "state"} <= states["not reached"][0].keys()

    def test_one_cell_a_line(self) -> None:
        merged = merge([covered(READ)])
        assert len(text(merged).splitlines()) == len(merged.reachable) + len(merged.gaps) + 7


class TestTable:
    def test_all(self) -> None:
        shown = show(merge([covered(*universe(merged_cpu()).reachable)]))
        assert "Not reached" not in shown and "(100.0 %)" in shown.splitlines()[-1]

    def test_one_is_missing(self) -> None:
        """It is named, and 100 % is said of nothing less than all."""
        shown = show(merge([covered(*universe(merged_cpu()).reachable - {WRITE})]))
        assert "Not reached\n  reached  both\n    at pte/pte: user write in 4-level/4-level\n" in shown
        assert "(99.9 %)" in shown.splitlines()[-1]

    def test_groups(self) -> None:
        """Levels, outcomes and modes that are missing together are named together."""
        gone = {
            Cell("guest.present", "guest", level, mode, f"#PF user {kind}")
            for level in ("pde", "pte") for mode in ("4-level/none", "PAE/none") for kind in ("read", "write")
        }
        reachable = universe(merged_cpu()).reachable
        assert gone <= reachable
        shown = show(merge([covered(*reachable - gone)]))
        assert "    at pde, pte: #PF user read, #PF user write in 4-level/none, PAE/none\n" in shown

    def test_nothing(self) -> None:
        """However much is missing, a person can read it."""
        shown = show(merge([covered()]))
        assert "cells more" in shown and len(shown.splitlines()) < 400
        assert all(len(row) <= 100 for row in shown.splitlines() if "machine" not in row)

    def test_what_cannot_be(self) -> None:
        shown = " ".join(show(merge([covered(identity=Identity())])).split())
        assert "cells: the processor lacks la57" in shown
        assert "guest.write at pdpte: PDPTEs of PAE mode have no R/W" in shown
