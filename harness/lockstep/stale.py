"""Which of the permitted walks a machine took, where its TLB leaves a choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.lockstep.prediction import Prediction
from harness.lockstep.state import State
from harness.model import events
from harness.model.access import Access, ErrorCode, NestedPageFault, PageFault, Reached
from harness.model.dirty import Update
from harness.model.tlb_events import UPGRADE
from harness.model.vmcb import ExitCode
from harness.model.walk import Walk
from harness.wire.records import Record


def choose(
    state: State, out: Prediction, gva: int, access: Access, fresh: Walk, index: int,
    fits: Callable[[int], bool] | None, more: bool = False,
) -> tuple[Walk, list[Update]]:
    """The walk that probe `index` makes, which would be `fresh` by the tables as they are; and bits that it may set.

    With a record to go by it is the first whose sPA `fits` what the probe returned or wrote, or, where the probe
    faulted, the first that has that fault: where `more` of the access follows, in a page that may have faulted instead,
    one that reached its page; without one it is `fresh`. Others are only looked for in a `search`."""
    tlb, words = state.tlb, state.memory.words
    if tlb.differs(words, gva, access, fresh):
        out.ambiguous.add(index)
    if not state.search:
        out.unsearched = out.unsearched or tlb.parts(gva, fresh, state.caches)
        return fresh, []
    others = tlb.stale(words, gva, access, fresh, state.caches)
    if not others:
        return fresh, []
    out.stale.setdefault(index, []).extend(others)
    taken = fresh
    if fits is not None:
        taken = next((walk for walk in (fresh, *others)
                      if isinstance(walk.outcome, Reached) and fits(walk.outcome.spa)), fresh)
    elif state.seen is not None and not isinstance(fresh.outcome, Reached):
        faults = [walk for but in (0, ErrorCode.P) for walk in (fresh, *others) if _is_fault(walk, state.seen, but)]
        through = (walk for walk in others if more and isinstance(walk.outcome, Reached))
        taken = next(iter(faults), next(through, fresh))
    elif state.seen is not None and UPGRADE in state.caches.ignores:
        taken = next((walk for walk in others if not isinstance(walk.outcome, Reached)), fresh)
    if _seen(taken) != _seen(fresh):
        out.taken.add(index)
    return _alike(taken, (fresh, *others))


def own(state: State, gva: int, access: Access, fresh: Walk) -> tuple[Walk, list[Update]]:
    """The same for an access that L2 makes on its own account, to its code or its mailbox: it reaches it if it may."""
    walks = [fresh, *state.tlb.stale(state.memory.words, gva, access, fresh, state.caches)]
    return _alike(next((walk for walk in walks if isinstance(walk.outcome, Reached)), fresh), walks)


def _alike(taken: Walk, walks: Sequence[Walk]) -> tuple[Walk, list[Update]]:
    """`taken` with the bits that all of `walks` set that come to the same; and those that only some of them do."""
    alike = [set(walk.updates) for walk in walks if _seen(walk) == _seen(taken)]
    always = set.intersection(*alike)
    return (taken._replace(updates=[update for update in taken.updates if update in always]),
            sorted(set.union(*alike) - always))


def _is_fault(walk: Walk, seen: Record, but: int) -> bool:
    """Whether the walk ended in the exit that was seen, `but` for bits of the code that a machine may have wrong."""
    match walk.outcome:
        case NestedPageFault(code, address):
            exitcode = ExitCode.NPF
        case PageFault(code, address):
            exitcode = ExitCode.EXCEPTION + events.PF
        case _:
            return False
    return (exitcode, address) == (seen.exitcode, seen.fault_address) and not (code ^ seen.fault_code) & ~but


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
