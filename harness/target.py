"""What is to be tested: the machine, the binaries and the options it is made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final

from harness.errors import LaunchFailed
from harness.machine import kvm, kvm_on_tcg, tcg
from harness.machine.address import SCHEME, Address
from harness.machine.l1 import L1Machine


def say(text: str) -> None:
    """Tell the user what takes a while."""
    print(f"twinwalk: {text}", file=sys.stderr, flush=True)


MACHINES: Final = ("kvm", "kvm-on-tcg", "tcg")
AUTO: Final = "auto"


@dataclass(frozen=True)
class Target:
    """What is to be tested: the machine, and the binaries and options it is made of. `say` is told what takes
    a while."""

    machine: str = "tcg"
    qemu: str | None = None
    cpu: str = "max"
    qemu_args: tuple[str, ...] = ()
    l0: kvm_on_tcg.Options = kvm_on_tcg.DEFAULT
    say: Callable[[str], None] = lambda text: None
    host: Address | None = None
    """Where it is; None is here."""

    @property
    def label(self) -> str:
        """As --machine has it."""
        return f"{SCHEME}{self.host}/{self.machine}" if self.host else self.machine

    def chosen(self) -> Target:
        """With `auto` made one of MACHINES: what is given of L0 means KVM, else what is given of QEMU means QEMU.
        Where nothing is given, it is KVM: this host's, or one on an emulated AMD host, unless there is no kernel for
        it; `say` is told why then."""
        if self.machine != AUTO:
            return self
        if self.l0 != kvm_on_tcg.DEFAULT:
            return replace(self, machine="kvm-on-tcg")
        if (self.qemu, self.cpu, self.qemu_args) != (Target.qemu, Target.cpu, Target.qemu_args):
            return replace(self, machine="tcg")
        if not kvm.why_not()[0]:
            return replace(self, machine="kvm")
        try:
            kvm_on_tcg.prepare(say=self.say)
        except LaunchFailed as reason:
            self.say(f"no KVM is tested, only QEMU (--machine tcg): {reason}")
            return replace(self, machine="tcg")
        return replace(self, machine="kvm-on-tcg")

    def start(self) -> AbstractContextManager[L1Machine]:
        """Boot it; raises LaunchFailed, saying what to do."""
        if self.machine == "kvm-on-tcg":
            return kvm_on_tcg.start(self.qemu, self.cpu, self.qemu_args, self.l0, self.say)
        if self.machine == "kvm":
            return kvm.start(self.qemu, "host" if self.cpu == Target.cpu else self.cpu, self.qemu_args, self.say)
        return tcg.start(self.qemu, self.cpu, self.qemu_args, self.say)

    def arguments(self) -> list[str]:
        """The command line's options that make this target."""
        options: list[tuple[str, object]] = [("--machine", self.label), ("--cpu", self.cpu), ("--qemu", self.qemu)]
        options += [("--qemu-arg", arg) for arg in self.qemu_args]
        if self.machine == "kvm-on-tcg":
            options += [("--kernel", self.l0.kernel), ("--modules", self.l0.modules), ("--l1-pages", self.l0.pages)]
            options += [("--kvm-param", parameter) for parameter in self.l0.parameters]
            options += [("--audit", self.l0.audit or None)]
        return [f"{option}={value}" for option, value in options if value is not None]
