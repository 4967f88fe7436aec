"""What the kernel that runs L1 tells of itself: trace events as values, whatever its version.

`time` is in nanoseconds of that kernel's trace clock. The fields are KVM's, by the names that the
manual has for them where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Vmrun(NamedTuple):
    """L1 executed VMRUN, and KVM's checks passed (kvm_nested_vmenter; kvm_nested_vmrun before 5.19).
    `rip` is L2's. `root` is nCR3 with NP_ENABLE=1, else CR3; None where the kernel does not say."""

    time: int
    vmcb: int
    rip: int
    np_enable: bool
    root: int | None

    def __str__(self) -> str:
        root = "" if self.root is None else f" {'nCR3' if self.np_enable else 'CR3'} {self.root:#x}"
        return f"VMRUN       vmcb {self.vmcb:#x} rip {self.rip:#x} NP_ENABLE={int(self.np_enable)}{root}"


class Vmexit(NamedTuple):
    """A #VMEXIT that L1 sees (kvm_nested_vmexit_inject)."""

    time: int
    exitcode: int
    info1: int
    info2: int

    def __str__(self) -> str:
        return f"#VMEXIT     exit code {self.exitcode:#x} EXITINFO1 {self.info1:#x} EXITINFO2 {self.info2:#x}"


class InUse(NamedTuple):
    """An MMU context as KVM has it. `mmu` and `walk_mmu` name members of kvm_vcpu_arch (root_mmu,
    guest_mmu, nested_mmu), or are `?`. `root` is the guest's address of the shadowed table, and means
    nothing for a direct map. `root_hpa` is where the table in use lies, `hardware_root` the table that
    the VMCB in use hands to the processor. `role` has the role's bits by KVM's names, `walked` those of the
    tables that are shadowed, or walked by software (cpu_role)."""

    guest_mode: bool
    mmu: str
    walk_mmu: str
    root: int
    root_hpa: int
    hardware_root: int
    role: Mapping[str, int]
    walked: Mapping[str, int]

    def __str__(self) -> str:
        role = self.role
        kind = "direct" if role.get("direct") else f"shadow of {self.root:#x} ({self.walked.get('level', '?')} levels)"
        bits = " ".join(name for name, bit in role.items()
                        if bit == 1 and name not in ("direct", "guest_mode", "access", "access_all", "level", "smm"))
        return (f"{'L2' if self.guest_mode else 'L1'} {self.mmu} {kind}, root level {role.get('level')} "
                f"at {self.root_hpa:#x}{' ' if bits else ''}{bits}")


class Entry(NamedTuple):
    """The processor is about to run a guest, L1 or L2: KVM's own VMRUN (svm_vcpu_run)."""

    time: int
    context: InUse

    def __str__(self) -> str:
        return f"run         {self.context}"


class NewPage(NamedTuple):
    """KVM took a table for an MMU context, a new one or one that it still had (kvm_mmu_get_page). `gfn` is
    the guest page number of the table that it shadows, or of the first page that it maps."""

    time: int
    gfn: int
    role: Mapping[str, int]
    created: bool

    def __str__(self) -> str:
        return (f"table       {'new' if self.created else 'old'}, level {self.role.get('level')}, "
                f"{'direct map from' if self.role.get('direct') else 'shadow of'} gfn {self.gfn:#x}")


Event = Vmrun | Vmexit | Entry | NewPage
