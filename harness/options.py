"""Options that more than one command has: what is to be tested, how L1 and the checker keep step, where results go."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from harness import places
from harness.errors import UsageError
from harness.machine import kvm_on_tcg
from harness.machine.address import FORM, SCHEME, Address, parse
from harness.report import bundle, output
from harness.report.terminal import Screen, Volume
from harness.target import AUTO, MACHINES, Target, say

LIBRARY: Final = places.folder("scenarios")
RESULTS: Final = {
    "json": "write the results as JSON",
    "html": "write the results as a page, with each walk drawn",
    "junit": "write the results as JUnit XML",
    "markdown": "write the results as Markdown",
}
"""Files that results go to, by their options."""


def add_target(parser: argparse.ArgumentParser) -> None:
    """What is to be tested: see `targeted`."""
    parser.add_argument("--machine", type=machine_name, default=AUTO, metavar="MACHINE",
                        help="where L1 runs: on this AMD host's KVM (kvm), on KVM on an AMD host that QEMU plays "
                             "(kvm-on-tcg), or on QEMU's own SVM (tcg). The default, auto, is the first of them that "
                             "works here; but tcg where only something of QEMU is given. On another host: "
                             f"{FORM}")
    add_qemu(parser)
    parser.add_argument("--qemu-arg", action="append", default=[], metavar="ARG",
                        help="a further argument for QEMU, as --qemu-arg=-d --qemu-arg=int")
    host = parser.add_argument_group("for --machine kvm-on-tcg")
    host.add_argument("--kernel", type=Path, metavar="PATH",
                      help="L0's kernel: a bzImage, a build tree, or a version such as 6.12 (default: the "
                           "distribution's, fetched with apt)")
    host.add_argument("--modules", type=Path, metavar="DIR", help="the folder that its modules lie in")
    add_kvm_param(host)
    host.add_argument("--l1-pages", choices=["2m", "4k"], default="2m",
                      help="the pages that back L1's memory in L0 (default: 2m)")
    host.add_argument("--audit", nargs="?", type=one_in, const=1, default=0, metavar="N",
                      help="justify every entry of the tables that KVM runs L1 and L2 with, at every switch, or at one "
                           "in N; L1 then waits for the checker at every record")


def add_qemu(parser: argparse.ArgumentParser) -> None:
    """Which QEMU, and the CPU that it plays."""
    parser.add_argument("--qemu", metavar="PATH",
                        help="the QEMU to test: a path, or a version such as 10.0 (see `twinwalk fetch`)")
    parser.add_argument("--cpu", default="max", metavar="MODEL", help="QEMU's CPU model (default: max)")


def add_kvm_param(parser: argparse._ActionsContainer) -> None:
    """How the KVM under L1 is loaded."""
    parser.add_argument("--kvm-param", action="append", default=[], metavar="NAME=VALUE",
                        help="a parameter of kvm_amd or kvm, such as npt=0 or kvm.tdp_mmu=0")


def targeted(options: argparse.Namespace) -> Target:
    """The target that `add_target`'s options ask for. Raises UsageError for such as do not go together."""
    host = kvm_on_tcg.Options(options.kernel, options.modules, tuple(options.kvm_param), options.l1_pages,
                              options.audit)
    address, kind = place(options.machine)
    if kind in ("kvm", "tcg") and host != kvm_on_tcg.DEFAULT:
        raise UsageError("--kernel, --modules, --kvm-param, --l1-pages and --audit are for --machine kvm-on-tcg")
    return Target(kind, options.qemu, options.cpu, tuple(options.qemu_arg), host, say, address)


def local(options: argparse.Namespace) -> Target:
    """As `targeted`, for what is done on this host alone. Raises UsageError for another host."""
    target = targeted(options)
    if target.host:
        raise UsageError(f"--machine {target.label}: this is done here only: log in there, and run it there")
    return target


def machine_name(text: str) -> str:
    """The value of --machine, as it is."""
    try:
        place(text)
    except ValueError as reason:
        raise argparse.ArgumentTypeError(str(reason)) from None
    return text


def place(text: str) -> tuple[Address | None, str]:
    """Host and kind of machine, by the value of --machine; another host is one with KVM unless it says otherwise.
    Raises ValueError."""
    address, kind = parse(text) if text.startswith(SCHEME) else (None, text)
    known = MACHINES if address else (AUTO, *MACHINES)
    if address and not kind:
        kind = "kvm"
    if kind not in known:
        raise ValueError(f"there is no machine {kind!r}: it is one of {', '.join(known)}, or {FORM}")
    return address, kind


def add_mode(parser: argparse.ArgumentParser) -> None:
    """How L1 and the checker keep step, and on how many machines: see `is_pipelined`."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--lockstep", dest="pipelined", action="store_false", default=None,
                      help="L1 waits for the checker at every record (the default on tcg)")
    mode.add_argument("--pipelined", action="store_true", default=None,
                      help="the checker follows behind L1: faster (the default on KVM)")
    parser.add_argument("--jobs", type=positive, metavar="N",
                        help="machines at once (default: one for two cores on tcg, 1 on KVM)")


def add_results(parser: argparse.ArgumentParser, *names: str) -> None:
    """Files that results go to, by the names in RESULTS: see `check_results`."""
    for name in names:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=RESULTS[name])


def add_bundles(parser: argparse.ArgumentParser) -> None:
    """A folder for what is new: see `check_results`."""
    parser.add_argument("--bundles", type=Path, metavar="FOLDER",
                        help="shrink what is new, and write a bundle of each finding to FOLDER: see `replay`")


def check_results(options: argparse.Namespace) -> None:
    """Before a run: raises UsageError, saying what to do, where a result could not be written after it."""
    for name in RESULTS:
        if path := getattr(options, name, None):
            output.check_writable(path, f"--{name}")
    if folder := getattr(options, "bundles", None):
        bundle.check_folder(folder, "--bundles")


def add_volume(parser: argparse.ArgumentParser) -> None:
    """How much is said: see `screen`."""
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", dest="volume", action="store_const", const=Volume.QUIET,
                        default=Volume.NORMAL, help="say what is new, a line each, and the verdict")
    volume.add_argument("-v", "--verbose", dest="volume", action="store_const", const=Volume.VERBOSE,
                        help="say all: whole walks, every erratum with its reason")


def screen(options: argparse.Namespace) -> Screen:
    """Where reports go, as loud as `add_volume`'s options ask for."""
    return Screen(volume=options.volume)


def is_pipelined(options: argparse.Namespace, target: Target) -> bool:
    """Whether the checker follows behind L1: as `add_mode`'s options say, or as is best for the `target`. Raises
    UsageError for an audit that L1 would run away from."""
    if target.l0.audit:
        if options.pipelined:
            raise UsageError("--audit is for an L1 that waits for the checker: leave out --pipelined")
        return False
    return target.machine != "tcg" if options.pipelined is None else bool(options.pipelined)


def one_in(text: str) -> int:
    """The value of --audit."""
    try:
        return positive(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number: where a path follows, write --audit=1") from None


def count(text: str) -> int:
    """An option's value: a whole number, 0 included. Raises ValueError."""
    number = int(text.replace("_", ""))
    if number < 0:
        raise ValueError
    return number


def number(text: str) -> int:
    """An option's value: an address or another number of at most 64 bits, 0x... for one in hex. Raises ValueError."""
    value = int(text, 0)
    if not 0 <= value < 1 << 64:
        raise ValueError
    return value


def positive(text: str) -> int:
    """An option's value: a whole number above 0. Raises ValueError."""
    if not (number := count(text)):
        raise ValueError
    return number
