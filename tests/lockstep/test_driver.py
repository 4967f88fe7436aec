"""Lockstep itself, against a machine that is the model: agreement, both modes, losses, records out of step."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from harness.errors import MachineLost
from harness.lockstep.driver import MAX_DIVERGENCES, Lockstep
from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Under
from harness.lockstep.twin import Twin
from harness.model.registers import Cpu
from harness.model.vmcb import ExitCode
from harness.scenario import files
from harness.scenario.program import Compiler, Program
from harness.wire.image import Image
from harness.wire.layout import MAX_DIFFS, RECORD
from tests.conftest import LIBRARY
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake
from tests.scenario.texts import one, run

MIXED = (
    run("read a; write b+8; rmw c; fetch d+0x20"),
    'entry = "nested.a.pte"\nclear = ["rw"]',
    run("read a; write a+8; read b; write b", cpl=3),
    'entry = "guest.b.pde"\nclear = ["us"]',
    run("read b; read c; fetch b; rdcr2; write c+0x100", cpl=3),
    'vmcb = "asid"\nvalue = 0',
    run("read a"),
)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_agreement(strict: bool, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    program = compiler.compile(one(*MIXED))
    results = run_on_fake(image, cpu, twin, [program] * 3, strict=strict)
    assert [r.divergences for r in results] == [[], [], []]
    # four VMRUNs: one of four probes; one that faults at the first write, and goes on; three; refused
    assert {(r.vmruns, r.probes, r.scenario) for r in results} == {(results[0].vmruns, results[0].probes, "test")}
    assert results[0].vmruns >= 6 and results[0].probes == 14
    assert results[0].table_bytes == results[0].vmruns * program.world.arena_used
    visits = results[0].visits
    assert len(visits) == results[0].vmruns and {one.under for one in visits} == {Under(4, twin.vmcb["ncr3"], 4)}
    assert [(one.op, one.through) for one in visits[:2]] == [(0, 4), (2, 1)]
    assert (visits[0].exitcode, visits[1].exitcode, visits[-1].exitcode) == (
        ExitCode.VMMCALL, ExitCode.NPF, ExitCode.INVALID)
    assert all(r.lost is None for r in results)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_the_library_agrees_with_itself(strict: bool, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    """A scenario of every third file, in one boot: what one leaves behind is none of the next one's business."""
    programs = [compiler.compile(files.read(path)[0]) for path in files.find([LIBRARY])[::3]]
    for result in run_on_fake(image, cpu, twin, programs, strict=strict):
        assert (result.scenario, result.divergences, result.lost) == (result.scenario, [], None)


def test_pipelined_programs_are_posted_ahead(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    program = compiler.compile(one(*MIXED))
    fake = FakeMachine(image, cpu)
    posted = 0

    def programs() -> list[Program]:
        nonlocal posted
        posted += 1
        return [program]

    strict = Lockstep(fake, fake.channel, twin, strict=True)
    results = strict.run(p for _ in range(5) for p in programs())
    next(results)
    assert posted == 2

    fake, posted = FakeMachine(image, cpu), 0
    results = Lockstep(fake, fake.channel, twin, strict=False).run(p for _ in range(5) for p in programs())
    next(results)
    assert posted == 5


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_a_batch_is_no_different(strict: bool, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    """One reset for several programs: each has the verdict that it has alone."""
    scenarios = [one(*MIXED[:5], name="first"), one("write a; read b", name="next"), one(*MIXED, name="mixed"),
                 one('host = "efer"\nclear = ["nxe"]', "fetch a", name="host"),
                 one("fetch a; write a", run("read a", 3), name="last")]
    for order in (scenarios, scenarios[::-1], [*scenarios[1:], scenarios[1]]):
        alone = run_on_fake(image, cpu, twin, map(compiler.compile, order), strict=strict)
        batch = run_on_fake(image, cpu, twin, compiler.batch(order), strict=strict)
        assert alone == batch
        assert all(r.divergences == [] and r.lost is None and not r.senseless for r in batch)


def test_a_batch_puts_back_what_the_machine_did(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    """A wrong bit in one program is that program's alone."""
    class SetsOnce(Plant):
        def after_run(self, fake: FakeMachine, out: Prediction) -> None:
            if fake.runs == 2:
                fake.memory.cast("Q")[twin.image.arena.start >> 3] |= 1 << 9

    programs = compiler.batch([one("read a; read b", name=name) for name in "wxyz"])
    results = run_on_fake(image, cpu, twin, programs, SetsOnce())
    assert [len(r.divergences) for r in results] == [0, 1, 0, 0]


def test_a_batch_does_not_write_out_of_sight(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    """L1 puts back what it watches: a write elsewhere is a mistake of the scenario's."""
    head = 'guest_page = "2M"\nnested_page = "2M"\n'
    scenarios = [one("write a+0x40000", head=head, name="far"), one("write a", head=head, name="near")]
    far, near = run_on_fake(image, cpu, twin, compiler.batch(scenarios))
    assert "no batch puts back" in far.senseless and not near.senseless


class Silent(Plant):
    """Hangs in the second VMRUN."""

    def predict(self, fake: FakeMachine, step: object, first: int) -> Prediction:
        if fake.runs == 2:
            raise StopIteration
        return super().predict(fake, step, first)  # type: ignore[arg-type]


def test_a_machine_that_is_lost_ends_the_run(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    program = compiler.compile(one(*MIXED))
    fake = FakeMachine(image, cpu)

    class Dead(Plant):
        def before_run(self, fake: FakeMachine, step: object, first: int) -> None:
            if fake.runs == 2:
                raise fake.lost("it died")

    fake.plant = Dead()
    results = list(Lockstep(fake, fake.channel, twin, strict=True).run([program, program]))
    assert len(results) == 1
    lost = results[0].lost
    assert isinstance(lost, MachineLost) and lost.exit_code == 3
    assert results[0].vmruns == 1 and results[0].divergences == []
    text = str(lost)
    assert "it died" in text and "fake-machine" in text and "end of log" in text and "ENTER" in text
    assert "; due was VMEXIT_" in lost.last_record and ", by rule " in lost.last_record


def test_a_record_of_the_wrong_kind_is_a_loss(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    class Mixed(Plant):
        def record(self, fake: FakeMachine, data: bytearray) -> None:
            if fake.posted == 1:
                data[0] = 1

    (result,) = run_on_fake(image, cpu, twin, [compiler.compile(one("read a"))], Mixed())
    assert result.lost is not None and "out of step" in str(result.lost) and "EXIT was due" in str(result.lost)


def test_divergences_are_capped(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    class Chaos(Plant):
        def record(self, fake: FakeMachine, data: bytearray) -> None:
            at = RECORD.offsets["save"]
            data[at : at + 0x200] = bytes(b ^ 0xFF for b in data[at : at + 0x200])

    (result,) = run_on_fake(image, cpu, twin, [compiler.compile(one(*[run("read a")] * 20))], Chaos())
    assert len(result.divergences) == MAX_DIVERGENCES and result.lost is None


class Flood(Plant):
    """One VMRUN changes more quadwords than a record can name."""

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        if fake.runs == 1:
            start = fake.image.arena.start
            for index in range(2 * MAX_DIFFS):
                struct.pack_into("<Q", fake.memory, start + 0x800 + 8 * index, 0xE000 + index)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_more_changes_than_a_record_holds(
    strict: bool, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin
) -> None:
    bad, good = run_on_fake(image, cpu, twin, [compiler.compile(one("read a; read b"))] * 2, Flood(), strict)
    assert any(d.field == "entries changed by one VMRUN" and d.check == "C2" for d in bad.divergences)
    assert good.divergences == []


def test_one_fault_is_one_divergence(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    """After a divergence the model goes on from what the machine did: the same fault is not told twice."""
    class ForgetsOnce(Plant):
        def after_run(self, fake: FakeMachine, out: Prediction) -> None:
            if fake.runs == 1:
                for address, old in out.old.items():
                    fake.memory.cast("Q")[address >> 3] = old

    program = compiler.compile(one("read a", run("read b")))
    (result,) = run_on_fake(image, cpu, twin, [program], ForgetsOnce())
    assert {d.op for d in result.divergences} == {0}
    assert {d.check for d in result.divergences} == {"C2"}


def test_the_walk_is_attached_with_the_machines_view(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
    class NoDirty(Plant):
        def after_run(self, fake: FakeMachine, out: Prediction) -> None:
            words = fake.memory.cast("Q")
            for address in out.old:
                if address in fake.image.arena:
                    words[address >> 3] &= ~0x40

    (result,) = run_on_fake(image, cpu, twin, [compiler.compile(one("write a"))], NoDirty())
    for divergence in result.divergences:
        assert divergence.walk is not None and len(divergence.after) == len(divergence.walk.steps) == 24
        assert divergence.types == ("WB",) * 25
        assert divergence.probe == 0
        address = int(divergence.field.split()[3], 16)
        at = [s.address for s in divergence.walk.steps].index(address)
        assert divergence.after[at] == divergence.observed


def test_a_library_is_there() -> None:
    assert Path(LIBRARY).is_dir()


def test_a_machine_that_ruins_the_tables_is_no_wrong_use(
    image: Image, cpu: Cpu, compiler: Compiler, twin: Twin
) -> None:
    """The model goes on from what the machine wrote, even where that makes the rest of the program
    meaningless: it is the machine's divergence, not a UsageError of the scenario's author."""
    program = compiler.compile(one("read a", run("read b"), run("read c")))
    entry = program.world.entries["nested.b.pte"]

    class Ruins(Plant):
        def after_run(self, fake: FakeMachine, out: Prediction) -> None:
            if fake.runs == 1:
                fake.memory.cast("Q")[entry >> 3] = 0x7F_FFFF_F007

        def predict(self, fake: FakeMachine, step: object, first: int) -> Prediction:
            if fake.runs > 3:
                return super().predict(fake, step, first)  # type: ignore[arg-type]
            words = fake.memory.cast("Q")
            kept, words[entry >> 3] = words[entry >> 3], program.world.words[entry]
            out = super().predict(fake, step, first)  # type: ignore[arg-type]
            words[entry >> 3] = kept | 0x20 if out.next_probe else kept
            return out

    bad, good = run_on_fake(image, cpu, twin, [program, compiler.compile(one("read a"))], Ruins())
    assert any(d.check == "C2" and d.field.startswith(f"entry at sPA {entry:#x}") for d in bad.divergences)
    assert good.divergences == [] and good.lost is None
