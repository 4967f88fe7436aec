"""Result files: checked before a run, so that no result is lost for want of a place, and written whole."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Final

from harness.errors import TwinwalkError, UsageError

MIN_FREE: Final = 1 << 20
"""Bytes that must be free where a result file goes; less is a full disk."""


def check_writable(path: Path, option: str) -> None:
    """Raises UsageError, saying what to do, if `write` to `path` cannot work; `option` is what named it."""
    target = _target(path)
    if target.is_dir():
        raise UsageError(f"{option} {path}: that is a folder: name a file in it, such as {path / 'twinwalk.out'}")
    if not target.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {target.parent}: create it, or name another file")
    if _special(target):
        if not os.access(target, os.W_OK):
            raise UsageError(f"{option} {path}: it is not writable: name another file")
        return
    if target.exists() and not os.access(target, os.W_OK):
        raise UsageError(f"{option} {path}: it is there, and read-only: remove it, or name another file")
    scratch = _scratch(target)
    try:
        scratch.write_bytes(b"")
        scratch.unlink()
    except OSError as reason:
        raise UsageError(f"{option} {path}: cannot write to {target.parent}: {reason.strerror}: name a file elsewhere, "
                         "or mend that") from None
    free = shutil.disk_usage(target.parent).free
    if free < MIN_FREE:
        raise UsageError(f"{option} {path}: the disk is full ({free} bytes free): make room, or name a file elsewhere")


def write(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to `path`, all of it or nothing: what was there stays until it is replaced.

    Raises TwinwalkError if that fails, which `check_writable` rules out as far as it can be known.
    """
    target = _target(path)
    scratch = target if _special(target) else _scratch(target)
    try:
        with scratch.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            if scratch is not target:
                os.fsync(file.fileno())
        if scratch is not target:
            scratch.replace(target)
    except OSError as reason:
        if scratch is not target:
            scratch.unlink(missing_ok=True)
        raise TwinwalkError(f"the results could not be written to {path}: {reason.strerror}") from None


def _target(path: Path) -> Path:
    """Where a link leads, so that the file is replaced and the link stays; special files as they are."""
    return path if _special(path) else Path(os.path.realpath(path))


def _special(path: Path) -> bool:
    """Whether it is something like /dev/stdout or a pipe, which can be written to but not replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _scratch(target: Path) -> Path:
    """A file beside `target`, on the same file system, for this process alone."""
    return target.with_name(f".{target.name[:200]}.{os.getpid()}.tmp")
