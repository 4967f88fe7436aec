"""A guest's console: a serial line of which QEMU has one end, and pexpect the other. All that it writes is kept."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import pexpect
from pexpect.socket_pexpect import SocketSpawn

PANIC: Final = re.compile(r"Kernel panic - |Panic on CPU \d|^panic: ")
"""Of Linux, of Xen, of the BSDs."""
_PANIC: Final = re.compile(PANIC.pattern.encode(), re.MULTILINE)
_LOOK: Final = 1.0
_REST: Final = 10.0
"""Seconds for the rest of a line."""
_TAIL: Final = 10
_STATUS: Final = r"status=(\d+)\r?\n"


class NoAnswer(Exception):
    """A guest does not do what it is told; the message says what it was."""


class Line:
    """Of the guest `who`: a context manager."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.ended: Callable[[], bool] = lambda: False
        """Whether the guest is known to have ended, where its console stays open all the same."""
        self._ours, self._theirs = socket.socketpair()
        self._log = os.memfd_create(f"twinwalk-{who}", os.MFD_CLOEXEC)
        self._spawn = SocketSpawn(self._ours)  # in bytes: of a socket pexpect 4.9 decodes nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.hang_up()
        self._ours.close()
        self._theirs.close()
        os.close(self._log)

    @property
    def fds(self) -> tuple[int, int]:
        """What QEMU is to be started with, so that it understands `chardev`."""
        return self._theirs.fileno(), self._log

    def chardev(self, name: str) -> list[str]:
        """Arguments for QEMU that give it its end by that name."""
        return ["-chardev", f"socket,id={name},fd={self._theirs.fileno()},logfile=/proc/self/fd/{self._log},"
                            "logappend=on"]

    def taken(self) -> None:
        """QEMU has its end: once it has gone, there is nothing to be read any more."""
        self._theirs.close()

    def hang_up(self) -> None:
        """Who waits for something at our end is told that there is nothing to come."""
        try:
            self._ours.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # QEMU was quicker

    def log(self) -> bytes:
        """All that the guest has written."""
        return os.pread(self._log, os.fstat(self._log).st_size, 0)

    def lines(self) -> list[str]:
        """The same as lines of text."""
        return self.log().decode(errors="replace").splitlines()

    def tail(self) -> list[str]:
        """Its last lines."""
        return self.lines()[-_TAIL:]

    def panic(self) -> str:
        """The line in which its kernel panicked; empty if there is none."""
        return next((text.strip() for text in self.lines() if PANIC.search(text)), "")

    def expect(self, text: str, timeout: float) -> str:
        """Wait until the guest writes what the regular expression `text` matches; returns its first group, if it has
        any. Raises NoAnswer if it panics, ends, or does not in `timeout` seconds."""
        patterns: list[Any] = [re.compile(text.encode()), _PANIC, pexpect.EOF, pexpect.TIMEOUT]
        end, ended = time.monotonic() + timeout, False
        while (got := self._spawn.expect_list(patterns, timeout=_LOOK)) == len(patterns) - 1:
            if ended or time.monotonic() > end:
                raise NoAnswer(f"{self.who} has ended" if ended else
                               f"{self.who}'s console did not say {text!r} in {timeout:.0f} s")
            ended = self.ended()  # once more, for what it said last
        if got:
            if got == 1:
                rest: list[Any] = [re.compile(b"\n"), pexpect.EOF, pexpect.TIMEOUT]
                self._spawn.expect_list(rest, timeout=_REST)  # it says why
            raise NoAnswer(f"{self.who} panicked" if got == 1 else f"{self.who}'s console was closed")
        match = self._spawn.match
        assert isinstance(match, re.Match)
        return bytes(match[1]).decode() if match.re.groups else ""  # type: ignore[arg-type]

    def type(self, text: str) -> None:
        """A line that is typed there. Raises NoAnswer."""
        try:
            self._spawn.sendline(text)
        except OSError as reason:
            raise NoAnswer(f"{self.who}'s console is gone: {reason}") from None

    def run(self, command: str, timeout: float) -> str:
        """What a command prints that is typed at the shell there. Raises NoAnswer if it fails, too."""
        self.type(f"{command}; echo status=$?")
        status = self.expect(_STATUS, timeout)
        said = bytes(self._spawn.before).decode(errors="replace")  # type: ignore[arg-type] # of a socket bytes
        if status != "0":
            raise NoAnswer(f"`{command}` failed in {self.who} with status {status}: {said.strip()[-500:]}")
        return said
