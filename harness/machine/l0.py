"""L0 of the machine `kvm-on-tcg`: a real Linux kernel on the AMD CPU that QEMU plays, and the way to talk to it.

Control goes over virtio-serial ports, never over the console; the console is kept for error reports.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed, MachineLost
from harness.machine import tsc
from harness.machine.qemu import Qemu
from harness.machine.tcg import check_cpu

MEMORY: Final = 1 << 30
"""L0's RAM in bytes. It is one range from 0 on (the machine `pc` splits from 3.5 GiB on only)."""

_BOOT_TIMEOUT: Final = 90.0
_COMMAND_TIMEOUT: Final = 60.0
_COMMAND_LINE: Final = "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check"
"""A panic ends QEMU at once (-no-reboot); what a real CPU needs mitigations for, an emulated one has not."""


class L0:
    """A booted L0. QEMU appends what L0 writes to /dev/ports/twinwalk.trace0 (and so on) to the files `traces`."""

    def __init__(self, process: Qemu, control: socket.socket, traces: Sequence[int]) -> None:
        self.process = process
        self.traces = traces
        self._control = control
        self._buffer = b""

    def wait_for_boot(self) -> None:
        """Until init takes commands. Raises LaunchFailed if it does not."""
        try:
            self._answer(_BOOT_TIMEOUT)
        except MachineLost as lost:
            raise LaunchFailed(
                f"L0 did not come up: {lost.reason}; the end of its console:\n{_indented(lost.log)}\n"
                f"it was started as: {' '.join(lost.argv)}\n{_advice(lost)}"
                "try another kernel (--kernel PATH --modules DIR), another QEMU (--qemu), or --machine tcg"
            ) from None

    def run(self, script: str, timeout: float = _COMMAND_TIMEOUT) -> bytes:
        """What a line of shell prints in L0. Raises MachineLost if it fails, or L0 does not answer."""
        status, output, errors = self.try_run(script, timeout)
        if status:
            raise self.lost(f"`{script}` failed in L0 with status {status}: {errors.decode(errors='replace').strip()}")
        return output

    def try_run(self, script: str, timeout: float = _COMMAND_TIMEOUT) -> tuple[int, bytes, bytes]:
        """Its exit status, output and errors. Raises MachineLost if L0 does not answer."""
        assert "\n" not in script
        try:
            self._control.sendall(script.encode() + b"\n")
        except OSError as reason:
            raise self.lost(f"L0's control port is gone: {reason}") from None
        return self._answer(timeout)

    def _answer(self, timeout: float) -> tuple[int, bytes, bytes]:
        end = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            self._receive(end, timeout)
        head, _, self._buffer = self._buffer.partition(b"\n")
        status, length, errors = map(int, head.split())
        while len(self._buffer) < length + errors:
            self._receive(end, timeout)
        whole, self._buffer = self._buffer[: length + errors], self._buffer[length + errors :]
        return status, whole[:length], whole[length:]

    def _receive(self, end: float, timeout: float) -> None:
        ready, _, _ = select.select([self._control], [], [], min(0.2, max(0.0, end - time.monotonic())))
        data = b""
        if ready:
            with suppress(ConnectionError):  # nothing then, as at the end
                data = self._control.recv(1 << 20)
            self._buffer += data
        if data:
            return
        status = self.process.exit_status(1.0 if ready else 0.0)
        if status is not None or ready:
            raise self.lost("L0 panicked, or switched itself off" if not status else f"QEMU ended with status {status}")
        if time.monotonic() > end:
            raise self.lost(f"L0 did not answer within {timeout:.0f} s")

    def lost(self, reason: str) -> MachineLost:
        """The error that L0 was lost, with all there is to know."""
        return self.process.lost(reason)


@contextmanager
def start(binary: str, cpu_model: str, kernel: Path, root: Path, extra: Sequence[str], memory: int = MEMORY,
          fds: Sequence[int] = ()) -> Iterator[L0]:
    """Boot L0 with `memory` bytes of RAM; it is gone at the block's end. `extra` are arguments for its QEMU, which may
    name the descriptors `fds`. Raises LaunchFailed, saying what to do."""
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        trace = os.memfd_create("twinwalk-trace", os.MFD_CLOEXEC)
        stack.callback(os.close, trace)
        args = [
            "-machine", "pc,memory-backend=ram", "-accel", "tcg", "-cpu", cpu_model, "-smp", "1",
            "-kernel", str(kernel), "-initrd", str(root), "-append", " ".join([_COMMAND_LINE, *tsc.known()]),
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=control,fd={theirs.fileno()}",
            "-device", "virtserialport,chardev=control,name=twinwalk.control",
            "-chardev", f"file,id=trace0,path=/proc/self/fd/{trace}",
            "-device", "virtserialport,chardev=trace0,name=twinwalk.trace0",
            *extra,
        ]
        process = stack.enter_context(Qemu(binary, args, memory, (theirs.fileno(), trace, *fds)))
        theirs.close()
        check_cpu(process, cpu_model)
        process.command("cont")
        machine = L0(process, ours, [trace])
        machine.wait_for_boot()
        yield machine


def _advice(lost: MachineLost) -> str:
    """Linux 6.12 panics on QEMU 7.2, at various places behind a list or a slab that has gone bad; without cmpxchg16b,
    which its slab allocator uses, it does not. Linux 6.1 and 7.2 have not been seen to."""
    if "Kernel panic" in lost.log and not any("-cx16" in arg for arg in lost.argv):
        return "where QEMU 7.2's cmpxchg16b is to blame, as with Linux 6.12, add --cpu max,-cx16; else "
    return ""


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (nothing)"
