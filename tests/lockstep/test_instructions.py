"""Instructions of L2 on the model: which exceptions come before their intercepts, and what they leave."""

from __future__ import annotations

import pytest

from harness.errors import UsageError
from harness.lockstep.active import Active
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import EMULATED_BELOW, VC_DROPPED
from harness.lockstep.twin import Twin
from harness.model.vmcb import ExitCode
from harness.scenario.program import Compiler
from harness.wire.image import PAGE
from tests.scenario.texts import one, run

_UD, _GP = ExitCode.EXCEPTION + 6, ExitCode.EXCEPTION + 13
_DE = 'vmcb = "cr4"\nset = ["de"]'
_TSD = 'vmcb = "cr4"\nset = ["tsd"]'
_IOIO = 'vmcb = "intercept_misc1"\nset = ["bit27"]'
_RDTSC = 'vmcb = "intercept_misc1"\nset = ["bit14"]'


def _predict(twin: Twin, compiler: Compiler, *ops: str, quirk: str = "", head: str = "") -> Prediction:
    """Of the first VMRUN."""
    program = compiler.compile(one(*ops, head=head))
    twin.reset(program.world)
    for step in program.steps:
        if step.code == "RUN":
            before = bytes(twin.memory.bytes[step.a : step.a + PAGE])
            out = twin.predict(step, 0)
            return twin.predict_again(out, before, step, Active([quirk])) if quirk else out
        twin.apply(step)
    raise AssertionError("no RUN")


@pytest.mark.parametrize(("probe", "code"), [
    ("vmrun", ExitCode.VMRUN), ("vmload = 0x7000", ExitCode.VMLOAD), ("vmsave = 0x7ffffff000", ExitCode.VMSAVE),
    ("vmrun = 0x7001", _GP), ("vmload = 0x7800", _GP), ("vmsave = 0x10000000000000", _GP),
    ("vmsave = 0x8000000000000000", _GP),
])
def test_rax_is_looked_at_before_the_intercept(probe: str, code: int, twin: Twin, compiler: Compiler) -> None:
    assert _predict(twin, compiler, run(probe)).exitcode == code


@pytest.mark.parametrize("probe", ["rdtsc", "rdtscp"])
@pytest.mark.parametrize(("ops", "cpl", "code"), [
    ((_TSD, _RDTSC), 3, _GP), ((_TSD,), 3, _GP), ((_TSD,), 0, ExitCode.VMMCALL), ((), 3, ExitCode.VMMCALL),
])
def test_tsd(probe: str, ops: tuple[str, ...], cpl: int, code: int, twin: Twin, compiler: Compiler) -> None:
    assert _predict(twin, compiler, *ops, run(probe, cpl=cpl)).exitcode == code


def test_dr4_and_dr5_are_other_names(twin: Twin, compiler: Compiler) -> None:
    out = _predict(twin, compiler, run("wrdr4 = 0xffff0ff1; rddr6; rddr4; wrdr5 = 0x402; rddr7; rddr5"))
    assert [out.results[n] for n in (1, 2, 4, 5)] == [0xFFFF_0FF1, 0xFFFF_0FF1, 0x402, 0x402]


@pytest.mark.parametrize("probe", ["rddr4", "rddr5", "wrdr4 = 0xffff0ff0", "wrdr5 = 0x400"])
def test_with_de_there_are_none(probe: str, twin: Twin, compiler: Compiler) -> None:
    intercepted = 'vmcb = "intercept_dr"\nvalue = 0x00300030'
    assert _predict(twin, compiler, _DE, intercepted, run(probe)).exitcode == _UD
    assert 0x20 < _predict(twin, compiler, intercepted, run(probe)).exitcode < 0x40
    with pytest.raises(UsageError, match="DR4"):
        _predict(twin, compiler, _DE, run(probe, cpl=3))


@pytest.mark.parametrize("probe", ["popfcpuid", "popfrdcr4"])
def test_a_trap_comes_behind_the_instruction_behind_popf(probe: str, twin: Twin, compiler: Compiler) -> None:
    labels = twin.stub.labels
    out = _predict(twin, compiler, run(f"{probe} = 0x146"))
    assert (out.exitcode, out.rule) == (ExitCode.EXCEPTION + 1, "exit.debug")
    assert twin.vmcb["rip"] & 0xFFF == labels[f"next_{probe}"] and twin.vmcb["rsp"] & 0xFFF == 0
    assert twin.vmcb["dr6"] >> 14 & 1 and twin.vmcb["rflags"] & 0x100
    assert _predict(twin, compiler, run(f"{probe} = 0x46")).exitcode == ExitCode.VMMCALL
    intercepted = 'vmcb = "intercept_misc1"\nset = ["bit18"]', 'vmcb = "intercept_cr"\nset = ["bit4"]'
    assert _predict(twin, compiler, *intercepted, run(f"{probe} = 0x146")).exitcode in (4, 0x72)
    assert twin.vmcb["rip"] & 0xFFF == labels[f"second_{probe}"]


@pytest.mark.parametrize("op", ['vmcb = "intercept_misc1"\nset = ["bit17"]',
                                'vmcb = "intercept_exceptions"\nvalue = 0xfffffffd'])
def test_what_of_it_is_not_modelled(op: str, twin: Twin, compiler: Compiler) -> None:
    with pytest.raises(UsageError, match="POPF"):
        _predict(twin, compiler, op, run("popfcpuid = 0x146"))


@pytest.mark.parametrize("probe", ["movssud", "stiud"])
def test_an_exception_in_a_shadow_saves_it(probe: str, twin: Twin, compiler: Compiler) -> None:
    out = _predict(twin, compiler, run(probe))
    assert (out.exitcode, twin.vmcb["interrupt_shadow"]) == (_UD, 1)
    assert (twin.vmcb["ss.selector"] == 0) == (probe == "movssud")


@pytest.mark.parametrize(("probe", "port", "info"), [("inimm", 0x80, 0x80_0211), ("outimm", 0x80, 0x80_0210),
                                                     ("inimm", 0x81, None)])
def test_a_port_in_the_instruction(
    probe: str, port: int, info: int | None, twin: Twin, compiler: Compiler
) -> None:
    out = _predict(twin, compiler, _IOIO, f'entry = "iopm.{port:#x}"\nset = ["any"]',
                   run(probe))
    assert out.exitcode == (ExitCode.VMMCALL if info is None else 0x7B)
    if info is not None:
        assert twin.vmcb["exitinfo1"] == info and twin.vmcb["exitinfo2"] == twin.vmcb["rip"] + 2


@pytest.mark.parametrize(("vector", "quirk", "code"), [
    (29, "", ExitCode.HLT), (29, VC_DROPPED, ExitCode.VMMCALL), (30, VC_DROPPED, ExitCode.HLT),
])
def test_a_vc_that_is_dropped(vector: int, quirk: str, code: int, twin: Twin, compiler: Compiler) -> None:
    out = _predict(twin, compiler, f'vmcb = "eventinj"\nvalue = {0x8000_0300 | vector}', run("read a"), quirk=quirk)
    assert out.exitcode == code


@pytest.mark.parametrize(("value", "code"), [(0x2, ExitCode.VMMCALL), (0xA, ExitCode.VMMCALL), (0x4, 0x4E)])
def test_a_hypervisor_below_emulates_an_lmsw_that_changes_em(
    value: int, code: int, twin: Twin, compiler: Compiler
) -> None:
    head = 'guest = "PAE"\n'
    assert _predict(twin, compiler, run(f"lmsw = {value:#x}"), quirk=EMULATED_BELOW, head=head).exitcode == code
