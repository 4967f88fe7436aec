"""An L1 and its L2 under an observer, for the tests of what is seen of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum
from harness.lockstep.observe import Observer
from harness.model.access import ErrorCode, Reached
from harness.model.dirty import write_back
from harness.model.entries import FRAME, A, P
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmcb import ExitCode, Vmcb
from harness.wire.stop import ACCESS, ENTER, EXIT, INVLPGA, Stop
from tests.model.tables import FETCH, GVA, READ, TABLE_OFFSET, Space

E = ErrorCode
CODE = GVA
DATA = GVA + 0x1000
PAGING = CR0.PE | CR0.PG | CR0.WP
LONG = EFER.SVME | EFER.LME | EFER.LMA | EFER.NXE
HOLE = 0x1234_5000
"""A gPA that L1 does not map at first."""


@dataclass
class World:
    """An L1 with one VMCB, and an L2 with a page of code and one of data, under an observer."""

    errata: list[Erratum] = field(default_factory=list)
    alone: bool = True

    def __post_init__(self) -> None:
        self.space = space = Space()
        for gva in (CODE, DATA):
            page = space.guest_page()
            space.map_guest(gva, page)
        self.vmcb = Vmcb(space.memory, space.page())
        values = {
            "asid": 1, "np_control": 1, "ncr3": space.ncr3, "intercept_misc2": 3, "cr0": PAGING, "cr3": space.gcr3,
            "cr4": CR4.PAE, "efer": LONG, "dr6": 0xFFFF_0FF0, "dr7": 0x400, "rflags": 2, "rip": CODE,
            "cs.attrib": 0x29B, "g_pat": 0x0007_0406_0007_0406,
        }
        for name, value in values.items():
            self.vmcb[name] = value
        self.cpu = Cpu(48, True, 16, frozenset({"nx"}))
        self.observer = Observer("test", space.memory.bytes, self.cpu, self.errata)
        self.host = {"rax": self.vmcb.address, "rsp": 0x1000, "rip": 0x2000, "eflags": 2, "cs": 8, "ss": 16, "ds": 16,
                     "es": 16, "cr0": PAGING, "cr3": 0x3000, "cr4": CR4.PAE, "efer": LONG}

    def enter(self) -> list[Divergence]:
        return self.observer.stop(Stop(ENTER, 1, dict(self.host), self.alone))

    def leave(self, code: int, info1: int = 0, info2: int = 0, **host: int) -> list[Divergence]:
        """The #VMEXIT of a machine that fetched the instruction at L2's RIP."""
        write_back(self.space.memory.words, self.space.walk(CODE, FETCH).updates)
        self.vmcb["exitcode"], self.vmcb["exitinfo1"], self.vmcb["exitinfo2"] = code, info1, info2
        now = self.host | {"rip": self.host["rip"] + 3} | host
        return self.observer.stop(Stop(EXIT, 1, now, self.alone))

    def npf(self, info1: int = E.FINAL | E.U, gpa: int = HOLE) -> list[Divergence]:
        return self.leave(ExitCode.NPF, info1, gpa)

    def access(self, gva: int = DATA, write: bool = False, spa: int | None = None, others: bool = False, **l2: int
               ) -> list[Divergence]:
        """A memory access of L2, after which its page is where the walk leads."""
        walk = self.space.walk(gva, READ._replace(write=write))
        write_back(self.space.memory.words, walk.updates)
        reached = walk.outcome.spa if isinstance(walk.outcome, Reached) else 0
        registers = self.host | {"cr3": self.space.gcr3, "cs": 0, "eflags": 2} | l2
        return self.observer.stop(Stop(ACCESS, 1, registers, self.alone, gva=gva, write=write,
                                       spa=reached if spa is None else spa, others=others))

    def vmmcall(self) -> list[Divergence]:
        return self.leave(ExitCode.VMMCALL)

    def invlpga(self, gva: int, asid: int = 1) -> list[Divergence]:
        return self.observer.stop(Stop(INVLPGA, 1, dict(self.host), self.alone, gva=gva, asid=asid))

    def other_table(self, without: int | None = None) -> None:
        """nCR3 leads to a copy of the nested table, in which the page of `without` is not present."""
        space, gone = self.space, self.entry(without) if without is not None else -1

        def copy(table: int, depth: int) -> int:
            new = space.page()
            for at in range(0, 4096, 8):
                entry = space.get(table + at)
                if entry & P and depth < 3:
                    entry = copy(entry & FRAME, depth + 1) | entry & ~FRAME
                space.set(new + at, 0 if table + at == gone else entry)
            return new

        self.vmcb["ncr3"] = copy(space.ncr3, 0)

    def unmapped_table(self) -> int:
        """The gPA of L2's PTE for DATA, in a page that L1 maps no more."""
        steps = self.space.walk(DATA, READ).steps
        pte = next(s.address for s in reversed(steps) if s.dimension == "guest")
        self.space.change([s.address for s in steps if s.purpose == "pte"][-1], clear=P)
        return pte + TABLE_OFFSET

    def entry(self, gva: int = CODE) -> int:
        """The sPA of the nested PTE of a page of L2's."""
        return next(s.address for s in reversed(self.space.walk(gva, READ).steps) if s.dimension == "nested")


def told(found: list[Divergence]) -> list[tuple[str, str, str]]:
    return [(one.check, one.field, one.rule) for one in found]


def fault(info1: int, gpa: int = HOLE, code: int = ExitCode.NPF) -> Callable[[World], list[Divergence]]:
    def run(world: World) -> list[Divergence]:
        world.enter()
        return world.leave(code, info1, gpa)
    return run


def no_flush(change: Callable[[World, int], object]) -> Callable[[World], list[Divergence]]:
    """An L1 that changes a nested entry that was used, and does not flush."""
    def run(world: World) -> list[Divergence]:
        at = world.entry(DATA)
        world.space.change(at, set=A)
        world.enter()
        world.vmmcall()
        change(world, at)
        return world.enter()
    return run
