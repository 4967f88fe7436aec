"""Which of the permitted walks a machine took, where its TLB leaves a choice."""

from __future__ import annotations

from collections.abc import Callable

from harness.lockstep.prediction import Prediction
from harness.lockstep.state import State
from harness.model.access import Access, Reached
from harness.model.dirty import Update
from harness.model.liberties import WIDEST
from harness.model.tlb import UPGRADE
from harness.model.walk import Walk


def choose(
    state: State, out: Prediction, gva: int, access: Access, fresh: Walk, index: int, fits: Callable[[int], bool] | None
) -> tuple[Walk, list[Update]]:
    """The walk that probe `index` makes, which would be `fresh` by the tables as they are; and bits that it may set.

    With a record to go by it is the first whose sPA `fits` what the probe returned or wrote; without one, or where
    the probe faulted, it is `fresh`: faults are those of the tables as they are (section 5.5.3)."""
    tlb, words = state.tlb, state.memory.words
    others = tlb.stale(words, gva, access, fresh)
    if any(_seen(walk) != _seen(fresh) for walk in others):
        out.ambiguous.add(index)
    if state.caches != WIDEST:
        others = tlb.stale(words, gva, access, fresh, state.caches) if others or state.caches.ignores else []
    if not others:
        return fresh, []
    out.stale.setdefault(index, []).extend(others)
    taken = fresh
    if fits is not None:
        taken = next((walk for walk in (fresh, *others)
                      if isinstance(walk.outcome, Reached) and fits(walk.outcome.spa)), fresh)
    elif state.seen is not None and UPGRADE in state.caches.ignores:
        taken = next((walk for walk in others if not isinstance(walk.outcome, Reached)), fresh)
    if _seen(taken) != _seen(fresh):
        out.taken.add(index)
    alike = [set(walk.updates) for walk in (fresh, *others) if _seen(walk) == _seen(taken)]
    always = set.intersection(*alike)
    return (taken._replace(updates=[update for update in taken.updates if update in always]),
            sorted(set.union(*alike) - always))


def _seen(walk: Walk) -> object:
    """Of an outcome what shows: by which gPA an sPA was reached does not."""
    return walk.outcome.spa if isinstance(walk.outcome, Reached) else walk.outcome


def written(state: State, spa: int, value: int, width: int) -> bool:
    """Whether the machine is seen to have left `value` in the `width` bytes at `spa`."""
    assert state.seen is not None
    for at in range(spa, spa + width):
        quadword = state.seen.diffs.get(at & ~7, state.memory.words[at >> 3])
        if quadword >> 8 * (at & 7) & 0xFF != value >> 8 * (at - spa) & 0xFF:
            return False
    return True
