"""The SSH server for a Linux L1: the host's, the package's, or none, which is said."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.errors import LaunchFailed
from harness.machine import dropbear, libraries
from harness.machine.packages import Packages


def test_all_of_it_is_there() -> None:
    """Programs and the loader, and each library that the programs name."""
    files = dropbear.files(lambda text: None)
    assert {"bin/dropbear", "bin/dropbearkey", "lib64/ld-linux-x86-64.so.2"} <= files.keys()
    assert all(path.is_file() for path in files.values())
    named = subprocess.run(["objdump", "-p", str(files["bin/dropbear"])], capture_output=True, text=True, check=True)
    wanted = {line.split()[1] for line in named.stdout.splitlines() if "NEEDED" in line}
    assert wanted and wanted <= {Path(name).name for name in files}


def test_the_hosts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dropbear", "dropbearkey"):
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert dropbear.files(lambda text: None)["bin/dropbear"] == tmp_path / "dropbear"


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here, nor in the cache, nor known to apt."""
    monkeypatch.setattr(dropbear, "_PROGRAMS", {"no-such-dropbear": "usr/sbin/no-such-dropbear"})
    monkeypatch.setattr(dropbear, "_PACKAGE", "no-such-dropbear")
    with pytest.raises(LaunchFailed, match=r"apt has no package(.|\n)*apt-get install no-such-dropbear"):
        dropbear.files(lambda text: None)


def test_a_library_that_no_package_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packages, "cached", lambda self, pattern: [tmp_path] if pattern == "dropbear\\-bin" else [])
    monkeypatch.setattr(Packages, "depends", lambda self, name: [])
    monkeypatch.setattr(libraries, "needed", lambda programs, folders=(): ({}, ["libnone.so.1"]))
    with pytest.raises(LaunchFailed, match="depends on nothing that is named libnone1"):
        dropbear.files(lambda text: None)
