"""What cannot be written to a register: #GP(0), and nothing changes (chapter 3; volume 3, MOV CRn, MOV DRn, WRMSR)."""

from __future__ import annotations

from typing import Final

from harness.model.consistency import cr4_mbz, efer_mbz
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmrun import Registers

_LOW: Final = 0xFFFF_FFFF
_PRIORITIES: Final = 0xF
_NO_FLUSH: Final = 1 << 63


def is_illegal(name: str, value: int, regs: Registers, cpu: Cpu) -> bool:
    """Whether writing `value` to CR0, CR3, CR4, CR8, DR6, DR7 or EFER raises #GP(0) with these registers. Other names
    are not decided here: False."""
    decides = _ILLEGAL.get(name)
    return decides is not None and decides(value, regs, cpu)


def _cr0(value: int, regs: Registers, cpu: Cpu) -> bool:
    """3.1.1: bits 63:32 must be 0; neither PG without PE nor NW without CD."""
    return bool(value > _LOW or (value & CR0.PG and not value & CR0.PE) or (value & CR0.NW and not value & CR0.CD))


def _cr3(value: int, regs: Registers, cpu: Cpu) -> bool:
    """5.3.2 and 5.5.1: long mode's has no bits beyond the physical addresses; bit 63 is PCIDs'."""
    used = (1 << cpu.maxphyaddr) - 1 | (_NO_FLUSH if regs.cr4 & CR4.PCIDE else 0)
    return bool(regs.efer & EFER.LMA and value & ~used)


def _cr4(value: int, regs: Registers, cpu: Cpu) -> bool:
    """3.1.3: reserved bits; long mode wants PAE, and keeps LA57 as it is (5.3.1)."""
    long = regs.efer & EFER.LMA
    return bool(cr4_mbz(value, cpu) or (long and (not value & CR4.PAE or (value ^ regs.cr4) & CR4.LA57)))


def _cr8(value: int, regs: Registers, cpu: Cpu) -> bool:
    """3.1.5: bits 63:4 must be 0."""
    return value > _PRIORITIES


def _debug(value: int, regs: Registers, cpu: Cpu) -> bool:
    """13.1.1: bits 63:32 must be 0."""
    return value > _LOW


def _efer(value: int, regs: Registers, cpu: Cpu) -> bool:
    """3.1.7: reserved bits; LME stays while paging is on."""
    return bool(efer_mbz(value, cpu) or (regs.cr0 & CR0.PG and (value ^ regs.efer) & EFER.LME))


_ILLEGAL: Final = {"cr0": _cr0, "cr3": _cr3, "cr4": _cr4, "cr8": _cr8, "dr6": _debug, "dr7": _debug, "efer": _efer}
