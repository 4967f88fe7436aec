"""The checks: one record against the twin's prediction (design: C1, C2, C3).

    C1  each probe: where it went and what it read, or its fault in every bit; where its write landed
    C2  every table entry in both dimensions, accessed and dirty bits included
    C3  the VMCB and L1's own registers, and whether VMRUN was refused

A check returns divergences; it raises nothing and changes nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Final, NamedTuple

from harness.lockstep.prediction import Prediction
from harness.model.access import GeneralProtection, NestedPageFault, PageFault, Reached
from harness.model.vmcb import CONTROL, SAVE, STATE, ExitCode, Field
from harness.model.walk import Walk
from harness.wire.image import Region
from harness.wire.layout import VMLOADED, VMRUN_RAISED
from harness.wire.program import WireProbe
from harness.wire.records import Record, host_registers

_MASK64: Final = (1 << 64) - 1
_SELECTORS: Final = ("es", "cs", "ss", "ds")
_RESTORED: Final = (
    "rsp", "rflags", "cr3", "cr8", *_SELECTORS, "gdt_base", "gdt_limit", "idt_base", "idt_limit",
)
"""L1's registers that must be behind VMRUN what they were before it."""
_restored: Final = itemgetter(*_RESTORED)


class Divergence(NamedTuple):
    """An observation that the model does not permit.

    `op` and `probe` are indices in the scenario, -1 where there is none; `expected` and `observed`
    are integers where the field is one. `rule` is the model's rule behind the expectation. `walk` is
    the model's walk of the probe. `erratum` is the id of the erratum that explains it.
    """

    scenario: str
    op: int
    probe: int
    check: str
    field: str
    expected: int | str
    observed: int | str
    rule: str
    walk: Walk | None = None
    after: tuple[int, ...] = ()
    """The entries of `walk` as the machine left them, in the order of its steps."""
    types: tuple[str, ...] = ()
    """The memory type of each step of `walk`, and behind them that of the page: see harness.model.memory_type."""
    erratum: str | None = None
    events: tuple[str, ...] = ()
    """C4: what the kernel under L1 said around it; C5: the entries of all tables; the one in question marked `>`."""

    def explained_by(self, erratum: str) -> Divergence:
        """The same, explained by the `erratum` of that id, or by ids joined by `+`."""
        return self._replace(erratum=erratum)

    def seen_as(self, after: tuple[int, ...], types: tuple[str, ...]) -> Divergence:
        """With the entries of `walk` as the machine left them, and its memory types."""
        return self._replace(after=after, types=types)


@dataclass(frozen=True)
class Context:
    """Where in a scenario a record belongs."""

    scenario: str
    op: int
    probes: tuple[WireProbe, ...]
    tables: Region
    """Where the page tables are: changes there are C2, others C1."""
    wide: bool = True
    """Whether L2 has registers of 64 bits."""


COUNTERS: Final = frozenset({"rdtsc", "rdtscp"})
_FAR: Final = 1 << 48
"""Counts between VMRUN and #VMEXIT: days."""

AT_THE_END: Final = " at the end"
"""Of a field of L1's that was read there alone."""
DEAR: Final = ("cr4", "efer", "pat", "dr7", "dr6")
"""L1's registers that it does not read behind each VMRUN where a hypervisor under it makes that dear."""


def check_enter(context: Context, expected: tuple[bytes, bytes], first: int, record: Record) -> Iterator[Divergence]:
    """Before VMRUN: L1 did to the VMCB what the program says, and stands at the right probe."""
    if record.first_probe != first:
        yield _plain(context, "C3", "first probe", first, record.first_probe, "lockstep")
    control, save = record.control, record.save
    if (control, save) != expected:
        for name, want, got in differing_fields((expected[0], control), (expected[1], save), {}):
            yield _plain(context, "C3", f"vmcb.{name} before VMRUN", want, got, "lockstep")


def same_course(prediction: Prediction, record: Record) -> bool:
    """Whether L2 left where it should have, for the reason it should have."""
    return record.exitcode == prediction.exitcode and record.next_probe == prediction.next_probe


def check_exit(context: Context, prediction: Prediction, record: Record, expected: dict[int, int]) -> list[Divergence]:
    """After #VMEXIT. `expected` has the quadwords that the model changed, as they are now."""
    found = list(_probes(context, prediction, record))
    observed = record.diffs
    if observed != expected:
        found += _memory(context, prediction, expected, observed)
    if same_course(prediction, record):
        found += _state(context, prediction, record)
    found += _host(context, prediction, record)
    return found


def _probes(context: Context, prediction: Prediction, record: Record) -> Iterator[Divergence]:
    """C1: values of the probes that were done, and where L2 left."""
    done = min(prediction.next_probe, record.next_probe)
    for index in range(prediction.first_probe, done):
        want, got = prediction.results[index], record.result(index)
        if context.probes[index].kind in COUNTERS:
            want, got = check_counter(record, want, got, wide=context.wide)
        if want != got:
            memory = context.probes[index].kind in ("read", "rmw", "fetch")
            yield _at(context, prediction, index, "C1" if memory else "C3",
                      "value" if memory else context.probes[index].kind, want, got)
    if not same_course(prediction, record):
        refusal = prediction.refused or record.exitcode & 0xFFFF_FFFF == 0xFFFF_FFFF
        yield _at(context, prediction, done, "C3" if refusal else "C1", "outcome",
                  predicted_outcome(prediction, done), _observed_outcome(record, done))


def check_counter(record: Record, offset: int, got: int, wide: bool) -> tuple[int, int]:
    """Two values that are the same if L2's time stamp counter, or its upper half, is L1's plus `offset`, as L1 read it
    before and behind (section 15.5.1). An L1 in a 32-bit mode did not: then the uppermost byte is looked at, which is
    that of the offset."""
    begin, end = record.before["tsc"], record.after["tsc"]
    if not begin:
        return offset >> 56, got >> (56 if wide else 24)
    shift = 0 if wide else 32
    low = (begin + offset & _MASK64) >> shift
    span = ((end + offset & _MASK64) >> shift) - low
    if got - low & _MASK64 >> shift <= span & _MASK64 >> shift:
        return low, low
    return low, got


def predicted_outcome(prediction: Prediction, index: int) -> str:
    """What must become of the probe of that index, in words."""
    if prediction.refused:
        return "VMEXIT_INVALID"
    walk = prediction.walks.get(index)
    if walk is not None:
        return str(walk.outcome)
    if index < prediction.next_probe:
        return "done"
    return ExitCode.describe(prediction.exitcode)


def _observed_outcome(record: Record, index: int) -> str:
    if index < record.next_probe:
        return f"done, result {record.result(index):#x}"
    info1, info2 = (_get(record.control, CONTROL[n]) for n in ("exitinfo1", "exitinfo2"))
    match record.exitcode:
        case ExitCode.NPF:
            return str(NestedPageFault(info1, info2))
        case 0x4E:
            return str(PageFault(info1, info2))
        case 0x4D:
            return str(GeneralProtection(info1))
        case code if code >> 32 == VMRUN_RAISED >> 32:
            return f"exception {code & 0xFF} of VMRUN, in L1"
        case code:
            return f"{ExitCode.describe(code)}, EXITINFO1 {info1:#x}, EXITINFO2 {info2:#x}"


def _state(context: Context, prediction: Prediction, record: Record) -> Iterator[Divergence]:
    """The VMCB, byte for byte: the fault's own fields are C1, the rest is C3."""
    control, save = record.control, record.save
    if control == prediction.control and save == prediction.save:
        return
    walk = prediction.walks.get(prediction.next_probe)
    faulted = walk is not None and not isinstance(walk.outcome, Reached)
    for name, want, got in differing_fields((prediction.control, control), (prediction.save, save), prediction.free):
        check = "C1" if faulted and name in ("exitinfo1", "exitinfo2") else "C3"
        yield _at(context, prediction, prediction.next_probe, check, name, want, got)


def differing_fields(
    control: tuple[bytes, bytes], save: tuple[bytes, bytes], free: Mapping[str, int]
) -> Iterator[tuple[str, int, int]]:
    """Fields that differ, as (name, expected, observed); bytes that are in no field by their offset. Bits that are
    `free` are told as they are expected."""
    for base, owners, (want, got) in ((0, _CONTROL_BYTES, control), (SAVE, _SAVE_BYTES, save)):
        differs = int.from_bytes(want, "little") ^ int.from_bytes(got, "little")
        while differs:
            offset = (differs & -differs).bit_length() - 1 >> 3
            name, place = owners.get(offset) or (f"reserved+{base + offset:03X}h", Field(offset, 1))
            differs &= ~((1 << 8 * (place.offset + place.width)) - 1)
            one, other = _get(want, place), _get(got, place)
            if differing := (one ^ other) & ~free.get(name, 0):
                yield name, one, one ^ differing


def _owners(table: Mapping[str, Field], base: int) -> dict[int, tuple[str, Field]]:
    """By each byte of an area that is in a field: which, and where in the area."""
    return {
        at.offset - base + n: (name, Field(at.offset - base, at.width))
        for name, at in table.items() for n in range(at.width)
    }


_CONTROL_BYTES: Final = _owners(CONTROL, 0)
_SAVE_BYTES: Final = _owners(STATE, SAVE)


def _memory(
    context: Context, prediction: Prediction, expected: dict[int, int], observed: dict[int, int]
) -> Iterator[Divergence]:
    """C2 for tables, C1 for data: every watched quadword that changed, or should have."""
    for address in sorted(expected.keys() | observed.keys()):
        old = prediction.old.get(address)
        want = expected.get(address, old)
        permitted = prediction.permitted.get(address, 0)
        got = observed.get(address, old)
        if got == want or (want is not None and got is not None and not (want ^ got) & ~permitted):
            continue
        table = address in context.tables
        yield Divergence(
            context.scenario, context.op, *_blame(prediction, address), "C2" if table else "C1",
            f"entry at sPA {address:#x}" if table else f"memory at sPA {address:#x}",
            "unchanged" if want is None else want, "unchanged" if got is None else got,
            "ad" if table else "write", _walk_through(prediction, address),
        )


def _blame(prediction: Prediction, address: int) -> tuple[int]:
    """The probe whose walk read an entry of the quadword at `address`; else the one that ended the run."""
    for index, walk in prediction.walks.items():
        if any(step[3] & ~7 == address for step in walk.trail):
            return (index,)
    return (prediction.next_probe if prediction.next_probe in prediction.walks else -1,)


def _walk_through(prediction: Prediction, address: int) -> Walk | None:
    return prediction.walks.get(_blame(prediction, address)[0])


def _host(context: Context, prediction: Prediction, record: Record) -> Iterator[Divergence]:
    """L1's own registers, and L2's that pass through."""
    registers, begin, end = record.around
    if begin and end - begin & _MASK64 > _FAR:
        yield _plain(context, "C3", "l1.tsc", begin, end, "exit.host")
    exited = prediction.exitcode >> 32 != VMRUN_RAISED >> 32
    for difference in _host_differences(tuple(prediction.host.items()), registers, exited):
        yield _plain(context, "C3", *difference)
    if same_course(prediction, record):
        regs = record.regs
        if not prediction.regs.items() <= regs.items():
            for name, want in prediction.regs.items():
                if regs[name] != want:
                    yield _plain(context, "C3", f"l2.{name}", want, regs[name], "exit.registers")


@lru_cache(maxsize=1000)
def _host_differences(
    predicted: tuple[tuple[str, int], ...], registers: bytes, exited: bool
) -> list[tuple[str, int, int, str]]:
    """Of L1's own registers, which are the same nearly always: field, what it must be, what it is, and the rule. Unless
    VMRUN was `exited`, no breakpoint was disabled."""
    before, after = host_registers(registers)
    wanted = dict(zip(_RESTORED, _restored(before), strict=True)) | dict(predicted)
    read = after["all_read"]
    wrong = [(f"l1.{name}", want, after[name], "exit.host") for name, want in wanted.items()
             if after[name] != want and (read or name not in DEAR)]
    if after["early"]:  # 15.17: GIF is 0 there
        wrong.append(("l1.early", 0, after["early"], "exit.host"))
    if read and exited and after["dr7"] & 0xFF:
        wrong.append(("l1.dr7", after["dr7"] & ~0xFF, after["dr7"], "exit.host-dr7"))
    return wrong


def check_sync(context: Context, record: Record) -> Iterator[Divergence]:
    """At a program's end: what L1 had no need to read behind each VMRUN. DR6 is not restored; of DR7 only that no
    breakpoint is on is said of a #VMEXIT (15.6), as above."""
    before, after = record.before, record.after
    for name in DEAR[:-1]:
        if (after[name] ^ before[name]) & (0xFF if name == "dr7" else -1):
            yield _plain(context, "C3", f"l1.{name}{AT_THE_END}", before[name], after[name], "exit.host")
    for index, name in enumerate(VMLOADED):
        want, got = record.result(index), record.result(len(VMLOADED) + index)
        if want != got:
            yield _plain(context, "C3", f"{name}{AT_THE_END}", want, got, "exit.registers")


def _at(
    context: Context, prediction: Prediction, index: int, check: str, field: str, want: int | str, got: int | str
) -> Divergence:
    return Divergence(context.scenario, context.op, index, check, field, want, got,
                      prediction.rule, prediction.walks.get(index))


def _plain(context: Context, check: str, field: str, want: int, got: int, rule: str) -> Divergence:
    return Divergence(context.scenario, context.op, -1, check, field, want, got, rule)


def _get(data: bytes, field: Field) -> int:
    return int.from_bytes(data[field.offset : field.offset + field.width], "little")


def came_to(partial: Prediction, context: Context, record: Record) -> bool:
    """Whether the machine did all the probes before that at which a prediction was given up, with their results."""
    return record.next_probe >= partial.next_probe and all(
        record.result(index) == partial.results[index] or context.probes[index].kind in COUNTERS
        for index in range(partial.first_probe, partial.next_probe))


def same(one: memoryview, other: memoryview) -> bool:
    """Whether two regions of equal size hold the same bytes, without a copy: they are megabytes."""
    size = one.nbytes
    whole = ctypes.c_char * size
    return bool(_memcmp(whole.from_buffer(one), whole.from_buffer(other), size) == 0)


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
