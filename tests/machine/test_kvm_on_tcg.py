"""The machine `kvm-on-tcg`: one boot of L0 for all that needs a good one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from harness.errors import LaunchFailed
from harness.lockstep.contexts import Contexts
from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum, Known, explain, of_layers
from harness.lockstep.result import Result
from harness.lockstep.twin import Twin
from harness.machine import kernel, kvm_on_tcg
from harness.machine.l1 import WITHOUT_NPT
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from harness.wire.layout import RECORDS
from harness.wire.records import Record
from tests.conftest import LIBRARY
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest

LIGHT = (
    "first-light", "walk/nested-not-present", "walk/nested-read-only", "ad/", "split/", "modes/nested-pae-accesses",
    "modes/nested-pae-pdpte", "modes/pae-accesses", "events/inject-software", "events/inject-cut", "vmrun/host-paging",
    "vmrun/sss", "state/v-irq",
)
"""Names of scenarios that are run here: of every kind a few, and those that KVM does otherwise than the manual."""


@pytest.fixture(scope="module")
def kvm() -> Iterator[kvm_on_tcg.KvmOnTcgMachine]:
    try:
        kernel.find(None, None)
    except LaunchFailed as reason:
        pytest.skip(f"no kernel for L0: {reason}")
    with kvm_on_tcg.start() as machine:
        yield machine


def check(machine: kvm_on_tcg.KvmOnTcgMachine, scenarios: list[Scenario], errata: list[Erratum], strict: bool = False,
          ) -> list[Result]:
    twin = Twin(machine.image, machine.cpu, machine.liberties)
    known = of_layers(errata, machine.identity.layers)
    lockstep = Lockstep(machine, machine.channel, twin, strict, known)
    return list(lockstep.run(map(Compiler(machine.image, machine.cpu).compile, scenarios)))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
def test_first_light(strict: bool, kvm: kvm_on_tcg.KvmOnTcgMachine) -> None:
    (result,) = check(kvm, files.load([LIBRARY / "first-light.toml"]), [], strict)
    assert result.vmruns == 2 and not result.divergences and result.lost is None


def test_contexts_are_told(kvm: kvm_on_tcg.KvmOnTcgMachine) -> None:
    """The state machine as this kernel goes through it: a direct map, the shadow of L1's nested table, back; with
    NP_ENABLE=0 a direct map of L2's own."""
    if kvm.trace is None:
        pytest.skip(f"contexts are not told here: {kvm.identity.contexts}")
    kvm.trace.pause()
    kvm.trace.resume()
    contexts = Contexts(kvm.trace, kvm.image.ram_end, kvm.lost)
    lockstep = Lockstep(kvm, kvm.channel, Twin(kvm.image, kvm.cpu, kvm.liberties), False, contexts=contexts)
    scenario = one("read a", 'vmcb = "np_control"\nvalue = 0', "read a",
                   'vmcb = "asid"\nvalue = 0', "read a")
    (result,) = lockstep.run([Compiler(kvm.image, kvm.cpu).compile(scenario)])
    assert result.lost is None and not result.divergences
    nested, plain, refused = result.switches
    assert nested is not None and plain is not None and refused is None
    shadow = f"L2 guest_mmu shadow of {result.visits[0].under.ncr3:#x} (4 levels), root level "
    for switch, words in ((nested, shadow), (plain, "L2 root_mmu direct, root level ")):
        assert switch.behind.words.startswith("L1 root_mmu direct, root level ") and switch.entries >= 1
        assert switch.inside and all(inside.words.startswith(words) for inside in switch.inside)


def test_what_it_is(kvm: kvm_on_tcg.KvmOnTcgMachine) -> None:
    identity = kvm.identity
    assert identity.machine == "kvm-on-tcg" and identity.kernel_version >= (5, 10) and identity.kernel
    assert [layer.name for layer in identity.layers] == ["kvm", "qemu-tcg"]
    assert identity.layers[0].version == identity.kernel_version and identity.l1_pages == "2m"


def test_memory_is_l1s(kvm: kvm_on_tcg.KvmOnTcgMachine) -> None:
    """A word that L2 writes is seen where L1's memory has it, at both ends of what is mapped."""
    (result,) = check(kvm, [one(run("write a+8 = 0x1122334455667788; read a+8"))], [], strict=True)
    assert not result.divergences and result.lost is None
    assert kvm.l0.run("cat /sys/module/kvm_amd/parameters/nested").strip() in (b"1", b"Y")


def test_the_librarys_sample_agrees(kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]) -> None:
    scenarios = [s for s in files.load([LIBRARY]) if s.name.startswith(LIGHT)][:250]
    assert len(scenarios) > 60
    for result in check(kvm, scenarios, errata):
        assert result.lost is None
        assert [d for d in result.divergences if d.erratum is None] == [], result.scenario


@pytest.mark.parametrize(
    ("nested", "probe", "known"),
    [("4K", "rdcr4", True), ("4K", "wrcr4 = &vmcb.cr4+pge", True), ("4K", "wrcr0 = &vmcb.cr0-wp", True),
     ("4K", "rdcr0", False), ("none", "wrcr4 = &vmcb.cr4-pge", True), ("none", "wrcr0 = &vmcb.cr0-wp", False)],
)
def test_what_kvm_emulates_of_l2_in_pae_mode(
    nested: str, probe: str, known: bool, kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]
) -> None:
    """A bit that QEMU sets in a PDPTE keeps KVM from it (erratum qemu-tcg-pae-pdpte-emulated)."""
    scenario = one(run(f"read a; {probe}; write b+8"), head=f'guest = "PAE"\nnested_page = "{nested}"\n')
    (result,) = check(kvm, [scenario], errata)
    assert result.lost is None and [d for d in result.divergences if d.erratum is None] == []
    blamed = any("qemu-tcg-pae-pdpte-emulated" in (d.erratum or "") for d in result.divergences)
    assert blamed == known


def test_l1_spares_exits_and_says_so(kvm: kvm_on_tcg.KvmOnTcgMachine) -> None:
    """Behind the first VMRUN, behind one that ends otherwise than the last, and where L2 changes registers L1 reads
    its own; behind those that are like the last one, and L2 only reads, it does not."""
    seen: list[int] = []
    ran = kvm.channel.next_record

    def watched(idle: Callable[[float], None]) -> Record:
        record = ran(idle)
        if record.kind == RECORDS["EXIT"]:
            seen.append(record.after["all_read"])
        return record

    ops = ["read a", "read a+8", "write b+8 = 1", "read a; read 0x7fff00000000", "wrcr4 = 0x20", "read a", "read a"]
    program = Compiler(kvm.image, kvm.cpu).compile(one(*map(run, ops)))
    kvm.channel.next_record = watched  # type: ignore[method-assign]
    try:
        lockstep = Lockstep(kvm, kvm.channel, Twin(kvm.image, kvm.cpu, kvm.liberties), False)
        (result,) = lockstep.run([program])
    finally:
        kvm.channel.next_record = ran  # type: ignore[method-assign]
    assert result.lost is None and not result.divergences
    assert seen == [1, 0, 0, 1, 1, 1, 0]


def test_a_fault_that_is_planted_is_found(kvm: kvm_on_tcg.KvmOnTcgMachine, errata: list[Erratum]) -> None:
    """Bits of L1's nested table that the program does not know of."""
    compiler = Compiler(kvm.image, kvm.cpu)
    program = compiler.compile(one("read a", run("read a")))
    twin = Twin(kvm.image, kvm.cpu, kvm.liberties)
    twin.reset(program.world)
    lockstep = Lockstep(kvm, kvm.channel, twin, True, of_layers(errata, kvm.identity.layers))
    spoilt = compiler.compile(one('entry = "nested.a.pte"\nset = ["nx"]', run("fetch a+0x20")))
    original = twin.apply

    def forgetful(step: object) -> None:
        """The model misses the write that the machine makes."""

    twin.apply = forgetful  # type: ignore[method-assign]
    (result,) = lockstep.run([spoilt])
    twin.apply = original  # type: ignore[method-assign]
    assert any(d.check == "C1" and d.erratum is None for d in result.divergences)


def test_without_nested_paging(errata: list[Erratum]) -> None:
    """L0's KVM has none: what L1 finds in its CR4 then is an erratum of such a KVM, and of no other."""
    try:
        kernel.find(None, None)
    except LaunchFailed as reason:
        pytest.skip(f"no kernel for L0: {reason}")
    light = files.load([LIBRARY], lambda name: name in ("contexts/guests[none,off]", "contexts/guests[none,PAE]"))
    with kvm_on_tcg.start(options=kvm_on_tcg.Options(parameters=("npt=0",))) as machine:
        assert not machine.cpu.npt and machine.identity.layers[-1].name == WITHOUT_NPT
        pae, off = sorted(check(machine, light, errata), key=lambda result: result.scenario)
    assert not pae.divergences and pae.vmruns
    found = [one for one in off.divergences if one.op >= 0]  # a session runs again what shows at the end
    assert {(one.field, one.erratum) for one in found} == {("l1.cr4", "kvm-cr4-without-npt")}
    others = Known(one for one in errata if one.machine == "kvm")
    assert {one.erratum for one in explain([one._replace(erratum=None) for one in found], others)} == {None}
