"""Control-register bits, and the capabilities of a CPU that change how it translates."""

from __future__ import annotations

from typing import Final, NamedTuple


class CR0:
    """Control register 0 (section 3.1.1)."""

    PE: Final = 1 << 0
    MP: Final = 1 << 1
    EM: Final = 1 << 2
    TS: Final = 1 << 3
    ET: Final = 1 << 4
    NE: Final = 1 << 5
    WP: Final = 1 << 16
    AM: Final = 1 << 18
    NW: Final = 1 << 29
    CD: Final = 1 << 30
    PG: Final = 1 << 31


class CR4:
    """Control register 4 (section 3.1.3)."""

    VME: Final = 1 << 0
    PVI: Final = 1 << 1
    TSD: Final = 1 << 2
    DE: Final = 1 << 3
    PSE: Final = 1 << 4
    PAE: Final = 1 << 5
    MCE: Final = 1 << 6
    PGE: Final = 1 << 7
    PCE: Final = 1 << 8
    OSFXSR: Final = 1 << 9
    OSXMMEXCPT: Final = 1 << 10
    UMIP: Final = 1 << 11
    LA57: Final = 1 << 12
    FSGSBASE: Final = 1 << 16
    PCIDE: Final = 1 << 17
    OSXSAVE: Final = 1 << 18
    SMEP: Final = 1 << 20
    SMAP: Final = 1 << 21
    PKE: Final = 1 << 22
    CET: Final = 1 << 23


class EFER:
    """Extended feature enable register, MSR C000_0080h (section 3.1.7)."""

    SCE: Final = 1 << 0
    LME: Final = 1 << 8
    LMA: Final = 1 << 10
    NXE: Final = 1 << 11
    SVME: Final = 1 << 12
    LMSLE: Final = 1 << 13
    FFXSR: Final = 1 << 14
    TCE: Final = 1 << 15
    MCOMMIT: Final = 1 << 17
    INTWB: Final = 1 << 18
    UAIE: Final = 1 << 20
    AIBRSE: Final = 1 << 21


class RFLAGS:
    """The flags register (section 3.1.6)."""

    CF: Final = 1 << 0
    ONE: Final = 1 << 1
    PF: Final = 1 << 2
    AF: Final = 1 << 4
    ZF: Final = 1 << 6
    SF: Final = 1 << 7
    TF: Final = 1 << 8
    IF: Final = 1 << 9
    DF: Final = 1 << 10
    OF: Final = 1 << 11
    IOPL: Final = 3 << 12
    NT: Final = 1 << 14
    RF: Final = 1 << 16
    VM: Final = 1 << 17
    AC: Final = 1 << 18
    ID: Final = 1 << 21
    STATUS: Final = CF | PF | AF | ZF | SF | OF


DR6_BS: Final = 1 << 14
"""DR6: the trap was for RFLAGS.TF (section 13.1.1.3)."""
PKRU_AD: Final = 1 << 0
PKRU_WD: Final = 1 << 1
"""Access disable and write disable of protection key 0; those of key N are 2 * N bits up (section 5.6.7)."""


REGISTER_BITS: Final[dict[str, dict[str, int]]] = {
    "cr0": {k.lower(): v for k, v in vars(CR0).items() if k.isupper()},
    "cr4": {k.lower(): v for k, v in vars(CR4).items() if k.isupper()},
    "efer": {k.lower(): v for k, v in vars(EFER).items() if k.isupper()},
    "rflags": {k.lower(): v for k, v in vars(RFLAGS).items() if k.isupper() and k not in ("ONE", "STATUS", "IOPL")},
}
"""Bits by register and by the manual's name in lower case: the vocabulary of scenario files."""


class Cpu(NamedTuple):
    """What CPUID says of the processor that runs L1, as far as translation depends on it.

    `maxphyaddr` is in bits (CPUID 8000_0008h EAX[7:0]); `asids` is NASID (CPUID 8000_000Ah EBX); `features`
    are those of harness.wire.layout.FEATURES; `npt` is nested paging, `vgif` virtual GIF (CPUID 8000_000Ah EDX[0],
    EDX[16]). L1 itself needs `long_mode`.
    """

    maxphyaddr: int = 52
    page1g: bool = True
    asids: int = 16
    features: frozenset[str] = frozenset()
    long_mode: bool = True
    npt: bool = True
    vgif: bool = True
