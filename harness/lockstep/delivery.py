"""How L2 leaves, and how the delivery of an event reaches memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import UsageError
from harness.model import events
from harness.model.access import Access, NestedPageFault, PageFault, Reached
from harness.model.events import Event
from harness.model.vmcb import ExitCode
from harness.model.walk import Walk

if TYPE_CHECKING:
    from harness.lockstep.l2 import L2

_READ = Access(implicit=True)
_WRITE = Access(write=True, implicit=True)


class Leave(Exception):
    """L2 leaves: the exit's code, EXITINFO1 and 2, the walk that faulted, and the rule behind it.
    `event` is what was being delivered; `length` is that of the instruction, in bytes, where nRIP tells it."""

    def __init__(
        self, code: int, info1: int = 0, info2: int = 0, walk: Walk | None = None, rule: str = "",
        event: Event | None = None, length: int = 0,
    ) -> None:
        super().__init__(code)
        self.code, self.info1, self.info2 = code, info1, info2
        self.walk, self.rule, self.event = walk, rule, event
        self.length = length


class Bus:
    """Memory as a delivery sees it: implicit supervisor accesses, whatever the CPL."""

    def __init__(self, l2: L2, event: Event) -> None:
        self._l2, self._event = l2, event

    def load(self, gva: int) -> int:
        spa = self._reach(gva, _READ)
        return self._l2.state.memory.words[spa >> 3]

    def store(self, gva: int, value: int, free: int) -> None:
        spa = self._reach(gva, _WRITE)
        state, out = self._l2.state, self._l2.out
        state.changed(out, spa, state.memory.words[spa >> 3])
        state.memory.words[spa >> 3] = value
        if free:
            out.permitted[spa] = out.permitted.get(spa, 0) | free

    def _reach(self, gva: int, access: Access) -> int:
        walk = self._l2.access(gva, access)
        match walk.outcome:
            case Reached(spa, _):
                if gva & 7 or not self._l2.state.image.in_arena(spa):
                    raise UsageError(f"a delivery reaches sPA {spa:#x} through gVA {gva:#x}: no page of L2's own")
                return spa
            case NestedPageFault(code, gpa):
                raise Leave(ExitCode.NPF, code, gpa, walk, walk.rule, self._event)
            case PageFault(code, fault) if self._l2.intercepted(events.PF):
                raise Leave(ExitCode.EXCEPTION + events.PF, code, fault, walk, walk.rule, self._event)
            case outcome:
                raise UsageError(f"a delivery faults with {outcome}, which L1 does not intercept: double faults are "
                                 "not modelled")
