"""Other versions of QEMU and of the kernel, by name: what there is, what was fetched, and fetching one.

A version is named as upstream does, `10.0` or `6.12.95`; a shorter name means the newest that begins so, and the
package's own version works too. What was fetched lies in the cache, and is used without a look at any mirror.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from harness.errors import LaunchFailed, UsageError
from harness.machine import foreign, qemu
from harness.machine.guests import cache_dir
from harness.machine.packages import numbers
from harness.machine.suites import RELEASES, Offer, Release

KINDS: Final = ("qemu", "kernel")

Version = tuple[int, ...]
Say = Callable[[str], None]

_NAME: Final = re.compile(r"\d+(\.\d+)+(\S*)")
_QEMU: Final = "qemu-system-x86"
_PATTERN: Final = r"^linux-image-[0-9]+\.[0-9]+\.[0-9].*-cloud-amd64$"
"""The smallest flavour that has KVM."""
_PARTS: Final = ("linux-image-", "linux-binary-", "linux-modules-")


class Available(NamedTuple):
    """A version that a mirror has, and where."""

    kind: str
    version: Version
    release: Release
    offer: Offer

    @property
    def name(self) -> str:
        """Of its folder in the cache."""
        return _folder_name(self.kind, self.offer.version)


class Fetched(NamedTuple):
    """A version that is in the cache: for QEMU `path` is the program, for a kernel the folder of its tree."""

    kind: str
    version: Version
    path: Path


def is_name(text: str) -> bool:
    """Whether `text` names a version, and no file."""
    return bool(_NAME.fullmatch(text)) and not Path(text).exists()


def dotted(version: Version) -> str:
    """As text: `7.2.22`."""
    return ".".join(map(str, version))


def find_qemu(binary: str | None, say: Say = lambda text: None) -> str:
    """The path of the QEMU to use: that on PATH, a path's, or a version's. Raises LaunchFailed, saying what to do."""
    if binary is not None and is_name(binary):
        return str(resolve("qemu", binary, say).path)
    return qemu.find(binary)


def fetched(kind: str) -> list[Fetched]:
    """Those in the cache, oldest first."""
    out = []
    for folder in _root().glob(f"{kind}-*"):
        try:
            version = _numbers((folder / "version").read_text())
        except OSError:
            continue
        out.append(Fetched(kind, version, folder / foreign.PROGRAM if kind == "qemu" else folder))
    return sorted(out, key=lambda one: (one.version, numbers(one.path.as_posix())))


def available(kind: str, say: Say) -> tuple[list[Available], list[str]]:
    """What the mirror has, oldest first, and why some releases are missing. Lists that are fresh are not fetched."""
    out: dict[str, Available] = {}
    troubles = []
    for name in RELEASES:
        release = Release(name, say)
        try:
            release.update()
        except LaunchFailed as reason:
            troubles.append(f"{name}: {reason}")
            if not release.known():
                continue
        packages = [_QEMU] if kind == "qemu" else _whole(release)
        for offer in release.offers(packages):
            one = Available(kind, _upstream(offer.version), release, offer)
            out.setdefault(one.name, one)
    return sorted(out.values(), key=lambda one: (one.version, numbers(one.offer.version))), troubles


def fetch(kind: str, name: str, say: Say) -> Fetched:
    """The newest version of that name, from the mirror if it is not in the cache. Raises LaunchFailed, saying what
    there is; UsageError for what is no version's name."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no version: write 10.0 or 6.12.95; `twinwalk fetch --list` has them all")
    offers, troubles = available(kind, say)
    fitting = [one for one in offers if _fits(name, one.version, one.offer.version)]
    if not fitting:
        if here := _cached(kind, name):
            return here
        known = sorted({one.version[:2] for one in offers})
        reasons = "".join(f"\n{trouble}" for trouble in troubles)
        raise LaunchFailed(f"no mirror has {kind} {name}; there are {', '.join(map(dotted, known)) or 'none'}{reasons}")
    return _get(fitting[-1], say)


def resolve(kind: str, name: str, say: Say) -> Fetched:
    """As `fetch`, but what is in the cache already will do, and so will the QEMU on PATH."""
    if here := _cached(kind, name):
        return here
    if kind == "qemu":
        try:
            path = qemu.find(None)
            if _fits(name, qemu.version(path), ""):
                return Fetched(kind, qemu.version(path), Path(path))
        except LaunchFailed:
            pass
    return fetch(kind, name, say)


def _cached(kind: str, name: str) -> Fetched | None:
    fitting = [one for one in fetched(kind)
               if _fits(name, one.version, (one.path if kind == "kernel" else one.path.parent).name)]
    return fitting[-1] if fitting else None


def _fits(name: str, version: Version, package: str) -> bool:
    """Whether `name` is that of a version: `package` is the package's, or the folder's name made of it."""
    if package and package in (name, _folder_name("qemu", name), _folder_name("kernel", name)):
        return True
    return bool(re.fullmatch(r"[\d.]+", name)) and version[: len(_numbers(name))] == _numbers(name)


def _get(one: Available, say: Say) -> Fetched:
    folder = _root() / one.name
    path = folder / foreign.PROGRAM if one.kind == "qemu" else folder
    if folder.is_dir():
        return Fetched(one.kind, _numbers((folder / "version").read_text()), path)
    say(f"fetching {one.kind} {dotted(one.version)} ({one.offer.version} of {one.offer.suite}) into {folder}")
    try:
        _root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_root(), prefix=".new-") as scratch:
            unpacked, tree = Path(scratch, "unpacked"), Path(scratch, "tree")
            one.release.unpack(_packages(one), Path(scratch), unpacked)
            if one.kind == "qemu":
                foreign.assemble(unpacked, tree)
                version: Version = qemu.version(str(tree / foreign.PROGRAM))
            else:
                unpacked.replace(tree)
                version = one.version
            (tree / "version").write_text(dotted(version))
            if not folder.is_dir():  # another process may have been quicker
                tree.replace(folder)
    except OSError as reason:
        if not folder.is_dir():
            raise LaunchFailed(f"cannot unpack {one.name} in {_root()}: {reason}; set XDG_CACHE_HOME") from None
    return Fetched(one.kind, _numbers((folder / "version").read_text()), path)


def _whole(release: Release) -> list[str]:
    """Its kernels' packages, but for those of which the mirror has lost a part: the modules, where they are a package
    of their own."""
    parts = set(release.names(_PATTERN.replace("image", "(image|binary|modules)")))
    return [name for name in parts if name.startswith(_PARTS[0]) and (
        name.replace("image", "binary", 1) not in parts or name.replace("image", "modules", 1) in parts)]


def _packages(one: Available) -> Sequence[Offer]:
    if one.kind == "qemu":
        return [need for need in one.release.needs(one.offer)
                if need.name in foreign.NEEDED or foreign.is_library(need.name)]
    release = one.offer.name.removeprefix(_PARTS[0])
    offers = one.release.offers([part + release for part in _PARTS])
    return [offer for offer in offers if (offer.version, offer.suite) == (one.offer.version, one.offer.suite)]


def _upstream(version: str) -> Version:
    """Of a package's version, what is upstream's: 1:10.0.2+ds-2 is 10.0.2."""
    match = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", version)
    return _numbers(match[1]) if match else ()


def _numbers(text: str) -> Version:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _folder_name(kind: str, version: str) -> str:
    return f"{kind}-{version.partition(':')[2] or version}"


def _root() -> Path:
    return cache_dir() / "versions"
