"""`twinwalk observe`: a foreign hypervisor as L1, held against the model at each VMRUN and each #VMEXIT."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness.bundling import our_version
from harness.errors import MachineLost, UsageError
from harness.lockstep import errata as errata_files
from harness.lockstep.audit import Audit
from harness.lockstep.errata import of_layers
from harness.lockstep.observe import Observer, Seen
from harness.lockstep.result import Result
from harness.lockstep.signature import signature
from harness.machine import kvm_on_tcg, observed, observed_kvm
from harness.machine import linux as linux_images
from harness.machine.line import Line
from harness.machine.observed import MAX_MEMORY, Foreign, Options
from harness.options import (
    LIBRARY,
    add_kvm_param,
    add_qemu,
    add_results,
    add_volume,
    check_results,
    one_in,
    positive,
    screen,
)
from harness.report import audits, html, jsonfile, stops, styled, table
from harness.report.bundle import check_folder
from harness.report.findings import Finding, findings
from harness.report.headline import headline
from harness.report.styled import BAD, MAX_WIDTH, harmless, line, plain, wrap
from harness.report.summary import identity_of, is_new, summarize
from harness.report.terminal import Screen, Volume
from harness.report.walks import draw
from harness.scenario import files
from harness.target import say
from harness.wire.stop import Stop

if TYPE_CHECKING:
    from harness.machine.linux_life import Life

LINUX: Final = "linux"
KVM: Final = "kvm-on-tcg"

_WAIT: Final = 120
_LINUX_WAIT: Final = 600
"""Seconds."""
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
    parser.add_argument("--audit", nargs="?", type=one_in, const=1, default=0, metavar="N",
                        help="justify every entry of the tables that L0's KVM runs L1 and L2 with, at every stop, or "
                        "at one in N")
    add_qemu(parser)
    parser.add_argument("--memory", type=positive, default=1024, metavar="MIB", help="L1's RAM (default: 1024)")
    parser.add_argument("--wait", type=positive, metavar="SECONDS",
                        help=f"give up where there is no VMRUN for that long at first (default: {_WAIT}; of `linux` "
                        f"{_LINUX_WAIT})")
    parser.add_argument("--seconds", type=positive, metavar="N", help="end after so long, whatever L1 does")
    parser.add_argument("--vmruns", type=positive, metavar="N", help="end after so many VMRUNs")
    parser.add_argument("--strict", action="store_true", help="count known errata as divergences")
    parser.add_argument("--bundles", type=Path, metavar="DIR",
                        help="write a bundle of each finding to DIR, which `explain` shows and judges again")
    parser.add_argument("--logs", type=Path, metavar="DIR",
                        help="of `linux`: write both consoles to DIR, and L1's log and that of L2's QEMU")
    add_results(parser, "json", "html")
    add_volume(parser)
    parser.set_defaults(command=_observe)


def split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The command line's own arguments, and those behind --, which are QEMU's."""
    argv = list(argv)
    at = argv.index("--") if argv[:1] == ["observe"] and "--" in argv else len(argv)
    return argv[:at], tuple(argv[at + 1 :])


def _options(options: argparse.Namespace, lines: tuple[Line, ...]) -> tuple[str, Options, bytes]:
    """What to observe, its name in reports, and the initrd of its L2, if it is ours. Raises UsageError."""
    linux, args = options.what == LINUX, options.behind
    if options.memory > MAX_MEMORY:
        raise UsageError(f"--memory {options.memory}: at most {MAX_MEMORY} MiB, which is RAM in one piece")
    if options.machine != KVM and (options.l0_kernel or options.l0_modules or options.kvm_param or options.audit):
        raise UsageError(f"--l0-kernel, --l0-modules, --kvm-param and --audit are for --machine {KVM}")
    wait = float(options.wait or (_LINUX_WAIT if linux else _WAIT))
    common = {"qemu": options.qemu, "cpu": options.cpu, "memory": options.memory, "wait": wait}
    if linux:
        if options.kernel or options.initrd or options.append:
            raise UsageError("observe linux brings its own kernel: --kernel, --initrd and --append do not go with it")
        images = linux_images.build(say)
        return LINUX, Options(images.kernel, images.initrd, images.append, args=args, lines=lines, **common), images.l2
    if options.logs:
        raise UsageError("--logs is for observe linux, whose guests are talked to")
    if options.kernel is None and not args:
        raise UsageError("say what to observe: `linux`, --kernel FILE, or a disk in arguments for QEMU behind --")
    name = options.kernel.name if options.kernel else "L1"
    return name, Options(options.kernel, options.initrd, options.append, args=args, **common), b""


def _observe(options: argparse.Namespace) -> int:
    check_results(options)
    if options.logs:
        check_folder(options.logs, "--logs")
    errata = errata_files.load(LIBRARY / files.ERRATA_FOLDER)
    shown = screen(options)
    with ExitStack() as stack:
        lines = tuple(stack.enter_context(Line(who)) for who in ("L1", "L2")) if options.what == LINUX else ()
        name, wanted, initrd = _options(options, lines)
        machine = stack.enter_context(_start(wanted, options))
        audit = None
        if machine.kvm is not None:
            audit = Audit(machine.kvm, machine.memory, machine.cpu, options.audit, machine.lost)
        observer = Observer(name, machine.memory, machine.cpu, of_layers(errata, machine.identity.layers),
                            machine.holds, audit)
        seen, life = observer.seen, None
        if lines:
            from harness.machine.linux_life import Life  # paramiko takes a while to import

            life = stack.enter_context(Life(lines, initrd, machine.ssh_port(), lambda: seen.vmruns))
        stack.callback(_log, options.logs, lines, life)
        result, seconds, interrupted = _watch(observer, machine, life, options, shown)
        identity, ended, console = machine.identity, machine.ended, machine.console()
    summary = summarize(identity, [], [result], errata, seconds, options.strict)
    table.show(summary, shown)
    if shown.volume > Volume.QUIET:
        shown.show(figures(seen, ended, seconds, shown.width, life.figures if life is not None else {}))
        shown.show([line(f"console: {harmless(text)}") for text in console[-_CONSOLE:]])
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
    host = kvm_on_tcg.Options(options.l0_kernel, options.l0_modules, tuple(options.kvm_param),
                              audit=options.audit)
    return observed_kvm.start(wanted, host, say)


def _log(folder: Path | None, lines: Sequence[Line], life: Life | None) -> None:
    """Both consoles, and what was fetched from L1, as files."""
    if folder is None:
        return
    contents = {f"{one.who.lower()}-console.log": one.log() for one in lines} | (life.files if life is not None else {})
    for name, data in contents.items():
        (folder / name).write_bytes(data)


def _watch(observer: Observer, machine: Foreign, life: Life | None, options: argparse.Namespace, screen: Screen
           ) -> tuple[Result, float, KeyboardInterrupt | None]:
    """All stops; what is new is shown at once, the first of its sort. Raises MachineLost where there was no VMRUN."""
    seen, result, interrupted = observer.seen, Result(observer.name), None
    begun = told = time.monotonic()
    shown = set()

    def more() -> bool:
        if life is not None and life.failed:
            raise machine.lost(life.failed)
        return not (options.vmruns and seen.vmruns >= options.vmruns and not observer.inside) and not (
            options.seconds and time.monotonic() - begun > options.seconds)

    try:
        for stop in machine.stops(observer.plausible, more):
            for one in findings(observer.stop(stop)):
                if one.is_new(options.strict) and signature(one.first) not in shown:
                    shown.add(signature(one.first))
                    screen.show(_told(one, screen))
                    if options.bundles:
                        path = _bundle(options.bundles, machine, one, observer)
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
    result.shadow_audits, result.shadow_leaves = seen.shadow_audits, seen.shadow_leaves
    return result, time.monotonic() - begun, interrupted


def _told(one: Finding, screen: Screen) -> list[styled.Line]:
    if screen.volume == Volume.QUIET:
        return wrap(headline(one, None), screen.width, rest="    ", style=BAD)
    return [*draw(one, None, screen.width, screen.height), line("")]


def _bundle(folder: Path, machine: Foreign, finding: Finding, observer: Observer) -> Path:
    """Write it. Raises TwinwalkError."""
    about = stops.About(*finding.signature, observer.name, identity_of(machine.identity) or {},
                        shlex.join(sys.argv[1:]), our_version())
    text = plain(draw(finding, None, MAX_WIDTH)) + "\n"
    if finding.first.check == "C5":
        return audits.write(folder, audits.Audited(about, observer.audited(finding.first), machine.cpu, text))
    return stops.write(folder, stops.Observed(about, observer.evidence(), machine.cpu, text))


def _progress(stop: Stop, seen: Seen, seconds: float, strict: bool) -> styled.Line:
    new = sum(is_new(one, strict) for one in seen.divergences)
    return line(f"{seen.vmruns:,} VMRUNs, {seen.vmruns * 2 / seconds:,.0f} stops a second, divergences: {new} new, "
                f"{len(seen.divergences) - new} known, {seconds:.0f} s")


def figures(seen: Seen, ended: str, seconds: float, width: int, counted: Mapping[str, int]) -> Iterator[styled.Line]:
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
             (seen.overtaken, "faults while another processor changed tables: not judged"),
             (seen.disturbed, "accesses of L2 behind which another processor had run: not judged")]
    yield from (line(f"{count:,} {what}") for count, what in notes if count)
    if counted:
        text = (f"L1's own KVM counts {counted['exits']:,} exits where {counted['seen']:,} VMRUNs were seen; then "
                f"its tables had {counted['pages_4k']:,} pages of 4K and {counted['pages_2m']:,} of 2M, and "
                f"{counted['pages_sharing']:,} pages of L2 were merged into others")
        yield from wrap(text, width)
    if ended:
        yield from wrap(harmless(f"L1 ended: {ended}"), width)
