"""Short cuts in the search for old translations: they find what the whole search finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.model import tlb
from harness.model.access import Access, Outcome, Reached
from harness.model.liberties import Caches, Liberties
from harness.model.memory import Words
from harness.model.registers import Cpu
from harness.model.tlb import Tlb
from harness.model.walk import Walk
from harness.scenario import sweepfiles
from harness.scenario.program import Compiler
from harness.sweeping import Plan
from harness.wire.image import Image
from tests.conftest import LIBRARY

CASES = 300
_CACHES = (Caches(), Caches(upper=False), Caches(nested=False), Caches(upper=False, over_vmrun=False))


def _shown(walk: Walk) -> int | Outcome:
    return walk.outcome.spa if isinstance(walk.outcome, Reached) else walk.outcome


class _Checked(Tlb):
    """Does each search twice; `seen` counts what came of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[bool, bool]] = Counter()

    def differs(self, words: Words, gva: int, access: Access, fresh: Walk) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tlb, "_parts", lambda log, gva, fresh, caches: True)
            whole = [self.stale(words, gva, access, fresh, caches) for caches in _CACHES]
        for caches, found in zip(_CACHES, whole, strict=True):
            assert found == self.stale(words, gva, access, fresh, caches)
            assert not found or self.parts(gva, fresh, caches)
        answer = super().differs(words, gva, access, fresh)
        assert answer == any(_shown(walk) != _shown(fresh) for walk in whole[0])
        self.seen[answer, bool(self.parts(gva, fresh))] += 1
        return answer


def _cases(names: Sequence[str]) -> Plan:
    return Plan([sweep for sweep in sweepfiles.load([LIBRARY]) if sweep.name in names], CASES)


def test_short_cuts(image: Image, cpu: Cpu) -> None:
    compiler, twin = Compiler(image, cpu), Twin(image, cpu, Liberties())
    twin.tlb = checked = _Checked()
    for batch in _cases(["sweeps/litmus-own", "sweeps/litmus-exit"]).batches():
        for scenario in batch:
            rehearse(twin, compiler.compile(scenario), expectations=False)
    assert all(count > 20 for count in checked.seen.values()) and len(checked.seen) == 3
