"""Building the guests: once, again when a source changed, by several processes at a time; what can go wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import LaunchFailed
from harness.machine import guests
from harness.wire import layout
from tests.conftest import ROOT


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the guests' sources, with a cache of its own."""
    copy = tmp_path / "guests"
    shutil.copytree(guests.SOURCES, copy)
    monkeypatch.setattr(guests, "SOURCES", copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return copy


def test_built_once(tree: Path, tmp_path: Path) -> None:
    first = guests.build_l1()
    assert first.parent == tmp_path / "cache" / "twinwalk"
    before = first.stat()
    assert guests.build_l1() == first
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # nothing is left lying about
    assert guests.load_image(first).ram_end > guests.load_image(first).data.end


@pytest.mark.parametrize("name", ["l1/main.c", "l1/l1.ld", "l1/vmrun.S"])
def test_a_changed_source_rebuilds(name: str, tree: Path) -> None:
    first = guests.build_l1()
    path = tree / name
    path.write_text(path.read_text() + "\n/* changed */\n")
    second = guests.build_l1()
    assert second != first and second.exists()


def test_a_changed_layout_rebuilds(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = guests.build_l1()
    monkeypatch.setattr(layout, "PROTOCOL", layout.PROTOCOL + 1)
    assert guests.build_l1() != first


def test_a_source_that_does_not_compile(tree: Path) -> None:
    path = tree / "l1/main.c"
    path.write_text(path.read_text() + "\nint unused(int x) { int y; return 0; }\n")
    with pytest.raises(LaunchFailed, match=r"(?s)does not build.*unused"):
        guests.build_l1()  # a warning is an error


def test_no_c_library(tree: Path) -> None:
    """The message says what is missing, not only what the compiler says."""
    (tree / "observe" / "stops.c").write_text('#error "fatal error: errno.h: No such file or directory"\n')
    with pytest.raises(LaunchFailed, match=r"the C library's headers are missing: .*(setup|libc6-dev)"):
        guests.build_plugin(1)
    (tree / "observe" / "stops.c").write_text("#error other\n")
    with pytest.raises(LaunchFailed, match=r"does not build: (?!the C library)"):
        guests.build_plugin(1)


def test_no_compiler(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchFailed, match=r"no compiler 'no-such-cc'.*setup"):
        guests.build_l1("no-such-cc")
    monkeypatch.setenv("CC", "another-cc")
    with pytest.raises(LaunchFailed, match="another-cc"):
        guests.build_l1()


def test_no_place_for_it(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LaunchFailed, match="XDG_CACHE_HOME"):
        guests.build_l1()


def test_not_l1(tmp_path: Path) -> None:
    source, target = tmp_path / "x.c", tmp_path / "x"
    source.write_text("int main(void) { return 0; }\n")
    flags = ["-ffreestanding", "-nostdlib", "-static", "-no-pie", "-Wl,-e,main"]  # no libc is there
    subprocess.run([os.environ.get("CC", "gcc"), *flags, str(source), "-o", str(target)], check=True)
    with pytest.raises(LaunchFailed, match="is not the probe hypervisor"):
        guests.load_image(target)


def test_built_by_several_at_once(tmp_path: Path) -> None:
    """As pytest's workers do at the start: all get the same file, whole."""
    code = "from harness.machine import guests; p = guests.build_l1(); print(p, guests.load_image(p).ram_end)"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code]
    running = [subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate(timeout=240)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(said) == 1 and len(list((tmp_path / "twinwalk").iterdir())) == 1
