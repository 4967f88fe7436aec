"""Pages of the trace ring, put together as the kernel does, and what is wrong with some."""

from __future__ import annotations

import struct

import pytest

from harness.machine import ring

HEADER_PAGE = """\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:1;
"""
FORMAT = """name: x
ID: 1501
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:__u64 rip;\toffset:8;\tsize:8;\tsigned:0;
\tfield:bool npt;\toffset:16;\tsize:1;\tsigned:0;
\tfield:u32 role;\toffset:20;\tsize:4;\tsigned:0;
\tfield:char name[16];\toffset:24;\tsize:16;\tsigned:0;

print fmt: "rip %llx", REC->rip
"""


def head(kind: int, delta: int) -> bytes:
    return struct.pack("<I", delta << 5 | kind)


def event(number: int, delta: int = 0, size: int = 16) -> bytes:
    """A small event: the length is in its head, in words."""
    return head(size // 4, delta) + struct.pack("<HHiQ", number, 0, 0, number).ljust(size, b"\0")


def long_event(number: int, delta: int, size: int) -> bytes:
    """One whose length does not fit in the head."""
    return head(0, delta) + struct.pack("<I", size + 4) + struct.pack("<H", number).ljust(size, b"\0")


def page(*parts: bytes, time: int = 1000, flags: int = 0, behind: bytes = b"", commit: int | None = None) -> bytes:
    body = b"".join(parts)
    size = len(body) if commit is None else commit
    return (struct.pack("<QQ", time, size | flags) + body + behind).ljust(4096, b"\0")


def times(*parts: bytes, time: int = 1000) -> list[tuple[int, int]]:
    return [(e.time, e.id) for e in ring.events(page(*parts, time=time))]


def test_times_add_up() -> None:
    assert times(event(1), event(2, 5), event(3, 7)) == [(1000, 1), (1005, 2), (1012, 3)]


def test_long_times_and_absolute_ones() -> None:
    extend = head(30, 3) + struct.pack("<I", 2)
    assert times(event(1), extend, event(2, 1)) == [(1000, 1), (1000 + (2 << 27) + 3 + 1, 2)]
    stamp = head(31, 9) + struct.pack("<I", 4)
    high = 1 << 60
    assert times(stamp, event(2, 1), time=high | 77) == [(high | (4 << 27) + 9 + 1, 2)]


def test_gaps() -> None:
    """A discarded event is a gap that still counts in time; zero time means that the page ends there."""
    discarded = head(29, 6) + struct.pack("<I", 12) + bytes(8)
    assert times(event(1), discarded, event(2, 1)) == [(1000, 1), (1007, 2)]
    assert times(event(1), head(29, 0), event(2)) == [(1000, 1)]


def test_lengths() -> None:
    (big, small) = ring.events(page(long_event(7, 1, 300), event(8, 1, 20)))
    assert (big.id, len(big.data), small.id, len(small.data)) == (7, 300, 8, 20)
    assert list(ring.events(page())) == []


@pytest.mark.parametrize(
    ("flags", "behind", "count"),
    [(1 << 31, b"", -1), (1 << 31 | 1 << 30, struct.pack("<Q", 77), 77)],
)
def test_lost_events_are_an_error(flags: int, behind: bytes, count: int) -> None:
    """The kernel marks the page behind the gap; nothing of it is handed out."""
    with pytest.raises(ring.Lost) as lost:
        next(ring.events(page(event(1), flags=flags, behind=behind)))
    assert lost.value.count == count
    assert str(lost.value) == ("77" if count > 0 else "an unknown number of")


@pytest.mark.parametrize(
    "bad",
    [
        page(event(1), commit=4090),
        page(head(28, 1), bytes(8)),
        page(long_event(1, 0, 300)[:40]),
        page(head(0, 1), struct.pack("<I", 4)),
    ],
)
def test_pages_that_make_no_sense(bad: bytes) -> None:
    with pytest.raises(ValueError, match="ring page"):
        list(ring.events(bad))


def test_format() -> None:
    form = ring.Format(FORMAT)
    assert form.id == 1501
    data = bytes(8) + struct.pack("<QB3xI", 0xFFFF_FFFF_8000_0000, 1, 0x61705) + bytes(16)
    assert form.reader("rip", "npt", "role").unpack_from(data) == (0xFFFF_FFFF_8000_0000, 1, 0x61705)
    assert form.reader("role").unpack_from(data) == (0x61705,)
    with pytest.raises(KeyError):
        form.reader("vmcb")
    with pytest.raises(ValueError, match="order"):
        form.reader("role", "rip")


@pytest.mark.parametrize("text", ["", "ID: 7\n", FORMAT.replace("ID: ", "Id ")])
def test_no_format(text: str) -> None:
    with pytest.raises(ValueError, match="no format"):
        ring.Format(text)


def test_header_page() -> None:
    assert ring.data_size(HEADER_PAGE) == (16, 4080)
    with pytest.raises(ValueError, match="does not know"):
        ring.data_size(HEADER_PAGE.replace("offset:8;\tsize:8", "offset:8;\tsize:4"))
