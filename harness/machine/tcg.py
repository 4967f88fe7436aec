"""The machine `tcg`: QEMU's own emulation of an AMD CPU with SVM and nested paging runs L1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from harness.errors import LaunchFailed
from harness.machine import guests, qemu, versions
from harness.machine.l1 import Identity, Layer
from harness.machine.local import LocalMachine
from harness.machine.paced import PacedChannel
from harness.model.liberties import Caches, Liberties, Takes
from harness.wire.image import Image

LIBERTIES: Final = Liberties.each(Takes.ALWAYS, Caches(upper=False, over_vmrun=False))
"""QEMU holds whole translations and, in a TLB of their own, nested ones (MMU_NESTED_IDX); no upper-level entries, and
nothing over VMRUN or #VMEXIT, which load CR3. It sets accessed bits as it goes down, the guest's leaf bits before it
walks the page's own gPA, and those of an access's first page before it walks the second. The manual permits it all
(mmu_translate() and cpu_x86_update_cr3() in target/i386, 7.2 to 11)."""

_BOOT_TIMEOUT: Final = 20.0


class TcgMachine(LocalMachine):
    """L1 right on QEMU."""

    def __init__(self, process: qemu.Qemu, image: Image, cpu_model: str) -> None:
        version = qemu.version(process.binary)
        identity = Identity("tcg", process.binary, version, cpu_model, (Layer("qemu-tcg", version),))
        super().__init__(process, image, identity, LIBERTIES)
        self.channel = self._paced = PacedChannel(self.memory, image, process.stop, process.go_on)

    def start(self) -> None:
        """Boot L1 on a CPU that has what it needs. Raises LaunchFailed."""
        check_cpu(self._process, self.identity.cpu_model)
        self.identity = replace(self.identity, microcode=self._process.microcode())
        self.boot(_BOOT_TIMEOUT)

    def rest(self) -> None:
        """There is nothing to do for a while: L1 sleeps."""
        self._paced.rest()


def check_cpu(process: qemu.Qemu, cpu_model: str) -> None:
    """Before anything runs: does this CPU have what L1 needs? Raises LaunchFailed."""
    for flag in ("svm", "npt", "nx", "lm"):
        path = process.command("query-cpus-fast")[0]["qom-path"]
        if not process.command("qom-get", path=path, property=flag):
            raise LaunchFailed(f"CPU model {cpu_model!r} has no {flag}: use `--cpu max`, or add `,+{flag}` to it")


@contextmanager
def start(
    binary: str | None = None,
    cpu_model: str = "max",
    extra: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[TcgMachine]:
    """Boot L1; the machine is gone at the block's end. Raises LaunchFailed, saying what to do."""
    path = versions.find_qemu(binary, say)
    qemu.version(path)
    kernel = guests.build_l1()
    image = guests.load_image(kernel)
    args = ["-machine", f"pc,memory-backend=ram,max-ram-below-4g={image.low_end}", "-accel", "tcg", "-smp", "2,cores=2",
            "-cpu", cpu_model,
            "-kernel", str(kernel), *extra]
    with qemu.Qemu(path, args, image.ram_bytes) as process:
        machine = TcgMachine(process, image, cpu_model)
        try:
            machine.start()
            yield machine
        finally:
            machine.close()
