"""Everything that touches the world.

The machines, and what they have in common:

    l1          a booted L1, and its identity
    local       L1 in a QEMU of this host: its start, and its end
    qemu        a QEMU process: its memory, its monitor, its end
    tcg         the machine `tcg`: QEMU plays the AMD CPU that L1 runs on
    kvm_on_tcg  the machine `kvm-on-tcg`: Linux's KVM, on an AMD CPU that QEMU plays, runs L1
    kvm, here   the machine `kvm`: this host's own, and what can be seen of it
    paced       a machine that is held while it is far enough ahead

L0 of `kvm-on-tcg`, and what its kernel tells:

    l0          L0: booted, told what to do
    kernel      its kernel and modules
    initramfs, cpio, libraries   what its root holds
    l0_kvm      its KVM as it lies in its memory
    pieces      memory that lies in pieces, seen as one
    btf         where the members of its structures are
    ring        its trace ring in its binary form
    trace       what KVM does: VMRUNs, #VMEXITs, MMU contexts

What is got and built:

    guests      the guest images, with the system's compiler
    packages    the distribution's packages, fetched with apt
    suites, versions, foreign   those of its other releases; QEMU and kernels by version; a QEMU of another release

Other hosts:

    address, ssh   where it is, and the way there
    archive, bootstrap   what a run needs there, and what begins it

A foreign L1:

    observed, observed_kvm   stopped at its VMRUNs, on QEMU's own SVM and under real KVM
    linux, linux_life   a Linux L1 with a Linux L2, and what they go through
    line, inside, dropbear   its console; the way into it over SSH
    tsc         how fast this host's time-stamp counter counts, for a Linux on QEMU
    dump, live  memory in a file, and of a machine that somebody else has running
"""
