"""Where twinwalk's own files are, and what the command is called: in a checkout, and installed from a wheel.

A checkout has guests/ and scenarios/ beside harness/; a wheel has them inside of it.
"""

from __future__ import annotations

import shlex
import sys
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).resolve().parent
_LAUNCHER: Final = _PACKAGE.parent / "twinwalk"
_SOURCES: Final = (".py", ".c", ".h", ".S", ".ld", ".toml")


def folder(name: str) -> Path:
    """The folder `guests` or `scenarios`."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def root() -> Path:
    """The folder that has harness/: of a checkout, tests/ too."""
    return _PACKAGE.parent


def command() -> str:
    """What one types: the launcher in a checkout, else the script that was installed."""
    return "./twinwalk" if _LAUNCHER.is_file() else "twinwalk"


@lru_cache(maxsize=1)
def edition() -> str:
    """A digest of this twinwalk's code, guests and scenarios: where it is the same, so is all that is checked."""
    out = blake2b(digest_size=8)
    for name, root in (("harness", _PACKAGE), ("guests", folder("guests")), ("scenarios", folder("scenarios"))):
        for path in sorted(root.rglob("*")):
            if path.suffix in _SOURCES and path.is_file():
                out.update(f"{name}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return out.hexdigest()


def again() -> str:
    """This process's command line, as it can be given again."""
    return shlex.join([command(), *sys.argv[1:]])


def remedy(packages: str) -> str:
    """How to get programs that are missing; `packages` are Debian's names."""
    if _LAUNCHER.is_file():
        return "run `./twinwalk setup`"
    return f"install it (on Debian and Ubuntu: apt-get install --no-install-recommends {packages})"
