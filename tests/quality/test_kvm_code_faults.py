"""Bugs planted in KVM's own code, in L0's memory, before L1 starts: a function that returns at once. The audit must
tell each by its rule, at the first switch at which it is one."""

from __future__ import annotations

import mmap
import re

import pytest

from harness.errors import LaunchFailed
from harness.lockstep.audit import Audit
from harness.lockstep.compare import Divergence
from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.twin import Twin
from harness.machine import kernel, kvm_on_tcg, l0
from harness.machine.trace import capability
from harness.model.backing import look_up
from harness.model.entries import FRAME, long_mode
from harness.model.memory import Memory
from harness.scenario.program import Compiler
from harness.wire.image import Image
from tests.scenario.texts import one, run

pytestmark = pytest.mark.guest

RETURN = b"\xc3"
RETURN_0 = b"\x31\xc0\xc3"

BUGS = {
    # L1 writes to its tables, and KVM is not told
    "kvm_mmu_slot_gfn_write_protect": (RETURN_0, ("shadow.tracked", 0)),
    # tables that L1 has written to are not brought in step at VMRUN
    "kvm_mmu_sync_roots": (RETURN, ("shadow.stale", 2)),
}


def plant(host: l0.L0, function: str, code: bytes) -> None:
    """Overwrite the function's first bytes, which nothing has executed yet."""
    address = int(host.run(f"grep -w {function} /proc/kallsyms | head -n 1").split()[0], 16)
    registers = host.process.command("human-monitor-command", **{"command-line": "info registers"})
    found = re.search(r"CR3=([0-9a-f]+)", registers)
    assert found is not None
    memory = Memory.over(memoryview(mmap.mmap(host.process.memory_fd, l0.MEMORY)))
    fmt = long_mode(52, True, la57=capability(kvm_on_tcg._Files(host)).root_level == 5)
    place = look_up(memory.words, fmt, int(found[1], 16) & FRAME, address, [])
    assert place is not None
    memory.bytes[place.address : place.address + len(code)] = code


@pytest.mark.parametrize("function", BUGS)
def test_a_bug_is_found(function: str, errata: list[Erratum], monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        kernel.find(None, None)
    except LaunchFailed as reason:
        pytest.skip(f"no kernel for L0: {reason}")
    code, first = BUGS[function]
    begin = kvm_on_tcg._start_qemu

    def spoilt(host: l0.L0, image: Image, file: str) -> None:
        plant(host, function, code)
        begin(host, image, file)

    monkeypatch.setattr(kvm_on_tcg, "_start_qemu", spoilt)
    with kvm_on_tcg.start(options=kvm_on_tcg.Options(audit=1)) as machine:
        assert machine.kvm is not None
        audit = Audit(machine.kvm, machine.memory, machine.cpu, 1, machine.lost)
        lockstep = Lockstep(machine, machine.channel, Twin(machine.image, machine.cpu, machine.liberties), True,
                            of_layers(errata, machine.identity.layers), audit=audit)
        scenario = one(run("write a; read b"), 'entry = "nested.a.pte"\nclear = ["rw"]', run("read a; read b"))
        (result,) = lockstep.run([Compiler(machine.image, machine.cpu).compile(scenario)])
    found: list[Divergence] = [divergence for divergence in result.divergences if divergence.check == "C5"]
    assert (found[0].rule, found[0].op) == first
