"""A foreign L1 on QEMU's own SVM, stopped at each VMRUN and behind it, each #VMEXIT, through QEMU's gdb stub."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.errors import MachineLost, UsageError
from harness.machine import gdb, qemu, versions, vmruns
from harness.machine.l1 import Identity, Layer
from harness.machine.tcg import check_cpu
from harness.model.registers import EFER, Cpu
from harness.wire.stop import ENTER, EXIT, HOST, Stop

MAX_MEMORY: Final = 3 << 10
"""MiB: up to there the machine `pc` has its RAM in one range from 0 on."""

_ASIDS: Final = 16
_POLL: Final = 0.2
_QUIET_POLLS: Final = 5
"""Polls between two looks through all of memory, while L1 has not enabled SVM."""
_END_TIMEOUT: Final = 5.0
_DRAIN: Final = 2000
_STEPS: Final = 5
_FEATURES: Final = {
    "nx": "nx", "pdpe1gb": "page1g", "smep": "smep", "smap": "smap", "pku": "pku", "la57": "la57", "pcid": "pcid",
    "umip": "umip", "lbrv": "lbrv", "nrip-save": "nrips", "fsgsbase": "fsgsbase", "xsave": "xsave", "fxsr-opt": "ffxsr",
    "tce": "tce", "vnmi": "vnmi", "avic": "avic", "flushbyasid": "flushbyasid",
}
"""Features as harness.wire.layout calls them, by QEMU's names."""


@dataclass(frozen=True)
class Options:
    """What L1 is, and on what it runs; `memory` in MiB. `wait`: seconds until the first VMRUN."""

    kernel: Path | None
    initrd: Path | None = None
    append: str = ""
    qemu: str | None = None
    cpu: str = "max"
    memory: int = 1024
    wait: float = 120.0
    args: tuple[str, ...] = ()


class Foreign:
    """A foreign L1 that has not run yet; `stops` runs it. `ended` says, behind them, how it ended."""

    def __init__(self, process: qemu.Qemu, connection: socket.socket, options: Options) -> None:
        self.memory = memoryview(mmap.mmap(process.memory_fd, options.memory << 20))
        self.ended = ""
        self.processors = len(process.command("query-cpus-fast"))
        self.cpu = _cpu(process)
        version = qemu.version(process.binary)
        self.identity = Identity(
            "tcg", process.binary, version, options.cpu, (Layer("qemu-tcg", version),), maxphyaddr=self.cpu.maxphyaddr,
            asids=self.cpu.asids, features=tuple(sorted(self.cpu.features)))
        self._process = process
        self._options = options
        self._gdb = gdb.Gdb(connection, process.lost)
        self._words = self.memory.cast("Q")
        self._sites = vmruns.in_elf(options.kernel) if options.kernel else set()
        self._inside: dict[int, Stop] = {}
        self._seen = False
        self._halts = 0

    def stops(self, plausible: Callable[[Stop], bool], more: Callable[[], bool] = lambda: True) -> Iterator[Stop]:
        """Every VMRUN and every #VMEXIT, until L1 ends, or there are to be no `more`; memory stands still at each.
        Raises MachineLost for an L1 that ends, or goes on for long, without any VMRUN."""
        begun, polls, sites = time.monotonic(), 0, sorted(self._sites)
        self._gdb.go(insert=sites)
        while more():
            try:
                halt = self._gdb.wait(_POLL)
                if halt is None:
                    if not self._seen and time.monotonic() - begun > self._options.wait:
                        raise self._process.lost(f"no VMRUN in {self._options.wait:.0f} s: is this L1 a hypervisor, "
                                                 "and does it find SVM? (--wait SECONDS waits longer)")
                    polls += 1
                    halt = self._poll(polls)
                if halt is None:
                    continue
            except MachineLost:
                if self._process.exit_status(_END_TIMEOUT) is None:
                    raise
                self.ended = self._how_it_ended()
                break
            if halt.signal != gdb.STOPPED:
                self.ended = self._how_it_ended()
                break
            yield from self._at(halt, plausible)
            self._halts += 1
            if not self._halts % _DRAIN:
                self._process.events()  # each halt makes two: QEMU would keep them all
        if self.ended and not self._seen:
            raise self._process.lost(f"L1 ended without any VMRUN: {self.ended}")

    def console(self) -> str:
        """The end of L1's console."""
        return self._process.log_tail()

    def _at(self, halt: gdb.Halt, plausible: Callable[[Stop], bool]) -> Iterator[Stop]:
        """A vCPU at a breakpoint; all go on behind it."""
        registers = self._gdb.registers(HOST, halt.vcpu)
        rip, alone = registers["rip"], self.processors == 1
        entered = self._inside.get(halt.vcpu)
        if entered is not None and rip == entered.host["rip"] + vmruns.LENGTH and _is_back(entered.host, registers):
            yield Stop(EXIT, halt.vcpu, registers, alone)
            del self._inside[halt.vcpu]
            self._pass(halt.vcpu, rip, entered.host["rip"])
            return
        stop = Stop(ENTER, halt.vcpu, registers, alone)
        # L2 may have addresses of L1's; and L1 that is stopped at its VMRUN again had an exception there
        if rip in self._sites and registers["efer"] & EFER.SVME and plausible(stop) and (
                entered is None or (rip == entered.host["rip"] and _is_back(entered.host, registers))):
            self._seen = True
            yield stop
            self._inside[halt.vcpu] = stop
            self._pass(halt.vcpu, rip, rip + vmruns.LENGTH)
            return
        self._step_over(halt.vcpu, rip)
        self._gdb.go()

    def _pass(self, vcpu: int, here: int, there: int) -> None:
        """On from the breakpoint `here`, with one at `there`. A single vCPU needs no other until then."""
        if self.processors == 1:
            self._gdb.go(remove=[here], insert=[there])
            return
        wanted = self._sites | {one.host["rip"] + vmruns.LENGTH for one in self._inside.values()}
        if there not in self._sites:
            self._gdb.change(insert=[there])
        if here in wanted:
            self._step_over(vcpu, here)
        else:
            self._gdb.change(remove=[here])
        self._gdb.go()

    def _step_over(self, vcpu: int, here: int) -> None:
        """One instruction of a vCPU at a breakpoint. A step may end before it began, where other work came first."""
        self._gdb.change(remove=[here])
        for _ in range(_STEPS):
            self._gdb.step(vcpu)
            if self._gdb.wait(_END_TIMEOUT) is None:
                raise self._process.lost("the gdb stub does not end a single step")
            if self._gdb.registers(("rip",), vcpu)["rip"] != here:
                break
        self._gdb.change(insert=[here])

    def _poll(self, polls: int) -> gdb.Halt | None:
        """Nothing has stopped for a while: look for VMRUNs that were loaded since; and set those breakpoints again that
        a VMRUN which raised an exception has left out. None if the machine goes on running."""
        halt = self._gdb.interrupt()
        if halt.signal != gdb.INTERRUPTED:
            return halt
        fresh: set[int] = set()
        if not self._seen:
            registers = self._gdb.registers(HOST, 1)
            if registers["efer"] & EFER.SVME or polls % _QUIET_POLLS == 0:
                fresh = self._look(registers) - self._sites
        elif self.processors == 1:
            fresh = {one.host["rip"] for one in self._inside.values()}
        self._sites |= fresh
        self._gdb.go(insert=sorted(fresh))
        return None

    def _look(self, registers: dict[str, int]) -> set[int]:
        """Addresses of VMRUNs in memory that L1 can execute, as its tables are now."""
        size = self._options.memory << 20
        return vmruns.to_l1(vmruns.in_memory(self._process.memory_fd, size), self._words, registers["cr0"],
                            registers["cr3"], registers["cr4"], registers["efer"], self.cpu)

    def _how_it_ended(self) -> str:
        status = self._process.exit_status()
        if status:
            return f"QEMU ended with status {status}"
        reasons = {"guest-reset": "it reset the machine, by a triple fault perhaps, or it panicked",
                   "guest-shutdown": "it switched the machine off", "guest-panic": "it panicked"}
        for event in self._process.events() if status is None else ():
            if event.get("event") == "SHUTDOWN":
                reason = str(event.get("data", {}).get("reason", ""))
                return reasons.get(reason, f"QEMU was shut down ({reason})")
        return "QEMU ended" if status is not None else "the machine stands still"


def _is_back(before: dict[str, int], now: dict[str, int]) -> bool:
    """Whether this is the L1 that executed VMRUN, and not an L2 with the same address."""
    return all(before[name] == now[name] for name in ("rax", "cr3"))


def _cpu(process: qemu.Qemu) -> Cpu:
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
    qemu.version(path)
    args = ["-machine", "pc,memory-backend=ram", "-accel", "tcg", "-cpu", options.cpu, "-no-shutdown"]
    for option, file in (("kernel", options.kernel), ("initrd", options.initrd)):
        if file is not None:
            if not (file.is_file() and os.access(file, os.R_OK)):
                raise UsageError(f"--{option} {file}: there is no such file that can be read")
            args += [f"-{option}", str(file)]
    if options.append:
        args += ["-append", options.append]
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        args += ["-chardev", f"socket,id=gdb,fd={theirs.fileno()}", "-gdb", "chardev:gdb", *options.args]
        process = stack.enter_context(qemu.Qemu(path, args, options.memory << 20, (theirs.fileno(),)))
        theirs.close()
        check_cpu(process, options.cpu)
        yield Foreign(process, ours, options)
