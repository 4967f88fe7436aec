"""`twinwalk observe --machine kvm-on-tcg`: the hypervisor of test_observe.py under real KVM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli
from harness.errors import MachineLost
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.observe import Observer
from harness.machine import kvm_on_tcg, observed_kvm
from harness.machine.observed import Options
from harness.model.memory import Memory
from harness.model.vmcb import Vmcb
from harness.wire.stop import ENTER
from tests.machine.foreign_l1 import build
from tests.machine.processes import gone, unique

pytestmark = pytest.mark.guest

ROUNDS = 25
MEMORY = 64


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("foreign"))


def test_all_of_it(foreign: Path, errata: list[Erratum]) -> None:
    """Each VMRUN and #VMEXIT of L1's, none of L0's; and a field that changes while L2 runs is told."""
    options = Options(foreign, append="x", memory=MEMORY, wait=60)
    with observed_kvm.start(options, kvm_on_tcg.DEFAULT) as machine:
        observer = Observer("foreign", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers),
                            machine.holds)
        for stop in machine.stops(observer.plausible):
            observer.stop(stop)
            if stop.kind == ENTER and observer.seen.vmruns == 9:
                Vmcb(Memory.over(machine.memory), stop.host["rax"])["tsc_offset"] = 5
    seen = observer.seen
    assert [(one.check, one.field, one.op) for one in seen.divergences] == [("C3", "tsc_offset", 8)]
    assert seen.vmruns == 5 * ROUNDS and not seen.unpaired and not seen.elsewhere
    assert seen.exits == {"VMEXIT_NPF": 2 * ROUNDS, "VMEXIT_CPUID": ROUNDS, "VMEXIT_#PF": ROUNDS,
                          "VMEXIT_VMMCALL": ROUNDS}
    assert machine.ended.startswith("it reset") and [one.name for one in machine.identity.layers] == ["kvm", "qemu-tcg"]


def test_command(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    argv = ["observe", "--machine", "kvm-on-tcg", "--kernel", str(foreign), "--memory", str(MEMORY), "--append", "f",
            "--json", str(target)]
    assert cli.main(argv) == 1
    text = capsys.readouterr().out
    assert "24 of L1 tlb_control" in text and "console: the foreign L1 is done" in text
    result = json.loads(target.read_text())
    assert result["totals"]["divergences_new"] == 24 and result["machine"]["machine"] == "kvm-on-tcg"


def test_no_vmrun(foreign: Path) -> None:
    options = Options(foreign, append="n", memory=MEMORY, wait=60)
    with pytest.raises(MachineLost, match="ended without any VMRUN: it reset") as caught, observed_kvm.start(
            options, kvm_on_tcg.DEFAULT) as machine:
        list(machine.stops(lambda stop: True))
    assert "the foreign L1 is done" in caught.value.log


def test_an_l1_that_qemu_does_not_take(tmp_path: Path) -> None:
    text = tmp_path / "kernel"
    text.write_bytes(b"no kernel\n" * 200)
    name = unique()
    with pytest.raises(MachineLost, match="the QEMU in L0 ended with status 1"), observed_kvm.start(
            Options(text, memory=MEMORY, wait=60, args=("-name", name)), kvm_on_tcg.DEFAULT) as machine:
        list(machine.stops(lambda stop: True))
    assert gone(name, 60)


def test_usage(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["observe", "--kernel", str(foreign)]
    for argv, word in [
        ([*base, "--l0-kernel", "6.12"], "--machine kvm-on-tcg"),
        ([*base, "--kvm-param", "npt=0"], "--machine kvm-on-tcg"),
        ([*base, "--machine", "kvm-on-tcg", "--memory", "2048"], "1536"),
        (["observe", "--machine", "kvm-on-tcg", "--", "-hda", "disk"], "--kernel"),
        (["observe", "--machine", "kvm-on-tcg", "--kernel", "none"], "no such file"),
    ]:
        assert cli.main(argv) == 2
        assert word in capsys.readouterr().err
