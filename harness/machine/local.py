"""What machines have in common whose L1 runs in a QEMU of this host: its start, and its end."""

from __future__ import annotations

import time

from harness.errors import LaunchFailed, MachineLost
from harness.machine import pieces, qemu
from harness.machine.l1 import Identity, L1Machine
from harness.model.liberties import Liberties
from harness.wire.image import Image


class LocalMachine(L1Machine):
    """L1 in `process`, which is started and stands still."""

    def __init__(self, process: qemu.Qemu, image: Image, identity: Identity, liberties: Liberties) -> None:
        super().__init__(image, pieces.of_runs(process.memory_fd, image.ram_end, image.pieces), identity, liberties)
        self._process = process

    def boot(self, seconds: float) -> None:
        """Let L1 run until it says hello. Raises LaunchFailed if it does not within so many seconds."""
        self._process.command("cont")
        start = time.monotonic()
        while (hello := self.channel.hello()) is None:
            if self._process.exit_status() is not None:
                raise LaunchFailed(f"QEMU exited while L1 booted: {self._process.log_tail()}")
            if time.monotonic() - start > seconds:
                raise LaunchFailed(
                    f"L1 did not come up in {seconds:.0f} s; started as: {' '.join(self._process.argv)}\n"
                    f"{self.channel.panic()} {self._process.log_tail()}"
                )
            time.sleep(0.001)
        self.greet(hello)

    def _see_whether_it_lives(self, waited: float) -> None:
        status = self._process.exit_status()
        if status is not None:
            how = f"exited with status {status}" if status else "ended: L1 reset the machine, by a triple fault perhaps"
            raise self.lost(f"QEMU {how}")

    def _lost(self, reason: str) -> MachineLost:
        return self._process.lost(reason)
