"""The program on the model: predictions, and the rehearsal that keeps nonsense from a machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import UsageError
from harness.lockstep import stub
from harness.lockstep.active import Active
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import (
    CR0_CD_CLEARED,
    EMULATED_BELOW,
    FIRST_EVENT_KEPT,
    SOFTWARE_EVENT_LOST,
    SOFTWARE_EVENT_RIP,
)
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.model.access import NestedPageFault, PageFault, Reached
from harness.model.intercepts import INTERCEPTS
from harness.model.liberties import Liberties, Takes
from harness.model.registers import RFLAGS, Cpu
from harness.model.vmcb import ExitCode
from harness.scenario import files
from harness.scenario.initial import HOST_EFER
from harness.scenario.program import Compiler, Program
from harness.wire.image import PAGE, Image, tag
from tests.conftest import LIBRARY
from tests.scenario.texts import one, run


def predictions(twin: Twin, program: Program) -> list[Prediction]:
    """Each VMRUN of a program, on the model alone."""
    twin.reset(program.world)
    out = []
    for step in program.steps:
        if step.code != "RUN":
            twin.apply(step)
            continue
        first, begun = 0, twin.begin(step)
        while True:
            out.append(twin.predict(step, first))
            if out[-1].refused or out[-1].exitcode == ExitCode.VMMCALL or out[-1].next_probe + 1 >= len(step.probes):
                break
            first = out[-1].next_probe + 1
            twin.resume(begun)
    return out


@pytest.fixture
def predict(twin: Twin, compiler: Compiler):  # type: ignore[no-untyped-def]
    return lambda *ops, **kw: (predictions(twin, p := compiler.compile(one(*ops, **kw))), p.world)


class TestPredictions:
    def test_values(self, predict, twin: Twin) -> None:  # type: ignore[no-untyped-def]
        (out,), world = predict("read a; read4 b+4; read2 c+2; read1 d; fetch a+8")
        assert out.exitcode == ExitCode.VMMCALL and out.next_probe == 5
        assert out.results[0] == tag(world.spa["a"])
        assert out.results[1] == tag(world.spa["b"]) >> 32
        assert out.results[2] & 0xFFFF == tag(world.spa["c"]) >> 16 & 0xFFFF
        assert out.results[3] & 0xFF == 0xB8
        assert out.results[4] == world.spa["a"] + 8 >> 3

    def test_writes(self, predict, twin: Twin) -> None:  # type: ignore[no-untyped-def]
        (out,), world = predict("write4 a+4 = 0x11223344; rmw a = 0x10; read a; write2 b+7 = 0xBEEF; read b; read b+8")
        first = tag(world.spa["a"]) & 0xFFFF_FFFF | 0x1122_3344 << 32
        assert out.results[1] == first and out.results[2] == first + 0x10  # rmw returns what was there
        assert twin.memory.read(world.spa["b"] + 7, 2) == 0xBEEF
        assert out.results[4] >> 56 == 0xEF and out.results[5] & 0xFF == 0xBE
        assert out.old[world.spa["a"]] == tag(world.spa["a"])

    def test_a_fault_ends_one_vmrun_and_the_next_goes_on(self, predict) -> None:  # type: ignore[no-untyped-def]
        outs, world = predict('entry = "nested.b.pte"\nclear = ["rw"]', "read a; write b; read b; write b+8; read c")
        assert [(o.first_probe, o.next_probe, o.exitcode) for o in outs] == [
            (0, 1, 0x400), (2, 3, 0x400), (4, 5, ExitCode.VMMCALL)]
        assert outs[0].walks[1].outcome == NestedPageFault(0x1_0000_0007, world.gpa["b"])
        assert isinstance(outs[1].walks[2].outcome, Reached)
        assert outs[1].walks[3].outcome == NestedPageFault(0x1_0000_0007, world.gpa["b"] + 8)

    def test_page_fault(self, predict, twin: Twin) -> None:  # type: ignore[no-untyped-def]
        (out,), world = predict('entry = "guest.b.pte"\nclear = ["us"]', run("read b+0x123", 3))
        assert out.exitcode == 0x4E and out.walks[0].outcome == PageFault(5, world.gva["b"] + 0x123)
        assert (twin.vmcb["exitinfo1"], twin.vmcb["exitinfo2"]) == (5, world.gva["b"] + 0x123)
        assert twin.vmcb["cr2"] == world.vmcb["cr2"]  # 15.12.15

    def test_general_protection(self, predict) -> None:  # type: ignore[no-untyped-def]
        (out,), _ = predict("read 0x0000_8000_0000_0000")
        assert out.exitcode == 0x4D and out.free["exitinfo2"]

    def test_privileged_registers(self, predict) -> None:  # type: ignore[no-untyped-def]
        outs, _ = predict(run("rdcr2; rdflags; wrcr2 = 5", 3))
        assert [(o.exitcode, o.next_probe) for o in outs] == [(0x4D, 0), (0x4D, 2)]

    def test_registers(self, predict, twin: Twin) -> None:  # type: ignore[no-untyped-def]
        (out,), world = predict(
            "rdcr2; wrcr2 = 0x1234; rdcr2; rdmsr 0xc0000082; wrmsr 0xc0000082 = 7; rdmsr 0xc0000082; rdrsp")
        assert out.results[0] == world.vmcb["cr2"] and out.results[2] == 0x1234
        assert out.results[3] == world.vmcb["lstar"] and out.results[5] == 7
        assert out.results[6] == world.vmcb["rsp"] and twin.vmcb["cr2"] == 0x1234

    def test_refused(self, predict, twin: Twin) -> None:  # type: ignore[no-untyped-def]
        (out,), _ = predict('vmcb = "asid"\nvalue = 0', "read a")
        assert (out.refused, out.rule, out.exitcode) == ("vmrun.asid", "vmrun.asid", ExitCode.INVALID)
        assert out.results == {} and out.old == {} and out.walks == {}
        assert twin.vmcb["exitcode"] == ExitCode.INVALID

    def test_registers_that_pass_through(self, predict) -> None:  # type: ignore[no-untyped-def]
        (out,), world = predict("read a; read b")
        assert out.regs["rbp"] == 2 and out.regs["rsi"] == world.mailbox[0] and out.regs["r15"] == 0x1515151515151515

    def test_host(self, predict) -> None:  # type: ignore[no-untyped-def]
        (out,), world = predict('host = "efer"\nclear = ["nxe"]', "read a")
        assert out.host["efer"] == HOST_EFER & ~(1 << 11) and out.host["rax"] == world.vmcb_address

    def test_nrip_needs_the_cpu(self, image: Image, predict) -> None:  # type: ignore[no-untyped-def]
        cpu = Cpu(40, features=frozenset({"nrips", "nx"}))
        twin = Twin(image, cpu, Liberties())
        (out,) = predictions(twin, Compiler(image, cpu).compile(one("read a")))
        rip = twin.vmcb["rip"]
        assert twin.vmcb["nrip"] == rip + 3 and rip & 0xFFF == image.stubs["long"].labels["end"]
        predictions(twin, Compiler(image, cpu).compile(one('entry = "guest.a.pte"\nclear = ["p"]', "read a")))
        assert twin.vmcb["nrip"] == 0  # 15.7.1: 0 for all but instruction intercepts
        assert out.exitcode == ExitCode.VMMCALL

    def test_liberties(self, image: Image, cpu: Cpu, compiler: Compiler) -> None:
        program = compiler.compile(one('entry = "nested.a.pte"\nclear = ["p"]', "write a"))
        entry = program.world.entries["guest.a.pte"]
        seen = {}
        for takes in Takes:
            twin = Twin(image, cpu, Liberties.each(takes))
            (out,) = predictions(twin, program)
            seen[takes] = (twin.memory.words[entry >> 3] & 0x60, out.permitted.get(entry, 0))
        assert seen == {Takes.ALWAYS: (0x60, 0), Takes.SOMETIMES: (0, 0x60), Takes.NEVER: (0, 0)}

    def test_reset_leaves_nothing(self, twin: Twin, compiler: Compiler) -> None:
        program = compiler.compile(one("read a"))
        twin.reset(program.world)
        image = twin.image
        def state() -> tuple[bytes, bytes]:
            return bytes(twin.memory.bytes[image.arena.start : image.arena.end]), bytes(
                twin.memory.bytes[image.data.start : image.data.end])
        clean = state()
        predictions(twin, compiler.compile(one(
            'entry = "guest.a.pte"\nvalue = 7', 'host = "efer"\nclear = ["nxe"]', "write b; rmw c+0xFF8; fetch d",
            head='nested_page = "2M"\nguest_page = "2M"\n'.replace('guest_page = "2M"', 'guest_page = "4K"'))))
        assert state() != clean
        twin.reset(program.world)
        assert state() == clean and twin.host.efer == HOST_EFER


class TestRehearsal:
    def test_counts(self, twin: Twin, compiler: Compiler) -> None:
        ops = ('entry = "nested.b.pte"\nclear = ["rw"]', "read a; write b; read b")
        assert rehearse(twin, compiler.compile(one(*ops))) == 2

    @pytest.mark.parametrize(
        ("ops", "reason"),
        [
            (('entry = "nested.mailbox.pte"\nclear = ["p"]', "read a"), "L2 cannot use its own mailbox"),
            (("fetch a+1",), "no code that returns"),
            (("write a", "fetch a"), "no code that returns"),
            (('entry = "nested.a.pde"\nvalue = 0x7F_FFFF_F007', "read a"), "leaves L1's memory"),
            (('entry = "nested.a.pte"\nvalue = 0x1007', "read a"), "no page of tables or data"),
            (('vmcb = "asid"\nvalue = 0', "read a", "read b"), "a VMRUN follows one that is refused"),
            ((run("wrcr3 = 0"),), "leaves L2 without its own pages: #NPF"),
        ],
    )
    def test_nonsense(self, ops: tuple[str, ...], reason: str, twin: Twin, compiler: Compiler) -> None:
        with pytest.raises(UsageError, match=reason) as caught:
            rehearse(twin, compiler.compile(one(*ops)))
        assert str(caught.value).startswith("test.toml:")

    @pytest.mark.parametrize(
        ("probes", "expect", "good"),
        [
            ("read a; write a", ["ok", "#NPF 0x100000007"], True),
            ("read a; write a", ["ok", "ok"], False),
            ("read a; write a", ["ok", "#NPF 0x100000006"], False),
            ("read a; write a", ["ok", "#PF 0x7"], False),
            ("read 0x800000000000", ["#GP 0x0"], True),
            ("read 0x800000000000", ["#GP 0x1"], False),
            ("read a", ["anything"], False),
        ],
    )
    def test_expectations(self, probes: str, expect: list[str], good: bool, twin: Twin, compiler: Compiler) -> None:
        lines = f"{run(probes)}\nexpect = {expect!r}".replace("'", '"')
        scenario = one('entry = "nested.a.pte"\nclear = ["rw"]', lines)
        program = compiler.compile(scenario)
        if good:
            rehearse(twin, program)
        else:
            with pytest.raises(UsageError, match=rf"test\.toml:{scenario.lines[1]}: the scenario expects"):
                rehearse(twin, program)

    def test_expectation_of_a_refusal(self, twin: Twin, compiler: Compiler) -> None:
        good = one('vmcb = "asid"\nvalue = 0', 'run = ["read a"]\nexpect = ["INVALID"]')
        assert rehearse(twin, compiler.compile(good)) == 1
        with pytest.raises(UsageError, match="INVALID"):
            rehearse(twin, compiler.compile(one('vmcb = "asid"\nvalue = 0', 'run = ["read a"]\nexpect = ["ok"]')))
        with pytest.raises(UsageError, match="not reached"):
            rehearse(twin, compiler.compile(
                one('vmcb = "asid"\nvalue = 0', 'run = ["read a", "read b"]\nexpect = ["INVALID", "ok"]')))


@pytest.mark.parametrize(
    ("probe", "cpl", "free"), [("read a", 0, 4), ("write a", 0, 4), ("fetch a", 0, 0), ("read a", 3, 0)]
)
def test_u_of_a_supervisors_data_under_gmet(probe: str, cpl: int, free: int, image: Image) -> None:
    """15.25.6 has every access a user's unless a feature overrides that; 15.25.13 does not say that this one does."""
    cpu = Cpu(40, True, 16, frozenset({"nx", "gmet"}))
    program = Compiler(image, cpu).compile(one(
        'vmcb = "np_control"\nset = ["bit3"]', 'entry = "nested.a.pte"\nclear = ["p"]',
        f'entry = "nested.code.pte"\n{"clear" if not cpl else "set"} = ["us"]', run(probe, cpl)))
    (out,) = predictions(Twin(image, cpu, Liberties()), program)
    assert out.exitcode == 0x400 and out.free.get("exitinfo1", 0) == free


def test_a_write_in_pae_mode_that_a_hypervisor_below_emulates(twin: Twin, compiler: Compiler) -> None:
    """By the quirk it ends in #PF of L2's own code, if that is what was seen; which writes do cannot be predicted."""
    program = compiler.compile(one(run("write a; write b+8"), head='guest = "PAE"\n'))
    twin.reset(program.world)
    for step in program.steps:
        if step.code == "RUN":
            break
        twin.apply(step)
    before = bytes(twin.memory.bytes[step.a : step.a + PAGE])
    out = twin.predict(step, 0)
    assert out.exitcode == ExitCode.VMMCALL
    for code, next_probe, ends in ((0x4E, 1, True), (0x4E, 2, False), (ExitCode.NPF, 1, False)):
        seen: Any = SimpleNamespace(exitcode=code, next_probe=next_probe)
        out = twin.predict_again(out, before, step, Active([EMULATED_BELOW]), seen)
        assert (out.exitcode, out.next_probe) == ((0x4E, 1) if ends else (ExitCode.VMMCALL, 2))
        assert (twin.vmcb["exitinfo1"], twin.vmcb["exitinfo2"]) == (0x10, twin.vmcb["rip"]) or not ends


@pytest.mark.parametrize(
    ("event", "gp", "code", "field", "free"),
    [
        (0x80000310, "set", 0x4D, "exitinfo1", 1),  # #MF finds no gate, and L1 intercepts the #GP
        (0x80000310, "clear", 0x400, "exitintinfo", 1 << 32),  # it does not, and L2 has no stack for it
        (0x80000010, "set", 0x4D, "exitinfo1", 0),
        (0x80000010, "clear", 0x400, "exitintinfo", 0),
    ],
)
def test_ext_behind_an_exception(  # type: ignore[no-untyped-def]
    predict, event: int, gp: str, code: int, field: str, free: int
) -> None:
    """8.4: EXT is for a source external to the processor: an interrupt is one, of an exception that is not said."""
    (out, *_), _ = predict(
        'vmcb = "idtr.limit"\nvalue = 0xdf', f'vmcb = "intercept_exceptions"\n{gp} = ["gp"]',
        'entry = "nested.stack.pte"\nclear = ["p"]', f'vmcb = "eventinj"\nvalue = {event}', "read a")
    assert out.exitcode == code and out.free.get(field, 0) == free


@pytest.mark.parametrize(
    ("before", "cpl", "value", "after"),
    [
        (0x2, 3, 0x3202, 0x2), (0x202, 3, 0x2, 0x202), (0x3002, 3, 0x202, 0x3202), (0x3202, 3, 0x2, 0x3002),
        (0x2, 3, 0x40AD7, 0x408D7), (0x2, 0, 0x3202, 0x3202), (0x10002, 0, 0x2, 0x2),
    ],
)
def test_popf(predict, before: int, cpl: int, value: int, after: int) -> None:  # type: ignore[no-untyped-def]
    """Volume 3, POPF: IOPL is CPL 0's, IF of whom IOPL lets in; RF is cleared."""
    (out,), _ = predict(f'vmcb = "rflags"\nvalue = {before}', run(f"wrflags = {value}; rdflags", cpl))
    assert out.exitcode == ExitCode.VMMCALL
    assert out.results[1] == after & ~RFLAGS.STATUS | stub.FLAGS


@pytest.mark.parametrize("kind", ["monitor", "mwait"])
def test_monitor_is_undefined_but_at_cpl_0(predict, kind: str) -> None:  # type: ignore[no-untyped-def]
    asked = 'vmcb = "intercept_misc2"\nset = ["bit10", "bit11"]'
    (user, *_), _ = predict(asked, run(kind, 3))
    (own, *_), _ = predict(asked, run(kind))
    assert (user.exitcode, own.exitcode) == (ExitCode.EXCEPTION + 6, INTERCEPTS[kind].exitcode)


def test_umip_keeps_them_for_cpl_0(predict) -> None:  # type: ignore[no-untyped-def]
    umip = 'vmcb = "cr4"\nset = ["umip"]'
    outs, _ = predict(umip, run("rdgdtr; smsw; rdtr", 3))
    assert [one.exitcode for one in outs] == [ExitCode.EXCEPTION + 13] * 3
    (out,), _ = predict(umip, run("rdgdtr; smsw; rdtr"))
    assert out.exitcode == ExitCode.VMMCALL


def test_cr8_lets_a_virtual_interrupt_in(twin: Twin, compiler: Compiler) -> None:
    with pytest.raises(UsageError, match="L2 lets in itself"):
        rehearse(twin, compiler.compile(one(
            'vmcb = "v_intr"\nvalue = 0x1f01060107', 'vmcb = "rflags"\nvalue = 0x202', run("wrcr8 = 5"))))


@pytest.mark.parametrize("guest", ["PAE", "32-bit", "off"])
@pytest.mark.parametrize(("limit", "code"), [(0x1E, ExitCode.EXCEPTION + 13), (0x1F, ExitCode.HLT)])
def test_gates_in_legacy_mode(predict, guest: str, limit: int, code: int) -> None:  # type: ignore[no-untyped-def]
    (out, *_), _ = predict(f'vmcb = "idtr.limit"\nvalue = {limit}', 'vmcb = "intercept_exceptions"\nclear = ["bit3"]',
                           "breakpoint", head=f'guest = "{guest}"\n')
    assert out.exitcode == code
    assert int.from_bytes(out.control[0x78:0x80], "little") == (0x1A if limit == 0x1E else 0)


@pytest.mark.parametrize(("quirk", "told"), [((), 0x6A_8000_0B0D), ((FIRST_EVENT_KEPT,), 0x8000_040D)])
def test_which_of_two_events_is_told(
    twin: Twin, compiler: Compiler, quirk: tuple[str, ...], told: int
) -> None:
    """15.7.2: the one that is in delivery, which is the second."""
    twin.quirks = Active(quirk)
    (scenario,) = files.load([LIBRARY], lambda name: name == "events/second-cut[nested,tss]")
    (out,) = predictions(twin, compiler.compile(scenario))
    assert twin.vmcb["exitintinfo"] & ~out.free.get("exitintinfo", 0) == told and out.exitcode == 0x400


def test_an_event_without_an_error_code_has_any(predict) -> None:  # type: ignore[no-untyped-def]
    """15.20: with EV=0 the upper half means nothing."""
    cut = 'entry = "nested.idt.pte"\nclear = ["p"]'
    (out, *_), _ = predict('vmcb = "eventinj"\nvalue = 0x80000306', cut, "read a")
    (coded, *_), _ = predict('vmcb = "eventinj"\nvalue = 0x1880000b0d', cut, "read a")
    assert (out.free["exitintinfo"], coded.free.get("exitintinfo", 0)) == (0xFFFF_FFFF << 32, 0)


@pytest.mark.parametrize(("quirks", "behind"), [((), False), ((SOFTWARE_EVENT_RIP,), True),
                                                ((SOFTWARE_EVENT_LOST, SOFTWARE_EVENT_RIP), True)])
def test_an_injected_software_event_returns_to_rip(
    quirks: tuple[str, ...], behind: bool, twin: Twin, compiler: Compiler
) -> None:
    """By the quirk behind the instruction there; what steps over any instruction loses no event."""
    twin.quirks = Active(quirks)
    program = compiler.compile(one('vmcb = "eventinj"\nvalue = 0x80000403', "read a"))
    (out, *_) = predictions(twin, program)
    twin.quirks = Active()
    (step,) = (step for step in program.steps if step.code == "RUN")
    at = (step.b & ~0xFFF) + twin.stub.labels["next_entry"] if behind else step.b
    assert out.exitcode == ExitCode.HLT and at in [twin.memory.words[address >> 3] for address in out.old]


@pytest.mark.parametrize(("quirks", "cr0"), [((), 0xC005_0031), ((CR0_CD_CLEARED,), 0x8005_0031)])
def test_l2_runs_with_cd_clear(quirks: tuple[str, ...], cr0: int, twin: Twin, compiler: Compiler) -> None:
    twin.quirks = Active(quirks)
    (out, *_) = predictions(twin, compiler.compile(one('vmcb = "cr0"\nvalue = 0xc0050031', "rdcr0; read a")))
    twin.quirks = Active()
    assert (out.results[0], twin.vmcb["cr0"]) == (cr0, cr0)
