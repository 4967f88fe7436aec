"""The records that Python and the guests share: one table, from which both sides are made.

Every structure is little-endian and naturally aligned, so that the C compiler adds no padding of
its own (a test holds this against the guest's debug information). `header.py` prints the C header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

PROTOCOL = 13
"""Bumped with every change of layout or meaning; L1 states the version it was built with."""

VMRUN_RAISED = 1 << 62
"""What L1 writes to EXITCODE, with the vector, where VMRUN itself (or VMLOAD before it) raises an exception."""

MAGIC = 0x6B6C_6177_6E69_7774
"""'twinwalk' in memory order: L1 writes it last, when the shared page is complete."""

OP_SLOTS = 1 << 15
"""Slots of the op ring (L1 reads); a power of two."""

RECORD_SLOTS = 256
"""Slots of the record ring (L1 writes); a power of two."""

L1_HIGH = 0xFFFF << 48 | 0x111 << 39
"""Where L1 has its memory once more: at VMRUN its RSP, GDTR and IDTR lead there, which so have
high bits. (RIP does not: erratum qemu-tcg-cr0-before-cr4 has L1 go on with paging off.)"""

MAX_PROBES = 32
"""Probes that one RUN op may carry: as many results as a record holds."""

_CTYPES = {"u8": ("B", 1), "u16": ("H", 2), "u32": ("I", 4), "u64": ("Q", 8)}


@dataclass(frozen=True)
class Field:
    """One member: its name, its type (u8..u64, or the name of another structure) and its count."""

    name: str
    type: str = "u64"
    count: int = 1


@dataclass(frozen=True)
class Struct:
    """A structure shared with the guests. Offsets and sizes are in bytes."""

    name: str
    comment: str
    fields: tuple[Field, ...]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each member; raises ValueError where C would have to pad."""
        table, at = {}, 0
        for field in self.fields:
            size, align = _size_align(field.type)
            if at % align:
                raise ValueError(f"{self.name}.{field.name} at {at} would be padded by C")
            table[field.name] = at
            at += size * field.count
        return table

    @cached_property
    def size(self) -> int:
        """In bytes, without padding behind the last field."""
        return sum(_size_align(f.type)[0] * f.count for f in self.fields)

    @cached_property
    def packer(self) -> struct.Struct:
        """The flat `struct.Struct` of all members, nested structures included."""
        return struct.Struct("<" + self._format())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Member names in order, as `packer` unpacks them (arrays of integers repeat the name)."""
        out: list[str] = []
        for field in self.fields:
            if field.type in _CTYPES:
                out += [field.name] * field.count
            else:
                out += [f"{field.name}.{n}" for n in STRUCTS[field.type].names] * field.count
        return tuple(out)

    def _format(self) -> str:
        parts = []
        for field in self.fields:
            one = _CTYPES[field.type][0] if field.type in _CTYPES else STRUCTS[field.type]._format()
            parts.append(one * field.count)
        return "".join(parts)


def _size_align(type_name: str) -> tuple[int, int]:
    if type_name in _CTYPES:
        return (_CTYPES[type_name][1],) * 2
    return STRUCTS[type_name].size, 8


STRUCTS: dict[str, Struct] = {}


def _declare(name: str, comment: str, *fields: Field) -> Struct:
    STRUCTS[name] = Struct(name, comment, fields)
    return STRUCTS[name]


OP = _declare(
    "tw_op",
    "One step of the program that L1 interprets.",
    Field("code", "u32"),
    Field("arg", "u32"),
    Field("a"),
    Field("b"),
    Field("c"),
)

PROBE = _declare(
    "tw_probe",
    "One action of L2; follows its RUN op in the op ring, a slot each.",
    Field("kind", "u32"),
    Field("size", "u32"),
    Field("address"),
    Field("value"),
    Field("result"),
)

HOST = _declare(
    "tw_host",
    "L1's own state around a VMRUN, read by L1 itself.",
    *(Field(n) for n in (
        "rax", "rsp", "rflags", "cr0", "cr3", "cr4", "cr8", "efer", "dr6", "dr7", "pat", "tsc",
    )),
    *(Field(n, "u16") for n in ("es", "cs", "ss", "ds", "gdt_limit", "idt_limit")),
    Field("all_read", "u16"),  # behind VMRUN: whether CR4, DR6, DR7, EFER and PAT were read, or are left out
    # behind VMRUN: what L1 has taken though GIF is 0, an NMI (1), an interrupt (2); an exception right behind it (4),
    # with its vector in bits 15:8
    Field("early", "u16"),
    Field("gdt_base"),
    Field("idt_base"),
)

REGS = _declare(
    "tw_regs",
    "L2's registers that are not in the VMCB.",
    *(Field(n) for n in (
        "rbx", "rcx", "rdx", "rsi", "rdi", "rbp",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    )),
)

DIFF = _declare(
    "tw_diff",
    "A watched quadword that changed since L1 last looked.",
    Field("address"),
    Field("value"),
)

STOP = _declare(
    "tw_stop",
    "What QEMU's plugin tells of a foreign L1, or of its L2, where it has stopped (guests/observe/stops.c).",
    Field("kind", "u32"),
    Field("vcpu", "u32"),
    *(Field(n) for n in (
        "pc", "rax", "rcx", "rsp", "eflags", "cs", "ss", "ds", "es", "cr0", "cr3", "cr4", "efer",
        "gva", "spa", "write", "others",  # of INVLPGA and of a memory access
    )),
)

STOPS = {"ENTER": 1, "EXIT": 2, "INVLPGA": 3, "ACCESS": 4}
"""Kinds of stops: at VMRUN, behind it, at INVLPGA, behind a memory access of L2."""

ANSWERS = {"GO": 0, "ENTERED": 1}
"""The byte that lets a vCPU go on. ENTERED: a memory access of L2 and this VMRUN's #VMEXIT are to be stops."""

MAILBOX_CODE = 4064
"""Offset in L2's mailbox page of the gVA at which L2's code page is mapped; probes come from 0 on."""

MAILBOX_REQUEST = 4072
"""Offset in it of what L2 asks of L1's second processor, one of REQUESTS."""

REQUESTS = {"NONE": 0, "WRITE": 1, "NMI": 2, "DONE": 3, "STOP": 4}

STRING_PORT = 0xCF8
"""The port of L2's INS and OUTS: PCI's configuration address, 32 bits that are read as they were written."""

IMMEDIATE_PORT = 0x80
"""The port of its IN and OUT whose port is in the instruction: nothing hangs on that one."""

CONTROL_BYTES = 0x100
"""Of the VMCB's control area, from its start: all fields to the decode assists' end."""

SAVE_BYTES = 0x2A0
"""Of the VMCB's state-save area, from 400h: all fields to the last LBR MSR, 698h."""

RECORD_SIZE = 4096
_HEAD = 40 + 2 * HOST.size + REGS.size + CONTROL_BYTES + SAVE_BYTES + 8 * MAX_PROBES
MAX_DIFFS = (RECORD_SIZE - _HEAD) // DIFF.size

RECORD = _declare(
    "tw_record",
    "What L1 posts right before each VMRUN and right after each #VMEXIT.",
    Field("kind", "u32"),
    Field("diffs_found", "u32"),
    Field("sequence"),
    Field("first_probe", "u32"),
    Field("next_probe", "u32"),
    Field("vmcb"),
    Field("op"),
    Field("before", "tw_host"),
    Field("after", "tw_host"),
    Field("regs", "tw_regs"),
    Field("control", "u8", CONTROL_BYTES),
    Field("save", "u8", SAVE_BYTES),
    Field("results", "u64", MAX_PROBES),
    Field("diffs", "tw_diff", MAX_DIFFS),
)

SHARED = _declare(
    "tw_shared",
    "The first page that both sides look at. Each counter has one writer.",
    Field("magic"),
    Field("protocol", "u32"),
    Field("maxphyaddr", "u32"),
    Field("svm_revision", "u32"),
    Field("asids", "u32"),
    Field("svm_features", "u32"),
    Field("panic_vector", "u32"),
    Field("panic_error"),
    Field("panic_rip"),
    Field("panic_address"),
    Field("features"),
    # written by L1
    Field("op_done"),
    Field("record_posted"),
    Field("spare", "u64", 6),
    # written by the checker
    Field("op_posted"),
    Field("record_checked"),
    Field("lag"),
    Field("sparing"),  # 1: reading those registers, and VMLOAD, costs L1 a #VMEXIT; it does it where it has to
)

OPS = {
    "RESET": 1,   # touched pages get their first content, none is watched; a: VMCBs, b: bytes to zero there
    "WATCH": 2,   # a: page to look through after each #VMEXIT
    "WRITE": 3,   # a: sPA, b: value, arg: width in bytes
    "HOST": 4,    # arg: register (HOST_REGISTERS), b: value
    "RUN": 5,     # a: VMCB, b: RIP to resume at after a fault, c: L2's mailbox (gVA); arg probes follow
    "SYNC": 6,    # wait until every record was checked
    "SPIN": 7,    # a: VMCB, b: count, c: mailbox: that many VMRUNs with no record, for the benchmark
    "HOST_MODE": 8,  # arg: L1's paging at VMRUN (HOST_MODES)
    "MARK": 9,    # a: VMCB; what REWIND goes back to
    "REWIND": 10,  # a: VMCB; all that was written, and all watched pages, are as at the mark
    "REMOTE": 12,  # as WRITE, for L1's second processor to do when L2 asks for it in the next RUN
    "INVLPGA": 11,  # arg: ASID, a: gVA
}

VMLOADED = {
    "fs": 0x440, "fs.base": 0x448, "gs": 0x450, "gs.base": 0x458, "ldtr": 0x470, "ldtr.base": 0x478, "tr": 0x490,
    "tr.base": 0x498, "star": 0x600, "lstar": 0x608, "cstar": 0x610, "sfmask": 0x618, "kernel_gs_base": 0x620,
    "sysenter_cs": 0x628, "sysenter_esp": 0x630, "sysenter_eip": 0x638,
}
"""Quadwords of the VMCB that VMLOAD loads and VMSAVE saves; those without `.base` are selector, attributes and limit.
A SYNC record has them twice in its `results`: as they were at the last VMSAVE, and as they are."""

HOST_MODES = {"long4": 0, "long5": 1, "pae": 2, "legacy": 3, "off": 4}

HOST_REGISTERS = {"cr0": 0, "cr4": 1, "efer": 2, "pat": 3, "dr7": 4, "pkru": 5, "rflags": 6, "nmi": 7, "interrupt": 8,
                  "gif": 9, "cr8": 10}
"""`gif` is what L1 sets that to right before VMRUN; else it is 0. `nmi` and `interrupt` are no registers: 1 sends L1 an
NMI, or an interrupt of INTERRUPT_VECTOR; 0 has it taken, if it is pending."""

INTERRUPT_VECTOR = 31
"""Of the interrupt that L1 sends itself: the highest that its IDT and L2's have."""

RECORDS = {"ENTER": 1, "EXIT": 2, "SYNC": 3}

PROBES = {
    "end": 0, "read": 1, "write": 2, "rmw": 3, "fetch": 4, "invlpg": 5,
    "rdcr0": 8, "rdcr2": 9, "rdcr3": 10, "rdcr4": 11, "rdcr8": 12, "rddr6": 13, "rddr7": 14,
    "wrcr0": 16, "wrcr2": 17, "wrcr3": 18, "wrcr4": 19, "wrcr8": 20, "wrdr6": 21, "wrdr7": 22,
    "rdmsr": 24, "wrmsr": 25, "rdflags": 26, "wrflags": 27, "rdseg": 28, "rdrsp": 29, "wrrsp": 30,
    "rdgdtr": 32, "rdgdtl": 33, "rdidtr": 34, "rdidtl": 35, "wrgdtr": 36, "wridtr": 37, "rdldtr": 38, "rdtr": 39,
    "wres": 40, "wrds": 41, "vmrun": 42, "vmload": 43, "vmsave": 44, "stgi": 45, "clgi": 46,
    "push": 48, "pop": 49, "lar": 50, "rdpkru": 51, "wrpkru": 52,
    # what L1 may intercept, and what raises an exception of its own
    "cpuid": 64, "rdtsc": 65, "rdtscp": 66, "rdpmc": 67, "pause": 68, "hlt": 69, "invd": 70, "wbinvd": 71,
    "invlpga": 72, "skinit": 73, "monitor": 74, "mwait": 75, "xsetbv": 76, "iret": 77, "rsm": 78, "icebp": 79,
    "clts": 80, "smsw": 81, "lmsw": 82, "in": 83, "out": 84, "lldt": 85, "ltr": 86, "vmmcall": 87,
    "sti": 56, "stiud": 57,  # STI; NOP, and STI; UD2
    "repins": 58, "repouts": 59, "outsfs": 60, "outsgs": 61,  # INS and OUTS, repeated; OUTS through FS and GS
    "remote": 53, "remotenmi": 54,  # L1's second processor does its writes; and then ends L2 by an NMI
    "intn": 88, "breakpoint": 89, "overflow": 90, "undefined": 91, "divide": 92,
    "ins": 93, "outs": 94,  # 4 bytes, from and to port STRING_PORT
    "rddr0": 96, "rddr1": 97, "rddr2": 98, "rddr3": 99, "wrdr0": 100, "wrdr1": 101, "wrdr2": 102, "wrdr3": 103,
    "rddr4": 104, "rddr5": 105, "wrdr4": 106, "wrdr5": 107,
    "inimm": 108, "outimm": 109,  # 1 byte, from and to port IMMEDIATE_PORT
    "movssud": 110,  # MOV to SS, which becomes null; UD2
    "popfcpuid": 112, "popfrdcr4": 113,  # POPF, and CPUID or MOV from CR4 behind it
}

FEATURES = ("nx", "page1g", "smep", "smap", "pku", "la57", "pcid", "umip", "lbrv", "nrips", "gmet",
            "fsgsbase", "xsave", "cet", "ffxsr", "tce", "sss",
            "lmsle", "mcommit", "intwb", "uai", "aibrs", "vnmi", "avic", "x2avic", "x2avic_ext",
            "flushbyasid", "second")
"""CPUID features that L1 reports in `tw_shared.features`, bit 0 first; `second` is a second processor."""
