"""QEMU of another release: a tree of its own with the program, its libraries, their loader and its firmware.

Another release's QEMU wants that release's C library. Here it brings it along, so it runs on any host, and in L0.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from harness.errors import LaunchFailed

PROGRAM: Final = "qemu-system-x86_64"
NEEDED: Final = ("seabios", "qemu-system-common", "qemu-system-data", "qemu-system-x86")
"""Packages that a tree is made of, besides libraries."""

_ACCELERATOR: Final = "accel-tcg-x86_64.so"
"""TCG is a module where QEMU is built with modules."""

_SCRIPT: Final = """\
#!/bin/sh
# QEMU with its own libraries, loader, modules and firmware.
here=$(dirname "$(readlink -f "$0")")
export QEMU_MODULE_DIR="$here/modules"
exec "$here/lib/{loader}" --library-path "$here/lib" "$here/bin/{program}" -L "$here/firmware" "$@"
"""


def is_library(package: str) -> bool:
    """Whether a package of that name is one that QEMU's libraries may come from."""
    return package.startswith(("lib", "zlib"))


def assemble(unpacked: Path, target: Path) -> None:
    """Make a tree in `target` of what is needed from packages that are unpacked in one folder. The program to start
    is target / PROGRAM. Raises LaunchFailed if a library is missing."""
    binary = unpacked / "usr" / "bin" / PROGRAM
    found = {path.name: path for path in unpacked.rglob("*.so*") if path.is_file()}
    modules = [path for name, path in found.items() if name == _ACCELERATOR]
    for folder in ("bin", "lib", "modules", "firmware"):
        (target / folder).mkdir(parents=True)
    shutil.copy(binary, target / "bin" / PROGRAM)
    for module in modules:
        shutil.copy(module, target / "modules" / module.name)
    todo, loader = [binary, *modules], ""
    while todo:
        for name, is_loader in _wants(todo.pop()):
            loader = name if is_loader else loader
            if (target / "lib" / name).exists():
                continue
            if name not in found:
                raise LaunchFailed(f"{binary.name} needs {name}, which none of the packages has that it depends on")
            shutil.copy(found[name], target / "lib" / name)
            todo.append(found[name])
    for folder in ("share/seabios", "share/qemu", "lib/ipxe/qemu"):
        for path in (unpacked / "usr" / folder).glob("*"):
            if path.suffix in (".bin", ".rom") and path.is_file():
                shutil.copy(path, target / "firmware" / path.name)
    script = target / PROGRAM
    script.write_text(_SCRIPT.format(loader=loader, program=PROGRAM))
    script.chmod(0o755)


def files(binary: str) -> tuple[dict[str, Path], Path] | None:
    """For `binary` of such a tree: its files by the path that each has where it is the only QEMU, and its folder of
    firmware. None for any other."""
    tree = Path(binary).resolve().parent
    program = tree / "bin" / PROGRAM
    if Path(binary).name != PROGRAM or not program.is_file():
        return None
    out = {"bin/qemu": program}
    loaders = [name for name, is_loader in _wants(program) if is_loader]
    for path in (tree / "lib").iterdir():
        out[f"lib64/{path.name}" if path.name in loaders else f"lib/x86_64-linux-gnu/{path.name}"] = path
    return out, tree / "firmware"


def _wants(path: Path) -> Iterator[tuple[str, bool]]:
    """What a program or library is to be loaded with: names of libraries, and of the loader (True)."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        for segment in elf.iter_segments():
            if isinstance(segment, InterpSegment):
                yield Path(segment.get_interp_name()).name, True
        dynamic = elf.get_section_by_name(".dynamic")
        if isinstance(dynamic, DynamicSection):
            for tag in dynamic.iter_tags("DT_NEEDED"):
                yield str(vars(tag)["needed"]), False  # its type does not say so
