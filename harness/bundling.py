"""What is new, handed over: each finding repeated, shrunk, and written as a bundle."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple

from harness import far, places
from harness.errors import TwinwalkError
from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.lockstep.signature import Signature, of_loss
from harness.model.rules import RULES
from harness.report.bundle import About, Bundle, write
from harness.report.findings import Finding, findings
from harness.report.headline import headline
from harness.report.jsonfile import divergence
from harness.report.styled import MAX_WIDTH, harmless, plain
from harness.report.summary import Summary, identity_of
from harness.report.walks import draw
from harness.scenario.ops import Scenario
from harness.scenario.shrink import bare
from harness.session import Unit
from harness.shrinking import Repeated, Trials, repeat, shrink
from harness.target import Target

_MAX_RECORDS: Final = 1000
MAX_BUNDLES: Final = 25
"""Bundles of one run at most, of what was seen most often: a machine that is wrong in more ways is wrong in general."""


def our_version() -> str:
    """As packaged."""
    with suppress(PackageNotFoundError):
        return version("twinwalk")
    return "unknown"


class Setup(NamedTuple):
    """How scenarios are run: on what, against which errata, how, and with `strict` known errata count as new."""

    target: Target
    errata: Sequence[Erratum]
    pipelined: bool
    strict: bool


class Seen(NamedTuple):
    """One try: what came of the scenario, and the records of its VMRUNs in plain values; the machine's identity."""

    result: Result
    records: list[Mapping[str, Any]]
    machine: Mapping[str, Any]

    def finding(self, wanted: Signature, strict: bool) -> Finding | None:
        """Its finding of that signature."""
        return next((one for one in findings(self.result.divergences)
                     if one.is_new(strict) and one.signature == wanted), None)

    def shows(self, wanted: Signature, strict: bool) -> bool:
        """Whether it shows the signature `wanted`, or was lost with it; with `strict` errata explain nothing."""
        if self.result.lost is not None:
            return of_loss(self.result.lost) == wanted
        return self.finding(wanted, strict) is not None


def watch(setup: Setup, scenario: Scenario, before: Sequence[Scenario]) -> Seen:
    """Run `scenario` on a fresh boot behind those `before`, and take down all that L1 posts of it. Raises LaunchFailed
    if the machine cannot be started."""
    with far.session(setup.target, setup.errata, setup.pipelined, _MAX_RECORDS) as session:
        if before:
            for _ in session.work(Unit(tuple((bare(one),) for one in before), cases=False, doubtful=True)):
                pass
        session.seen.clear()
        (done, *_) = session.work(Unit(((bare(scenario),),), cases=False, doubtful=True))
        return Seen(done.result, session.seen, identity_of(session.identity) or {})


def make(
    setup: Setup, wanted: Signature, scenario: Scenario, before: Sequence[Scenario], command: str, folder: Path
) -> Path:
    """Repeat the finding `wanted` of `scenario`, which ran behind those `before`, shrink it, and write its bundle to
    `folder`; returns the bundle's path. `command` is the command line that found it."""
    with Trials(setup.target, setup.errata, setup.pipelined, setup.strict) as trials:
        repeated = repeat(trials, wanted, scenario, before)
        small = shrink(trials, wanted, scenario, repeated)
    for _ in range(repeated.times):
        seen = watch(setup, small, repeated.before)
        if seen.shows(wanted, setup.strict):
            break
    finding = seen.finding(wanted, setup.strict)
    about = About(*wanted, repeated.kind, repeated.seen, repeated.tried, setup.strict, setup.pipelined,
                  scenario.name, len(scenario.ops), seen.machine, options_of(setup.target), command, our_version(),
                  [divergence(one) for one in _first(finding)])
    return write(folder, Bundle(about, _titled(small, scenario, finding, wanted), repeated.before,
                                tuple(seen.records), _walks(seen, finding, small, wanted, repeated)))


def _first(finding: Finding | None) -> list[Divergence]:
    """The divergences of a finding, that first by which it has its signature."""
    if finding is None:
        return []
    return [finding.first, *(one for one in finding.divergences if one is not finding.first)]


def options_of(target: Target) -> dict[str, Any]:
    """A target in plain values, by option."""
    host = target.l0
    return {"machine": target.machine, "qemu": target.qemu, "cpu": target.cpu, "qemu_args": list(target.qemu_args),
            "kernel": str(host.kernel) if host.kernel else None, "modules": str(host.modules) if host.modules else None,
            "kvm_parameters": list(host.parameters), "l1_pages": host.pages}


def _titled(small: Scenario, scenario: Scenario, finding: Finding | None, wanted: Signature) -> Scenario:
    """With a title and a section of its own: it is no part of what it was found in any more."""
    title = headline(finding, small).rstrip(".") if finding is not None else str(wanted)
    by_walk = wanted.check == "C1" and finding is not None and finding.walk is not None
    rule = RULES.get(finding.walk.rule if by_walk else wanted.rule)  # type: ignore[union-attr]
    return replace(small, title=harmless(title), manual=rule.section if rule and rule.section else scenario.manual,
                   shows=f"What {scenario.name} was shrunk to: {scenario.title}")


def _walks(seen: Seen, finding: Finding | None, small: Scenario, wanted: Signature, repeated: Repeated) -> str:
    text = f"{wanted}\n{repeated}\n\n"
    if finding is not None:
        others = [one for one in findings(seen.result.divergences) if one != finding]
        return text + "\n\n".join(plain(draw(one, small, MAX_WIDTH)) for one in (finding, *others[:9])) + "\n"
    if seen.result.lost is not None:
        return text + harmless(str(seen.result.lost)) + "\n"
    return text + "It was not seen again.\n"


def of_run(
    setup: Setup, summary: Summary, before: Mapping[str, Sequence[Scenario]], command: str, folder: Path
) -> Summary:
    """A bundle for each finding of a run; returns `summary` with where they are. `before` has, by scenario, what ran
    before it. One that cannot be made is told, and the others are made; of the most frequent MAX_BUNDLES."""
    found = []
    made, left = summary.found[:MAX_BUNDLES], summary.found[MAX_BUNDLES:]
    for number, one in enumerate(made, 1):
        setup.target.say(f"bundle {number} of {len(made)}: {one.signature}, in {one.scenario}")
        scenario = summary.scenarios[one.scenario]
        try:
            path = make(setup, one.signature, scenario, before.get(one.scenario, ()), command, folder)
            setup.target.say(f"it is in {path}: try it with `{places.command()} replay {shlex.quote(str(path))}`")
            one = replace(one, bundle=str(path))
        except TwinwalkError as reason:
            setup.target.say(f"no bundle of it: {reason}")
        found.append(one)
    if left:
        setup.target.say(f"no bundle of {len(left)} more findings, which were seen less often: run what shows them "
                         "again, alone, for theirs")
    return replace(summary, found=(*found, *left))
