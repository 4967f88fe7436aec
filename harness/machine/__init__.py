"""Everything that touches the world.

    guests  building the guest images with the system's compiler
    qemu    a QEMU process: its memory, its monitor, its end
    tcg     the machine `tcg`: QEMU plays the AMD CPU that L1 runs on
"""
