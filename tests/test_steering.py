"""Which programs are made: valid ones, the same for the same seed everywhere, and such that reach the table's cells."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from random import Random

import pytest

from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.machine.tcg import LIBERTIES
from harness.model import local_apic
from harness.model.registers import Cpu
from harness.model.universe import universe
from harness.scenario import files, writer
from harness.scenario.aims import place
from harness.scenario.ops import EntryOp, HostOp, InvlpgaOp, RunOp, Scenario, UseOp, VmcbOp
from harness.scenario.program import Compiler, world_key
from harness.steering import CPU, Steering
from harness.wire.image import Image
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def made(image: Image) -> tuple[Steering, list[tuple[Scenario, ...]]]:
    """A block of seed 1."""
    steering = Steering(image, 1)
    return steering, list(steering.block(0))


def test_a_block(made: tuple[Steering, list[tuple[Scenario, ...]]]) -> None:
    steering, batches = made
    programs = [one for batch in batches for one in batch]
    assert len(programs) == len({one.name for one in programs}) == steering.made.programs > 950
    assert steering.made.rejected < 0.15 * len(programs)
    assert 12 < steering.made.ops / len(programs) < 28
    assert all(len({world_key(one) for one in batch}) == 1 for batch in batches)
    assert {one.name.partition(",")[0] for one in programs} == {"fuzz[1"}


def test_they_reach_what_they_aim_at(made: tuple[Steering, list[tuple[Scenario, ...]]]) -> None:
    steering, _ = made
    assert steering.made.hit > 0.9 * steering.made.aimed > 700
    assert steering.coverage.cells & universe(CPU).reachable == steering.coverage.cells & universe(CPU).reachable
    assert len(steering.coverage.cells & universe(CPU).reachable) > 2500


def test_all_of_the_vocabulary_is_used(made: tuple[Steering, list[tuple[Scenario, ...]]]) -> None:
    _, batches = made
    programs = [one for batch in batches for one in batch]
    ops = [op for one in programs for op in one.ops]
    assert {type(op) for op in ops} == {EntryOp, HostOp, InvlpgaOp, RunOp, UseOp, VmcbOp}
    guests = {one.guest for one in programs}
    assert guests > {"4-level", "5-level", "PAE", "32-bit"} and guests & {"off", "real"}  # cells name no paging once
    assert {one.nested for one in programs} >= {"4-level", "5-level", "PAE", "32-bit"}
    random = Random(1)
    drawn = {key[1] for cell in sorted(universe(CPU).reachable) if (key := place(cell, random)) is not None}
    assert drawn == {"4-level", "5-level", "PAE", "32-bit", "off"}, "the last is rare"
    assert {one.nested_page for one in programs} == {"4K", "2M", "4M", "1G", "none"}
    kinds = {probe.kind for op in ops if isinstance(op, RunOp) for probe in op.probes}
    assert len(kinds) > 50
    assert {op.cpl for op in ops if isinstance(op, RunOp)} == {0, 3}
    assert {op.field for op in ops if isinstance(op, VmcbOp)} > {
        "cr0", "cr3", "cr4", "efer", "ncr3", "asid", "tlb_control", "eventinj", "rflags", "intercept_exceptions"}
    hosts = {op.register for op in ops if isinstance(op, HostOp)}
    assert hosts >= {"gif", "nmi", "interrupt", "rflags"}, "what comes to L1 from outside"
    assert any(op.frame == "device" for op in ops if isinstance(op, EntryOp))
    assert {one.guest for one in programs for op in one.ops if isinstance(op, VmcbOp) and op.field == "eventinj"} > {
        "4-level", "PAE", "32-bit"}


def test_a_device_is_met_by_its_registers(made: tuple[Steering, list[tuple[Scenario, ...]]]) -> None:
    """What the page that became one is asked for then is what the model has of a local APIC."""
    _, batches = made
    met = [probe for batch in batches for one in batch for at, op in enumerate(one.ops)
           if isinstance(op, EntryOp) and op.frame == "device" for later in one.ops[at:] if isinstance(later, RunOp)
           for probe in later.probes if probe.target == op.entry.split(".")[1] and probe.offset in local_apic.WRITABLE]
    assert {probe.kind for probe in met} == {"read", "write"} and {probe.size for probe in met} == {4}


def test_each_can_be_written_and_read(made: tuple[Steering, list[tuple[Scenario, ...]]]) -> None:
    _, batches = made
    for one in islice((one for batch in batches for one in batch), 0, None, 7):
        (again,) = files.parse(writer.text(one), "x.toml", "x")
        assert replace(again, name=one.name, source="", lines=()) == one


def test_each_makes_sense_on_a_machine_as_well(
    made: tuple[Steering, list[tuple[Scenario, ...]]], image: Image, cpu: Cpu
) -> None:
    """Also where L1 has a second processor."""
    _, batches = made
    compiler, twin = Compiler(image, cpu), Twin(image, cpu, LIBERTIES)
    for batch in batches[::5]:
        for program in compiler.batch(batch):
            rehearse(twin, program)


def test_what_was_reached_is_not_aimed_at_again(image: Image) -> None:
    whole = Steering(image, 1)
    digest(whole, 12)
    first = {cell for cell in universe(CPU).reachable if cell in whole.coverage.cells}
    again = Steering(image, 1, first)
    digest(again, 12)
    new = again.coverage.cells - first
    assert len(new) > len(first) / 4


def digest(steering: Steering, batches: int, block: int = 0) -> str:
    """Of the first batches of a block."""
    texts = [writer.text(one) for batch in islice(steering.block(block), batches) for one in batch]
    return blake2b("".join(texts).encode(), digest_size=8).hexdigest()


_SCRIPT = """
from harness.machine import guests
from harness.steering import Steering
from tests.test_steering import digest
print(digest(Steering(guests.load_image(guests.build_l1()), 5), 6))
"""


def test_the_same_for_the_same_seed(image: Image) -> None:
    """In every process: nothing depends on the order of sets, nor on what was made before."""
    mine = digest(Steering(image, 5), 6)
    other = Steering(image, 6)
    assert digest(other, 6) != mine
    theirs = subprocess.run([sys.executable, "-c", _SCRIPT], cwd=ROOT, env={"PYTHONHASHSEED": "77", "PATH": "/usr/bin"},
                            capture_output=True, text=True, check=True).stdout.strip()
    assert theirs == mine
