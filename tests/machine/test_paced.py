"""A machine that is held while it is far enough ahead, against a peer that is a few lines of Python."""

from __future__ import annotations

import pytest

from harness.machine.paced import PacedChannel
from harness.wire.layout import RECORD_SLOTS, RECORDS
from harness.wire.records import Record
from tests.wire.test_channel import IMAGE, Peer, give_up


class Machine:
    """Takes down each stop and each going on; one that is stopped posts nothing."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.running, self.stops = True, 0
        self.channel = PacedChannel(self.peer.memory, IMAGE, self.stop, self.go_on)

    def stop(self) -> None:
        self.running = False
        self.stops += 1

    def go_on(self) -> None:
        self.running = True

    def runs(self) -> bool:
        return self.running

    def posts(self, *kinds: str) -> None:
        assert self.running
        for kind in kinds:
            self.peer.post(kind=RECORDS[kind])

    def checks(self, records: int) -> list[bool]:
        """Take so many; whether the machine ran meanwhile, for each."""
        ran = []
        for _ in range(records):
            self.channel.next_record(give_up)
            ran.append(self.running)
            self.channel.release()
        return ran


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_a_full_ring(machine: Machine) -> None:
    """It stands still until nearly all is checked, and does no harm to what comes next."""
    machine.posts(*["EXIT"] * RECORD_SLOTS)
    assert machine.checks(RECORD_SLOTS) == [False] * (RECORD_SLOTS - 2) + [True] * 2
    machine.posts("ENTER")
    assert machine.checks(1) == [True] and machine.stops == 1


def test_half_a_ring(machine: Machine) -> None:
    machine.posts(*["EXIT"] * (RECORD_SLOTS // 2))
    assert all(machine.checks(RECORD_SLOTS // 2))


def test_a_sync(machine: Machine) -> None:
    """L1 waits there until all is checked."""
    machine.posts(*["ENTER", "EXIT"] * 5, "SYNC")
    assert machine.checks(11) == [False] * 9 + [True] * 2


def test_lockstep(machine: Machine) -> None:
    for kind in ("ENTER", "EXIT", "SYNC"):
        machine.posts(kind)
        assert machine.checks(1) == [True]
    assert not machine.stops


def test_nothing_to_do(machine: Machine) -> None:
    """It rests until something is posted, and only if all is done."""
    machine.channel.post(bytes(8 * 32))
    machine.channel.rest()
    assert machine.runs()
    machine.peer.take()
    machine.channel.rest()
    assert not machine.runs()
    machine.channel.post(bytes(8 * 32))
    assert machine.runs()


def test_skipping(machine: Machine) -> None:
    """What is skipped must come: it goes on."""
    machine.channel.post(bytes(8 * 32))
    machine.posts(*["EXIT"] * RECORD_SLOTS)
    machine.channel.next_record(give_up)
    assert not machine.runs()
    machine.peer.take()
    skipped: list[Record] = []
    machine.channel.skip_to(8, give_up, skipped.append)
    assert machine.runs() and len(skipped) == RECORD_SLOTS
