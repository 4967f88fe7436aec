"""What came of a scenario: the counts, what is wrong, and each visit of L2 in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from harness.errors import MachineLost
from harness.lockstep.compare import Divergence
from harness.model.mmu_context import Mode
from harness.model.vmcb import NP_ENABLE, Group, Vmcb
from harness.model.vmrun import Host

_READ = Group("np_control", "ncr3", "efer", "cr4", "cr0")


class Under(NamedTuple):
    """The paging that a VMRUN asks for: levels of L1's nested table, whose format is that of L1's own mode (15.25.3), 0
    without nested paging; its nCR3; levels of L2's own tables, 0 with paging off."""

    nested: int
    ncr3: int
    guest: int

    @classmethod
    def of(cls, vmcb: Vmcb, host: Host) -> Under:
        """As the VMCB is before VMRUN, and L1's registers. The same ones are one object."""
        return _under(_READ.values(vmcb), host.cr0, host.cr4, host.efer)


@lru_cache(maxsize=4096)
def _under(values: tuple[int, ...], cr0: int, cr4: int, efer: int) -> Under:
    at = dict(zip(_READ.names, values, strict=True))
    nested = bool(at["np_control"] & NP_ENABLE)
    return Under(Mode(cr0, 0, cr4, efer).levels if nested else 0, at["ncr3"] if nested else 0,
                 Mode(at["cr0"], 0, at["cr4"], at["efer"]).levels)


class Visit(NamedTuple):
    """L2 from a VMRUN to its #VMEXIT, as the machine told it: the index of the scenario's op, and of the probe that it
    ended in (the number of probes if all were done); EXITCODE, EXITINFO1, EXITINFO2."""

    op: int
    through: int
    exitcode: int
    info1: int
    info2: int
    under: Under


class Told(NamedTuple):
    """An MMU context as KVM told it: whether it is a direct map, and all of it in words (harness.wire.trace.InUse)."""

    direct: bool
    words: str


class Switch(NamedTuple):
    """The MMU contexts that KVM was in around one VMRUN that it did not refuse: that of L1 `before`, None if the trace
    begins behind it; L2's, each once as long as it stays, none if L2 could not be entered; that of L1 `behind`
    #VMEXIT. `entries` of the processor were into L2."""

    before: Told | None
    inside: tuple[Told, ...]
    behind: Told
    entries: int


@dataclass
class Result:
    """What came of one scenario."""

    scenario: str
    vmruns: int = 0
    probes: int = 0
    table_bytes: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    lost: MachineLost | None = None
    senseless: str = ""
    """Why the model cannot say what must come of it: the scenario makes no sense, and nothing is decided."""
    skipped: str = ""
    """Why it cannot be run on this CPU, though it makes sense on others."""
    contexts: int = 0
    """Entries of the processor into L1 or L2 whose MMU context was checked."""
    trace_events: int = 0
    stale_permitted: int = 0
    """Probes for which the manual permits more than one outcome, since a TLB may hold an old translation."""
    stale_seen: int = 0
    """Those of them in which the machine took an old one."""
    shadow_audits: int = 0
    """Switches at which the tables of the KVM under L1 were audited, and leaves of these that were."""
    shadow_leaves: int = 0
    visits: list[Visit] = field(default_factory=list)
    """Each VMRUN whose #VMEXIT came, in order."""
    switches: list[Switch | None] = field(default_factory=list)
    """Where KVM tells of its contexts, those of each of `visits`; None where it refused VMRUN. What follows are VMRUNs
    that the model did not follow."""
