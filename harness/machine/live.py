"""A machine that somebody else has running, by the QMP socket of its QEMU (`-qmp unix:PATH,server=on,wait=off`): its
memory, and the registers of a vCPU. It stands still while it is looked at, and goes on if it ran before.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

from harness.errors import UsageError

SCHEME: Final = "qmp:"
_PAGE: Final = 4096
_TIMEOUT: Final = 10.0
_REGISTERS: Final = re.compile(r"\b(CR0|CR2|CR3|CR4|EFER|EFL|RFL|CPL)=([0-9a-f]+)")
_GONE: Final = (QMPError, OSError, EOFError, TimeoutError)
_NAMES: Final = {"EFL": "rflags", "RFL": "rflags"}


class Live:
    """A context manager. Memory by quadword index, as the model's walks read it: IndexError for what is not RAM, which
    is not touched. Raises UsageError, saying what to do, where there is no such QEMU."""

    def __init__(self, path: Path) -> None:
        """`path` is the socket's."""
        self._name = f"{SCHEME}{path}"
        self._pages: dict[int, tuple[int, ...]] = {}
        self._monitor = QEMUMonitorProtocol(str(path))
        self._ran = False

    def __enter__(self) -> Self:
        try:
            self._monitor.settimeout(_TIMEOUT)
            self._monitor.connect()
        except _GONE as reason:
            self._monitor.close()
            raise UsageError(f"{self._name}: no QEMU answers there ({str(reason) or type(reason).__name__}): start it "
                             "with -qmp unix:PATH,server=on,wait=off; one client at a time is served") from None
        self._ran = bool(self._command("query-status")["running"])
        if self._ran:
            self._command("stop")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(*_GONE):  # one that went meanwhile has nothing to go on with
            if self._ran:
                self._monitor.cmd("cont")
        self._monitor.close()

    def registers(self, vcpu: int) -> Mapping[str, int]:
        """`cr0`, `cr2`, `cr3`, `cr4`, `efer`, `rflags` and `cpl` of that vCPU, numbered from 0: L2's while it runs L2,
        else L1's. Raises UsageError where there is no such one."""
        count = len(self._command("query-cpus-fast"))
        if not vcpu < count:
            raise UsageError(f"--vcpu {vcpu}: this machine has {count}, numbered from 0")
        said = self._ask("info registers", vcpu)
        return {_NAMES.get(name, name.lower()): int(value, 16) for name, value in _REGISTERS.findall(said)}

    def __getitem__(self, index: int) -> int:
        page, at = divmod(index, _PAGE // 8)
        if page not in self._pages:
            self._pages[page] = self._read(page * _PAGE)
        return self._pages[page][at]

    def __setitem__(self, index: int, value: int) -> None:
        raise TypeError("a machine of somebody else is only read")

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at sPA `address`, both multiples of 8. Raises IndexError."""
        words = [self[index] for index in range(address // 8, (address + size) // 8)]
        return struct.pack(f"<{len(words)}Q", *words)

    def _read(self, address: int) -> tuple[int, ...]:
        """The quadwords of a page. Only RAM is read: reading a device may change it."""
        if "Host virtual address" not in self._ask(f"gpa2hva {address:#x}"):
            raise IndexError(f"sPA {address:#x} is not RAM of this machine")
        said = self._ask(f"xp /{_PAGE // 8}gx {address:#x}")
        words = tuple(int(word, 16) for text in said.splitlines() for word in text.partition(": ")[2].split())
        if len(words) != _PAGE // 8:
            raise IndexError(f"sPA {address:#x}: the monitor says {said[:80]!r}")
        return words

    def _ask(self, command: str, vcpu: int = 0) -> str:
        return str(self._command("human-monitor-command", **{"command-line": command, "cpu-index": vcpu}))

    def _command(self, name: str, **arguments: object) -> Any:
        try:
            return self._monitor.cmd(name, **arguments)
        except _GONE as reason:
            raise UsageError(f"{self._name}: it does not answer any more: {reason}") from None
