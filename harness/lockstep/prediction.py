"""What one VMRUN comes to, as the model says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from harness.model.access import Access
from harness.model.events import Event
from harness.model.memory_type import Caching
from harness.model.vmcb import ExitCode
from harness.model.walk import Paging, Walk

WHOLE: Final = (1 << 128) - 1
"""In `Prediction.free`: no bit of the field is defined."""


@dataclass(slots=True)
class Prediction:
    """The outcome of one VMRUN.

    `next_probe` is the index of the probe that faulted, or the number of probes when all were done.
    `control` and `save` are the VMCB's bytes after the exit, `free` the bits, by field, that the manual
    leaves undefined in it. `old` has the quadwords that the model changed, as they were before;
    `permitted` the bits, by the sPA of their quadword, that may be set or not. `accesses` are all walks of L2
    in their order, also those that no probe names; `paging` is the translation that L2 left under, `event`
    what was last delivered to it, also if that was cut short.
    `under` has, by probe, the translation and the memory types in force. `stale` has, by probe, the walks that a TLB
    may make instead, on this machine; `unsearched` says that there may be some, and that none was looked for.
    `ambiguous` are the probes for which the manual permits more than one outcome, on this machine or another. `taken`
    are those probes whose walk in `walks` is one of `stale`.
    """

    first_probe: int
    next_probe: int = 0
    refused: str = ""
    exitcode: int = 0
    rule: str = ""
    control: bytes = b""
    save: bytes = b""
    free: dict[str, int] = field(default_factory=dict)
    regs: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    results: dict[int, int] = field(default_factory=dict)
    walks: dict[int, Walk] = field(default_factory=dict)
    old: dict[int, int] = field(default_factory=dict)
    permitted: dict[int, int] = field(default_factory=dict)
    accesses: list[tuple[Paging, Access, Walk]] = field(default_factory=list)
    paging: Paging | None = None
    event: Event | None = None
    under: dict[int, tuple[Paging, Caching]] = field(default_factory=dict)
    stale: dict[int, list[Walk]] = field(default_factory=dict)
    unsearched: bool = False
    ambiguous: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    perils: set[str] = field(default_factory=set)
    """What happened that a machine may not survive, by the names in harness.lockstep.hazards."""

    @property
    def due(self) -> str:
        """The #VMEXIT, in words, for when it does not come."""
        return f"{ExitCode.describe(self.exitcode)} at probe {self.next_probe}, by rule {self.rule}"
