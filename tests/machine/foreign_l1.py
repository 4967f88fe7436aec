"""Building the hypervisor that tests observe: see foreign_l1.S."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from elftools.elf.elffile import ELFFile

_ALLOCATED: Final = 2
SOURCE = Path(__file__).with_suffix(".S")


def build(folder: Path, *more: str) -> Path:
    """Its ELF file in `folder`, with no symbols in it; `more` are flags for gcc."""
    target = folder / "foreign.elf"
    flags = ["-m64", "-nostdlib", "-static", "-no-pie", "-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack",
             "-Wl,-Ttext-segment=0x100000", "-Wl,-z,max-page-size=4096"]
    subprocess.run(["gcc", *flags, *more, "-Wl,-e,start", "-o", str(target), str(SOURCE)], check=True)
    return target


def multiboot(folder: Path) -> Path:
    """The same as a 32-bit ELF file, which QEMU takes for a multiboot image."""
    target = folder / "multiboot.elf"
    wide = build(folder, "-DMULTIBOOT")
    subprocess.run(["objcopy", "-O", "elf32-i386", str(wide), str(target)], check=True)
    return target


def disk(folder: Path) -> Path:
    """A raw disk image that boots it by way of the BIOS."""
    kernel, flat, sector, target = build(folder), folder / "flat", folder / "sector.o", folder / "disk.img"
    subprocess.run(["objcopy", "-O", "binary", str(kernel), str(flat)], check=True)
    with kernel.open("rb") as file:
        elf = ELFFile(file)
        base = min(one["sh_addr"] for one in elf.iter_sections() if one["sh_flags"] & _ALLOCATED)
        start = elf["e_entry"]
    code = flat.read_bytes()
    sectors = -(-len(code) // 512)
    values = {"BASE": base, "START": start, "SECTORS": sectors}
    subprocess.run(["gcc", "-m32", "-c", *(f"-Wa,--defsym,{name}={value:#x}" for name, value in values.items()),
                    "-o", str(sector), str(SOURCE.with_name("boot_sector.S"))], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext=0x7c00", "-e", "sector", "--oformat=binary", "-o", str(target),
                    str(sector)], check=True)
    with target.open("ab") as file:
        file.write(code.ljust(64 << 9, b"\0"))
    return target
