"""`twinwalk doctor`: what works here, and for what does not, the reason and what mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import TwinwalkError
from harness.machine import guests, kernel, qemu, versions
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
                  "run `./twinwalk setup`, or set CC")
    try:
        yield Finding("all", "guest image", True, str(guests.build_l1()))
    except TwinwalkError as error:
        yield Finding("all", "guest image", False, str(error), "mend what the compiler says")
    yield from _tcg(target)
    yield from _kvm_on_tcg(target)
    yield _kvm()


def _tcg(target: Target) -> Iterator[Finding]:
    try:
        path = versions.find_qemu(target.qemu, target.say)
        number = ".".join(map(str, qemu.version(path)))
    except TwinwalkError as error:
        yield Finding("tcg", "QEMU", False, str(error), "run `./twinwalk setup`, or give one with --qemu")
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


def _kvm() -> Finding:
    """Whether this host has what a machine on real hardware needs."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    if " svm" not in flags:
        return Finding("kvm", "SVM", False, "this processor has no SVM, or it is off", "none here; use --machine tcg")
    return Finding("kvm", "SVM", True, "present; this version of twinwalk does not use it yet")
