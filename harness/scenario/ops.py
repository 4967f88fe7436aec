"""The op vocabulary: what a scenario can say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from harness.wire.layout import PROBES

DEFAULT_MODE: Final = "4-level"
DEFAULT_PAGE_SIZE: Final = "4K"
NO_NESTED_PAGING: Final = "none"
"""In place of a size of nested pages: NP_ENABLE=0."""


@dataclass(frozen=True, slots=True)
class Change:
    """How a register or an entry is changed: a new value, or bits set and cleared by name."""

    value: int | None = None
    set: tuple[str, ...] = ()
    clear: tuple[str, ...] = ()

    def apply(self, old: int, bits: dict[str, int]) -> int:
        """The new value. Raises KeyError, naming the bit, for one that `bits` does not know."""
        new = old if self.value is None else self.value
        for name in self.set:
            new |= bits[name]
        for name in self.clear:
            new &= ~bits[name]
        return new


@dataclass(frozen=True, slots=True)
class EntryOp:
    """L1 writes a table entry, by its name in the world (`nested.a.pte`); `frame` names a page whose
    address goes into bits 51:12."""

    entry: str
    change: Change
    frame: str | None = None
    second: bool = False
    """L1's second processor writes it, when L2 asks for that in the next run."""


@dataclass(frozen=True, slots=True)
class VmcbOp:
    """L1 writes a VMCB field; `page` names a page whose gVA it takes, `frame` one whose address goes into bits 51:12:
    the sPA in nCR3, else the gPA."""

    field: str
    change: Change
    page: str | None = None
    frame: str | None = None


@dataclass(frozen=True, slots=True)
class HostOp:
    """L1 changes a register of its own."""

    register: str
    change: Change


@dataclass(frozen=True, slots=True)
class Probe:
    """One action of L2. `target` is a page of the world, an entry of L2's own tables (`guest.a.pte`), a
    gVA, or an MSR number; `offset` in bytes."""

    kind: str
    target: str = ""
    offset: int = 0
    size: int = 0
    """Bytes; 0 is the widest that L2's mode has."""
    value: int | str | None = None
    """A number, or `&ENTRY[@PAGE][+BIT][-BIT]`: what L1 last wrote to an entry, with the frame of another page, and
    with bits set and cleared; an ENTRY of `vmcb.FIELD` is a field of the VMCB."""

    def __str__(self) -> str:
        size = str(self.size) if self.size else ""
        offset = f"+{self.offset:#x}" if self.offset else ""
        target = f" {self.target}{offset}" if self.target else ""
        value = ""
        if self.value is not None:
            value = f" = {self.value:#x}" if isinstance(self.value, int) else f" = {self.value}"
        return f"{self.kind}{size}{target}{value}"


@dataclass(frozen=True, slots=True)
class RunOp:
    """VMRUN, as often as it takes for L2 to do all `probes` at `cpl`. `expect` is for the reader: an
    outcome for each probe, held against the model, never against the machine."""

    probes: tuple[Probe, ...]
    cpl: int = 0
    expect: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InvlpgaOp:
    """L1 executes INVLPGA: of a page, for an ASID (section 15.16.2)."""

    page: str
    asid: int


@dataclass(frozen=True, slots=True)
class UseOp:
    """L1 goes on with its VMCB of that number, 1 at first; one that was not used before is as the first one began."""

    number: int


Op = EntryOp | VmcbOp | HostOp | InvlpgaOp | UseOp | RunOp
VMCBS: Final = 8
"""VMCBs that a scenario may use."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A program, and what it is for. `source` and `lines` (one for each op) say where it was read."""

    name: str
    title: str
    manual: str
    shows: str
    ops: tuple[Op, ...]
    guest: str = DEFAULT_MODE
    """L2's mode: a name of harness.scenario.modes.MODES."""
    nested: str = DEFAULT_MODE
    """L1's mode at VMRUN: a name of harness.scenario.modes.HOST_MODES."""
    guest_page: str = DEFAULT_PAGE_SIZE
    nested_page: str = DEFAULT_PAGE_SIZE
    source: str = ""
    lines: tuple[int, ...] = ()
    table_page: str = DEFAULT_PAGE_SIZE
    """Size of the nested pages that map L2's tables."""


PORTS: Final = frozenset({"in", "out"})
SIZED: Final = frozenset({"read", "write", "rmw"}) | PORTS
STRINGS: Final = frozenset({"ins", "outs", "repins", "repouts", "outsfs", "outsgs"})
VM_STATE: Final = frozenset({"vmload", "vmsave"})
"""Probes whose value is the sPA that rAX has for them, 0 if there is none."""
REPEATED: Final = frozenset({"repins", "repouts"})
"""Of those the ones whose value says how often."""
MEMORY: Final = SIZED - PORTS | STRINGS | {"fetch", "invlpg", "push", "pop"}
REQUESTS: Final = frozenset({"remote", "remotenmi"})
"""Probes by which L2 asks L1's second processor to do its writes."""
STORES: Final = frozenset({"write", "rmw", "push", "out"})
"""Probes that write a value of their own where none is given."""
STEPPED: Final = {"popfcpuid": "cpuid", "popfrdcr4": "rdcr4"}
"""Probes that are POPF, of their value, and another right behind it."""
ADDRESSED: Final = VM_STATE | {"vmrun"}
"""Probes whose value is rAX, a VMCB's address; 0 where none is given."""
_PROBE: Final = re.compile(
    r"(?P<kind>[a-z]+(?:cr|dr)\d|[a-z]+?)(?P<size>[1248])?"
    r"(?:\s+(?P<target>[a-z]\w*(?:\.\w+)*|0x[0-9a-fA-F_]+)(?:\+(?P<offset>\w+))?)?"
    r"(?:\s*=\s*(?P<value>\w+|&[\w.@+-]+))?"
)


@lru_cache(maxsize=10_000)
def parse_probe(text: str) -> Probe:
    """Read `kind[size] [target[+offset]] [= value]`, e.g. `write4 a+0x10 = 0x1234`.

    Raises ValueError, saying what is wrong with it.
    """
    match = _PROBE.fullmatch(text.strip())
    kind = match["kind"] if match else ""
    if not match or kind not in PROBES or kind == "end":
        known = ", ".join(k for k in PROBES if k != "end")
        raise ValueError(f"{text!r} is not a probe; it is KIND[SIZE] [TARGET[+OFFSET]] [= VALUE], KIND one of {known}")
    if match["size"] and kind not in SIZED:
        raise ValueError(f"{text!r}: {kind} takes no size")
    needs_target = kind in MEMORY | PORTS or kind.endswith("msr")
    if needs_target != bool(match["target"]):
        raise ValueError(f"{text!r}: {kind} {'needs a' if needs_target else 'takes no'} target")
    takes_value = (kind in STORES | REPEATED | ADDRESSED | STEPPED.keys() or kind.startswith("wr")
                   or kind in ("lar", "lmsw"))
    if match["value"] and not takes_value:
        raise ValueError(f"{text!r}: {kind} takes no value")
    if takes_value and not match["value"] and kind not in STORES | ADDRESSED:
        raise ValueError(f"{text!r}: {kind} needs a value, as in `{kind} = 0x1`")
    return Probe(
        kind,
        match["target"] or "",
        _number(text, match["offset"] or "0"),
        int(match["size"] or 0),
        _value(text, match["value"]) if match["value"] else None,
    )


def _value(where: str, text: str) -> int | str:
    return text if text.startswith("&") else _number(where, text)


def _number(where: str, text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        raise ValueError(f"{where!r}: {text!r} is not a number") from None
    if number >= 1 << 64:
        raise ValueError(f"{where!r}: {text} does not fit in 64 bits")
    return number
