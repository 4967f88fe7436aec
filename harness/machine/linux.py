"""A Linux L1 with KVM, and in it QEMU with a Linux L2: the same kernel, the distribution's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from harness.machine import dropbear, guests, initramfs, kernel, tsc
from harness.machine.cpio import Archive

LINE: Final = "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check"
"""A panic ends QEMU at once (-no-reboot)."""

_MODULES: Final = ("kvm", "kvm_amd", "virtio_pci", "virtio_net")
_L2_MODULES: Final = ("virtio_pci", "virtio_balloon")
_SOURCES: Final = guests.SOURCES / "linux"


class Images(NamedTuple):
    """L1's kernel, its initrd and its command line; and L2's initrd, which L1 gets over SSH."""

    kernel: Path
    initrd: Path
    append: str
    l2: bytes


def build(say: Callable[[str], None]) -> Images:
    """All that L1 and L2 are booted from. Raises LaunchFailed, saying what to do."""
    found = kernel.find(None, None, say)
    busybox = initramfs.busybox(say).read_bytes()
    files = {
        "init": (_SOURCES / "l1").read_bytes(),
        "bin/busybox": busybox,
        "l2/vmlinuz": found.image.read_bytes(),
        "l2/line": LINE.encode(),
        "etc/passwd": b"root:*:0:0::/root:/bin/sh\n",
        "etc/shells": b"/bin/sh\n",
        **_modules(found, _MODULES),
    }
    paths = initramfs.qemu_files(initramfs.l0_qemu()) | dropbear.files(say)
    return Images(found.image, initramfs.archive("linux", files, paths), " ".join([LINE, *tsc.known()]),
                  _l2(found, busybox))


def _modules(found: kernel.Kernel, names: tuple[str, ...]) -> dict[str, bytes]:
    modules = found.closure(names)
    return {"modules/list": "".join(f"{name}\n" for name in modules).encode()} | {
        f"modules/{name}.ko": data for name, data in modules.items()}


def _l2(found: kernel.Kernel, busybox: bytes) -> bytes:
    archive = Archive()
    archive.device("dev/console", 5, 1)
    for folder in ("proc", "sys", "tmp"):
        archive.folder(folder)
    archive.add("init", (_SOURCES / "l2").read_bytes())
    archive.add("bin/busybox", busybox)
    archive.add("bin/memory", guests.build_linux("memory").read_bytes())
    for name, data in _modules(found, _L2_MODULES).items():
        archive.add(name, data)
    return archive.finish()
