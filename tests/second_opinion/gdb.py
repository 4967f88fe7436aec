"""A client of QEMU's gdb stub, which sets registers of a machine that stands still (gdb's remote serial protocol)."""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from harness.errors import MachineLost

_ANSWER_TIMEOUT: Final = 30.0
_CHUNK: Final = 0x800
_PACKET: Final = re.compile(rb"\$([^#]*)#[0-9a-fA-F]{2}")
_CORE: Final = "i386-64bit.xml"


class Gdb:
    """The stub at the other end of `connection`. `lost` makes the error for a stub that has gone."""

    def __init__(self, connection: socket.socket, lost: Callable[[str], MachineLost]) -> None:
        self._socket = connection
        self._lost = lost
        self._buffer = b""
        self._owes = False
        description = re.sub(r"<!--.*?-->", "", self._feature(_CORE), flags=re.DOTALL)
        self._numbers = {name: number for number, name in enumerate(re.findall(r'<reg name="(\w+)"', description))}

    def set_register(self, name: str, value: int) -> None:
        """Raises MachineLost if the stub does not take it."""
        self._order([f"P{self._numbers[name]:x}={value.to_bytes(8, 'little').hex()}"])

    def _feature(self, name: str) -> str:
        """A file of the stub's target description; registers are numbered in the order they stand in it."""
        text, more = "", True
        while more:
            answer = self._ask([f"qXfer:features:read:{name}:{len(text):x},{_CHUNK:x}"])[0]
            if not answer or answer[0] not in "ml":
                raise self._lost(f"the gdb stub does not describe its registers: {answer!r}")
            more, text = answer[0] == "m", text + answer[1:]
        return text

    def _order(self, packets: Sequence[str]) -> None:
        for answer in self._ask(packets):
            if answer != "OK":
                raise self._lost(f"the gdb stub refuses an order: {answer!r}")

    def _ask(self, packets: Sequence[str]) -> list[str]:
        self._send(packets)
        return [self._receive(_ANSWER_TIMEOUT) for _ in packets]

    def _send(self, packets: Sequence[str]) -> None:
        data = b"".join(b"$%s#%02x" % (text, sum(text) & 0xFF) for text in (one.encode() for one in packets))
        self._put((b"+" if self._owes else b"") + data)
        self._owes = False

    def _put(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as reason:
            raise self._lost(f"the gdb stub has gone: {reason}") from None

    def _receive(self, timeout: float) -> str:
        """The next packet; its acknowledgement goes out with what is sent next."""
        end = time.monotonic() + timeout
        while not (match := _PACKET.search(self._buffer)):
            ready, _, _ = select.select([self._socket], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise self._lost(f"the gdb stub did not answer within {timeout:.0f} s")
            if not (data := self._socket.recv(1 << 16)):
                raise self._lost("QEMU ended")
            self._buffer += data
        self._buffer = self._buffer[match.end() :]
        self._owes = True
        return match[1].decode(errors="replace")
