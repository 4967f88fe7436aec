"""The machine `kvm-on-tcg`: a real Linux kernel with kvm_amd, on an AMD CPU that QEMU TCG plays, runs L1."""

from __future__ import annotations

import mmap
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed, MachineLost
from harness.machine import guests, here, initramfs, kernel, l0, pieces, qemu, versions
from harness.machine.l0_kvm import L0Kvm
from harness.machine.l1 import Identity, L1Machine, Layer
from harness.machine.trace import Trace, Unobservable, capability
from harness.model.liberties import Liberties
from harness.model.memory import Memory
from harness.wire.image import PAGE, Image

LIBERTIES: Final = Liberties()
"""KVM's walker of L1's nested table sets A and D only once the whole walk has succeeded (walk_addr_generic() in
arch/x86/kvm/mmu/paging_tmpl.h), while the CPU sets the bits of L2's own tables as it goes: so both are seen."""

_LARGE: Final = 2 << 20
_FRAME: Final = (1 << 55) - 1
"""The bits of an entry of /proc/PID/pagemap that are the frame's number."""

_OVERCOMMIT: Final = 1024
"""Large pages that L0 makes when they are first used, at most: as many as L1's memory could take."""

_BOOT_TIMEOUT: Final = 40.0
_LOOK: Final = 0.5
"""Seconds between two looks at the QEMU in L0 while nothing comes from L1."""


@dataclass(frozen=True)
class Options:
    """What the machine is made of: L0's kernel and its modules (None: the distribution's), parameters of kvm and
    kvm_amd such as `npt=0`, and the size of the pages that back L1's memory: `2m` or `4k`. `audit`: at one in how many
    switches the tables that KVM runs guests with are audited, 0 for never."""

    kernel: Path | None = None
    modules: Path | None = None
    parameters: tuple[str, ...] = ()
    pages: str = "2m"
    audit: int = 0


DEFAULT: Final = Options()


class KvmOnTcgMachine(L1Machine):
    """L1 in QEMU in L0."""

    def __init__(self, image: Image, memory: memoryview, identity: Identity, host: l0.L0) -> None:
        super().__init__(image, memory, identity, LIBERTIES)
        self.l0 = host
        self._next_look = _LOOK

    def boot(self) -> None:
        """Wait until L1 says hello. Raises LaunchFailed if it does not."""
        start = time.monotonic()
        while (hello := self.channel.hello()) is None:
            waited = time.monotonic() - start
            try:
                self._see_whether_it_lives(waited)
            except MachineLost as lost:
                raise LaunchFailed(f"L1 did not come up in L0: {lost}") from None
            if waited > _BOOT_TIMEOUT:
                raise LaunchFailed(f"L1 did not come up in {_BOOT_TIMEOUT:.0f} s: {self.channel.panic()}\n"
                                   f"{self._lost('it hangs')}")
            time.sleep(0.01)
        self.greet(hello)
        self.channel.spare()

    def _see_whether_it_lives(self, waited: float) -> None:
        if (status := self.l0.process.exit_status()) is not None:
            raise self.lost(f"L0 panicked, or QEMU below it ended with status {status}")
        if waited < self._next_look:
            if waited < _LOOK:
                self._next_look = _LOOK
            return
        self._next_look = waited + _LOOK
        if ended := self.l0.run("cat /tmp/qemu.status 2>/dev/null; true").decode().strip():
            raise self.lost(f"the QEMU in L0 ended with status {ended}" if ended != "0" else
                            "the QEMU in L0 ended: L1 reset the machine, by a triple fault perhaps")

    def _lost(self, reason: str) -> MachineLost:
        if self.l0.process.exit_status() is None:
            try:
                words = self.l0.try_run("grep 'run failed' /tmp/qemu.log; "
                                        "dmesg | grep -E 'WARNING|BUG|RIP: 0010' | tail -n 4; "
                                        "tail -n 8 /tmp/qemu.log; dmesg | tail -n 8", 5.0)[1]
                reason = f"{reason}\nin L0:\n" + "\n".join(
                    f"    {line}" for line in words.decode(errors="replace").splitlines()
                )
            except MachineLost:
                pass
        return self.l0.lost(reason)


def prepare(options: Options = DEFAULT, say: Callable[[str], None] = lambda text: None) -> tuple[Path, Path]:
    """L0's kernel and its root, fetched and made if they are not there yet. Raises LaunchFailed, saying what to
    do, and UsageError for options that make no sense."""
    linux = kernel.find(options.kernel, options.modules, say)
    return linux.image, initramfs.build(linux, guests.build_l1(), initramfs.l0_qemu(), options.parameters, say)


@contextmanager
def start(
    binary: str | None = None,
    cpu_model: str = "max",
    extra: Sequence[str] = (),
    options: Options = DEFAULT,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[KvmOnTcgMachine]:
    """Boot L0, and L1 in it; both are gone at the block's end. Raises LaunchFailed, saying what to do."""
    path = versions.find_qemu(binary, say)
    version = qemu.version(path)
    elf = guests.build_l1()
    image = guests.load_image(elf)
    linux, root = prepare(options, say)
    with l0.start(path, cpu_model, linux, root, extra) as host:
        try:
            release, number = kernel_version(host)
            _check_kvm(host, release)
            layers = (Layer("kvm", number), Layer("qemu-tcg", version))
            identity = Identity("kvm-on-tcg", path, version, cpu_model, layers, release, number,
                                tuple(options.parameters), options.pages,
                                microcode=host.process.microcode())
            file, pages = _pages(host, image, guests.loaded(elf), options.pages)
            memory = pieces.view(host.process.memory_fd, image.ram_end, pages)
            trace, identity = _observe(host, identity)
            _start_qemu(host, image, file)
        except MachineLost as lost:
            raise LaunchFailed(f"L0 came up, but L1 could not be started in it: {lost}") from None
        machine = KvmOnTcgMachine(image, memory, identity, host)
        machine.trace = trace
        try:
            machine.boot()
            if options.audit:
                machine.kvm = inside(host, l0.MEMORY)
            yield machine
        finally:
            machine.close()


def kernel_version(host: l0.L0) -> tuple[str, tuple[int, ...]]:
    """L0's release as uname has it, and the version of the upstream kernel that it is made from."""
    text = host.run("uname -r; cat /proc/version_signature 2>/dev/null; uname -v").decode()
    release, _, rest = text.partition("\n")
    return release, here.upstream(release, rest)


def _check_kvm(host: l0.L0, release: str) -> None:
    """Raises LaunchFailed where there is no KVM: known only now if nothing says what is built into the kernel."""
    if host.try_run("test -c /dev/kvm")[0]:
        raise LaunchFailed(f"kernel {release} has no kvm_amd: neither among its modules nor built in; {kernel.REMEDY}\n"
                           f"{host.lost('L0 has no /dev/kvm')}")


class _Files:
    """See harness.machine.trace.Files."""

    def __init__(self, host: l0.L0) -> None:
        self._host = host

    def read(self, path: str) -> bytes:
        status, output, _ = self._host.try_run(f"cat {path}")
        if status:
            raise FileNotFoundError(path)
        return output

    def write(self, path: str, text: str) -> None:
        status, _, errors = self._host.try_run(f"echo '{text}' >{path}")
        if status:
            raise OSError(errors.decode(errors="replace").strip())

    def follow(self, path: str) -> None:
        self._host.run(f"follow {path} /dev/ports/twinwalk.trace0 >/dev/null 2>&1 &")


def _observe(host: l0.L0, identity: Identity) -> tuple[Trace | None, Identity]:
    """Begin to trace KVM, if this kernel can be traced."""
    try:
        return Trace(_Files(host), host.traces[0], host.lost), replace(identity, contexts="observed")
    except Unobservable as reason:
        return None, replace(identity, contexts=f"not observed: {reason}")


def inside(host: l0.L0, memory: int, begin: str = "") -> L0Kvm:
    """L0's KVM, to be audited; L0 has so many bytes of memory. `begin` is a line of shell that starts L1, where it does
    not run yet. Raises LaunchFailed for a kernel whose KVM cannot be read, with the reason."""
    bits = re.search(rb"^address sizes\s*: (\d+) bits physical", host.run("cat /proc/cpuinfo"), re.MULTILINE)
    try:
        can = capability(_Files(host))
        if not can.tdp_usable:
            raise Unobservable("with npt=0 what it builds are shadows of the guests' own tables")
        return L0Kvm(host, Memory.over(memoryview(mmap.mmap(host.process.memory_fd, memory))),
                     int(bits[1]) if bits else 52, can.root_level, begin)
    except Unobservable as reason:
        raise LaunchFailed(f"--audit: this kernel's KVM cannot be audited: {reason}; leave out --audit, or take "
                           "another kernel (--kernel)") from None


def _pages(host: l0.L0, image: Image, loaded: int, size: str) -> tuple[str, list[tuple[int, int]]]:
    """Make the pages that L1 uses present. Returns the file in L0 that backs L1's memory, and for each page of
    4 KiB its address in L1's memory and in L0's. Raises LaunchFailed."""
    mirrors = [(data.start + image.mirror_offset, data.end + image.mirror_offset)
               for data in (image.data, image.low_data)]
    ranges = _rounded([(0, loaded), image.vmcbs, image.low_vmcbs, image.arena, image.low_arena, image.data,
                       image.low_data, *mirrors])
    file = "/dev/hugepages/l1" if size == "2m" else "/dev/shm/l1"
    frames = iter(frames_of(host, file, image.ram_bytes, [(image.offset(a), b - a) for a, b in ranges], size))
    addresses = [at for start, end in ranges for at in range(start, end, PAGE)]
    return file, [(at, next(frames)) for at in addresses]


def frames_of(host: l0.L0, file: str, whole: int, ranges: Sequence[tuple[int, int]], size: str) -> list[int]:
    """Make that file in L0 for L1's memory, of `whole` bytes, and the pages of these ranges in it (where each begins,
    and its bytes) present; `size` is of the pages, for errors. Returns the address in L0's memory of each page of 4
    KiB. Raises LaunchFailed."""
    host.run(f"echo {_OVERCOMMIT} >/proc/sys/vm/nr_overcommit_hugepages; "
             "echo 0 >/proc/sys/vm/compact_unevictable_allowed")
    words = " ".join(f"{start} {length}" for start, length in ranges)
    status, output, errors = host.try_run(f"pages {file} {whole} {words}")
    if status:
        meminfo = host.try_run("grep -E 'MemFree|Huge' /proc/meminfo")[1].decode(errors="replace").rstrip()
        raise LaunchFailed(f"L0 cannot back L1's memory with {size} pages: {errors.decode(errors='replace').strip()}\n"
                           f"{meminfo}\ntry --l1-pages {'4k' if size == '2m' else '2m'}, or another kernel")
    return [(entry & _FRAME) * PAGE for entry in struct.unpack(f"<{len(output) // 8}Q", output)]


def _rounded(used: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """`used` in whole large pages, none twice."""
    out: list[tuple[int, int]] = []
    for start, end in sorted((a // _LARGE * _LARGE, -(-b // _LARGE) * _LARGE) for a, b in used):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _start_qemu(host: l0.L0, image: Image, file: str) -> None:
    """The QEMU in L0 with L1 in it. Neither PIT nor HPET: L1 needs no timer, and their ticks make KVM open
    windows for interrupts while L1 runs with interrupts off."""
    size = image.ram_bytes
    host.run(
        f"{{ qemu -L /firmware -nodefaults -no-user-config -display none -vga none -no-reboot -serial none "
        f"-machine pc,accel=kvm,memory-backend=ram,max-ram-below-4g={image.low_end},pit=off,hpet=off "
        f"-cpu host -m {size >> 20}M "
        f"-object memory-backend-file,id=ram,size={size},share=on,reserve=off,mem-path={file} "
        "-kernel /l1.elf >/tmp/qemu.log 2>&1; echo $? >/tmp/qemu.status; } >/dev/null 2>&1 &"
    )
