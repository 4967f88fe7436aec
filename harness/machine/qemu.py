"""A QEMU process: started, watched, and always ended."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from qemu.qmp import ExecuteError, QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

from harness import places
from harness.errors import LaunchFailed, MachineLost

OLDEST: Final = (5, 2)
"""The first QEMU whose SVM emulation is good enough to run our L1 and its L2."""

_PR_SET_PDEATHSIG: Final = 1
_LOG_TAIL: Final = 20
_QMP_TIMEOUT: Final = 10.0
_END_TIMEOUT: Final = 1.0
_GONE: Final = (QMPError, OSError, EOFError, TimeoutError)
"""What a monitor raises whose QEMU has gone."""


def find(binary: str | None) -> str:
    """The path of the QEMU to use. Raises LaunchFailed, saying what to do, if there is none."""
    wanted = binary or "qemu-system-x86_64"
    path = shutil.which(wanted)
    if path is None:
        hint = ("give the path of an executable, or a version such as 10.0" if binary else
                f"{places.remedy('qemu-system-x86')}, or give one with --qemu")
        raise LaunchFailed(f"no QEMU at {wanted!r}: {hint}")
    return str(Path(path).absolute())


@lru_cache(maxsize=8)
def version(binary: str) -> tuple[int, int, int]:
    """Major, minor and micro version. Raises LaunchFailed for what is no QEMU, or one too old."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise LaunchFailed(f"{binary} does not run: {reason}") from None
    match = re.search(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if not match:
        raise LaunchFailed(f"{binary} is no QEMU: `{binary} --version` says {(done.stdout + done.stderr).strip()!r}")
    found = (int(match[1]), int(match[2]), int(match[3]))
    if found < OLDEST:
        raise LaunchFailed(f"{binary} is QEMU {match[1]}.{match[2]}; twinwalk needs {OLDEST[0]}.{OLDEST[1]} or later")
    return found


class Qemu:
    """QEMU as a context manager: started paused, ended with the block, and with this process at the
    latest, however it ends. Guest memory and monitor need no files: they are passed as descriptors, as are
    `fds`, which `args` may name. `serial` is where its first serial port leads: by default to its log."""

    def __init__(self, binary: str, args: list[str], memory_size: int, fds: Sequence[int] = (), serial: str = "stdio",
                 ) -> None:
        self.binary = binary
        self._serial = serial
        self._fds = fds
        self._args = args
        self._size = memory_size
        self.argv: list[str] = []
        self.memory_fd = -1
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: QEMUMonitorProtocol | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        self.memory_fd = os.memfd_create("twinwalk-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.memory_fd, self._size)
        self._log = tempfile.TemporaryFile(prefix="twinwalk-")  # noqa: SIM115 - closed in close()
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (self.memory_fd, theirs.fileno())
            self.argv = [
                self.binary, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot", "-S",
                "-m", f"{self._size >> 20}M",
                "-object", f"memory-backend-file,id=ram,size={self._size},share=on,mem-path=/proc/self/fd/{fds[0]}",
                "-chardev", f"socket,id=qmp,fd={fds[1]}", "-mon", "chardev=qmp,mode=control",
                "-serial", self._serial,
                *self._args,
            ]
            parent = os.getpid()
            try:
                self._process = subprocess.Popen(
                    self.argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
                    pass_fds=(*fds, *self._fds), start_new_session=True, preexec_fn=lambda: die_with(parent),
                )
            except OSError as reason:
                ours.close()
                raise LaunchFailed(f"cannot start {self.binary}: {reason}") from None
        self._monitor = QEMUMonitorProtocol(ours)
        self._monitor.settimeout(_QMP_TIMEOUT)
        try:
            self._monitor.connect()
        except _GONE as reason:
            self._reap(_END_TIMEOUT)
            raise LaunchFailed(
                f"QEMU did not start: {self.log_tail() or reason}\nit was started as: {' '.join(self.argv)}"
            ) from None

    def command(self, name: str, **arguments: object) -> Any:
        """One QMP command; returns its answer. Raises MachineLost if QEMU does not answer."""
        assert self._monitor is not None
        try:
            return self._monitor.cmd(name, **arguments)
        except _GONE as reason:
            raise self.lost(f"QEMU's monitor failed at {name}: {reason}") from None

    def events(self) -> list[dict[str, Any]]:
        """What QEMU has told of its own accord since it was last asked."""
        assert self._monitor is not None
        with suppress(*_GONE):
            self._monitor.cmd("query-status")  # what came before the answer has been read then
            return [dict(event) for event in self._monitor.get_events()]
        return []

    def microcode(self) -> int:
        """The patch level that the CPU reports in MSR 8Bh; 0 where it has none."""
        assert self._monitor is not None
        path = self.command("query-cpus-fast")[0]["qom-path"]
        with suppress(ExecuteError):
            return int(str(self._monitor.cmd("qom-get", path=path, property="ucode-rev")))
        return 0

    def stop(self) -> None:
        """All of QEMU stands still, its monitor too."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Behind `stop`; harmless otherwise."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def exit_status(self, wait: float = 0.0) -> int | None:
        """QEMU's exit status, or None while it runs; it is given `wait` seconds to end."""
        if self._process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(wait)
        return None

    def log_tail(self) -> str:
        """The last lines of QEMU's own output and of the guest's serial console."""
        if self._log is None:
            return ""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 8192))
        text = self._log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-_LOG_TAIL:])

    def log_lines(self, wanted: re.Pattern[str]) -> list[str]:
        """The lines in all of it in which that is found."""
        if self._log is None:
            return []
        self._log.seek(0)
        return [text for text in self._log.read().decode(errors="replace").splitlines() if wanted.search(text)]

    def lost(self, reason: str) -> MachineLost:
        """The error that this machine was lost, with all there is to know."""
        return MachineLost(reason, self.argv, self.log_tail())

    def close(self) -> None:
        """End QEMU. Safe to call twice."""
        self.go_on()
        if self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            with suppress(*_GONE):
                monitor.settimeout(_END_TIMEOUT)
                monitor.cmd("quit")
            with suppress(*_GONE):
                monitor.close()
        if self._process is not None:
            self._reap(_END_TIMEOUT)
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def _reap(self, timeout: float) -> None:
        assert self._process is not None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def die_with(parent: int) -> None:
    """In a child: die when the parent does, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
