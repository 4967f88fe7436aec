"""What was put to the test: the cells of `harness.model.coverage`, taken from predictions as they are checked."""

from __future__ import annotations

from typing import Final

from harness.lockstep.prediction import Prediction
from harness.model import events
from harness.model.coverage import Cell, cells_of, mode_of
from harness.model.events import Event
from harness.model.vmcb import ExitCode
from harness.model.walk import Paging

_MAX_SEEN: Final = 200_000
"""Walks that are remembered; with more of them it starts anew."""

_KINDS: Final = {
    events.INTERRUPT: "interrupt", events.NMI: "NMI", events.SOFTWARE: "software interrupt",
}
_RAISED: Final = {ExitCode.EXCEPTION + vector: name for vector, name in (
    (events.TS, "#TS"), (events.NP, "#NP"), (events.SS, "#SS"), (events.GP, "#GP"))}
_VECTORS: Final = {events.PF: "#PF", events.GP: "#GP"}


class Coverage:
    """Collects `cells`. A walk that was seen before costs a hash of it."""

    def __init__(self) -> None:
        self.cells: set[Cell] = set()
        self._seen: set[int] = set()
        self._paging: Paging | None = None
        self._hash = 0

    def add(self, prediction: Prediction, host_dr7: int) -> None:
        """Take the cells of one VMRUN. `host_dr7` is L1's DR7 at it."""
        if prediction.paging is None:
            self.cells.add(Cell(prediction.refused, "", "", "", "refused"))
        else:
            self._take(prediction, host_dr7, mode_of(prediction.paging))

    def add_again(self, manual: Prediction, agreed: Prediction, host_dr7: int) -> None:
        """Where a machine has known quirks, and its tables show them, the manual's prediction ends there at once:
        take also the cells of the one that `agreed`, but for those in another pair of modes."""
        if agreed.paging is not None:
            self._take(agreed, host_dr7, mode_of(manual.paging or agreed.paging))

    def _take(self, prediction: Prediction, host_dr7: int, mode: str) -> None:
        for paging, access, walk in prediction.accesses:
            if self._is_new(paging, access, walk.rule, *walk.trail) and mode_of(paging) == mode:
                self.cells.update(cells_of(paging, access, walk))
        left = prediction.paging
        assert left is not None
        seen = prediction.rule, prediction.exitcode, prediction.event, host_dr7 & 0xFF
        if self._is_new(left, *seen) and mode_of(left) == mode:
            self._exit(prediction, mode, host_dr7)

    def _is_new(self, paging: Paging, *rest: object) -> bool:
        if paging is not self._paging:
            self._paging, self._hash = paging, hash(paging)
        key = hash((self._hash, *rest))
        if key in self._seen:
            return False
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return True

    def _exit(self, prediction: Prediction, mode: str, host_dr7: int) -> None:
        outcome, event = ExitCode.describe(prediction.exitcode), prediction.event
        add = self.cells.add
        if prediction.rule == "exit.delivered":
            assert event is not None
            add(Cell("exit.delivered", "", "", mode, _described(event)))
        elif event is not None and prediction.rule == "exit.delivery":
            add(Cell("exit.delivery", "", "", "", f"{_described(event)} raises {_RAISED[prediction.exitcode]}"))
        elif event is not None and prediction.rule == "exit.double-fault":
            failed = "shutdown behind #DF" if event.vector == events.DF else f"#DF behind {_described(event)}"
            add(Cell("exit.double-fault", "", "", "", failed))
        elif event is not None:
            add(Cell("exit.delivered", "", "", mode, f"{_described(event)} cut short by {outcome}"))
        elif prediction.rule.startswith("exit."):
            add(Cell(prediction.rule, "", "", mode, outcome))
        add(Cell("exit.host", "", "", mode, "#VMEXIT"))
        add(Cell("exit.registers", "", "", mode, "#VMEXIT"))
        if host_dr7 & 0xFF:
            add(Cell("exit.host-dr7", "", "", mode, "#VMEXIT"))


def _described(event: Event) -> str:
    return _KINDS.get(event.kind) or _VECTORS.get(event.vector, "exception")
