"""The machine `tcg`: QEMU's own emulation of an AMD CPU with SVM and nested paging runs L1."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from harness.errors import LaunchFailed, MachineLost
from harness.machine import guests, qemu
from harness.model.dirty import Liberties, Takes
from harness.model.registers import Cpu
from harness.wire.channel import Channel
from harness.wire.image import Image, tags
from harness.wire.layout import FEATURES, PROTOCOL

LIBERTIES: Final = Liberties(walk_faulted=Takes.ALWAYS, page_not_reached=Takes.ALWAYS, other_page=Takes.ALWAYS)
"""QEMU sets accessed bits as it goes down, the guest's leaf bits before it walks the page's own gPA, and
those of an access's first page before it walks the second: the manual permits all three (mmu_translate in
target/i386/tcg, 7.2 to 11)."""

_BOOT_TIMEOUT: Final = 8.0
_HANG_TIMEOUT: Final = 5.0


@dataclass(frozen=True)
class Identity:
    """What was tested, for reports and errata."""

    machine: str
    qemu: str
    qemu_version: tuple[int, int, int]
    cpu_model: str
    maxphyaddr: int
    svm_revision: int
    asids: int
    svm_features: int
    features: tuple[str, ...]


class TcgMachine:
    """A booted L1, ready for programs."""

    def __init__(self, process: qemu.Qemu, image: Image) -> None:
        self.image = image
        self._process = process
        self.memory = memoryview(mmap.mmap(process.memory_fd, image.ram_end))
        self.channel = Channel(self.memory, image)
        self.identity = Identity("tcg", process.binary, (0, 0, 0), "", 0, 0, 0, 0, ())
        self.cpu = Cpu()

    def boot(self, cpu_model: str) -> None:
        """Let L1 run until it says hello. Raises LaunchFailed if it does not."""
        self._check_cpu(cpu_model)
        self._process.command("cont")
        start = time.monotonic()
        while (hello := self.channel.hello()) is None:
            if self._process.exit_status() is not None:
                raise LaunchFailed(f"QEMU exited while L1 booted: {self._process.log_tail()}")
            if time.monotonic() - start > _BOOT_TIMEOUT:
                raise LaunchFailed(
                    f"L1 did not come up in {_BOOT_TIMEOUT:.0f} s; started as: {' '.join(self._process.argv)}\n"
                    f"{self.channel.panic()} {self._process.log_tail()}"
                )
            time.sleep(0.001)
        if hello["protocol"] != PROTOCOL:
            raise LaunchFailed(
                f"the guest speaks protocol {hello['protocol']}, this is {PROTOCOL}: delete {guests.cache_dir()}"
            )
        features = tuple(name for bit, name in enumerate(FEATURES) if hello["features"] >> bit & 1)
        self.identity = Identity(
            "tcg", self._process.binary, qemu.version(self._process.binary), cpu_model, hello["maxphyaddr"],
            hello["svm_revision"], hello["asids"], hello["svm_features"], features,
        )
        self.cpu = Cpu(hello["maxphyaddr"], "page1g" in features, hello["asids"], frozenset(features))
        data = tags(self.image.data)
        for start_of in (self.image.data.start, self.image.data.start + self.image.mirror_offset):
            self.memory[start_of : start_of + len(data)] = data

    def _check_cpu(self, cpu_model: str) -> None:
        """Before anything runs: does this CPU have what L1 needs?"""
        for flag in ("svm", "npt", "nx", "lm"):
            path = self._process.command("query-cpus-fast")[0]["qom-path"]
            if not self._process.command("qom-get", path=path, property=flag):
                raise LaunchFailed(f"CPU model {cpu_model!r} has no {flag}: use `--cpu max`, or add `,+{flag}` to it")

    def idle(self, waited: float) -> None:
        """See harness.lockstep.driver.Machine."""
        status = self._process.exit_status()
        if status is not None:
            how = f"exited with status {status}" if status else "ended: L1 reset the machine, by a triple fault perhaps"
            raise self.lost(f"QEMU {how}")
        if panic := self.channel.panic():
            raise self.lost(panic)
        if waited > _HANG_TIMEOUT:
            raise self.lost(f"no record for {_HANG_TIMEOUT:.0f} s: L1 or L2 hangs")

    def lost(self, reason: str) -> MachineLost:
        """See harness.lockstep.driver.Machine."""
        return replace(self._process.lost(reason), last_record=self.channel.last_record())

    def close(self) -> None:
        """Let go of the guest's memory; it is unmapped with the last view of it."""
        self.channel.close()


@contextmanager
def start(binary: str | None = None, cpu_model: str = "max", extra: Sequence[str] = ()) -> Iterator[TcgMachine]:
    """Boot L1; the machine is gone at the block's end. Raises LaunchFailed, saying what to do."""
    path = qemu.find(binary)
    qemu.version(path)
    kernel = guests.build_l1()
    image = guests.load_image(kernel)
    args = ["-machine", "pc,memory-backend=ram", "-accel", "tcg", "-cpu", cpu_model, "-kernel", str(kernel), *extra]
    with qemu.Qemu(path, args, image.ram_end) as process:
        machine = TcgMachine(process, image)
        try:
            machine.boot(cpu_model)
            yield machine
        finally:
            machine.close()
