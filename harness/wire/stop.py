"""What is seen of a foreign L1 at its VMRUNs and behind them: no guest of ours writes it, a debugger reads it."""

from __future__ import annotations

from typing import Final, NamedTuple

ENTER: Final = "VMRUN"
EXIT: Final = "#VMEXIT"

HOST: Final = ("rax", "rsp", "rip", "eflags", "cs", "ss", "ds", "es", "cr0", "cr3", "cr4", "efer")
"""L1's registers that are read at each stop, by gdb's names."""


class Stop(NamedTuple):
    """One vCPU at a VMRUN that it is about to execute (ENTER), or at the instruction behind it (EXIT). `host` are its
    registers HOST; RAX is the sPA of the VMCB at both. `alone`: there is no other vCPU, which could have changed
    memory meanwhile."""

    kind: str
    vcpu: int
    host: dict[str, int]
    alone: bool = True
