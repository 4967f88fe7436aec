"""Lines of text with styles: one description for the terminal in colour and for files without."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

PLAIN: Final = ""
HEAD: Final = "bold"
BAD: Final = "bold red"
GOOD: Final = "green"
KNOWN: Final = "yellow"
DIM: Final = "dim"
"""Styles, in rich's words."""

MIN_WIDTH: Final = 80
MAX_WIDTH: Final = 120
"""Columns that reports adapt to."""


_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_UNPRINTABLE: Final = re.compile("[^\t\n\u0020-\u007e\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Span(NamedTuple):
    """A piece of a line; `style` is one of the styles above."""

    text: str
    style: str = PLAIN


Line = tuple[Span, ...]
Cell = Sequence[Span]
"""Words of a table's cell: it may be broken between, not in them."""


def line(text: str, style: str = PLAIN) -> Line:
    """A line of one span."""
    return (Span(text, style),)


def plain(lines: Iterable[Line]) -> str:
    """The text without styles, and without blanks at the ends of lines."""
    return "\n".join("".join(span.text for span in one).rstrip() for one in lines)


def harmless(text: str) -> str:
    """Text of a guest or a machine, without what a terminal would obey or XML cannot hold: escape
    sequences, control characters, lone surrogates. Tabs and ends of lines stay."""
    return _UNPRINTABLE.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


def clamp(width: int) -> int:
    """`width` in columns, brought into what reports are made for."""
    return max(MIN_WIDTH, min(MAX_WIDTH, width))


def wrap(text: str, width: int, first: str = "", rest: str | None = None, style: str = PLAIN) -> list[Line]:
    """`text` in lines of at most `width` columns, the first one behind `first`, others behind `rest` (by
    default blanks as wide). A word that is too long is broken behind a `|`, or else left whole: addresses
    are for copying."""
    rest = " " * len(first) if rest is None else rest
    out: list[Line] = []
    for paragraph in text.splitlines() or [""]:
        head = rest if out else first
        room = max(20, width - max(len(head), len(rest)))
        text = " ".join(word if len(word) <= room else word.replace("|", "| ") for word in paragraph.split(" "))
        pieces = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        for piece in pieces or [""]:
            out.append((Span(rest if out else first), Span(piece, style)))
    return out


def side_by_side(left: Cell, right: Cell, width: int, gap: int = 2) -> list[Line]:
    """Two cells of `width` columns each next to each other, in as many lines as the taller one takes."""
    one, other = _fill(left, width), _fill(right, width)
    lines: list[Line] = []
    for index in range(max(len(one), len(other))):
        here = one[index] if index < len(one) else ()
        there = other[index] if index < len(other) else ()
        used = sum(len(span.text) for span in here)
        lines.append((*here, Span(" " * (max(0, width - used) + gap)), *there))
    return lines


def _fill(cell: Cell, width: int) -> list[Line]:
    """The words of `cell` in lines of at most `width` columns."""
    lines: list[list[Span]] = []
    used = 0
    for span in cell:
        if not lines or used + 1 + len(span.text) > width:
            lines.append([span])
            used = len(span.text)
        else:
            lines[-1] += [Span(" "), span]
            used += 1 + len(span.text)
    return [tuple(one) for one in lines]
