"""Building the guest images, at first use and whenever a source has changed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from harness import places
from harness.errors import LaunchFailed
from harness.wire.header import c_header
from harness.wire.image import Image

SOURCES: Final = places.folder("guests")

_FLAGS: Final = (
    "-std=gnu11", "-O2", "-g", "-m64", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-stack-protector",
    "-fcf-protection=none", "-mno-red-zone", "-mgeneral-regs-only", "-fno-asynchronous-unwind-tables", "-fno-pic",
    "-no-pie", "-static", "-nostdlib", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096",
)

_PLUGIN_FLAGS: Final = (
    "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden",
)

_NO_LIBC: Final = re.compile(r"fatal error: (errno|stdlib|string|unistd)\.h: |cannot find (crt\w+\.o|-lc)\b")
"""What gcc and ld say of a host that has no libc6-dev: gcc does not depend on it."""


def cache_dir() -> Path:
    """Where built images lie: $XDG_CACHE_HOME/twinwalk, by default ~/.cache/twinwalk."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "twinwalk"


def build_l1(compiler: str | None = None) -> Path:
    """The probe hypervisor's ELF file, built if there is none for these sources yet.

    `compiler` is by default $CC, else gcc. Raises LaunchFailed if it is missing or fails.
    """
    folder = SOURCES / "l1"
    sources = sorted(p for p in folder.iterdir() if p.suffix in (".c", ".S"))
    others = sorted(p for p in folder.iterdir() if p.suffix in (".h", ".inc", ".ld"))
    return _build("l1", sources, others, (*_FLAGS, f"-Wl,-T,{folder / 'l1.ld'}"), compiler)


def build_l0(name: str) -> Path:
    """A program for L0: `pages` makes pages present and says where they are, `follow` copies a trace. Raises
    LaunchFailed."""
    folder = SOURCES / "l0"
    return _build(name, [folder / f"{name}.c"], [folder / "call.h"], _FLAGS, None)


def build_linux(name: str) -> Path:
    """A program for a Linux L2: `memory` works on its memory. Raises LaunchFailed."""
    calls = SOURCES / "l0"
    return _build(name, [SOURCES / "linux" / f"{name}.c"], [calls / "call.h"], (*_FLAGS, "-I", str(calls)), None)


def build_plugin(api: int) -> Path:
    """The plugin for QEMU's TCG that observes a foreign L1, for this version of QEMU's interface. Raises
    LaunchFailed."""
    folder = SOURCES / "observe"
    return _build(f"stops{api}", [folder / "stops.c"], [folder / "plugin.h"], (*_PLUGIN_FLAGS, f"-DAPI={api}"), None)


def _build(
    name: str, sources: Sequence[Path], others: Sequence[Path], flags: Sequence[str], compiler: str | None
) -> Path:
    command = compiler or os.environ.get("CC") or "gcc"
    header = c_header()
    digest = hashlib.sha256("\0".join([command, *_FLAGS, *_PLUGIN_FLAGS, header]).encode())
    for path in (*sources, *others):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_dir() / f"{name}-{digest.hexdigest()[:20]}.elf"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            Path(scratch, "wire.h").write_text(header)
            output = Path(scratch, "built.elf")
            argv = [command, *flags, "-I", scratch, "-I", str(sources[0].parent), *map(str, sources)]
            argv += ["-o", str(output)]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode:
                lacks = _NO_LIBC.search(done.stderr)
                remedy = f"the C library's headers are missing: {places.remedy('libc6-dev')}\n" if lacks else ""
                raise LaunchFailed(f"the guest does not build: {remedy}{' '.join(argv)}\n{done.stderr}")
            output.replace(target)  # atomic: test workers may build at the same time
    except FileNotFoundError:
        raise LaunchFailed(f"no compiler {command!r}: {places.remedy('gcc binutils')}, or set CC") from None
    except OSError as reason:
        raise LaunchFailed(f"cannot build the guest in {target.parent}: {reason}; set XDG_CACHE_HOME") from None
    return target


@lru_cache(maxsize=4)
def load_image(path: Path) -> Image:
    """L1's memory map, from its symbols. Raises LaunchFailed for a file that is not L1."""
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        if not isinstance(table, SymbolTableSection):
            raise LaunchFailed(f"{path} is not the probe hypervisor: it has no symbol table")
        symbols: Mapping[str, int] = {s.name: s["st_value"] for s in table.iter_symbols() if s.name}
    try:
        return Image.from_symbols(symbols)
    except KeyError as name:
        raise LaunchFailed(f"{path} is not the probe hypervisor: it has no symbol {name}") from None


def loaded(path: Path) -> int:
    """The address behind all that a guest image is loaded to."""
    with path.open("rb") as file:
        ends = [s["p_paddr"] + s["p_memsz"] for s in ELFFile(file).iter_segments() if s["p_type"] == "PT_LOAD"]
        return int(max(ends))
