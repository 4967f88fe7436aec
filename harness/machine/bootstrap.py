"""What begins a run on another host: it is sent there as text, and needs nothing but Python.

It takes an archive from stdin, unpacks it to a private folder, and runs twinwalk from there, in a child. It stays
behind only to remove the folder, however the child ends; a folder that was left all the same, since both were killed,
the next one takes away: its lock is free.
"""

import ctypes
import fcntl
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from contextlib import suppress
from typing import Any, BinaryIO

MAGIC = b"twinwalk-far-1"
PREFIX = "twinwalk-far-"
SPARE = 64 << 20
"""Bytes that a run needs beside what is unpacked, for logs."""


class CannotRun(Exception):
    """Why nothing can be run here."""


def tell(**message: Any) -> None:
    """A line of JSON for who started us."""
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], zipfile.ZipFile]:
    """What to do, and the archive that came behind it. Raises CannotRun if it is not whole."""
    head = json.loads(stream.readline(1 << 16))
    data = stream.read(head["size"])
    if hashlib.sha256(data).hexdigest() != head["sha256"]:
        raise CannotRun("the archive did not arrive whole: try again")
    return head, zipfile.ZipFile(io.BytesIO(data))


def make_folder(needed: int) -> tuple[str, int]:
    """A folder for us alone, and the descriptor that holds its lock. Raises CannotRun."""
    where = tempfile.gettempdir()
    for left in os.scandir(where):
        if left.name.startswith(PREFIX) and left.is_dir(follow_symlinks=False):
            with suppress(OSError):
                if left.stat(follow_symlinks=False).st_uid == os.geteuid():
                    remove_if_left(left.path)
    free = shutil.disk_usage(where).free
    if free < needed:
        raise CannotRun(f"{where} has {free >> 20} MiB of room, and {(needed >> 20) + 1} MiB are needed: make room "
                        "there, or set TMPDIR to a folder that has it")
    folder = tempfile.mkdtemp(prefix=PREFIX)  # mode 700
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def remove_if_left(folder: str) -> None:
    """A folder of ours whose process has ended. Raises OSError where one has it still."""
    lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def unpack(archive: zipfile.ZipFile, folder: str) -> None:
    """All of it, nothing outside of `folder`. Raises CannotRun for a path that leads elsewhere."""
    for member in archive.infolist():
        parts = member.filename.split("/")
        if member.filename.startswith("/") or ".." in parts or "\\" in member.filename:
            raise CannotRun(f"the archive has a path that leads elsewhere: {member.filename!r}")
        archive.extract(member, folder)


def child(folder: str, head: dict[str, Any], parent: int) -> None:
    """The far side itself, which ends with `parent`; its files are below `folder`."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    scratch = os.path.join(folder, "tmp")
    os.mkdir(scratch)
    os.environ.update(head["environment"])
    os.environ.update(TMPDIR=scratch, XDG_CACHE_HOME=os.path.join(folder, head["cache"]))
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    sys.path.insert(0, os.path.join(folder, head["packages"]))
    importlib.import_module(head["module"]).main()


def main() -> int:
    """Run what comes on stdin; the folder is gone behind it. Returns the exit code; where it cannot run (CannotRun)
    it tells why."""
    sys.stdout.buffer.write(b"\n" + MAGIC + b"\n")  # whatever a login script printed ends here
    sys.stdout.buffer.flush()
    folder = ""
    try:
        if not sys.platform.startswith("linux"):
            raise CannotRun(f"it is no Linux but {sys.platform}")
        head, archive = receive(sys.stdin.buffer)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        folder, _ = make_folder(sum(one.file_size for one in archive.infolist()) + SPARE)
        unpack(archive, folder)
        parent = os.getpid()
        if not (process := os.fork()):
            status = 1
            try:
                child(folder, head, parent)
                status = 0
            except SystemExit as left:
                status = left.code if isinstance(left.code, int) else 1
            finally:
                sys.stderr.flush()
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except CannotRun as reason:
        tell(cannot=str(reason))
    except OSError as reason:
        tell(cannot=f"{reason.filename or folder or 'stdout'}: {reason.strerror}: make room there, or set TMPDIR to "
                    "a folder that has it")
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
