"""Other versions by name: what a name fits, what the cache has, and QEMU in a tree of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.errors import LaunchFailed, UsageError
from harness.machine import foreign, initramfs, qemu, versions


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "twinwalk" / "versions"


def no_mirror(kind: str, say: versions.Say) -> tuple[list[versions.Available], list[str]]:
    raise AssertionError("what is in the cache needs no mirror")


def put(cache: Path, folder: str, version: str) -> Path:
    """A tree in the cache, as good as one of a QEMU or of a kernel to whoever only looks for it."""
    tree = cache / folder
    tree.mkdir(parents=True)
    (tree / "version").write_text(version)
    (tree / foreign.PROGRAM).write_text("")
    return tree


@pytest.mark.parametrize(
    ("text", "named"),
    [("10.0", True), ("6.12.95", True), ("10.0.2+ds-2", True), ("1.", False), ("10", False), ("./10.0", False),
     ("qemu-10.0", False), ("/usr/bin/qemu", False), ("", False)],
)
def test_what_is_a_name(text: str, named: bool) -> None:
    assert versions.is_name(text) == named


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("6.12").touch()
    assert not versions.is_name("6.12")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("10.0", "qemu-10.0.13+ds-0"), ("10.0.2", "qemu-10.0.2+ds-2"), ("10", "qemu-10.0.13+ds-0"),
     ("10.0.2+ds-2", "qemu-10.0.2+ds-2"), ("1:10.0.2+ds-2", "qemu-10.0.2+ds-2"), ("5.2", "qemu-5.2+dfsg-11")],
)
def test_the_newest_that_fits(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str) -> None:
    monkeypatch.setattr(versions, "available", no_mirror)
    put(cache, "qemu-10.0.13+ds-0", "10.0.13")
    put(cache, "qemu-10.0.2+ds-2", "10.0.2")
    put(cache, "qemu-5.2+dfsg-11", "5.2.0")
    found = versions.resolve("qemu", name, print)
    assert found.path == cache / folder / foreign.PROGRAM
    assert [one.version for one in versions.fetched("qemu")] == [(5, 2, 0), (10, 0, 2), (10, 0, 13)]


def test_the_qemu_on_path_will_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "available", no_mirror)
    path = qemu.find(None)
    number = versions.dotted(qemu.version(path))
    assert versions.find_qemu(number) == path == versions.find_qemu(None)


def test_what_nobody_has_is_told_with_what_there_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "available", lambda kind, say: ([], ["bullseye: the mirror has no release bullseye"]))
    with pytest.raises(LaunchFailed, match=r"no mirror has kernel 4\.19; there are none\nbullseye: the mirror has no"):
        versions.resolve("kernel", "4.19", print)
    with pytest.raises(UsageError, match="'newest' is no version"):
        versions.fetch("kernel", "newest", print)


def test_a_tree_without_a_version_is_none(cache: Path) -> None:
    (cache / "qemu-9.9").mkdir(parents=True)
    assert versions.fetched("qemu") == [] and versions.fetched("kernel") == []


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's QEMU as its packages have it: links for its program and its libraries, where they would be."""
    folder = tmp_path_factory.mktemp("unpacked")
    binary = Path(qemu.find(None))
    program = folder / "usr" / "bin" / foreign.PROGRAM
    program.parent.mkdir(parents=True)
    program.symlink_to(binary)
    modules = list(Path("/usr/lib").rglob("accel-tcg-x86_64.so"))
    libraries = folder / "usr" / "lib" / "any"
    libraries.mkdir(parents=True)
    for module in modules:
        (libraries / module.name).symlink_to(module)
    for one in (binary, *modules):
        listed = subprocess.run(["ldd", str(one)], capture_output=True, text=True, check=True).stdout
        for path in map(Path, re.findall(r"(?:=> |^\s*)(/\S+)", listed, re.MULTILINE)):
            if not (libraries / path.name).exists():
                (libraries / path.name).symlink_to(path)
    firmware = folder / "usr" / "share" / "qemu"
    firmware.mkdir(parents=True)
    for name, path in initramfs.qemu_files(str(binary)).items():
        if name.startswith("firmware/"):
            (firmware / path.name).symlink_to(path)
    return folder


class TestTree:
    def test_it_runs_with_what_it_brings(self, unpacked: Path, tmp_path: Path) -> None:
        foreign.assemble(unpacked, tmp_path / "tree")
        program = tmp_path / "tree" / foreign.PROGRAM
        (tmp_path / "link").symlink_to(program)
        for path in (program, tmp_path / "link"):
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            assert "QEMU emulator version" in done.stdout
        assert qemu.version(str(program)) == qemu.version(qemu.find(None))

    def test_l0_has_it_where_its_loader_looks(self, unpacked: Path, tmp_path: Path) -> None:
        foreign.assemble(unpacked, tmp_path / "tree")
        files = initramfs.qemu_files(str(tmp_path / "tree" / foreign.PROGRAM))
        assert "bin/qemu" in files and "firmware/bios-256k.bin" in files
        assert any(name.startswith("lib64/ld-linux") for name in files)
        assert any(name.startswith("lib/x86_64-linux-gnu/libglib-2.0.so") for name in files)
        assert all(path.is_file() for path in files.values())

    def test_a_library_that_no_package_has(self, unpacked: Path, tmp_path: Path) -> None:
        copy = tmp_path / "unpacked"
        shutil.copytree(unpacked, copy, symlinks=True)
        for path in (copy / "usr" / "lib" / "any").glob("libglib-2.0*"):
            path.unlink()
        with pytest.raises(LaunchFailed, match=r"needs libglib-2\.0\.so\.0, which none of the packages has"):
            foreign.assemble(copy, tmp_path / "tree")

    def test_any_other_qemu_is_none(self) -> None:
        assert foreign.files(qemu.find(None)) is None
