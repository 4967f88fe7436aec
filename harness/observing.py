"""`twinwalk observe`: a foreign hypervisor as L1, held against the model at each VMRUN and each #VMEXIT."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from harness.bundling import our_version
from harness.errors import MachineLost, UsageError
from harness.lockstep import errata as errata_files
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.evidence import Evidence
from harness.lockstep.observe import Observer, Seen
from harness.lockstep.result import Result
from harness.lockstep.signature import signature
from harness.machine import kvm_on_tcg, observed, observed_kvm
from harness.machine.observed import MAX_MEMORY, Foreign, Options
from harness.options import (
    LIBRARY,
    add_kvm_param,
    add_qemu,
    add_results,
    add_volume,
    check_results,
    positive,
    screen,
)
from harness.report import html, jsonfile, stops, table
from harness.report.findings import Finding, findings
from harness.report.headline import headline
from harness.report.styled import BAD, MAX_WIDTH, Line, harmless, line, plain, wrap
from harness.report.summary import identity_of, is_new, summarize
from harness.report.terminal import Screen, Volume
from harness.report.walks import draw
from harness.scenario import files
from harness.target import say
from harness.wire.stop import Stop

LINUX: Final = "linux"
KVM: Final = "kvm-on-tcg"

_CONSOLE: Final = 8
"""Lines of the console that are shown."""
_EXITS: Final = 12
"""Sorts of exits in the table."""
_TOLD: Final = 10.0
"""Seconds between two lines of progress."""


def add(commands: Any) -> None:
    """The command, to argparse's sub-commands."""
    parser = commands.add_parser(
        "observe", help="check a hypervisor of any kind, which runs as L1 on QEMU's own SVM",
        usage="twinwalk observe (linux | --kernel FILE [--initrd FILE] [--append TEXT]) [options] [-- QEMU ARGS]",
        epilog="exit codes as for `run`. An L1 that ends without any VMRUN is a lost machine: 3.",
    )
    parser.add_argument("what", nargs="?", choices=[LINUX], help="the distribution's kernel with its KVM as L1, and "
                        "the same kernel as L2")
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="L1: a multiboot, PVH or Linux image")
    parser.add_argument("--initrd", type=Path, metavar="FILE", help="its initrd, or a multiboot module")
    parser.add_argument("--append", default="", metavar="TEXT", help="its command line")
    parser.add_argument("--machine", choices=["tcg", KVM], default="tcg",
                        help="what runs L1: QEMU's own SVM, or real KVM on an AMD host that QEMU plays (default: tcg)")
    parser.add_argument("--l0-kernel", type=Path, metavar="PATH",
                        help="L0's kernel: a bzImage, a build tree, or a version such as 6.12 (default: the "
                        "distribution's)")
    parser.add_argument("--l0-modules", type=Path, metavar="DIR", help="its modules")
    add_kvm_param(parser)
    add_qemu(parser)
    parser.add_argument("--memory", type=positive, default=1024, metavar="MIB", help="L1's RAM (default: 1024)")
    parser.add_argument("--wait", type=positive, default=120, metavar="SECONDS",
                        help="give up where there is no VMRUN for that long at first (default: 120)")
    parser.add_argument("--seconds", type=positive, metavar="N", help="end after so long, whatever L1 does")
    parser.add_argument("--vmruns", type=positive, metavar="N", help="end after so many VMRUNs")
    parser.add_argument("--strict", action="store_true", help="count known errata as divergences")
    parser.add_argument("--bundles", type=Path, metavar="DIR",
                        help="write a bundle of each finding to DIR, which `explain` shows and judges again")
    add_results(parser, "json", "html")
    add_volume(parser)
    parser.set_defaults(command=_observe)


def split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The command line's own arguments, and those behind --, which are QEMU's."""
    argv = list(argv)
    at = argv.index("--") if argv[:1] == ["observe"] and "--" in argv else len(argv)
    return argv[:at], tuple(argv[at + 1 :])


def _options(options: argparse.Namespace) -> tuple[str, Options]:
    """What to observe, and its name in reports. Raises UsageError."""
    linux, args = options.what == LINUX, options.behind
    if options.memory > MAX_MEMORY:
        raise UsageError(f"--memory {options.memory}: at most {MAX_MEMORY} MiB, which is RAM in one piece")
    if options.machine != KVM and (options.l0_kernel or options.l0_modules or options.kvm_param):
        raise UsageError(f"--l0-kernel, --l0-modules and --kvm-param are for --machine {KVM}")
    common = {"qemu": options.qemu, "cpu": options.cpu, "memory": options.memory, "wait": float(options.wait)}
    if linux:
        if options.kernel or options.initrd or options.append:
            raise UsageError("observe linux brings its own kernel: --kernel, --initrd and --append do not go with it")
        from harness.machine import linux as images

        kernel, initrd, append = images.build(say)
        return LINUX, Options(kernel, initrd, append, args=args, **common)
    if options.kernel is None and not args:
        raise UsageError("say what to observe: `linux`, --kernel FILE, or a disk in arguments for QEMU behind --")
    name = options.kernel.name if options.kernel else "L1"
    return name, Options(options.kernel, options.initrd, options.append, args=args, **common)


def _observe(options: argparse.Namespace) -> int:
    check_results(options)
    errata = errata_files.load(LIBRARY / files.ERRATA_FOLDER)
    name, wanted = _options(options)
    shown = screen(options)
    with _start(wanted, options) as machine:
        result, seen, seconds, interrupted = _watch(name, machine, errata, options, shown)
        identity, ended, console = machine.identity, machine.ended, machine.console()
    summary = summarize(identity, [], [result], errata, seconds, options.strict)
    table.show(summary, shown)
    if shown.volume > Volume.QUIET:
        shown.show(figures(seen, ended, seconds, shown.width))
        shown.show([line(f"console: {harmless(text)}") for text in console.splitlines()[-_CONSOLE:]])
    if options.json:
        jsonfile.write(options.json, summary)
    if options.html:
        rows = tuple((what, f"{count:,}") for what, count in seen.exits.most_common())
        exits = html.Table("Exits", ("exit code", "seen"), rows)
        html.write(options.html, summary, errata, [exits])
    if interrupted is not None:
        raise interrupted
    return 3 if result.lost is not None else int(summary.totals.divergences_new > 0)


def _start(wanted: Options, options: argparse.Namespace) -> AbstractContextManager[Foreign]:
    if options.machine != KVM:
        return observed.start(wanted, say)
    host = kvm_on_tcg.Options(options.l0_kernel, options.l0_modules, tuple(options.kvm_param))
    return observed_kvm.start(wanted, host, say)


def _watch(name: str, machine: Foreign, errata: list[Erratum], options: argparse.Namespace, screen: Screen
           ) -> tuple[Result, Seen, float, KeyboardInterrupt | None]:
    """All stops; what is new is shown at once, the first of its sort. Raises MachineLost where there was no VMRUN."""
    observer = Observer(name, machine.memory, machine.cpu, of_layers(errata, machine.identity.layers),
                        machine.holds)
    seen, result, interrupted = observer.seen, Result(name), None
    begun = told = time.monotonic()
    shown = set()

    def more() -> bool:
        return not (options.vmruns and seen.vmruns >= options.vmruns and not observer.inside) and not (
            options.seconds and time.monotonic() - begun > options.seconds)

    try:
        for stop in machine.stops(observer.plausible, more):
            for one in findings(observer.stop(stop)):
                if one.is_new(options.strict) and signature(one.first) not in shown:
                    shown.add(signature(one.first))
                    screen.show(_told(one, screen))
                    if options.bundles:
                        path = stops.write(options.bundles, _bundle(name, machine, one, observer.evidence()))
                        screen.show([line(f"bundle: {path}"), line("")])
            if screen.volume > Volume.QUIET and time.monotonic() - told > _TOLD:
                told = time.monotonic()
                screen.show([_progress(stop, seen, told - begun, options.strict)])
    except MachineLost as lost:
        if not seen.vmruns:
            raise
        result.lost = lost
    except KeyboardInterrupt as reason:
        interrupted = reason
    result.vmruns, result.table_bytes, result.divergences = seen.vmruns, seen.table_bytes, seen.divergences
    result.visits = seen.visits
    return result, seen, time.monotonic() - begun, interrupted


def _told(one: Finding, screen: Screen) -> list[Line]:
    if screen.volume == Volume.QUIET:
        return wrap(headline(one, None), screen.width, rest="    ", style=BAD)
    return [*draw(one, None, screen.width, screen.height), line("")]


def _bundle(name: str, machine: Foreign, finding: Finding, evidence: Evidence) -> stops.Observed:
    about = stops.About(*finding.signature, name, identity_of(machine.identity) or {}, shlex.join(sys.argv[1:]),
                        our_version())
    return stops.Observed(about, evidence, machine.cpu, plain(draw(finding, None, MAX_WIDTH)) + "\n")


def _progress(stop: Stop, seen: Seen, seconds: float, strict: bool) -> Line:
    new = sum(is_new(one, strict) for one in seen.divergences)
    return line(f"{seen.vmruns:,} VMRUNs, {seen.vmruns * 2 / seconds:,.0f} stops a second, divergences: {new} new, "
                f"{len(seen.divergences) - new} known, {seconds:.0f} s")


def figures(seen: Seen, ended: str, seconds: float, width: int) -> Iterator[Line]:
    """What the table of a run has no place for."""
    count = seen.vmruns + sum(seen.exits.values())
    yield line("")
    yield line(f"{count:,} stops, {count / seconds:,.0f} a second; {seen.refused:,} VMRUNs refused, as they must be; "
               f"{seen.accesses:,} memory accesses of L2 looked at")
    named = [f"{count:,} {name}" for name, count in seen.exits.most_common(_EXITS)]
    rest = sum(seen.exits.values()) - sum(count for _, count in seen.exits.most_common(_EXITS))
    yield from wrap(", ".join([*named, *([f"{rest:,} others"] if rest else [])]), width, "exits: ")
    yield from wrap(", ".join(f"{count:,} of {name}" for name, count in seen.by_signature.most_common(_EXITS)), width,
                    "divergences: ") if seen.by_signature else ()
    notes = [(seen.unpaired, "VMRUNs or #VMEXITs whose other half was not seen"),
             (seen.elsewhere, "walks that lead out of L1's RAM: not judged"),
             (seen.overtaken, "faults while another processor changed tables: not judged")]
    yield from (line(f"{count:,} {what}") for count, what in notes if count)
    if ended:
        yield from wrap(harmless(f"L1 ended: {ended}"), width)
