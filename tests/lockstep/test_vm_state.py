"""VMLOAD and VMSAVE that L2 executes itself, on the model."""

from __future__ import annotations

import pytest

from harness.errors import UsageError
from harness.lockstep.quirks import VM_STATE_WANTS_NPT
from harness.lockstep.twin import Twin
from harness.model.liberties import Liberties
from harness.model.vmcb import ExitCode
from harness.scenario.program import Compiler
from harness.wire.image import tag
from tests.lockstep.test_devices import _predict
from tests.scenario.texts import one, run

_OPEN = 'vmcb = "intercept_misc2"\nclear = ["bit2", "bit3"]'


def test_vmsave_stores_what_vmload_loads(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(_OPEN, run(
        "wrmsr 0xc0000100 = 0x123400000000; vmsave = &spa.a; read a+0x448; write a+0x448 = 0x1000; "
        "write a+0x600 = 0x77; write a+0x440 = 0xffffffff0c930028; vmload = &spa.a; "
        "rdmsr 0xc0000100; rdmsr 0xc0000081; read a+0x460")))
    out = _predict(twin, program)
    assert out.exitcode == ExitCode.VMMCALL
    assert (out.results[2], out.results[7], out.results[8]) == (0x1234_0000_0000, 0x1000, 0x77)
    assert out.results[9] == tag(program.world.spa["a"] + 0x460)  # none of what VMSAVE stores
    assert (twin.vmcb["fs.selector"], twin.vmcb["fs.attrib"], twin.vmcb["fs.limit"]) == (0x28, 0xC93, 0xFFFF_FFFF)


@pytest.mark.parametrize(("ops", "probe"), [
    ((), "vmload"), ((), "vmload = 0x1000"), ((), "vmsave = &gva.a"),
    (('vmcb = "lbr_control"\nset = ["bit1"]',), "vmload = &spa.a"),
])
def test_what_is_not_modelled(ops: tuple[str, ...], probe: str, twin: Twin, compiler: Compiler) -> None:
    with pytest.raises((UsageError, ValueError)):
        _predict(twin, compiler.compile(one(_OPEN, *ops, run(probe))))


def test_a_real_host_is_not_written_to(compiler: Compiler, twin: Twin) -> None:
    """Where the hypervisor does not intercept it either, an L2 could: VMLOAD is tried, VMSAVE is not."""
    there = Twin(twin.image, twin.cpu, Liberties(speculates=True))
    with pytest.raises(UsageError, match="canonical"):  # of what the page holds
        _predict(there, compiler.compile(one(_OPEN, run("vmload = &spa.a"))))
    with pytest.raises(UsageError, match="real processor"):
        _predict(there, compiler.compile(one(_OPEN, run("vmsave = &spa.a"))))


def test_a_base_that_is_not_canonical(twin: Twin, compiler: Compiler) -> None:
    with pytest.raises(UsageError, match="canonical"):
        _predict(twin, compiler.compile(one(_OPEN, run("write a+0x448 = 0x800000000000; vmload = &spa.a"))))


def test_by_a_quirk_it_leaves_without_nested_paging(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(_OPEN, run("vmsave = &spa.a; vmload = &spa.a"), head='nested_page = "none"\n'))
    assert _predict(twin, program).exitcode == ExitCode.VMMCALL
    assert _predict(twin, program, [VM_STATE_WANTS_NPT]).exitcode == 0x83
