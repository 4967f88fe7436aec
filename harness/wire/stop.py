"""What is seen of a foreign L1 at its VMRUNs and behind them: no guest of ours writes it, QEMU's plugin tells it."""

from __future__ import annotations

from typing import Final, NamedTuple

from harness.wire.layout import STOP, STOPS

ENTER: Final = "VMRUN"
EXIT: Final = "#VMEXIT"
INVLPGA: Final = "INVLPGA"
ACCESS: Final = "access"

HOST: Final = ("rax", "rsp", "eflags", "cs", "ss", "ds", "es", "cr0", "cr3", "cr4", "efer")
"""Registers that are read at each stop, by gdb's names. RFLAGS has no flags of arithmetic: TCG computes them late."""

NOWHERE: Final = (1 << 64) - 1
"""In place of an sPA: memory that is none of L1's."""

_KINDS: Final = dict(zip(STOPS.values(), (ENTER, EXIT, INVLPGA, ACCESS), strict=True))


class Stop(NamedTuple):
    """One vCPU at a VMRUN that it is about to execute (ENTER), at the instruction behind it (EXIT), at an INVLPGA, or
    behind a memory access of L2 (ACCESS). `host` are its registers HOST; RAX is the sPA of the VMCB at ENTER and EXIT.
    `rip` is a linear address. `alone`: there is no other vCPU, which could have changed memory meanwhile. INVLPGA has
    the page `gva` and the ASID; ACCESS has the `gva`, the `spa` that the machine made of it (or NOWHERE), and whether
    `others` have run since VMRUN, of the vCPUs."""

    kind: str
    vcpu: int
    host: dict[str, int]
    alone: bool = True
    rip: int = 0
    gva: int = 0
    asid: int = 0
    spa: int = 0
    write: bool = False
    others: bool = False


def decode(data: bytes, alone: bool) -> Stop:
    """A record of the plugin. Raises struct.error for one of another size, KeyError for an unknown kind."""
    got = dict(zip(STOP.names, STOP.packer.unpack(data), strict=True))
    return Stop(_KINDS[got["kind"]], got["vcpu"], {name: got[name] for name in HOST}, alone, got["pc"], got["gva"],
                got["rcx"] & 0xFFFF_FFFF, got["spa"], bool(got["write"]), bool(got["others"]))
