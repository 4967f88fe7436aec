"""A foreign L1 under real KVM, on an AMD host that QEMU plays (`kvm-on-tcg`), stopped at its VMRUNs and behind them.

KVM's own guest debugging has no part in it. The plugin sits in the QEMU at the bottom, which translates L1's code as it
does L0's: it stops at the VMRUN instruction that L1 is about to execute, before KVM sees its #VMEXIT, and at the
instruction behind it once KVM has brought L1 back there. While a stop is looked at nothing of L0 goes on.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from harness.errors import LaunchFailed, UsageError
from harness.machine import initramfs, kernel, kvm_on_tcg, l0, pieces, qemu, versions
from harness.machine.l1 import Identity, Layer
from harness.machine.observed import Foreign, Options, check_files, cpu_of, no_plugins, plugin
from harness.wire.image import PAGE

MAX_MEMORY: Final = 1536
"""MiB of L1: with L0's own they are RAM in one range."""

_ASIDS: Final = 8
"""That KVM tells its guests of (svm_set_cpu_caps() and cpuid.c, all versions so far)."""
_FILE: Final = "/dev/hugepages/l1"
_ENDED: Final = "twinwalk: the QEMU in L0 ended with status"


class OnKvm(Foreign):
    """Nothing is asked of L0 once L1 runs: its processor may be waiting. It tells the end on its console."""

    holds = True

    def how_it_ended(self) -> str:
        if (status := self._process.exit_status()) is not None:
            raise self._process.lost(f"L0 panicked, or QEMU below it ended with status {status}")
        match = re.search(rf"{_ENDED} (\d+)", self._process.log_tail())
        if match is None:
            return ""
        if match[1] != "0":
            raise self._process.lost(f"the QEMU in L0 ended with status {match[1]}")
        return "it reset the machine, by a triple fault perhaps, or switched it off"


@contextmanager
def start(options: Options, host: kvm_on_tcg.Options, say: Callable[[str], None] = lambda text: None
          ) -> Iterator[Foreign]:
    """L1 in L0, gone at the block's end. `options.args` are for the QEMU in L0. Raises UsageError for files that cannot
    be read, LaunchFailed for a machine that cannot be started."""
    check_files(options)
    if options.kernel is None:
        raise UsageError("observe --machine kvm-on-tcg needs --kernel: a disk of this host is not to be had in L0")
    if options.memory > MAX_MEMORY:
        raise UsageError(f"--memory {options.memory}: at most {MAX_MEMORY} MiB on kvm-on-tcg")
    path = versions.find_qemu(options.qemu, say)
    version, size = qemu.version(path), options.memory << 20
    linux = kernel.find(host.kernel, host.modules, say)
    more = {"l1.initrd": options.initrd.read_bytes()} if options.initrd is not None else {}
    root = initramfs.build(linux, options.kernel, initramfs.l0_qemu(), host.parameters, say, more)
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(theirs)
        extra = plugin(path, version, theirs.fileno(), ",below=1")
        try:
            machine = stack.enter_context(l0.start(path, options.cpu, linux.image, root, extra, l0.MEMORY + size,
                                                   (theirs.fileno(),)))
        except LaunchFailed as reason:
            raise no_plugins(path, reason) from None
        stack.enter_context(ours)
        theirs.close()
        release, number = kvm_on_tcg.kernel_version(machine)
        layers = Layer("kvm", number), Layer("qemu-tcg", version)
        identity = Identity("kvm-on-tcg", path, version, options.cpu, layers, release, number, tuple(host.parameters),
                            "2m")
        frames = kvm_on_tcg.frames_of(machine, _FILE, size, [(0, size)], "2m")
        memory = pieces.view(machine.process.memory_fd, size, zip(range(0, size, PAGE), frames, strict=True))
        cpu = cpu_of(machine.process)._replace(asids=_ASIDS)
        machine.run(_command(options))
        yield OnKvm(machine.process, ours, memory, cpu, identity, options.wait)


def _command(options: Options) -> str:
    """That starts the QEMU in L0, behind whose end its status is told. Its own console is L0's."""
    files = ["-kernel", "/l1.elf", *(["-initrd", "/l1.initrd"] if options.initrd is not None else [])]
    size = options.memory << 20
    argv = ["qemu", "-L", "/firmware", "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
            "-no-reboot", "-serial", "stdio", "-machine", "pc,accel=kvm,memory-backend=ram", "-cpu", "host",
            "-m", f"{options.memory}M",
            "-object", f"memory-backend-file,id=ram,size={size},share=on,reserve=off,mem-path={_FILE}",
            *files, *(["-append", options.append] if options.append else []), *options.args]
    return f"{{ {shlex.join(argv)} </dev/null; echo {_ENDED} $?; }} >/dev/console 2>&1 &"
