"""The program run on the model: memory, L1's registers, and for each VMRUN a prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.errors import UsageError
from harness.lockstep import stub
from harness.model import dirty, vmrun
from harness.model.access import Access, GeneralProtection, NestedPageFault, PageFault, Reached
from harness.model.dirty import Liberties
from harness.model.memory import Memory
from harness.model.registers import RFLAGS, Cpu
from harness.model.vmcb import ExitCode, Vmcb
from harness.model.vmrun import Host, Registers
from harness.model.walk import Paging, Walk, translate
from harness.scenario.world import HOST_CR0, HOST_CR4, HOST_DR7, HOST_EFER, HOST_PAT, World
from harness.wire.image import Image, tag, tags
from harness.wire.layout import CONTROL_BYTES, HOST_REGISTERS, SAVE_BYTES
from harness.wire.program import Step, WireProbe

_HOST_NAMES = {number: name for name, number in HOST_REGISTERS.items()}
_FETCH = {cpl: Access(fetch=True, user=cpl == 3) for cpl in range(4)}
_READ = {cpl: Access(user=cpl == 3) for cpl in range(4)}
_WRITE = {cpl: Access(write=True, user=cpl == 3) for cpl in range(4)}
_MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class Prediction:
    """What one VMRUN comes to.

    `next_probe` is the index of the probe that faulted, or the number of probes when all were done.
    `control` and `save` are the VMCB's bytes after the exit, `free` the fields that the manual leaves
    undefined in it. `old` has the quadwords that the model changed, as they were before; `permitted`
    the accessed and dirty bits, by the sPA of their entry, that may be set or not.
    """

    first_probe: int
    next_probe: int = 0
    refused: str = ""
    exitcode: int = 0
    rule: str = ""
    control: bytes = b""
    save: bytes = b""
    free: tuple[str, ...] = ()
    regs: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    results: dict[int, int] = field(default_factory=dict)
    walks: dict[int, Walk] = field(default_factory=dict)
    old: dict[int, int] = field(default_factory=dict)
    permitted: dict[int, int] = field(default_factory=dict)


class _Exit(Exception):
    """L2 left in the middle of a probe; never leaves this module."""

    def __init__(self, code: int, info1: int, info2: int, walk: Walk | None, rule: str) -> None:
        super().__init__(code)
        self.code, self.info1, self.info2, self.walk, self.rule = code, info1, info2, walk, rule


class Twin:
    """The model's side of a program. `liberties` is the profile of the machine it is held against."""

    def __init__(self, image: Image, cpu: Cpu, liberties: Liberties) -> None:
        self.image = image
        self.cpu = cpu
        self.liberties = liberties
        self.memory = Memory(image.ram_end)
        self.memory.bytes[image.data.start : image.data.end] = tags(image.data)
        self.host = Host(0, 0, 0, 0, 0)
        self._touched: dict[int, None] = {}
        self._paging: dict[tuple[int, ...], Paging] = {}
        self.watched: frozenset[int] = frozenset()
        self.vmcb = Vmcb(self.memory, image.vmcbs.start)
        self.tables: frozenset[int] = frozenset()
        """Pages (gVA >> 12) through which L2 reaches its tables; nothing under test maps them."""
        self.support: tuple[Paging, int, int] | None = None
        """L2's own pages were walked under this translation, and no table was written since."""

    def reset(self, world: World) -> None:
        """The state that each scenario starts in, whatever was before it."""
        words = self.memory.words
        for address in self._touched:
            words[address >> 3] = tag(address) if address in self.image.data else 0
        self._touched.clear()
        self.watched = frozenset(world.watch)
        for address, value in world.words.items():
            self.poke(address, value, 8)
        start = world.vmcb_address
        self.memory.bytes[start : start + 4096] = bytes(4096)
        self.tables = frozenset(gva >> 12 for gva in world.entry_gva.values())
        self.vmcb = Vmcb(self.memory, start)
        for name, value in world.vmcb.items():
            self.vmcb[name] = value
        self.host = Host(HOST_CR0, HOST_CR4, HOST_EFER, HOST_PAT, HOST_DR7)

    def poke(self, address: int, value: int, width: int) -> None:
        """L1 writes memory."""
        self._touched[address & ~7] = None
        if address in self.image.arena:
            self.support = None
        self.memory.write(address, value, width)

    def apply(self, step: Step) -> None:
        """Do one op that is not a RUN."""
        if step.code == "WRITE":
            self.poke(step.a, step.b, step.arg)
        elif step.code == "HOST":
            setattr(self.host, _HOST_NAMES[step.arg], step.b)

    def vmcb_bytes(self) -> tuple[bytes, bytes]:
        """Control area and save area as a record shows them."""
        start = self.vmcb.address
        memory = self.memory.bytes
        return bytes(memory[start : start + CONTROL_BYTES]), bytes(memory[start + 0x400 : start + 0x400 + SAVE_BYTES])

    def predict(self, step: Step, first: int) -> Prediction:
        """One VMRUN of a RUN op, from probe `first` on. The model's own state moves along."""
        out = Prediction(first_probe=first)
        vmcb = self.vmcb
        out.refused = vmrun.refused(vmcb, self.host, self.cpu)
        if out.refused:
            self._refuse(out)
            return out
        l2 = _L2(self, out, step)
        vmcb["eventinj"] = 0
        out.next_probe = first
        try:
            l2.enter()
            for index in range(first, len(step.probes)):
                out.next_probe = index
                out.results[index] = l2.do(step.probes[index], index)
            out.next_probe = len(step.probes)
            l2.at("end", 0)
            raise _Exit(ExitCode.VMMCALL, 0, 0, None, "exit.vmmcall")
        except _Exit as leave:
            self._leave(out, l2, leave)
        return out

    def _refuse(self, out: Prediction) -> None:
        """#VMEXIT(INVALID): nothing of L2 was run; what is saved is not defined (section 15.6)."""
        out.exitcode, out.rule = ExitCode.INVALID, out.refused
        out.next_probe = out.first_probe
        self.vmcb["exitcode"] = ExitCode.INVALID
        out.control, out.save = self.vmcb_bytes()
        out.free = ("save", "exitinfo1", "exitinfo2", "exitintinfo", "nrip", "fetched_count", "fetched_bytes",
                    "interrupt_shadow", "eventinj")

    def _leave(self, out: Prediction, l2: _L2, leave: _Exit) -> None:
        vmcb = self.vmcb
        out.exitcode, out.rule = leave.code, leave.rule
        if leave.walk is not None:
            out.walks[out.next_probe] = leave.walk
        vmrun.save(vmcb, l2.regs)
        vmcb["exitcode"], vmcb["exitinfo1"], vmcb["exitinfo2"] = leave.code, leave.info1, leave.info2
        vmcb["exitintinfo"] = 0
        vmcb["interrupt_shadow"] = 0
        free = ("fetched_count", "fetched_bytes", *l2.free)
        if leave.code == ExitCode.VMMCALL:
            free += ("exitinfo1", "exitinfo2")
        elif leave.code == stub.fault_code(13):
            free += ("exitinfo2",)
        if "nrips" in self.cpu.features:
            vmcb["nrip"] = l2.regs.rip + stub.VMMCALL_BYTES if leave.code == ExitCode.VMMCALL else 0
        out.free = free
        out.control, out.save = self.vmcb_bytes()
        out.regs = stub.CONSTANT | {"rsi": l2.step.c, "r12": out.next_probe}
        out.host = vars_of_host(self.host, l2.regs, vmcb.address)

    def paging(self, regs: Registers) -> Paging:
        """The translation that L2 is under; built once for each combination of registers."""
        key = (regs.cr0, regs.cr3, regs.cr4, regs.efer, regs.rflags & RFLAGS.AC,
               self.host.efer, self.host.cr4, self.vmcb["ncr3"], self.vmcb["np_control"])
        found = self._paging.get(key)
        if found is None:
            try:
                found = vmrun.paging(regs, self.vmcb, self.host, self.cpu)
            except ValueError as reason:
                raise UsageError(str(reason)) from None
            if len(self._paging) > 1000:
                self._paging.clear()
            self._paging[key] = found
        return found

    def changed(self, out: Prediction, address: int, old: int) -> None:
        """Note that L2, or a walk of it, changed the quadword at `address`."""
        out.old.setdefault(address, old)
        self._touched[address] = None

    def adopt(self, out: Prediction, observed: dict[int, int]) -> None:
        """Go on from what the machine did: where a prediction failed, one divergence is enough."""
        words = self.memory.words
        self.support = None
        for address, old in out.old.items():
            if address & ~0xFFF in self.watched:
                words[address >> 3] = observed.get(address, old)
        for address, value in observed.items():
            self._touched[address] = None
            words[address >> 3] = value


def vars_of_host(host: Host, regs: Registers, vmcb: int) -> dict[str, int]:
    """What L1 must find in its registers behind VMRUN, as far as it is not `before` itself."""
    return {"rax": vmcb, "cr0": host.cr0, "cr4": host.cr4, "efer": host.efer, "pat": host.pat, "dr6": regs.dr6}


class _L2:
    """L2 between VMRUN and #VMEXIT."""

    def __init__(self, twin: Twin, out: Prediction, step: Step) -> None:
        self.twin, self.out, self.step = twin, out, step
        self.regs = vmrun.load(twin.vmcb)
        self.free: tuple[str, ...] = ()
        self.fresh: set[int] | None = None
        """After L2 wrote a table: the pages (gVA >> 12) whose translation it has flushed since."""
        self.own = twin.tables
        self.page = self.regs.rip & ~0xFFF
        self.paging = twin.paging(self.regs)

    def enter(self) -> None:
        """L2's own accesses: fetch of its code, read of its mailbox. A fault of the first is the
        scenario's business; one of the others would make L2 itself fault at places nobody names."""
        regs = self.regs
        key = (self.paging, regs.rip, self.step.c)
        if self.twin.support == key:
            return  # the same walks would set the same bits again
        walk = self.access(regs.rip, _FETCH[regs.cpl])
        if not isinstance(walk.outcome, Reached):
            raise self.fault(walk)
        walk = self.access(self.step.c, _READ[regs.cpl])
        if not isinstance(walk.outcome, Reached):
            raise UsageError(f"L2 cannot reach its own mailbox any more: {walk.outcome}")
        self.twin.support = key

    def at(self, label: str, rax: int) -> None:
        """Set the registers as they are when L2 stands at `label`."""
        regs = self.regs
        regs.rip = self.page + self.twin.image.l2_labels[label]
        regs.rflags = regs.rflags & ~RFLAGS.STATUS | stub.FLAGS
        regs.rax = rax & _MASK64

    def do(self, probe: WireProbe, index: int) -> int:
        """Do one probe; returns its result, or raises _Exit."""
        kind, size, address, value = probe
        self.at(stub.label(kind, size), value)
        if kind in ("read", "write", "rmw"):
            result = self._data(kind, size, address, value, index)
        elif kind == "fetch":
            result = self._fetch(address, index)
        else:
            result = self._register(kind, address, value)
        self.regs.rax = result
        return result

    def _data(self, kind: str, size: int, address: int, value: int, index: int) -> int:
        if address & 0xFFF > 0x1000 - size:
            raise UsageError(f"{kind} of {size} bytes at {address:#x} crosses a page")
        cpl = self.regs.cpl
        self._must_be_fresh(address)
        walk = self.access(address, _READ[cpl] if kind == "read" else _WRITE[cpl])
        self.out.walks[index] = walk
        if not isinstance(walk.outcome, Reached):
            raise self.fault(walk)
        spa = walk.outcome.spa
        image, memory = self.twin.image, self.twin.memory
        if not (spa in image.data or spa in image.arena):
            raise UsageError(f"{kind} at gVA {address:#x} reaches sPA {spa:#x}, which is no page of tables or data")
        old = memory.read(spa, size)
        mask = (1 << 8 * size) - 1
        if kind != "read":
            new = (value if kind == "write" else old + value) & mask
            shift = spa & 7
            wide = (new << 8 * shift, mask << 8 * shift)
            for word in (0, 1):
                part = wide[1] >> 64 * word & _MASK64
                if part:
                    at = (spa & ~7) + 8 * word
                    before = memory.words[at >> 3]
                    self.twin.changed(self.out, at, before)
                    memory.words[at >> 3] = before & ~part | wide[0] >> 64 * word & _MASK64
            if spa in image.arena:
                self.twin.support = None
                self.fresh = set()
        if kind == "write":
            return value
        return old if size >= 4 else value & ~mask & _MASK64 | old  # 32-bit results are zero-extended

    def _must_be_fresh(self, address: int) -> None:
        """Where L2 has changed a table, a translation may be old or new until it is flushed."""
        if self.fresh is not None and address >> 12 not in self.fresh and address >> 12 not in self.own:
            raise UsageError(f"L2 wrote a table before this access of {address:#x}: flush first, by invlpg of that "
                             "page or wrcr3; more than one outcome is permitted until then")

    def _fetch(self, address: int, index: int) -> int:
        self._must_be_fresh(address)
        walk = self.access(address, _FETCH[self.regs.cpl])
        self.out.walks[index] = walk
        if not isinstance(walk.outcome, Reached):
            if not isinstance(walk.outcome, GeneralProtection):
                self.regs.rip = address
            raise self.fault(walk)
        spa = walk.outcome.spa
        if spa & 7 or spa not in self.twin.image.data or self.twin.memory.words[spa >> 3] != tag(spa):
            raise UsageError(f"fetch at gVA {address:#x} reaches sPA {spa:#x}, where there is no code that returns")
        return spa >> 3

    def _register(self, kind: str, address: int, value: int) -> int:
        """Reads and writes of L2's own registers, at CPL 0."""
        regs, vmcb = self.regs, self.twin.vmcb
        if regs.cpl and kind not in stub.UNPRIVILEGED:
            raise _Exit(stub.fault_code(13), 0, 0, None, "exit.privileged")
        if kind in stub.DESCRIPTOR_READS:
            return vmcb[stub.DESCRIPTOR_READS[kind]]
        if kind in stub.LOADED_LIMITS:
            name, limit = stub.LOADED_LIMITS[kind]
            vmcb[f"{name}.base"], vmcb[f"{name}.limit"] = value, limit
            return value
        if kind in stub.NULL_LOADS:
            name = stub.NULL_LOADS[kind]
            vmcb[f"{name}.selector"] = value
            # 15.5.1: a null segment is one with P=0; what else its attributes, limit and base say is not defined
            self.free += (f"{name}.attrib", f"{name}.limit", f"{name}.base")
            return value
        what = kind[2:]
        if what == "cr8":
            if kind == "wrcr8":
                vmcb["v_intr"] = vmcb["v_intr"] & ~0xFF | value & 0xF
                return value
            return vmcb["v_intr"] & 0xF
        if what == "seg":
            return sum(vmcb[f"{s}.selector"] << 16 * n for n, s in enumerate(("es", "cs", "ss", "ds")))
        if what == "flags":
            if kind == "wrflags":
                regs.rflags = value | RFLAGS.ONE
                return value
            return regs.rflags & ~RFLAGS.STATUS | stub.FLAGS
        if kind == "invlpg":
            if self.fresh is not None:
                self.fresh.add(address >> 12)
            return value
        name = stub.MSR_FIELDS[address] if what == "msr" else what
        own = hasattr(regs, name)
        if kind.startswith("rd"):
            return int(getattr(regs, name)) if own else vmcb[name]
        if own:
            setattr(regs, name, value)
            if name == "cr3":
                self.fresh = None
            self.paging = self.twin.paging(regs)
            self.enter_again()
        else:
            vmcb[name] = value
        return value

    def enter_again(self) -> None:
        """After a change of translation L2's own pages must still be there for it."""
        self.twin.support = None
        for address, access in ((self.page, _FETCH), (self.step.c, _READ)):
            walk = self.access(address, access[self.regs.cpl])
            if not isinstance(walk.outcome, Reached):
                raise UsageError(f"this leaves L2 without its own pages: {walk.outcome}")

    def access(self, gva: int, access: Access) -> Walk:
        """Translate, and write accessed and dirty bits back."""
        twin, out = self.twin, self.out
        try:
            walk = translate(self.paging, twin.memory.words, gva, access)
        except IndexError:
            raise UsageError(f"the walk of gVA {gva:#x} leaves L1's memory") from None
        faulted = not isinstance(walk.outcome, Reached)
        required, permitted = dirty.resolve(walk.updates, faulted, twin.liberties)
        for address, old in dirty.write_back(twin.memory.words, required).items():
            twin.changed(out, address, old)
        for address, bits, _ in permitted:
            out.permitted[address] = out.permitted.get(address, 0) | bits
        return walk

    def fault(self, walk: Walk) -> _Exit:
        """The #VMEXIT that a walk's fault comes to: L1 intercepts every exception."""
        match walk.outcome:
            case NestedPageFault(code, gpa):
                return _Exit(ExitCode.NPF, code, gpa, walk, walk.rule)
            case PageFault(code, gva):
                return _Exit(stub.fault_code(14), code, gva, walk, walk.rule)
            case GeneralProtection(code):
                return _Exit(stub.fault_code(13), code, 0, walk, walk.rule)
            case _:
                raise AssertionError(walk.outcome)
