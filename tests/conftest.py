"""What tests share: the guest image, a CPU like QEMU's, and one booted machine for each test process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from harness.lockstep import errata as errata_files
from harness.lockstep.errata import Erratum
from harness.lockstep.twin import Twin
from harness.machine import guests, tcg
from harness.model.registers import Cpu
from harness.scenario.program import Compiler
from harness.wire.image import Image
from harness.wire.layout import SHARED

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "scenarios"

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=100, suppress_health_check=_SLOW)
settings.register_profile("search", deadline=None, max_examples=2000, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest: boots a guest under QEMU")


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The probe hypervisor's ELF file."""
    return guests.build_l1()


@pytest.fixture(scope="session")
def image(kernel: Path) -> Image:
    return guests.load_image(kernel)


@pytest.fixture(scope="session")
def cpu() -> Cpu:
    """What QEMU's `-cpu max` is to L1."""
    features = "nx page1g smep smap pku la57 umip fsgsbase xsave lmsle second"
    return Cpu(40, True, 16, frozenset(features.split()))


@pytest.fixture(scope="session")
def compiler(image: Image, cpu: Cpu) -> Compiler:
    return Compiler(image, cpu)


@pytest.fixture(scope="session")
def _twin(image: Image, cpu: Cpu) -> Twin:
    return Twin(image, cpu, tcg.LIBERTIES)


@pytest.fixture
def twin(_twin: Twin) -> Twin:
    """The model's side; a program's reset is all that it needs between two tests."""
    return _twin


@pytest.fixture(scope="session")
def errata() -> list[Erratum]:
    """All errata of the library."""
    return errata_files.load(LIBRARY / "errata")


class Machines:
    """A booted machine that is replaced once it is lost."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._machine: tcg.TcgMachine | None = None

    def get(self) -> tcg.TcgMachine:
        if self._machine is None:
            self._machine = self._stack.enter_context(tcg.start())
        return self._machine

    def in_step(self) -> bool:
        """Whether all that was posted is done and checked, and the machine lives."""
        if self._machine is None:
            return True
        start = self._machine.image.shared
        state = dict(zip(SHARED.names, SHARED.packer.unpack_from(self._machine.memory, start), strict=True))
        done = state["op_posted"] == state["op_done"] and state["record_posted"] == state["record_checked"]
        return done and not state["panic_vector"]

    def discard(self) -> None:
        """After a test that lost it, or left it out of step."""
        self._machine = None
        self._stack.close()


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    """The process's machine, for tests that may break it."""
    holder = Machines()
    yield holder
    holder.discard()


@pytest.fixture
def machine(machines: Machines) -> Iterator[tcg.TcgMachine]:
    """A booted machine, warm from the last test, as scenarios find it; booted anew if that test broke it."""
    yield machines.get()
    if machines.in_step():
        machines.get().rest()  # L1 spins while it waits, and tests that have no use for it would have one core less
    else:
        machines.discard()

