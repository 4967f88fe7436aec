"""`twinwalk replay`: a bundle's scenario on this machine or another: is the finding still there?"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from harness.bundling import Seen, Setup, our_version, watch
from harness.errors import LaunchFailed, UsageError
from harness.lockstep import errata
from harness.lockstep.signature import LOST
from harness.lockstep.twin import Twin
from harness.machine import guests, kvm, kvm_on_tcg, tcg
from harness.model.registers import Cpu
from harness.options import LIBRARY, add_target, add_volume, place, screen
from harness.report import export_c, output
from harness.report.bundle import Bundle, read
from harness.report.findings import findings
from harness.report.styled import Line, harmless, line, wrap
from harness.report.summary import describe_machine
from harness.report.terminal import Screen, Volume
from harness.report.walks import draw
from harness.scenario import files
from harness.scenario.program import Compiler
from harness.shrinking import Kind, Repeated
from harness.target import MACHINES, Target, say
from harness.wire.layout import FEATURES

REPRODUCED: Final = 1
NOT_REPRODUCED: Final = 0
CANNOT_TELL: Final = 125
"""What `git bisect run` takes for a version that cannot be tested."""

_MODEL: Final = re.compile(r"[\w.+=,-]+")
_LIBERTIES: Final = {"tcg": tcg.LIBERTIES, "kvm-on-tcg": kvm_on_tcg.LIBERTIES, "kvm": kvm.LIBERTIES}
_PARAMETER: Final = re.compile(r"[\w.]+=[\w.,-]+")


def add(commands: Any) -> None:
    """The command, to argparse's sub-commands."""
    parser = commands.add_parser(
        "replay", help="try whether a bundle's finding is there",
        epilog="exit codes: 1 reproduced, 0 not reproduced (what was seen instead is shown), 125 it cannot be tested "
               "here: the machine does not start, dies of something else, or lacks what the scenario needs. So "
               "`git bisect run twinwalk replay BUNDLE ...` finds who mended it, or broke it. 2 wrong use, or a "
               "bundle that is damaged.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder NAME.twin, of `run --bundles`")
    parser.add_argument("--export-c", type=Path, metavar="FOLDER",
                        help="run nothing: write a C test of the finding to FOLDER, which needs nothing of twinwalk")
    add_target(parser)
    add_volume(parser)
    parser.set_defaults(machine=None, cpu=None, l1_pages=None, command=_replay)


def _replay(options: argparse.Namespace) -> int:
    bundle = read(options.bundle)
    if options.export_c:
        return _export(options.bundle, bundle, options.export_c)
    target = targeted(options, bundle, options.bundle).chosen()
    shown = screen(options)
    if shown.volume > Volume.QUIET:
        shown.show(_head(bundle, target, shown.width))
    about = bundle.about
    repeated = Repeated(Kind(about.kind), about.seen, about.tried, bundle.before)
    setup = Setup(target, errata.load(LIBRARY / files.ERRATA_FOLDER), about.pipelined, about.strict)
    seen = None
    try:
        for _ in range(repeated.times):
            seen = watch(setup, bundle.scenario, bundle.before)
            if seen.shows(about.signature, about.strict) or seen.result.skipped or seen.result.senseless:
                break
    except LaunchFailed as reason:
        shown.show(wrap(f"cannot be tested here: {harmless(str(reason))}", shown.width))
        return CANNOT_TELL
    assert seen is not None
    code, verdict, lines = _verdict(bundle, seen, repeated.times, shown)
    if shown.volume > Volume.QUIET:
        shown.show(lines)
    shown.show(wrap(verdict, shown.width))
    return code


def _export(path: Path, bundle: Bundle, folder: Path) -> int:
    """A C test in `folder`, which must not have one yet."""
    machine = bundle.about.machine
    compiler, twin = models(path, bundle)
    image, kind = compiler.image, machine["machine"]
    case, code, la57 = export_c.export(bundle, compiler, twin)
    model = _one(path, bundle.about.target, "cpu", str, lambda v: _MODEL.fullmatch(v))
    values = {"HEAD": export_c.head(bundle, harmless(describe_machine(machine))), "CASE": case,
              "ACCEL": "tcg" if kind == "tcg" else "kvm", "CPU": model if kind == "tcg" else "host",
              "LA57": int(la57), "LOW": image.low_end, "MEGABYTES": image.ram_bytes >> 20}
    texts = {name: export_c.fill((guests.SOURCES / "export" / name).read_text(encoding="utf-8"), values)
             for name in ("test.c", "start.S", "Makefile")}
    texts["start.S"] += code
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise UsageError(f"--export-c {folder}: cannot write there: {reason.strerror}") from None
    for name in texts:
        output.check_writable(folder / name, "--export-c")
        if (folder / name).exists():
            raise UsageError(f"--export-c: {folder / name} is there already: name another folder")
    for name, text in texts.items():
        output.write(folder / name, text)
    print(f"{folder}: build the test with `make`, run it with `make run`")
    return 0


def models(path: Path, bundle: Bundle) -> tuple[Compiler, Twin]:
    """What a bundle's scenario is run with on the model alone, for the machine that it was found on. Raises
    UsageError."""
    image = guests.load_image(guests.build_l1())
    cpu = _cpu(path, bundle.about.machine)
    kind = _one(path, bundle.about.machine, "machine", str, _LIBERTIES.__contains__)
    return Compiler(image, cpu), Twin(image, cpu, _LIBERTIES[kind])


def _cpu(path: Path, machine: Mapping[str, Any]) -> Cpu:
    """The CPU that the bundle's scenario was run on."""
    numbers = {name: _one(path, machine, name, int, lambda v: 0 <= v < 1 << 32)
               for name in ("maxphyaddr", "asids", "svm_features")}
    features = _one(path, machine, "features", list, lambda v: set(v) <= set(FEATURES))
    if not 32 <= numbers["maxphyaddr"] <= 52:
        raise UsageError(f"{path}: its maxphyaddr cannot be {numbers['maxphyaddr']}")
    return Cpu(numbers["maxphyaddr"], "page1g" in features, numbers["asids"], frozenset(features),
               npt=bool(numbers["svm_features"] & 1), vgif=bool(numbers["svm_features"] >> 16 & 1))


def targeted(options: argparse.Namespace, bundle: Bundle, path: Path) -> Target:
    """What to replay on: what is said, else a machine like the bundle's. Programs and what is handed to them are never
    the bundle's, which may come from anybody: those must be named. Raises UsageError."""
    theirs = bundle.about.target
    address, machine = place(options.machine) if options.machine else (
        None, _one(path, theirs, "machine", str, lambda v: v in MACHINES))
    cpu = options.cpu or _one(path, theirs, "cpu", str, lambda v: _MODEL.fullmatch(v))
    pages = options.l1_pages or "2m"
    parameters = tuple(options.kvm_param)
    audit = options.audit or int(bundle.about.check == "C5")
    if machine == "kvm-on-tcg":
        pages = options.l1_pages or _one(path, theirs, "l1_pages", str, lambda v: v in ("2m", "4k"))
        parameters = parameters or tuple(_one(path, theirs, "kvm_parameters", list, lambda v: all(
            isinstance(one, str) and _PARAMETER.fullmatch(one) for one in v)))
    elif options.kernel or options.modules or parameters or options.l1_pages or options.audit:
        raise UsageError("--kernel, --modules, --kvm-param, --l1-pages and --audit are for --machine kvm-on-tcg")
    elif audit:
        raise UsageError(f"{path}: its finding is in tables that only --machine kvm-on-tcg shows")
    host = kvm_on_tcg.Options(options.kernel, options.modules, parameters, pages, audit)
    return Target(machine, options.qemu, cpu, tuple(options.qemu_arg), host, say, address)


def _one(path: Path, target: Mapping[str, Any], name: str, wanted: type, holds: Any) -> Any:
    value = target.get(name)
    if type(value) is not wanted or not holds(value):
        raise UsageError(f"{path}: its {name} cannot be {str(value)[:60]!r}: give it as an option")
    return value


def _head(bundle: Bundle, target: Target, width: int) -> list[Line]:
    about = bundle.about
    lines = wrap(f"{about.signature}; {Repeated(Kind(about.kind), about.seen, about.tried, bundle.before)}", width,
                 "finding  ")
    lines += wrap(f"{bundle.scenario.title} ({len(bundle.scenario.ops)} ops; found in {about.found_in})", width,
                  "         ")
    lines += wrap(harmless(describe_machine(about.machine)), width, "seen on  ")
    if about.twinwalk != our_version():
        lines += wrap(f"written by twinwalk {about.twinwalk}, this is {our_version()}", width, "         ")
    named = {"qemu": target.qemu, "kernel": target.l0.kernel, "modules": target.l0.modules,
             "qemu_args": target.qemu_args}
    for name, ours in named.items():
        if about.target.get(name) and not ours:
            lines += wrap(harmless(f"seen with --{name.replace('_', '-').rstrip('s')} {about.target[name]}, which is "
                                   "not taken from a bundle: give it to test the same"), width, "         ")
    return lines


def _verdict(bundle: Bundle, seen: Seen, times: int, screen: Screen) -> tuple[int, str, list[Line]]:
    """The exit code, the verdict, and what is said before it."""
    about, result, width = bundle.about, seen.result, screen.width
    here = wrap(describe_machine(seen.machine), width, "here     ")
    finding = seen.finding(about.signature, about.strict)
    if result.skipped or result.senseless:
        return CANNOT_TELL, f"cannot be tested here: {result.skipped or result.senseless}", here
    if seen.shows(about.signature, about.strict):
        drawn = draw(finding, bundle.scenario, width, screen.height) if finding is not None else wrap(
            harmless(str(result.lost)), width)
        return REPRODUCED, "reproduced", [*here, line(""), *drawn, line("")]
    if result.lost is not None:
        other = f", and the bundle's loss is another: {about.field}" if about.check == LOST else ""
        told = [line(one) for one in harmless(str(result.lost)).splitlines()]
        return CANNOT_TELL, f"cannot be tested here: {harmless(result.lost.reason)}{other}", [*here, *told]
    instead = [one for one in findings(result.divergences) if one.is_new(about.strict)]
    tries = f" in {times} tries" if times > 1 else ""
    lines = [*here]
    for one in instead:
        lines += [line(""), *draw(one, bundle.scenario, width, screen.height)]
    known = len(result.divergences) - sum(one.is_new(about.strict) for one in instead)
    what = f"{len(instead)} other findings" if instead else "all agreed" if not known else "known errata only"
    return NOT_REPRODUCED, f"not reproduced{tries}: {what}", [*lines, line("")]
