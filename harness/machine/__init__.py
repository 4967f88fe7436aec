"""Everything that touches the world.

    guests      building the guest images with the system's compiler
    qemu        a QEMU process: its memory, its monitor, its end
    l1          what all machines have in common: a booted L1, and its identity
    tcg         the machine `tcg`: QEMU plays the AMD CPU that L1 runs on
    kvm_on_tcg  the machine `kvm-on-tcg`: Linux's KVM, on an AMD CPU that QEMU plays, runs L1
    packages    the distribution's packages, fetched with apt
    kernel      L0's kernel and its modules
    cpio        writing an initramfs
    initramfs   what L0's root holds
    l0          L0: booted, told what to do
    l0_kvm      L0's KVM as it lies in L0's memory
    pieces      memory that lies in pieces, seen as one
    btf         where the members of L0's structures are
    ring        L0's trace ring in its binary form
    trace       what L0's kernel tells of KVM: VMRUNs, #VMEXITs, MMU contexts
"""
