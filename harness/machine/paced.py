"""The rings of a machine that is held while it is far enough ahead.

L1 has no interrupts that could wake it, so it spins where it waits for the checker, and takes a core that another
machine, or its checker, could use. Where there is enough to check, or nothing to do, all of the machine is stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.wire.channel import Channel
from harness.wire.image import Image
from harness.wire.layout import RECORD, RECORD_SLOTS, RECORDS
from harness.wire.records import Record

_ENOUGH: Final = RECORD_SLOTS * 3 // 4
"""Records that are worth a stop, some hundredths of a second to check."""
_AT_A_SYNC: Final = 6
"""The same where L1 waits at a SYNC, and would not go on before all are checked."""
_FEW: Final = 2
"""With so many left it goes on: it is under way again when they are checked."""


class PacedChannel(Channel):
    """`stop` and `go_on` are the machine's; in strict lockstep L1 is never far enough ahead."""

    def __init__(self, memory: memoryview, image: Image, stop: Callable[[], None], go_on: Callable[[], None]) -> None:
        super().__init__(memory, image)
        self._stop, self._go_on, self._stopped = stop, go_on, False

    def post(self, ops: bytes) -> int:
        """See Channel.post."""
        end = super().post(ops)
        if self._stopped and self._words[self._record_posted] - self._checked <= _FEW:
            self._resume()
        return end

    def next_record(self, idle: Callable[[float], None]) -> Record:
        """See Channel.next_record."""
        posted = self._words[self._record_posted]
        ahead = posted - self._checked
        if self._stopped:
            if ahead <= _FEW:
                self._resume()
        elif ahead >= _ENOUGH or (ahead >= _AT_A_SYNC and self._is_sync(posted - 1)):
            self._pause()
        return super().next_record(idle)

    def rest(self) -> None:
        """There is nothing to do for a while; `post` ends that."""
        if not self._stopped and self._words[self._op_done] == self._posted:
            self._pause()

    def skip_to(self, slot: int, idle: Callable[[float], None], see: Callable[[Record], None]) -> None:
        """See Channel.skip_to."""
        self._resume()
        super().skip_to(slot, idle, see)

    def _pause(self) -> None:
        self._stopped = True
        self._stop()

    def _resume(self) -> None:
        self._stopped = False
        self._go_on()

    def _is_sync(self, number: int) -> bool:
        start = self._image.record_ring + number % RECORD_SLOTS * RECORD.size + RECORD.offsets["kind"]
        return int.from_bytes(self._memory[start : start + 4], "little") == RECORDS["SYNC"]
