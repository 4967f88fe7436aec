"""A whole run as one value: what every report is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, Final

from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum, outdated
from harness.lockstep.result import Result
from harness.lockstep.signature import Signature, of_loss
from harness.lockstep.tally import Tally
from harness.model.coverage import Cell
from harness.report.findings import findings
from harness.report.headline import kind
from harness.scenario.ops import Scenario


@dataclass(frozen=True)
class Totals:
    """Sums over a run; `seconds` is its whole time. With --strict every divergence counts as new. `scenarios`
    are those of the library, `sweep_cases` those of `sweeps`."""

    scenarios: int
    sweeps: int
    sweep_cases: int
    vmruns: int
    probes: int
    table_bytes_compared: int
    divergences_new: int
    divergences_known: int
    seconds: float
    contexts_checked: int = 0
    """Entries of the processor into L1 or L2 whose MMU context was checked: on machines with KVM."""
    trace_events: int = 0
    stale_permitted: int = 0
    """Probes for which the manual permits an outcome by a translation that was changed since."""
    stale_seen: int = 0
    """Those in which the machine had that outcome."""
    shadow_audits: int = 0
    """Switches at which KVM's tables were audited (--audit)."""
    shadow_leaves_checked: int = 0
    """Leaves of them that were held against L1's table."""


@dataclass(frozen=True)
class Known:
    """An erratum that was met: how many divergences it explains, in how many scenarios."""

    erratum: Erratum
    count: int
    scenarios: int


@dataclass(frozen=True)
class Found:
    """What is new: findings of one signature, or losses, how many of them, the first one's scenario and what is wrong
    there in a sentence."""

    signature: Signature
    count: int
    scenario: str
    what: str
    bundle: str = ""
    """Where its bundle is, if one was made."""


@dataclass(frozen=True)
class Summary:
    """What a run came to. `machine` is the machine's identity by name, None if it never came up;
    `scenarios` has what was to be run, by name, `not_run` the names of those without a result."""

    machine: Mapping[str, Any] | None
    scenarios: Mapping[str, Scenario]
    results: tuple[Result, ...]
    totals: Totals
    known: tuple[Known, ...]
    skipped: Mapping[str, str]
    """Scenarios that cannot be run on this CPU, with the reason."""
    not_run: tuple[str, ...]
    strict: bool
    cells: tuple[Cell, ...] = ()
    """What was checked, in order (harness.model.coverage)."""
    sweeps: tuple[Tally, ...] = ()
    """How far each sweep came; `results` has only those of its cases of which there is more to say."""
    stale: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By family (a sweep, a scenario file): probes for which an old translation is permitted, and those in which
    the machine used one."""
    found: tuple[Found, ...] = ()
    """What is new, the most frequent first."""

    outdated: tuple[Erratum, ...] = ()
    """Errata that are said to be of this version of what is under test, and did not show where they should have."""

    @property
    def lost(self) -> tuple[Result, ...]:
        """Results of scenarios in which the machine was lost."""
        return tuple(result for result in self.results if result.lost is not None)


def summarize(
    identity: object | None,
    scenarios: Iterable[Scenario],
    results: Sequence[Result],
    errata: Iterable[Erratum],
    seconds: float,
    strict: bool = False,
    cells: Iterable[Cell] = (),
    sweeps: Sequence[Tally] = (),
) -> Summary:
    """`identity` is the machine's identity, a dataclass; `errata` those that divergences may name; `cells` what
    was checked."""
    by_name, errata = {scenario.name: scenario for scenario in scenarios}, list(errata)
    everything = [d for result in results for d in result.divergences]
    done = {result.scenario for result in results}
    cases = {name for name in done if name.partition("[")[0] in {tally.name for tally in sweeps}}
    new = sum(is_new(d, strict) for d in everything)
    folded = [count for tally in sweeps for count in tally.known.values()]
    counted: list[Result | Tally] = [*sweeps]
    alone = [result for result in results if result.scenario not in cases and not result.skipped]
    counted += alone
    return Summary(
        machine=identity_of(identity),
        scenarios=by_name,
        results=tuple(results),
        totals=Totals(
            scenarios=len(alone),
            sweeps=len(sweeps),
            sweep_cases=sum(tally.done for tally in sweeps),
            vmruns=sum(one.vmruns for one in counted),
            probes=sum(one.probes for one in counted),
            table_bytes_compared=sum(one.table_bytes for one in counted),
            divergences_new=new,
            divergences_known=len(everything) - new + sum(folded),
            seconds=seconds,
            contexts_checked=sum(one.contexts for one in counted),
            trace_events=sum(one.trace_events for one in counted),
            stale_permitted=sum(one.stale_permitted for one in counted),
            stale_seen=sum(one.stale_seen for one in counted),
            shadow_audits=sum(one.shadow_audits for one in counted),
            shadow_leaves_checked=sum(one.shadow_leaves for one in counted),
        ),
        known=_known(everything, sweeps, {erratum.id: erratum for erratum in errata}),
        skipped={result.scenario: result.skipped for result in results if result.skipped},
        not_run=tuple(name for name in by_name if name not in done),
        strict=strict,
        cells=tuple(sorted(cells)),
        sweeps=tuple(sweeps),
        stale=_stale(counted),
        outdated=_outdated(identity, alone, everything, sweeps, errata),
        found=_found(results, strict),
    )


def _found(results: Iterable[Result], strict: bool) -> tuple[Found, ...]:
    """By signature."""
    found: dict[Signature, Found] = {}

    def add(signature: Signature, scenario: str, what: str) -> None:
        first = found.get(signature) or Found(signature, 0, scenario, what)
        found[signature] = replace(first, count=first.count + 1)

    for result in results:
        for finding in findings(result.divergences):
            if finding.is_new(strict):
                add(finding.signature, result.scenario, kind(finding))
        if result.lost is not None:
            add(of_loss(result.lost), result.scenario, f"The machine was lost: {result.lost.reason}")
    return tuple(sorted(found.values(), key=lambda one: -one.count))


def _outdated(identity: object | None, results: Iterable[Result], divergences: Iterable[Divergence],
              sweeps: Iterable[Tally], errata: Iterable[Erratum]) -> tuple[Erratum, ...]:
    layers = getattr(identity, "layers", ())
    if not layers:
        return ()
    found = {name for one in divergences for name in errata_of(one)} | {name for one in sweeps for name in one.known}
    ran = {result.scenario for result in results if result.lost is None}
    name, version = layers[0]
    return tuple(outdated(errata, name, version, ran, found))


def _stale(counted: Iterable[Result | Tally]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for one in counted:
        if one.stale_permitted:
            family = one.name if isinstance(one, Tally) else one.scenario.partition("[")[0]
            permitted, seen = found.get(family, (0, 0))
            found[family] = permitted + one.stale_permitted, seen + one.stale_seen
    return dict(sorted(found.items()))


def is_new(divergence: Divergence, strict: bool = False) -> bool:
    """Whether no erratum explains it; with `strict` none is taken for an explanation."""
    return strict or divergence.erratum is None


def errata_of(divergence: Divergence) -> tuple[str, ...]:
    """The ids of the errata that explain a divergence: more than one, joined by `+`, where only all of
    them together do."""
    return tuple(divergence.erratum.split("+")) if divergence.erratum else ()


def _known(
    divergences: Iterable[Divergence], sweeps: Iterable[Tally], errata: Mapping[str, Erratum]
) -> tuple[Known, ...]:
    counts: Counter[str] = Counter()
    where: dict[str, set[str]] = {}
    cases: Counter[str] = Counter()
    for one in divergences:
        for name in errata_of(one):
            counts[name] += 1
            where.setdefault(name, set()).add(one.scenario)
    for tally in sweeps:
        counts.update(tally.known)
        cases.update(tally.known_cases)
    return tuple(
        Known(errata.get(name) or _unlisted(name), counts[name], len(where.get(name, ())) + cases[name])
        for name in sorted(counts, key=lambda name: (-counts[name], name))
    )


def _unlisted(name: str) -> Erratum:
    """In place of an erratum that the caller did not hand over."""
    return Erratum(id=name, title="(not in the list of errata)", machine="", explanation="", reference="")


_VERSIONS: Final = ("qemu_version", "kernel_version")


def identity_of(identity: object | None) -> Mapping[str, Any] | None:
    """A machine's identity by name, in plain values; versions as text, `7.2.22`."""
    if identity is None:
        return None
    assert is_dataclass(identity) and not isinstance(identity, type)
    values = {}
    for name, value in asdict(identity).items():
        if name in _VERSIONS and isinstance(value, tuple):
            value = ".".join(map(str, value))
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def describe_machine(machine: Mapping[str, Any] | None) -> str:
    """A machine's identity in one line; names that this version does not know follow as they are."""
    if machine is None:
        return "the machine never came up"
    rest = {name: value for name, value in machine.items() if value or value == 0}
    rest.pop("layers", None)  # for errata; they are QEMU and the kernel, which are named
    if not rest.get("svm_revision", 1):  # nobody asked CPUID: a foreign L1 does not tell
        del rest["svm_revision"]
        rest.pop("svm_features", None)
    if not rest.get("microcode", 1):
        del rest["microcode"]
    parts = [f"{rest.pop('machine', 'machine')}:"]
    if "qemu" in rest:
        parts.append(f"QEMU {rest.pop('qemu_version', '?')} ({rest.pop('qemu')}),")
    if "cpu_model" in rest:
        parts.append(f"CPU {rest.pop('cpu_model')},")
    if "microcode" in rest:
        parts.append(f"microcode {rest.pop('microcode'):#x},")
    if "maxphyaddr" in rest:
        parts.append(f"{rest.pop('maxphyaddr')} physical address bits,")
    if "asids" in rest:
        parts.append(f"{rest.pop('asids')} ASIDs,")
    features = rest.pop("features", [])
    if "svm_features" in rest:
        parts.append(f"SVM revision {rest.pop('svm_revision', '?')} with features {rest.pop('svm_features'):#x},")
    if {"kernel", "kernel_version"} <= rest.keys():
        parts.append(f"Linux {rest.pop('kernel_version')} ({rest.pop('kernel')}),")
    parts += [f"{name} {value}," for name, value in rest.items()]
    return f"{' '.join(parts)} {' '.join(features)}".strip().rstrip(",")
