"""A client of QEMU's gdb stub: registers, breakpoints, and running a machine from stop to stop.

The protocol is gdb's remote serial protocol. Whatever arrives while the machine runs stops it, so nothing is sent then
but what is to stop it. Several packets are sent in one go where none of them depends on another's answer.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from harness.errors import MachineLost

STOPPED: Final = 5
"""SIGTRAP: a breakpoint, or a single step."""
INTERRUPTED: Final = 2
"""SIGINT: the client asked for it."""

_ANSWER_TIMEOUT: Final = 30.0
_CHUNK: Final = 0x800
_PACKET: Final = re.compile(rb"\$([^#]*)#[0-9a-fA-F]{2}")
_STOP: Final = re.compile(r"T([0-9a-f]{2})(?:.*?thread:(?:p[0-9a-f]+\.)?([0-9a-f]+);)?.*")
_CORE: Final = "i386-64bit.xml"


class Halt(NamedTuple):
    """The machine stands still: why (a signal's number), and at which vCPU, counted from 1."""

    signal: int
    vcpu: int


class Gdb:
    """The stub at the other end of `connection`. `lost` makes the error for a stub that has gone."""

    def __init__(self, connection: socket.socket, lost: Callable[[str], MachineLost]) -> None:
        self._socket = connection
        self._lost = lost
        self._buffer = b""
        self._owes = False
        description = re.sub(r"<!--.*?-->", "", self._feature(_CORE), flags=re.DOTALL)
        found = re.findall(r'<reg name="(\w+)" bitsize="(\d+)"', description)
        self._numbers = {name: number for number, (name, _) in enumerate(found)}
        self._places: dict[str, tuple[int, int]] = {}
        at = 0
        for name, bits in found:
            self._places[name] = at, at + int(bits) // 8
            at += int(bits) // 8
        self._vcpu = 0

    def registers(self, names: Sequence[str], vcpu: int = 0) -> dict[str, int]:
        """Those registers of a vCPU, by default of the one that stopped. Raises MachineLost."""
        packets = []
        if vcpu != self._vcpu:
            packets.append(f"Hg{vcpu:x}")
            self._vcpu = vcpu
        data = bytes.fromhex(self._ask([*packets, "g"])[-1].replace("x", "0"))
        return {name: int.from_bytes(data[slice(*self._places[name])], "little") for name in names}

    def set_register(self, name: str, value: int) -> None:
        """Raises MachineLost if the stub does not take it."""
        self._order([f"P{self._numbers[name]:x}={value.to_bytes(8, 'little').hex()}"])

    def change(self, remove: Sequence[int] = (), insert: Sequence[int] = ()) -> None:
        """Take breakpoints out, and set others: addresses of instructions, virtual ones. Raises MachineLost."""
        if packets := _breakpoints(remove, insert):
            self._order(packets)

    def go(self, remove: Sequence[int] = (), insert: Sequence[int] = ()) -> None:
        """The same, and then let all vCPUs run; see `wait`."""
        packets = _breakpoints(remove, insert)
        self._send([*packets, "c"])
        for _ in packets:
            self._ok(self._receive(_ANSWER_TIMEOUT))

    def step(self, vcpu: int) -> None:
        """One instruction of that vCPU while the others stand still; see `wait`."""
        self._send([f"vCont;s:{vcpu:x}"])

    def wait(self, timeout: float) -> Halt | None:
        """Until the machine stands still; None if it still runs after `timeout` seconds. Raises MachineLost once the
        stub has gone: QEMU ended."""
        text = self._receive(timeout, patient=True)
        if text is None:
            return None
        if text[0] in "WX":
            raise self._lost("QEMU ended")
        match = _STOP.fullmatch(text)
        if match is None:
            raise self._lost(f"the gdb stub says {text!r} where a stop was due")
        self._vcpu = int(match[2] or "1", 16)
        return Halt(int(match[1], 16), self._vcpu)

    def interrupt(self) -> Halt:
        """Stop a machine that runs; a breakpoint may come first. Raises MachineLost."""
        self._put(b"\x03")
        halt = self.wait(_ANSWER_TIMEOUT)
        if halt is None:
            raise self._lost("the gdb stub does not stop the machine")
        return halt

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
            self._ok(answer)

    def _ok(self, answer: str | None) -> None:
        if answer != "OK":
            raise self._lost(f"the gdb stub refuses an order: {answer!r}")

    def _ask(self, packets: Sequence[str]) -> list[str]:
        self._send(packets)
        answers = []
        for _ in packets:
            answer = self._receive(_ANSWER_TIMEOUT)
            assert answer is not None
            answers.append(answer)
        return answers

    def _send(self, packets: Sequence[str]) -> None:
        data = b"".join(b"$%s#%02x" % (text, sum(text) & 0xFF) for text in (one.encode() for one in packets))
        self._put((b"+" if self._owes else b"") + data)
        self._owes = False

    def _put(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as reason:
            raise self._lost(f"the gdb stub has gone: {reason}") from None

    def _receive(self, timeout: float, patient: bool = False) -> str | None:
        """The next packet; its acknowledgement goes out with what is sent next. None after `timeout` if `patient`."""
        end = time.monotonic() + timeout
        while not (match := _PACKET.search(self._buffer)):
            ready, _, _ = select.select([self._socket], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                if patient:
                    return None
                raise self._lost(f"the gdb stub did not answer within {timeout:.0f} s")
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                raise self._lost("QEMU ended")
            self._buffer += data
        self._buffer = self._buffer[match.end() :]
        self._owes = True
        return match[1].decode(errors="replace")


def _breakpoints(remove: Sequence[int], insert: Sequence[int]) -> list[str]:
    return [f"z1,{at:x},1" for at in remove] + [f"Z1,{at:x},1" for at in insert]
