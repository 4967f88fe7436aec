"""`kvm-on-tcg` where it cannot work: exit code 3 in words, at once, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import LaunchFailed, MachineLost, UsageError
from harness.lockstep.driver import Lockstep
from harness.lockstep.twin import Twin
from harness.machine import kernel, kvm_on_tcg, l0
from harness.machine.kvm_on_tcg import Options
from harness.scenario.program import Compiler
from tests.conftest import ROOT
from tests.machine.processes import gone, unique, wait_for
from tests.scenario.texts import one, run


@pytest.fixture(scope="module")
def linux() -> kernel.Kernel:
    try:
        return kernel.find(None, None)
    except LaunchFailed as reason:
        pytest.skip(f"no kernel for L0: {reason}")


def failure(name: str = "", extra: tuple[str, ...] = (), **options: Any) -> str:
    with pytest.raises(LaunchFailed) as caught, kvm_on_tcg.start(extra=extra, options=Options(**options)):
        pass
    assert caught.value.exit_code == 3
    assert not name or gone(name, 60)
    return str(caught.value)


def modules_without(linux: kernel.Kernel, folder: Path, spoilt: str, data: bytes | None) -> Path:
    """The kernel's modules in a folder of the test's own, but for one: it is missing, or holds `data`."""
    for tree in linux.modules:
        for path in tree.rglob("*"):
            name = path.name.partition(".ko")[0].replace("-", "_")
            if ".ko" in path.name and name == spoilt:
                if data is not None:
                    (folder / f"{name}.ko").write_bytes(data)
            elif ".ko" in path.name or path.name == "modules.builtin":
                target = folder / path.name
                if not target.exists():
                    target.symlink_to(path)
    return folder


def test_no_such_kernel(tmp_path: Path) -> None:
    assert "--kernel" in failure(kernel=tmp_path / "vmlinuz", modules=tmp_path)


def test_no_kernel_at_all(tmp_path: Path, linux: kernel.Kernel) -> None:
    bad = tmp_path / "bzImage"
    bad.write_bytes(bytes(100_000))
    assert "no x86 kernel image" in failure(kernel=bad, modules=linux.modules[0])
    bad.write_bytes(b"short")
    assert "no x86 kernel image" in failure(kernel=bad, modules=linux.modules[0])


def test_modules_without_a_kernel(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--kernel"), kvm_on_tcg.start(options=Options(modules=tmp_path)):
        pass


def test_no_kvm_amd(tmp_path: Path, linux: kernel.Kernel) -> None:
    text = failure(kernel=linux.image, modules=modules_without(linux, tmp_path, "kvm_amd", None))
    assert "has no kvm_amd" in text and linux.release in text and "CONFIG_KVM_AMD" in text


def test_a_module_that_is_damaged(tmp_path: Path, linux: kernel.Kernel) -> None:
    bad = tmp_path / "kvm_amd.ko.xz"
    bad.write_bytes(b"no xz")
    one_only = kernel.Kernel(linux.image, (tmp_path,))
    with pytest.raises(LaunchFailed, match=r"cannot read the module .*kvm_amd\.ko\.xz"):
        one_only.closure(["kvm_amd"])


def test_a_parameter_that_is_not_there(linux: kernel.Kernel) -> None:
    for text in ("npt", "no_such=1", "virtio.npt=0", "npt="):
        with pytest.raises(UsageError, match="--kvm-param"):
            linux.parameter(text)
    assert linux.parameter("npt=0") == ("kvm_amd", "npt=0")
    assert linux.parameter("kvm.tdp_mmu=0") == ("kvm", "tdp_mmu=0")


@pytest.mark.guest
def test_no_kvm_amd_where_nobody_says_what_is_built_in(tmp_path: Path, linux: kernel.Kernel) -> None:
    modules = modules_without(linux, tmp_path, "kvm_amd", None)
    (modules / "modules.builtin").unlink()
    text = failure(kernel=linux.image, modules=modules)
    assert f"kernel {linux.release} has no kvm_amd" in text and "CONFIG_KVM_AMD" in text
    assert "it was started as" in text and "L0 has no /dev/kvm" in text


@pytest.mark.guest
def test_a_module_that_does_not_load(tmp_path: Path, linux: kernel.Kernel) -> None:
    whole = linux.module("kvm_amd")
    assert whole is not None
    other = whole.replace(b"vermagic=", b"vermagic=0", 1)[: len(whole)]
    name, start = unique(), time.monotonic()
    text = failure(name, ("-name", name), kernel=linux.image,
                   modules=modules_without(linux, tmp_path, "kvm_amd", other))
    assert time.monotonic() - start < 240
    assert "the module kvm_amd does not load" in text and "it was started as" in text


@pytest.mark.guest
def test_a_kernel_that_panics(linux: kernel.Kernel) -> None:
    name, start = unique(), time.monotonic()
    text = failure(name, ("-name", name, "-append", "console=ttyS0 panic=-1 quiet rdinit=/nowhere root=/dev/none"))
    assert time.monotonic() - start < 240  # the panic ends it, no time-out
    assert "Kernel panic" in text and "try another kernel" in text and "--cpu max,-cx16" in text.splitlines()[-1]


@pytest.mark.guest
def test_a_kernel_that_stops(linux: kernel.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0, "_BOOT_TIMEOUT", 6.0)
    name = unique()
    text = failure(name, ("-name", name, "-append", "console=ttyS0 rdinit=/bin/busybox"))
    assert "did not answer" in text or "panic" in text


@pytest.mark.guest
def test_no_memory_for_large_pages(linux: kernel.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0, "MEMORY", 256 << 20)
    monkeypatch.setattr(kvm_on_tcg, "_OVERCOMMIT", 4)
    text = failure()
    assert "cannot back L1's memory with 2m pages" in text and "--l1-pages 4k" in text


@pytest.mark.guest
def test_a_cpu_without_svm() -> None:
    text = failure_of_cpu("max,-svm")
    assert "has no svm" in text


def failure_of_cpu(model: str) -> str:
    with pytest.raises(LaunchFailed) as caught, kvm_on_tcg.start(cpu_model=model):
        pass
    return str(caught.value)


@pytest.fixture
def own(linux: kernel.Kernel) -> Iterator[tuple[kvm_on_tcg.KvmOnTcgMachine, str]]:
    name = unique()
    with kvm_on_tcg.start(extra=["-name", name], options=Options(pages="4k")) as machine:
        yield machine, name
    assert gone(name, 60)


@pytest.mark.guest
def test_pages_of_4k_and_a_qemu_killed_in_l0_and_l0_killed(own: tuple[kvm_on_tcg.KvmOnTcgMachine, str]) -> None:
    machine, name = own
    assert machine.identity.l1_pages == "4k"
    compiler = Compiler(machine.image, machine.cpu)
    program = compiler.compile(one(run("read a; write b+8")))
    twin = Twin(machine.image, machine.cpu, machine.liberties)
    lockstep = Lockstep(machine, machine.channel, twin, True)
    (result,) = lockstep.run([program])
    assert not result.divergences and result.lost is None
    machine.l0.run("kill -9 $(pidof qemu)")
    start = time.monotonic()
    (result,) = lockstep.run([program])
    assert result.lost is not None and "QEMU in L0 ended with status 137" in result.lost.reason
    assert time.monotonic() - start < 60
    os.kill(wait_for(name), signal.SIGKILL)
    with pytest.raises(MachineLost, match="status -9"):
        machine.l0.run("true")


_VICTIM = """
import sys
from harness.machine import kvm_on_tcg
with kvm_on_tcg.start(extra=["-name", sys.argv[1]]):
    raise AssertionError("it should have been killed")
"""


@pytest.mark.guest
def test_no_orphan(linux: kernel.Kernel) -> None:
    """L0 does not outlive a command that is killed while it boots."""
    name = unique()
    argv = [sys.executable, "-c", _VICTIM, name]
    victim = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(name)
    victim.kill()
    victim.wait()
    assert gone(name, 60)
