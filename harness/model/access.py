"""What is asked of the MMU, and what may come of it."""

from __future__ import annotations

from typing import Final, NamedTuple


class Access(NamedTuple):
    """One reference to memory by software. A read-modify-write is a write (section 5.6.3).

    `implicit` is a reference that an instruction or a delivery makes on the side, to a descriptor or a
    TSS: a supervisor's whatever the CPL (section 5.6.6). `stack` is one through the stack segment (8.2.13),
    `shadow_stack` one that CALL, RET and the like make to a shadow stack (5.7.1).
    """

    write: bool = False
    fetch: bool = False
    user: bool = False
    implicit: bool = False
    stack: bool = False
    shadow_stack: bool = False


class ErrorCode:
    """Page-fault error code bits: of #PF (section 8.4.2), and of #NPF in EXITINFO1 (15.25.6)."""

    P: Final = 1 << 0
    W: Final = 1 << 1
    U: Final = 1 << 2
    RSVD: Final = 1 << 3
    ID: Final = 1 << 4
    PK: Final = 1 << 5
    SS: Final = 1 << 6
    FINAL: Final = 1 << 32
    """#NPF: the fault came while the final gPA was translated."""
    GUEST_TABLE: Final = 1 << 33
    """#NPF: the fault came while the gPA of a guest table entry was translated."""
    SSS: Final = 1 << 37
    """#NPF: the supervisor shadow stack check failed (section 15.25.14)."""

    NAMES: Final = {
        0: "P", 1: "W", 2: "U", 3: "RSVD", 4: "ID", 5: "PK", 6: "SS", 32: "FINAL", 33: "GUEST-TABLE", 37: "SSS",
    }

    @classmethod
    def describe(cls, code: int) -> str:
        """The set bits by name, low first: `P|W|FINAL`; unnamed bits as numbers; `0` for none."""
        names = [cls.NAMES.get(bit, f"bit{bit}") for bit in range(64) if code >> bit & 1]
        return "|".join(names) or "0"


class Reached(NamedTuple):
    """The access was permitted: it reads or writes at system-physical address `spa`."""

    spa: int
    gpa: int

    def __str__(self) -> str:
        return f"sPA {self.spa:#x}"


class PageFault(NamedTuple):
    """#PF, vector 14: `error_code` as pushed, `address` as it goes to CR2 or EXITINFO2 (a gVA)."""

    error_code: int
    address: int

    def __str__(self) -> str:
        return f"#PF {self.error_code:#x} ({ErrorCode.describe(self.error_code)}) at gVA {self.address:#x}"


class NestedPageFault(NamedTuple):
    """#VMEXIT(NPF), code 400h: EXITINFO1 is `error_code`, EXITINFO2 is `address` (a gPA)."""

    error_code: int
    address: int

    def __str__(self) -> str:
        return f"#NPF {self.error_code:#x} ({ErrorCode.describe(self.error_code)}) at gPA {self.address:#x}"


class GeneralProtection(NamedTuple):
    """#GP, vector 13."""

    error_code: int = 0

    def __str__(self) -> str:
        return f"#GP {self.error_code:#x}"


class StackFault(NamedTuple):
    """#SS, vector 12: a reference through the stack segment to an address that is not canonical."""

    error_code: int = 0

    def __str__(self) -> str:
        return f"#SS {self.error_code:#x}"


Outcome = Reached | PageFault | NestedPageFault | GeneralProtection | StackFault
