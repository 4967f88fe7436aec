"""Another CPU than that which the library's expectations are written for: what it cannot run is skipped, and said."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from harness import cli
from harness.errors import UsageError
from harness.lockstep.rehearse import rehearse
from harness.lockstep.result import Result
from harness.lockstep.tally import Tally
from harness.lockstep.twin import Twin
from harness.model.liberties import Liberties
from harness.model.registers import Cpu
from harness.scenario import files
from harness.scenario.program import Compiler
from harness.wire.image import Image
from tests.scenario.texts import one, run, text

LESS = Cpu(40, True, 16, frozenset(["nx", "page1g", "smep", "pku", "umip", "fsgsbase", "xsave", "lmsle"]))
"""`max` without LA57 and SMAP."""


def test_which_is_usual(image: Image, cpu: Cpu) -> None:
    assert Compiler(image, cpu).usual
    assert not any(Compiler(image, other).usual for other in (LESS, cpu._replace(maxphyaddr=48)))


@pytest.mark.parametrize(
    ("ops", "head", "reason"),
    [
        ((run("read a"),), 'guest = "5-level"\n', "needs la57"),
        ((run("read a"),), 'nested = "5-level"\n', "needs la57"),
        (('host = "cr4"\nset = ["smap"]', run("read a")), "", r"L1 cannot set 0x200000 in its CR4"),
    ],
)
def test_what_makes_no_sense_there(ops: tuple[str, ...], head: str, reason: str, image: Image, cpu: Cpu) -> None:
    scenario = one(*ops, head=head)
    with pytest.raises(UsageError, match=reason):
        rehearse(Twin(image, LESS, Liberties()), Compiler(image, LESS).compile(scenario))
    rehearse(Twin(image, cpu, Liberties()), Compiler(image, cpu).compile(scenario))


def test_no_nested_paging(image: Image, cpu: Cpu) -> None:
    """As with `--kvm-param npt=0`: only what needs none can be run."""
    less = cpu._replace(npt=False)
    compiler, twin = Compiler(image, less), Twin(image, less, Liberties())
    assert not compiler.usual
    with pytest.raises(UsageError, match="this CPU has no nested paging"):
        compiler.compile(one(run("read a")))
    without = 'nested_page = "none"\n'
    rehearse(twin, compiler.compile(one(run("read a"), head=without)))
    turned_on = one('vmcb = "np_control"\nset = ["bit0"]', run("read a"), head=without)
    with pytest.raises(UsageError, match="what NP_ENABLE does is not defined"):
        rehearse(twin, compiler.compile(turned_on))


def test_expectations_are_of_the_usual_cpu(image: Image) -> None:
    """They are the reader's; the model computes what this CPU must do."""
    scenario = one('vmcb = "cr4"\nset = ["smap"]', f'{run("read a")}\nexpect = ["#PF 0x1"]')
    twin, program = Twin(image, LESS, Liberties()), Compiler(image, LESS).compile(scenario)
    assert rehearse(twin, program, expectations=False) == 1
    with pytest.raises(UsageError, match="the model says 'INVALID'"):
        rehearse(twin, program)


def test_a_skipped_case_is_counted_apart() -> None:
    tally = Tally("sweeps/x", total=9, asked=2)
    assert not tally.add(Result("sweeps/x[1]", skipped="why"), strict=False)
    assert not tally.add(Result("sweeps/x[2]"), strict=False)
    assert (tally.done, tally.skipped) == (1, 1)


@pytest.mark.guest
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(text(run("read a")).replace('title = "t"', 'title = "t"\nguest = "{mode}"\neach = '
                                                 '{ mode = ["4-level", "5-level"] }'))
    json_file, junit_file = tmp_path / "r.json", tmp_path / "r.xml"
    arguments = ["run", str(path), "--cpu", "max,-la57", "--json", str(json_file), "--junit", str(junit_file)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "skipped" in shown and "5-level paging needs la57, which this CPU has not" in shown
    assert shown.rstrip().endswith("agreed")
    result = json.loads(json_file.read_text())
    assert list(result["skipped"]) == ["mixed[5-level]"] and result["totals"]["scenarios"] == 1
    suite = ET.parse(junit_file).getroot()
    assert suite.get("skipped") == "1" and suite.get("tests") == "2"


def test_on_the_usual_cpu_it_is_wrong_use(image: Image, cpu: Cpu) -> None:
    (scenario,) = files.parse(text(f'{run("read a")}\nexpect = ["#PF 0x1"]'), "x.toml", "x")
    with pytest.raises(UsageError, match=r"x\.toml:\d+: the scenario expects"):
        rehearse(Twin(image, cpu, Liberties()), Compiler(image, cpu).compile(replace(scenario)))
