"""How L2's accesses are translated: by the model's walk, or by what a TLB may hold; and the accessed and dirty bits of
that, those that must be set and those that may."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness.errors import UsageError
from harness.lockstep import stale
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import NESTED_FORMAT_BY_L2
from harness.lockstep.state import State
from harness.model import dirty, local_apic
from harness.model.access import Access, ErrorCode, Reached
from harness.model.dirty import Update
from harness.model.vmcb import ExitCode
from harness.model.vmrun import Registers
from harness.model.walk import Paging, Walk, translate


def joined(walks: list[Walk]) -> Walk:
    """The walks of one access that touches two pages, as one: with the first one's outcome, or the fault."""
    if len(walks) == 1:
        return walks[0]
    decided = next((walk for walk in walks if not isinstance(walk.outcome, Reached)), walks[0])
    return decided._replace(
        trail=[step for walk in walks for step in walk.trail],
        updates=[update for walk in walks for update in walk.updates],
    )


class Translation:
    """Of one run of L2 by VMRUN: `regs` are L2's as they are, `paging` what they make of its translation."""

    def __init__(self, state: State, out: Prediction, regs: Registers) -> None:
        self.state, self.out, self.regs = state, out, regs
        self.paging: Paging = state.paging(regs)
        self.writes: int | None = None
        """What the probe at hand will write, where that does not depend on what it reads there."""
        self.reads_first = False
        """Whether it is at the first half of a read-modify-write that is made of two accesses."""

    def access(self, gva: int, access: Access) -> Walk:
        """Translate, and write accessed and dirty bits back."""
        walk = self.walk(gva, access)
        self._note(walk)
        return walk

    def walk(self, gva: int, access: Access) -> Walk:
        """Translate, and change nothing. Raises UsageError if the walk leaves L1's memory."""
        quirks = self.state.quirks
        if quirks:
            access = quirks.on_access(access, self.regs.cpl)
        try:
            walk = translate(self.paging, self.state.memory.words, gva, access)
        except IndexError:
            raise UsageError(f"the walk of gVA {gva:#x} leaves L1's memory") from None
        if quirks:
            walk = quirks.on_walk(self.paging, walk)
            kept, seen = self.state.kept, self.state.seen
            if (kept is not None and seen is not None and seen.next_probe == self.out.next_probe
                    and seen.exitcode == ExitCode.NPF and seen.fault_code & ErrorCode.PK):
                # not asked where the shadow has what an access before put there: see kept_format
                keyed = kept.keyed(self.paging, walk, access, self.state.host.pkru)
                if keyed is not walk and quirks.has(NESTED_FORMAT_BY_L2):
                    walk = keyed
        self.out.accesses.append((self.paging, access, walk))
        return walk

    def _note(self, walk: Walk, other_faulted: bool = False) -> None:
        """Write the accessed and dirty bits of `walk` back."""
        state, out = self.state, self.out
        faulted = not isinstance(walk.outcome, Reached)
        required, permitted = dirty.resolve(walk.updates, faulted, state.liberties, other_faulted)
        for address, old in dirty.write_back(state.memory.words, required).items():
            state.changed(out, address, old)
        self._permit(permitted)

    def _permit(self, updates: Iterable[Update]) -> None:
        """Bits that may be set or not."""
        state, out = self.state, self.out
        for address, bits, _ in updates:
            quadword = address & ~7  # two entries of 32-bit paging are one
            state.changed(out, quadword, state.memory.words[quadword >> 3])
            out.permitted[quadword] = out.permitted.get(quadword, 0) | bits << (address & 4) * 8

    def _own_memory(self, walk: Walk, what: str) -> int:
        assert isinstance(walk.outcome, Reached)
        spa = walk.outcome.spa
        image = self.state.image
        if not image.in_data(spa) and not image.in_arena(spa) and not local_apic.has(spa):
            raise UsageError(f"{what} reaches sPA {spa:#x}, which is no page of tables or data, nor the local APIC")
        return spa

    def _cached(
        self, gva: int, access: Access, index: int, fits: Callable[[int], bool], more: bool = False
    ) -> Walk:
        """Translate for probe `index`, as `walk`; a TLB may make more than one outcome permitted, of which that is
        taken which `fits` what the machine is seen to have done."""
        walk = self.walk(gva, access)
        if not (self.state.tlb.changed or self.state.caches.ignores):
            return walk
        seen = self.state.seen
        done = seen is not None and (index < seen.next_probe or (self.reads_first and seen.fault_code & ErrorCode.W))
        taken, optional = stale.choose(self.state, self.out, gva, access, walk, index, fits if done else None, more)
        self._permit(optional)
        return taken

    def _seen_result(self, index: int) -> int:
        assert self.state.seen is not None
        return self.state.seen.result(index)

    def _fits(self, index: int, at: int, width: int, write: bool, spa: int) -> bool:
        """Whether the machine may have done its access at `spa`, by what it returned or what it wrote."""
        if write and self.writes is not None:
            return stale.written(self.state, spa, self.writes >> 8 * at, width)
        assert self.state.seen is not None
        if index >= self.state.seen.next_probe:
            return True  # the second half faulted, and nothing was returned
        part = self._seen_result(index) >> 8 * at & (1 << 8 * width) - 1
        return part == self.state.memory.read(spa, width)
