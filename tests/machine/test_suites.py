"""Other releases' packages: from a mirror in a folder, signed with a key of the test's own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import fetching
from harness.cli import main
from harness.errors import LaunchFailed
from harness.machine import suites, versions

NEEDED = ("apt-get", "dpkg-deb", "gpg")
pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in NEEDED), reason=f"there is no {' or no '.join(NEEDED)} here")

KERNEL = "linux-image-9.9.1-cloud-amd64"


class Mirror:
    """A folder with a release `sid` in it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        self.home = Path(tempfile.mkdtemp(prefix="twinwalk-"))  # short: a socket's path must be
        self.key = root / "key.gpg"
        self._gpg("--batch", "--passphrase", "", "--quick-gen-key", "twinwalk test", "ed25519", "sign", "never")
        self.key.write_bytes(self._gpg("--export"))
        self.debs = root / "mirror" / "pool"
        self.debs.mkdir(parents=True)

    def close(self) -> None:
        subprocess.run(["gpgconf", "--kill", "all"], env={**os.environ, "GNUPGHOME": str(self.home)}, check=False)
        shutil.rmtree(self.home, ignore_errors=True)

    def _gpg(self, *args: str) -> bytes:
        env = {**os.environ, "GNUPGHOME": str(self.home)}
        return subprocess.run(["gpg", "-q", *args], env=env, capture_output=True, check=True).stdout

    def package(self, name: str, version: str, content: str) -> None:
        tree = self.root / "tree"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: a test <test@example.org>\n"
            "Description: a kernel of the test\n")
        (tree / "boot").mkdir()
        (tree / "boot" / f"vmlinuz-{version}").write_text(content)
        file = self.debs / f"{name}_{version}_amd64.deb"
        subprocess.run(["dpkg-deb", "-b", str(tree), str(file)], capture_output=True, check=True)
        shutil.rmtree(tree)

    def publish(self, signed: bool = True) -> None:
        dist = self.root / "mirror" / "dists" / "sid"
        shutil.rmtree(dist, ignore_errors=True)
        (dist / "main" / "binary-amd64").mkdir(parents=True)
        entries = []
        for file in sorted(self.debs.iterdir()):
            control = subprocess.run(["dpkg-deb", "-f", str(file)], capture_output=True, text=True, check=True).stdout
            data = file.read_bytes()
            entries.append(f"{control}Filename: pool/{file.name}\nSize: {len(data)}\n"
                           f"SHA256: {hashlib.sha256(data).hexdigest()}\n")
        packages = "\n".join(entries).encode()
        (dist / "main" / "binary-amd64" / "Packages").write_bytes(packages)
        release = (f"Origin: test\nSuite: unstable\nCodename: sid\nComponents: main\nArchitectures: amd64\n"
                   f"Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {hashlib.sha256(packages).hexdigest()} "
                   f"{len(packages)} main/binary-amd64/Packages\n")
        (dist / "Release").write_text(release)
        if signed:
            self._gpg("--clearsign", "-o", str(dist / "InRelease"), str(dist / "Release"))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Mirror(tmp_path)
    where = suites.Mirrors(f"file:{tmp_path}/mirror", "", str(made.key))
    monkeypatch.setattr(suites, "mirrors", lambda: where)
    monkeypatch.setattr(versions, "RELEASES", ("sid", "forky"))
    yield made
    made.close()


def test_a_version_is_found_and_fetched_once(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    mirror.package(KERNEL, "9.9.1-1", "old")
    mirror.package(KERNEL, "9.9.1-2", "new")
    mirror.publish()
    assert main(["fetch", "kernel", "9.9"]) == 0
    assert "kernel 9.9.1 is in " in capsys.readouterr().out
    found = versions.resolve("kernel", "9.9", print)
    assert (found.path / "boot" / "vmlinuz-9.9.1-2").read_text() == "new" and found.version == (9, 9, 1)
    lines = [" ".join(line.split()) for line in fetching.listing(["kernel"])]
    assert lines == [
        f"kernel 9.9.1 sid {KERNEL} 9.9.1-1",
        f"kernel 9.9.1 fetched sid {KERNEL} 9.9.1-2",
        "not to be had: forky: the mirror has no release forky",
    ]


def test_a_kernel_without_its_modules_is_none(mirror: Mirror) -> None:
    """Mirrors drop the modules of an older version before its image."""
    for name in (KERNEL, KERNEL.replace("image", "binary")):
        mirror.package(name, "9.9.1-1", "image")
    mirror.publish()
    with pytest.raises(LaunchFailed, match=r"no mirror has kernel 9\.9; there are none"):
        versions.fetch("kernel", "9.9", print)
    mirror.package(KERNEL.replace("image", "modules"), "9.9.1-1", "modules")
    mirror.publish()
    stamp = mirror.root / "cache" / "twinwalk" / "apt" / "sid" / "updated"
    os.utime(stamp, (0, 0))
    assert versions.fetch("kernel", "9.9", print).version == (9, 9, 1)


def test_without_the_mirror_what_was_fetched_works(mirror: Mirror) -> None:
    mirror.package(KERNEL, "9.9.1-1", "image")
    mirror.publish()
    versions.fetch("kernel", "9.9.1", print)
    shutil.rmtree(mirror.root / "mirror")
    stamp = mirror.root / "cache" / "twinwalk" / "apt" / "sid" / "updated"
    os.utime(stamp, (0, 0))
    said: list[str] = []
    assert versions.resolve("kernel", "9.9", said.append).version == (9, 9, 1) and said == []
    assert versions.fetch("kernel", "9.9", said.append).version == (9, 9, 1)
    assert any("lists of sid are old" in text for text in said)


def test_what_is_not_signed_by_a_key_that_is_trusted_is_refused(mirror: Mirror) -> None:
    mirror.package(KERNEL, "9.9.1-1", "image")
    mirror.publish()
    other = Mirror(mirror.root / "other")
    mirror.key.write_bytes(other.key.read_bytes())
    other.close()
    with pytest.raises(LaunchFailed, match=r"signature cannot be verified: key [0-9A-F]+ is not in .*key\.gpg"):
        suites.Release("sid").update()
    assert suites.Release("sid").offers([KERNEL]) == []


def test_what_is_not_signed_is_refused(mirror: Mirror) -> None:
    mirror.package(KERNEL, "9.9.1-1", "image")
    mirror.publish(signed=False)
    with pytest.raises(LaunchFailed, match="signature cannot be verified"):
        suites.Release("sid").update()


def test_a_package_that_was_changed_is_refused(mirror: Mirror) -> None:
    mirror.package(KERNEL, "9.9.1-1", "image")
    mirror.publish()
    file = next(mirror.debs.iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(LaunchFailed, match="apt-get"):
        versions.fetch("kernel", "9.9.1", print)
    assert versions.fetched("kernel") == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["fetch"], "say what to fetch"), (["fetch", "qemu"], "say what to fetch"),
     (["fetch", "qemu", "newest"], "'newest' is no version"),
     (["fetch", "qemu", "10.0", "--list"], "takes no versions")],
)
def test_wrong_use(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert problem in capsys.readouterr().err


def test_the_mirror_is_that_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lists, as in a bare container, apt knows it all the same."""
    sources = tmp_path / "sources.list"
    sources.write_text("deb http://mirror.invalid/debian bookworm main\n"
                       "deb http://mirror.invalid/other bookworm-security main\ndeb http://else.invalid x main\n")
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::Etc::sourcelist "{sources}"; Dir::Etc::sourceparts "/dev/null"; '
                      f'Dir::State::lists "{tmp_path}";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    found = suites.mirrors()
    assert found[:2] == ("http://mirror.invalid/debian/", "http://mirror.invalid/other/")
    sources.write_text("deb http://else.invalid x main\n")
    with pytest.raises(LaunchFailed, match="name none of Debian's releases"):
        suites.mirrors()
