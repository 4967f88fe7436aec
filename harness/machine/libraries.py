"""What programs of this host are loaded with, so that they run in a root of ours."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path


def needed(programs: Sequence[Path], folders: Sequence[Path] = ()) -> tuple[dict[str, Path], list[str]]:
    """The libraries of `programs`, by the path that each has in such a root; and names of those that are neither on
    this host nor in `folders`, where packages are unpacked."""
    there = {path.name: path for folder in folders for path in folder.rglob("*.so*")}
    environment = {**os.environ}
    if there:
        environment["LD_LIBRARY_PATH"] = ":".join(sorted({str(path.parent) for path in there.values()}))
    listed = "".join(subprocess.run(["ldd", str(one)], capture_output=True, text=True, check=False, env=environment
                                    ).stdout for one in programs)
    found = {}
    for text in re.findall(r"(?:=> |^\s*)(/\S+)", listed, re.MULTILINE):
        path = Path(text)
        unpacked = path.name in there and path.parent == there[path.name].parent
        found[f"lib/x86_64-linux-gnu/{path.name}" if unpacked else text.lstrip("/")] = path.resolve()
    return found, sorted(set(re.findall(r"^\s*(\S+) => not found", listed, re.MULTILINE)))
