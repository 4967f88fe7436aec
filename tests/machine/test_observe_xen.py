"""`twinwalk observe` of Xen, the distribution's: its first domain is a Linux that it runs by VMRUN."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from harness import cli
from harness.errors import LaunchFailed
from harness.machine import kernel
from harness.machine.packages import Packages

pytestmark = pytest.mark.guest

VMRUNS = 3000


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Xen as QEMU takes it, and a Linux."""
    packages = Packages()
    names = [name for name in packages.depends("xen-system-amd64") if re.fullmatch(r"xen-hypervisor-[\d.]+-amd64",
                                                                                name)]
    try:
        if not names:
            raise LaunchFailed("apt has no package xen-system-amd64")
        folder = packages.get(names[0])
        linux = kernel.find(None, None, lambda text: None).image
    except LaunchFailed as reason:
        pytest.skip(f"no Xen to observe: {reason}")
    packed = next((folder / "boot").glob("xen-*.gz"))
    xen = tmp_path_factory.mktemp("xen") / "xen"
    xen.write_bytes(gzip.decompress(packed.read_bytes()))
    return xen, linux


def test_its_first_domain(images: tuple[Path, Path], tmp_path: Path) -> None:
    xen, linux = images
    target = tmp_path / "out.json"
    argv = ["observe", "--kernel", str(xen), "--initrd", str(linux), "--append", "console=com1 dom0=pvh dom0_mem=512M",
            "--cpu", "max,-rdtscp", "--vmruns", str(VMRUNS), "--json", str(target)]
    assert cli.main([*argv, "--", "-M", "q35", "-device", "amd-iommu"]) == 0
    totals = json.loads(target.read_text())["totals"]
    assert totals["vmruns"] == VMRUNS and totals["divergences_new"] == 0 and totals["table_bytes_compared"] > 1 << 20
