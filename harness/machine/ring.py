"""The kernel's trace ring, read in its binary form (trace_pipe_raw): pages of events, each event laid
out as its `format` file says. No event's text is parsed, so no kernel's print format matters.

The page's layout is that of events/header_page and events/header_event, the same since 3.x.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_FIELD: Final = re.compile(r"^\s*field:(?P<type>[^;]*?)(?P<name>\w+)(?P<array>\[[^;]*\])?;\s*offset:(?P<offset>\d+);"
                           r"\s*size:(?P<size>\d+);\s*signed:(?P<signed>[01]);", re.MULTILINE)
_ID: Final = re.compile(r"^ID:\s*(\d+)$", re.MULTILINE)
_HEAD: Final = struct.Struct("<QQ")
_WORD: Final = struct.Struct("<I")
_TYPE: Final = struct.Struct("<H")
_LETTERS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}

_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_MISSED: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30
_TIME_BITS: Final = 27
_STAMP_HIGH: Final = 0x1F << 59
"""An absolute time stamp has 59 bits; those above are the page's."""


class Lost(Exception):
    """Events were overwritten before they were read. `count` is -1 where the kernel does not say how many."""

    def __init__(self, count: int) -> None:
        super().__init__("an unknown number of" if count < 0 else str(count))
        self.count = count


class Raw(NamedTuple):
    """One event: its time in the trace clock's units, its type's number, and its bytes."""

    time: int
    id: int
    data: bytes


class Format:
    """A `format` file: the event's number, and where its fields are. Raises ValueError for a text that is none."""

    def __init__(self, text: str) -> None:
        number = _ID.search(text)
        self.fields = {m["name"]: (int(m["offset"]), int(m["size"])) for m in _FIELD.finditer(text)}
        if not number or not self.fields:
            raise ValueError(f"no format of a trace event: {text[:60]!r}")
        self.id = int(number[1])

    def reader(self, *names: str) -> struct.Struct:
        """What unpacks these fields, unsigned, in this order. Raises KeyError for one that is not there, or
        ValueError if they are not in the event's order."""
        at, parts = 0, ["<"]
        for name in names:
            offset, size = self.fields[name]
            if offset < at:
                raise ValueError(f"{name} does not come in this order")
            parts.append(f"{offset - at}x{_LETTERS[size]}")
            at = offset + size
        return struct.Struct("".join(parts))


def data_size(header_page: str) -> tuple[int, int]:
    """From events/header_page: where a page's events begin, and how many bytes there is room for. Raises ValueError for
    a layout that is not known."""
    fields = {m["name"]: (int(m["offset"]), int(m["size"])) for m in _FIELD.finditer(header_page)}
    if "data" not in fields or fields.get("timestamp") != (0, 8) or fields.get("commit") != (8, 8):
        raise ValueError(f"a ring page that this reader does not know: {header_page!r}")
    return fields["data"]


def events(page: bytes, start: int = 16) -> Iterator[Raw]:
    """The events of one page; `start` is where they begin in it. Raises Lost, before any of them, if
    events were lost between the last page and this, and ValueError for a page that makes no sense."""
    time, commit = _HEAD.unpack_from(page)
    size = commit & 0xFFFFF
    end = start + size
    if end > len(page):
        raise ValueError(f"a ring page of {len(page)} bytes with {size} bytes of events")
    if commit & _MISSED:
        raise Lost(struct.unpack_from("<Q", page, end)[0] if commit & _MISSED_STORED and end + 8 <= len(page) else -1)
    at, word = start, _WORD.unpack_from
    try:
        while at < end:
            head = word(page, at)[0]
            kind, delta = head & 31, head >> 5
            if kind == _PADDING:
                if not delta:
                    return  # the rest of the page
                time += delta
                at += 4 + word(page, at + 4)[0]
            elif kind == _TIME_EXTEND:
                time += (word(page, at + 4)[0] << _TIME_BITS) + delta
                at += 8
            elif kind == _TIME_STAMP:
                time = time & _STAMP_HIGH | (word(page, at + 4)[0] << _TIME_BITS) + delta
                at += 8
            else:
                time += delta
                length, body = (kind * 4, at + 4) if kind else (word(page, at + 4)[0] - 4, at + 8)
                if length < 2 or body + length > end:
                    raise ValueError(f"an event of {length} bytes at {at} of a ring page that ends at {end}")
                yield Raw(time, _TYPE.unpack_from(page, body)[0], page[body : body + length])
                at = body + length + 3 & ~3
    except struct.error:
        raise ValueError(f"a ring page whose events end at {end} in the middle of one") from None
