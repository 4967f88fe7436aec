"""A foreign L1 under real KVM, on an AMD host that QEMU plays (`kvm-on-tcg`), stopped at its VMRUNs and behind them.

KVM's own guest debugging has no part in it. The plugin sits in the QEMU at the bottom, which translates L1's code as it
does L0's: it stops at the VMRUN instruction that L1 is about to execute, before KVM sees its #VMEXIT, and at the
instruction behind it once KVM has brought L1 back there. While a stop is looked at nothing of L0 goes on.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed, UsageError
from harness.machine import initramfs, kernel, kvm_on_tcg, l0, pieces, qemu, versions
from harness.machine.l1 import Identity, Layer
from harness.machine.line import Line
from harness.machine.observed import Foreign, Options, check_files, cpu_of, no_plugins, plugin, wired
from harness.wire.image import PAGE
from harness.wire.stop import ACCESS, NOWHERE, Stop

MAX_MEMORY: Final = 1536
"""MiB of L1: with L0's own they are RAM in one range."""

_ASIDS: Final = 8
"""That KVM tells its guests of (svm_set_cpu_caps() and cpuid.c, all versions so far)."""
_FILE: Final = "/dev/hugepages/l1"
_LARGE: Final = 21
"""The shift of its pages."""
_SMP: Final = "-smp"
_DISKS: Final = ("-hda", "-hdb", "-hdc", "-hdd", "-cdrom")
_PORT: Final = "twinwalk.line"
_WIRED: Final = ("for port in /sys/class/virtio-ports/*; do read -r name <$port/name && "
                 "ln -sf /dev/${port##*/} /dev/ports/$name; done; ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up")
"""In L0: what leads to L1's lines, and to its port 22."""
_ENDED: Final = "twinwalk: the QEMU in L0 ended with status"


class OnKvm(Foreign):
    """Nothing is asked of L0 once L1 runs: its processor may be waiting. It tells the end on its console."""

    holds = True
    _frames: Mapping[int, int]

    def lies(self, frames: Sequence[int]) -> None:
        """Where in L0's memory each page of L1's is, which L0 has in large pages: what L2 comes to is told by that."""
        step = (1 << _LARGE) // PAGE
        self._frames = {frame >> _LARGE: number for number, frame in enumerate(frames[::step])}

    def how_it_ended(self) -> str:
        """How the QEMU in L0 ended, in words; empty while it runs. Raises MachineLost if L0 itself is gone."""
        if (status := self._process.exit_status()) is not None:
            raise self._process.lost(f"L0 panicked, or QEMU below it ended with status {status}")
        match = re.search(rf"{_ENDED} (\d+)", self._process.log_tail())
        if match is None:
            return ""
        if match[1] != "0":
            raise self.lost(f"the QEMU in L0 ended with status {match[1]}")
        return "it reset the machine, by a triple fault perhaps, or switched it off"

    def _at(self, stop: Stop, plausible: Callable[[Stop], bool]) -> Iterator[Stop]:
        if stop.kind == ACCESS:
            frame = self._frames.get(stop.spa >> _LARGE)
            inside = stop.spa & (1 << _LARGE) - 1
            stop = stop._replace(spa=NOWHERE if frame is None else frame << _LARGE | inside)
        yield from super()._at(stop, plausible)


@contextmanager
def start(options: Options, host: kvm_on_tcg.Options, say: Callable[[str], None] = lambda text: None
          ) -> Iterator[Foreign]:
    """L1 in L0, gone at the block's end. `options.args` are for the QEMU in L0. Raises UsageError for files that cannot
    be read, LaunchFailed for a machine that cannot be started."""
    check_files(options)
    if host.audit and _SMP in options.args:
        raise UsageError("--audit is for an L1 with one processor: leave out -smp")
    inside, outside = disks(options.args)
    if options.kernel is None and not outside:
        raise UsageError("observe --machine kvm-on-tcg needs --kernel, or a disk of this host behind --: -hda FILE, "
                         "-cdrom FILE, or -drive file=FILE")
    if options.memory > MAX_MEMORY:
        raise UsageError(f"--memory {options.memory}: at most {MAX_MEMORY} MiB on kvm-on-tcg")
    path = versions.find_qemu(options.qemu, say)
    version, size = qemu.version(path), options.memory << 20
    linux = kernel.find(host.kernel, host.modules, say)
    more = {"l1.initrd": options.initrd.read_bytes()} if options.initrd is not None else {}
    modules = [*initramfs.MODULES, *(["virtio_net"] if options.lines else []), *(["virtio_blk"] if outside else [])]
    root = initramfs.build(linux, options.kernel, initramfs.l0_qemu(), host.parameters, say, more, modules)
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(theirs)
        extra = [*plugin(path, version, theirs.fileno(), ",below=1"), *wired(options.lines, _port), *outside]
        fds = (theirs.fileno(), *(fd for one in options.lines for fd in one.fds))
        try:
            machine = stack.enter_context(l0.start(path, options.cpu, linux.image, root, extra, l0.MEMORY + size,
                                                   fds))
        except LaunchFailed as reason:
            raise no_plugins(path, reason) from None
        stack.enter_context(ours)
        theirs.close()
        for one in options.lines:
            one.taken()
        release, number = kvm_on_tcg.kernel_version(machine)
        layers = Layer("kvm", number), Layer("qemu-tcg", version)
        identity = Identity("kvm-on-tcg", path, version, options.cpu, layers, release, number, tuple(host.parameters),
                            "2m")
        frames = kvm_on_tcg.frames_of(machine, _FILE, size, [(0, size)], "2m")
        memory = pieces.view(machine.process.memory_fd, size, zip(range(0, size, PAGE), frames, strict=True))
        cpu = cpu_of(machine.process)._replace(asids=_ASIDS)
        if options.lines:
            machine.run(_WIRED)
        foreign = OnKvm(machine.process, ours, memory, cpu, identity, options.wait, options.lines)
        foreign.alone = _SMP not in options.args
        foreign.lies(frames)
        command = _command(options, inside)
        if host.audit:
            try:
                foreign.kvm = kvm_on_tcg.inside(machine, l0.MEMORY + size, command)
            except LaunchFailed:
                foreign.how_it_ended()  # that is why, then
                raise
        else:
            machine.run(command)
        yield foreign


def disks(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments for the QEMU in L0, with disks of L0's in place of files of this host; and those for the QEMU below it
    that give L0 these disks, on which nothing is ever written. Raises UsageError."""
    inside, outside = list[str](), list[str]()
    for before, text in zip(("", *args), args, strict=False):
        alone = before in _DISKS
        parts = [f"file={text}"] if alone else text.split(",") if before == "-drive" else []
        path = next((part.removeprefix("file=") for part in parts if part.startswith("file=")), None)
        if path is None:
            inside.append(text)
            continue
        if not Path(path).is_file():
            raise UsageError(f"{before} {text}: there is no {path}")
        there = f"/dev/vd{chr(ord('a') + len(outside) // 2)}"
        form = [part for part in parts if part.startswith("format=")]
        rest = [part for part in parts if not part.startswith(("file=", "format="))]
        inside.append(there if alone else ",".join([f"file={there}", "format=raw", *rest]))
        outside += ["-drive", ",".join(["if=virtio", "snapshot=on", f"file={path}", *form])]
    return inside, outside


def _command(options: Options, args: Sequence[str]) -> str:
    """That starts the QEMU in L0, behind whose end its status is told. L1's console is L0's where it has no lines."""
    files = ["-kernel", "/l1.elf"] if options.kernel is not None else []
    files += ["-initrd", "/l1.initrd"] if options.initrd is not None else []
    size = options.memory << 20
    argv = ["qemu", "-L", "/firmware", "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
            "-no-reboot", *(_serial(options.lines) or ["-serial", "stdio"]),
            "-machine", "pc,accel=kvm,memory-backend=ram", "-cpu", "host", "-m", f"{options.memory}M",
            "-object", f"memory-backend-file,id=ram,size={size},share=on,reserve=off,mem-path={_FILE}",
            *files, *(["-append", options.append] if options.append else []), *args]
    return f"{{ {shlex.join(argv)} </dev/null; echo {_ENDED} $?; }} >/dev/console 2>&1 &"


def _port(number: int) -> list[str]:
    """Arguments that lead a line to a port of L0."""
    return ["-device", f"virtserialport,chardev=line{number},name={_PORT}{number}"]


def _serial(lines: Sequence[Line]) -> list[str]:
    """Arguments for the QEMU in L0, which lead on to L1."""
    args = []
    for number in range(len(lines)):
        name = f"line{number}"
        args += ["-chardev", f"serial,id={name},path=/dev/ports/{_PORT}{number}", "-serial", f"chardev:{name}"]
    network = ["-netdev", "user,id=net,restrict=on,hostfwd=tcp::22-:22",
               "-device", "virtio-net-pci,netdev=net,romfile="]
    return [*args, *network] if lines else []
