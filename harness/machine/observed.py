"""A foreign L1 on QEMU's own SVM, stopped at each VMRUN and behind it, each #VMEXIT, by a plugin in QEMU's TCG."""

from __future__ import annotations

import mmap
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed, MachineLost, UsageError
from harness.machine import guests, qemu, versions
from harness.machine.l0_kvm import L0Kvm
from harness.machine.l1 import Identity, Layer
from harness.machine.line import PANIC, Line
from harness.machine.tcg import check_cpu
from harness.model.registers import CR0, EFER, Cpu
from harness.wire.layout import ANSWERS, STOP
from harness.wire.stop import ENTER, Stop, decode

MAX_MEMORY: Final = 3 << 10
"""MiB: up to there the machine `pc` has its RAM in one range from 0 on."""

_ASIDS: Final = 16
_POLL: Final = 0.2
_END_TIMEOUT: Final = 5.0
_OLDEST: Final = (6, 0)
"""Of QEMU: the first whose plugins take their arguments as ours does."""
_APIS: Final = {(11, 1): 7, (9, 0): 2, _OLDEST: 1}
"""The version of the interface for plugins that a QEMU takes from there on. From 9.0 on they may read registers."""
_FEATURES: Final = {
    "nx": "nx", "pdpe1gb": "page1g", "smep": "smep", "smap": "smap", "pku": "pku", "la57": "la57", "pcid": "pcid",
    "umip": "umip", "lbrv": "lbrv", "nrip-save": "nrips", "fsgsbase": "fsgsbase", "xsave": "xsave", "fxsr-opt": "ffxsr",
    "tce": "tce", "vnmi": "vnmi", "avic": "avic", "flushbyasid": "flushbyasid",
}
"""Features as harness.wire.layout calls them, by QEMU's names."""


@dataclass(frozen=True)
class Options:
    """What L1 is, and on what it runs; `memory` in MiB. `wait`: seconds until the first VMRUN. `lines` are of its
    serial ports from the first on; with them its port 22 is forwarded."""

    kernel: Path | None
    initrd: Path | None = None
    append: str = ""
    qemu: str | None = None
    cpu: str = "max"
    memory: int = 1024
    wait: float = 120.0
    args: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()


class Foreign:
    """A foreign L1 that has not run yet; `stops` runs it. `ended` says, behind them, how it ended."""

    holds = False
    """Whether this machine may hold translations over VMRUN and #VMEXIT."""

    def __init__(self, process: qemu.Qemu, channel: socket.socket, memory: memoryview, cpu: Cpu, identity: Identity,
                 wait: float, lines: Sequence[Line] = ()) -> None:
        self.memory, self.cpu = memory, cpu
        self.identity = replace(identity, maxphyaddr=cpu.maxphyaddr, asids=cpu.asids,
                                features=tuple(sorted(cpu.features)))
        self.ended = ""
        self.kvm: L0Kvm | None = None
        """The KVM under L1 as it lies in memory, where that is to be audited."""
        self.alone = len(process.command("query-cpus-fast")) == 1
        """Whether L1 has one processor."""
        self._process = process
        self._channel = channel
        self._wait = wait
        self._lines = lines
        self._entered = 0

    def stops(self, plausible: Callable[[Stop], bool], more: Callable[[], bool] = lambda: True) -> Iterator[Stop]:
        """Every VMRUN and #VMEXIT, L2's first memory access between them, and every INVLPGA, until L1 ends, or there
        are to be no `more`; all vCPUs stand still at each. Raises MachineLost for an L1 that ends, or goes on for
        long, without any VMRUN, and for a kernel that panicked."""
        begun = time.monotonic()
        self._process.command("cont")
        while more():
            data = self._receive()
            if data is None:
                if ended := self.how_it_ended():
                    self.ended = ended
                    break
                if not self._entered and time.monotonic() - begun > self._wait:
                    raise self.lost(f"no VMRUN in {self._wait:.0f} s: is this L1 a hypervisor, and does it find SVM? "
                                    "(--wait SECONDS waits longer)")
                continue
            yield from self._at(decode(data, self.alone), plausible)
        if self._panic() or (self.ended and not self._entered):
            raise self.lost(f"L1 ended without any VMRUN: {self.ended}")

    def console(self) -> list[str]:
        """The end of L1's console, and of L2's, if that is to be had."""
        if not self._lines:
            return self._process.log_tail().splitlines()
        return [f"{one.who}: {text}" for one in self._lines for text in one.tail()]

    def lost(self, reason: str) -> MachineLost:
        """The error that this machine was lost; a panic is told first."""
        lost = self._process.lost(self._panic() or reason)
        lost.log = "\n".join([*lost.log.splitlines(), *(self.console() if self._lines else [])])
        return lost

    def ssh_port(self) -> int:
        """The port of this host that leads to L1's SSH."""
        text = str(self._process.command("human-monitor-command", **{"command-line": "info usernet"}))
        match = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)", text)
        if match is None:
            raise self._process.lost(f"QEMU forwards no port: {text.strip()}")
        return int(match[1])

    def _panic(self) -> str:
        """Who panicked, in words, by the consoles; empty if nobody did."""
        for one in self._lines:
            if said := one.panic():
                return f"{one.who} panicked: {said}"
        said = next(iter(self._process.log_lines(PANIC)), "").strip()
        return f"L1 panicked: {said}" if said and not self._lines else ""

    def _receive(self) -> bytes | None:
        """The next stop; None if there is none for a while. Raises MachineLost."""
        ready, _, _ = select.select([self._channel], [], [], _POLL)
        if not ready:
            return None
        data = b""
        with suppress(ConnectionError):
            while len(data) < STOP.size and (part := self._channel.recv(STOP.size - len(data))):
                data += part
        if len(data) < STOP.size:
            if self._process.exit_status(_END_TIMEOUT) is not None:
                return None
            raise self._process.lost("QEMU's plugin has given up: there are more VMRUN instructions than it can "
                                     "remember, or a register that it does not find in this QEMU: try another --qemu")
        return data

    def _at(self, stop: Stop, plausible: Callable[[Stop], bool]) -> Iterator[Stop]:
        """A vCPU that waits until it has its answer."""
        answer = ANSWERS["GO"]
        if stop.kind != ENTER:
            yield stop
        elif _may_run(stop.host) and plausible(stop):
            self._entered += 1
            yield stop
            answer = ANSWERS["ENTERED"]
        with suppress(ConnectionError):  # QEMU may have gone meanwhile: the next look tells
            self._channel.sendall(bytes([answer]))

    def how_it_ended(self) -> str:
        """Why the machine goes on no more; empty while it does. Raises MachineLost for a QEMU that died."""
        status = self._process.exit_status()
        if status:
            raise self._process.lost(f"QEMU ended with status {status}")
        reasons = {"guest-reset": "it reset the machine, by a triple fault perhaps",
                   "guest-shutdown": "it switched the machine off", "guest-panic": "it panicked"}
        for event in self._process.events() if status is None else ():
            if event.get("event") == "SHUTDOWN":
                reason = str(event.get("data", {}).get("reason", ""))
                return reasons.get(reason, f"QEMU was shut down ({reason})")
        return "QEMU ended" if status is not None else ""


def cpu_of(process: qemu.Qemu) -> Cpu:
    """What CPUID says of the CPU, as QEMU knows it."""
    path = process.command("query-cpus-fast")[0]["qom-path"]
    there = {one["name"] for one in process.command("qom-list", path=path)}
    def value(name: str) -> object:
        return process.command("qom-get", path=path, property=name)

    names = {ours for theirs, ours in _FEATURES.items() if theirs in there and value(theirs)}
    return Cpu(int(str(value("phys-bits"))), "page1g" in names, _ASIDS, frozenset(names | {"lmsle"}))


@contextmanager
def start(options: Options, say: Callable[[str], None] = lambda text: None) -> Iterator[Foreign]:
    """L1 in memory, stopped before its first instruction; gone at the block's end. Raises UsageError for files that
    cannot be read, LaunchFailed for a machine that cannot be started."""
    path = versions.find_qemu(options.qemu, say)
    version = qemu.version(path)
    # one thread for all vCPUs: all wait while one does
    args = ["-machine", "pc,memory-backend=ram", "-accel", "tcg,thread=single", "-cpu", options.cpu, "-no-shutdown"]
    check_files(options)
    for option, file in (("kernel", options.kernel), ("initrd", options.initrd)):
        if file is not None:
            args += [f"-{option}", str(file)]
    if options.append:
        args += ["-append", options.append]
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(theirs)
        args += [*plugin(path, version, theirs.fileno()), *wired(options.lines, _serial), *options.args]
        fds = (theirs.fileno(), *(fd for one in options.lines for fd in one.fds))
        serial = "chardev:line0" if options.lines else "stdio"
        try:
            process = stack.enter_context(qemu.Qemu(path, args, options.memory << 20, fds, serial))
        except LaunchFailed as reason:
            raise no_plugins(path, reason) from None
        for one in options.lines:
            one.taken()
        stack.enter_context(ours)  # closed before QEMU is ended: a vCPU may wait for an answer
        theirs.close()
        check_cpu(process, options.cpu)
        identity = Identity("tcg", path, version, options.cpu, (Layer("qemu-tcg", version),))
        memory = memoryview(mmap.mmap(process.memory_fd, options.memory << 20))
        yield Foreign(process, ours, memory, cpu_of(process), identity, options.wait, options.lines)


def wired(lines: Sequence[Line], device: Callable[[int], list[str]]) -> list[str]:
    """Arguments for QEMU: the chardev of each line, `line0` and so on, and the `device` that it leads to; and a network
    of which port 22 has one of this host's."""
    args = []
    for number, one in enumerate(lines):
        args += [*one.chardev(f"line{number}"), *device(number)]
    network = ["-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
               "-device", "virtio-net-pci,netdev=net,romfile="]
    return [*args, *network] if lines else []


def _serial(number: int) -> list[str]:
    """L1's first port is QEMU's own business."""
    return ["-serial", f"chardev:line{number}"] if number else []


def _may_run(host: dict[str, int]) -> bool:
    """Whether VMRUN raises no exception in this state (15.5.1)."""
    return bool(host["efer"] & EFER.SVME and host["cr0"] & CR0.PE and not host["cs"] & 3)


def check_files(options: Options) -> None:
    """Raises UsageError for files that cannot be read."""
    for option, file in (("kernel", options.kernel), ("initrd", options.initrd)):
        if file is not None and not (file.is_file() and os.access(file, os.R_OK)):
            raise UsageError(f"--{option} {file}: there is no such file that can be read")


def plugin(path: str, version: tuple[int, int, int], channel: int, more: str = "") -> list[str]:
    """The arguments for QEMU at `path` that load our plugin; `channel` is the descriptor it talks over. Raises
    LaunchFailed where it cannot be built, or this QEMU is too old."""
    if version < _OLDEST:
        raise LaunchFailed(f"{path} is QEMU {version[0]}.{version[1]}: observing needs 6.0 or later, with plugins")
    api = next(api for first, api in _APIS.items() if version >= first)
    built = str(guests.build_plugin(api)).replace(",", ",,")
    return ["-plugin", f"{built},fd={channel}{more}"]


def no_plugins(path: str, reason: LaunchFailed) -> LaunchFailed:
    """`reason`, with what to do about it where it is the plugin that this QEMU did not take."""
    text = str(reason)
    if "-plugin" not in text.partition("it was started as")[0] and "plugin" not in text.partition("\n")[0]:
        return reason
    return LaunchFailed(f"{text}\n{path} takes no TCG plugins, or lets them read no registers: build it with "
                        "--enable-plugins (before 9.0 with --enable-modules too), or use --qemu 10.0")
