"""What fuzzing costs, for `twinwalk bench`: programs a second, and what it takes to find faults that are planted."""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from harness.errors import TwinwalkError
from harness.fuzz_journal import FuzzJournal
from harness.fuzzing import Budget, Programs
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.machine import guests
from harness.run import run
from harness.scenario.ops import Scenario
from harness.steering import Steering
from harness.target import Target

PROGRAMS: Final = 1_000
_SEED: Final = 3
_QUALITY: Final = "tests/quality"
_FOUND: Final = f"{_QUALITY}/test_fuzz_faults.py"
_SHRUNK: Final = f"{_QUALITY}/test_shrunk.py"
PROPERTIES: Final = ("programs", "seconds", "ops")
"""What those tests say of a fault: programs and seconds until it was found, and of those that were shrunk how many
ops are left."""


class Measured(NamedTuple):
    """As `harness.bench.Figure`."""

    name: str
    value: float
    unit: str
    note: str


def rates(target: Target, errata: Sequence[Erratum]) -> Iterator[Measured]:
    """Programs a second: made by one process, and checked on one machine that is warm."""
    steering = Steering(guests.load_image(guests.build_l1()), _SEED)
    begun, made = time.process_time(), 0
    for batch in islice(steering.block(0), max(1, PROGRAMS // 25)):
        made += len(batch)
    busy = time.process_time() - begun
    ops = steering.made.ops / made
    yield Measured("programs made", made / busy, "programs/s", f"of {ops:.0f} ops, in a second of processor time")
    for mode in ("strict", "pipelined") if target.machine == "tcg" else ("pipelined",):
        yield _checked(target, errata, mode)


def _checked(target: Target, errata: Sequence[Erratum], mode: str) -> Measured:
    """From the first result to the last, while another process makes programs."""
    times: list[float] = []

    class Timed(Programs):
        def took(self, scenario: Scenario, result: Result, strict: bool) -> bool:
            times.append(time.monotonic())
            return super().took(scenario, result, strict)

    busy = time.process_time()
    with FuzzJournal(None, _SEED, "") as log:
        programs = Timed(log, _SEED, Budget(programs=PROGRAMS))
        outcome = run(target, [], errata, mode == "pipelined", sweeps=programs, jobs=1)
    busy = time.process_time() - busy
    (tally,) = programs.tallies
    found = f"{len(log.catches)} new findings" if log.catches else "nothing new"
    seconds = times[-1] - times[0]
    return Measured(f"programs fuzzed, {mode}", (len(times) - 1) / seconds, "programs/s",
                    f"{tally.done:,} programs, {found}; {busy / len(times) * 1e3:.1f} ms of the checker's processor "
                    f"time each, {outcome.seconds - seconds:.0f} s until the first")


def planted(root: Path) -> Iterator[Measured]:
    """What the tests that plant faults measure: how many, and how long each took. None where there are no such tests,
    as in an installed twinwalk. Raises TwinwalkError where one of them fails."""
    if not (root / _FOUND).is_file():
        return
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", _FOUND, _SHRUNK]
        done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TwinwalkError(f"planted faults were not found: {' '.join(argv[1:])}\n{done.stdout[-2000:]}")
        values = properties(report)
    programs, seconds, ops = (values[name] for name in PROPERTIES)
    yield Measured("planted faults found", len(programs), "faults",
                   f"in {median(programs):.0f} programs in the median, {max(programs):.0f} at worst; records, memory "
                   "and rules")
    yield Measured("time to find one, median", median(seconds), "s", "on the model behind the real rings, no boot")
    yield Measured("time to find one, worst", max(seconds), "s", "")
    yield Measured("planted faults shrunk, median", median(ops), "ops",
                   f"{len(ops)} on real guests; {max(ops):.0f} at worst")


def properties(report: Path) -> dict[str, list[float]]:
    """The properties of a JUnit report's tests, by name."""
    found: dict[str, list[float]] = {name: [] for name in PROPERTIES}
    for one in ET.parse(report).iter("property"):
        if one.get("name") in found:
            found[one.get("name", "")].append(float(one.get("value", "")))
    return found
