"""Instruction intercepts: which bit of the VMCB asks for which exit (section 15.9 and appendix B), and the
permission maps of MSRs and of I/O ports (15.10 and 15.11)."""

from __future__ import annotations

from typing import Final, NamedTuple

from harness.model.memory import Words
from harness.model.registers import CR0
from harness.model.vmcb import Vmcb


class Intercept(NamedTuple):
    """`bit` of the VMCB's `field`, and the exit that it asks for."""

    field: str
    bit: int
    exitcode: int


def _vector(field: str, base: int, names: str) -> dict[str, Intercept]:
    """One intercept for each of `names`, from bit 0 on; `-` is a bit of none of them."""
    return {name: Intercept(field, n, base + n) for n, name in enumerate(names.split()) if name != "-"}


INTERCEPTS: Final[dict[str, Intercept]] = (
    {f"rdcr{n}": Intercept("intercept_cr", n, n) for n in range(16)}
    | {f"wrcr{n}": Intercept("intercept_cr", 16 + n, 0x10 + n) for n in range(16)}
    | {f"rddr{n}": Intercept("intercept_dr", n, 0x20 + n) for n in range(16)}
    | {f"wrdr{n}": Intercept("intercept_dr", 16 + n, 0x30 + n) for n in range(16)}
    | _vector("intercept_misc1", 0x60, "intr nmi smi init vintr cr0-selective rdidtr rdgdtr rdldtr rdtr wridtr wrgdtr "
              "lldt ltr rdtsc rdpmc rdflags wrflags cpuid rsm iret intn invd pause hlt invlpg invlpga ioio msr "
              "task-switch ferr-freeze shutdown")
    | _vector("intercept_misc2", 0x80, "vmrun vmmcall vmload vmsave stgi clgi skinit rdtscp icebp wbinvd monitor mwait "
              "- xsetbv")
)
"""By what asks for it: an instruction by the name that it has as a probe of L2 (rdflags is PUSHF, wrflags POPF)."""

INTERCEPTS.update({
    "rdgdtl": INTERCEPTS["rdgdtr"], "rdidtl": INTERCEPTS["rdidtr"], "smsw": INTERCEPTS["rdcr0"],
    "lmsw": INTERCEPTS["wrcr0"], "clts": INTERCEPTS["wrcr0"], "rdmsr": INTERCEPTS["msr"], "wrmsr": INTERCEPTS["msr"],
    **dict.fromkeys(("in", "out", "inimm", "outimm", "ins", "outs", "repins", "repouts", "outsfs", "outsgs"),
                    INTERCEPTS["ioio"]),
})

FIRST: Final = frozenset({"rdflags", "wrflags", "iret", "rsm", "intn", "vmmcall", "xsetbv"})
"""Those whose intercept comes before all exceptions, the one for the CPL included (table 15-7)."""

_STRING: Final = 1 << 2
_REPEATED: Final = 1 << 3
_DS: Final = 3
_OVERRIDDEN: Final = {"outsfs": 4, "outsgs": 5}

_MSR_RANGES: Final = ((0, 0), (0xC000_0000, 0x800), (0xC001_0000, 0x1000))
_MSRS: Final = 0x2000


def asks(vmcb: Vmcb, name: str) -> bool:
    """Whether the VMCB asks for the exit of that name."""
    field, bit, _ = INTERCEPTS[name]
    return bool(vmcb[field] >> bit & 1)


def msr_bit(msr: int, write: bool) -> tuple[int, int] | None:
    """Where the MSR permission map has the bit for reads, or for writes, of an MSR: byte offset, bit (15.11). None
    if it has none: then every access is intercepted."""
    for first, offset in _MSR_RANGES:
        if first <= msr < first + _MSRS:
            return offset + (msr - first) // 4, (msr - first) % 4 * 2 + write
    return None


def msr(vmcb: Vmcb, ram: Words, number: int, write: bool, unaligned: bool = False) -> bool:
    """Whether an access to an MSR is intercepted; `unaligned` maps begin at the byte that the VMCB says. Raises
    IndexError for a map outside of `ram`."""
    at = msr_bit(number, write)
    return asks(vmcb, "msr") and (at is None or _bit(ram, vmcb["msrpm_base"], unaligned, *at))


def port(vmcb: Vmcb, ram: Words, number: int, size: int, unaligned: bool = False) -> bool:
    """Whether an access to `size` ports from `number` on is intercepted: if one of them is (15.10.2). Otherwise
    as `msr`."""
    base = vmcb["iopm_base"]
    return asks(vmcb, "ioio") and any(_bit(ram, base, unaligned, n >> 3, n & 7) for n in range(number, number + size))


def _bit(ram: Words, base: int, unaligned: bool, offset: int, bit: int) -> bool:
    address = (base if unaligned else base & ~0xFFF) + offset
    return bool(ram[address >> 3] >> 8 * (address & 7) + bit & 1)


def ioio_info(number: int, size: int, read: bool, address_bits: int) -> int:
    """EXITINFO1 of an intercepted IN or OUT (figure 15-2); `address_bits` are those of the address size."""
    return number << 16 | address_bits // 16 << 7 | size << 4 | read


def string_info(number: int, size: int, kind: str, address_bits: int) -> int:
    """The same of INS and OUTS, with the effective segment: ES for INS; DS, FS or GS (section 15.10.3)."""
    read, repeated = kind.endswith("ins"), kind.startswith("rep")
    segment = 0 if read else _OVERRIDDEN.get(kind, _DS)
    return ioio_info(number, size, read, address_bits) | _STRING | (_REPEATED if repeated else 0) | segment << 10


def cr0_selective(vmcb: Vmcb, old: int, new: int, always: bool) -> bool:
    """Whether the selective intercept of CR0 writes asks for an exit: if more than TS and MP changes; for LMSW
    `always`."""
    return asks(vmcb, "cr0-selective") and (always or bool((old ^ new) & ~(CR0.TS | CR0.MP)))
