"""What is wrong, without where: divergences of the same signature are one finding with a count.

It is what shrinking must keep. So it names no address, no level and no mode, which a smaller scenario has others of.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from harness.errors import MachineLost
from harness.lockstep.compare import Divergence
from harness.model.entries import A, D

LOST: Final = "lost"
"""In place of a check: the machine was lost."""

_NUMBER: Final = re.compile(r"0x[0-9a-f]+|\b\d+\b")
_PLACE: Final = re.compile(r"(entry|memory) at sPA 0x[0-9a-f]+")
_WHEN: Final = re.compile(r" at the end$")
_AD: Final = {A: "a", D: "d"}
_BOTH: Final = (A | D) << 32 | A | D
_LOW: Final = 0xFFFF_FFFF


class Signature(NamedTuple):
    """`check` as in a divergence, or LOST. `field` is the divergence's, with more where a field alone says little: what
    the machine's outcome was, and which accessed or dirty bits of a table entry differ. `rule` is the model's."""

    check: str
    field: str
    rule: str

    def __str__(self) -> str:
        return f"{self.check} {self.field}" + (f", rule {self.rule}" if self.rule else "")


def signature(divergence: Divergence) -> Signature:
    """Of a divergence; the same however it was come by, strict or pipelined."""
    return Signature(divergence.check, _field(divergence), divergence.rule)


def of_loss(lost: MachineLost) -> Signature:
    """Of a lost machine: by the reason, without its numbers."""
    return Signature(LOST, _NUMBER.sub("...", lost.reason.partition("\n")[0]), "")


def _field(one: Divergence) -> str:
    if one.field == "outcome":
        return f"outcome {_kind(str(one.observed))}"
    place = _PLACE.match(one.field)
    if place is None:
        return _NUMBER.sub("...", _WHEN.sub("", one.field))
    return place[1] + (_accessed_and_dirty(one) if place[1] == "entry" else "")


def _kind(outcome: str) -> str:
    """`#NPF` of `#NPF 0x100000006 (...)`, `VMEXIT_SHUTDOWN` of `VMEXIT_SHUTDOWN, EXITINFO1 0x0, ...`."""
    first = outcome.partition(",")[0]
    return first.split()[0] if first.startswith("#") else _NUMBER.sub("...", first)


def _accessed_and_dirty(one: Divergence) -> str:
    """Which of A and D the machine set (+) or left clear (-) against the model; any other bit is `other`. Entries of
    four bytes are two to a quadword: both halves count alike."""
    want, got = one.expected, one.observed
    if isinstance(want, str) or isinstance(got, str):  # `unchanged` is as the walk read it
        address = int(_NUMBER.findall(one.field)[0], 16)
        known = want if isinstance(want, int) else got
        read = next((step for step in (one.walk.trail if one.walk else ()) if step[3] & ~7 == address), None)
        if read is None or isinstance(known, str):
            return ""
        entry, known = read[4] & _LOW, known >> (read[3] & 4) * 8 & _LOW
        want, got = (entry, known) if isinstance(want, str) else (known, entry)
    differs = want ^ got
    parts = [f" {'+' if got & both else '-'}{name}" for bit, name in _AD.items()
             if (both := (bit | bit << 32) & differs)]
    return "".join(parts) + (" other" if differs & ~_BOTH else "")
