"""An SSH server for a Linux L1: the host's dropbear or the distribution's package, with the libraries that it needs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed
from harness.machine import libraries
from harness.machine.packages import Packages

_PROGRAMS: Final = {"dropbear": "usr/sbin/dropbear", "dropbearkey": "usr/bin/dropbearkey"}
"""By name: where the package has them."""
_PACKAGE: Final = "dropbear-bin"


def files(say: Callable[[str], None]) -> dict[str, Path]:
    """Both programs and their libraries, by the path that each has in L1. Raises LaunchFailed, saying what to do."""
    here = {name: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") for name in _PROGRAMS}
    programs = {name: Path(path) for name, path in here.items() if path}
    try:
        found, missing = libraries.needed(list(programs.values()))
        if len(programs) < len(_PROGRAMS) or missing:
            programs, found = _unpacked(Packages(say))
    except LaunchFailed as reason:
        raise LaunchFailed(f"a Linux L1 is reached over SSH, and no server for it can be had: {reason}\ninstall "
                           f"dropbear with dropbearkey (on Debian and Ubuntu: apt-get install {_PACKAGE})") from None
    return {f"bin/{name}": path for name, path in programs.items()} | found


def _unpacked(packages: Packages) -> tuple[dict[str, Path], dict[str, Path]]:
    """Programs and libraries, of packages in the cache where the host has none."""
    folders = [_package(packages, re.escape(_PACKAGE), [_PACKAGE])]
    programs = {name: folders[0] / path for name, path in _PROGRAMS.items()}
    _, missing = libraries.needed(list(programs.values()), folders)
    for library in missing:  # a package is named for the library's name and version
        stem = library.replace(".so.", "")
        known = [name for name in packages.depends(_PACKAGE) if name.removesuffix("t64") == stem]
        folders.append(_package(packages, f"{re.escape(stem)}(t64)?", known))
    found, missing = libraries.needed(list(programs.values()), folders)
    if missing:
        raise LaunchFailed(f"{_PACKAGE} needs {', '.join(missing)}, which none of the packages has that it depends on")
    return programs, found


def _package(packages: Packages, pattern: str, names: list[str]) -> Path:
    """The folder of a package: of one that is in the cache, else of the first of `names`."""
    if known := packages.cached(pattern):
        return known[-1]
    if not names:
        raise LaunchFailed(f"{_PACKAGE} depends on nothing that is named {pattern}")
    return packages.get(names[0])
