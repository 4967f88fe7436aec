"""What happens that matters to a TLB: the entries of the log that harness.model.tlb reads."""

from __future__ import annotations

from typing import Final, NamedTuple

from harness.model.walk import Paging


class Ran(NamedTuple):
    """A guest runs from here on: by VMRUN, or after a register that decides over its paging was written.
    `pcid` is 0 while CR4.PCIDE is; `pge` is CR4.PGE."""

    asid: int
    paging: Paging
    pge: bool = False
    pcid: int = 0
    by_vmrun: bool = True


class Left(NamedTuple):
    """#VMEXIT: L1 runs."""


class Wrote(NamedTuple):
    """Software wrote the quadword at `address` (sPA), which held `old`."""

    address: int
    old: int


class Flushed(NamedTuple):
    """What was flushed of one ASID, and by which rule: of one PCID or, with None, of all; the page at `gva`, or all.

    `keeps_global` spares global translations. `nested` says that nested translations went too: what a guest does
    flushes its own, and only TLB_CONTROL is said to serve for L1's changes (15.16.1). `narrow` spares
    upper-level entries that do not lead to `gva` (EFER.TCE, 5.5.3).
    """

    by: str
    asid: int
    gva: int | None = None
    keeps_global: bool = False
    nested: bool = False
    narrow: bool = False
    pcid: int | None = None


Event = Ran | Left | Wrote | Flushed

CONTROL: Final = "tlb.control"
VMRUN: Final = "tlb.vmrun"
ASID: Final = "tlb.asid"
UPGRADE: Final = "tlb.upgrade"
INVLPG: Final = "tlb.invlpg"
INVLPGA: Final = "tlb.invlpga"
CR3: Final = "tlb.cr3"
CR4: Final = "tlb.cr4"
CR0: Final = "tlb.cr0"
"""Rules by which a translation is gone, or not there (harness.model.rules)."""
