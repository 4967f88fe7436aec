"""The distribution's own packages: fetched with apt into the cache and unpacked there, never installed.

No archive is named here: what there is, and where, is the machine's own apt configuration. No root is
needed. Where apt has no lists (a bare container), private ones are fetched into the cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed
from harness.machine.guests import cache_dir

_LISTS: Final = Path("/var/lib/apt/lists")
_ONLY_DEPENDS: Final = ("--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces",
                        "--no-enhances")


class Packages:
    """Unpacked packages in the cache, by name and version; `say` is told what takes a while."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._root = cache_dir() / "packages"
        self._say = say
        self._options: list[str] = []
        self._updated = False

    def cached(self, pattern: str) -> list[Path]:
        """Unpacked packages whose name matches `pattern` (a regular expression), newest version last."""
        if not self._root.is_dir():
            return []
        found = [path for path in self._root.iterdir() if re.fullmatch(pattern, path.name.partition("_")[0])]
        return sorted(found, key=lambda path: numbers(path.name))

    def lists_are_newer_than(self, stamp: Path) -> bool:
        """Whether apt has learnt something since `stamp` was written."""
        try:
            return _LISTS.stat().st_mtime > stamp.stat().st_mtime
        except OSError:
            return True

    def depends(self, name: str) -> list[str]:
        """`name` and the packages that it depends on, all the way; empty if apt does not know it."""
        output = self._cache("depends", "--recurse", *_ONLY_DEPENDS, name)
        return [line for line in output.splitlines() if line and line[0] not in " <|"]

    def candidate(self, name: str) -> str:
        """The version that apt would install, empty if it knows none."""
        match = re.search(r"^  Candidate: ([^(\s]\S*)", self._cache("policy", name), re.MULTILINE)
        return match[1] if match else ""

    def get(self, name: str) -> Path:
        """The folder where the candidate of `name` is unpacked. Raises LaunchFailed, saying what to do."""
        version = self.candidate(name)
        if not version:
            raise LaunchFailed(f"apt has no package {name}")
        folder = self._root / f"{name}_{version.replace(':', '%3a')}"
        if folder.is_dir():
            return folder
        self._say(f"fetching {name} {version} with apt, into {self._root}")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._root, prefix=".new-") as scratch:
                run(["apt-get", *self._options, "-qq", "-o", "APT::Sandbox::User=", "download", f"{name}={version}"],
                    scratch)
                unpacked = Path(scratch, "unpacked")
                run(["dpkg-deb", "-x", *map(str, Path(scratch).glob("*.deb")), str(unpacked)], scratch)
                if not folder.is_dir():  # another run may have been quicker
                    unpacked.replace(folder)
        except OSError as reason:
            if folder.is_dir():
                return folder
            raise LaunchFailed(f"cannot unpack {name} in {self._root}: {reason}; set XDG_CACHE_HOME") from None
        return folder

    def _cache(self, *args: str) -> str:
        """What apt-cache says; asked again with lists of our own where the system's know nothing."""
        if shutil.which("apt-cache") is None:
            raise LaunchFailed("there is no apt here")
        output = run(["apt-cache", *self._options, *args], ok=(0, 100))
        if output.strip() or self._updated or any(_LISTS.glob("*Packages*")):
            return output
        self._updated = True
        lists, archives = self._root / ".apt" / "lists", self._root / ".apt" / "cache"
        for folder in (lists / "partial", archives / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        self._options = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}"]
        if not any(lists.glob("*Packages*")):
            self._say("apt has no package lists: fetching them into the cache")
            run(["apt-get", *self._options, "-qq", "-o", "APT::Sandbox::User=", "update"])
        return run(["apt-cache", *self._options, *args], ok=(0, 100))


def run(argv: list[str], folder: str | None = None, ok: tuple[int, ...] = (0,),
        errors: list[str] | None = None) -> str:
    """What a command prints; what it says on stderr goes to `errors`. Raises LaunchFailed where it is not there, or
    ends with a status that is none of `ok`."""
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              env={**os.environ, "LC_ALL": "C"}, check=False)
    except FileNotFoundError:
        raise LaunchFailed(f"there is no {argv[0]} here") from None
    if done.returncode not in ok:
        raise LaunchFailed(f"`{' '.join(argv)}` failed:\n{(done.stderr or done.stdout).strip()}")
    if errors is not None:
        errors.append(done.stderr)
    return done.stdout


def numbers(text: str) -> list[tuple[int, str]]:
    """A key that sorts versions as people do: runs of digits by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
