"""Values in the field's words: page-table entries, error codes, registers, outcomes."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from harness.lockstep.compare import Divergence
from harness.model.access import ErrorCode, GeneralProtection, NestedPageFault, Outcome, PageFault
from harness.model.entries import BITS, FRAME, P
from harness.model.registers import REGISTER_BITS
from harness.model.vmcb import ExitCode
from harness.model.walk import GUEST, Step, Walk
from harness.scenario.ops import Probe, RunOp, Scenario
from harness.wire.image import tag

MAIN_FLAGS: Final = ("P", "RW", "US", "A", "D", "PS", "NX")
"""Bits of an entry that decide a walk, in the order in which they are shown."""

_OTHER_FLAGS: Final = {3: "PWT", 4: "PCD", 8: "G"}
_MAIN_BITS: Final = {name: BITS[name.lower()] for name in MAIN_FLAGS}
_ENTRY: Final = re.compile(r"entry at sPA (0x[0-9a-f]+)")
_FAULT: Final = re.compile(r"#(NPF|PF|GP) (0x[0-9a-f]+)(?: \([^)]*\) at g[PV]A (0x[0-9a-f]+))?$")
_REGISTER: Final = re.compile(r"(?:vmcb\.|l1\.|l2\.|rd|wr)?(cr0|cr4|efer|r?flags)\b")


@lru_cache(maxsize=4096)
def flags(entry: int, level: str) -> tuple[str, ...]:
    """The set bits of an entry by the manual's names, those of MAIN_FLAGS first; bit 7 of a PTE is PAT."""
    names = [name for name in MAIN_FLAGS if entry & _MAIN_BITS[name]]
    if level == "pte" and "PS" in names:
        names[names.index("PS")] = "PAT"
    known = FRAME | sum(_MAIN_BITS.values())
    names += [_OTHER_FLAGS.get(bit, f"bit{bit}") for bit in range(64) if (entry & ~known) >> bit & 1]
    return tuple(names)


def entry_address(field: str) -> int | None:
    """The sPA of the entry that a divergence's field is about; None where it is not about one."""
    match = _ENTRY.match(field)
    return int(match[1], 16) if match else None


def parse_outcome(text: str) -> Outcome | None:
    """An observed fault from the text that the comparison made of it; None for anything else."""
    match = _FAULT.match(text)
    if match is None:
        return None
    kind, code, address = match[1], int(match[2], 16), int(match[3] or "0", 16)
    if kind == "GP":
        return GeneralProtection(code)
    return NestedPageFault(code, address) if kind == "NPF" else PageFault(code, address)


def narrow(walk: Walk, dimension: str = GUEST) -> bool:
    """Whether the tables of that dimension have entries of four bytes: 32-bit paging without PAE."""
    first = next((level for which, level, *_ in walk.trail if which == dimension), "")
    return first == "pde"


def cut(quadword: int, address: int) -> int:
    """The entry of four bytes at `address`, out of its quadword."""
    return quadword >> (address & 4) * 8 & 0xFFFF_FFFF


def step_of(divergence: Divergence) -> Step | None:
    """The step of its walk that read the entry that a divergence is about; None if none did."""
    address, walk = entry_address(divergence.field), divergence.walk
    if walk is None or address is None:
        return None
    for step in walk.steps:
        if step.address == address or (step.address & ~7 == address and narrow(walk, step.dimension)):
            return step
    return None


def entry_value(divergence: Divergence, number: int | str, step: Step | None) -> int | None:
    """`expected` or `observed` as an entry of `step`'s table; what is `unchanged` is as the walk read it."""
    if isinstance(number, str):
        return step.entry if step is not None else None
    small = step is not None and divergence.walk is not None and narrow(divergence.walk, step.dimension)
    return cut(number, step.address) if small and step is not None else number


def value(divergence: Divergence, number: int | str) -> str:
    """What was expected or observed, in hex, with its bits by name where they have names."""
    if isinstance(number, str):
        return number
    names = bit_names(divergence, number)
    return f"{number:#x} ({'|'.join(names)})" if names else f"{number:#x}"


def bit_names(divergence: Divergence, number: int) -> tuple[str, ...]:
    """The set bits of `number`, as a value of the divergence's field, by name; empty where bits have none."""
    field = divergence.field
    if entry_address(field) is not None:
        step = step_of(divergence)
        if step is None and not number & P:
            return ()  # not an entry in use; or two of four bytes, of which this cannot be told
        return flags(entry_value(divergence, number, step) or 0, step.level if step is not None else "")
    if field == "exitinfo1" and _faulted(divergence):
        return tuple(ErrorCode.describe(number).split("|")) if number else ()
    match = _REGISTER.match(field)
    if match:
        register = "rflags" if match[1].endswith("flags") else match[1]
        return _register_names(register, number)
    if field.removeprefix("vmcb.").startswith("exitcode"):
        return (ExitCode.describe(number),)
    return ()


def _register_names(register: str, number: int) -> tuple[str, ...]:
    by_bit = {bit: name.upper() for name, bit in REGISTER_BITS[register].items()}
    return tuple(by_bit.get(1 << n, f"bit{n}") for n in range(64) if number >> n & 1)


def _faulted(divergence: Divergence) -> bool:
    return divergence.walk is not None and isinstance(divergence.walk.outcome, PageFault | NestedPageFault)


def difference(divergence: Divergence) -> str:
    """How observed differs from expected, in bits by name where they have names: `A is missing`; else empty."""
    want, got = divergence.expected, divergence.observed
    if entry_address(divergence.field) is not None:
        return _entry_difference(divergence)
    if isinstance(want, str) or isinstance(got, str) or "exitcode" in divergence.field:
        return ""
    return _missing(bit_names(divergence, want), bit_names(divergence, got))


def _entry_difference(divergence: Divergence) -> str:
    step = step_of(divergence)
    want, got = (entry_value(divergence, v, step) for v in (divergence.expected, divergence.observed))
    if want is None:
        return "it must stay as it was"
    if got is None:
        return "it must change"
    if (want ^ got) & FRAME:
        return "its frame is another" if step is not None else f"it is {got:#x}, and must be {want:#x}"
    level = step.level if step is not None else ""
    return _missing(flags(want, level), flags(got, level))


def _missing(want: tuple[str, ...], got: tuple[str, ...]) -> str:
    missing = [name for name in want if name not in got]
    extra = [name for name in got if name not in want]
    parts = [f"{_list(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
    parts += [f"{_list(extra)} must not be set"] if extra else []
    return ", ".join(parts)


def bits(mask: int) -> str:
    """The set bits of `mask` as the manual writes them: `bit 52`, `bits 51:48 and 8`."""
    parts, high = [], mask.bit_length() - 1
    while high >= 0:
        low = high
        while low and mask >> low - 1 & 1:
            low -= 1
        parts.append(str(high) if high == low else f"{high}:{low}")
        mask &= (1 << low) - 1
        high = mask.bit_length() - 1
    return f"bit{'s' if len(parts) > 1 or ':' in parts[0] else ''} {_list(parts)}"


def instead(divergence: Divergence) -> str:
    """What was observed and expected, where no bit that has a name says it shorter."""
    want, got = divergence.expected, divergence.observed
    if isinstance(want, str) and isinstance(got, int):
        return f"it is {got:#x}"
    return f"it is {value(divergence, got)}, and must be {value(divergence, want)}"


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def probe_of(scenario: Scenario | None, op: int, probe: int) -> tuple[Probe, int] | None:
    """The probe that a divergence names, and the CPL that it ran at; None if there is no such probe."""
    if scenario is None or not 0 <= op < len(scenario.ops):
        return None
    run = scenario.ops[op]
    if not isinstance(run, RunOp) or not 0 <= probe < len(run.probes):
        return None
    return run.probes[probe], run.cpl


def reached_instead(divergence: Divergence, probe: Probe | None) -> int | None:
    """The sPA that a read or fetch came to, where its value tells: the quadwords of the data pages hold
    their own address (harness.wire.image.tag). None where it does not."""
    got = divergence.observed
    if probe is None or divergence.field != "value" or not isinstance(got, int):
        return None
    return told_by(got, probe)


def told_by(result: int, probe: Probe) -> int | None:
    """The sPA that a read or fetch of data pages came to, by its result; None where that does not tell."""
    if probe.kind == "fetch":
        return result * 8
    spa = (result >> 8 & 0xFFFF_FFFF) * 8
    return spa if probe.kind == "read" and tag(spa) == result else None
