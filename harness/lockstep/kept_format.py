"""The format in which Linux's KVM up to 5.13 reads L1's nested table, for an erratum to name.

kvm_init_shadow_npt_mmu() makes the context of L1's nested table of L2's registers where it should of L1's: whether it
has five levels (is_la57_mode()), whether NX is reserved (is_nx()), whether there are 4M pages (is_pse()), whether pages
have keys (update_pkru_bitmask()). Of L1's own
only the kind of table counts. And it makes it anew only where L2's role is not what it was when it last did; else the
context stays as it is, also if L1 is in another mode now. So it depends on the VMRUNs before, of whatever program; and
as those are known, it is known.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from harness.model.access import Access, ErrorCode, NestedPageFault, Reached
from harness.model.entries import FRAME, KEY_SHIFT, Format, legacy, long_mode, pae
from harness.model.registers import CR0, CR4, EFER, PKRU_AD, PKRU_WD, Cpu
from harness.model.vmcb import CONTROL, NP_ENABLE, SAVE, STATE, Field
from harness.model.vmrun import Host
from harness.model.walk import FINAL, NESTED, Paging, Walk

_CR0: Final = CR0.WP | CR0.PG
_CR4: Final = CR4.PAE | CR4.SMEP | CR4.SMAP | CR4.PSE | CR4.PKE | CR4.LA57
"""Registers' bits in the role, as kvm_calc_shadow_npt_root_page_role() has it, beside EFER.NXE."""


class _Context(NamedTuple):
    """KVM's context of L1's nested table: L2's role when it was made, the format, and whether a #NPF tells that it is
    one of a fetch: with NX, or SMEP (walk_addr_generic()); and whether protection keys are asked for."""

    role: tuple[int, int, int]
    format: Format
    tells_fetches: bool
    keys: bool


class KeptFormat:
    """Follows a machine's VMRUNs by the VMCBs that L1 ran. `format` is None before the first with nested paging."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._now: _Context | None = None
        self._before: _Context | None = None

    @property
    def format(self) -> Format | None:
        """The format that L1's nested table is read in; None before the first VMRUN."""
        return self._now.format if self._now is not None else None

    @property
    def tells_fetches(self) -> bool:
        """Whether EXITINFO1 of a nested fault has I/D."""
        return self._now is None or self._now.tells_fetches

    @property
    def keeps_tables(self) -> bool:
        """Whether changes of PML4Es of L1's 5-level table are not seen, whatever L1 flushes: the CPU's has four
        levels, and the root of the shadow is found again by the frame of the PML5 table."""
        return self._now is not None and self._now.format.name == "5-level"

    @property
    def takes_entries_for_long(self) -> bool:
        """Whether KVM takes what L1 writes to the page directory of its 32-bit table for an entry of 8 bytes:
        gpte_is_8_bytes is by L2's mode."""
        return self._now is not None and self._now.format.name == "32-bit" and bool(self._now.role[1] & CR4.PAE)

    def entered(self, control: bytes, save: bytes, host: Host) -> None:
        """L1 executes VMRUN with these registers; `control` and `save` are the VMCB's areas."""
        self._before = self._now
        if not _get(control, CONTROL["np_control"]) & NP_ENABLE:
            return
        cr0, cr4, efer = (_get(save, STATE[name], SAVE) for name in ("cr0", "cr4", "efer"))
        role = cr0 & _CR0, cr4 & _CR4, efer & EFER.NXE
        if self._now is None or role != self._now.role:
            made = self._made(cr0, cr4, efer, host)
            nx = made.name != "32-bit" and bool(efer & EFER.NXE)
            self._now = _Context(role, made, nx or bool(cr4 & CR4.SMEP),
                                 made.name != "32-bit" and bool(cr4 & CR4.PKE))

    def refused(self) -> None:
        """That VMRUN was refused, before KVM looked at the table."""
        self._now = self._before

    def keyed(self, paging: Paging, walk: Walk, access: Access, pkru: int) -> Walk:
        """`walk` as it ends where an entry of L1's that maps a page has a key to which L2's PKRU denies the access."""
        if self._now is None or not self._now.keys or not pkru:
            return walk
        trail, table = walk.trail, paging.gcr3
        for at, (dimension, _, purpose, _, entry) in enumerate(trail):
            if dimension != NESTED:
                table = entry & FRAME
                continue
            final, after = purpose == FINAL, trail[at + 1] if at + 1 < len(trail) else None
            if after[2] == purpose if after else not isinstance(walk.outcome, Reached):
                continue  # no page yet
            writes, denied = access.write or not final, pkru >> (entry >> KEY_SHIFT & 0xF) * 2
            if (final and access.fetch) or not (denied & PKRU_AD or (denied & PKRU_WD and writes)):
                continue
            code = ErrorCode.P | ErrorCode.U | ErrorCode.PK | (ErrorCode.W if writes else 0)
            code |= ErrorCode.FINAL if final else ErrorCode.GUEST_TABLE
            reached = walk.outcome.gpa if isinstance(walk.outcome, Reached) else 0
            gpa = table & ~0xFFF | after[3] & 0xFFF if after else reached
            begun = {step[3] for step in trail[: at + 1] if step[2] != purpose}
            updates = [one for one in walk.updates if one[0] in begun]
            return walk._replace(outcome=NestedPageFault(code, gpa), trail=trail[: at + 1], updates=updates)
        return walk

    def _made(self, cr0: int, cr4: int, efer: int, host: Host) -> Format:
        bits, nxe = self._cpu.maxphyaddr, bool(efer & EFER.NXE)
        if host.efer & EFER.LMA:
            long = efer & EFER.LMA and cr0 & CR0.PG
            return long_mode(bits, nxe, self._cpu.page1g, bool(long and cr4 & CR4.LA57))
        return pae(bits, nxe) if host.cr4 & CR4.PAE else legacy(bits, bool(cr4 & CR4.PSE))


def _get(area: bytes, field: Field, base: int = 0) -> int:
    at = field.offset - base
    return int.from_bytes(area[at : at + field.width], "little")
