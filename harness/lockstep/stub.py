"""The contract of L2's code (guests/l1/l2.inc): what it holds in registers around each access.

The model knows the architecture; this module knows our own L2, so that the whole saved state can be
predicted, RIP, RAX and RFLAGS included.
"""

from __future__ import annotations

from typing import Final

from harness.model.registers import RFLAGS
from harness.scenario.ops import SIZED, STRINGS

FLAGS: Final = RFLAGS.ZF | RFLAGS.PF
"""Status flags at each labelled access: those of a comparison of equals."""

CONSTANT: Final = {
    "r8": 0x0808_0808_0808_0808, "r9": 0x0909_0909_0909_0909, "r10": 0x1010_1010_1010_1010,
    "r11": 0x1111_1111_1111_1111, "r12": 0x1212_1212_1212_1212, "r13": 0x1313_1313_1313_1313,
    "r14": 0x1414_1414_1414_1414, "r15": 0x1515_1515_1515_1515,
}
"""General registers that L1 sets before VMRUN and L2 leaves alone (guests/l1/main.c)."""

MSR_FIELDS: Final = {
    0xC000_0080: "efer", 0x277: "g_pat", 0xC000_0081: "star", 0xC000_0082: "lstar", 0xC000_0083: "cstar",
    0xC000_0084: "sfmask", 0xC000_0100: "fs.base", 0xC000_0101: "gs.base", 0xC000_0102: "kernel_gs_base",
    0x174: "sysenter_cs", 0x175: "sysenter_esp", 0x176: "sysenter_eip",
}
"""MSRs that L2 may read and write: those with a field in the VMCB."""

DESCRIPTOR_READS: Final = {
    "rdgdtr": "gdtr.base", "rdgdtl": "gdtr.limit", "rdidtr": "idtr.base", "rdidtl": "idtr.limit",
    "rdldtr": "ldtr.selector", "rdtr": "tr.selector",
}
"""Probes that store a descriptor-table or system-segment register, and the VMCB field it came from."""

LOADED_LIMITS: Final = {"wrgdtr": ("gdtr", 0x27), "wridtr": ("idtr", 0x13F)}
"""Probes that load a descriptor-table register: which, and the limit that L2 loads with the base."""

SEGMENT_LOADS: Final = {"wres": "es", "wrds": "ds"}
"""Probes that load a segment register."""

UNPRIVILEGED: Final = frozenset(
    {"rdrsp", "wrrsp", "rdseg", "rdflags", "wrflags", "rdpkru", "wrpkru", "cpuid", "rdtsc", "rdtscp", "pause", "intn",
     "icebp", "breakpoint", "overflow", "undefined", "divide", "smsw", "in", "out", "vmmcall", "iret", "remote",
     "remotenmi", "rsm", "inimm", "outimm"}
    | STRINGS | DESCRIPTOR_READS.keys() | SEGMENT_LOADS.keys()
)
"""Register probes that work at CPL 3 too (SGDT and the like while CR4.UMIP is 0)."""


def label(kind: str, size: int) -> str:
    """The symbol of the access that a probe makes."""
    return f"{kind}_{size}" if kind in SIZED else kind
