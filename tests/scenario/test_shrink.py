"""Smaller scenarios: what can be left out, and that there is an end of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest

from harness.scenario import files, writer
from harness.scenario.ops import EntryOp, HostOp, RunOp, Scenario, UseOp, VmcbOp
from harness.scenario.shrink import bare, candidates, cost
from tests.conftest import LIBRARY
from tests.scenario.texts import one, run

CLEAR = 'entry = "nested.a.pte"\nclear = ["rw"]'


def shrunk(scenario: Scenario, shows: Callable[[Scenario], bool]) -> Scenario:
    """The first candidate that `shows`, of that the first, and so on."""
    current = bare(scenario)
    assert shows(current)
    while (smaller := next(filter(shows, candidates(current)), None)) is not None:
        current = smaller
    return current


def ops_of(scenario: Scenario) -> list[str]:
    return writer.text(scenario).split("\n\n[[op]]\n")[1:]


SAMPLE = [files.read(path)[-1] for path in files.find([LIBRARY])]


@pytest.mark.parametrize("scenario", SAMPLE[::17], ids=lambda scenario: scenario.name)
def test_candidates_cost_less_and_can_be_written(scenario: Scenario) -> None:
    """And each is another, in the same order each time; a file of it is read as what it is."""
    plain = bare(scenario)
    found = list(islice(candidates(plain), 150))
    assert found == list(islice(candidates(plain), 150)) and len(set(found)) == len(found)
    assert plain not in found
    for smaller in found:
        assert cost(smaller) < cost(plain) and smaller.ops
        (again,) = files.parse(writer.text(smaller), "shrunk.toml", smaller.name)
        assert bare(again) == bare(smaller)


def test_all_that_is_needed_is_left() -> None:
    """Of twelve ops in an odd world: the one that changes the entry, and the write."""
    scenario = one(
        'host = "cr4"\nset = ["smep"]', 'vmcb = "cr0"\nclear = ["wp"]', run("read a; read b+0x123; fetch c", 3),
        'entry = "nested.d.pde"\nset = ["nx", "bit52"]', 'entry = "nested.c.pte"\nvalue = 0xFEE00567\nframe = "d"',
        "use = 3", 'entry = "nested.b.pte"\nset = ["pwt"]\nclear = ["rw", "us", "a"]', 'invlpga = "c"\nasid = 5',
        run("rmw4 b+0x7f8 = 0x77; push d; rdcr2", 3), "use = 2", 'vmcb = "asid"\nvalue = 6', run("write a"),
        head='guest = "5-level"\nnested = "PAE"\nguest_page = "2M"\ntable_page = "2M"\n',
    )

    def shows(candidate: Scenario) -> bool:
        done = False
        for op in candidate.ops:
            if isinstance(op, EntryOp) and "rw" in op.change.clear:
                done = True
            if isinstance(op, RunOp) and done and any(p.kind in ("write", "rmw") for p in op.probes):
                return True
        return False

    small = shrunk(scenario, shows)
    assert ops_of(small) == ['entry = "nested.a.pte"\nclear = ["rw"]', 'run = ["write a"]\n']
    assert (small.guest, small.nested, small.guest_page, small.nested_page, small.table_page) == (
        "4-level", "4-level", "4K", "4K", "4K")
    assert small.name == scenario.name


def test_expectations_and_places_in_files_are_left_out() -> None:
    plain = bare(one(CLEAR, run("write a") + '\nexpect = ["#NPF 0x100000007"]'))
    assert plain.source == "" and plain.lines == ()
    assert [op.expect for op in plain.ops if isinstance(op, RunOp)] == [()]


class TestEach:
    """One kind of change at a time, where nothing else may go."""

    def only(self, scenario: Scenario, holds: Callable[[Scenario], bool]) -> list[str]:
        return ops_of(shrunk(scenario, holds))

    def test_probes(self) -> None:
        found = self.only(one(run("read a; write a; read b; write b; fetch c")),
                          lambda s: any("write b" in op for op in ops_of(s)))
        assert found == ['run = ["write b"]\n']

    def test_a_leaf_stays_a_leaf(self) -> None:
        """Where pages are of another size, another entry maps them."""
        scenario = one('entry = "guest.a.pde"\nset = ["nx"]', "fetch a", head='guest_page = "2M"\n')
        leaf = {"4K": "pte", "2M": "pde", "4M": "pde", "1G": "pdpte"}
        small = shrunk(scenario, lambda s: any(
            isinstance(op, EntryOp) and op.entry.endswith(f".{leaf[s.guest_page]}") for op in s.ops))
        assert small.guest_page == "4K" and ops_of(small) == ['entry = "guest.a.pte"\nset = ["nx"]\n']

    def test_the_root_stays_the_root(self) -> None:
        scenario = one('entry = "nested.pt.pml5e"\nclear = ["us"]', "read a", head='nested = "5-level"\n')
        root = {"4-level": "pml4e", "5-level": "pml5e", "PAE": "pdpte", "32-bit": "pde"}
        small = shrunk(scenario, lambda s: any(
            isinstance(op, EntryOp) and op.entry.endswith(f".{root[s.nested]}") for op in s.ops))
        assert small.nested == "4-level" and ops_of(small) == ['entry = "nested.pt.pml4e"\nclear = ["us"]\n']

    def test_sizes_that_a_mode_has_not(self) -> None:
        scenario = one("read a", head='guest = "32-bit"\nguest_page = "4M"\n')
        assert any(s.guest == "4-level" and s.guest_page == "4K" for s in candidates(bare(scenario)))
        for candidate in candidates(bare(scenario)):
            files.parse(writer.text(candidate), "shrunk.toml", "shrunk")  # raises for what no world is of

    def test_vmcbs(self) -> None:
        scenario = one("read a", "use = 7", "read b", "use = 4", "read c")
        two = shrunk(scenario, lambda s: len({op.number for op in s.ops if isinstance(op, UseOp)}) == 2)
        assert [op.number for op in two.ops if isinstance(op, UseOp)] == [2, 1]

    def test_values(self) -> None:
        scenario = one('vmcb = "dr7"\nvalue = 0xFFFF0455', "read a")
        small = shrunk(scenario, lambda s: any(
            isinstance(op, VmcbOp) and (op.change.value or 0) & 1 << 18 for op in s.ops))
        assert ops_of(small) == ['vmcb = "dr7"\nvalue = 0x40000\n']

    def test_bits(self) -> None:
        scenario = one('host = "cr4"\nset = ["smep", "smap", "pge"]\nclear = ["de"]', "read a")
        small = shrunk(scenario, lambda s: any(isinstance(op, HostOp) and "smap" in op.change.set for op in s.ops))
        assert ops_of(small) == ['host = "cr4"\nset = ["smap"]\n']

    def test_pages(self) -> None:
        """Two pages that must differ are the first two, wherever they are named."""
        scenario = one('entry = "guest.d.pte"\nframe = "c"\nclear = ["rw"]',
                       "write guest.d.pte = &guest.d.pte@c+nx")
        small = shrunk(scenario, lambda s: any(
            isinstance(op, EntryOp) and op.frame not in (None, op.entry.split(".")[1]) for op in s.ops)
            and [str(p).count("guest") for op in s.ops if isinstance(op, RunOp) for p in op.probes] == [2])
        assert ops_of(small) in (
            ['entry = "guest.b.pte"\nframe = "a"', 'run = ["write guest.b.pte = &guest.b.pte@a+nx"]\n'],
            ['entry = "guest.a.pte"\nframe = "b"', 'run = ["write guest.a.pte = &guest.a.pte@b+nx"]\n'],
        )

    @pytest.mark.parametrize(
        ("probe", "plain"),
        [
            ("read2 b+0x7fe", "read a"), ("rmw8 c+0x18 = 0x1234", "read a"), ("push d+0x30 = 1", "read a"),
            ("read 0x7fffffffffff", "read a"), ("fetch a+0x20", "read a"), ("rdcr2", "rdcr2"),
        ],
    )
    def test_probes_are_made_plain(self, probe: str, plain: str) -> None:
        small = shrunk(one(run(probe, 3)), lambda s: any(isinstance(op, RunOp) and op.probes for op in s.ops))
        assert ops_of(small) == [f'run = ["{plain}"]\n']

    def test_a_probe_keeps_what_it_needs(self) -> None:
        crossing = one(run("write4 c+0xffe = 0xFFFF"))
        small = shrunk(crossing, lambda s: any(
            p.size == 4 and p.offset % 0x1000 > 0xFFC for op in s.ops if isinstance(op, RunOp) for p in op.probes))
        assert ops_of(small) == ['run = ["read4 a+0xffe"]\n']

    def test_merged(self) -> None:
        scenario = one(CLEAR, 'entry = "nested.a.pte"\nset = ["nx"]', "read a", run("fetch a"))

        def shows(s: Scenario) -> bool:
            changes = [op.change for op in s.ops if isinstance(op, EntryOp)]
            probes = [str(p) for op in s.ops if isinstance(op, RunOp) for p in op.probes]
            return any(c.clear for c in changes) and any(c.set for c in changes) and probes == ["read a", "fetch a"]

        assert ops_of(shrunk(scenario, shows)) == [
            'entry = "nested.a.pte"\nset = ["nx"]\nclear = ["rw"]', 'run = ["read a", "fetch a"]\n']

    def test_the_second_processor(self) -> None:
        scenario = one('entry = "guest.a.pte"\nframe = "b"\nby = "second"', "remotenmi; read a")
        small = shrunk(scenario, lambda s: len(s.ops) == 2)
        assert not any(isinstance(op, EntryOp) and op.second for op in small.ops)


def test_it_ends() -> None:
    """Where all of them show it, it comes to the least that there is."""
    for scenario in SAMPLE[::29]:
        assert len(shrunk(replace(scenario, name="x"), lambda candidate: True).ops) == 1
