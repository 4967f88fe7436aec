"""A machine with no QEMU in it: the model itself plays L1, L2 and the CPU behind the real rings.

It speaks the guests' protocol (guests/l1/main.c) record for record, so that lockstep can be tested
without a guest, and a fault can be planted at any point: subclass `Plant`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Final

from harness.errors import MachineLost
from harness.lockstep.driver import Lockstep
from harness.lockstep.prediction import Prediction
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine.tcg import LIBERTIES
from harness.model.liberties import Liberties
from harness.model.registers import CR0, EFER, Cpu
from harness.model.vmcb import ExitCode, Vmcb
from harness.model.vmrun import Host
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.program import Program
from harness.wire import layout
from harness.wire.channel import Channel
from harness.wire.image import PAGE, Image, tags
from harness.wire.layout import HOST, OP, PROBE, RECORD, RECORD_SLOTS, REGS, SHARED
from harness.wire.program import Step, WireProbe
from harness.wire.records import Record

_AT: Final = RECORD.offsets
_OPS: Final = {number: name for name, number in layout.OPS.items()}
_HOST_MODES: Final = {layout.HOST_MODES[mode.wire]: mode for mode in HOST_MODES.values()}
_PROBES: Final = {number: name for name, number in layout.PROBES.items()}
_ENTRY_REGS: Final = {name: int(name.encode().hex(), 16) for name in REGS.names}


class Plant:
    """Where a fault can be planted. As it is, it plants none."""

    def before_run(self, fake: FakeMachine, step: Step, first: int) -> None:
        """VMRUN begins: the ENTER record has been posted."""

    def predict(self, fake: FakeMachine, step: Step, first: int) -> Prediction:
        """What the machine does."""
        return fake.twin.predict(step, first)

    def after_run(self, fake: FakeMachine, out: Prediction) -> None:
        """#VMEXIT: L1 has not looked at its memory yet."""

    def record(self, fake: FakeMachine, data: bytearray) -> None:
        """Any record, before it is posted."""


class Everything(frozenset[int]):
    def __contains__(self, item: object) -> bool:
        return True


class FakeChannel(Channel):
    """L1 gets to work whenever the checker waits for it."""

    def __init__(self, memory: memoryview, image: Image, work: Callable[[], None]) -> None:
        super().__init__(memory, image)
        self._work = work

    def next_record(self, idle: Callable[[float], None]) -> Record:
        self._work()
        return super().next_record(idle)


class FakeMachine:
    """See harness.lockstep.driver.Machine."""

    def __init__(self, image: Image, cpu: Cpu, plant: Plant | None = None, liberties: Liberties = LIBERTIES) -> None:
        self.image = image
        self.plant = plant or Plant()
        self.twin = _take(image, cpu, liberties)
        self.memory = self.twin.memory.bytes
        self.memory[image.shared : image.shared + PAGE] = bytes(PAGE)
        self.channel = FakeChannel(self.memory, image, self.work)
        self.runs = 0
        self.posted = 0
        self._mirror: dict[int, bytes] = {}
        self._marked: dict[int, bytes] = {}
        self._l1 = self._interpret()

    def idle(self, waited: float) -> None:
        self.work()
        if waited > 0.2:
            raise self.lost("no record: the fake hangs")

    def lost(self, reason: str) -> MachineLost:
        return MachineLost(reason, ["fake-machine"], "end of log", self.channel.last_record())

    def close(self) -> None:
        self.channel.close()
        _SPARE.append(self.twin)

    def work(self) -> None:
        """L1 goes on until it waits for the checker."""
        next(self._l1)

    # --- L1 -------------------------------------------------------------------------------------

    def _shared(self, name: str) -> int:
        return int(struct.unpack_from("<Q", self.memory, self.image.shared + SHARED.offsets[name])[0])

    def _set_shared(self, name: str, value: int) -> None:
        struct.pack_into("<Q", self.memory, self.image.shared + SHARED.offsets[name], value)

    def _interpret(self) -> Iterator[None]:
        done = 0
        while True:
            while self._shared("op_posted") == done:
                yield
            at = self.image.op_ring + done % layout.OP_SLOTS * OP.size
            code, arg, a, b, c = OP.packer.unpack_from(self.memory, at)
            name = _OPS.get(code, "")
            slots = 1
            match name:
                case "RESET":
                    self._reset(a, b)
                case "WATCH":
                    self._mirror[a] = bytes(self.memory[a : a + PAGE])
                    self.twin.watched |= {a}
                case "MARK":
                    self._marked = dict(self._mirror) | {a: bytes(self.memory[a : a + PAGE])}
                case "REWIND":
                    for page, content in self._marked.items():
                        self.memory[page : page + PAGE] = content
                    self._mirror = {page: self._marked[page] for page in self._mirror}
                    self.twin.tlb.forget()
                case "HOST_MODE":
                    self.twin.host_mode = _HOST_MODES[arg]
                case "WRITE" | "HOST" | "INVLPGA" | "REMOTE":
                    self.twin.apply(Step(name, arg, a, b, c))
                    page = a & ~(PAGE - 1)
                    if page in self._mirror:
                        self._mirror[page] = bytes(self.memory[page : page + PAGE])
                case "RUN":
                    probes = tuple(self._probe(at + OP.size * (1 + n)) for n in range(arg))
                    slots += arg
                    yield from self._run(Step(name, arg, a, b, c, probes), done)
                case "SYNC":
                    yield from self._post(self._record("SYNC", done), lag=0)
            done += slots
            self._set_shared("op_done", done)

    def _probe(self, at: int) -> WireProbe:
        kind, size, address, value, _ = PROBE.packer.unpack_from(self.memory, at)
        return WireProbe(_PROBES[kind], size, address, value)

    def _reset(self, vmcb: int, size: int) -> None:
        image = self.image
        for arena in (image.arena, image.low_arena):
            self.memory[arena.start : arena.end] = bytes(arena.end - arena.start)
        for data in (image.data, image.low_data):
            self.memory[data.start : data.end] = _tags(data)
        self.twin.vmcb = Vmcb(self.twin.memory, vmcb)
        self.memory[vmcb : vmcb + size] = bytes(size)
        self._mirror.clear()
        self.twin.watched = frozenset()
        self.twin.tlb.forget()
        self.twin.host = Host(0, 0, 0, 0, 0)

    def _run(self, step: Step, number: int) -> Iterator[None]:
        first, count = 0, len(step.probes)
        # (of the world's mode, L1 knows what it is told in the VMCB)
        vmcb = self.twin.vmcb
        long = vmcb["cs.attrib"] & 0x200 and vmcb["efer"] & (EFER.LME | EFER.LMA) and vmcb["cr0"] & CR0.PG
        self.twin.mode = MODES["4-level" if long else "PAE" if vmcb["cr0"] & CR0.PE else "real"]
        self.twin.stub = self.image.stubs[self.twin.mode.stub]
        begun = self.twin.begin(step)
        while True:
            entry = dict(_ENTRY_REGS, rsi=step.c, rbp=first)
            data = self._record("ENTER", number, first_probe=first, next_probe=first, vmcb=step.a)
            self._fill(data, {}, {}, entry)
            yield from self._post(data)
            self.runs += 1
            self.plant.before_run(self, step, first)
            out = self.plant.predict(self, step, first)
            self.plant.after_run(self, out)
            host = self.twin.host_at_vmrun()
            before = {name: 0x1000 + n for n, name in enumerate(HOST.names)} | {"tsc": 0} | {
                "rax": step.a, "cr0": host.cr0, "cr4": host.cr4, "efer": host.efer, "pat": host.pat, "dr7": host.dr7,
                "rflags": 0x8D7, "all_read": 1, "early": 0,
            }
            after = before | out.host | {"dr7": host.dr7 & ~0xFF}
            regs = entry | out.regs
            reached = max(first, min(out.next_probe, count))
            data = self._record("EXIT", number, first_probe=first, next_probe=reached, vmcb=step.a)
            self._fill(data, before, after, regs)
            for index, result in out.results.items():
                struct.pack_into("<Q", data, _AT["results"] + 8 * index, result)
            self._changes(data)
            yield from self._post(data)
            code, next_probe = self._exit(data)
            if code in (ExitCode.VMMCALL, ExitCode.INVALID, 0xFFFF_FFFF) or next_probe + 1 >= count:
                return
            first = next_probe + 1
            self.twin.resume(begun)

    @staticmethod
    def _exit(data: bytearray) -> tuple[int, int]:
        """Exit code and next probe as the record says: L1 goes by what it saw."""
        code = struct.unpack_from("<Q", data, _AT["control"] + 0x70)[0]
        return int(code), int(struct.unpack_from("<I", data, _AT["next_probe"])[0])

    def _record(self, kind: str, op: int, **fields: int) -> bytearray:
        data = bytearray(RECORD.size)
        values = {"kind": layout.RECORDS[kind], "op": op, "sequence": self.posted} | fields
        for name, value in values.items():
            width = "<I" if name in ("kind", "first_probe", "next_probe") else "<Q"
            struct.pack_into(width, data, _AT[name], value)
        return data

    def _fill(self, data: bytearray, before: dict[str, int], after: dict[str, int], regs: dict[str, int]) -> None:
        control, save = self.twin.vmcb_bytes()
        data[_AT["control"] : _AT["control"] + len(control)] = control
        data[_AT["save"] : _AT["save"] + len(save)] = save
        for at, state in (("before", before), ("after", after)):
            HOST.packer.pack_into(data, _AT[at], *(state.get(name, 0) for name in HOST.names))
        REGS.packer.pack_into(data, _AT["regs"], *(regs[name] for name in REGS.names))

    def _changes(self, data: bytearray) -> None:
        found: list[tuple[int, int]] = []
        for page, old in self._mirror.items():
            now = bytes(self.memory[page : page + PAGE])
            if now != old:
                words = zip(memoryview(now).cast("Q"), memoryview(old).cast("Q"), strict=True)
                found += [(page + 8 * n, one) for n, (one, other) in enumerate(words) if one != other]
                self._mirror[page] = now
        struct.pack_into("<I", data, _AT["diffs_found"], len(found))
        for index, pair in enumerate(found[: layout.MAX_DIFFS]):
            struct.pack_into("<QQ", data, _AT["diffs"] + 16 * index, *pair)

    def _post(self, data: bytearray, lag: int | None = None) -> Iterator[None]:
        while self._shared("record_posted") - self._shared("record_checked") > RECORD_SLOTS - 1:
            yield
        self.plant.record(self, data)
        at = self.image.record_ring + self.posted % RECORD_SLOTS * RECORD.size
        self.memory[at : at + RECORD.size] = data
        self.posted += 1
        self._set_shared("record_posted", self.posted)
        if struct.unpack_from("<I", data, _AT["diffs_found"])[0] > layout.MAX_DIFFS:
            lag = 0
        while self._shared("record_posted") - self._shared("record_checked") > (
            self._shared("lag") if lag is None else lag
        ):
            yield


_tags = lru_cache(tags)
_SPARE: list[Twin] = []
"""Twins of machines that are closed: one takes 50 ms to make."""


def _take(image: Image, cpu: Cpu, liberties: Liberties) -> Twin:
    for index, twin in enumerate(_SPARE):
        if (twin.image, twin.cpu, twin.liberties) == (image, cpu, liberties):
            return _SPARE.pop(index)
    return Twin(image, cpu, liberties)


def run_on_fake(
    image: Image, cpu: Cpu, twin: Twin, programs: Iterable[Program], plant: Plant | None = None, strict: bool = True
) -> list[Result]:
    """All results of `programs` on a fake machine with `plant` in it."""
    fake = FakeMachine(image, cpu, plant, twin.liberties)
    try:
        return list(Lockstep(fake, fake.channel, twin, strict).run(programs))
    finally:
        fake.close()
