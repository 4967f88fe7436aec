"""This host, as a machine under test: its kernel, its processor, and its tracefs.

The tracefs is shared with others. So what is traced here is traced in an instance of its own, of one thread alone, and
instance and probe are taken away at the end; those of a process that was killed are taken away by the next one.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from harness.machine import guests
from harness.machine.l1 import Layer
from harness.machine.qemu import die_with
from harness.machine.trace import TRACEFS, Place, Unobservable

_PREFIX: Final = "twinwalk_"
_EMULATED: Final = "QEMU TCG CPU"

SLOWER: Final = 8 if _EMULATED in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace") else 1
"""How much longer than elsewhere things may take: this host's processor may be emulated itself."""


def kernel_version() -> tuple[int, ...]:
    """The version of the upstream kernel that the running one is made from."""
    return upstream(platform.release(), platform.version())


def upstream(release: str, rest: str) -> tuple[int, ...]:
    """The version of the upstream kernel, by what `uname -r` says, and `uname -v` or /proc/version_signature."""
    number = r"(\d+(?:\.\d+)+)"
    found = re.search(rf"(?:Debian|Ubuntu \S+) {number}", rest) or re.match(number, release)
    return tuple(map(int, found[1].split("."))) if found else ()


def processor() -> Layer:
    """The layer that the processor is: `silicon`, by family, model and stepping; or a QEMU that plays it, by the
    version of its machine type."""
    about = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    if _EMULATED in about:
        with suppress(OSError):
            if found := re.search(r"-(\d+)\.(\d+)", Path("/sys/class/dmi/id/product_version").read_text("ascii")):
                return Layer("qemu-tcg", (int(found[1]), int(found[2])))
        return Layer("qemu-tcg", ())
    numbers = [re.search(rf"^{name}\s*: (\d+)$", about, re.MULTILINE) for name in ("cpu family", "model", "stepping")]
    return Layer("silicon", tuple(int(one[1]) for one in numbers if one))


def microcode() -> int:
    """The processor's patch level; 0 where the kernel does not tell."""
    about = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^microcode\s*: (0x[0-9a-f]+)$", about, re.MULTILINE)
    return int(found[1], 16) if found else 0


class Files:
    """See harness.machine.trace.Files; `place` is where in tracefs, `stream` what is copied there."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.stream = os.memfd_create("twinwalk-trace", os.MFD_CLOEXEC)
        self._copier: subprocess.Popen[bytes] | None = None

    def read(self, path: str) -> bytes:
        """See harness.machine.trace.Files. Raises Unobservable where only root may read."""
        try:
            return Path(path).read_bytes()
        except PermissionError as reason:
            raise Unobservable(f"{path} is not yours to read: run as root, to have KVM's MMU contexts checked too "
                               f"({reason.strerror})") from None

    def write(self, path: str, text: str) -> None:
        """See harness.machine.trace.Files."""
        # truncating kprobe_events would take away the probes of others
        _write(path, text, os.O_APPEND if path.endswith("kprobe_events") else os.O_TRUNC)

    def follow(self, path: str) -> None:
        """Copy what comes from `path` to `stream`."""
        parent, target = os.getpid(), f"/proc/self/fd/{self.stream}"
        self._copier = subprocess.Popen(
            [guests.build_l0("follow"), path, target], pass_fds=(self.stream,), stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: die_with(parent),
        )

    def close(self) -> None:
        """End the copy, and give back its memory."""
        if self._copier is not None:
            self._copier.kill()
            self._copier.wait()
        os.close(self.stream)


@contextmanager
def tracing(thread: int) -> Iterator[Files]:
    """A place in this host's tracefs, of that thread alone; it is gone at the block's end. Raises Unobservable."""
    name = f"{_PREFIX}{os.getpid()}"
    instance = Path(TRACEFS, "instances", name)
    files: Files | None = None
    try:
        if not Path(TRACEFS, "instances").is_dir():
            raise Unobservable(f"there is no tracefs at {TRACEFS}: mount -t tracefs tracefs {TRACEFS}")
        for left in Path(TRACEFS, "instances").glob(f"{_PREFIX}*"):
            if not _lives(int(left.name.removeprefix(_PREFIX))):
                _remove(left)
        instance.mkdir()
        files = Files(Place(str(instance), name))
        files.write(f"{instance}/set_event_pid", str(thread))
        yield files
    except PermissionError as reason:
        raise Unobservable(f"tracefs is not yours to use: run as root, to have KVM's MMU contexts checked too "
                           f"({reason.strerror})") from None
    finally:
        if files is not None:
            files.close()
        _remove(instance)


def _remove(instance: Path) -> None:
    """Take away an instance, and the probe that is named after it."""
    with suppress(OSError):
        for switch in instance.glob("events/*/enable"):
            switch.write_text("0\n", encoding="ascii")
    with suppress(OSError):
        instance.rmdir()
    with suppress(OSError):
        _write(f"{TRACEFS}/kprobe_events", f"-:{instance.name}/run", os.O_APPEND)


def _write(path: str, text: str, how: int) -> None:
    """In one call, as tracefs wants it, and without a seek, which some of its files do not know."""
    file = os.open(path, os.O_WRONLY | how)
    try:
        os.write(file, text.encode() + b"\n")
    finally:
        os.close(file)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
