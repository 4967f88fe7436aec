"""The machine `kvm`, on the only AMD host that is always there: all of twinwalk runs in L0 of kvm-on-tcg, on its
/dev/kvm, Python included. It is this machine kind, end to end, only slow."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from harness.machine import guests, kvm_on_tcg, l0, qemu
from harness.machine.cpio import Archive
from tests.conftest import ROOT

pytestmark = pytest.mark.guest

_DISTRIBUTIONS = ("pexpect", "ptyprocess", "pyelftools", "qemu.qmp", "rich", "pygments", "markdown-it-py", "mdurl")
_NOT_NEEDED = {"test", "idlelib", "tkinter", "site-packages", "lib2to3", "ensurepip", "turtledemo", "__pycache__"}
_RUN = ("cd /app && PYTHONHOME=/python XDG_CACHE_HOME=/cache PYTHONPATH=/site:/app "
        "/python/bin/python3 -m harness.cli")

_LIGHT = "run --machine kvm scenarios/first-light.toml"


def _libraries(binaries: list[Path]) -> dict[str, Path]:
    """Shared libraries by where the loader looks for them."""
    listed = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    words = {word for line in listed.splitlines() for word in line.split() if word.startswith("/") and ":" not in word}
    return {word.lstrip("/"): Path(word).resolve() for word in words}


def _tree(folder: Path, below: str) -> dict[str, Path]:
    return {f"{below}/{path.relative_to(folder)}": path for path in folder.rglob("*")
            if path.is_file() and not _NOT_NEEDED.intersection(path.relative_to(folder).parts)}


def _files() -> dict[str, Path]:
    """This Python with what twinwalk needs of its packages, twinwalk, and its built guests."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = list((library / "lib-dynload").glob("*.so"))
    python = Path(sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    files = _libraries([python, *modules]) | {"python/bin/python3": python}
    files |= _tree(library, f"python/lib/{version}")
    for name in _DISTRIBUTIONS:
        for one in distribution(name).files or ():
            if one.suffix != ".pyc" and ".." not in one.parts:
                files[f"site/{one}"] = Path(str(one.locate()))
    for name in ("harness", "scenarios", "guests"):
        files |= _tree(ROOT / name, f"app/{name}")
    for path in (guests.build_l1(), guests.build_l0("follow")):
        files[f"cache/twinwalk/{path.name}"] = path
    return files


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[l0.L0]:
    """An AMD host that QEMU plays, with Python, QEMU and twinwalk on it."""
    kernel, root = kvm_on_tcg.prepare()
    archive = Archive()
    for name, path in _files().items():
        archive.add(name, path.read_bytes())
    archive.add("bin/qemu-system-x86_64", b'#!/bin/busybox sh\nexec /bin/qemu -L /firmware "$@"\n')
    whole = tmp_path_factory.mktemp("root") / "whole.cpio"
    whole.write_bytes(root.read_bytes() + archive.finish())  # the kernel unpacks one behind the other
    with l0.start(qemu.find(None), "max", kernel, whole, []) as booted:
        yield booted


def _twinwalk(host: l0.L0, arguments: str) -> tuple[int, str, str]:
    status, output, errors = host.try_run(f"{_RUN} {arguments}", 400.0)
    return status, output.decode(), errors.decode()


def test_it_runs_there_with_contexts(host: l0.L0) -> None:
    """By default, since it works: scenarios agree, KVM's contexts are checked, and nothing is left in tracefs, not even
    what a run left that was killed."""
    host.run("mkdir -p /sys/kernel/tracing/instances/twinwalk_99999; "
             "echo 'p:twinwalk_99999/run svm_vcpu_run' >>/sys/kernel/tracing/kprobe_events")
    status, output, errors = _twinwalk(host, "run scenarios/ad/first-access.toml scenarios/contexts/alternating.toml "
                                             "--json /tmp/result.json")
    assert status == 0, output + errors
    result: dict[str, Any] = json.loads(host.run("cat /tmp/result.json"))
    machine, totals = result["machine"], result["totals"]
    assert machine["machine"] == "kvm" and machine["layers"][0][0] == "kvm" and machine["layers"][1][0] == "qemu-tcg"
    assert machine["contexts"] == "observed", machine["contexts"]
    assert totals["vmruns"] > 4 and totals["contexts_checked"] > 2 * totals["vmruns"]
    assert host.run("ls /sys/kernel/tracing/instances").strip() == b""
    assert host.run("cat /sys/kernel/tracing/kprobe_events").strip() == b""


def test_without_tracefs_the_rest_is_checked(host: l0.L0) -> None:
    host.run("umount /sys/kernel/tracing")
    try:
        status, output, errors = _twinwalk(host, _LIGHT)
    finally:
        host.run("mount -t tracefs tracefs /sys/kernel/tracing")
    assert status == 0, output + errors
    assert "not observed: there is no tracefs" in output


def test_nested_0_is_said(host: l0.L0) -> None:
    """Before anything is started, with what mends it."""
    host.run("rmmod kvm_amd && insmod /modules/kvm_amd.ko nested=0")
    try:
        status, output, errors = _twinwalk(host, _LIGHT)
    finally:
        host.run("rmmod kvm_amd && insmod /modules/kvm_amd.ko nested=1")
    assert status == 3 and "nested=0" in errors and "modprobe kvm_amd nested=1" in errors, output + errors
