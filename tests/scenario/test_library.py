"""Every scenario of the library: it reads, it compiles, and the model agrees with what it expects."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.model.registers import Cpu
from harness.scenario import files
from harness.scenario.ops import RunOp
from harness.scenario.program import Compiler
from harness.wire.image import Image
from tests.conftest import LIBRARY

FILES = files.find([LIBRARY])


def _id(path: Path) -> str:
    return str(path.relative_to(LIBRARY).with_suffix(""))


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_rehearsal(path: Path, compiler: Compiler, twin: Twin) -> None:
    for scenario in files.read(path):
        assert rehearse(twin, compiler.compile(scenario)) > 0, scenario.name


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_what_it_says_of_itself(path: Path) -> None:
    """A title and a lesson for people, a section that a reader can look up, and something that runs."""
    for scenario in files.read(path):
        assert scenario.title and scenario.shows and "{" not in scenario.title + scenario.shows, scenario.name
        assert re.match(r"\d+\.\d+", scenario.manual), f"{scenario.name}: {scenario.manual!r}"
        assert any(isinstance(op, RunOp) for op in scenario.ops), scenario.name


def test_names_are_unique() -> None:
    names = [s.name for path in FILES for s in files.read(path)]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)


@pytest.mark.parametrize("bits", [36, 48, 52])
def test_other_processors(bits: int, image: Image, cpu: Cpu) -> None:
    """The library is not of one machine: it compiles for other address widths too."""
    compiler = Compiler(image, cpu._replace(maxphyaddr=bits))
    for path in FILES:
        for scenario in files.read(path):
            assert compiler.compile(scenario).steps[-1].code == "SYNC"
