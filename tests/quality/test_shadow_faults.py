"""Entries of the tables that a real KVM built, spoilt in its memory while L1 stands still: the next audit must find
each, by its rule; and there is nothing to find before and behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from harness.errors import LaunchFailed
from harness.lockstep.audit import Audit, Sink
from harness.lockstep.compare import Context, Divergence
from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine import kernel, kvm_on_tcg
from harness.machine.l0_kvm import L0Kvm
from harness.model.backing import Kvm
from harness.model.entries import FRAME, NX, RW, US, A, P
from harness.scenario import files
from harness.scenario.program import Compiler
from harness.wire.layout import RECORDS
from harness.wire.records import Record
from tests.conftest import LIBRARY
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def kvm() -> Iterator[kvm_on_tcg.KvmOnTcgMachine]:
    try:
        kernel.find(None, None)
    except LaunchFailed as reason:
        pytest.skip(f"no kernel for L0: {reason}")
    with kvm_on_tcg.start(options=kvm_on_tcg.Options(audit=1)) as machine:
        yield machine


class Spoilt:
    """What KVM has at a moment, to be spoilt: entries are known by their hPAs, and put back behind the audit."""

    def __init__(self, l0: L0Kvm) -> None:
        self.kvm: Kvm = l0.look()
        self.words = l0.memory.words
        self.format = l0.shadow_format
        self._old: dict[int, int] = {}

    def put(self, at: int, entry: int) -> None:
        self._old.setdefault(at, self.words[at >> 3])
        self.words[at >> 3] = entry

    def put_back(self) -> None:
        for at, entry in self._old.items():
            self.words[at >> 3] = entry

    def entries(self, root: int, depth: int = 0) -> Iterator[tuple[int, int, int]]:
        """Level (0 for PTEs), hPA and value of all that are present, as the processor takes them."""
        level = self.format.levels[depth]
        for at in range(root, root + 4096, 8):
            entry = self.words[at >> 3]
            leaf = entry & level.leaf
            if not entry & P or entry & (level.reserved_leaf if leaf else level.reserved_table):
                continue
            yield len(self.format.levels) - 1 - depth, at, entry
            if not leaf:
                yield from self.entries(entry & FRAME, depth + 1)

    def leaf(self, wanted: Callable[[int], bool] = lambda entry: True) -> tuple[int, int]:
        """A PTE of L2's shadow: hPA and value."""
        return next((at, entry) for level, at, entry in self.entries(self.kvm.l2_root) if not level and wanted(entry))


def rights_added(spoilt: Spoilt) -> None:
    at, entry = spoilt.leaf(lambda entry: not entry & RW)
    spoilt.put(at, entry | RW)


def no_execute_lost(spoilt: Spoilt) -> None:
    at, entry = spoilt.leaf(lambda entry: bool(entry & NX))
    spoilt.put(at, entry & ~NX)


def uncached(spoilt: Spoilt) -> None:
    at, entry = spoilt.leaf()
    spoilt.put(at, entry | 1 << 4)


def frame_changed(spoilt: Spoilt) -> None:
    at, entry = spoilt.leaf()
    spoilt.put(at, entry ^ 0x1000)


def frame_of_l0(spoilt: Spoilt) -> None:
    """The first page of L0's memory, writable by L2."""
    at, entry = spoilt.leaf(lambda entry: bool(entry & RW))
    spoilt.put(at, entry & ~FRAME)


def leaf_more(spoilt: Spoilt) -> None:
    """A page that L1 does not map, beside one that it does."""
    at, entry = spoilt.leaf()
    empty = next(place for place in range(at & ~0xFFF, (at & ~0xFFF) + 4096, 8) if not spoilt.words[place >> 3])
    spoilt.put(empty, entry)


def table_changed(spoilt: Spoilt) -> None:
    """A PDE leads to the table of another."""
    (at, entry), *others = [(at, entry) for level, at, entry in spoilt.entries(spoilt.kvm.l2_root) if level == 1]
    other = next(another for _, another in others if (another ^ entry) & FRAME)
    spoilt.put(at, other)


def table_kept_no_more(spoilt: Spoilt) -> None:
    """A PDE leads to memory that is no table of KVM's, though the same is in it."""
    at, entry = next((at, entry) for level, at, entry in spoilt.entries(spoilt.kvm.l2_root) if level == 1)
    empty = next(page for page in range(0x100000, 1 << 28, 4096)
                 if not any(spoilt.words[page >> 3 : (page >> 3) + 512]))
    for offset in range(0, 4096, 8):
        if word := spoilt.words[(entry & FRAME) + offset >> 3]:
            spoilt.put(empty + offset, word)
    spoilt.put(at, entry & ~FRAME | empty)


def tracked_writable(spoilt: Spoilt) -> None:
    """In the direct map, the page or the large page that has a table of L1's."""
    for level, at, entry in spoilt.entries(spoilt.kvm.l1_root):
        if level == 1 and entry & spoilt.format.levels[-2].leaf and not entry & RW:
            spoilt.put(at, entry | RW)
            return
    at, entry = next((at, entry) for level, at, entry in spoilt.entries(spoilt.kvm.l1_root)
                     if not level and not entry & RW and entry & US)
    spoilt.put(at, entry | RW)


def beyond_the_slots(spoilt: Spoilt) -> None:
    """The direct map has, behind L1's memory, its last page once more."""
    *_, (at, entry) = ((at, entry) for level, at, entry in spoilt.entries(spoilt.kvm.l1_root)
                       if entry & spoilt.format.levels[-1 - level].leaf)
    table = at & ~0xFFF
    spoilt.put(next(place for place in range(table + 4088, table, -8) if not spoilt.words[place >> 3]), entry)


def direct_frame(spoilt: Spoilt) -> None:
    level, at, entry = next(one for one in spoilt.entries(spoilt.kvm.l1_root)
                            if one[2] & spoilt.format.levels[-1 - one[0]].leaf)
    spoilt.put(at, entry ^ 1 << spoilt.format.levels[-1 - level].shift)


FAULTS: dict[str, tuple[Callable[[Spoilt], None], set[str]]] = {
    "rights added": (rights_added, {"shadow.rights"}),
    "NX lost": (no_execute_lost, {"shadow.rights"}),
    "not write-back": (uncached, {"shadow.type"}),
    "the frame changed": (frame_changed, {"shadow.frame"}),
    "a frame of L0's own": (frame_of_l0, {"shadow.frame"}),
    "a leaf more": (leaf_more, {"shadow.frame"}),
    "another table": (table_changed, {"shadow.table"}),
    "a table that is not KVM's": (table_kept_no_more, {"shadow.table"}),
    "a table of L1's made writable": (tracked_writable, {"shadow.tracked"}),
    "more than the slots": (beyond_the_slots, {"shadow.direct"}),
    "another frame in the direct map": (direct_frame, {"shadow.direct"}),
}


class Spoiling(Audit):
    """At the record with the number `at`, from 0 on, before it is audited, `plant` spoils what KVM has."""

    at = -1
    plant: Callable[[Spoilt], None]

    def saw(self, sink: Sink, where: Context, record: Record) -> None:
        spoilt = Spoilt(self._l0)  # type: ignore[arg-type]
        if self.at == 0:
            type(self).plant(spoilt)
        self.at -= 1
        try:
            super().saw(sink, where, record)
        finally:
            spoilt.put_back()


def check(machine: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum], texts: list[str], audit: Audit) -> Result:
    twin = Twin(machine.image, machine.cpu, machine.liberties)
    lockstep = Lockstep(machine, machine.channel, twin, True, of_layers(errata, machine.identity.layers), audit=audit)
    (result,) = lockstep.run([Compiler(machine.image, machine.cpu).compile(one(*texts))])
    assert result.lost is None
    assert all(d.check == "C5" or d.erratum for d in result.divergences)
    return result


def audit_of(machine: kvm_on_tcg.KvmOnTcgMachine, kind: type[Audit] = Audit, every: int = 1) -> Audit:
    assert machine.kvm is not None
    return kind(machine.kvm, machine.memory, machine.cpu, every, machine.lost)


PROGRAM = ['entry = "nested.b.pte"\nset = ["nx"]\nclear = ["rw"]', run("read a; write a+8 = 1; read b"), run("read a"),
           run("read b+8")]


def found(result: Result) -> list[Divergence]:
    return [one for one in result.divergences if one.check == "C5"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", [1, 3], ids=["first #VMEXIT", "second"])
def test_a_fault_is_found(fault: str, at: int, kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]) -> None:
    plant, rules = FAULTS[fault]
    audit = audit_of(kvm, type("Spoils", (Spoiling,), {"at": at, "plant": staticmethod(plant)}))
    result = check(kvm, errata, PROGRAM, audit)
    assert result.shadow_audits == 6
    assert {one.rule for one in found(result)} == rules
    assert {one.op for one in found(result)} == {at // 2 + 1}, "at the next switch, and there alone"
    for divergence in found(result):
        marked = [line for line in divergence.events if line.startswith("> ")]
        assert len(marked) <= 1, "none where it is the root, or another direct map's"
        assert marked or divergence.rule == "shadow.tracked" or "root" in fault, divergence.events


def test_a_leaf_that_outlives_its_entry_is_stale(
    kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]
) -> None:
    """The shadow of page a is put back once L1 has taken the page away."""
    kept: list[tuple[int, int]] = []

    class Keeping(Audit):
        record = 0

        def saw(self, sink: Sink, where: Context, record: Record) -> None:
            spoilt = Spoilt(self._l0)  # type: ignore[arg-type]
            if self.record == 1:
                kept.extend((at, entry) for level, at, entry in spoilt.entries(spoilt.kvm.l2_root) if not level)
            elif self.record == 3:  # KVM took L1's write in at VMRUN
                for at, entry in kept:
                    if not spoilt.words[at >> 3]:
                        spoilt.put(at, entry)
            self.record += 1
            try:
                super().saw(sink, where, record)
            finally:
                spoilt.put_back()

    result = check(kvm, errata, [run("read a; read b"), 'entry = "nested.a.pte"\nclear = ["p"]', run("read a"),
                                 run("read b")], audit_of(kvm, Keeping))
    assert [(one.rule, one.op) for one in found(result)] == [("shadow.stale", 2)]


def test_bits_that_nobody_would_set(kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]) -> None:
    """A is cleared in all of L1's nested entries, behind KVM's back."""

    class Clearing(Audit):
        def saw(self, sink: Sink, where: Context, record: Record) -> None:
            words, cleared = kvm.memory.cast("Q"), []
            if record.kind == RECORDS["EXIT"]:
                for spa in range(where.tables.start, where.tables.end, 8):
                    if words[spa >> 3] & (A | P) == A | P:
                        words[spa >> 3] &= ~A
                        cleared.append(spa)
            super().saw(sink, where, record)
            for spa in cleared:
                words[spa >> 3] |= A

    result = check(kvm, errata, [run("read a")], audit_of(kvm, Clearing))
    assert {one.rule for one in found(result)} == {"shadow.ad"}


def test_one_in_n(kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]) -> None:
    result = check(kvm, errata, PROGRAM, audit_of(kvm, every=3))
    assert result.shadow_audits == 2 and found(result) == []


def test_the_librarys_sample_is_justified(kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]) -> None:
    """Every format and size of L1's table, and L2 without nested paging."""
    picked = [s for s in files.load([LIBRARY]) if s.name.startswith(("modes/nested", "split/", "flush/", "large/"))]
    by_file = {s.name.partition("[")[0]: s for s in picked}
    audit = audit_of(kvm)
    twin = Twin(kvm.image, kvm.cpu, kvm.liberties)
    lockstep = Lockstep(kvm, kvm.channel, twin, True, of_layers(errata, kvm.identity.layers), audit=audit)
    results = list(lockstep.run(map(Compiler(kvm.image, kvm.cpu).compile, by_file.values())))
    assert len(results) > 20 and sum(one.shadow_leaves for one in results) > 10_000
    for result in results:
        assert result.lost is None and found(result) == [], result.scenario
