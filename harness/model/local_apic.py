"""L1's local APIC, as memory that is not RAM: the page at which its registers are, and those of them that hold what
was written and do nothing by it (chapter 16).

A nested table may lead L2 there like anywhere else: translation is the same, what answers is not.
"""

from __future__ import annotations

from typing import Final

BASE: Final = 0xFEE0_0000
"""sPA of the registers' page behind a reset (section 16.3.1)."""

_PAGE: Final = 0x1000

WRITABLE: Final = {
    0x0D0: 0xFF00_0000,
    0x310: 0xFF00_0000,
    0x3E0: 0x0000_000B,
}
"""By offset, the bits of 32 that may be written; the others are reserved. The logical destination (section 16.6.1), the
interrupt command's high half, on which only a write of the low half acts (16.5), and the timer's divider (16.4.1)."""

WIDTH: Final = 4
"""Bytes of an access: what others do is not defined (section 16.3.2)."""


def has(spa: int) -> bool:
    """Whether `spa` is in the registers' page."""
    return BASE <= spa < BASE + _PAGE


def writable(spa: int, width: int) -> int | None:
    """The bits that an access of `width` bytes at `spa`, in that page, may write; None where what it does is not
    defined, or is more than to hold a value."""
    return WRITABLE.get(spa - BASE) if width == WIDTH else None
