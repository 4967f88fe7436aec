"""Scenarios as files: what is written is read again as it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.scenario import files, sweepfiles, writer
from harness.scenario.cover import sequence
from harness.scenario.ops import Scenario
from harness.scenario.sweep import Sweep
from tests.conftest import LIBRARY
from tests.scenario.texts import one, run

SWEEPS = sweepfiles.load([LIBRARY])


def again(scenario: Scenario) -> Scenario:
    """Written and read."""
    (read,) = files.parse(writer.text(scenario), "again.toml", "again")
    return replace(read, name=scenario.name, source=scenario.source, lines=scenario.lines)


def test_the_library() -> None:
    for scenario in files.load([LIBRARY]):
        assert again(scenario) == scenario


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_cases_of_sweeps(sweep: Sweep) -> None:
    for _, case in islice(sequence(sweep.space, 0), 300):
        scenario = sweep.scenario(case)
        assert again(scenario) == scenario


@given(st.text())
def test_any_text(title: str) -> None:
    scenario = replace(one("read a"), title=title.encode(errors="replace").decode(), shows="\x7f\n\"\\")
    assert again(scenario) == scenario


def test_looks_like_the_library() -> None:
    scenario = one('entry = "nested.a.pte"\nclear = ["rw"]\nset = ["nx"]', 'vmcb = "asid"\nvalue = 7',
                   'entry = "guest.a.pte"\nframe = "b"', run("read a; write4 b+0x10 = 0x1234", 3),
                   head='guest = "PAE"\nnested_page = "2M"\n', name="sweeps/x[a,b]")
    assert writer.text(scenario) == '''# sweeps/x[a,b]

title = "t"
manual = "15.25"
shows = "s"
guest = "PAE"
nested_page = "2M"

[[op]]
entry = "nested.a.pte"
set = ["nx"]
clear = ["rw"]

[[op]]
vmcb = "asid"
value = 0x7

[[op]]
entry = "guest.a.pte"
frame = "b"

[[op]]
run = ["read a", "write4 b+0x10 = 0x1234"]
cpl = 3
'''


def test_files(tmp_path: Path) -> None:
    scenarios = [one("read a", name="walk/x[pte,4K]"), one("read b", name="sweeps/y[../..,a]")]
    paths = writer.write(scenarios, tmp_path / "new")
    assert [path.name for path in paths] == ["x-pte-4K.toml", "y-..-..-a.toml"]
    assert [s.ops for s in files.load([tmp_path / "new"])] == [scenarios[0].ops, scenarios[1].ops]
    with pytest.raises(UsageError, match="there already"):
        writer.write(scenarios, tmp_path / "new")


def test_a_long_name(tmp_path: Path) -> None:
    (path,) = writer.write([one("read a", name=f"sweeps/x[{','.join(['value'] * 100)}]")], tmp_path)
    assert len(path.name) < 255


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        writer.write([one("read a")], tmp_path / "file")
