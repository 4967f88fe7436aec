"""What `bench` says of fuzzing, by a machine without QEMU and by tests made up for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import bench_fuzz
from harness.errors import TwinwalkError
from harness.model.registers import Cpu
from harness.wire.image import Image
from tests.lockstep.fake import Plant
from tests.test_run import FakeTarget

TEST = """def test_one(record_property):
    for name, value in {values}:
        record_property(name, value)
    assert {passes}
"""


def made_up(root: Path, passes: bool = True) -> Path:
    folder = root / "tests" / "quality"
    folder.mkdir(parents=True)
    found = [("programs", 2), ("programs", 40), ("programs", 3), ("seconds", 0.5), ("seconds", 8.25), ("other", 1)]
    (folder / "test_fuzz_faults.py").write_text(TEST.format(values=found, passes=passes))
    (folder / "test_shrunk.py").write_text(TEST.format(values=[("ops", 3), ("ops", 5), ("ops", 9)], passes=True))
    return root


def test_planted_faults(tmp_path: Path) -> None:
    found = {one.name: one for one in bench_fuzz.planted(made_up(tmp_path))}
    assert [(one.value, one.unit) for one in found.values()] == [
        (3, "faults"), (4.375, "s"), (8.25, "s"), (5, "ops")]
    assert found["planted faults found"].note.startswith("in 3 programs in the median, 40 at worst")
    assert found["planted faults shrunk, median"].note == "3 on real guests; 9 at worst"


def test_one_that_is_not_found_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(TwinwalkError, match="planted faults were not found"):
        list(bench_fuzz.planted(made_up(tmp_path, passes=False)))


def test_without_a_checkout_there_are_none(tmp_path: Path) -> None:
    assert not list(bench_fuzz.planted(tmp_path))


def test_rates(image: Image, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fuzz, "PROGRAMS", 50)
    made, strict, pipelined = bench_fuzz.rates(FakeTarget(image=image, of=cpu, plants=[Plant()]), [])
    assert [one.name for one in (made, strict, pipelined)] == [
        "programs made", "programs fuzzed, strict", "programs fuzzed, pipelined"]
    assert all(one.unit == "programs/s" and one.value > 0 for one in (made, strict, pipelined))
    assert strict.note.startswith("50 programs, nothing new; ")
