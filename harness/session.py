"""What runs on one machine: unit after unit of scenarios. The machine is booted for the first of them, and again
whenever it was lost; that costs the scenario it was lost in, and the rest goes on.

What comes of a unit depends on nothing else: not on the units before it, not on which machine it ran.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from harness.errors import LaunchFailed, MachineLost, UsageError
from harness.lockstep import exits
from harness.lockstep.audit import Audit
from harness.lockstep.compare import AT_THE_END, Context, Divergence
from harness.lockstep.contexts import Contexts
from harness.lockstep.coverage import Coverage
from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.hazards import Hazards, Peril
from harness.lockstep.kept_format import KeptFormat
from harness.lockstep.quirks import FLEETING, NESTED_FORMAT_BY_L2
from harness.lockstep.rehearse import rehearse
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine.l1 import Identity, L1Machine
from harness.model.registers import Cpu
from harness.report import records
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler, Program
from harness.target import Target
from harness.wire.channel import Channel
from harness.wire.layout import RECORDS, VMRUN_RAISED
from harness.wire.records import Record

MAX_LOST: Final = 5
"""Reboots before a run is given up."""
MAX_CHANCES: Final = 3
"""Runs of a scenario all of which show what shows by chance: then it is not that."""
_OF_L1: Final = ("exit.host", "exit.host-dr7", "exit.registers")
"""Rules of L1's registers."""

_COLLECT_AFTER: Final = 100_000
"""Allocations between two looks for cycles: walks are many small tuples, and there are no cycles in them."""


class Unit(NamedTuple):
    """Work that is done in one go. Each batch is one scenario or, with `cases`, cases of sweeps that share a world.
    With `doubtful` what makes no sense is skipped; else it is an error. They were rehearsed for the CPU that they are
    `made_for`, if there is one."""

    batches: tuple[tuple[Scenario, ...], ...]
    cases: bool
    doubtful: bool = False
    made_for: Cpu | None = None


class Done(NamedTuple):
    """A result and whose it is: a scenario's or, with `case`, one of a case of a sweep."""

    scenario: Scenario
    result: Result
    case: bool


class _Running(NamedTuple):
    """What belongs to a machine that is up."""

    machine: L1Machine
    lockstep: Lockstep
    compiler: Compiler
    twin: Twin
    hazards: Hazards


class Session:
    """A context manager: the machine is gone at the block's end. `identity` is None until it came up first. `seen` has
    the records of VMRUNs in plain values, the first `keep` of them since it was emptied."""

    def __init__(
        self, target: Target, errata: Sequence[Erratum], pipelined: bool, keep: int = 0, careful: bool = True,
    ) -> None:
        """Unless `careful`, what the machine is known not to survive is tried all the same."""
        self._target, self._errata, self._pipelined, self._careful = target, errata, pipelined, careful
        self._keep = keep
        self.seen: list[Mapping[str, Any]] = []
        self._machine = ExitStack()
        self._collections = gc.get_threshold()
        self._running: _Running | None = None
        self.identity: Identity | None = None
        self.coverage = Coverage()

    def __enter__(self) -> Self:
        self._collections = gc.get_threshold()
        gc.set_threshold(_COLLECT_AFTER, *self._collections[1:])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        gc.set_threshold(*self._collections)
        self.shut_down()

    def run(self, units: Iterable[Unit]) -> Iterator[Done]:
        """Results as they come. Raises UsageError for a scenario that makes no sense, before it is run;
        LaunchFailed if the machine cannot be started at all."""
        for unit in units:
            yield from self.work(unit)

    def work(self, unit: Unit) -> Iterator[Done]:
        """As `run`, of one unit. After MAX_LOST losses its rest is left."""
        queue, sparing = _Queue(unit, {one.id for one in self._errata if one.quirk in FLEETING}), False
        losses, sifted = 0, False
        while losses < MAX_LOST and queue.more():
            try:
                machine, lockstep, compiler, twin, hazards = self._running or self._boot()
            except LaunchFailed as failed:
                if self.identity is None:
                    raise
                losses += 1
                scenario = queue.next()
                lost = MachineLost(f"it could not be started again: {failed}")
                yield Done(scenario, Result(scenario.name, lost=lost), unit.cases)
                continue
            strange = not compiler.usual and compiler.cpu != unit.made_for
            if not sifted and (hazards or unit.doubtful or strange):
                yield from queue.sift(compiler, twin, hazards, unit.doubtful or strange)
            sifted = True
            sparing = sparing or machine.channel.is_sparing
            for result in lockstep.run(queue.programs(compiler, twin, machine.channel)):
                if result.lost is not None:
                    losses += 1
                    self.shut_down()
                yield from queue.take(result, sparing)
                if sparing and not queue.looks_closer and self._running is not None:
                    machine.channel.spare()

    def rest(self) -> None:
        """The next unit takes a while to come."""
        if self._running is not None:
            self._running.machine.rest()

    def held(self) -> Iterator[Done]:
        """None: results are told as they come."""
        yield from ()

    def _boot(self) -> _Running:
        machine = self._machine.enter_context(self._target.start())
        self.identity = machine.identity
        known = of_layers(self._errata, machine.identity.layers)
        twin = Twin(machine.image, machine.cpu, machine.liberties)
        if any(one.quirk == NESTED_FORMAT_BY_L2 for one in known):
            twin.kept = KeptFormat(machine.cpu)
        watching = self._keep or twin.kept is not None
        audit = _audit(machine, self._target.l0.audit)
        lockstep = Lockstep(machine, machine.channel, twin, audit is not None or not self._pipelined, known,
                            self.coverage, _contexts(machine), partial(self._witness, twin) if watching else None,
                            audit)
        hazards = Hazards((one.hazard, one.id) for one in known if one.hazard and self._careful)
        self._running = _Running(machine, lockstep, Compiler(machine.image, machine.cpu), twin, hazards)
        return self._running

    def _witness(self, twin: Twin, context: Context, record: Record) -> None:
        if twin.kept is not None and record.kind == RECORDS["ENTER"]:
            twin.kept.entered(record.control, record.save, twin.host_at_vmrun())
        elif twin.kept is not None and record.kind == RECORDS["EXIT"] and _was_refused(record):
            twin.kept.refused()
        if len(self.seen) < self._keep:
            self.seen.append(records.plain(record, context.op))

    def shut_down(self) -> None:
        """The next unit begins on a machine that is booted for it."""
        self._running = None
        self._machine.close()


def _was_refused(record: Record) -> bool:
    return exits.was_refused(record.exitcode) or record.exitcode >> 32 == VMRUN_RAISED >> 32


def _contexts(machine: L1Machine) -> Contexts | None:
    return Contexts(machine.trace, machine.image.ram_end, machine.lost) if machine.trace is not None else None


def _audit(machine: L1Machine, every: int) -> Audit | None:
    """One that L1 must not run away from: strict."""
    return Audit(machine.kvm, machine.memory, machine.cpu, every, machine.lost) if machine.kvm is not None else None


class _Queue:
    """What of a unit is still to be run, by the batch. Results come in the order in which programs were handed
    out."""

    def __init__(self, unit: Unit, fleeting: Set[str] = frozenset()) -> None:
        """`fleeting` are the ids of the errata that show by chance."""
        self._cases, self._fleeting = unit.cases, fleeting
        self._todo = deque(unit.batches)
        self._out: deque[tuple[Scenario, ...]] = deque()
        """Handed out; of the first one `_results` are there."""
        self._results: list[Result] = []
        self._doubts: list[_Doubt] = []
        self._sifted = False
        self._first: dict[str, Result] = {}
        """Of scenarios at whose end L1's registers were wrong, and which are run again: what came of them."""
        self._chances: dict[str, list[Result]] = {}
        """What came, each time, of those that showed an erratum that shows by chance, and are run again."""

    @property
    def looks_closer(self) -> bool:
        """Whether L1 is to read all of its registers behind each VMRUN for a while."""
        return bool(self._first)

    def more(self) -> bool:
        """Whether anything is left; what was handed out without a result is handed out again."""
        self._todo.extendleft(reversed(self._out))
        self._out.clear()
        return bool(self._todo)

    def programs(self, compiler: Compiler, twin: Twin, channel: Channel) -> Iterator[Program]:
        """A scenario is tried on the model just before the machine gets it. Lockstep asks for the next program
        only between two, so both may use one twin."""
        while self._todo:
            batch = self._todo.popleft()
            self._out.append(batch)
            if batch[0].name in self._first:
                channel.spare(False)
            if self._cases:
                yield from compiler.batch(batch)
            else:
                program = compiler.compile(batch[0])
                if not self._sifted:
                    rehearse(twin, program, expectations=compiler.usual)
                yield program

    def sift(self, compiler: Compiler, twin: Twin, hazards: Hazards, whole: bool) -> Iterator[Done]:
        """Take out what the machine is known not to survive, and with `whole` also what makes no sense on this CPU,
        which is another than that which expectations are written for."""
        fitting = []
        for batch in self._todo:
            fits = []
            for scenario in batch:
                if not whole and not hazards.suspect(scenario):
                    fits.append(scenario)
                    continue
                for quirks in hazards.courses:
                    try:
                        rehearse(twin, compiler.compile(scenario), hazards.see, False, hazards.enter, quirks)
                    except UsageError as reason:
                        if isinstance(reason, Peril) or (whole and not quirks):
                            yield Done(scenario, Result(scenario.name, skipped=str(reason)), self._cases)
                            break
                else:
                    fits.append(scenario)
            if fits:
                fitting.append(tuple(fits))
        self._todo, self._sifted = deque(fitting), whole

    def next(self) -> Scenario:
        """The scenario that is next, handed out without a program."""
        first, *rest = self._todo.popleft()
        if rest:
            self._todo.appendleft(tuple(rest))
        return first

    def take(self, result: Result, sparing: bool) -> Iterator[Done]:
        """The next result; returns those that are final. What is found at the end of a batch may be any
        one's doing: its scenarios are run again, each alone. If it is a register of L1's, and L1 is `sparing`, so that
        it does not read them all behind each VMRUN, that one is run once more, without, which tells the VMRUN. Where a
        batch does not come to its end, since the machine is lost, those before are run again with those behind."""
        batch = self._out[0]
        self._results.append(result)
        if result.lost is None and len(self._results) < len(batch):
            return
        results, self._results = self._results, []
        self._out.popleft()
        at_end = [one for one in result.divergences if one.op < 0]
        if result.lost is not None:
            at = len(results) - 1
            if rest := batch[:at] + batch[at + 1 :]:
                self._out.appendleft(rest)
            batch, results = (batch[at],), [result]
        elif len(batch) > 1 and at_end:
            self._todo.extend((scenario,) for scenario in batch)
            self._doubts.append(_Doubt({scenario.name for scenario in batch}, at_end))
            return
        if result.lost is None and result.scenario not in self._first and sparing and any(
                one.check == "C3" and one.field.endswith(AT_THE_END) for one in at_end):
            self._first[result.scenario] = result
            self._todo.append(batch)
            return
        if (first := self._first.pop(result.scenario, None)) is not None and not (
                result.lost or any(one.op >= 0 and one.rule in _OF_L1 for one in result.divergences)):
            results = [first]  # it did not come again: what was seen counts
            result = first
        for doubt in self._doubts:
            if result.scenario in doubt.names:
                doubt.settle(result)
        for scenario, one in zip(batch, results, strict=True):
            if (final := self._settled(one)) is None:
                self._todo.append((scenario,))
            else:
                yield Done(scenario, final, self._cases)

    def _settled(self, result: Result) -> Result | None:
        """What is told of a scenario. Where an erratum shows by chance, it is run again, and there is nothing yet; if
        it shows each time it explains nothing."""
        earlier = self._chances.setdefault(result.scenario, [])
        if not any(map(self._by_chance, result.divergences)):
            new = result.lost is not None or any(one.erratum is None for one in result.divergences)
            return result if new or not earlier else earlier[0]
        earlier.append(result)
        if len(earlier) < MAX_CHANCES:
            return None
        result.divergences = [one._replace(erratum=None) if self._by_chance(one) else one
                              for one in result.divergences]
        return result

    def _by_chance(self, divergence: Divergence) -> bool:
        return divergence.erratum is not None and not self._fleeting.isdisjoint(divergence.erratum.split("+"))


@dataclass
class _Doubt:
    """A batch at whose end memory was wrong: its scenarios (`names` are those still to be run again), and
    what was found. If none of them shows it alone, it is told with the last of them."""

    names: set[str]
    found: list[Divergence]

    def settle(self, result: Result) -> None:
        self.names.discard(result.scenario)
        if any(one.op < 0 or one.rule in _OF_L1 for one in result.divergences):
            self.found = []
        if not self.names:
            result.divergences += self.found
