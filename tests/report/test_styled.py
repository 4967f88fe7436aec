"""Lines of text: wrapping, cells, and what is kept from a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.styled import BAD, Span, clamp, harmless, line, plain, side_by_side, wrap


def test_plain_has_no_blanks_at_the_ends() -> None:
    assert plain([line("a  "), (Span("b", BAD), Span("  c  ")), line("")]) == "a\nb  c\n"


@pytest.mark.parametrize(("width", "result"), [(20, 80), (80, 80), (97, 97), (120, 120), (300, 120)])
def test_clamp(width: int, result: int) -> None:
    assert clamp(width) == result


def test_wrap() -> None:
    assert plain(wrap("one two three four five six", 24, "- ")) == "- one two three four\n  five six"
    assert plain(wrap("one two three four five six", 24, "- ", "")) == "- one two three four\nfive six"
    assert plain(wrap("", 40, "- ")) == "-"
    assert plain(wrap("a\nb", 40, "- ")) == "- a\n  b"


def test_wrap_leaves_words_whole() -> None:
    address = "0x" + "1" * 60
    assert address in plain(wrap(f"at {address} it was", 30))
    flags = "(" + "|".join(f"bit{n}" for n in range(20)) + ")"
    assert max(map(len, plain(wrap(flags, 40)).splitlines())) <= 40
    assert plain(wrap(flags, 400)) == flags


@given(st.lists(st.text("abc", min_size=1, max_size=12), max_size=30), st.integers(30, 120), st.integers(0, 8))
def test_wrap_keeps_all_words_and_the_width(words: list[str], width: int, indent: int) -> None:
    text = plain(wrap(" ".join(words), width, " " * indent))
    assert text.split() == words
    assert all(len(one) <= width for one in text.splitlines())


def test_side_by_side() -> None:
    left = [Span("aaaa"), Span("bbbb"), Span("cc")]
    right = [Span("1"), Span("2")]
    assert plain(side_by_side(left, right, 9)) == "aaaa bbbb  1 2\ncc"
    assert plain(side_by_side((), right, 4)) == "      1 2"
    assert side_by_side((), (), 4) == []


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[31mred\x1b[0m \x1b[2Jclear", "red clear"),
        ("\x1b]0;a title\x07after \x1b]8;;http://x\x1b\\link", "after link"),
        ("\x1bcreset \x1bM", "creset "),
        ("bell\x07 null\x00 del\x7f c1\x9b31m", "bell null del c131m"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ud800 \ufffe \uffff grüß 汉 🙂", "   grüß 汉 🙂"),
    ],
)
def test_harmless(text: str, result: str) -> None:
    assert harmless(text) == result


@given(st.text())
def test_harmless_is_done_after_once(text: str) -> None:
    once = harmless(text)
    assert harmless(once) == once and "\x1b" not in once
