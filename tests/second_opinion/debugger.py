"""A CPU under QEMU that never runs: its registers are set through the gdb stub, its tables stand in mapped
memory, and the monitor's own debugging walks say what they make of them."""

from __future__ import annotations

import json
import mmap
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from harness.machine import qemu
from harness.model.registers import CR0, CR4, EFER
from tests.second_opinion.gdb import Gdb

RAM: Final = 16 << 20
TABLES: Final = 1 << 20
"""Where tables may stand: above the machine's ROMs."""


class Debugger:
    """A paused machine as a context manager; `words` is its memory by quadwords, live."""

    def __init__(self, folder: Path) -> None:
        self._paths = folder / "gdb", folder / "qmp"
        gdb, qmp = (f"unix:{path},server=on,wait=off" for path in self._paths)
        args = ["-machine", "pc,memory-backend=ram", "-accel", "tcg", "-cpu", "max", "-gdb", gdb, "-qmp", qmp]
        self._qemu = qemu.Qemu(qemu.find(None), args, RAM)
        self._stub, self._qmp = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Self:
        self._qemu.__enter__()
        for end, path in zip((self._stub, self._qmp), self._paths, strict=True):
            end.settimeout(30)
            end.connect(str(path))
        self._answers = self._qmp.makefile("rb")
        self._answers.readline()
        self._commands([{"execute": "qmp_capabilities"}])
        self._gdb = Gdb(self._stub, self._qemu.lost)
        self.words = memoryview(mmap.mmap(self._qemu.memory_fd, RAM)).cast("Q")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._answers.close()
        self._qmp.close()
        self._stub.close()
        self._qemu.__exit__(kind, error, at)

    def enter(self, cr4: int, efer: int, cr3: int) -> None:
        """Paging on with these registers. EFER.LMA is LME here, as the CPU itself would have it."""
        self._gdb.set_register("cr0", CR0.PE | CR0.ET)
        self._gdb.set_register("efer", efer & ~EFER.LMA)
        self._gdb.set_register("cr4", cr4 & ~CR4.LA57)
        self._gdb.set_register("cr4", cr4)
        self._gdb.set_register("cr3", cr3)
        self._gdb.set_register("cr0", CR0.PE | CR0.ET | CR0.PG | CR0.WP)
        self._gdb.set_register("efer", efer | (EFER.LMA if efer & EFER.LME else 0))
        text = self._monitor("info registers")[0]
        now = {name: int(value, 16) for name, value in re.findall(r"(CR\d|EFER) ?=(\w+)", text)}
        wanted = now["CR3"] == cr3 and now["CR4"] == cr4 and now["CR0"] & CR0.PG
        assert wanted and bool(now["EFER"] & EFER.LMA) == bool(efer & EFER.LME), f"the CPU is not in that mode: {now}"

    def _commands(self, commands: Iterable[dict[str, object]]) -> list[str]:
        """QMP commands in one go: asked one by one, thousands of walks would take minutes."""
        lines = [json.dumps(command).encode() for command in commands]
        self._qmp.sendall(b"\n".join(lines) + b"\n")
        return [str(json.loads(self._answers.readline())["return"]) for _ in lines]

    def _monitor(self, *lines: str) -> list[str]:
        """The monitor's answers to `lines`."""
        return self._commands({"execute": "human-monitor-command", "arguments": {"command-line": line}}
                              for line in lines)

    def physical(self, gvas: Iterable[int]) -> list[int | None]:
        """`gva2gpa`: the address that each of `gvas` is mapped to, None if to none."""
        return [_address(text) for text in self._monitor(*(f"gva2gpa {gva:#x}" for gva in gvas))]

    def ranges(self) -> list[tuple[int, int, str]]:
        """`info mem`: ranges of gVAs, and the rights of each over all levels: `u` or `-`, `r`, `w` or `-`."""
        found = re.findall(r"([0-9a-f]{16})-([0-9a-f]{16}) [0-9a-f]{16} ([u-]r[w-])", self._monitor("info mem")[0])
        return [(int(first, 16), int(last, 16), rights) for first, last, rights in found]


def _address(text: str) -> int | None:
    if text.strip() == "Unmapped":
        return None
    match = re.fullmatch(r"gpa: (0x[0-9a-f]+|0)\s*", text)
    assert match, text
    return int(match[1], 16)
