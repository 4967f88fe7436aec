"""A translation of which one knows CR3 and nCR3, from a log or a dump, or where a VMCB lies: no machine is needed.

Where nothing else is said it is that of a 64-bit guest under a 64-bit host, as systems set them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from harness.model.entries import Format, legacy, long_mode, pae
from harness.model.registers import CR0, CR4, EFER, Cpu
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Host, load, paging
from harness.model.walk import Paging

OFF: Final = "off"
ANY_CPU: Final = Cpu()
"""With all address bits that entries can hold."""
FORMATS: Final[Mapping[str, Callable[[Cpu, bool], Format]]] = {
    "4-level": lambda cpu, nxe: long_mode(cpu.maxphyaddr, nxe, cpu.page1g),
    "5-level": lambda cpu, nxe: long_mode(cpu.maxphyaddr, nxe, cpu.page1g, la57=True),
    "PAE": lambda cpu, nxe: pae(cpu.maxphyaddr, nxe),
    "32-bit": lambda cpu, nxe: legacy(cpu.maxphyaddr, pse=True),
}
"""Table formats by their names in scenario files."""

_HOSTS: Final = {
    "4-level": (CR4.PAE, EFER.LME | EFER.LMA), "5-level": (CR4.PAE | CR4.LA57, EFER.LME | EFER.LMA),
    "PAE": (CR4.PAE, 0), "32-bit": (CR4.PSE, 0),
}


def by_cr3(
    cr3: int, ncr3: int | None = None, guest: str = "4-level", nested: str = "4-level", *, cpu: Cpu = ANY_CPU,
    wp: bool = True, smep: bool = False, smap: bool = False, ac: bool = False, nxe: bool = True, host_nxe: bool = True,
    pkru: int = 0,
) -> Paging:
    """The translation by L2's tables at `cr3` (a gPA) and L1's nested table at `ncr3` (an sPA); without `ncr3` it is
    of one dimension, and `cr3` an sPA. `guest` and `nested` name their formats: one of FORMATS or, for the guest,
    OFF. `wp`, `smep` and `smap` are bits of L2's CR0 and CR4, `ac` its RFLAGS.AC, `nxe` and `host_nxe` EFER.NXE of L2
    and of L1, `pkru` counts where it is not 0 (sections 5.6 and 15.25). Raises KeyError for a format's name."""
    fmt = None if guest == OFF else FORMATS[guest](cpu, nxe)
    return Paging(
        guest=fmt, gcr3=cr3, wp=wp, smep=smep, smap=smap, ac=ac,
        guest_id=(nxe and guest not in (OFF, "32-bit")) or smep,
        nested=None if ncr3 is None else FORMATS[nested](cpu, host_nxe), ncr3=ncr3 or 0,
        pkru=pkru if fmt is not None and fmt.address_bits > 32 else 0,
    )


def by_vmcb(vmcb: Vmcb, nested: str = "4-level", *, cpu: Cpu = ANY_CPU, host_nxe: bool = True, pkru: int = 0) -> Paging:
    """The translation that VMRUN puts in force by that VMCB, where L1's own tables have the format `nested` (which are
    those of its nested table too: section 15.25.3) and its EFER.NXE is `host_nxe`. Raises KeyError as `by_cr3`."""
    cr4, efer = _HOSTS[nested]
    efer |= EFER.SVME | (EFER.NXE if host_nxe else 0)
    host = Host(CR0.PE | CR0.PG | CR0.WP, cr4, efer, pat=0, dr7=0, pkru=pkru)
    return paging(load(vmcb, host), vmcb, host, cpu)
