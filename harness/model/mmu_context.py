"""The MMU context that a hypervisor keeps for each vCPU, and what switches it: the state machine of
nested paging in L0, with KVM's functions named beside each transition.

Two things that are easily taken for one another are kept apart:

    tdp_usable  what the host could do: L0 has nested paging, and uses it (`tdp_enabled` in KVM)
    direct_map  what a context does: its table maps L1-physical memory directly, and shadows nobody's
                (`root_role.direct` in KVM)

While L1 runs on a host with tdp_usable, its context is a direct map. VMRUN with NP_ENABLE=1 switches
to a context that shadows L1's nested table; #VMEXIT switches back. VMRUN with NP_ENABLE=0 stays on a
direct map: L2's own tables hold L1-physical addresses, and the processor walks them. Without
tdp_usable there is no direct map once paging is on: every table of L1 and L2 is shadowed.

Functions are those of Linux 6.1 to 7.2, in arch/x86/kvm; `svm/` files have the transitions,
`mmu/mmu.c` what they come to.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from harness.model.registers import CR0, CR4, EFER

PAE_LEVELS: Final = 3
"""A shadow of tables with 32-bit entries is built in the PAE format at least: 8-byte entries."""


class Maps(Enum):
    """What the table in use translates from, or whose table it shadows."""

    L1_PHYSICAL = "L1-physical memory, directly"
    NESTED_TABLE = "L1's nested table, shadowed"
    GUEST_TABLE = "the running guest's own table, shadowed"


class Capability(NamedTuple):
    """What L0 can do. `root_level` is the number of levels of the tables that it builds for nested
    paging: those of its own mode, 4 or 5 (svm_hardware_setup: get_npt_level)."""

    tdp_usable: bool = True
    root_level: int = 4


class Mode(NamedTuple):
    """The registers of a guest, L1 or L2, that its paging depends on."""

    cr0: int
    cr3: int
    cr4: int
    efer: int

    @property
    def levels(self) -> int:
        """Levels of the tables that CR3 points to: 0 with paging off, 2, 3, 4 or 5 (section 5.2)."""
        if not self.cr0 & CR0.PG:
            return 0
        if self.efer & EFER.LMA:
            return 5 if self.cr4 & CR4.LA57 else 4
        return 3 if self.cr4 & CR4.PAE else 2


class Role(NamedTuple):
    """What sets apart two tables that shadow the same page, or map the same memory: a table is used again
    only for an equal role (union kvm_mmu_page_role). None is a bit that no part of this context depends on.
    """

    level: int
    direct: int
    guest_mode: int
    has_4_byte_gpte: int = 0
    efer_nx: int = 1
    cr0_wp: int | None = None
    smep_andnot_wp: int | None = None
    smap_andnot_wp: int | None = None
    passthrough: int = 0
    access_all: int | None = None


class Context(NamedTuple):
    """An MMU context. `root` is the address of the shadowed table (nCR3, or CR3), None for a direct map;
    `walked_level` the levels of that table, 0 for a direct map. `two_dimensional` says that software
    walks of a gVA go through L2's tables and then L1's (walk_mmu is nested_mmu)."""

    maps: Maps
    root: int | None
    walked_level: int
    role: Role
    two_dimensional: bool = False

    @property
    def direct_map(self) -> bool:
        """Whether its table maps L1-physical memory, and shadows nobody's."""
        return self.maps is Maps.L1_PHYSICAL

    def __str__(self) -> str:
        of = "" if self.root is None else f" at {self.root:#x}"
        who = "L2" if self.role.guest_mode else "L1"
        return f"{who} on {self.maps.value}{of}, root level {self.role.level}"


def direct(host: Capability, guest_mode: bool) -> Context:
    """The direct map of a host with tdp_usable: one for L1, and one of its own for L2, since the APIC page
    and the like are not L2's (kvm_calc_tdp_mmu_root_page_role). The guest's own paging has no part in it.
    """
    role = Role(host.root_level, 1, int(guest_mode), cr0_wp=1, smep_andnot_wp=0, smap_andnot_wp=0)
    return Context(Maps.L1_PHYSICAL, None, 0, role)


def shadow_of_nested(host: Capability, l1: Mode, ncr3: int) -> Context:
    """The shadow of L1's nested table (kvm_init_shadow_npt_mmu). Its format is that of L1's mode at VMRUN
    (15.25.3), the shadow's own is L0's; L1's CR0.WP, CR4.SMEP and CR4.SMAP have no part in a nested
    walk (15.25.7), its EFER.NXE has (15.25.6). A 4-level table under a 5-level root goes through
    a top level that has one entry (`passthrough`, since 5.18)."""
    walked = l1.levels
    role = Role(
        host.root_level, 0, 1,
        has_4_byte_gpte=int(not l1.cr4 & CR4.PAE),
        efer_nx=int(bool(l1.efer & EFER.NXE)),
        passthrough=int(host.root_level == 5 and walked == 4),
        access_all=1,
    )
    return Context(Maps.NESTED_TABLE, ncr3, walked, role, two_dimensional=True)


def shadow_of_guest(guest: Mode, guest_mode: bool) -> Context:
    """The shadow of the running guest's own tables, on a host without tdp_usable (kvm_init_shadow_mmu). With
    paging off there is nothing to shadow: a direct map in the PAE format. L0 runs it with EFER.NXE=1
    whatever the guest has."""
    walked = guest.levels
    if not walked:  # root_role.level is max(0, PT32E_ROOT_LEVEL)
        return Context(Maps.L1_PHYSICAL, None, 0, Role(PAE_LEVELS, 1, int(guest_mode)))
    wp = int(bool(guest.cr0 & CR0.WP))
    role = Role(
        max(walked, PAE_LEVELS), 0, int(guest_mode),
        has_4_byte_gpte=int(not guest.cr4 & CR4.PAE),
        cr0_wp=wp,
        smep_andnot_wp=int(bool(guest.cr4 & CR4.SMEP)) & ~wp & 1,
        smap_andnot_wp=int(bool(guest.cr4 & CR4.SMAP)) & ~wp & 1,
    )
    return Context(Maps.GUEST_TABLE, guest.cr3, walked, role)


class Vcpu(NamedTuple):
    """A vCPU as L0 sees it. `l2` is None while L1 runs. Each transition returns the vCPU after it."""

    host: Capability
    l1: Mode
    l2: Mode | None = None
    ncr3: int | None = None
    """nCR3 of the VMRUN in force if that had NP_ENABLE=1."""

    @property
    def context(self) -> Context:
        """The context in use (vcpu->arch.mmu)."""
        if self.l2 is not None and self.ncr3 is not None:
            return shadow_of_nested(self.host, self.l1, self.ncr3)
        in_l2 = self.l2 is not None
        if self.host.tdp_usable:
            return direct(self.host, in_l2)
        return shadow_of_guest(self.l1 if self.l2 is None else self.l2, in_l2)

    def vmrun(self, l2: Mode, np_enable: bool, ncr3: int) -> Vcpu:
        """L1 executes VMRUN, and it is not refused.

        nested_svm_vmrun, enter_svm_guest_mode, nested_vmcb02_prepare_control; with NP_ENABLE=1
        nested_svm_init_mmu_context makes guest_mmu current, and kvm_init_shadow_npt_mmu gives it role and
        root: kvm_mmu_new_pgd takes the root in use, or one of three cached ones, if nCR3 and role are
        these, else kvm_mmu_load builds one. An nCR3 that L1 has written counts from here on, not before
        (15.25.3; nested_copy_vmcb_control_to_cache). nested_svm_load_cr3 then sets up what L2's own tables
        mean: init_kvm_nested_mmu with NP_ENABLE=1, init_kvm_tdp_mmu or kvm_init_shadow_mmu without. An L1
        on a host without tdp_usable is offered no nested paging.
        """
        shadows = np_enable and self.host.tdp_usable
        return self._replace(l2=l2, ncr3=ncr3 if shadows else None)

    def vmexit(self) -> Vcpu:
        """A #VMEXIT that L1 sees, or a VMRUN that is refused after L2's state was loaded.

        nested_svm_vmexit: leave_guest_mode, nested_svm_uninit_mmu_context makes root_mmu current again,
        nested_svm_load_cr3 (L1's CR3).
        """
        return self._replace(l2=None, ncr3=None)

    def handled_by_l0(self) -> Vcpu:
        """An exit that L1 does not see: an interrupt of L0's, or a fault that mends the shadow. Nothing
        switches (nested_svm_exit_special, nested_svm_exit_handled: NESTED_EXIT_HOST)."""
        return self

    def l1_writes(self, mode: Mode) -> Vcpu:
        """L1 writes CR0, CR3, CR4 or EFER.

        kvm_post_set_cr0, kvm_post_set_cr4 and set_efer reset the context (kvm_mmu_reset_context,
        kvm_init_mmu); kvm_set_cr3 takes another root (kvm_mmu_new_pgd). With tdp_usable the direct map stays.
        """
        assert self.l2 is None
        return self._replace(l1=mode)

    def l2_writes(self, mode: Mode) -> Vcpu:
        """L2 writes CR0, CR3, CR4 or EFER, and L1 does not intercept it.

        The same functions as for L1. Under nested paging kvm_init_mmu comes to init_kvm_nested_mmu: only
        walks in software change, the shadow of nCR3 stays.
        """
        assert self.l2 is not None
        return self._replace(l2=mode)
