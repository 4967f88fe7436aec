"""A scenario turned into the ops that L1 interprets and the model follows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeVar

from harness.errors import UsageError
from harness.model import local_apic
from harness.model.consistency import cr4_mbz, efer_mbz
from harness.model.entries import BITS, FRAME
from harness.model.intercepts import msr_bit
from harness.model.registers import CR4, REGISTER_BITS, RFLAGS, Cpu
from harness.model.vmcb import FIELDS
from harness.scenario import ops
from harness.scenario.initial import HOST_CR0, HOST_CR4, HOST_DR7, HOST_EFER, HOST_PAT, HOST_RFLAGS
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.world import DEVICE, World, build
from harness.wire import layout
from harness.wire.channel import MAX_CHUNK
from harness.wire.image import PAGE, Image
from harness.wire.layout import HOST_REGISTERS, MAX_PROBES, PROBES
from harness.wire.program import Step, WireProbe, encode

T = TypeVar("T")

LONG_ONLY: Final = frozenset({"rdcr8", "wrcr8", "movssud"})
"""Probes that L2 cannot make with 32-bit code."""

NOT_REAL: Final = frozenset(name for name, number in PROBES.items() if number >= PROBES["cpuid"]) | ops.STRINGS | {
    "fetch", "lar", "wres", "wrds", "rdgdtr", "rdgdtl", "rdidtr", "rdidtl", "wrgdtr", "wridtr", "rdldtr", "rdtr",
    "vmrun", "vmload", "vmsave", "stgi", "clgi",
}
"""Probes that L2 cannot make in real mode."""

FLUSH_ALL: Final = 1
"""TLB_CONTROL (table 15-9)."""

_HOST: Final = {"cr0": HOST_CR0, "cr4": HOST_CR4, "efer": HOST_EFER, "pat": HOST_PAT, "dr7": HOST_DR7, "pkru": 0,
                "rflags": HOST_RFLAGS, "nmi": 0, "interrupt": 0, "gif": 0, "cr8": 0}
_HOST_FLAGS: Final = (RFLAGS.STATUS | RFLAGS.IF | RFLAGS.DF | RFLAGS.IOPL | RFLAGS.NT | RFLAGS.AC | RFLAGS.ID)
"""What of its RFLAGS L1 may have otherwise at VMRUN."""
_USUAL_BITS: Final = 40
_USUAL: Final = frozenset(["nx", "page1g", "smep", "smap", "pku", "la57", "umip", "fsgsbase", "xsave", "lmsle",
                              "second"])
_DPL_SHIFT: Final = 5
_DPL: Final = 3 << _DPL_SHIFT
"""The DPL in the attributes of a segment."""

VMCB_BITS: Final = {name: BITS | REGISTER_BITS[name] for name in ("cr0", "cr4", "efer", "rflags")} | {
    "intercept_exceptions": BITS | {"gp": 1 << 13, "pf": 1 << 14, "ud": 1 << 6, "df": 1 << 8}
}


@dataclass(frozen=True)
class Program:
    """`steps` follow on the reset to `world`; `prologue` is that reset as L1 does it, encoded: empty where
    the program before it ended in a rewind. The last step is a SYNC, or a REWIND with more to follow."""

    scenario: ops.Scenario
    world: World
    prologue: bytes
    steps: tuple[Step, ...]

    @cached_property
    def encoded(self) -> bytes:
        """The whole program for the op ring."""
        return self.prologue + encode(self.steps)


@dataclass
class Compiler:
    """Turns scenarios into programs for one image and one CPU; worlds are made once each."""

    image: Image
    cpu: Cpu
    _worlds: dict[tuple[str, ...], tuple[World, bytes]] = field(default_factory=dict)

    def compile(self, scenario: ops.Scenario) -> Program:
        """Raises UsageError, with file and line, for what makes no sense on this CPU or image."""
        world, prologue = self._world(scenario)
        return _program(scenario, world, prologue, (*self._body(scenario, world).steps, Step("SYNC")))

    def batch(self, scenarios: Sequence[ops.Scenario]) -> Iterator[Program]:
        """`scenarios`, all of one world, as programs that share one reset and one SYNC: each puts back
        exactly what it changed. As `compile` otherwise."""
        for number, scenario in enumerate(scenarios):
            world, prologue = self._world(scenario)
            body = self._body(scenario, world)
            body.rewind()
            last = number == len(scenarios) - 1
            mark = b"" if number else prologue + encode([Step("MARK", a=world.vmcb_address)])
            yield _program(scenario, world, mark, (*body.steps, Step("SYNC")) if last else tuple(body.steps))

    def _body(self, scenario: ops.Scenario, world: World) -> _Body:
        body = _Body(self.image, world, self.cpu)
        for index, op in enumerate(scenario.ops):
            try:
                body.add(index, op)
            except ValueError as reason:
                raise UsageError(f"{where(scenario, index)}: {reason}") from None
        return body

    @property
    def usual(self) -> bool:
        """Whether this is the CPU that expectations are written for: QEMU's `max`, as of 7.2."""
        return (self.cpu.maxphyaddr, self.cpu.page1g, self.cpu.features, self.cpu.npt) == (
            _USUAL_BITS, True, _USUAL, True)

    def _world(self, scenario: ops.Scenario) -> tuple[World, bytes]:
        key = world_key(scenario)
        if key not in self._worlds:
            levels = {MODES[scenario.guest].cr4, HOST_MODES[scenario.nested].cr4_set}
            if any(cr4_mbz(cr4 & CR4.LA57, self.cpu) for cr4 in levels):
                raise UsageError(f"{where(scenario, 0)}: 5-level paging needs la57, which this CPU has not")
            if scenario.nested_page != "none" and not self.cpu.npt:
                raise UsageError(f"{where(scenario, 0)}: this CPU has no nested paging")
            world = build(self.image, self.cpu, *key)
            self._worlds[key] = world, encode(_prologue(world))
        return self._worlds[key]


def world_key(scenario: ops.Scenario) -> tuple[str, str, str, str, str]:
    """What a scenario's world depends on."""
    return scenario.guest, scenario.nested, scenario.guest_page, scenario.nested_page, scenario.table_page


def _program(scenario: ops.Scenario, world: World, prologue: bytes, steps: tuple[Step, ...]) -> Program:
    program = Program(scenario, world, prologue, steps)
    if len(program.encoded) // 32 > MAX_CHUNK:
        raise UsageError(f"{scenario.source}: the program is too long: over {MAX_CHUNK} slots")
    return program


def where(scenario: ops.Scenario, index: int) -> str:
    """File and line of an op, for messages."""
    line = f":{scenario.lines[index]}" if index < len(scenario.lines) else ""
    return f"{scenario.source or scenario.name}{line}"


def _prologue(world: World) -> list[Step]:
    steps = [Step("RESET", a=world.vmcb_address, b=PAGE)]
    steps.append(Step("HOST_MODE", layout.HOST_MODES[world.host_mode.wire]))
    steps += [Step("HOST", HOST_REGISTERS[name], b=value) for name, value in _HOST.items()]
    steps += [Step("WATCH", a=page) for page in world.watch]
    steps += [Step("WRITE", 8, address, value) for address, value in world.words.items()]
    for name, value in world.vmcb.items():
        steps.append(_vmcb_write(world, name, value, -1))
    return steps


def _vmcb_write(world: World, name: str, value: int, origin: int, number: int = 1) -> Step:
    offset, width = FIELDS[name]
    if value >> 8 * width:
        raise ValueError(f"{value:#x} does not fit in {name}, which has {8 * width} bits")
    return Step("WRITE", width, _vmcb_at(world, number) + offset, value, origin=origin)


def _vmcb_at(world: World, number: int) -> int:
    return world.vmcb_address + (number - 1) * PAGE


class _Body:
    """The steps of one scenario, and what its ops have written so far."""

    def __init__(self, image: Image, world: World, cpu: Cpu) -> None:
        self.image = image
        self.cpu = cpu
        self.world = world
        self.written: dict[int, int] = {}
        self.vmcb = dict(world.vmcb)
        self.host = dict(_HOST)
        self.steps: list[Step] = []
        self.cpl = 0
        self.number = 1
        self.has_device = False
        self.others: dict[int, tuple[dict[str, int], int]] = {}
        """VMCBs that are not in use, with the CPL that they are at."""

    def add(self, index: int, op: ops.Op) -> None:
        match op:
            case ops.EntryOp():
                self._entry(index, op)
            case ops.VmcbOp():
                self._vmcb(index, op)
            case ops.HostOp():
                self._host(index, op)
            case ops.UseOp():
                self._use(index, op.number)
            case ops.InvlpgaOp():
                gva = _lookup(self.world.gva, op.page, "page")
                self.steps.append(Step("INVLPGA", op.asid, gva, origin=index))
            case ops.RunOp():
                self._run(index, op)

    def rewind(self) -> None:
        """The end of one program of a batch: all is as it was before it."""
        for register, value in self.host.items():
            if value != _HOST[register]:
                self.steps.append(Step("HOST", HOST_REGISTERS[register], b=_HOST[register]))
        self.steps.append(Step("REWIND", a=self.world.vmcb_address))

    def _entry(self, index: int, op: ops.EntryOp) -> None:
        if op.entry.startswith(tuple(self.world.maps)):
            self._map(index, op)
            return
        address = _lookup(self.world.entries, op.entry, "entry")
        width = self.world.entry_widths[op.entry.partition(".")[0]]
        new = _change(op.change, self._entry_now(op.entry), BITS)
        if op.frame is not None:
            frames = self.world.gpa if op.entry.startswith("guest") else self.world.spa
            if op.frame == DEVICE:
                self._ready_device(index)
            new = new & ~FRAME | _lookup(frames, op.frame, "page") & FRAME
        if new >> 8 * width:
            raise ValueError(f"{new:#x} does not fit in {op.entry}, which has {8 * width} bits")
        if op.second and "second" not in self.cpu.features:
            raise ValueError("L1 has one processor here")
        self.written[address] = new
        self.steps.append(Step("REMOTE" if op.second else "WRITE", width, address, new, origin=index))

    def _ready_device(self, index: int) -> None:
        """The device's registers hold zeros when a scenario first maps it."""
        if not self.has_device:
            self.has_device = True
            self.steps += [Step("WRITE", local_apic.WIDTH, local_apic.BASE + offset, origin=index)
                           for offset in local_apic.WRITABLE]

    def _map(self, index: int, op: ops.EntryOp) -> None:
        """`msrpm.NUMBER` or `iopm.NUMBER`: the bits of an MSR or a port in L1's permission maps."""
        name, _, text = op.entry.partition(".")
        if not re.fullmatch(r"0x[0-9a-fA-F]+|\d+", text) or op.frame is not None or op.change.value is not None:
            raise ValueError(f"{op.entry!r}: write {name}.NUMBER, with bits to set or clear")
        number = int(text, 0)
        if name == "iopm":
            places = {"any": (number >> 3, number & 7)} if number < 1 << 16 else {}
        else:
            places = {"read": at, "write": (at[0], at[1] + 1)} if (at := msr_bit(number, False)) else {}
        if not places:
            raise ValueError(f"{op.entry!r} has no bit in that map")
        offset = next(iter(places.values()))[0] & ~7
        bits = {what: 1 << 8 * (at & 7) + bit for what, (at, bit) in places.items()}
        address = self.world.maps[name] + offset
        new = _change(op.change, self.written.get(address, 0), bits)
        self.written[address] = new
        self.steps.append(Step("WRITE", 8, address, new, origin=index))

    def _entry_now(self, name: str) -> int:
        """The entry of that name as L1 last wrote it."""
        address = _lookup(self.world.entries, name, "entry")
        if address in self.written:
            return self.written[address]
        width = self.world.entry_widths[name.partition(".")[0]]
        return self.world.words.get(address & ~7, 0) >> (address & 7) * 8 & (1 << 8 * width) - 1

    def _vmcb(self, index: int, op: ops.VmcbOp) -> None:
        _lookup(FIELDS, op.field, "VMCB field")
        old = self.vmcb.get(op.field, 0) if op.page is None else _lookup(self.world.gva, op.page, "page")
        new = _change(op.change, old, VMCB_BITS.get(op.field, BITS))
        if op.frame is not None:
            new = new & ~FRAME | _lookup(self.world.spa if op.field == "ncr3" else self.world.gpa, op.frame, "page")
        self.vmcb[op.field] = new
        self.steps.append(_vmcb_write(self.world, op.field, new, index, self.number))

    def _use(self, index: int, number: int) -> None:
        self.others[self.number] = self.vmcb, self.cpl
        self.number = number
        if number in self.others:
            self.vmcb, self.cpl = self.others[number]
            return
        self.vmcb, self.cpl = dict(self.world.vmcb), 0
        for name, (_, width) in FIELDS.items():
            if width <= 8:  # what is wider is no field that VMRUN reads
                self.steps.append(_vmcb_write(self.world, name, self.vmcb.get(name, 0), index, number))

    def _host(self, index: int, op: ops.HostOp) -> None:
        number = _lookup(HOST_REGISTERS, op.register, "register of L1")
        new = _change(op.change, self.host[op.register], BITS | REGISTER_BITS.get(op.register, {}))
        lacking = {"cr4": cr4_mbz, "efer": efer_mbz}.get(op.register)
        if lacking is not None and (bits := lacking(new, self.cpu)):
            raise ValueError(f"L1 cannot set {bits:#x} in its {op.register.upper()}: this CPU has no such feature")
        if op.register in ("rflags", "nmi", "interrupt", "gif", "cr8") and self.world.host_mode.narrow:
            raise ValueError(f"an L1 in a 32-bit mode has {op.register} as it is")
        if op.register in ("nmi", "interrupt", "gif") and new > 1:
            raise ValueError(f"{op.register} is 0 or 1")
        if op.register == "rflags" and (new ^ HOST_RFLAGS) & ~_HOST_FLAGS:
            raise ValueError(f"{new:#x}: of its RFLAGS L1 changes IF, DF, IOPL, NT, AC, ID and the status flags")
        if op.register == "cr8" and new > 0xF:
            raise ValueError("CR8 has 4 bits")
        self.host[op.register] = new
        self.steps.append(Step("HOST", number, b=new, origin=index))

    def _run(self, index: int, op: ops.RunOp) -> None:
        if len(op.probes) > MAX_PROBES:
            raise ValueError(f"a run may have {MAX_PROBES} probes, this has {len(op.probes)}")
        if not any(step.code == "RUN" for step in self.steps) and self.vmcb["tlb_control"] != FLUSH_ALL:
            raise ValueError("the first VMRUN must flush all (TLB_CONTROL=1): others ran under the same ASIDs")
        user = op.cpl == 3
        if op.cpl != self.cpl:
            self.cpl = op.cpl
            self._write(index, "cpl", op.cpl)
            for segment in ("cs", "ss", "ds", "es"):
                attrib = self.vmcb[f"{segment}.attrib"] & ~_DPL
                self._write(index, f"{segment}.attrib", attrib | op.cpl << _DPL_SHIFT)
                self._write(index, f"{segment}.selector", self.vmcb[f"{segment}.selector"] & ~3 | op.cpl)
        entry = self.world.code[user] + self.image.stubs[self.world.mode.stub].labels["entry"]
        self._write(index, "rip", entry)
        requests = [str(probe) for probe in op.probes if probe.kind in ops.REQUESTS]
        if requests and ("second" not in self.cpu.features or len(requests) > 1):
            raise ValueError("L1 has one processor here" if len(requests) == 1 else "one request a run is done")
        probes = tuple(self._probe(index, n, probe) for n, probe in enumerate(op.probes))
        self.steps.append(
            Step("RUN", len(probes), _vmcb_at(self.world, self.number), entry, self.world.mailbox[user], probes, index)
        )

    def _write(self, index: int, name: str, value: int) -> None:
        self.vmcb[name] = value
        self.steps.append(_vmcb_write(self.world, name, value, index, self.number))

    def _probe(self, index: int, number: int, probe: ops.Probe) -> WireProbe:
        address = 0
        if probe.target:
            address = int(probe.target, 0) if probe.target[0].isdigit() else self._target(probe)
        size = probe.size or (4 if probe.kind in ops.PORTS | ops.STRINGS else self.world.mode.native)
        if probe.kind in ("inimm", "outimm"):
            address, size = layout.IMMEDIATE_PORT, 1
        if probe.kind in ops.PORTS and (size > 4 or not probe.target[0].isdigit() or address + size > 1 << 16):
            raise ValueError(f"`{probe}` needs a port's number, and 1, 2 or 4 bytes")
        if probe.kind == "overflow" and self.world.mode.long:
            raise ValueError(f"`{probe}` is none of 64-bit mode's instructions")
        if size > self.world.mode.native or (probe.kind in LONG_ONLY and not self.world.mode.long):
            raise ValueError(f"`{probe}` needs 64-bit mode")
        if probe.kind in NOT_REAL and self.world.mode.real:
            raise ValueError(f"`{probe}` needs protected mode")
        value = self._entry_value(probe.value) if isinstance(probe.value, str) else probe.value
        if value is None:
            # unlike any tag, and unlike what any other probe of the scenario writes
            value = 0x7700_0000_0000_0000 | index << 16 | number << 8 | 0x5A if probe.kind in ops.STORES else 0
        mask = (1 << 8 * self.world.mode.native) - 1
        return WireProbe(probe.kind, size, address + probe.offset & mask, value & mask)

    def _target(self, probe: ops.Probe) -> int:
        return _lookup(self.world.gva | self.world.entry_gva, probe.target, "page or entry of L2")

    def _entry_value(self, text: str) -> int:
        """`&ENTRY[@PAGE][+BIT][-BIT]` or `&vmcb.FIELD[+BIT][-BIT]`, or `&spa.PAGE`: see `ops.Probe.value`."""
        name, *changes = re.split(r"(?=[+-])", text[1:])
        name, _, page = name.partition("@")
        bits = BITS
        if name.startswith("spa."):
            value = _lookup(self.world.spa, name.removeprefix("spa."), "page")
        elif name.startswith("vmcb."):
            name = name.removeprefix("vmcb.")
            value = _lookup(self.vmcb, name, "VMCB field")
            bits = VMCB_BITS.get(name, BITS)
        else:
            value = self._entry_now(name)
        if page:
            value = value & ~FRAME | _lookup(self.world.gpa, page, "page") & FRAME
        for change in changes:
            bit = _lookup(bits, change[1:], "bit")
            value = value | bit if change[0] == "+" else value & ~bit
        return value


def _change(change: ops.Change, old: int, bits: dict[str, int]) -> int:
    try:
        return change.apply(old, bits)
    except KeyError as name:
        known = ", ".join(bit for bit in bits if not bit.startswith("bit"))
        raise ValueError(f"no bit is called {name}; there are {known}, and bit0 to bit63") from None


def _lookup(table: Mapping[str, T], name: str, what: str) -> T:
    try:
        return table[name]
    except KeyError:
        raise ValueError(f"no {what} is called {name!r}; there are {', '.join(table)}") from None
