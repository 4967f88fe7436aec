"""What a Linux L1 and its Linux L2 go through while they are observed: pexpect types at both consoles, paramiko has
L1's commands and files over SSH.

L2's QEMU is a command over SSH, whose channel is its QMP. L2 works for its memory, and under it L1 changes its nested
tables: it merges L2's equal pages and moves others, and takes memory away from L2 by its balloon.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

import paramiko

from harness.machine.inside import Inside, make_key
from harness.machine.line import Line, NoAnswer

_PATIENCE: Final = 600.0
"""Seconds for one thing: a machine that others share, and each stop of which is looked at, is slow."""
_POLL: Final = 1.0
"""Seconds between two questions, each of which is work for L1."""
_MIB: Final = 1 << 20
_MEMORY: Final = 128
_SMALL: Final = 80
"""MiB of L2, and what its balloon leaves it."""
_KVM: Final = "/sys/kernel/debug/kvm"
_COUNTED: Final = ("exits", "pages_4k", "pages_2m")
_QEMU: Final = (
    f"exec qemu -L /firmware -nodefaults -no-user-config -display none -vga none -no-reboot -machine pc,accel=kvm "
    f"-cpu host -m {_MEMORY}M -kernel /l2/vmlinuz -initrd /l2/root -append \"$(cat /l2/line)\" -serial /dev/ttyS1 "
    "-device virtio-balloon-pci -qmp stdio 2>/tmp/l2.log")
_MERGE: Final = ("cd /sys/kernel/mm/ksm && echo 2000 >pages_to_scan && echo 100 >sleep_millisecs && echo 1 >run && "
                 "while [ $(cat full_scans) -lt 2 ]; do sleep 0.2; done; echo 0 >run")
"""KSM, two rounds of it, which it takes: equal pages of L2 become one, which it may only read."""
_MOVE: Final = "echo 1 >/proc/sys/vm/compact_memory"
_FILES: Final = {"l1-dmesg.log": "dmesg", "l2-qemu.log": "cat /tmp/l2.log"}
"""What is fetched at the end, by a command."""


class Life:
    """A thread that ends with the block. `lines` are L1's and L2's consoles, `initrd` is L2's, `port` this host's for
    L1's SSH; `vmruns` says how many were seen so far. `failed` says what went wrong, `figures` what L1's KVM counted of
    L2, `files` what was fetched."""

    def __init__(self, lines: Sequence[Line], initrd: bytes, port: int, vmruns: Callable[[], int]) -> None:
        self.failed = ""
        self.figures: dict[str, int] = {}
        self.files: dict[str, bytes] = {}
        self._l1, self._l2 = lines
        self._initrd, self._port, self._vmruns = initrd, port, vmruns
        self._inside: Inside | None = None
        self._over = False
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over = True
        self._l1.hang_up()
        self._l2.hang_up()
        if self._inside is not None:
            self._inside.close()
        self._thread.join(_PATIENCE)

    def _live(self) -> None:
        try:
            self._everything()
        except NoAnswer as reason:
            if not self._over:
                self.failed = str(reason)
        except BaseException as reason:
            self.failed = f"what drives L1 and L2 is broken: {reason!r}"
            raise

    def _everything(self) -> None:
        l1, key = self._l1, make_key()
        l1.expect("L1# ", _PATIENCE)
        l1.run("stty -echo", _PATIENCE)
        public = f"{key.get_name()} {key.get_base64()}"
        l1.run(f"mkdir -p /root/.ssh && echo {public} >/root/.ssh/authorized_keys", _PATIENCE)
        host_key = l1.run("grep -o '^ssh-ed25519 [^ ]*' /tmp/host_key.pub", _PATIENCE)
        with Inside(self._port, key, host_key, _PATIENCE) as inside:
            self._inside = inside
            inside.put(self._initrd, "/l2/root")
            with inside.start(_QEMU) as channel:
                self._l2.ended = channel.exit_status_ready
                self._work(inside, Monitor(channel))
                channel.status_event.wait(_PATIENCE)
                if channel.exit_status:
                    raise NoAnswer(f"L2's QEMU ended with status {channel.exit_status}: "
                                   f"{inside.get('/tmp/l2.log').decode(errors='replace').strip()}")
            self.files = {name: inside.run(command) for name, command in _FILES.items()}
        l1.type("poweroff -f")

    def _work(self, inside: Inside, monitor: Monitor) -> None:
        """L2 from its first instruction to its last."""
        l2 = self._l2
        l2.expect("L2# ", _PATIENCE)
        l2.run("stty -echo", _PATIENCE)
        l2.run("memory", _PATIENCE)
        if not int(l2.run("awk '/^thp_fault_alloc/ {print $2}' /proc/vmstat", _PATIENCE).split()[-1]):
            raise NoAnswer("L2 has worked for its memory, and its kernel gave it no large page")
        inside.run(_MERGE)
        for size in (_SMALL, _MEMORY):
            monitor.balloon(size)
            l2.run("memory", _PATIENCE)
        inside.run(_MOVE)
        l2.run("dd if=/dev/zero of=/tmp/file bs=64k count=128 && rm /tmp/file", _PATIENCE)
        l2.run("for n in 1 2 3 4 5; do sh -c : & done; wait", _PATIENCE)
        monitor.tell("stop")
        said = inside.run(f"cd {_KVM} && grep . {' '.join(_COUNTED)} /sys/kernel/mm/ksm/pages_sharing").decode()
        self.figures = counted(said, self._vmruns())
        monitor.tell("cont")
        l2.type("reboot -f")


def counted(said: str, seen: int) -> dict[str, int]:
    """Lines of a file's name and the figure in it, by name, with how many VMRUNs were `seen`. Raises NoAnswer if L1's
    KVM has not counted as many exits."""
    lines = (text.rpartition("/")[2].partition(":") for text in said.split())
    found = {name: int(value) for name, _, value in lines} | {"seen": seen}
    if found["exits"] != seen:
        raise NoAnswer(f"L1's KVM has run L2 {found['exits']:,} times, and {seen:,} VMRUNs were seen: the observation "
                       "is not whole")
    return found


class Monitor:
    """QMP of a QEMU whose input and output are a channel."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._file = channel.makefile("rwb")
        self.tell("qmp_capabilities")

    def tell(self, command: str, **arguments: object) -> Any:
        """What it answers. Raises NoAnswer where it refuses, or has ended."""
        try:
            self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            self._file.flush()
            while line := self._file.readline():
                message = json.loads(line)
                if "error" in message:
                    raise NoAnswer(f"L2's QEMU refuses {command}: {message['error'].get('desc')}")
                if "return" in message:
                    return message["return"]
        except (OSError, EOFError, ValueError) as reason:
            raise NoAnswer(f"L2's QEMU does not answer {command}: {str(reason) or 'no answer'}") from None
        raise NoAnswer(f"L2's QEMU has ended, before {command}")

    def balloon(self, size: int) -> None:
        """Until L2 has `size` MiB. Raises NoAnswer if it does not come to that."""
        self.tell("balloon", value=size * _MIB)
        end = time.monotonic() + _PATIENCE
        while self.tell("query-balloon")["actual"] != size * _MIB:
            if time.monotonic() > end:
                raise NoAnswer(f"L2's balloon does not come to {size} MiB")
            time.sleep(_POLL)
