"""`twinwalk bisect`: since which version a finding shows, or until which, over those that were fetched."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from harness.bundling import Setup, watch
from harness.errors import LaunchFailed, UsageError
from harness.lockstep import errata as errata_files
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.lockstep.signature import of_loss, signature
from harness.machine import kvm_on_tcg, versions
from harness.machine.versions import dotted
from harness.options import LIBRARY, add_volume
from harness.report import bundle
from harness.report.terminal import Volume
from harness.run import run
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.selection import matches
from harness.target import Target, say

SHOWS: Final = 1
ABSENT: Final = 0
CANNOT_TELL: Final = 125
"""Exit codes where one version is given, as `git bisect run` wants them."""
NO_EDGE: Final = 1


class Verdict(NamedTuple):
    """Of one version. `shows` is None where it cannot be tested; `what` says what was seen, or why."""

    shows: bool | None
    what: str


class Wanted(NamedTuple):
    """What is looked for: `run` tries one machine; `what` says it in words."""

    what: str
    run: Callable[[Target], Verdict]


def add(commands: Any) -> None:
    """The command, to argparse's sub-commands."""
    parser = commands.add_parser(
        "bisect", help="find the version since which a finding shows",
        epilog="exit codes of a range: 0 the edge was found, 1 there is none (it shows at both ends, or at neither), "
               "3 no version could be tested. Of a single version (--kernel . or --qemu PATH): 1 it shows, 0 it does "
               "not, 125 it cannot be tested, as `git bisect run` wants it.")
    parser.add_argument("subject", type=Path, metavar="BUNDLE_OR_SCENARIO",
                        help="a folder of `run --bundles`, a scenario file, or the name of one of the library's")
    parser.add_argument("--qemu", metavar="V..V", help="versions of QEMU, from one to another; or one, or a path")
    parser.add_argument("--kernel", metavar="V..V", help="versions of KVM's kernel; or one, or a build tree")
    parser.add_argument("--modules", type=Path, metavar="DIR", help="the folder that the modules of --kernel lie in")
    parser.add_argument("--under", metavar="V", help="with --kernel, the QEMU that plays its host")
    parser.add_argument("--cpu", default="max", metavar="MODEL", help="QEMU's CPU model (default: max)")
    parser.add_argument("--shows", default="", metavar="TEXT",
                        help="only findings whose signature has TEXT in it, or which are the erratum of that id "
                             "(default: the bundle's; of a scenario, any)")
    add_volume(parser)
    parser.set_defaults(command=_bisect)


def _bisect(options: argparse.Namespace) -> int:
    if bool(options.qemu) == bool(options.kernel):
        raise UsageError("say which versions: --qemu 7.2..11.1, or --kernel 6.1..7.2")
    wanted = _wanted(options.subject, options.shows)
    kind = "qemu" if options.qemu else "kernel"
    first, dots, last = (options.qemu or options.kernel).partition("..")
    if options.volume > Volume.QUIET:
        print(f"looking for {wanted.what}")
    if not dots or not versions.is_name(first):
        verdict = _tried(wanted, _target(options, kind, options.qemu or options.kernel))
        print(_told(kind, options.qemu or options.kernel, verdict, options.volume))
        return CANNOT_TELL if verdict.shows is None else SHOWS if verdict.shows else ABSENT
    candidates = between(kind, first, last)

    def test(one: versions.Fetched) -> Verdict:
        verdict = _tried(wanted, _target(options, kind, str(one.path)))
        if options.volume > Volume.QUIET:
            print(_told(kind, dotted(one.version), verdict, options.volume), flush=True)
        return verdict

    edge = find(candidates, test)
    print(edge.text)
    return edge.code


def between(kind: str, first: str, last: str) -> list[versions.Fetched]:
    """What was fetched from `first` to `last`, both included, one of each version. The ends are fetched if need be.
    Raises UsageError for a range that makes no sense."""
    ends = [versions.resolve(kind, name, say) for name in (first, last)]
    found = {one.version: one for one in (*versions.fetched(kind), *ends) if ends[0].version <= one.version}
    inside = [one for version, one in sorted(found.items()) if version <= ends[1].version]
    if len(inside) < 2:
        raise UsageError(f"--{kind} {first}..{last}: write the older one first; `twinwalk fetch` gets more to try")
    return inside


class Edge(NamedTuple):
    """What a search came to."""

    code: int
    text: str


def find(candidates: Sequence[versions.Fetched], test: Callable[[versions.Fetched], Verdict]) -> Edge:
    """Where along `candidates` the verdict changes, by bisection; those that cannot be tested are stepped over."""
    known: dict[int, Verdict] = {}

    def shows(at: int) -> bool | None:
        if at not in known:
            known[at] = test(candidates[at])
        return known[at].shows

    low, high = 0, len(candidates) - 1
    while low <= high and shows(low) is None:
        low += 1
    while low <= high and shows(high) is None:
        high -= 1
    if low > high:
        return Edge(LaunchFailed.exit_code, "none of these versions can be tested")
    if shows(low) == shows(high):
        where = "shows" if shows(low) else "does not show"
        return Edge(NO_EDGE, f"it {where} at both ends, {dotted(candidates[low].version)} and "
                             f"{dotted(candidates[high].version)}: no edge is between them, or more than one")
    while (open_ := [at for at in range(low + 1, high) if at not in known or known[at].shows is not None]):
        middle = open_[len(open_) // 2]
        verdict = shows(middle)
        if verdict is not None and verdict == shows(low):
            low = middle
        elif verdict is not None:
            high = middle
    old, new = (dotted(candidates[at].version) for at in (low, high))
    skipped = [dotted(candidates[at].version) for at in range(low + 1, high)]
    text = f"it shows since {new}, and not in {old}" if shows(high) else f"it shows until {old}, and not in {new}"
    return Edge(0, text + (f"; between them {', '.join(skipped)} cannot be tested" if skipped else ""))


def _target(options: argparse.Namespace, kind: str, name: str) -> Target:
    if kind == "qemu":
        return Target("tcg", name, options.cpu, say=say)
    path, modules = Path(name), options.modules
    if (path / "version").is_file():  # a tree that was fetched: its image lies somewhere in it
        image = next((one for one in path.glob("**/vmlinuz*") if one.is_file()), path)
        path, modules = image, path
    return Target("kvm-on-tcg", options.under, options.cpu,
                  l0=replace(kvm_on_tcg.DEFAULT, kernel=path, modules=modules), say=say)


def _told(kind: str, name: str, verdict: Verdict, volume: Volume) -> str:
    """In a line, but for `volume` VERBOSE."""
    what = verdict.what if volume == Volume.VERBOSE else verdict.what.partition("\n")[0]
    word = "cannot be tested" if verdict.shows is None else "shows" if verdict.shows else "does not show"
    return f"{kind} {name:10} {word:16} {what}".rstrip()


def _tried(wanted: Wanted, target: Target) -> Verdict:
    try:
        return wanted.run(target)
    except LaunchFailed as reason:
        return Verdict(None, str(reason))


def _wanted(subject: Path, text: str) -> Wanted:
    """What `subject` is about. Raises UsageError if it is nothing."""
    errata = errata_files.load(LIBRARY / files.ERRATA_FOLDER)
    if (subject.is_dir() and (subject / bundle.MANIFEST).exists()) or subject.suffix == bundle.SUFFIX:
        return _of_bundle(bundle.read(subject), text)
    name = str(subject)
    if subject.exists():
        scenarios = files.load([subject])
    else:
        scenarios = files.load([LIBRARY], lambda one: one == name or (
            "[" not in name and matches(name, one) and one.partition("[")[0] == name))
    if not scenarios:
        raise UsageError(f"{subject} is no bundle, no scenario file, and no scenario of the library's")
    erratum = next((one for one in errata if one.id == text), None)
    what = f"erratum {erratum.id}" if erratum else f"findings with {text!r}" if text else "any finding"
    return Wanted(f"{what} in {name}", lambda target: _of_run(target, scenarios, text, erratum))


def _of_bundle(about: bundle.Bundle, text: str) -> Wanted:
    """Whether its signature shows, known erratum or not."""
    wanted = about.about.signature

    def once(target: Target) -> Verdict:
        if about.about.check == "C5":
            target = replace(target, l0=replace(target.l0, audit=1))
        seen = watch(Setup(target, (), about.about.pipelined, True), about.scenario, about.before)
        if seen.shows(wanted, True):
            return Verdict(True, str(wanted))
        return _not_tested(seen.result) or Verdict(False, _first(seen.result))

    if text:
        raise UsageError("--shows is for scenarios: a bundle has its own signature")
    return Wanted(f"{wanted} in {about.scenario.name}", once)


def _of_run(target: Target, scenarios: Sequence[Scenario], text: str, erratum: Erratum | None) -> Verdict:
    """Whether one of `scenarios` shows what is wanted. An erratum is looked for whatever its versions say."""
    known = [replace(erratum, since=None, until=None, fixed=())] if erratum else []
    outcome = run(target, scenarios, known, pipelined=target.machine == "kvm-on-tcg", careful=False)
    for result in outcome.results:
        for one in result.divergences:
            told = str(signature(one))
            if (erratum is not None and erratum.id in (one.erratum or "").split("+")) or (
                    erratum is None and text in told):
                return Verdict(True, f"{told} in {result.scenario}")
        if result.lost is not None and (text in str(of_loss(result.lost)) or (erratum is not None and erratum.hazard)):
            return Verdict(True, f"{result.scenario}: {result.lost.reason}")
    unfit = [_not_tested(result) for result in outcome.results]
    if all(unfit) or any(result.lost is not None for result in outcome.results):
        return next(one for one in unfit if one)
    return Verdict(False, next((_first(result) for result in outcome.results if result.divergences), "all agreed"))


def _not_tested(result: Result) -> Verdict | None:
    if result.lost is not None:
        return Verdict(None, f"the machine was lost of something else: {result.lost.reason}")
    reason = result.skipped or result.senseless
    return Verdict(None, reason) if reason else None


def _first(result: Result) -> str:
    return str(signature(result.divergences[0])) if result.divergences else "all agreed"
