"""Feeds programs to a machine and its records to the checks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Protocol

from harness.errors import MachineLost, UsageError
from harness.lockstep.audit import Audit
from harness.lockstep.blame import Blame
from harness.lockstep.compare import Context, Divergence, check_enter, check_exit, check_sync, same
from harness.lockstep.contexts import Contexts
from harness.lockstep.coverage import Coverage
from harness.lockstep.errata import Erratum, Known, explain, quirks_of
from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result, Under, Visit
from harness.lockstep.twin import Twin
from harness.model import memory_type
from harness.model.vmcb import SAVE, ExitCode
from harness.model.walk import Walk
from harness.scenario.program import Program, where
from harness.wire.channel import Channel
from harness.wire.image import PAGE, Image, Region, tags
from harness.wire.layout import MAX_DIFFS, RECORD_SLOTS, RECORDS, SAVE_BYTES
from harness.wire.program import Step, WireProbe
from harness.wire.records import Record

MAX_DIVERGENCES = 200
"""Kept for one scenario: a machine that is wrong everywhere has been found out by then."""

_HELD = 64
"""Results that may wait for the trace of their contexts, which comes milliseconds behind the records."""

_View = tuple[tuple[int, ...], tuple[str, ...]]
"""The entries of a walk as a machine left them, and the memory types of its references."""

Witness = Callable[[Context, Record], None]


class Machine(Protocol):
    """What lockstep needs of a machine that is up."""

    @property
    def image(self) -> Image:
        """Where all is in the guest's memory."""

    @property
    def memory(self) -> memoryview:
        """The guest's memory, from sPA 0, live and writable."""

    def idle(self, waited: float) -> None:
        """Called while no record comes, with the seconds since the last; raises MachineLost once
        the machine is found dead, or hung."""

    def lost(self, reason: str) -> MachineLost:
        """The error that says that this machine is lost, with all there is to know of it."""


class Lockstep:
    """Runs programs on `machine` and on `twin`. Strict: L1 waits at every record until it has been
    checked, and live memory is compared too; pipelined: it waits only where the ring is full.
    `errata` are those that hold for this machine: they name what is found, and hide nothing. `coverage`, if
    given, collects what was checked. With `contexts` the MMU contexts of the hypervisor under L1 are checked
    too (C4). `witness` is shown every record of a VMRUN, as long as it is there, and so is `audit` (C5)."""

    def __init__(
        self, machine: Machine, channel: Channel, twin: Twin, strict: bool, errata: Sequence[Erratum] = (),
        coverage: Coverage | None = None, contexts: Contexts | None = None, witness: Witness | None = None,
        audit: Audit | None = None,
    ) -> None:
        self._machine = machine
        self._contexts = contexts
        self._witness, self._audit = witness, audit
        self._enter = b"", b""
        self._errata = Known(errata)
        self._blame = Blame(twin, self._errata, quirks_of(errata), self._exit)
        self._channel = channel
        self._twin = twin
        self._strict = strict
        self._coverage = coverage
        channel.set_lag(0 if strict else RECORD_SLOTS - 1)

    def run(self, programs: Iterable[Program]) -> Iterator[Result]:
        """A result for each program, in order, as soon as it is there. When the machine is lost, the
        last result says so, and nothing follows."""
        todo, waiting = iter(programs), deque[tuple[Program, int]]()
        held: deque[Result] = deque()
        pending: Program | None = next(todo, None)
        while pending is not None or waiting:
            while pending is not None and self._channel.has_room(len(pending.encoded) // 32):
                waiting.append((pending, self._channel.post(pending.encoded)))
                pending = next(todo, None)
                if self._strict:
                    break
            program, end = waiting.popleft()
            result = Result(program.scenario.name)
            held.append(result)
            try:
                self._check(program, end, result)
                self._follow(wait=self._strict or len(held) > _HELD)
            except MachineLost as lost:
                yield from self._lose(held, result, lost)
                return
            yield from self._done(held)
        try:
            self._follow(wait=True)
        except MachineLost as lost:
            yield from self._lose(held, held[-1], lost)
            return
        yield from self._done(held)

    def _follow(self, wait: bool) -> None:
        """Check the contexts whose trace has come; with `wait`, all that are due."""
        if self._contexts is not None:
            if wait:
                self._contexts.settle()
            else:
                self._contexts.poll()

    def _done(self, held: deque[Result]) -> Iterator[Result]:
        """Results, from the first, that wait for no context any more."""
        due = self._contexts.due if self._contexts is not None else None
        while held and held[0] is not due:
            result = held.popleft()
            result.divergences = [explain([one], self._errata)[0] if one.check in ("C4", "C5") else one
                                  for one in result.divergences]
            yield result

    def _lose(self, held: deque[Result], result: Result, lost: MachineLost) -> Iterator[Result]:
        """What is left of the results when the machine is lost in that of `result`: those that are decided,
        and then the first that is not, with the loss."""
        if self._contexts is not None and result is not held[0]:
            with suppress(MachineLost):
                self._contexts.poll()
        for one in self._done(held):
            if one is result:
                held.appendleft(one)
                break
            yield one
        held[0].lost = lost
        yield held[0]

    def _note(self, context: Context, result: Result, record: Record) -> None:
        """C4 goes by the records alone, also where the model of L2 cannot follow."""
        if self._witness is not None:
            self._witness(context, record)
        if self._audit is not None:
            self._audit.saw(result, context, record)
        if self._contexts is not None:
            if record.kind == RECORDS["ENTER"]:
                self._enter = record.control, record.save
            elif record.kind == RECORDS["EXIT"]:
                self._contexts.ran(result, context, self._enter, record)

    def _check(self, program: Program, end: int, result: Result) -> None:
        """One program; `end` is the number of the slot behind it."""
        twin = self._twin
        twin.reset(program.world)
        for step in program.steps:
            if step.code == "RUN":
                try:
                    self._run(program, step, result)
                except UsageError as reason:
                    self._give_up(program, end, step, result, str(reason))
                    return
            elif step.code == "SYNC":
                self._sync(program, result)
            elif step.code == "REWIND":
                self._rewind(program, step, result)
            else:
                twin.apply(step)

    def _run(self, program: Program, step: Step, result: Result) -> None:
        """One RUN op: a VMRUN, and another one for each probe that faulted with probes behind it."""
        twin, channel = self._twin, self._channel
        context = self._context(program, step.origin, step.probes)
        first, count, begun = 0, len(step.probes), twin.begin(step)
        while True:
            record = self._next("ENTER")
            self._note(context, result, record)
            self._add(result, check_enter(context, twin.vmcb_bytes(), first, record))
            self._compare_live(program, context, result, "before VMRUN")
            channel.release()
            vmcb = bytes(twin.memory.bytes[step.a : step.a + PAGE])
            under = Under.of(twin.vmcb, twin.host_at_vmrun())
            prediction = twin.predict(step, first)
            try:
                record = self._next("EXIT")
            except MachineLost as lost:
                raise replace(lost, last_record=f"{lost.last_record}; due was {prediction.due}") from None
            self._note(context, result, record)
            result.vmruns += 1
            result.visits.append(Visit(context.op, record.next_probe, *record.exit, under))
            result.probes += min(record.next_probe + 1, count) - first
            result.table_bytes += program.world.arena_used
            found = self._exit(context, prediction, record)
            if found and prediction.unsearched:
                prediction = twin.predict_again(prediction, vmcb, step, seen=record)
                found = self._exit(context, prediction, record)
            if self._coverage is not None:
                self._coverage.add(prediction, twin.host.dr7)
            if found:
                found = explain(found, self._errata)
                views = self._machine_views(prediction, record, found)
                if any(one.erratum is None for one in found):
                    manual = prediction
                    prediction, blamed, astray = self._blame.quirks(context, prediction, record, vmcb, step)
                    if astray:
                        self._add(result, (one if one.erratum else one.explained_by(blamed) for one in found))
                        channel.release()
                        raise UsageError(astray)
                    if blamed:
                        if self._coverage is not None:
                            self._coverage.add_again(manual, prediction, twin.host.dr7)
                        found = [one if one.erratum else one.explained_by(blamed) for one in found]
                    else:
                        prediction, found = self._blame.tlb(context, prediction, found, record, vmcb, step)
                self._add(result, (
                    one if one.walk is None else one.seen_as(*views[id(one.walk)]) for one in found))
                twin.adopt(prediction, record.diffs)
                self._adopt_vmcb(record)
            elif prediction.permitted:
                twin.adopt(prediction, record.diffs)
            if found or prediction.free:
                self._adopt_vmcb(record)
            result.stale_permitted += len(prediction.ambiguous)
            result.stale_seen += len(prediction.taken)
            self._compare_live(program, context, result, "after #VMEXIT")
            next_probe, code = record.next_probe, record.exitcode
            channel.release()
            if code & 0xFFFF_FFFF == 0xFFFF_FFFF:  # what is saved then is not defined: L1 puts back what it was
                twin.memory.bytes[step.a + SAVE : step.a + SAVE + SAVE_BYTES] = vmcb[SAVE : SAVE + SAVE_BYTES]
                return
            if code == ExitCode.VMMCALL or next_probe + 1 >= count:
                return
            first = next_probe + 1
            twin.resume(begun)

    def _give_up(self, program: Program, end: int, step: Step, result: Result, reason: str) -> None:
        """The program makes no sense, or the machine has diverged into a state that the model does not
        cover: the rest of the program is not checked, and that is said."""
        context = self._context(program, step.origin, ())
        if result.divergences:
            # known, if all that led there is: the rest of the program is not checked either way
            known = [one.erratum for one in result.divergences]
            self._add(result, [Divergence(context.scenario, context.op, -1, "C1", "course", "one that can be followed",
                                          reason, "lockstep", erratum=known[-1] if all(known) else None)])
        else:
            result.senseless = f"{where(program.scenario, step.origin)}: {reason}"
        synced = program.steps[-1].code == "SYNC"
        self._channel.skip_to(end - synced, self._machine.idle, lambda record: self._note(context, result, record))
        self._twin.reset(program.world)
        if synced:
            self._next("SYNC")
            data, arena = program.world.data, program.world.arena
            self._machine.memory[data.start : data.end] = tags(data)
            unwatched = slice(arena.start + program.world.arena_used, arena.end - PAGE)
            self._machine.memory[unwatched] = bytes(unwatched.stop - unwatched.start)
            self._channel.release()

    def _context(self, program: Program, op: int, probes: tuple[WireProbe, ...]) -> Context:
        start = program.world.arena.start
        return Context(program.scenario.name, op, probes, Region(start, start + program.world.arena_used),
                       program.world.mode.long)

    def _rewind(self, program: Program, step: Step, result: Result) -> None:
        """All is again as at the batch's start, as far as L1 watches."""
        words = self._twin.memory.words
        maps = range(min(program.world.maps.values()), program.world.system)  # L1 writes these, and undoes it
        far = [at for at in self._twin.touched_unwatched()
               if at not in maps and words[at >> 3] != self._twin.first(at)]
        self._twin.reset(program.world)
        if far:
            result.senseless = f"{where(program.scenario, 0)}: it writes to sPA {far[0]:#x}, which no batch puts back"

    def _sync(self, program: Program, result: Result) -> None:
        """The end of a scenario: L1 stands still, and all of its memory is compared, the pages that
        nobody watched included."""
        record = self._next("SYNC")
        context, image = self._context(program, -1, ()), self._twin.image
        self._add(result, check_sync(context, record))
        regions = [program.world.arena, program.world.data]
        if result.divergences:  # what went astray went, perhaps, where this world has nothing
            regions += {image.arena, image.data, image.low_arena, image.low_data}.difference(regions)
        for region in regions:
            self._compare_region(context, result, *region, "at the end")
        words = self._machine.memory.cast("Q")
        for address in self._twin.touched_unwatched():  # L1 resets only the pages it watches
            words[address >> 3] = self._twin.first(address)
        self._channel.release()

    def _compare_live(self, program: Program, context: Context, result: Result, when: str) -> None:
        """Every byte of every table, as it is in the guest's memory now: L1 must be waiting."""
        if self._strict:
            self._compare_region(context, result, *context.tables, when)
            self._compare_region(context, result, program.world.system, program.world.system + PAGE, when)

    def _compare_region(self, context: Context, result: Result, start: int, end: int, when: str) -> None:
        model, machine = self._twin.memory.bytes, self._machine.memory
        if same(model[start:end], machine[start:end]):
            return
        ours, theirs = model[start:end].cast("Q"), machine[start:end].cast("Q")
        for index, (want, got) in enumerate(zip(ours, theirs, strict=True)):
            if want != got:
                address = start + 8 * index
                table = address in context.tables
                self._add(result, [Divergence(
                    context.scenario, context.op, -1, "C2" if table else "C1",
                    f"{'entry' if table else 'memory'} at sPA {address:#x} {when}", want, got,
                    "ad" if table else "write",
                )])
                if table:
                    ours[index] = got
                    self._twin.touch(address)
                else:  # nobody watches all data pages: mend what the machine spoilt, L1 stands still
                    theirs[index] = want

    def _next(self, kind: str) -> Record:
        record = self._channel.next_record(self._machine.idle)
        if record.kind != RECORDS[kind]:
            raise self._machine.lost(f"L1 is out of step: it posted {record}, where {kind} was due")
        return record

    def _exit(self, context: Context, prediction: Prediction, record: Record) -> list[Divergence]:
        if record.diffs_found > MAX_DIFFS:
            return self._too_many(context, record)
        words, watched = self._twin.memory.words, self._twin.watched
        expected = {
            address: now
            for address, old in prediction.old.items()
            if (now := words[address >> 3]) != old and address & ~0xFFF in watched
        }
        found = check_exit(context, prediction, record, expected)
        if found and self._twin.liberties.speculates and self._twin.speculate(prediction, record.diffs):
            found = check_exit(context, prediction, record, expected)
        return found

    def _too_many(self, context: Context, record: Record) -> list[Divergence]:
        """L1 waits at such a record in either mode, so that live memory tells what changed."""
        return [Divergence(context.scenario, context.op, -1, "C2", "entries changed by one VMRUN",
                           f"at most {MAX_DIFFS}", record.diffs_found, "ad")]

    def _machine_views(self, prediction: Prediction, record: Record, found: list[Divergence]) -> dict[int, _View]:
        """For each walk of a divergence, by its id: what the machine made of the walk's entries, by the
        quadword (by what the record shows, since live memory may be further on); and the memory types."""
        words, observed, old = self._twin.memory.words, record.diffs, prediction.old

        def after(address: int) -> int:
            if address in observed:
                return observed[address]
            return old[address] if address in old else words[address >> 3]

        def types(one: Divergence, walk: Walk) -> tuple[str, ...]:
            try:
                return memory_type.of_walk(*prediction.under[one.probe], walk)
            except KeyError:  # no probe, or a PAT that no register can hold
                return ()

        views: dict[int, _View] = {}
        for one in found:
            if one.walk is not None and id(one.walk) not in views:
                views[id(one.walk)] = tuple([after(step[3] & ~7) for step in one.walk.trail]), types(one, one.walk)
        return views

    def _adopt_vmcb(self, record: Record) -> None:
        start = self._twin.vmcb.address
        memory = self._twin.memory.bytes
        control, save = record.control, record.save
        memory[start : start + len(control)] = control
        memory[start + 0x400 : start + 0x400 + len(save)] = save

    def _add(self, result: Result, found: Iterable[Divergence]) -> None:
        result.divergences += islice(found, max(0, MAX_DIVERGENCES - len(result.divergences)))
