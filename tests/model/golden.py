"""What the golden cases are written with: registers and entries as numbers, outcomes as numbers.

Nothing here takes a constant of the model's. Bits are those of the manual's figures: CR0 (3.1.1), CR4 (3.1.3),
EFER (3.1.7), RFLAGS (3.1.6), the VMCB (appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harness.model import vmrun
from harness.model.access import Access, GeneralProtection, NestedPageFault, PageFault, Reached, StackFault
from harness.model.dirty import write_back
from harness.model.memory import Memory
from harness.model.registers import Cpu
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Host
from harness.model.walk import Walk, translate

ACCESSES: Mapping[str, Access] = {
    f"{who}{kind}": Access(write=kind == "write", fetch=kind == "fetch", user=who != "")
    for who in ("", "user ") for kind in ("read", "write", "fetch")
}


class Sparse(dict[int, int]):
    """All 52 bits of physical memory, by quadword; what was never written is 0."""

    def __missing__(self, index: int) -> int:
        return 0


@dataclass
class Case:
    """A CPU, L2's registers, L1's registers, and memory. To begin with: 4-level long mode with CR0.WP, EFER.NXE,
    and no nested paging."""

    cr0: int = 0x8001_0001
    cr3: int = 0
    cr4: int = 0x20
    efer: int = 0xD00 | 0x1000
    rflags: int = 2
    pkru: int = 0
    np_control: int = 0
    ncr3: int = 0
    host_cr0: int = 0x8000_0001
    host_cr4: int = 0x20
    host_efer: int = 0xD00 | 0x1000
    maxphyaddr: int = 52
    page1g: bool = True
    features: frozenset[str] = frozenset()
    memory: Sparse = field(default_factory=Sparse)

    def but(self, **changes: Any) -> Case:
        """The same with other registers, and a memory of its own."""
        return replace(self, **{"memory": Sparse(self.memory)} | changes)

    def put(self, address: int, entry: int, width: int = 8) -> None:
        shift = (address & 8 - width) * 8
        self.memory[address >> 3] = self.memory[address >> 3] & ~((1 << 8 * width) - 1 << shift) | entry << shift

    def get(self, address: int, width: int = 8) -> int:
        return self.memory[address >> 3] >> (address & 8 - width) * 8 & (1 << 8 * width) - 1

    def walk(self, gva: int, access: str | Access = "read") -> Walk:
        vmcb = Vmcb(Memory(0x2000), 0x1000)
        for name in ("cr0", "cr3", "cr4", "efer", "rflags", "np_control", "ncr3"):
            vmcb[name] = getattr(self, name)
        host = Host(self.host_cr0, self.host_cr4, self.host_efer, 0, 0, self.pkru)
        cpu = Cpu(self.maxphyaddr, self.page1g, features=self.features)
        paging = vmrun.paging(vmrun.load(vmcb, host), vmcb, host, cpu)
        return translate(paging, self.memory, gva, ACCESSES[access] if isinstance(access, str) else access)

    def outcome(self, gva: int, access: str | Access = "read") -> tuple[str, int] | tuple[str, int, int]:
        """("sPA", address), ("#PF", error code), ("#GP", error code), ("#SS", …) or ("#NPF", EXITINFO1, EXITINFO2)."""
        match self.walk(gva, access).outcome:
            case Reached(spa, _):
                return "sPA", spa
            case PageFault(code, address):
                assert address == gva
                return "#PF", code
            case NestedPageFault(code, address):
                return "#NPF", code, address
            case GeneralProtection(code):
                return "#GP", code
            case StackFault(code):
                return "#SS", code

    def after(self, gva: int, access: str = "read") -> None:
        """Let accessed and dirty bits be written."""
        write_back(self.memory, self.walk(gva, access).updates)
