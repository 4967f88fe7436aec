"""String I/O and L1's local APIC on the model, and as a hypervisor below carries them out."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from harness.errors import UsageError
from harness.lockstep.active import Active
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import (
    EMULATED_BELOW,
    PSE36_OF_FOUR,
    REPEATED_INS_LOST,
    SOFTWARE_WALK_FAULT,
    STRING_WRITE_HALVES,
    V_IRQ_KEPT,
    V_TPR_OVERWRITTEN,
    below,
)
from harness.lockstep.twin import Twin
from harness.model import local_apic
from harness.model.vmcb import ExitCode, VIntr
from harness.scenario.program import Compiler, Program
from harness.wire.image import PAGE, tag
from tests.scenario.texts import one, run

_TO_DEVICE = 'entry = "nested.a.pte"\nframe = "device"'


def _predict(twin: Twin, program: Program, quirks: Iterable[str] = ()) -> Prediction:
    """The program's first VMRUN."""
    twin.reset(program.world)
    for step in program.steps:
        if step.code == "RUN":
            break
        twin.apply(step)
    before = bytes(twin.memory.bytes[step.a : step.a + PAGE])
    out = twin.predict(step, 0)
    return twin.predict_again(out, before, step, Active(quirks)) if quirks else out


def test_what_outs_sends_ins_gets(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(run("outs a+4; ins b+0xffe; read4 b+0xffc; outs a; ins d; read4 d")))
    out = _predict(twin, program)
    world = program.world
    sent = tag(world.spa["a"]) >> 32
    assert out.exitcode == ExitCode.VMMCALL
    assert out.results[0] == world.gva["a"] + 8 and out.results[1] == world.gva["b"] + 0x1002
    assert out.results[2] >> 16 == sent & 0xFFFF and twin.memory.read(world.spa["c"], 2) == sent >> 16
    assert out.results[5] == tag(world.spa["a"]) & 0xFFFF_FFFF


def test_df_goes_down(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one('vmcb = "rflags"\nset = ["bit10"]', run("outs a+4; ins b+0xffe; ins a")))
    out = _predict(twin, program)
    a, b = program.world.gva["a"], program.world.gva["b"]
    assert [out.results[n] for n in range(3)] == [a, b + 0xFFA, a - 4]


@pytest.mark.parametrize(("probe", "info1"), [
    ("ins a", 0xCF8_0245), ("outs a", 0xCF8_0E44), ("repins a = 2", 0xCF8_024D), ("repouts a = 2", 0xCF8_0E4C),
    ("outsfs a", 0xCF8_1244), ("outsgs a", 0xCF8_1644),
])
def test_intercepted_before_memory(probe: str, info1: int, twin: Twin, compiler: Compiler) -> None:
    """15.10.3 and figure 15-2: STR, SZ32, A64; the segment is ES for INS and DS for OUTS."""
    program = compiler.compile(one('vmcb = "intercept_misc1"\nset = ["bit27"]', 'entry = "iopm.0xcfb"\nset = ["any"]',
                                   'entry = "guest.a.pte"\nclear = ["p"]', run(probe)))
    out = _predict(twin, program)
    assert (out.exitcode, twin.vmcb["exitinfo1"]) == (0x7B, info1)
    assert twin.vmcb["exitinfo2"] == twin.vmcb["rip"] + (1 if probe in ("ins a", "outs a") else 2)
    assert out.regs["rsi"] == (program.world.gva["a"] if "outs" in probe else program.world.mailbox[0])
    assert out.regs.get("rcx") == (2 if probe.startswith("rep") else None)


def test_a_device_holds_what_is_written(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(
        _TO_DEVICE, run("read4 a+0x310; write4 a+0x310 = 0x5a000000; read4 a+0x310; read4 a+0xd0; outs a+0x310")))
    out = _predict(twin, program)
    assert [out.results[n] & 0xFFFF_FFFF for n in (0, 2, 3)] == [0, 0x5A00_0000, 0]
    assert twin.outside["cf8"] == 0x5A00_0000
    assert local_apic.BASE + 0x310 in out.old
    twin.reset(program.world)
    assert twin.memory.read(local_apic.BASE + 0x310, 4) == 0


@pytest.mark.parametrize("probe", ["read a+0x310", "read4 a+0x30", "read2 a+0x310", "write4 a+0x310 = 0x1",
                                   "rmw4 a+0x310 = 0x1000000", "fetch a", "push a"])
def test_what_a_device_does_not_define(probe: str, twin: Twin, compiler: Compiler) -> None:
    with pytest.raises(UsageError):
        _predict(twin, compiler.compile(one(_TO_DEVICE, run(probe))))


@pytest.mark.parametrize("probes", ["ins a", "rddr2"])
def test_what_l2_has_not_written_is_not_known(probes: str, twin: Twin, compiler: Compiler) -> None:
    with pytest.raises(UsageError, match="not known"):
        _predict(twin, compiler.compile(one(run(probes))))


def test_a_prediction_that_is_made_again_finds_what_the_first_found(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(run("wrdr1 = 0x10; outs b+8; ins a; rddr1; wrdr1 = 0x20; outs c")))
    first, again = _predict(twin, program), _predict(twin, program, [SOFTWARE_WALK_FAULT])
    assert first.results == again.results and first.exitcode == again.exitcode


@pytest.mark.parametrize(("entry", "code"), [("pt", 0x1_0000_0006), ("a", 0x1_0000_0006)])
def test_a_software_walk_tells_less(entry: str, code: int, twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(f'entry = "nested.{entry}.pte"\nclear = ["p"]', run("out4 0xcf8; ins a+0x18")))
    out = _predict(twin, program)
    exact = twin.vmcb["exitinfo2"]
    assert out.exitcode == ExitCode.NPF and exact & 0xFFF
    _predict(twin, program, [SOFTWARE_WALK_FAULT])
    assert (twin.vmcb["exitinfo1"], twin.vmcb["exitinfo2"]) == (code, exact & ~0xFFF)


@pytest.mark.parametrize("entry", ["guest.b.pte", "nested.b.pte"])
def test_the_first_half_of_a_string_write(entry: str, twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one(f'entry = "{entry}"\nclear = ["p"]', run("out4 0xcf8 = 0x11223344; ins a+0xffe")))
    a = program.world.spa["a"] + 0xFF8
    _predict(twin, program)
    assert twin.memory.read(a, 8) == tag(a)
    _predict(twin, program, [STRING_WRITE_HALVES])
    assert twin.memory.read(a, 8) == tag(a) & (1 << 48) - 1 | 0x3344 << 48


@pytest.mark.parametrize(("probe", "code"), [("ins a", 0xB), ("write a", 0xA)])
def test_the_cpus_habits_are_none_of_a_hypervisors_walk(probe: str, code: int, twin: Twin, compiler: Compiler) -> None:
    """A CPU that reports reserved bits without P has no part in string I/O, which the hypervisor carries out."""
    program = compiler.compile(one('entry = "guest.a.pte"\nset = ["bit51"]', run(f"out4 0xcf8; {probe}")))
    _predict(twin, program)
    assert twin.vmcb["exitinfo1"] == 0xB
    _predict(twin, program, [below("reserved-without-p")])
    assert twin.vmcb["exitinfo1"] == code


@pytest.mark.parametrize("probe", ["outs b", "read4 a+0x310", "write4 a+0x310 = 0x1000000"])
def test_pae_and_a_hypervisor_below(probe: str, twin: Twin, compiler: Compiler) -> None:
    """By the quirk the hypervisor cannot fetch the instruction that it has to carry out."""
    program = compiler.compile(one(_TO_DEVICE, run(probe), head='guest = "PAE"\n'))
    assert _predict(twin, program).exitcode == ExitCode.VMMCALL
    assert _predict(twin, program, [EMULATED_BELOW]).exitcode == 0x4E


@pytest.mark.parametrize(("bit", "differs"), [(16, False), (17, True), (20, True)])
@pytest.mark.parametrize("probe", ["write a+8", "ins a+8"])
def test_four_bits_of_pse36(probe: str, bit: int, differs: bool, twin: Twin, compiler: Compiler) -> None:
    """By the quirk bits 20:17 of a 4M page's PDE are reserved, in the hypervisor's walks of L2's tables alone."""
    others = ", ".join(f'"bit{n}"' for n in range(13, 21) if n != bit)
    program = compiler.compile(one(f'entry = "guest.a.pde"\nset = ["bit{bit}"]\nclear = [{others}]',
                                   'entry = "nested.a.pte"\nclear = ["p"]', run(f"out4 0xcf8; {probe}"),
                                   head='guest = "32-bit"\nguest_page = "4M"\n'))
    out = _predict(twin, program)
    assert (out.exitcode, twin.vmcb["exitinfo2"] >> 32) == (ExitCode.NPF, 1 << bit - 13)
    out = _predict(twin, program, [PSE36_OF_FOUR])
    by_software = probe == "ins a+8" and differs
    assert out.exitcode == (0x4E if by_software else ExitCode.NPF)


@pytest.mark.parametrize("down", [False, True])
def test_what_repeats_goes_on_until_rcx_is_0(down: bool, twin: Twin, compiler: Compiler) -> None:
    flag = "bit10" if down else "bit1"
    program = compiler.compile(one(f'vmcb = "rflags"\nset = ["{flag}"]', run(
        "out4 0xcf8 = 0x11223344; repins a+0xffc = 3; repouts c+8 = 2; ins d; read4 d; repins a = 0")))
    out = _predict(twin, program)
    gva, spa, step = program.world.gva, program.world.spa, -4 if down else 4
    assert [out.results[n] for n in (1, 2, 5)] == [gva["a"] + 0xFFC + 3 * step, gva["c"] + 8 + 2 * step, gva["a"]]
    written = (spa["a"] + 0xFF8, spa["a"] + 0xFF4) if down else (spa["b"], spa["b"] + 4)
    assert all(twin.memory.read(at, 4) == 0x1122_3344 for at in (spa["a"] + 0xFFC, *written))
    assert out.results[4] & 0xFFFF_FFFF == tag(spa["c"] + (0 if down else 8)) >> 32


@pytest.mark.parametrize(("quirks", "rcx", "done"), [((), 3, 2), ((REPEATED_INS_LOST,), 5, 0)])
def test_a_fault_leaves_what_was_repeated(
    quirks: tuple[str, ...], rcx: int, done: int, twin: Twin, compiler: Compiler
) -> None:
    program = compiler.compile(one('entry = "nested.b.pte"\nclear = ["p"]',
                                   run("out4 0xcf8 = 0x11223344; repins a+0xff8 = 5")))
    out = _predict(twin, program, quirks)
    assert out.exitcode == ExitCode.NPF
    assert (out.regs["rcx"], out.regs["rdi"]) == (rcx, program.world.gva["a"] + 0xFF8 + 4 * done)
    assert twin.memory.read(program.world.spa["a"] + 0xFFC, 4) == 0x1122_3344


def test_nothing_to_repeat_asks_for_no_port(twin: Twin, compiler: Compiler) -> None:
    """Nor does the manual say that it would not: where L1 intercepts ports, that is not modelled."""
    with pytest.raises(UsageError, match="rCX = 0"):
        _predict(twin, compiler.compile(one('vmcb = "intercept_misc1"\nset = ["bit27"]', run("repins a = 0"))))


@pytest.mark.parametrize("guest", ["4-level", "32-bit"])
@pytest.mark.parametrize("segment", ["fs", "gs"])
def test_fs_and_gs_add_their_base(segment: str, guest: str, twin: Twin, compiler: Compiler) -> None:
    probes = run(f"outs{segment} a+8; ins d; read4 d")
    program = compiler.compile(one(f'vmcb = "{segment}.base"\nvalue = 0x1000', probes, head=f'guest = "{guest}"\n'))
    out = _predict(twin, program)
    assert out.results[0] == program.world.gva["a"] + 12
    assert out.results[2] & 0xFFFF_FFFF == tag(program.world.spa["b"] + 8) & 0xFFFF_FFFF


def test_an_fs_of_legacy_mode_with_a_limit_is_not_modelled(twin: Twin, compiler: Compiler) -> None:
    program = compiler.compile(one('vmcb = "fs.limit"\nvalue = 0xfff', run("outsfs a"), head='guest = "32-bit"\n'))
    with pytest.raises(UsageError, match="FS"):
        _predict(twin, program)


@pytest.mark.parametrize(("control", "probes", "kept", "shared"), [
    (0x5, "rdcr8", 5, 6), (0x5, "wrcr8 = 0x9", 9, 9), (0x100_0005, "rdcr8", 5, 5)])
def test_v_tpr_is_l1s_cr8(control: int, probes: str, kept: int, shared: int, twin: Twin, compiler: Compiler) -> None:
    """By the quirk, and only without V_INTR_MASKING: what L2 wrote it has written to both."""
    program = compiler.compile(one('host = "cr8"\nvalue = 0x6', f'vmcb = "v_intr"\nvalue = {control}', run(probes)))
    _predict(twin, program)
    assert twin.vmcb["v_intr"] == control & ~0xF | kept
    _predict(twin, program, [V_TPR_OVERWRITTEN])
    assert twin.vmcb["v_intr"] == control & ~0xF | shared


@pytest.mark.parametrize(("between", "kept"), [
    ("", False), ('entry = "guest.b.pte"\nset = ["pwt"]', True), ('vmcb = "cpl"\nvalue = 3', True)])
def test_v_irq_is_kept_where_a_delivery_may_lack_something(between: str, kept: bool, twin: Twin,
                                                           compiler: Compiler) -> None:
    """By the quirk, and only for the first delivery since anything was changed that it may touch."""
    pending = 'vmcb = "v_intr"\nvalue = 0x12010f0100', 'vmcb = "rflags"\nvalue = 0x202'
    program = compiler.compile(one(*pending, run("read a"), *pending, *filter(None, [between]), run("read a")))
    seen = SimpleNamespace(control=(VIntr.IRQ << 0x60 * 8).to_bytes(0x100, "little"))
    twin.reset(program.world)
    found = []
    for step in program.steps:
        if step.code != "RUN":
            twin.apply(step)
            continue
        twin.begin(step)
        before = bytes(twin.memory.bytes[step.a : step.a + PAGE])
        out = twin.predict(step, 0)
        assert not twin.vmcb["v_intr"] & VIntr.IRQ
        again = twin.predict_again(out, before, step, Active([V_IRQ_KEPT]), seen=seen)  # type: ignore[arg-type]
        found.append(bool(twin.vmcb["v_intr"] & VIntr.IRQ))
        assert again.exitcode in (0x78, 0x4D)
    assert found == [True, kept]


def test_where_a_fault_is_told_makes_no_access(twin: Twin, compiler: Compiler) -> None:
    """The first half of a string write is known by the accesses before the fault, whatever was seen of it."""
    cleared, probes = 'entry = "nested.b.pte"\nclear = ["p"]', "out4 0xcf8 = 0x11223344; ins a+0xffe"
    program = compiler.compile(one(cleared, run(probes)))
    a = program.world.spa["a"] + 0xFF8
    twin.reset(program.world)
    for step in program.steps:
        if step.code == "RUN":
            break
        twin.apply(step)
    before, out = bytes(twin.memory.bytes[step.a : step.a + PAGE]), twin.predict(step, 0)
    seen = SimpleNamespace(exitcode=ExitCode.NPF, next_probe=1, fault_code=0, fault_address=0)
    twin.predict_again(out, before, step, Active([STRING_WRITE_HALVES]), seen=seen)  # type: ignore[arg-type]
    assert twin.memory.read(a, 8) == tag(a) & (1 << 48) - 1 | 0x3344 << 48
