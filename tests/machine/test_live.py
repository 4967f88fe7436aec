"""`explain` on a machine that somebody else has running: by its monitor, without a change to it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from harness import cli
from harness.errors import UsageError
from harness.machine import tcg
from harness.machine.live import Live
from harness.model.registers import CR0, EFER
from tests.model.tables import GVA
from tests.test_library_use import VMCB, dump

pytestmark = pytest.mark.guest

_LOADED = 0x30000
"""Bytes of the dump that the machine has from 0 on: its tables and the VMCB, and nothing of the BIOS's."""


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """That of a QEMU which was never started, with tables and a VMCB in its memory."""
    folder = tmp_path_factory.mktemp("live")
    path, memory = folder / "qmp", folder / "memory"
    memory.write_bytes(bytes(dump().memory.bytes[:_LOADED]))
    qemu = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
    argv = [qemu, "-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "64M", "-display", "none", "-S", "-smp", "2",
            "-device", f"loader,file={memory},addr=0,force-raw=on", "-qmp", f"unix:{path},server=on,wait=off"]
    with subprocess.Popen(argv) as process:
        try:
            end = time.monotonic() + 60
            while not path.exists() and time.monotonic() < end:
                time.sleep(0.1)
            yield path
        finally:
            process.kill()


def explained(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    assert cli.main(["explain", *map(str, argv)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("how", [("--vmcb", VMCB), ("--cr3", dump().gcr3, "--ncr3", dump().ncr3)], ids=["vmcb", "cr3"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_as_from_a_dump(how: tuple[object, ...], access: str, socket: Path, tmp_path: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memory.bin"
    file.write_bytes(dump().memory.bytes)
    arguments = (hex(GVA), *how, "--access", access)
    ours = explained(capsys, f"qmp:{socket}", *arguments)
    assert ours == explained(capsys, file, *arguments) and len(ours) > 24
    assert ("ends here: R/W=0" in ours[-1]) is (access == "write")


def test_registers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an L1 in long mode, which goes on behind it."""
    path = tmp_path / "qmp"
    with tcg.start(extra=["-qmp", f"unix:{path},server=on,wait=off"]) as machine:
        with Live(path) as live:
            found = live.registers(0)
            assert found["efer"] & EFER.LMA and found["cr0"] & CR0.PG and found["cpl"] == 0
            assert live.read(machine.image.shared, 64) == bytes(machine.memory[machine.image.shared :][:64])
        said = explained(capsys, f"qmp:{path}", hex(machine.image.shared))
        assert re.search(rf"CR3 {found['cr3']:#x}\b", said[0]) and "one dimension" in "\n".join(said)
        assert any(f"sPA {machine.image.shared:#x}" in text for text in said)
        monitor = QEMUMonitorProtocol(str(path))
        monitor.connect()
        assert monitor.cmd("query-status")["running"]  # type: ignore[index]
        monitor.close()


def test_one_that_stands_still_stays_so(socket: Path) -> None:
    with Live(socket) as machine:
        assert machine.registers(1)["cr0"] == 0x6000_0010
    monitor = QEMUMonitorProtocol(str(socket))
    monitor.connect()
    assert not monitor.cmd("query-status")["running"]  # type: ignore[index]
    monitor.close()


def test_l2_by_its_registers(socket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With nCR3 those of the vCPU are L2's: it has paging off here, so its gVA is a gPA."""
    said = explained(capsys, f"qmp:{socket}", "0x50000000", "--ncr3", hex(dump().ncr3), "--vcpu", "1")
    assert said[0].startswith("vCPU 1  ") and "sPA 0x654000" in said and "one dimension" not in "\n".join(said)


def test_only_ram_is_read(socket: Path) -> None:
    with Live(socket) as machine:
        for address in (0xFEE0_0000, 0x5000_0000):
            with pytest.raises(IndexError, match="not RAM"):
                machine.read(address, 8)


@pytest.mark.parametrize(("arguments", "says"), [
    (("0x0", "--vcpu", "2"), "this machine has 2"), ((), "give an address"),
    (("0x0", "--vmcb", "0", "--cr3", "0"), "at most one"), (("0x0", "--vmcb", "0xfee00000"), "not RAM"),
])
def test_refused(arguments: tuple[str, ...], says: str, socket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"qmp:{socket}", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"qmp:{tmp_path / 'none'}", "0x0"]) == 2
    assert "-qmp unix:PATH,server=on,wait=off" in capsys.readouterr().err
    with pytest.raises(UsageError):
        Live(tmp_path / "none").__enter__()
