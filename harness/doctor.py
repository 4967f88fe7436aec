"""`twinwalk doctor`: what works here, and for what does not, the reason and what mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness import places
from harness.errors import TwinwalkError
from harness.machine import guests, kernel, kvm, qemu, versions
from harness.target import Target


@dataclass(frozen=True)
class Finding:
    """One check. `remedy` says what to do where `ok` is false; `machine` is what needs it."""

    machine: str
    what: str
    ok: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{'ok' if self.ok else 'NO':3} {self.machine:10} {self.what:22} {self.detail}"
        return text if self.ok else f"{text}\n{'':15}-> {self.remedy}"


def examine(target: Target) -> Iterator[Finding]:
    """Every check, in the order in which one builds on the other."""
    python = sys.version_info >= (3, 11)
    yield Finding("all", "Python", python, platform.python_version(), "install Python 3.11 or later")
    cores = len(os.sched_getaffinity(0))
    yield Finding("all", "processors", cores >= 2, str(cores), "runs, but slowly: the guest and the checker share one")
    compiler = os.environ.get("CC") or "gcc"
    yield Finding("all", "C compiler", shutil.which(compiler) is not None, shutil.which(compiler) or f"no {compiler}",
                  f"{places.remedy('gcc binutils')}, or set CC")
    try:
        yield Finding("all", "guest image", True, str(guests.build_l1()))
    except TwinwalkError as error:
        yield Finding("all", "guest image", False, str(error), "mend what the compiler says")
    yield from _tcg(target)
    yield from _kvm_on_tcg(target)
    yield from _kvm(target)


def _tcg(target: Target) -> Iterator[Finding]:
    try:
        path = versions.find_qemu(target.qemu, target.say)
        number = ".".join(map(str, qemu.version(path)))
    except TwinwalkError as error:
        yield Finding("tcg", "QEMU", False, str(error), f"{places.remedy('qemu-system-x86')}, or give one with --qemu")
        return
    yield Finding("tcg", "QEMU", True, f"{number} at {path}")
    try:
        with replace(target, machine="tcg").start() as machine:
            who = machine.identity
            detail = f"CPU {who.cpu_model}: {who.maxphyaddr} physical bits, {who.asids} ASIDs, {' '.join(who.features)}"
        yield Finding("tcg", "L1 boots", True, detail)
    except TwinwalkError as error:
        yield Finding("tcg", "L1 boots", False, str(error).splitlines()[0], "see the message; try --cpu max")


def _kvm_on_tcg(target: Target) -> Iterator[Finding]:
    name = "kvm-on-tcg"
    try:
        linux = kernel.find(target.l0.kernel, target.l0.modules, target.say)
        yield Finding(name, "kernel for L0", True, f"{linux.release} at {linux.image}")
        with replace(target, machine=name).start() as machine:
            who = machine.identity
        version = ".".join(map(str, who.kernel_version))
        yield Finding(name, "L1 boots", True, f"on KVM of Linux {version}; MMU contexts {who.contexts}")
    except TwinwalkError as error:
        first, *rest = str(error).splitlines()
        yield Finding(name, "L1 boots", False, first, rest[-1] if rest else "give a kernel with --kernel and --modules")


def _kvm(target: Target) -> Iterator[Finding]:
    """What a machine on real hardware needs of this host."""
    reason, remedy = kvm.why_not()
    yield Finding("kvm", "AMD host", not reason, reason or f"SVM, NPT, nested=1; {kvm.DEVICE} can be opened", remedy)
    if reason:
        return
    try:
        with replace(target, machine="kvm").start() as machine:
            who = machine.identity
    except TwinwalkError as error:
        first, *rest = str(error).splitlines()
        yield Finding("kvm", "L1 boots", False, first, rest[-1] if rest else "see the message")
        return
    version = ".".join(map(str, who.kernel_version))
    yield Finding("kvm", "L1 boots", True, f"on KVM of Linux {version}: SVM features {who.svm_features:#x}, "
                  f"{who.asids} ASIDs, {' '.join(who.features)}")
    yield Finding("kvm", "MMU contexts", who.contexts == "observed", who.contexts,
                  "run as root, on a kernel with kprobes and BTF; all else is checked without")
