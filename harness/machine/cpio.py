"""Writing an initramfs: a cpio archive in the `newc` format (the kernel's buffer-format.rst)."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

_FILE: Final = 0o100000
_FOLDER: Final = 0o040000
_DEVICE: Final = 0o020000


class Archive:
    """An archive in the making; folders come with the first file in them."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen = {"", "."}

    def add(self, path: str, data: bytes, mode: int = 0o755) -> None:
        """A file at `path`, which is relative to the root."""
        self._folders(path)
        self._entry(path, _FILE | mode, data)

    def folder(self, path: str) -> None:
        """An empty folder."""
        self._folders(f"{path}/x")

    def device(self, path: str, major: int, minor: int) -> None:
        """A character device."""
        self._folders(path)
        self._entry(path, _DEVICE | 0o600, b"", major, minor)

    def finish(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _folders(self, path: str) -> None:
        for parent in reversed(PurePosixPath(path).parents):
            if (name := str(parent)) not in self._seen:
                self._seen.add(name)
                self._entry(name, _FOLDER | 0o755, b"")

    def _entry(self, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        encoded = name.encode() + b"\0"
        fields = (len(self._parts) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
