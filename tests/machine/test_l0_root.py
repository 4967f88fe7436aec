"""What L0's root is made of: the archive, the pieces of memory, modules and parameters."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.errors import LaunchFailed
from harness.machine import pieces
from harness.machine.cpio import Archive
from harness.machine.kernel import Kernel


def module(depends: str = "", parameters: str = "") -> bytes:
    """A file that says of itself what a module's .modinfo does."""
    return b"\x7fELF\0depends=" + depends.encode() + b"\0" + parameters.encode() + b"\0vermagic=1\0"


def test_an_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.folder("proc")
    archive.add("bin/a/b", b"content")
    archive.add("init", b"12345", 0o644)
    data = archive.finish()
    assert data.startswith(b"070701") and len(data) % 4 == 0 and data.count(b"TRAILER!!!") == 1
    if not shutil.which("cpio"):
        names = [part.partition(b"\0")[0] for part in data.split(b"070701")[1:]]
        assert b" ".join(name[104:] for name in names) == b"dev dev/console proc bin bin/a bin/a/b init TRAILER!!!"
        return
    listed = subprocess.run(["cpio", "-t"], input=data, capture_output=True, check=True).stdout.split()
    assert listed == [b"dev", b"dev/console", b"proc", b"bin", b"bin/a", b"bin/a/b", b"init"]


def test_pieces_are_seen_as_one() -> None:
    file = os.memfd_create("test")
    os.ftruncate(file, 5 * 4096)
    view = pieces.view(file, 16 * 4096, [(4096, 3 * 4096), (2 * 4096, 4 * 4096), (8 * 4096, 0)])
    os.pwrite(file, b"third", 3 * 4096)
    os.pwrite(file, b"fourth", 4 * 4096)
    view[8 * 4096 : 8 * 4096 + 4] = b"zero"
    assert bytes(view[4096:4101]) == b"third" and bytes(view[8192:8198]) == b"fourth"
    assert os.pread(file, 4, 0) == b"zero" and not any(view[:4096]) and len(view) == 16 * 4096
    os.close(file)


def test_modules_come_in_the_order_of_their_needs(tmp_path: Path) -> None:
    (tmp_path / "kvm-amd.ko.xz").write_bytes(lzma.compress(module("kvm,ccp")))
    (tmp_path / "kvm.ko.gz").write_bytes(gzip.compress(module("irqbypass")))
    (tmp_path / "irqbypass.ko").write_bytes(module())
    (tmp_path / "modules.builtin").write_text("kernel/drivers/crypto/ccp/ccp.ko\n")
    kernel = Kernel(tmp_path / "vmlinuz", (tmp_path,))
    assert list(kernel.closure(["kvm_amd"])) == ["irqbypass", "kvm", "kvm_amd"]
    assert kernel.closure(["kvm_amd"])["kvm"] == module("irqbypass")
    header = bytes(0x202) + b"HdrS" + bytes(8) + b"\x00\x20"
    (tmp_path / "vmlinuz").write_bytes(header + bytes(0x1FF0) + b"6.1.0-test #1\0")
    (tmp_path / "irqbypass.ko").unlink()
    with pytest.raises(LaunchFailed, match="no irqbypass, which kvm needs"):
        Kernel(tmp_path / "vmlinuz", (tmp_path,)).closure(["kvm_amd"])


def test_a_tree_that_does_not_say_what_is_built_in(tmp_path: Path) -> None:
    """Then what is not there is taken for built in: L0 finds out."""
    assert Kernel(tmp_path / "vmlinuz", (tmp_path,)).closure(["kvm_amd"]) == {}
