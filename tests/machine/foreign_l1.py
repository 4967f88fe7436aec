"""Building the hypervisor that tests observe: see foreign_l1.S."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".S")


def build(folder: Path) -> Path:
    """Its ELF file in `folder`, with no symbols in it."""
    target = folder / "foreign.elf"
    flags = ["-m64", "-nostdlib", "-static", "-no-pie", "-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack",
             "-Wl,-Ttext-segment=0x100000", "-Wl,-z,max-page-size=4096"]
    subprocess.run(["gcc", *flags, "-Wl,-e,start", "-o", str(target), str(SOURCE)], check=True)
    return target
