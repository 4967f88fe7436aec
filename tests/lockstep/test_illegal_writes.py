"""Illegal writes of L2 to its registers: their order with L1's intercepts, and the quirks about them."""

from __future__ import annotations

import pytest

from harness.lockstep.quirks import (
    CR4_HIGH_DROPPED,
    EFER_RESERVED_DROPPED,
    ILLEGAL_CR4_ENDS,
    INTERCEPT_BEFORE_ILLEGAL,
)
from harness.lockstep.twin import Twin
from harness.model.vmcb import ExitCode
from harness.scenario.program import Compiler
from tests.lockstep.test_devices import _predict
from tests.scenario.texts import one, run

GP = 0x4D
_CR4 = 'vmcb = "intercept_cr"\nset = ["bit20"]'


@pytest.mark.parametrize(("ops", "probe", "quirks", "code"), [
    ((), "wrcr4 = &vmcb.cr4+bit13", (), GP),
    ((_CR4,), "wrcr4 = &vmcb.cr4+bit13", (), GP),
    ((_CR4,), "wrcr4 = &vmcb.cr4+bit13", (INTERCEPT_BEFORE_ILLEGAL,), 0x14),
    ((), "wrcr4 = &vmcb.cr4+bit13", (ILLEGAL_CR4_ENDS,), 0xFFFF_FFFF),
    ((), "wrcr4 = &vmcb.cr4+bit40", (CR4_HIGH_DROPPED,), ExitCode.VMMCALL),
    ((), "wrcr4 = &vmcb.cr4+bit13", (CR4_HIGH_DROPPED,), GP),
    ((), "wrmsr 0xc0000080 = &vmcb.efer+bit9", (), GP),
    ((), "wrmsr 0xc0000080 = &vmcb.efer+bit9", (EFER_RESERVED_DROPPED,), ExitCode.VMMCALL),
    ((), "wrdr7 = 0x100000400", (), GP),
])
def test_where_it_ends(
    ops: tuple[str, ...], probe: str, quirks: tuple[str, ...], code: int, twin: Twin, compiler: Compiler
) -> None:
    out = _predict(twin, compiler.compile(one(*ops, run(probe))), quirks)
    assert out.exitcode == code


def test_an_msr_is_intercepted_before_its_value_is_looked_at(twin: Twin, compiler: Compiler) -> None:
    asked = 'vmcb = "intercept_misc1"\nset = ["bit28"]', 'entry = "msrpm.0xc0000080"\nset = ["write"]'
    program = compiler.compile(one(*asked, run("wrmsr 0xc0000080 = &vmcb.efer+bit9")))
    assert _predict(twin, program).exitcode == 0x7C


def test_the_register_stays(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(run("wrcr4 = &vmcb.cr4+bit13")))
    twin.reset(program.world)
    before = twin.vmcb["cr4"]
    _predict(twin, program)
    assert twin.vmcb["cr4"] == before != 0
