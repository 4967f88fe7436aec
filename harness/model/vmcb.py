"""The virtual machine control block: its fields by name (appendix B, tables B-1 and B-2)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from harness.model.memory import Memory

SAVE: Final = 0x400
"""Offset of the state-save area in the VMCB."""


class Field(NamedTuple):
    """Byte offset in the VMCB, and width in bytes."""

    offset: int
    width: int


def _segments() -> dict[str, Field]:
    fields = {}
    for slot, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")):
        at = SAVE + 16 * slot
        fields[f"{name}.selector"] = Field(at, 2)
        fields[f"{name}.attrib"] = Field(at + 2, 2)
        fields[f"{name}.limit"] = Field(at + 4, 4)
        fields[f"{name}.base"] = Field(at + 8, 8)
    return fields


CONTROL: Final[dict[str, Field]] = {
    "intercept_cr": Field(0x000, 4),
    "intercept_dr": Field(0x004, 4),
    "intercept_exceptions": Field(0x008, 4),
    "intercept_misc1": Field(0x00C, 4),
    "intercept_misc2": Field(0x010, 4),
    "intercept_misc3": Field(0x014, 4),
    "iopm_base": Field(0x040, 8),
    "msrpm_base": Field(0x048, 8),
    "tsc_offset": Field(0x050, 8),
    "asid": Field(0x058, 4),
    "tlb_control": Field(0x05C, 1),
    "v_intr": Field(0x060, 8),
    "interrupt_shadow": Field(0x068, 8),
    "exitcode": Field(0x070, 8),
    "exitinfo1": Field(0x078, 8),
    "exitinfo2": Field(0x080, 8),
    "exitintinfo": Field(0x088, 8),
    "np_control": Field(0x090, 8),
    "avic_bar": Field(0x098, 8),
    "ghcb": Field(0x0A0, 8),
    "eventinj": Field(0x0A8, 8),
    "ncr3": Field(0x0B0, 8),
    "lbr_control": Field(0x0B8, 8),
    "clean": Field(0x0C0, 4),
    "nrip": Field(0x0C8, 8),
    "fetched_count": Field(0x0D0, 1),
    "fetched_bytes": Field(0x0D1, 15),
    "avic_backing_page": Field(0x0E0, 8),
    "avic_logical_table": Field(0x0F0, 8),
    "avic_physical_table": Field(0x0F8, 8),
}

STATE: Final[dict[str, Field]] = _segments() | {
    "cpl": Field(0x4CB, 1),
    "efer": Field(0x4D0, 8),
    "cr4": Field(0x548, 8),
    "cr3": Field(0x550, 8),
    "cr0": Field(0x558, 8),
    "dr7": Field(0x560, 8),
    "dr6": Field(0x568, 8),
    "rflags": Field(0x570, 8),
    "rip": Field(0x578, 8),
    "rsp": Field(0x5D8, 8),
    "s_cet": Field(0x5E0, 8),
    "ssp": Field(0x5E8, 8),
    "isst_addr": Field(0x5F0, 8),
    "rax": Field(0x5F8, 8),
    "star": Field(0x600, 8),
    "lstar": Field(0x608, 8),
    "cstar": Field(0x610, 8),
    "sfmask": Field(0x618, 8),
    "kernel_gs_base": Field(0x620, 8),
    "sysenter_cs": Field(0x628, 8),
    "sysenter_esp": Field(0x630, 8),
    "sysenter_eip": Field(0x638, 8),
    "cr2": Field(0x640, 8),
    "g_pat": Field(0x668, 8),
    "debugctl": Field(0x670, 8),
    "br_from": Field(0x678, 8),
    "br_to": Field(0x680, 8),
    "last_excp_from": Field(0x688, 8),
    "last_excp_to": Field(0x690, 8),
}

FIELDS: Final[dict[str, Field]] = CONTROL | STATE


_LETTERS: Final = {1: "B", 2: "H", 4: "I", 8: "Q", 15: "15s"}
"""How struct calls fields of so many bytes."""


def _accessors() -> dict[str, tuple[Callable[..., tuple[Any, ...]], Callable[..., None], int]]:
    table = {}
    for name, (offset, width) in FIELDS.items():
        packer = struct.Struct(f"<{_LETTERS[width]}")
        table[name] = (packer.unpack_from, packer.pack_into, offset)
    return table


_ACCESS: Final = _accessors()


class ExitCode:
    """#VMEXIT codes (appendix C)."""

    EXCEPTION: Final = 0x40
    NMI: Final = 0x61
    HLT: Final = 0x78
    SHUTDOWN: Final = 0x7F
    VMRUN: Final = 0x80
    VMMCALL: Final = 0x81
    VMLOAD: Final = 0x82
    VMSAVE: Final = 0x83
    STGI: Final = 0x84
    CLGI: Final = 0x85
    NPF: Final = 0x400
    INVALID: Final = (1 << 64) - 1

    _INSTRUCTIONS: Final = (
        "INTR", "NMI", "SMI", "INIT", "VINTR", "CR0_SEL_WRITE", "IDTR_READ", "GDTR_READ", "LDTR_READ", "TR_READ",
        "IDTR_WRITE", "GDTR_WRITE", "LDTR_WRITE", "TR_WRITE", "RDTSC", "RDPMC", "PUSHF", "POPF", "CPUID", "RSM", "IRET",
        "SWINT", "INVD", "PAUSE", "HLT", "INVLPG", "INVLPGA", "IOIO", "MSR", "TASK_SWITCH", "FERR_FREEZE", "SHUTDOWN",
        "VMRUN", "VMMCALL", "VMLOAD", "VMSAVE", "STGI", "CLGI", "SKINIT", "RDTSCP", "ICEBP", "WBINVD", "MONITOR",
        "MWAIT", "MWAIT_CONDITIONAL", "XSETBV",
    )

    @classmethod
    def describe(cls, code: int) -> str:
        """The manual's name for an exit code."""
        names = {
            cls.NPF: "NPF", cls.INVALID: "INVALID", 0x4D: "#GP", 0x4E: "#PF",
        }
        if code in names:
            return f"VMEXIT_{names[code]}"
        if cls.EXCEPTION <= code < cls.EXCEPTION + 32:
            return f"VMEXIT_EXCP{code - cls.EXCEPTION}"
        if code < cls.EXCEPTION:
            return f"VMEXIT_{'CR' if code < 0x20 else 'DR'}{code & 0xF}_{'WRITE' if code & 0x10 else 'READ'}"
        if 0x60 <= code < 0x60 + len(cls._INSTRUCTIONS):
            return f"VMEXIT_{cls._INSTRUCTIONS[code - 0x60]}"
        return f"VMEXIT {code:#x}"


SEGMENT_P: Final = 1 << 7
SEGMENT_L: Final = 1 << 9
SEGMENT_D: Final = 1 << 10
"""P in a segment's attributes; L and D in those of code."""

NP_ENABLE: Final = 1 << 0
NP_GMET: Final = 1 << 3
NP_SSS: Final = 1 << 4
"""np_control bits: nested paging, guest mode execute trap, supervisor shadow stack check."""

MISC1_INTR: Final = 1 << 0
MISC1_NMI: Final = 1 << 1
"""intercept_misc1 bits."""

MISC2_VMRUN: Final = 1 << 0
MISC2_SVM: Final = 0x3F
"""intercept_misc2 bits; the last are VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI and CLGI."""


class VIntr:
    """v_intr bits (sections 15.21, 15.29.4 and 15.33.1)."""

    TPR: Final = 0xFF
    IRQ: Final = 1 << 8
    GIF: Final = 1 << 9
    IGN_TPR: Final = 1 << 20
    MASKING: Final = 1 << 24
    GIF_ENABLE: Final = 1 << 25
    NMI_ENABLE: Final = 1 << 26
    X2AVIC: Final = 1 << 30
    AVIC: Final = 1 << 31


class Vmcb:
    """A VMCB in memory, by field name; `address` is its sPA. A value too wide for its field raises
    struct.error."""

    def __init__(self, memory: Memory, address: int) -> None:
        self.address = address
        self.bytes = memory.bytes

    def __getitem__(self, name: str) -> int:
        unpack, _, offset = _ACCESS[name]
        value: int = unpack(self.bytes, self.address + offset)[0]
        return value

    def __setitem__(self, name: str, value: int) -> None:
        _, pack, offset = _ACCESS[name]
        pack(self.bytes, self.address + offset, value)


class Group:
    """Some fields of the VMCB, to be read together: `names` are in the order of their places."""

    def __init__(self, *names: str) -> None:
        self.names = tuple(sorted(names, key=lambda name: FIELDS[name].offset))
        self._start = at = FIELDS[self.names[0]].offset
        parts = ["<"]
        for name in self.names:
            offset, width = FIELDS[name]
            parts.append(f"{offset - at}x{_LETTERS[width]}")
            at = offset + width
        self._unpack = struct.Struct("".join(parts)).unpack_from

    def values(self, vmcb: Vmcb) -> tuple[int, ...]:
        """In the order of `names`."""
        return self._unpack(vmcb.bytes, vmcb.address + self._start)

    def read(self, vmcb: Vmcb) -> dict[str, int]:
        """By name."""
        return dict(zip(self.names, self._unpack(vmcb.bytes, vmcb.address + self._start), strict=True))
