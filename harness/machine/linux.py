"""A Linux L1 with KVM, and in it QEMU with a Linux L2: the same kernel, the distribution's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness.machine import guests, initramfs, kernel
from harness.machine.cpio import Archive

LINE: Final = "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check"
"""A panic ends QEMU at once (-no-reboot)."""

_MODULES: Final = ("kvm", "kvm_amd")
_SOURCES: Final = guests.SOURCES / "linux"


def build(say: Callable[[str], None]) -> tuple[Path, Path, str]:
    """L1's kernel, its initrd with all of L2 in it, and its command line. Raises LaunchFailed, saying what to do."""
    found = kernel.find(None, None, say)
    modules = found.closure(_MODULES)
    busybox = initramfs.busybox(say).read_bytes()
    files = {
        "init": (_SOURCES / "l1").read_bytes(),
        "bin/busybox": busybox,
        "modules/list": "".join(f"{name}\n" for name in modules).encode(),
        **{f"modules/{name}.ko": data for name, data in modules.items()},
        "l2/vmlinuz": found.image.read_bytes(),
        "l2/root": _l2(busybox),
        "l2/line": LINE.encode(),
    }
    root = initramfs.archive("linux", files, initramfs.qemu_files(initramfs.l0_qemu()))
    return found.image, root, LINE


def _l2(busybox: bytes) -> bytes:
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3)
    archive.device("dev/zero", 1, 5)
    for folder in ("proc", "tmp"):
        archive.folder(folder)
    archive.add("init", (_SOURCES / "l2").read_bytes())
    archive.add("bin/busybox", busybox)
    archive.add("bin/memory", guests.build_linux("memory").read_bytes())
    return archive.finish()
