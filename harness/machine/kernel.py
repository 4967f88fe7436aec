"""The kernel of L0: the distribution's, or a developer's own build; its image and its modules."""

from __future__ import annotations

import gzip
import lzma
import re
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed, UsageError
from harness.machine import versions
from harness.machine.guests import cache_dir
from harness.machine.packages import Packages

FLAVOURS: Final = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic")
"""Packages that depend on the newest kernel, the smallest first: of Debian, Ubuntu, Debian, Ubuntu."""

_PART: Final = re.compile(r"linux-(image|binary|modules)-(unsigned-)?\d\S*")
_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")
_OWN: Final = "give a kernel of your own with --kernel PATH --modules DIR"
REMEDY: Final = f"build it with CONFIG_KVM_AMD, CONFIG_VIRTIO_PCI and CONFIG_VIRTIO_CONSOLE (y or m), or {_OWN}"


@dataclass(frozen=True)
class Kernel:
    """A kernel image, and the folders that its modules lie in."""

    image: Path
    modules: tuple[Path, ...]

    @cached_property
    def release(self) -> str:
        """As uname -r has it. Raises LaunchFailed for a file that is no x86 kernel image."""
        try:
            with self.image.open("rb") as file:
                head = file.read(0x8000)
        except OSError as reason:
            raise LaunchFailed(f"cannot read the kernel {self.image}: {reason.strerror}") from None
        if head[0x202:0x206] != b"HdrS":
            raise LaunchFailed(f"{self.image} is no x86 kernel image: give a bzImage with --kernel")
        start = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
        return head[start : head.index(b"\0", start)].decode("ascii", "replace").split(" ")[0]

    @cached_property
    def _files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self.modules:
            for path in folder.rglob("*.ko*"):
                name, dot, rest = path.name.partition(".ko")
                if dot + rest in _SUFFIXES:
                    found.setdefault(name.replace("-", "_"), path)
        return found

    @cached_property
    def _builtin(self) -> set[str] | None:
        """Names of what is built in; None if the tree does not say."""
        lists = [path for folder in self.modules for path in folder.rglob("modules.builtin")]
        if not lists:
            return None
        lines = [line for path in lists for line in path.read_text(errors="replace").split()]
        return {Path(line).name.removesuffix(".ko").replace("-", "_") for line in lines}

    def module(self, name: str) -> bytes | None:
        """A module as the kernel wants it, decompressed; None if it is not a file of the tree.
        Raises LaunchFailed for one that cannot be read."""
        path = self._files.get(name)
        if path is None:
            return None
        try:
            data = path.read_bytes()
            match path.suffix:
                case ".xz":
                    return lzma.decompress(data)
                case ".gz":
                    return gzip.decompress(data)
                case ".zst":
                    return _unzstd(path)
            return data
        except (OSError, EOFError, lzma.LZMAError) as reason:
            raise LaunchFailed(f"cannot read the module {path}: {reason}") from None

    def closure(self, names: Iterable[str]) -> dict[str, bytes]:
        """Modules `names` and what they depend on, in the order in which they can be loaded; those that are
        built in are left out. Raises LaunchFailed if one is neither built in nor there."""
        out: dict[str, bytes] = {}

        def add(name: str, wanted_by: str) -> None:
            if name in out:
                return
            data = self.module(name)
            if data is None:
                if self._builtin is not None and name not in self._builtin:
                    raise LaunchFailed(
                        f"kernel {self.release} has no {name}{wanted_by}: neither in {self._where()} nor built in; "
                        f"{REMEDY}"
                    )
                return
            for other in _modinfo(data, "depends"):
                for dependency in filter(None, other.split(",")):
                    add(dependency.replace("-", "_"), f", which {name} needs")
            out[name] = data

        for name in names:
            add(name, "")
        return out

    def _where(self) -> str:
        return ", ".join(map(str, self.modules)) or "any module tree (--modules)"

    def parameter(self, text: str) -> tuple[str, str]:
        """A --kvm-param `npt=0` or `kvm.tdp_mmu=0`: the module, and the parameter with its value.
        Raises UsageError for one that neither kvm nor kvm_amd has."""
        name, equals, value = text.partition("=")
        module, dot, bare = name.rpartition(".")
        known = {m: [p.partition(":")[0] for p in _modinfo(self.module(m) or b"", "parmtype")] for m in PARAMETERS}
        if not equals or not value or (dot and module not in known):
            raise UsageError(f"--kvm-param {text!r}: write NAME=VALUE, such as npt=0, or kvm.NAME=VALUE")
        for owner in (module,) if dot else PARAMETERS:
            if bare in known[owner] or (dot and not known[owner]):
                return owner, f"{bare}={value}"
        everything = sorted({p for names in known.values() for p in names})
        raise UsageError(f"--kvm-param {text!r}: kernel {self.release} has no such parameter of kvm or kvm_amd; "
                         f"there are {', '.join(everything) or 'none, or they are built in: write kvm.NAME=VALUE'}")


PARAMETERS: Final = ("kvm_amd", "kvm")
"""The modules whose parameters can be set."""


def find(image: Path | None, modules: Path | None, say: Callable[[str], None] = lambda text: None) -> Kernel:
    """The kernel to boot: `image` with `modules`, a build tree, a version's name, or else the distribution's.
    Raises LaunchFailed, saying what to do."""
    if image is None and modules is None:
        return _distribution(say)
    if image is not None and modules is None and versions.is_name(str(image)):
        modules = versions.resolve("kernel", str(image), say).path
        return _in([modules])
    if image is None:
        raise UsageError("--modules needs --kernel: the image that these modules belong to")
    if image.is_dir():  # a build tree
        modules = modules or image
        image = image / "arch" / "x86" / "boot" / "bzImage"
    for path, option in ((image, "--kernel"), (modules, "--modules")):
        if path is not None and not path.exists():
            raise LaunchFailed(f"there is no {path}: correct {option}")
    found = Kernel(image, () if modules is None else (modules,))
    _ = found.release  # raises for what is no kernel
    return found


def _distribution(say: Callable[[str], None]) -> Kernel:
    packages = Packages(say)
    stamp = cache_dir() / "packages" / "kernel"
    try:
        if packages.lists_are_newer_than(stamp) or not (names := stamp.read_text().split()):
            names = _fetch(packages, stamp)
    except LaunchFailed as reason:
        try:  # what was fetched before will do
            names = stamp.read_text().split()
        except OSError:
            raise LaunchFailed(f"cannot get a kernel for L0: {reason}\n{_OWN}, or use --machine tcg") from None
    folders = [cache_dir() / "packages" / name for name in names]
    try:
        return _in(folders)
    except LaunchFailed:
        stamp.unlink(missing_ok=True)
        raise


def _in(folders: list[Path]) -> Kernel:
    """The kernel in unpacked packages."""
    images = [path for folder in folders for path in folder.glob("**/vmlinuz*") if path.is_file()]
    if not images:
        raise LaunchFailed(f"there is no kernel in {', '.join(map(str, folders))}: run this again, or {_OWN}")
    return Kernel(images[0], tuple(folders))


def _fetch(packages: Packages, stamp: Path) -> list[str]:
    for flavour in FLAVOURS:
        parts = [name for name in packages.depends(flavour) if _PART.fullmatch(name)]
        if parts:
            names = [packages.get(name).name for name in parts]
            stamp.write_text("\n".join(names))
            return names
    raise LaunchFailed(f"apt knows none of {', '.join(FLAVOURS)}")


def _modinfo(module: bytes, key: str) -> list[str]:
    """The values of `key` in a module's .modinfo section, which is text that ends with NULs."""
    return [m[1].decode("ascii", "replace") for m in re.finditer(rb"\0" + key.encode() + rb"=([^\0]*)", module)]


def _unzstd(path: Path) -> bytes:
    try:
        done = subprocess.run(["zstd", "-dcq", str(path)], capture_output=True, check=False)
    except FileNotFoundError:
        raise LaunchFailed(f"{path} is packed with zstd, and there is no zstd here: install it") from None
    if done.returncode:
        raise LaunchFailed(f"cannot unpack {path}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
