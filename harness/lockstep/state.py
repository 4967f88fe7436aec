"""What the model keeps of a machine between VMRUNs: memory, L1's registers, the VMCB in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from harness.errors import UsageError
from harness.lockstep.active import Active
from harness.lockstep.kept_format import KeptFormat
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import NESTED_FORMAT_BY_L2
from harness.model import vmrun
from harness.model.access import Access
from harness.model.entries import P
from harness.model.liberties import Liberties
from harness.model.memory import Memory, Words
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.tlb import Tlb
from harness.model.tlb_events import INVLPGA, Flushed, Wrote
from harness.model.vmcb import FIELDS, NP_ENABLE, VIntr, Vmcb
from harness.model.vmrun import Host, Registers
from harness.model.walk import Paging, Walk
from harness.scenario.initial import INITIAL_HOST
from harness.scenario.modes import HOST_MODES, MODES, Mode
from harness.scenario.ops import DEFAULT_MODE
from harness.scenario.world import World
from harness.wire.image import PAGE, Image, tag, tags
from harness.wire.layout import HOST_REGISTERS
from harness.wire.program import Step
from harness.wire.records import Record

_HOST_NAMES = {number: name for name, number in HOST_REGISTERS.items()}
_MAX_PAGINGS = 1000
PENDING = frozenset({"nmi", "interrupt"})
"""What L1 has sent itself."""
DELIVERED = "delivered"
"""Among what is outside: the CPL of L2 when a virtual interrupt was delivered whole; until something is changed that
another delivery may touch."""
_V_INTR = FIELDS["v_intr"][0]
_OF_EVENTS = frozenset(FIELDS[name][0] for name in ("v_intr", "rflags", "rip"))


class Entered(NamedTuple):
    """Accesses as they came out where they met the same entries: `changed` has the quadwords in which they set bits, by
    index, as they were and as they then are. `played` are the quirks that had a part in them."""

    accesses: list[tuple[Paging, Access, Walk]]
    changed: list[tuple[int, int, int]]
    played: frozenset[str]


class Own:
    """L2's accesses of its own pages, at one place and CPL under one translation: `read` takes from memory the
    quadwords that they met last, `made` has by such values what came of them."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = tuple(indices)
        self.read: Callable[[Words], object] = (
            itemgetter(*indices) if len(indices) > 1 else lambda words: tuple(words[index] for index in indices))
        self.made: dict[object, Entered] = {}

    def learn(self, met: dict[int, int], ram: Words, accesses: list[tuple[Paging, Access, Walk]],
              played: frozenset[str]) -> None:
        """`accesses` were made, and reached their pages: they `met` these quadwords, by index, and `ram` has the bits
        that they set. Made again, they set none."""
        changed = [(index, old, now) for index, old in met.items() if (now := ram[index]) != old]
        self.made[tuple(met.values())] = Entered(accesses, changed, played)
        if not changed:
            return
        again = []
        for paging, access, walk in accesses:
            entries = {step[3]: step[4] for step in walk.trail}
            for at, bits, _ in walk.updates:
                entries[at] |= bits
            again.append((paging, access, walk._replace(trail=[(*step[:4], entries[step[3]]) for step in walk.trail])))
        self.made[self.read(ram)] = Entered(again, [], played)


class State:
    """The model's machine. `liberties` is the profile of the machine that it is held against."""

    def __init__(self, image: Image, cpu: Cpu, liberties: Liberties) -> None:
        self.image = image
        self.cpu = cpu
        self.liberties = liberties
        self.memory = Memory(image.ram_end)
        for data in (image.data, image.low_data):
            self.memory.bytes[data.start : data.end] = tags(data)
        self.host = replace(INITIAL_HOST)
        """L1's registers in 4-level paging; at VMRUN they are those of `host_at_vmrun`."""
        self.host_mode = HOST_MODES[DEFAULT_MODE]
        self.vmcb = Vmcb(self.memory, image.vmcbs.start)
        self.tlb = Tlb()
        self.caches = liberties.caches
        self.mode: Mode = MODES[DEFAULT_MODE]
        self.stub = image.stubs[self.mode.stub]
        self.watched: frozenset[int] = frozenset()
        self.nested_pages: frozenset[int] = frozenset()
        """Those of L1's nested tables."""
        self.own: dict[tuple[object, ...], Own] = {}
        """By place and CPL, under the translation last built: see `harness.lockstep.l2`."""
        self.quirks = Active()
        """See harness.lockstep.quirks: none but while a failed prediction is tried again."""
        self.kept: KeptFormat | None = None
        """Where an erratum says that L0 goes by it."""
        self.queued: list[Step] = []
        self.remote: list[Step] = []
        """Writes of L1's second processor: for the next RUN, and for the one that is on."""
        self.outside: dict[str, int] = {}
        """What L2 wrote that lies neither in memory nor in a VMCB, nor is L1's: `dr0` to `dr3`, a port (`cf8`); of
        PENDING what is; and DELIVERED."""
        self.seen: Record | None = None
        """What L1 posted of the VMRUN, where that decides which of several permitted courses to follow."""
        self.search = False
        """Whether to look for the walks that a TLB makes possible; without that L2 walks the tables as they are."""
        self._world: World | None = None
        self._touched: dict[int, None] = {}
        self._paging: dict[tuple[object, ...], tuple[Paging, tuple[str, ...], dict[tuple[object, ...], Own]]] = {}
        self._at_vmrun: tuple[tuple[object, ...], Host] = (), self.host

    def reset(self, world: World) -> None:
        """The state that each scenario starts in, whatever was before it."""
        words, first = self.memory.words, world.words
        stale: Iterable[int] = self._touched
        if self._world is not world:
            stale = (*stale, *self._world.words) if self._world else stale
        for address in stale:
            value = first.get(address)
            words[address >> 3] = (tag(address) if self.image.in_data(address) else 0) if value is None else value
        self._touched.clear()
        if self._world is not world:
            for address, value in first.items():
                words[address >> 3] = value
            self._world = world
            self.watched = frozenset(world.watch)
            self.nested_pages = frozenset(at & ~0xFFF for name, at in world.entries.items() if name[:6] == "nested")
        self.tlb.forget()
        self.queued = []
        self.outside = {}
        self.mode = world.mode
        self.stub = self.image.stubs[world.mode.stub]
        start = world.vmcb_address
        self.memory.bytes[start : start + PAGE] = world.vmcb_page
        self.vmcb = Vmcb(self.memory, start)
        self.host_mode = world.host_mode
        self.host = replace(INITIAL_HOST)

    def apply(self, step: Step) -> None:
        """Do one op that is not a RUN."""
        if step.code != "WRITE" or self.image.in_arena(step.a) or step.a & 0xFFF not in _OF_EVENTS:
            self.outside.pop(DELIVERED, None)
        if step.code == "WRITE":
            self.touch(step.a & ~7)
            if self.image.in_arena(step.a):
                self.tlb.add(Wrote(step.a & ~7, self.memory.words[step.a >> 3]))
            self.memory.write(step.a, step.b, step.arg)
        elif step.code == "REMOTE":
            self.queued.append(step)
        elif step.code == "INVLPGA":
            self.tlb.add(Flushed(INVLPGA, step.arg, step.a, narrow=True))
        elif step.code == "HOST":
            name = _HOST_NAMES[step.arg]
            if name not in PENDING:
                setattr(self.host, name, step.b)
            elif step.b:
                self.outside[name] = step.b
            else:
                self.outside.pop(name, None)

    def written_outside(self, name: str) -> int:
        """What L2 last wrote to that place `outside`. Raises UsageError if that is unknown."""
        if name not in self.outside:
            raise UsageError(f"L2 reads {name.upper()} before it has written it: what is there is not known")
        return self.outside[name]

    def saw_v_irq(self) -> bool:
        """Whether V_IRQ is set in what L1 posted of the VMRUN."""
        return self.seen is not None and bool(self.seen.control[_V_INTR + 1] & VIntr.IRQ >> 8)

    def touch(self, address: int) -> None:
        """Note that the quadword at `address` is not what it was at first."""
        self._touched[address] = None

    def touched_unwatched(self) -> list[int]:
        """Quadwords that were written, though nobody watches their page."""
        image, watched = self.image, self.watched
        return [a for a in self._touched if a & ~0xFFF not in watched and (image.in_data(a) or image.in_arena(a))]

    def first(self, address: int) -> int:
        """What a quadword holds that no world has a use for."""
        return tag(address) if self.image.in_data(address) else 0

    def changed(self, out: Prediction, address: int, old: int) -> None:
        """Note that L2, or a walk of it, changed the quadword at `address` from `old`."""
        out.old.setdefault(address, old)
        self._touched[address] = None

    def host_at_vmrun(self) -> Host:
        """L1's registers as VMRUN finds them."""
        host = self.host
        key = (self.host_mode.name, host.cr0, host.cr4, host.efer, host.pat, host.dr7, host.pkru, host.u_cet)
        if key != self._at_vmrun[0]:
            self._at_vmrun = key, self.host_mode.registers(host)
        return self._at_vmrun[1]

    def leads_outside(self) -> bool:
        """Whether L1's nested table is one of PAE with a PDPTE that leads out of L1's memory."""
        host, at = self.host_at_vmrun(), self.vmcb["ncr3"] & 0xFFFF_FFE0
        pae = host.cr0 & CR0.PG and host.cr4 & CR4.PAE and not host.efer & EFER.LMA
        if not (pae and self.vmcb["np_control"] & NP_ENABLE):
            return False
        entries = self.memory.words[at >> 3 : (at >> 3) + 4]
        return any(entry & P and (entry >> 12 << 12) >= self.image.ram_end for entry in entries)

    def paging(self, regs: Registers) -> Paging:
        """The translation that L2 is under; built once for each combination of registers."""
        kept = None
        if self.kept is not None and NESTED_FORMAT_BY_L2 in self.quirks.names:
            kept = self.kept.format
        key = (self.quirks, kept, regs.cr0, regs.cr3, regs.cr4, regs.efer, regs.rflags & RFLAGS.AC,
               self.host.efer, self.host.cr4, self.host.pkru, self.host_mode.name,
               self.vmcb["ncr3"], self.vmcb["np_control"])
        found = self._paging.get(key)
        if found is None:
            found = (*self.quirks.on_paging(vmrun.paging(regs, self.vmcb, self.host_at_vmrun(), self.cpu), kept), {})
            if len(self._paging) > _MAX_PAGINGS:
                self._paging.clear()
            self._paging[key] = found
        self.quirks.use(found[1])
        self.own = found[2]
        return found[0]
