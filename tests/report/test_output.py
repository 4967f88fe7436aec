"""Result files: refused before a run where they cannot be written, and never half written."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.errors import TwinwalkError, UsageError
from harness.report.output import MIN_FREE, check_writable, write


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        check_writable(path, "--json")
    assert str(caught.value).startswith(f"--json {path}: ")
    return str(caught.value)


def test_good_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new.json", "--json")
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / "old.json", "--json")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("bare.json"), "--json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_no_folder(tmp_path: Path) -> None:
    assert f"there is no folder {tmp_path / 'missing'}" in refused(tmp_path / "missing" / "x.json")


def test_a_folder(tmp_path: Path) -> None:
    assert "that is a folder" in refused(tmp_path)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "there is no folder" in refused(tmp_path / "file" / "x.json")


def test_read_only_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write it all the same
    assert "read-only" in refused(path)


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert f"cannot write to {tmp_path}: Permission denied" in refused(tmp_path / "x.json")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=MIN_FREE - 1))
    assert "the disk is full" in refused(tmp_path / "x.json")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=MIN_FREE))
    check_writable(tmp_path / "x.json", "--json")


def test_write(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old and longer")
    write(path, "new: ü\n")
    assert path.read_bytes() == "new: ü\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_lone_surrogates_do_not_lose_a_result(tmp_path: Path) -> None:
    write(tmp_path / "x", "a\udc80b")
    assert (tmp_path / "x").read_text() == "a\\udc80b"


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TwinwalkError, match="No space left on device"):
        write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "x.json")
    check_writable(link, "--json")
    write(link, "new")
    assert link.is_symlink() and (tmp_path / "real" / "x.json").read_text() == "new"


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    write(tmp_path / "x", "new")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_special_files_are_written_to(tmp_path: Path) -> None:
    """/dev/stdout, a pipe: replaced by a file they would be gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe, "--json")
        write(pipe, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    check_writable(Path("/dev/null"), "--json")
    write(Path("/dev/null"), "text")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_special_files_need_no_room_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may create files in /dev, and its disk is as full as it is."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    check_writable(Path("/dev/null"), "--json")


def test_nothing_else_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that write to one folder do not meet."""
    monkeypatch.setattr(Path, "replace", lambda self, target: None)
    write(tmp_path / "x.json", "new")
    assert [str(os.getpid()) in path.name for path in tmp_path.iterdir()] == [True]
