"""`twinwalk observe --machine kvm-on-tcg`: the hypervisor of test_observe.py under real KVM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli
from harness.errors import MachineLost
from harness.lockstep.audit import Audit
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.observe import Observer, Seen
from harness.lockstep.signature import signature
from harness.machine import kvm_on_tcg, observed_kvm
from harness.machine.observed import Options
from harness.model.backing import look_up
from harness.model.memory import Memory
from harness.model.vmcb import Vmcb
from harness.report import audits, stops
from harness.wire.stop import ACCESS, ENTER, EXIT
from tests.machine.foreign_l1 import build, disk
from tests.machine.processes import gone, unique

pytestmark = pytest.mark.guest

_CODE = 0x100000
"""Where L1 is loaded, and its L2 with it."""
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
    assert seen.accesses == 3 * ROUNDS
    assert seen.exits == {"VMEXIT_NPF": 2 * ROUNDS, "VMEXIT_CPUID": ROUNDS, "VMEXIT_#PF": ROUNDS,
                          "VMEXIT_VMMCALL": ROUNDS}
    assert machine.ended.startswith("it reset") and [one.name for one in machine.identity.layers] == ["kvm", "qemu-tcg"]


def watched(options: Options, errata: list[Erratum]) -> tuple[Seen, str]:
    """All that is seen, and how it ended."""
    with observed_kvm.start(options, kvm_on_tcg.DEFAULT) as machine:
        observer = Observer("foreign", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers),
                            machine.holds)
        for stop in machine.stops(observer.plausible):
            assert not stop.alone or "-smp" not in options.args
            observer.stop(stop)
        return observer.seen, machine.ended


def test_several_processors(foreign: Path, errata: list[Erratum]) -> None:
    """The second one counts meanwhile, in a thread of its own on L0's one processor."""
    seen, ended = watched(Options(foreign, append="s", memory=MEMORY, wait=60, args=("-smp", "2")), errata)
    assert seen.divergences == [] and seen.vmruns == 5 * ROUNDS and not seen.unpaired and ended.startswith("it reset")
    assert seen.accesses + seen.disturbed == 3 * ROUNDS


def test_both_processors_run_guests(foreign: Path, errata: list[Erratum]) -> None:
    """Each its own: the stops of one are not taken for the other's."""
    with observed_kvm.start(Options(foreign, append="b", memory=MEMORY, wait=60, args=("-smp", "2")),
                            kvm_on_tcg.DEFAULT) as machine:
        observer = Observer("both", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers),
                            machine.holds)
        vmcbs: dict[int, set[int]] = {}
        for stop in machine.stops(observer.plausible):
            observer.stop(stop)
            if stop.kind != ACCESS:
                vmcbs.setdefault(stop.vcpu, set()).add(stop.host["rax"])
    assert len(vmcbs) == 2 and all(len(one) == 1 for one in vmcbs.values())
    seen = observer.seen
    assert seen.divergences == [] and seen.vmruns == 9 * ROUNDS and not seen.unpaired
    assert seen.accesses + seen.disturbed == 7 * ROUNDS


def test_a_disk(tmp_path: Path, errata: list[Erratum]) -> None:
    """Of this host: L0 has it, and L1's BIOS boots it."""
    image = disk(tmp_path)
    before = image.read_bytes()
    seen, ended = watched(Options(None, memory=MEMORY, wait=120, args=("-drive", f"file={image},format=raw")), errata)
    assert seen.divergences == [] and seen.vmruns == 5 * ROUNDS and ended.startswith("it reset")
    assert image.read_bytes() == before


def test_arguments_for_disks(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.touch()
    given = ["-smp", "2", "-hda", str(one), "-drive", f"if=ide,file={other},format=qcow2", "-drive", "if=none"]
    inside, outside = observed_kvm.disks(given)
    assert inside == ["-smp", "2", "-hda", "/dev/vda", "-drive", "file=/dev/vdb,format=raw,if=ide", "-drive", "if=none"]
    assert outside == ["-drive", f"if=virtio,snapshot=on,file={one}",
                       "-drive", f"if=virtio,snapshot=on,file={other},format=qcow2"]


def test_its_tables_are_audited(foreign: Path, errata: list[Erratum], tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    """At each stop of an L1 that nobody scripted; a page that L2's shadow leads to is changed, and told at once. What
    was gathered of it is enough for the model alone."""
    options = Options(foreign, append="x", memory=MEMORY, wait=60)
    with observed_kvm.start(options, kvm_on_tcg.Options(audit=1)) as machine:
        assert machine.kvm is not None
        audit = Audit(machine.kvm, machine.memory, machine.cpu, 1, machine.lost)
        observer = Observer("foreign", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers),
                            machine.holds, audit)
        seen, spoilt = observer.seen, 0
        for stop in machine.stops(observer.plausible):
            if stop.kind == EXIT and seen.vmruns == 9:
                words = machine.kvm.memory.words
                trail: list[tuple[str, int, int]] = []
                look_up(words, machine.kvm.shadow_format, machine.kvm.look().l2_root, _CODE, trail)
                _, spoilt, entry = trail[-1]
                words[spoilt >> 3] = entry ^ 1 << 21
            found = observer.stop(stop)
            if spoilt and stop.kind == EXIT and seen.vmruns == 9:
                about = stops.About(*signature(found[0]), "foreign", {}, "", "")
                path = audits.write(tmp_path, audits.Audited(about, observer.audited(found[0]), machine.cpu, ""))
                words[spoilt >> 3] = entry
    assert cli.main(["explain", str(path)]) == 0
    assert "judged again by the model alone: the same finding" in capsys.readouterr().out
    assert [(one.check, one.rule, one.op) for one in seen.divergences] == [("C5", "shadow.frame", 8)]
    assert f"hPA {spoilt:#x}" in "\n".join(seen.divergences[0].events)
    assert seen.shadow_audits == 2 * seen.vmruns == 10 * ROUNDS and seen.shadow_leaves > seen.shadow_audits


def test_an_access_that_went_elsewhere(foreign: Path, errata: list[Erratum]) -> None:
    """L2 reads its letter each round, by an entry of the shadow that is there by then: changed, it leads L2 to the next
    page of L1's, and to one of L0's own."""
    options = Options(foreign, append="x", memory=MEMORY, wait=60)
    with observed_kvm.start(options, kvm_on_tcg.Options(audit=1)) as machine:
        assert machine.kvm is not None
        words = machine.kvm.memory.words
        observer = Observer("foreign", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers),
                            machine.holds)
        seen, letter, spoilt, entry = observer.seen, 0, 0, 0
        for stop in machine.stops(observer.plausible):
            observer.stop(stop)
            if stop.kind == ACCESS and not seen.vmruns % 5:
                letter = stop.gva
                if spoilt:
                    words[spoilt >> 3], spoilt = entry, 0
            elif stop.kind == ENTER and seen.vmruns in (20, 45):
                trail: list[tuple[str, int, int]] = []
                look_up(words, machine.kvm.shadow_format, machine.kvm.look().l2_root, letter, trail)
                name, spoilt, entry = trail[-1]
                assert name == "pte"
                words[spoilt >> 3] = entry ^ 0x1000 if seen.vmruns == 20 else entry & 0xFFF
    assert [(one.check, one.field, one.rule, one.op) for one in seen.divergences] == [
        ("C1", "outcome", "reached", 19), ("C1", "outcome", "reached", 44)]
    assert seen.divergences[0].observed == f"sPA {letter ^ 0x1000:#x}"
    assert seen.divergences[1].observed == "memory that is none of L1's"


def test_command(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    argv = ["observe", "--machine", "kvm-on-tcg", "--kernel", str(foreign), "--memory", str(MEMORY), "--append", "f",
            "--json", str(target), "--audit=2"]
    assert cli.main(argv) == 1
    text = capsys.readouterr().out
    assert json.loads(target.read_text())["totals"]["shadow_audits"] > 100
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
        (["observe", "--machine", "kvm-on-tcg", "--", "-name", "x"], "--kernel"),
        (["observe", "--machine", "kvm-on-tcg", "--", "-hda", "none"], "-hda none: there is no none"),
        ([*base, "--machine", "kvm-on-tcg", "--audit", "--", "-smp", "2"], "leave out -smp"),
        (["observe", "--machine", "kvm-on-tcg", "--kernel", "none"], "no such file"),
        ([*base, "--audit"], "--machine kvm-on-tcg"),
    ]:
        assert cli.main(argv) == 2
        assert word in capsys.readouterr().err
