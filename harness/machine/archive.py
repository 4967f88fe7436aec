"""All that a run needs on another host that has nothing but Python and QEMU: twinwalk, its guests ready built, and
the pure Python packages that they are driven with."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from harness.errors import LaunchFailed
from harness.machine import guests

PACKAGES: Final = "packages"
"""The folder that is to be on the far side's path."""
CACHE: Final = "cache"
"""The folder that is to be the far side's cache."""
_HARNESS: Final = Path(__file__).resolve().parents[1]
_DISTRIBUTIONS: Final = ("pyelftools", "qemu.qmp")
_OLDEST: Final = (1980, 1, 1, 0, 0, 0)
"""Of every file, so that the same content is the same archive."""


@lru_cache(maxsize=1)
def pack() -> bytes:
    """The archive, a zip file. Raises LaunchFailed if the guests cannot be built here."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(_files()):
            archive.writestr(zipfile.ZipInfo(name, _OLDEST), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def compiler() -> str:
    """What the guests are built with: they are found by it."""
    return os.environ.get("CC") or "gcc"


def _files() -> Iterator[tuple[str, Path]]:
    for path in _HARNESS.rglob("*.py"):
        yield f"{PACKAGES}/harness/{path.relative_to(_HARNESS)}", path
    for path in guests.SOURCES.rglob("*"):
        if path.is_file():
            yield f"{PACKAGES}/guests/{path.relative_to(guests.SOURCES)}", path
    for path in (guests.build_l1(), guests.build_l0("follow"), guests.build_l0("pages")):
        yield f"{CACHE}/twinwalk/{path.name}", path
    for name in _DISTRIBUTIONS:
        try:
            listed = distribution(name).files or ()
        except PackageNotFoundError:
            raise LaunchFailed(f"the Python package {name} is not installed here: install it with pip") from None
        for one in listed:
            if one.suffix == ".py" and ".." not in one.parts:
                yield f"{PACKAGES}/{one}", Path(str(one.locate()))
