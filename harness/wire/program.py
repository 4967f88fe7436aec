"""The ops that L1 interprets, as values, and their encoding for the op ring."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from harness.wire.layout import OP, OPS, PROBE, PROBES


class WireProbe(NamedTuple):
    """One action of L2: `kind` by name, operand size in bytes, address (gVA or MSR), value."""

    kind: str
    size: int
    address: int
    value: int


class Step(NamedTuple):
    """One op by name, with its operands as `OPS` describes them. `origin` is the index of the
    scenario's op that it comes from, -1 for what belongs to no op."""

    code: str
    arg: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    probes: tuple[WireProbe, ...] = ()
    origin: int = -1

    @property
    def slots(self) -> int:
        """Of the op ring, 32 bytes each."""
        return 1 + len(self.probes)


def encode(steps: Iterable[Step]) -> bytes:
    """The slots of the op ring that hold `steps`."""
    parts = []
    op, probe = OP.packer.pack, PROBE.packer.pack
    for step in steps:
        parts.append(op(OPS[step.code], step.arg, step.a, step.b, step.c))
        for kind, size, address, value in step.probes:
            parts.append(probe(PROBES[kind], size, address, value, 0))
    return b"".join(parts)
