"""Values in the field's words: page-table entries, error codes, registers, outcomes."""

from __future__ import annotations

import re
from typing import Final

from harness.lockstep.compare import Divergence
from harness.model.access import ErrorCode, GeneralProtection, NestedPageFault, Outcome, PageFault, Reached
from harness.model.entries import BITS, FRAME
from harness.model.registers import REGISTER_BITS
from harness.model.vmcb import ExitCode
from harness.scenario.ops import Probe, RunOp, Scenario

MAIN_FLAGS: Final = ("P", "RW", "US", "A", "D", "PS", "NX")
"""Bits of an entry that decide a walk, in the order in which they are shown."""

_OTHER_FLAGS: Final = {3: "PWT", 4: "PCD", 8: "G"}
_MAIN_BITS: Final = {name: BITS[name.lower()] for name in MAIN_FLAGS}
_ENTRY: Final = re.compile(r"entry at sPA (0x[0-9a-f]+)")
_FAULT: Final = re.compile(r"#(NPF|PF|GP) (0x[0-9a-f]+)(?: \([^)]*\) at g[PV]A (0x[0-9a-f]+))?$")
_REGISTER: Final = re.compile(r"(?:vmcb\.|l1\.|l2\.|rd|wr)?(cr0|cr4|efer|r?flags)\b")
_TAGGED: Final = 0xFF_FFFF_FF00


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


def level_of(divergence: Divergence) -> str:
    """The level of the entry that a divergence is about, where its walk went through it; else empty."""
    address = entry_address(divergence.field)
    steps = divergence.walk.trail if divergence.walk is not None else ()
    return next((level for _, level, _, at, _ in steps if at == address), "")


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
        return flags(number, level_of(divergence))
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


def was_read(divergence: Divergence) -> int | None:
    """The entry that a divergence is about as the walk read it; None if it read none there."""
    address = entry_address(divergence.field)
    steps = divergence.walk.trail if divergence.walk is not None else ()
    return next((entry for _, _, _, at, entry in steps if at == address), None)


def difference(divergence: Divergence) -> str:
    """How observed differs from expected, in bits by name where they have names: `A is missing`; else empty.

    What is `unchanged` counts as the entry that the walk read.
    """
    want, got = (was_read(divergence) if isinstance(v, str) else v for v in (divergence.expected, divergence.observed))
    if want is None or got is None:
        return ""
    if entry_address(divergence.field) is not None and (want ^ got) & FRAME:
        return "its frame is another"
    if not bit_names(divergence, want | got) or "exitcode" in divergence.field:
        return ""
    missing, extra = bit_names(divergence, want & ~got), bit_names(divergence, got & ~want)
    parts = [f"{_list(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
    parts += [f"{_list(extra)} must not be set"] if extra else []
    return ", ".join(parts)


def _list(names: tuple[str, ...]) -> str:
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
    """The sPA that a read or fetch came to, where its value tells; None where it does not.

    A quadword of the data pages holds its own address, as bits 39:8 of what a read returns and as all of
    what a fetch returns, in units of 8 bytes (harness.wire.image.tag); unless L2 wrote there before.
    """
    walk, want, got = divergence.walk, divergence.expected, divergence.observed
    if probe is None or walk is None or not isinstance(walk.outcome, Reached) or divergence.field != "value":
        return None
    if not isinstance(want, int) or not isinstance(got, int):
        return None
    if probe.kind == "read" and probe.size == 8 and not (want ^ got) & ~_TAGGED:
        want, got = (want & _TAGGED) >> 8, (got & _TAGGED) >> 8
    elif probe.kind != "fetch":
        return None
    return got * 8 if want * 8 == walk.outcome.spa else None
