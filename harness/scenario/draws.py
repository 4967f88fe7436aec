"""Ops and probes drawn at random, out of what one world has: the vocabulary of generated programs.

Values lie near boundaries: the ends of the canonical addresses, the physical address width, page ends, reserved bits.
What would end the scenario's meaning (L2 without its own pages, a debug exception, #AC) is never drawn; what a draw
cannot know (that a chain of frames leads out of L1's memory) is the rehearsal's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, TypeVar

from harness.model.intercepts import INTERCEPTS
from harness.scenario import situations
from harness.scenario.ops import MEMORY, Change, EntryOp, HostOp, InvlpgaOp, Op, Probe, UseOp, VmcbOp
from harness.scenario.program import LONG_ONLY, NOT_REAL
from harness.scenario.world import ALIASES, PAGES, World

T = TypeVar("T")

OWN: Final = ("code", "mailbox")
SYSTEM: Final = ("idt", "gdt", "tss", "stack")

_GUEST_BITS: Final = ("p", "rw", "us", "nx", "a", "d", "g", "pwt", "pcd", "pat", "ps", "bit9", "bit11")
_NARROW_BITS: Final = ("bit9", "bit11", "bit12", "bit13", "bit14", "bit20", "bit21")
"""Of an entry of 32-bit paging: available ones, and those that mean something else in a 4M page."""
_HIGH_BITS: Final = ("nx", "bit40", "bit51", "bit52", "bit58", "bit59", "bit60", "bit62")
_CLEARED: Final = (("p",), ("rw",), ("us",), ("rw", "us"), ("a",), ("d",), ("a", "d"), ("g",))
_LEGAL_CR0: Final = ("wp", "wp", "wp", "mp", "em", "ts", "cd")
_LEGAL_CR4: Final = ("smep", "smap", "pge", "pke", "umip", "fsgsbase", "de", "pce", "mce", "osxmmexcpt")
_LEGAL_EFER: Final = ("nxe", "nxe", "sce")
_PATS: Final = (0x0007_0406_0007_0406, 0x0706_0504_0100_0706)
_ASIDS: Final = (1, 2, 5, 6, 15)
_EVENTS: Final = (
    0x8000_0010, 0x8000_001F, 0x8000_000D, 0x8000_000E, 0x8000_0202, 0x8000_021E, 0x8000_0300, 0x8000_0306, 0x8000_0310,
    0x8000_0313, 0x8000_0B0D, 0xABCD_8000_0B0D, 0x15_8000_0B0E, 0x8000_0B08, 0x8000_0B11, 0x8000_0403, 0x8000_041E,
    0x120, 0x302,
)
_V_INTRS: Final = (0x1000000, 0x1000003, 0x1F_0106_0105, 0x12_010F_0100, 0x1F_0113_010F)
_DESCRIPTORS: Final = ("rdgdtr", "rdgdtl", "rdidtr", "rdidtl", "rdldtr", "rdtr")
_UNMODELLED: Final = (
    "rdpmc", "invd", "invlpga", "skinit", "monitor", "mwait", "iret", "icebp", "lldt", "ltr",
)
"""Instructions that L1 must intercept."""
_MAY_BE: Final = (
    "cpuid", "rdtsc", "rdtscp", "pause", "wbinvd", "clts", "smsw", "lmsw", "in", "out", "vmmcall", "intn", "rdcr0",
    "wrcr0", "rdcr3", "wrcr3", "rdcr4", "wrcr4", "rdcr2", "rddr7", "rdflags", "wrflags", "invlpg", "rdidtr", "rdgdtr",
    "rdtr", "wrgdtr", "xsetbv", "rdmsr", "wrmsr", "rsm",
)
_VALUES: Final = {
    "lmsw": 0x33, "lar": 0x28, "wrflags": 0x46, "wrgdtr": 0x1234_5000, "wridtr": 0x1234_5000, "wrcr2": 0x1111,
    "wrcr8": 5, "wrdr6": 0xFFFF_0FF1, "wrdr7": 0x400, "wres": 0, "wrds": 0,
}
_ALONE: Final = ("vmrun", "vmload", "vmsave", "stgi", "clgi", "hlt")
"""Instructions that every VMCB here has intercepted."""
_MSRS: Final = ("0xc0000082", "0xc0000100", "0xc0000102", "0x175", "0x176", "0xc0000080")
"""MSRs that the model has; of the last one L2 is to write what it is."""
_PORTS: Final = ("0x80", "0x5432", "0xfffe")
_CROSSING: Final = {2: (0xFFF,), 4: (0xFFD, 0xFFF), 8: (0xFF9, 0xFFC, 0xFFF)}


@dataclass(frozen=True)
class Ground:
    """What there is in one world to be changed: names of entries by kind, in a fixed order."""

    world: World
    guest: tuple[str, ...]
    """Of L2's tables, for a to d."""
    nested: tuple[str, ...]
    """Of L1's nested table, for a to d."""
    tables: tuple[str, ...]
    """Of L1's nested table, for L2's tables."""
    system: tuple[str, ...]
    """Of both, for what L2 itself is made of."""

    @classmethod
    def of(cls, world: World) -> Ground:
        """The entries of a world, by what they map."""
        kinds: dict[str, list[str]] = {"guest": [], "nested": [], "tables": [], "system": []}
        for name in world.entries:
            dimension, what, _ = name.split(".")
            if what in ALIASES or what == "alt-a":
                continue
            kind = "system" if what in OWN + SYSTEM else "tables" if what not in PAGES else dimension
            kinds[kind].append(name)
        return cls(world, *(tuple(kinds[kind]) for kind in ("guest", "nested", "tables", "system")))

    @property
    def long(self) -> bool:
        """Whether L2 begins in long mode."""
        return self.world.mode.long


@dataclass
class Draw:
    """Ops for one program, drawn by `random` out of `ground`; it knows what its program did so far."""

    ground: Ground
    random: Random
    number: int = 1
    used: set[int] = field(default_factory=lambda: {1})
    aligned: bool = False
    """Whether RFLAGS.AC may be set: at CPL 3 it makes #AC of what is not aligned, which is not modelled."""
    devices: set[str] = field(default_factory=set)
    """Pages that lead to a device, or did."""

    def one(self, values: Sequence[T]) -> T:
        """One of `values`, each as likely."""
        return values[int(self.random.random() * len(values))]

    def chance(self, probability: float) -> bool:
        """True with that probability, 0 to 1."""
        return self.random.random() < probability

    # --- what L1 changes --------------------------------------------------------------------------

    def change(self) -> list[Op]:
        """One change to the world, with what it takes to be one."""
        dice = self.random.random()
        if dice < 0.53:
            return self.entry()
        if dice < 0.76:
            return [self.register()]
        if dice < 0.82:
            return [self.host()]
        if dice < 0.87:
            return [self.translations()]
        if dice < 0.91:
            return self.several()
        if dice < 0.93:
            return situations.device(self) or self.entry()
        if dice < 0.95:
            return situations.outside(self) or [self.register()]
        return [self.event()]

    def entry(self, name: str = "") -> list[Op]:
        """A table entry, of either dimension."""
        ground = self.ground
        if not name:
            kinds = [names for names, weight in ((ground.guest, 5), (ground.nested, 5), (ground.tables, 3),
                                                 (ground.system, 1)) if names for _ in range(weight)]
            if not kinds:
                return [self.register()]
            name = self.one(self.one(kinds))
        wide = ground.world.entry_widths[name.partition(".")[0]] == 8
        dice = self.random.random()
        if name in ground.system:  # without those L2 gets nowhere, mostly
            change = Change(clear=self.one((("rw",), ("us",), ("a",), ("p",))))
        elif dice < 0.40:
            change = Change(clear=self.one(_CLEARED))
        elif dice < 0.60:
            others = _HIGH_BITS if wide else _NARROW_BITS
            change = Change(set=(self.one(others if self.chance(0.5) else _GUEST_BITS),))
        elif dice < 0.72:
            change = Change(set=("p", "rw", "us"), clear=("nx",) if wide else ())
        elif dice < 0.80:
            change = Change(set=("nx",) if wide else ("g",), clear=self.one(_CLEARED))
        elif dice < 0.84:
            change = Change(value=self.one((0, 1, 0x67, 0xFFFF_FFFE, *((1 << 63, 1 << 52) if wide else ()))))
        else:
            alt = "alt" if name.startswith("guest") else "nested-alt"
            frame = self.one((*PAGES, alt, *(("pt", "pd") if "pt" in ground.world.gpa else ())))
            places = ground.world.gpa if name.startswith("guest") else ground.world.spa
            if frame in places and not places[frame] >> (40 if wide else 32):
                return [EntryOp(name, Change(), frame)]
            change = Change(clear=("p",))
        return [EntryOp(name, change)]

    def register(self) -> Op:
        """A field of the VMCB that VMRUN loads, or that decides over what leaves L2."""
        dice = self.random.random()
        if dice < 0.20:
            return VmcbOp("cr0", self._either(_LEGAL_CR0))
        if dice < 0.45:
            return VmcbOp("cr4", self._either(_LEGAL_CR4))
        if dice < 0.58:
            return VmcbOp("efer", self._either(_LEGAL_EFER))
        if dice < 0.66:
            self.aligned = True
            return VmcbOp("rflags", Change(value=self.one((0x2, 0x202, 0x40002, 0x40AD7, 0x3002))))
        if dice < 0.74 and not self.ground.world.mode.real:
            vectors = self.one((("pf",), ("gp",), ("ud",), ("pf", "gp"), ("df",), ("bit0", "bit3"), ("bit12",)))
            return VmcbOp("intercept_exceptions", self._either(vectors, clear=0.8))
        if dice < 0.80:
            return VmcbOp(self.one(("cr2", "sysenter_eip", "kernel_gs_base", "lstar", "rax")),
                          Change(value=self.one((0, 0x7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000, 0x1234_5678))))
        if dice < 0.85:
            return VmcbOp("g_pat", Change(value=self.one(_PATS)))
        if dice < 0.90:
            return VmcbOp(self.one(("fs.base", "gs.base")), Change(value=self.one((0, 0x7FFF_FFFF_F000, 0x1234_5000))))
        if dice < 0.93:
            return VmcbOp("dr7", Change(value=self.one((0x400, 0x700))))
        if dice < 0.96:
            return VmcbOp("v_intr", Change(value=self.one(_V_INTRS if self.ground.long else _V_INTRS[:2])))
        return VmcbOp("tsc_offset", Change(value=self.one((0, 0x7700_0000_0000_0000))))

    def _either(self, bits: Sequence[str], clear: float = 0.4) -> Change:
        bit = (self.one(bits),)
        return Change(clear=bit) if self.chance(clear) else Change(set=bit)

    def host(self) -> Op:
        """A register of L1's own."""
        dice = self.random.random()
        if dice < 0.4:
            return HostOp("efer", self._either(("nxe",), clear=0.6))
        if dice < 0.55:
            return HostOp("cr0", self._either(("wp",), clear=0.6))
        if dice < 0.75:
            return HostOp("cr4", self._either(("smep", "pge", "smap")))
        if dice < 0.95:
            return HostOp("pkru", Change(value=self.one((0, 0x4, 0x8, 0xC, 0xC000_0000, 0xFFFF_FFFF, 0x1, 0x2))))
        return HostOp("pat", Change(value=self.one(_PATS)))

    def translations(self) -> Op:
        """What decides over what a TLB may hold."""
        world, dice = self.ground.world, self.random.random()
        if dice < 0.35:
            return VmcbOp("tlb_control", Change(value=self.one((0, 0, 1))))
        if dice < 0.55:
            return VmcbOp("asid", Change(value=self.one(_ASIDS)))
        if dice < 0.75:
            return InvlpgaOp(self.one(PAGES), self.one(_ASIDS))
        if dice < 0.87 and "alt" in world.gpa:
            return VmcbOp("cr3", Change(), frame="alt") if self.chance(0.6) else VmcbOp(
                "cr3", Change(value=world.vmcb["cr3"]))
        if "nested-alt" in world.spa:
            return VmcbOp("ncr3", Change(), frame="nested-alt") if self.chance(0.6) else VmcbOp(
                "ncr3", Change(value=world.vmcb["ncr3"]))
        return VmcbOp("tlb_control", Change(value=0))

    def several(self) -> list[Op]:
        """Another VMCB, one of its own ASID where it is new."""
        new = self.one((1, 2, 3))
        ops: list[Op] = [UseOp(new)]
        if new not in self.used:
            ops.append(VmcbOp("asid", Change(value=self.one(_ASIDS))))
        self.used.add(new)
        self.number = new
        return ops

    def event(self) -> Op:
        """An event for L2, or what its delivery depends on."""
        dice = self.random.random()
        if dice < 0.7:
            return VmcbOp("eventinj", Change(value=self.one(_EVENTS)))
        if dice < 0.9:
            return VmcbOp("idtr.limit", Change(value=self.one((0x7F, 0x8F, 0xDF, 0x1FF))))
        return VmcbOp("gdtr.limit", Change(value=self.one((0x2F, 0x7F))))

    # --- what L2 does -----------------------------------------------------------------------------

    def probes(self, cpl: int) -> tuple[list[Op], list[Probe]]:
        """Probes of one run, and ops that must come before it."""
        before: list[Op] = []
        found: list[Probe] = []
        for _ in range(self.one((1, 2, 2, 3, 3, 4))):
            dice = self.random.random()
            if dice < 0.74:
                found.append(self.access())
            elif dice < 0.82 and self.ground.world.entry_gva and cpl == 0:
                found.append(self.own_table())
            elif dice < 0.90:
                found += self.own_register(cpl)
            else:
                ops, probe = self.instruction(cpl)
                before += ops
                found.append(probe)
        return before, [probe for probe in found if self.fits(probe.kind)]

    def fits(self, kind: str) -> bool:
        """Whether L2's mode has such a probe."""
        mode = self.ground.world.mode
        return not ((mode.real and kind in NOT_REAL) or (not mode.long and kind in LONG_ONLY)
                    or (mode.long and kind == "overflow"))

    def access(self, kind: str = "", page: str = "") -> Probe:
        """An access to memory."""
        mode = self.ground.world.mode
        kind = kind or self.one(("read", "read", "read", "write", "write", "write", "rmw", "fetch", "fetch", "push",
                                 "pop"))
        if mode.real and kind == "fetch":
            kind = "read"
        page = page or self.one(("a", "a", "a", "b", "b", "c", "d"))
        if page in self.devices:
            return situations.register(self, page)
        dice = self.random.random()
        if mode.long and dice < 0.06:
            return Probe(kind, f"{self.edge():#x}")
        offset = 8 * self.one(range(1, 0x100))
        if kind in ("fetch", "push", "pop"):
            return Probe(kind, page, offset)
        size = self.one((0, 0, 0, 1, 2, 4, 8 if mode.long else 4))
        if dice < 0.2 and not self.aligned and mode.paging:
            width = size or mode.native
            if width in _CROSSING and page != "d":
                return Probe(kind, page, self.one(_CROSSING[width]), size)
        if dice < 0.35 and not self.aligned:
            offset += self.one(range(8))
        return Probe(kind, page, offset, size)

    def edge(self) -> int:
        """A gVA at an end of the canonical addresses, or behind one; aligned."""
        top = 1 << (56 if self.ground.world.mode.name == "5-level" else 47)
        return self.one((top, top - 8, (1 << 64) - top, (1 << 64) - top - 8, (1 << 64) - 8, 1 << 63, 0))

    def own_table(self) -> Probe:
        """L2 writes an entry of its own tables, or reads it."""
        names = [name for name in self.ground.guest if name in self.ground.world.entry_gva]
        if not names:
            return self.access()
        name = self.one(names)
        if self.chance(0.2):
            return Probe("read", name)
        other = self.one(names)
        source = name if self.chance(0.6) else name.replace(f".{name.split('.')[1]}.", f".{other.split('.')[1]}.")
        change = self.one(("", "-rw", "-p", "-us", "+a", "+g", "-a", "+d"))
        return Probe("write", name, value=f"&{source}{change}")

    def own_register(self, cpl: int) -> list[Probe]:
        """L2 reads or writes a register of its own, or flushes."""
        long = self.ground.long
        if cpl == 3:
            return [Probe(self.one(("rdflags", "rdrsp", "rdseg", "rdpkru")))]
        pae = self.ground.world.mode.name == "PAE"
        return [self.one((
            Probe("invlpg", self.one(PAGES)), Probe("invlpg", self.one(PAGES)),
            Probe("wrcr3", value="&vmcb.cr3"), Probe("wrcr3", value="&vmcb.cr3"),
            Probe("wrcr0", value=f"&vmcb.cr0{self.one(('-wp', '+wp', '+mp'))}"),
            Probe("rdcr4" if pae else "wrcr4", value=None if pae else
                  f"&vmcb.cr4{self.one(('+smep', '-smep', '+smap', '-pge', '+pge', '+pke'))}"),
            Probe("rdcr0"), Probe("rdcr3"), Probe("rdcr2"), Probe("rdflags"), Probe("rdseg"),
            Probe("wrpkru", value=self.one((0, 0xC, 0xFFFF_FFFF))),
            Probe("wrcr2", value=0x1111), Probe("lar", value=0x28), Probe("wrcr8" if long else "rdflags",
                                                                          value=5 if long else None),
            Probe(self.one(_DESCRIPTORS)),
        ))]

    def instruction(self, cpl: int) -> tuple[list[Op], Probe]:
        """An instruction that L1 may intercept, with the op that makes it do so."""
        dice = self.random.random()
        if dice < 0.15:
            return [], Probe(self.one(_ALONE))
        if dice < 0.30:
            return [], Probe(self.one(("undefined", "divide", "breakpoint", "intn" if self.ground.long else "divide")))
        must = dice < 0.65
        kind = self.one(_UNMODELLED if must else _MAY_BE)
        must = must or (cpl == 3 and kind in ("in", "out", "rdtsc", "rdtscp"))
        return self.intercept(kind, must), self.argued(kind)

    def intercept(self, kind: str, must: bool = True) -> list[Op]:
        """What makes L1 intercept a probe of that kind; or, unless it `must`, perhaps nothing."""
        if kind not in INTERCEPTS or not (must or self.chance(0.6)):
            return []
        field, bit, _ = INTERCEPTS[kind]
        ops: list[Op] = [VmcbOp(field, Change(set=(f"bit{bit}",)))]
        if kind in ("rdmsr", "wrmsr"):
            ops.append(EntryOp(f"msrpm.{self.one(_MSRS)}", Change(set=("read" if kind == "rdmsr" else "write",))))
        elif kind in ("in", "out"):
            ops.append(EntryOp(f"iopm.{self.one(_PORTS)}", Change(set=("any",))))
        return ops

    def argued(self, kind: str) -> Probe:
        """A probe of that kind, with what it needs."""
        if kind in ("in", "out"):
            return Probe(kind, self.one(_PORTS), size=self.one((1, 2)))
        if kind == "rdmsr":
            return Probe(kind, self.one(_MSRS))
        if kind == "wrmsr":
            msr = self.one(_MSRS)
            return Probe(kind, msr, value="&vmcb.efer" if msr == "0xc0000080" else self.one((0, 0x7654_321F_ED0)))
        if kind in MEMORY:
            return Probe(kind, self.one(PAGES), 8)
        if kind in ("wrcr0", "wrcr3", "wrcr4"):
            return Probe(kind, value=f"&vmcb.{kind[2:]}")
        return Probe(kind, value=_VALUES.get(kind))

