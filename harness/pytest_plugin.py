"""Scenario files as pytest's tests: `pytest --twinwalk-machine=tcg scenarios/`.

Each scenario is a test, on one machine that stays warm (one for each worker of pytest-xdist): a divergence that no
erratum names fails it, a lost machine is an error of it, and what this CPU cannot run is skipped, with the reason.
Without --twinwalk-machine files of that kind are left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from harness import far
from harness.errors import LaunchFailed, TwinwalkError, UsageError
from harness.far import AnySession
from harness.lockstep import errata
from harness.machine.address import FORM
from harness.options import LIBRARY, machine_name, targeted
from harness.report.junit import failure
from harness.report.summary import describe_machine, errata_of, identity_of
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.session import Done, Unit
from harness.target import AUTO, MACHINES

_NEEDS: Final = {"la57": "5-level paging", "page1g": "pages of 1G", "pku": "protection keys"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options: as those of `twinwalk run`."""
    group = parser.getgroup("twinwalk", "nested paging, held against a model")
    group.addoption("--twinwalk-machine", type=machine_name, metavar="MACHINE",
                    help="collect scenario files, and run them there: " + ", ".join([AUTO, *MACHINES, FORM]))
    group.addoption("--twinwalk-qemu", metavar="PATH", help="as `twinwalk run --qemu`")
    group.addoption("--twinwalk-cpu", metavar="MODEL", default="max", help="as `twinwalk run --cpu`")
    group.addoption("--twinwalk-kernel", type=Path, metavar="PATH", help="as `twinwalk run --kernel`")
    group.addoption("--twinwalk-modules", type=Path, metavar="DIR", help="as `twinwalk run --modules`")
    group.addoption("--twinwalk-strict", action="store_true", help="known errata fail a test too")


def pytest_configure(config: pytest.Config) -> None:
    """The markers; with --twinwalk-machine a machine, which is booted for the first test."""
    for name, what in _NEEDS.items():
        config.addinivalue_line("markers", f"needs_{name}: a scenario that can only be run on a CPU with {what}")
    if config.getoption("--twinwalk-machine"):
        config.stash[_MACHINE] = _Machine(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The machine is gone behind the last test."""
    if machine := config.stash.get(_MACHINE, None):
        machine.close()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """A scenario file, with --twinwalk-machine."""
    if file_path.suffix != ".toml" or _MACHINE not in parent.config.stash or files.ERRATA_FOLDER in file_path.parts:
        return None
    if not files.has_ops(file_path) or not files.find([file_path]):
        return None  # somebody else's, or a sweep: `twinwalk run` knows how many of its cases to take
    collector: pytest.Collector = ScenarioFile.from_parent(parent, path=file_path)
    return collector


class ScenarioFile(pytest.File):
    """One file of scenarios."""

    def collect(self) -> Iterable[pytest.Item]:
        """A test for each of its scenarios."""
        try:
            found = files.read(self.path)
        except UsageError as reason:
            raise self.CollectError(str(reason)) from None
        for scenario in found:
            yield ScenarioItem.from_parent(self, name=scenario.name, scenario=scenario)


class ScenarioItem(pytest.Item):
    """One scenario."""

    def __init__(self, *, scenario: Scenario, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scenario = scenario
        for need in _needs(scenario):
            self.add_marker(f"needs_{need}")

    def runtest(self) -> None:
        """Passes where `twinwalk run` agrees; raises what it does not, MachineLost, UsageError or pytest's own
        Skipped."""
        machine = self.config.stash[_MACHINE]
        for done in machine.run(self.scenario):
            result = done.result
            if machine.session.identity is not None:
                self.user_properties.append(("machine", describe_machine(identity_of(machine.session.identity))))
            self.user_properties += [("known erratum", one) for d in result.divergences for one in errata_of(d)]
            if result.lost is not None:
                raise result.lost
            if result.skipped:
                pytest.skip(result.skipped)
            if result.senseless:
                raise UsageError(result.senseless)
            if any(machine.strict or one.erratum is None for one in result.divergences):
                raise _Diverged("\n".join(failure(result, self.scenario, machine.strict)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What the error says: where it was raised is of no interest."""
        if isinstance(excinfo.value, _Diverged | TwinwalkError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """The file, the line from 0, and the name."""
        line = self.scenario.lines[0] - 1 if self.scenario.lines else None
        return self.path, line, f"{self.name}: {self.scenario.title}"


class _Diverged(AssertionError):
    """The machine does not do what the model says; the message is the finding."""


class _Machine:
    """The machine of this process: booted for the first scenario, gone at the end."""

    def __init__(self, config: pytest.Config) -> None:
        get = config.getoption
        self.strict = bool(get("--twinwalk-strict"))
        self._options = argparse.Namespace(
            machine=get("--twinwalk-machine"), qemu=get("--twinwalk-qemu"), cpu=get("--twinwalk-cpu"), qemu_arg=[],
            kernel=get("--twinwalk-kernel"), modules=get("--twinwalk-modules"), kvm_param=[], l1_pages="2m",
            audit=0)
        self._stack = ExitStack()
        self._failed: LaunchFailed | None = None
        self._session: AnySession | None = None

    @property
    def session(self) -> AnySession:
        if self._session is None:
            target = targeted(self._options).chosen()
            self._session = far.session(target, errata.load(LIBRARY / "errata"), pipelined=False)
            self._stack.enter_context(self._session)
        return self._session

    def run(self, scenario: Scenario) -> Iterator[Done]:
        """Raises LaunchFailed, again at once if it could not be started before."""
        if self._failed is not None:
            raise self._failed
        try:
            yield from self.session.work(Unit(((scenario,),), False))
        except LaunchFailed as failed:
            self._failed = failed
            raise

    def close(self) -> None:
        self._stack.close()


_MACHINE: Final = pytest.StashKey[_Machine]()


def _needs(scenario: Scenario) -> Iterator[str]:
    if "5-level" in (scenario.guest, scenario.nested):
        yield "la57"
    if "1G" in (scenario.guest_page, scenario.nested_page, scenario.table_page):
        yield "page1g"
    if any(probe.kind == "wrpkru" for op in scenario.ops for probe in getattr(op, "probes", ())):
        yield "pku"
