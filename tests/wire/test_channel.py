"""The rings, from the checker's end, against a peer that is a few lines of Python."""

from __future__ import annotations

import struct

import pytest

from harness.wire import layout
from harness.wire.channel import MAX_CHUNK, Channel
from harness.wire.image import Image, Region
from harness.wire.layout import MAGIC, OP, OP_SLOTS, PROTOCOL, RECORD, RECORD_SLOTS, SHARED
from harness.wire.program import Step, WireProbe, encode
from harness.wire.records import Record

OP_RING = 0x1000
RECORD_RING = OP_RING + OP_SLOTS * OP.size
IMAGE = Image(
    ram_end=RECORD_RING + RECORD_SLOTS * RECORD.size, low_end=1 << 31, shared=0, op_ring=OP_RING,
    record_ring=RECORD_RING, mailbox=0, mirror_offset=0, stubs={},
    **dict.fromkeys(("vmcbs", "arena", "data", "low_vmcbs", "low_arena", "low_data"), Region(0, 0)),
)


class Peer:
    """L1's end: takes ops as the guest's interpreter does, and posts records."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(IMAGE.ram_end))
        self.done = 0
        self.posted = 0

    def field(self, name: str) -> int:
        return int(struct.unpack_from("<Q", self.memory, SHARED.offsets[name])[0])

    def set(self, name: str, value: int, fmt: str = "<Q") -> None:
        struct.pack_into(fmt, self.memory, SHARED.offsets[name], value)

    def take(self) -> list[tuple[int, ...]]:
        """All ops that are there, with their probes; padding left out."""
        out: list[tuple[int, ...]] = []
        while self.field("op_posted") != self.done:
            at = OP_RING + self.done % OP_SLOTS * OP.size
            op = OP.packer.unpack_from(self.memory, at)
            slots = 1
            if op[0] == layout.OPS["RUN"]:
                slots += op[1]
                assert self.done % OP_SLOTS + slots <= OP_SLOTS, "a RUN op is split by the ring's end"
            if op[0]:
                out.append(op)
            self.done += slots
            assert self.done <= self.field("op_posted")
        self.set("op_done", self.done)
        return out

    def post(self, **fields: int) -> None:
        at = RECORD_RING + self.posted % RECORD_SLOTS * RECORD.size
        self.memory[at : at + RECORD.size] = bytes(RECORD.size)
        for name, value in ({"kind": 1, "sequence": self.posted} | fields).items():
            kind = next(f.type for f in RECORD.fields if f.name == name)
            struct.pack_into({"u32": "<I", "u64": "<Q"}[kind], self.memory, at + RECORD.offsets[name], value)
        self.posted += 1
        self.set("record_posted", self.posted)


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def channel(peer: Peer) -> Channel:
    return Channel(peer.memory, IMAGE)


class Waited(Exception):
    pass


def give_up(waited: float) -> None:
    raise Waited(waited)


def test_hello(peer: Peer, channel: Channel) -> None:
    assert channel.hello() is None
    peer.set("protocol", PROTOCOL + 1, "<I")
    peer.set("maxphyaddr", 40, "<I")
    assert channel.hello() is None  # the magic is written last
    peer.set("magic", MAGIC)
    hello = channel.hello()
    assert hello is not None and (hello["protocol"], hello["maxphyaddr"]) == (PROTOCOL + 1, 40)


def test_panic(peer: Peer, channel: Channel) -> None:
    assert channel.panic() == ""
    peer.set("panic_vector", 14 + 1, "<I")
    peer.set("panic_error", 2)
    peer.set("panic_rip", 0x100123)
    peer.set("panic_address", 0xDEAD000)
    text = channel.panic()
    assert all(part in text for part in ("exception 14", "0x100123", "error code 0x2", "CR2 0xdead000"))
    peer.set("panic_vector", 1, "<I")
    assert "exception 0 " in channel.panic()


def test_lag(peer: Peer, channel: Channel) -> None:
    channel.set_lag(255)
    assert peer.field("lag") == 255


def test_ops_arrive_in_order(peer: Peer, channel: Channel) -> None:
    channel.post(encode([Step("WATCH", a=0x1000), Step("WRITE", 8, 0x2000, 7)]))
    channel.post(encode([Step("SYNC")]))
    assert [op[0] for op in peer.take()] == [2, 3, 6]
    assert peer.take() == []


def test_ring_wraps_and_never_splits_a_post(peer: Peer, channel: Channel) -> None:
    """Posts of every size, many times around: all arrive, in order, whole."""
    number, sent, got = 0, 0, 0
    sizes = [1, 33, 7, MAX_CHUNK, 4097, MAX_CHUNK - 1, 2]
    seen: list[int] = []
    while sent < 6 * OP_SLOTS:
        probes = tuple(WireProbe("read", 8, 0, 0) for _ in range(min(sizes[number % 7] - 1, 32)))
        steps = [Step("WRITE", 8, number, n) for n in range(sizes[number % 7] - 1 - len(probes))]
        ops = encode([*steps, Step("RUN", len(probes), number, probes=probes)])
        while not channel.has_room(len(ops) // 32):
            taken = peer.take()
            assert taken, "no room, and nothing to take"
            seen += [op[2] for op in taken if op[0] == layout.OPS["RUN"]]
        channel.post(ops)
        sent += len(ops) // 32
        number += 1
    seen += [op[2] for op in peer.take() if op[0] == layout.OPS["RUN"]]
    got = len(seen)
    assert seen == list(range(number)) and got == number


def test_room(peer: Peer, channel: Channel) -> None:
    assert channel.has_room(MAX_CHUNK)
    channel.post(bytes(MAX_CHUNK * 32))
    assert channel.has_room(OP_SLOTS - MAX_CHUNK)
    channel.post(bytes(MAX_CHUNK * 32))
    assert not channel.has_room(1)
    peer.take()
    assert channel.has_room(1)


def test_room_counts_the_padding(peer: Peer, channel: Channel) -> None:
    channel.post(bytes(MAX_CHUNK * 32))
    peer.take()
    channel.post(bytes((MAX_CHUNK - 1) * 32))  # one slot is left before the ring's end
    assert channel.has_room(1)
    assert channel.has_room(MAX_CHUNK)  # one of padding, then the ring's start: all taken there
    peer.done = 0
    peer.set("op_done", 0)
    assert not channel.has_room(2)


def test_too_large_a_post(channel: Channel) -> None:
    with pytest.raises(AssertionError):
        channel.post(bytes((MAX_CHUNK + 1) * 32))


def test_records_wrap(peer: Peer, channel: Channel) -> None:
    for number in range(3 * RECORD_SLOTS + 5):
        peer.post(op=number, kind=2)
        record = channel.next_record(give_up)
        assert (record.sequence, record.op, record.kind) == (number, number, 2)
        assert channel.next_record(give_up).sequence == number  # until it is released
        channel.release()
        assert peer.field("record_checked") == number + 1


def test_a_batch_of_records(peer: Peer, channel: Channel) -> None:
    for _ in range(RECORD_SLOTS):
        peer.post()
    for number in range(RECORD_SLOTS):
        assert channel.next_record(give_up).sequence == number
        channel.release()
    with pytest.raises(Waited):
        channel.next_record(give_up)


def test_waiting_ends_by_what_idle_raises(channel: Channel) -> None:
    waits = []

    def idle(waited: float) -> None:
        waits.append(waited)
        if len(waits) == 3:
            raise Waited

    with pytest.raises(Waited):
        channel.next_record(idle)
    assert waits == sorted(waits) and waits[0] > 0


def test_a_record_that_comes_late(peer: Peer, channel: Channel) -> None:
    def idle(waited: float) -> None:
        peer.post(op=77)

    assert channel.next_record(idle).op == 77


def test_skipping_to_a_slot(peer: Peer, channel: Channel) -> None:
    """Records of earlier ops go by, also such that come while it waits; those behind are left."""
    seen: list[int] = []
    channel.post(bytes(8 * 32))
    for op in (1, 2, 2):
        peer.post(op=op)
    waits = 0

    def idle(waited: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 1:
            peer.post(op=4)
        else:
            peer.take()

    def see(record: Record) -> None:
        seen.append(record.op)

    channel.skip_to(5, idle, see)
    assert seen == [1, 2, 2, 4]
    assert peer.field("record_checked") == 4
    channel.skip_to(8, give_up, see)
    for op in (6, 8):
        peer.post(op=op)
    channel.skip_to(8, give_up, see)
    assert channel.next_record(give_up).op == 8
    channel.release()
    with pytest.raises(Waited):
        channel.skip_to(9, give_up, see)


def test_last_record(peer: Peer, channel: Channel) -> None:
    assert channel.last_record() == "none"
    peer.post(first_probe=3)
    assert channel.last_record() == "#0 ENTER, probe 3"
    peer.post(kind=2, first_probe=3, next_probe=5)
    assert channel.last_record() == "#1 EXIT, probe 3 to 5, exit code 0x0"


class TestRecord:
    def test_fields_from_bytes(self) -> None:
        data = bytearray(RECORD.size)
        values = {name: (index * 0x0101 + 1) for index, name in enumerate(layout.HOST.names)}
        layout.HOST.packer.pack_into(data, RECORD.offsets["before"], *values.values())
        layout.HOST.packer.pack_into(data, RECORD.offsets["after"], *(v + 1 for v in values.values()))
        layout.REGS.packer.pack_into(data, RECORD.offsets["regs"], *range(14))
        data[RECORD.offsets["control"] : RECORD.offsets["save"]] = b"\x11" * layout.CONTROL_BYTES
        data[RECORD.offsets["save"] : RECORD.offsets["results"]] = b"\x22" * layout.SAVE_BYTES
        struct.pack_into("<Q", data, RECORD.offsets["control"] + 0x70, 0x400)
        struct.pack_into("<Q", data, RECORD.offsets["results"] + 8 * 31, 0xABCD)
        struct.pack_into("<IIQIIQQ", data, 0, 2, 2, 9, 4, 5, 0xC00000, 77)
        struct.pack_into("<QQQQ", data, RECORD.offsets["diffs"], 0x1000, 1, 0x1008, 2)
        record = Record(memoryview(data))
        assert (record.kind, record.sequence, record.first_probe, record.next_probe) == (2, 9, 4, 5)
        assert (record.vmcb, record.op, record.diffs_found) == (0xC00000, 77, 2)
        assert record.before == values and record.after == {n: v + 1 for n, v in values.items()}
        assert record.regs == dict(zip(layout.REGS.names, range(14), strict=True))
        assert record.exitcode == 0x400 and record.result(31) == 0xABCD
        assert len(record.control) == 0x100 and record.control[0] == 0x11
        assert record.save == b"\x22" * layout.SAVE_BYTES
        assert record.diffs == {0x1000: 1, 0x1008: 2}
        assert str(record) == "#9 EXIT, probe 4 to 5, exit code 0x400"

    def test_more_changes_than_fit(self) -> None:
        data = bytearray(RECORD.size)
        for index in range(layout.MAX_DIFFS):
            struct.pack_into("<QQ", data, RECORD.offsets["diffs"] + 16 * index, 8 * index, index)
        struct.pack_into("<I", data, 4, layout.MAX_DIFFS + 100)
        assert len(Record(memoryview(data)).diffs) == layout.MAX_DIFFS

    def test_unknown_kind(self) -> None:
        data = bytearray(RECORD.size)
        data[0] = 99
        assert str(Record(memoryview(data))).startswith("#0 kind 99")


class TestEncode:
    def test_round_trip(self) -> None:
        probes = (WireProbe("write", 4, 0xFFFF_8000_0000_0000, 0x1234), WireProbe("rdmsr", 8, 0xC000_0080, 0))
        steps = [Step("WRITE", 8, 0x1000, 1 << 63), Step("RUN", 2, 0xC0_0000, 0xFFFF, 0x77, probes), Step("SYNC")]
        raw = encode(steps)
        assert len(raw) == 32 * sum(step.slots for step in steps) == 32 * 5
        assert OP.packer.unpack_from(raw, 0) == (3, 8, 0x1000, 1 << 63, 0)
        assert OP.packer.unpack_from(raw, 32) == (5, 2, 0xC0_0000, 0xFFFF, 0x77)
        assert layout.PROBE.packer.unpack_from(raw, 64) == (2, 4, 0xFFFF_8000_0000_0000, 0x1234, 0)
        assert layout.PROBE.packer.unpack_from(raw, 96) == (24, 8, 0xC000_0080, 0, 0)
        assert OP.packer.unpack_from(raw, 128)[0] == layout.OPS["SYNC"]

    def test_unknown_op(self) -> None:
        with pytest.raises(KeyError):
            encode([Step("NONSENSE")])
