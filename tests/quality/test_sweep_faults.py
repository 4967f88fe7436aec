"""Faults that show only where several things come together: no scenario of the library has them, a sweep has.

The machine is the model behind the real rings (tests/lockstep/fake.py), with one quirk more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Final

import pytest

from harness.lockstep import quirks
from harness.lockstep.quirks import Quirk
from harness.lockstep.twin import Twin
from harness.model.access import ErrorCode, NestedPageFault
from harness.model.entries import PS, A
from harness.model.registers import Cpu
from harness.model.walk import Paging, Walk
from harness.scenario import files, sweepfiles
from harness.scenario.cover import sequence
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler, Program, world_key
from harness.wire.image import Image
from tests.conftest import LIBRARY
from tests.lockstep.fake import run_on_fake
from tests.quality.test_vmrun_checks import PLANTED, Unchecked

BUDGET: Final = 2500
SAMPLE: Final = [files.read(path)[-1] for path in files.find([LIBRARY])]
"""One scenario of each file."""


def _no_smap(paging: Paging) -> Paging:
    """SMAP does not hold in five levels under a PAE L1 with WP off: never tried together."""
    pair = paging.guest and paging.nested and (paging.guest.name, paging.nested.name) == ("5-level", "PAE")
    return paging._replace(smap=False) if pair and not paging.wp else paging


def _write_lost(paging: Paging, walk: Walk) -> Walk:
    """#NPF does not report a write through a large page of five levels where L1 is in PAE mode."""
    guest = [entry for dimension, _, _, _, entry in walk.trail if dimension == "guest"]
    if not isinstance(walk.outcome, NestedPageFault) or not guest or not guest[-1] & PS:
        return walk
    if paging.nested is None or paging.nested.name != "PAE" or paging.guest is None or paging.guest.name != "5-level":
        return walk
    code, address = walk.outcome
    return walk._replace(outcome=NestedPageFault(code & ~ErrorCode.W, address))


def _accessed_lost(paging: Paging, walk: Walk) -> Walk:
    """A and D are not set in a large nested leaf of five levels behind a 4M page that was accessed before."""
    pair = paging.guest and paging.nested and (paging.guest.name, paging.nested.name) == ("32-bit", "5-level")
    leaf = [entry for dimension, _, _, _, entry in walk.trail if dimension == "guest"][-1:]
    if not pair or not leaf or not leaf[0] & PS or not leaf[0] & A or not walk.trail[-1][4] & PS:
        return walk
    return walk._replace(updates=walk.updates[:-1])


def _keys_lost(paging: Paging) -> Paging:
    """Keys do not hold where SMAP does and L1 is in PAE mode."""
    return paging._replace(pkru=0) if paging.smap and paging.nested and paging.nested.name == "PAE" else paging


FAULTS: Final = {
    "keys by SMAP and L1's mode": ("sweeps/implicit", Quirk(paging=_keys_lost)),
    "SMAP by pair of modes": ("sweeps/joint", Quirk(paging=_no_smap)),
    "W of #NPF by page size and mode": ("sweeps/joint", Quirk(walk=_write_lost)),
    "A and D by modes, size and what was set": ("sweeps/ad", Quirk(walk=_accessed_lost)),
}


def _found(image: Image, cpu: Cpu, twin: Twin, programs: Iterable[Program]) -> Iterator[str]:
    for result in run_on_fake(image, cpu, twin, programs, Unchecked(), strict=False):
        assert result.lost is None
        if result.divergences:
            yield result.scenario


@pytest.mark.parametrize("name", FAULTS)
def test_only_a_sweep_finds_it(
    name: str, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    which, quirk = FAULTS[name]
    monkeypatch.setitem(quirks.QUIRKS, PLANTED, quirk)
    assert list(_found(image, cpu, twin, map(compiler.compile, SAMPLE))) == []
    (sweep,) = (sweep for sweep in sweepfiles.load([LIBRARY]) if sweep.name == which)
    cases = [sweep.scenario(case) for _, case in islice(sequence(sweep.space, 0), BUDGET)]

    def programs(cases: list[Scenario]) -> Iterator[Program]:
        for batch in [list(batch) for _, batch in groupby(sorted(cases, key=world_key), key=world_key)]:
            yield from compiler.batch(batch)

    found = list(_found(image, cpu, twin, programs(cases)))
    assert 0 < len(found) < BUDGET / 10
    assert all(one.startswith(f"{which}[") for one in found)
    alone = sweep.scenario(sweep.case(found[0]))
    assert list(_found(image, cpu, twin, [compiler.compile(alone)])) == [found[0]]
