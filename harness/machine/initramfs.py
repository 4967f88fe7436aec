"""L0's root: busybox, the modules, the QEMU that runs L1 with its libraries and firmware, and L1 itself.

Made by us, cached by content; nothing of the host is touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from harness.errors import LaunchFailed
from harness.machine import foreign, guests, libraries, qemu, versions
from harness.machine.cpio import Archive
from harness.machine.kernel import PARAMETERS, Kernel
from harness.machine.packages import Packages

MODULES: Final = ("virtio_pci", "virtio_console", "kvm", "kvm_amd")
"""What L0 needs; what these depend on comes with them."""

_FIRMWARE: Final = ("bios-256k.bin", "kvmvapic.bin", "pvh.bin", "linuxboot_dma.bin")
_KEEP: Final = 4
"""Archives that stay in the cache."""


def build(kernel: Kernel, l1: Path | None, l0_qemu: str, parameters: Iterable[str],
          say: Callable[[str], None] = lambda text: None, more: Mapping[str, bytes] = MappingProxyType({}),
          names: Iterable[str] = MODULES) -> Path:
    """The archive's path, made if there is none like it yet. `parameters` are texts such as `npt=0`; `more` are files,
    `names` are of modules. Raises LaunchFailed, saying what to do; UsageError for a parameter that does not exist."""
    modules = kernel.closure(names)
    options: dict[str, list[str]] = {name: [] for name in PARAMETERS}
    options["kvm_amd"].append("nested=1")
    for text in parameters:
        owner, value = kernel.parameter(text)
        options[owner].append(value)
    files: dict[str, bytes] = {
        "init": (guests.SOURCES / "l0" / "init").read_bytes(),
        "bin/busybox": busybox(say).read_bytes(),
        "bin/pages": guests.build_l0("pages").read_bytes(),
        "bin/follow": guests.build_l0("follow").read_bytes(),
        **({"l1.elf": l1.read_bytes()} if l1 is not None else {}),
        "modules/list": "".join(f"{name} {' '.join(options.get(name, ()))}\n" for name in modules).encode(),
        **{f"modules/{name}.ko": data for name, data in modules.items()},
        **more,
    }
    return archive("l0", files, qemu_files(l0_qemu))


def archive(kind: str, files: Mapping[str, bytes], paths: Mapping[str, Path]) -> Path:
    """An initramfs of `files` and of those at `paths`, by their places in it; made if there is none like it yet. Each
    `kind` has its own place in the cache. Raises LaunchFailed."""
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(b"%s\0%d\0" % (name.encode(), len(data)) + data)
    for name, path in paths.items():
        about = path.stat()
        digest.update(f"{name}\0{path}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    target = guests.cache_dir() / f"{kind}-{digest.hexdigest()[:20]}.cpio"
    try:
        if target.exists():
            os.utime(target)
            return target
        _write(target, {**files, **{name: path.read_bytes() for name, path in paths.items()}})
    except OSError as reason:
        raise LaunchFailed(f"cannot write the initramfs {target}: {reason.strerror}; set XDG_CACHE_HOME") from None
    return target


def _write(target: Path, files: Mapping[str, bytes]) -> None:
    root = Archive()
    root.device("dev/console", 5, 1)
    for folder in ("proc", "sys", "tmp"):
        root.folder(folder)
    for name, data in files.items():
        root.add(name, data)
    scratch = target.with_suffix(f".{os.getpid()}.new")
    try:
        scratch.write_bytes(root.finish())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    old = sorted(target.parent.glob(f"{target.name.partition('-')[0]}-*.cpio"), key=lambda path: path.stat().st_mtime)
    for path in old[:-_KEEP]:
        path.unlink(missing_ok=True)


def qemu_files(binary: str) -> dict[str, Path]:
    """A QEMU with its libraries and firmware, by the path that each has in L0. Raises LaunchFailed."""
    if (own := foreign.files(binary)) is not None:
        files, folder = own
        return files | {f"firmware/{name}": folder / name for name in _FIRMWARE}
    found, missing = libraries.needed([Path(binary)])
    if missing:
        raise LaunchFailed(f"{binary} lacks {', '.join(missing)}, says ldd: it cannot run in L0")
    files = {"bin/qemu": Path(binary), **found}
    folders = subprocess.run([binary, "-L", "help"], capture_output=True, text=True, check=False).stdout.split()
    for name in _FIRMWARE:
        file = next((path for folder in folders if (path := Path(folder, name)).exists()), None)
        if file is None:
            raise LaunchFailed(f"{binary} has no {name} in {', '.join(folders) or 'any folder'}: install its firmware "
                               "(package seabios, and QEMU's own)")
        files[f"firmware/{name}"] = file.resolve()
    return files


def l0_qemu() -> str:
    """The QEMU that runs L1 in L0: the one on PATH, else the newest that was fetched."""
    try:
        return qemu.find(None)
    except LaunchFailed:
        if here := versions.fetched("qemu"):
            return str(here[-1].path)
        raise


def busybox(say: Callable[[str], None]) -> Path:
    """A static busybox: the host's, or the distribution's package. Raises LaunchFailed."""
    if (found := shutil.which("busybox")) and _is_static(Path(found)):
        return Path(found)
    packages = Packages(say)
    folder = next(reversed(packages.cached("busybox-static")), None) or packages.get("busybox-static")
    for path in (folder / "usr/bin/busybox", folder / "bin/busybox"):
        if path.is_file():
            return path
    raise LaunchFailed(f"there is no busybox in {folder}: remove that folder, and run this again")


def _is_static(path: Path) -> bool:
    try:
        return b"ld-linux" not in path.read_bytes()[:4096] and b"ld-musl" not in path.read_bytes()[:4096]
    except OSError:
        return False
