"""A guest's console, at whose other end somebody plays the guest."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from harness.machine.line import Line, NoAnswer


@contextmanager
def played(guest: Callable[[socket.socket], None]) -> Iterator[Line]:
    """A line to L2, which does what `guest` does with its end."""
    with Line("L2") as line:
        end = socket.socket(fileno=os.dup(line.fds[0]))
        line.taken()

        def play() -> None:
            with end:
                guest(end)

        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield line
        finally:
            line.hang_up()
            thread.join(20)
            assert not thread.is_alive()


def answering(text: bytes) -> Callable[[socket.socket], None]:
    """A shell that says that to whatever it is told."""
    def guest(end: socket.socket) -> None:
        end.sendall(b"L2# ")
        while end.recv(1 << 10):
            end.sendall(text)

    return guest


def silent(end: socket.socket) -> None:
    """It waits until we hang up."""
    while end.recv(1 << 10):
        pass


def test_commands() -> None:
    with played(answering(b"echo status=$?\r\nword\r\nstatus=0\r\n")) as line:
        line.expect("L2# ", 20)
        assert line.run("say", 20).splitlines()[1] == "word"
        assert line.run("say", 20)


def test_a_command_that_fails() -> None:
    with played(answering(b"no such thing\r\nstatus=127\r\n")) as line, pytest.raises(
            NoAnswer, match=r"`say` failed in L2 with status 127: .*no such thing"):
        line.run("say", 20)


def test_a_panic() -> None:
    with played(answering(b"[ 1.0] Kernel panic - not syncing: x\r\n")) as line, pytest.raises(
            NoAnswer, match="L2 panicked"):
        line.run("say", 20)


def test_the_panics_line_is_in_the_log() -> None:
    with Line("L1") as line:
        assert line.panic() == ""
        os.write(line.fds[1], b"all is well\r\n[ 1.0] Kernel panic - not syncing: x\r\nend\r\n")
        assert line.panic() == "[ 1.0] Kernel panic - not syncing: x" and line.tail()[-1] == "end"


def test_silence() -> None:
    with played(silent) as line, pytest.raises(NoAnswer, match="L2's console did not say 'word' in 0 s"):
        line.expect("word", 0)


def test_an_end_that_its_console_does_not_show() -> None:
    with played(silent) as line:
        line.ended = lambda: True
        with pytest.raises(NoAnswer, match="L2 has ended"):
            line.expect("word", 60)


def test_the_other_end_goes() -> None:
    with played(lambda end: None) as line, pytest.raises(NoAnswer, match="L2's console was closed"):
        line.expect("word", 60)


def test_hanging_up_wakes_who_waits() -> None:
    with Line("L2") as line:
        threading.Timer(0.3, line.hang_up).start()
        with pytest.raises(NoAnswer, match="was closed"):
            line.expect("word", 60)
        with pytest.raises(NoAnswer):
            line.run("say", 60)
