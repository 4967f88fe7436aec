"""Other releases of the distribution: what packages they have, and how to get them, through a private apt state.

No archive is named here. The mirrors, what is trusted, proxies and the like are the machine's own apt configuration; it
is extended by the names of releases. The system's apt state is neither read nor written, and no root is needed.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from harness.errors import LaunchFailed
from harness.machine.guests import cache_dir
from harness.machine.packages import run

RELEASES: Final = ("bullseye", "bookworm", "trixie", "forky", "sid")
"""Debian's, oldest first. One that the mirror does not have any more, or not yet, is said so."""

_POCKETS: Final = ("", "-security", "-updates", "-backports")
"""Suites that a release may consist of. Few releases have them all."""

_SECURITY: Final = "-security"
_KEYRINGS: Final = Path("/usr/share/keyrings")
_FRESH: Final = 24 * 3600
"""Seconds that lists are good for."""

_ABSENT: Final = re.compile(r"^[EW]: .*?(\S+) Release' does not have a Release file", re.MULTILINE)
_UNSIGNED: Final = re.compile(r"NO_PUBKEY ([0-9A-F]+)|Missing key ([0-9A-F]+)|is not signed")


class Offer(NamedTuple):
    """A package that a suite has: its name, its version and the suite."""

    name: str
    version: str
    suite: str


class Mirrors(NamedTuple):
    """Where the machine's own configuration gets packages from, and where security updates; an empty string where
    it does not say. `keyring` is a file, or empty for what apt trusts anyway."""

    main: str
    security: str
    keyring: str


def mirrors() -> Mirrors:
    """Read from apt. Raises LaunchFailed where there is no apt, or no source of a known release."""
    text = run(["apt-get", "indextargets", "--no-release-info", "--format", "$(REPO_URI) $(RELEASE)",
                "Created-By: Packages"])
    found = {"main": "", "security": ""}
    for line in text.splitlines():
        uri, _, suite = line.partition(" ")
        if suite.partition("-")[0] in (*RELEASES, "stable", "oldstable", "oldoldstable", "testing", "unstable"):
            found["security" if suite.endswith(_SECURITY) else "main"] = uri
    if not found["main"]:
        raise LaunchFailed(f"apt's sources name none of Debian's releases ({', '.join(RELEASES)}): other versions are "
                           "to be had from these only; give the path of a build instead")
    keyring = _KEYRINGS / "debian-archive-keyring.gpg"
    return Mirrors(found["main"], found["security"], str(keyring) if keyring.is_file() else "")


class Release:
    """One of RELEASES with all its suites. `say` is told what takes a while, and what went wrong on the way."""

    def __init__(self, name: str, say: Callable[[str], None] = lambda text: None) -> None:
        self.name = name
        self._say = say
        self._root = cache_dir() / "apt" / name
        lists = self._root / "lists"
        options = {
            "Dir::Etc::sourcelist": self._root / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": self._root, "Dir::State::lists": lists, "Dir::State::status": self._root / "status",
            "Dir::Cache": self._root / "cache", "APT::Sandbox::User": "", "Debug::NoLocking": "1",
        }
        self._options = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self._lists = lists

    def known(self) -> bool:
        """Whether there are lists of it, of whatever age."""
        return any(self._lists.glob("*_Packages*"))

    def update(self) -> None:
        """Fetch its lists, unless they are fresh. Raises LaunchFailed, with the reason, where there are none then."""
        try:
            with self._locked():
                stamp = self._root / "updated"
                if self.known() and stamp.exists() and time.time() - stamp.stat().st_mtime < _FRESH:
                    return
                self._say(f"fetching apt's lists of {self.name}, into {self._root}")
                if self._fetch_lists():
                    stamp.touch()
        except OSError as reason:
            raise LaunchFailed(f"cannot write in {self._root}: {reason.strerror}; set XDG_CACHE_HOME") from None

    def _fetch_lists(self) -> bool:
        where = mirrors()
        signed = f"[signed-by={where.keyring}] " if where.keyring else ""
        lines = []
        for pocket in _POCKETS if self.name != "sid" else _POCKETS[:1]:
            uri = where.security if pocket == _SECURITY else where.main
            if uri:
                lines.append(f"deb {signed}{uri} {self.name}{pocket} main\n")
        (self._root / "sources.list").write_text("".join(lines))
        (self._root / "status").touch()
        for folder in (self._lists / "partial", self._root / "cache" / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        troubles: list[str] = []
        run(["apt-get", *self._options, "-q", "update"], ok=(0, 100), errors=troubles)
        text = "".join(troubles)
        absent = {match[1] for match in _ABSENT.finditer(text)}
        if self.name in absent:
            raise LaunchFailed(f"the mirror has no release {self.name}")
        serious = [line for line in text.splitlines() if line.startswith(("E: ", "W: ", "Err:"))
                   and not any(f" {suite} " in line for suite in absent) and "Some index files" not in line]
        if unsigned := _UNSIGNED.search(text):
            serious.insert(0, f"its signature cannot be verified: key {unsigned[1] or unsigned[2] or 'unknown'} is not "
                              f"in {where.keyring or 'what apt trusts'}; install a newer debian-archive-keyring")
        if serious and not self.known():
            raise LaunchFailed(f"no lists of {self.name} are to be had: " + "\n".join(serious))
        if serious:
            self._say(f"lists of {self.name} are old or incomplete: {serious[0]}")
        return not serious

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def offers(self, names: Sequence[str]) -> list[Offer]:
        """All versions of packages `names` in its suites; nothing of what it does not have."""
        if not names:
            return []
        out = []
        for line in self._cache("madison", *names).splitlines():
            name, version, source = (part.strip() for part in line.split("|"))
            words = source.split()
            if words[-1] == "Packages":
                out.append(Offer(name, version, words[1].partition("/")[0]))
        return out

    def names(self, pattern: str) -> list[str]:
        """Of all packages, those whose name matches a regular expression."""
        found = self._cache("search", "--names-only", pattern)
        return [line.partition(" - ")[0] for line in found.splitlines()]

    def needs(self, offer: Offer) -> list[Offer]:
        """`offer` and all that apt would install with it on an empty system. Raises LaunchFailed."""
        text = run(["apt-get", *self._options, "-s", "-q", "--no-install-recommends", "-t", offer.suite, "install",
                    f"{offer.name}={offer.version}"])
        return [Offer(m[1], m[2], offer.suite) for m in re.finditer(r"^Inst (\S+) \((\S+) ", text, re.MULTILINE)]

    def unpack(self, offers: Sequence[Offer], scratch: Path, target: Path) -> None:
        """Fetch packages into `scratch`, verified by apt, and unpack them all in `target`. Raises LaunchFailed."""
        words = [f"{offer.name}={offer.version}" for offer in offers]
        run(["apt-get", *self._options, "-qq", "download", *words], str(scratch))
        for file in sorted(scratch.glob("*.deb")):
            run(["dpkg-deb", "-x", str(file), str(target)])
            file.unlink()

    def _cache(self, *args: str) -> str:
        return run(["apt-cache", *self._options, *args], ok=(0, 100))
