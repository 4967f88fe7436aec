"""Finding QEMU processes by a name given to them, to see that none is left."""

from __future__ import annotations

import time
import uuid
from pathlib import Path


def unique() -> str:
    """A name for one QEMU (`-name NAME`)."""
    return f"twinwalk-test-{uuid.uuid4().hex}"


def named(name: str) -> list[int]:
    """Pids of QEMU processes with that name, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it is gone
            if name.encode() in argv and b"-accel" in argv:
                found.append(int(entry.name))
    return found


def gone(name: str, seconds: float) -> bool:
    """Whether no such process is there any more, within that time."""
    end = time.monotonic() + seconds
    while named(name):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def wait_for(name: str, seconds: float = 60) -> int:
    """The pid of the QEMU of that name, once it is there."""
    end = time.monotonic() + seconds
    while not (found := named(name)):
        assert time.monotonic() < end, f"no QEMU named {name}"
        time.sleep(0.02)
    return found[0]
