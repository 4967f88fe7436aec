"""The two rings in the guest's memory: ops to L1, records from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from harness.wire.image import Image
from harness.wire.layout import MAGIC, OP, OP_SLOTS, RECORD, RECORD_SLOTS, SHARED
from harness.wire.records import Record

_AT: Final = SHARED.offsets
_SPINS: Final = 200
"""Looks at the ring before the processor is given away: a record takes microseconds to come."""

_YIELDING: Final = 100e-6
"""Seconds to go on looking, giving way to others, before sleeping: on a busy machine L1 needs the time."""
_NAP: Final = 50e-6

MAX_CHUNK: Final = OP_SLOTS // 2
"""Slots that one `post` may take."""


class Channel:
    """The checker's end of the rings. `memory` is the guest's, from sPA 0, live and writable."""

    def __init__(self, memory: memoryview, image: Image) -> None:
        self._memory = memory
        self._words = memory.cast("Q")
        self._image = image
        base = image.shared
        self._op_done = base + _AT["op_done"] >> 3
        self._op_posted = base + _AT["op_posted"] >> 3
        self._record_posted = base + _AT["record_posted"] >> 3
        self._record_checked = base + _AT["record_checked"] >> 3
        self._posted = 0
        self._checked = 0

    def hello(self) -> Mapping[str, int] | None:
        """What L1 says of itself and of its CPU, once it has come up; None before."""
        if self._words[self._image.shared >> 3] != MAGIC:
            return None
        return self._shared()

    def panic(self) -> str:
        """What L1 says if it took an exception itself; empty as long as all is well."""
        shared = self._shared()
        if not shared["panic_vector"]:
            return ""
        return (
            f"L1 took exception {shared['panic_vector'] - 1} at RIP {shared['panic_rip']:#x}, "
            f"error code {shared['panic_error']:#x}, CR2 {shared['panic_address']:#x}"
        )

    def _shared(self) -> dict[str, int]:
        return dict(zip(SHARED.names, SHARED.packer.unpack_from(self._memory, self._image.shared), strict=True))

    def set_lag(self, records: int) -> None:
        """How many records L1 may be ahead of the checker: 0 is strict lockstep."""
        self._words[self._image.shared + _AT["lag"] >> 3] = records

    def spare(self, on: bool = True) -> None:
        """L1 runs under a hypervisor: it is to do without what costs an exit where it can; or, for a while, not."""
        self._words[self._image.shared + _AT["sparing"] >> 3] = on

    @property
    def is_sparing(self) -> bool:
        """Whether L1 spares exits: it reads its own registers only where they may have changed."""
        return bool(self._words[self._image.shared + _AT["sparing"] >> 3])

    def has_room(self, slots: int) -> bool:
        """Whether ops of `slots` slots can be posted without waiting."""
        room = OP_SLOTS - (self._posted - self._words[self._op_done])
        return self._padding(slots) + slots <= room

    def post(self, ops: bytes) -> int:
        """Hand ops to L1; only after `has_room`. They are never split by the ring's end. Returns the number
        of the slot behind them, counted from the machine's start."""
        slots = len(ops) // OP.size
        assert slots <= MAX_CHUNK
        padding = self._padding(slots)
        if padding:
            self._put(bytes(padding * OP.size))
        self._put(ops)
        self._words[self._op_posted] = self._posted
        return self._posted

    def _padding(self, slots: int) -> int:
        at = self._posted % OP_SLOTS
        return OP_SLOTS - at if at + slots > OP_SLOTS else 0

    def _put(self, ops: bytes) -> None:
        start = self._image.op_ring + self._posted % OP_SLOTS * OP.size
        self._memory[start : start + len(ops)] = ops
        self._posted += len(ops) // OP.size

    def next_record(self, idle: Callable[[float], None]) -> Record:
        """Wait for the next record. `idle` is called, with the seconds waited so far, while there is
        none, and ends the wait by raising."""
        words, where, checked = self._words, self._record_posted, self._checked
        for _ in range(_SPINS):
            if words[where] != checked:
                return self._record(checked)
        start = time.monotonic()
        while words[where] == checked:
            waited = time.monotonic() - start
            if waited < _YIELDING:
                os.sched_yield()
            else:
                idle(waited)
                time.sleep(_NAP)
        return self._record(checked)

    def skip_to(self, slot: int, idle: Callable[[float], None], see: Callable[[Record], None]) -> None:
        """Release all records of ops before the one in `slot`, each when `see` has had a look. `idle` as
        for `next_record`."""
        start = time.monotonic()
        while True:
            done = self._words[self._op_done] >= slot
            if self._words[self._record_posted] != self._checked:
                record = self._record(self._checked)
                if record.op >= slot:
                    return
                see(record)
                self.release()
                start = time.monotonic()
            elif done:
                return
            else:
                idle(time.monotonic() - start)
                time.sleep(_NAP)

    def last_record(self) -> str:
        """The last record that was posted, in words."""
        posted = self._words[self._record_posted]
        return str(self._record(posted - 1)) if posted else "none"

    def _record(self, number: int) -> Record:
        start = self._image.record_ring + number % RECORD_SLOTS * RECORD.size
        return Record(self._memory[start : start + RECORD.size])

    def release(self) -> None:
        """The current record has been checked: L1 may go on, and use its slot again."""
        self._checked += 1
        self._words[self._record_checked] = self._checked

    def close(self) -> None:
        """Let go of the guest's memory."""
        self._words.release()
