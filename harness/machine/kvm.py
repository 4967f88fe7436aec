"""The machine `kvm`: the KVM of this host, which has an AMD processor with SVM, runs L1; L2 runs on the silicon."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed
from harness.machine import guests, here, qemu, versions
from harness.machine.l1 import Identity, Layer
from harness.machine.local import LocalMachine
from harness.machine.trace import Trace, Unobservable
from harness.model.liberties import Liberties

LIBERTIES: Final = Liberties(speculates=True)
"""KVM's, as on kvm-on-tcg, and those of a processor that runs ahead: it walks L2's own tables for accesses that are
never made (section 5.4.2)."""

DEVICE: Final = "/dev/kvm"
PARAMETERS: Final = "/sys/module/kvm_amd/parameters"
_INSTEAD: Final = "use --machine kvm-on-tcg, which needs no AMD processor"
_BOOT_TIMEOUT: Final = 10.0


class KvmMachine(LocalMachine):
    """L1 in QEMU on this host's KVM."""

    def start(self) -> None:
        """Boot L1. Raises LaunchFailed."""
        self.boot(_BOOT_TIMEOUT * here.SLOWER)
        self.channel.spare()


def why_not() -> tuple[str, str]:
    """What keeps this host from being such a machine, and what mends it; two empty strings if nothing does."""
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    if not re.search(r"^flags\s*:.*\bsvm\b", text, re.MULTILINE):
        return "this processor has no SVM, or its firmware switched it off", _INSTEAD
    if not re.search(r"^flags\s*:.*\bnpt\b", text, re.MULTILINE):
        return "this processor has no nested paging (npt)", _INSTEAD
    try:
        nested = Path(PARAMETERS, "nested").read_text(encoding="ascii").strip()
    except OSError:
        return "kvm_amd is not loaded", "modprobe kvm_amd nested=1"
    if nested not in ("1", "Y"):
        return "kvm_amd does not offer SVM to guests (nested=0)", "modprobe -r kvm_amd; modprobe kvm_amd nested=1"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} is not yours to open", "join the group that owns it (mostly kvm), or run as root"
    return "", ""


@contextmanager
def start(
    binary: str | None = None,
    cpu_model: str = "host",
    extra: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[KvmMachine]:
    """Boot L1; the machine is gone at the block's end. Raises LaunchFailed, saying what to do."""
    reason, remedy = why_not()
    if reason:
        raise LaunchFailed(f"no --machine kvm on this host: {reason}; {remedy}")
    path = versions.find_qemu(binary, say)
    version = qemu.version(path)
    elf = guests.build_l1()
    image = guests.load_image(elf)
    # Neither PIT nor HPET: L1 needs no timer, and their ticks make KVM open windows for interrupts while L1 runs
    # with interrupts off.
    args = ["-machine", f"pc,accel=kvm,memory-backend=ram,max-ram-below-4g={image.low_end},pit=off,hpet=off",
            "-cpu", cpu_model, "-kernel", str(elf), *extra]
    with ExitStack() as stack:
        process = stack.enter_context(qemu.Qemu(path, args, image.ram_bytes))
        release = platform.release()
        kernel = here.kernel_version()
        identity = Identity("kvm", path, version, cpu_model, (Layer("kvm", kernel), here.processor()), release, kernel,
                            microcode=here.microcode())
        trace, contexts = _observe(process, stack)
        machine = KvmMachine(process, image, replace(identity, contexts=contexts), LIBERTIES)
        machine.trace = trace
        stack.callback(machine.close)
        machine.start()
        yield machine


def _observe(process: qemu.Qemu, stack: ExitStack) -> tuple[Trace | None, str]:
    """Begin to trace the only vCPU's thread, if this kernel can be traced by this user; and what to say of it."""
    thread = process.command("query-cpus-fast")[0]["thread-id"]
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(thread, {cpu})  # then one ring has all of its events
    try:
        files = stack.enter_context(here.tracing(thread))
        return Trace(files, files.stream, process.lost, files.place, cpu), "observed"
    except Unobservable as reason:
        return None, f"not observed: {reason}"
