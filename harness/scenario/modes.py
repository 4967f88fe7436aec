"""The modes that L2 can be in, and where things lie in each; the modes that L1 can be in at VMRUN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from harness.model.entries import Format, legacy, long_mode, pae
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmrun import Host, table_format

_LONG_EFER: Final = EFER.SCE | EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME
_CR0: Final = CR0.AM | CR0.WP | CR0.NE | CR0.ET
_CR4: Final = CR4.PGE | CR4.OSFXSR
_LONG_CODE: Final = 0xA9B
_PROTECTED_CODE: Final = 0xC9B
_REAL_CODE: Final = 0x89B
_NEGATIVE: Final = ~0 << 48 & (1 << 64) - 1


@dataclass(frozen=True)
class Mode:
    """A mode of L2: its registers, and in gVA where pages a to d (`test`) and what is L2's own
    (`own`) are mapped; each in a different entry of the root."""

    name: str
    cr0: int
    cr4: int
    efer: int
    code_attrib: int
    test: int
    own: int
    stub: str
    """Which of L2's code pages runs in it."""
    pages: tuple[str, ...]
    """Sizes of pages that its tables can map; the first is the usual one."""

    @cached_property
    def long(self) -> bool:
        """Whether EFER.LME is 1."""
        return bool(self.efer & EFER.LME)

    @property
    def real(self) -> bool:
        """Whether CR0.PE is 0."""
        return not self.cr0 & CR0.PE

    @property
    def paging(self) -> bool:
        """Whether CR0.PG is 1."""
        return bool(self.cr0 & CR0.PG)

    @cached_property
    def native(self) -> int:
        """Bytes of its widest operand."""
        return 8 if self.long else 4

    def format(self, cpu: Cpu) -> Format | None:
        """Its table format; None with paging off."""
        if not self.paging:
            return None
        if self.long:
            return long_mode(cpu.maxphyaddr, True, cpu.page1g, bool(self.cr4 & CR4.LA57))
        return pae(cpu.maxphyaddr, True) if self.cr4 & CR4.PAE else legacy(cpu.maxphyaddr, bool(self.cr4 & CR4.PSE))


def _mode(name: str, cr4: int, efer: int, test: int, own: int, pages: tuple[str, ...],
          cr0: int = CR0.PG | CR0.PE) -> Mode:
    kind, attrib = ("long", _LONG_CODE) if efer & EFER.LME else ("prot", _PROTECTED_CODE)
    if not cr0 & CR0.PE:
        kind, attrib = "real", _REAL_CODE
    return Mode(name, _CR0 | cr0, _CR4 | cr4, efer, attrib, test, own, kind, pages)


_OWN_LONG: Final = 511 << 39 | 0x1EF << 30 | 0x1DF << 21 | 0x1BF << 12
OWN_SHORT: Final = 3 << 30 | 0x1DF << 21 | 0x1BF << 12
"""Nearly all ones, so that gates lead astray which lose a bit of a handler's address."""

MODES: Final = {
    mode.name: mode
    for mode in (
        _mode("4-level", CR4.PAE, _LONG_EFER, 90 << 39 | 316 << 30, _NEGATIVE | _OWN_LONG, ("4K", "2M", "1G")),
        _mode("5-level", CR4.PAE | CR4.LA57, _LONG_EFER, 171 << 48 | 90 << 39 | 316 << 30,
              0xFF << 56 | 511 << 48 | _OWN_LONG, ("4K", "2M", "1G")),
        _mode("PAE", CR4.PAE, EFER.NXE | EFER.SVME, 1 << 30, OWN_SHORT, ("4K", "2M")),
        _mode("32-bit", CR4.PSE, EFER.SVME, 1 << 30, OWN_SHORT, ("4K", "4M")),
        _mode("off", 0, EFER.SVME, 0, 0, ("4K",), cr0=CR0.PE),
        _mode("real", 0, EFER.SVME, 0, 0, ("4K",), cr0=0),
    )
}
"""By the name that scenario files use: the format of L2's tables, `off` for protected mode without paging, or
`real` for real mode with segments of 4 GiB."""


@dataclass(frozen=True)
class HostMode:
    """A mode that L1 executes VMRUN in, and so the format of its nested tables (section 15.25.3).

    L1's registers are those it has in 4-level paging, with bits set and cleared. `wire` is its name for L1.
    With paging off its tables are those it would have with paging on; no VMRUN uses them.
    """

    name: str
    wire: str
    pages: tuple[str, ...]
    cr4_set: int = 0
    cr4_clear: int = 0
    efer_clear: int = 0
    cr0_clear: int = 0

    @property
    def narrow(self) -> bool:
        """Whether its tables translate gPAs of 32 bits only."""
        return bool(self.efer_clear)

    @property
    def wide(self) -> bool:
        """Whether its tables lead to sPAs of more than 32 bits."""
        return not self.cr4_clear & CR4.PAE

    def registers(self, host: Host) -> Host:
        """L1's registers at VMRUN, where `host` are those of 4-level paging."""
        return replace(
            host, cr0=host.cr0 & ~self.cr0_clear, cr4=(host.cr4 | self.cr4_set) & ~self.cr4_clear,
            efer=host.efer & ~self.efer_clear,
        )

    def format(self, host: Host, cpu: Cpu) -> Format:
        """The format of its nested tables, where `host` are L1's registers in 4-level paging."""
        mine = self.registers(host)
        found = table_format(mine.cr0 | CR0.PG, mine.cr4, mine.efer, cpu)
        assert found is not None
        return found


HOST_MODES: Final = {
    mode.name: mode
    for mode in (
        HostMode("4-level", "long4", ("4K", "2M", "1G")),
        HostMode("5-level", "long5", ("4K", "2M", "1G"), cr4_set=CR4.LA57),
        HostMode("PAE", "pae", ("4K", "2M"), efer_clear=EFER.LME | EFER.LMA),
        HostMode("32-bit", "legacy", ("4K", "4M"), CR4.PSE, CR4.PAE, EFER.LME | EFER.LMA),
        HostMode("off", "off", ("4K",), efer_clear=EFER.LME | EFER.LMA, cr0_clear=CR0.PG),
    )
}
"""By the name that scenario files use; `off` is protected mode without paging, where NP_ENABLE must be 0."""
