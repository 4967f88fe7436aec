"""Scenarios into programs: what each op becomes, and what makes no sense on this CPU or in this world."""

from __future__ import annotations

import re

import pytest

from harness.errors import UsageError
from harness.model.registers import Cpu
from harness.model.vmcb import FIELDS
from harness.scenario import ops
from harness.scenario.initial import HOST_CR4, HOST_EFER
from harness.scenario.program import Compiler, Program
from harness.wire.channel import MAX_CHUNK
from harness.wire.image import Image
from harness.wire.layout import MAX_PROBES, OP, OPS
from harness.wire.program import Step
from tests.scenario.texts import one, run


def steps(program: Program, code: str) -> list[Step]:
    return [s for s in program.steps if s.code == code]


def field(program: Program, step: Step) -> str:
    names = {program.world.vmcb_address + f.offset: n for n, f in FIELDS.items()}
    return names.get(step.a, "")


def test_shape(compiler: Compiler) -> None:
    program = compiler.compile(one("read a"))
    assert program.steps[-1].code == "SYNC" and len(steps(program, "RUN")) == 1
    assert len(program.encoded) % OP.size == 0
    assert OP.packer.unpack_from(program.encoded)[0] == OPS["RESET"]
    assert program.encoded.startswith(program.prologue)
    assert len(program.encoded) // 32 <= MAX_CHUNK


def test_entry(compiler: Compiler) -> None:
    program = compiler.compile(one(
        'entry = "nested.a.pte"\nclear = ["rw"]\nset = ["nx", "bit62"]', 'entry = "nested.a.pte"\nset = ["rw"]',
        'entry = "guest.b.pte"\nframe = "c"', 'entry = "nested.b.pte"\nframe = "c"',
        'entry = "guest.a.pte"\nvalue = 0'))
    world = program.world
    first = world.words[world.entries["nested.a.pte"]]
    writes = [(s.a, s.b, s.arg, s.origin) for s in steps(program, "WRITE")]
    assert writes[0] == (world.entries["nested.a.pte"], (first | 1 << 63 | 1 << 62) & ~2, 8, 0)
    assert writes[1] == (world.entries["nested.a.pte"], first | 1 << 63 | 1 << 62, 8, 1)  # on what was written before
    assert writes[2] == (world.entries["guest.b.pte"], world.gpa["c"] | 7, 8, 2)
    assert writes[3] == (world.entries["nested.b.pte"], world.spa["c"] | 7, 8, 3)
    assert writes[4] == (world.entries["guest.a.pte"], 0, 8, 4)


def test_the_address_of_a_page(compiler: Compiler) -> None:
    """A VMCB field may take the gVA of a page, and bits beside it."""
    program = compiler.compile(one('vmcb = "gdtr.base"\npage = "b"', 'vmcb = "rsp"\npage = "a"\nset = ["bit4"]',
                                   "read a"))
    base, rsp = (program.world.vmcb_address + FIELDS[name].offset for name in ("gdtr.base", "rsp"))
    written = {step.a: step.b for step in program.steps if step.code == "WRITE"}
    assert written[base] == program.world.gva["b"] and written[rsp] == program.world.gva["a"] | 0x10
    with pytest.raises(UsageError, match="no page is called 'z'"):
        compiler.compile(one('vmcb = "rsp"\npage = "z"', "read a"))


def test_vmcb_and_host(compiler: Compiler) -> None:
    program = compiler.compile(one('vmcb = "cr4"\nset = ["smep"]', 'vmcb = "asid"\nvalue = 9',
                                   'vmcb = "cr4"\nclear = ["pge"]',
                                   'host = "efer"\nclear = ["nxe"]', 'host = "cr4"\nset = ["smap", "smep"]'))
    writes = {(field(program, s), s.b, s.arg) for s in steps(program, "WRITE")}
    cr4 = program.world.vmcb["cr4"]
    assert writes == {("cr4", cr4 | 1 << 20, 8), ("asid", 9, 4), ("cr4", (cr4 | 1 << 20) & ~(1 << 7), 8)}
    assert [(s.arg, s.b) for s in steps(program, "HOST")] == [(2, HOST_EFER & ~(1 << 11)), (1, HOST_CR4 | 3 << 20)]


def test_cpl(compiler: Compiler) -> None:
    """CPL 3: the CPL, the segments' DPL and RPL, and L2's code and mailbox of that side; back again for 2."""
    program = compiler.compile(one(run("read a", 3), run("read a", 2)))
    user, supervisor = steps(program, "RUN")
    world, entry = program.world, compiler.image.stubs["long"].labels["entry"]
    assert (user.b, user.c) == (world.code[1] + entry, world.mailbox[1])
    assert (supervisor.b, supervisor.c) == (world.code[0] + entry, world.mailbox[0])
    split = program.steps.index(user)
    up = {field(program, s): s.b for s in program.steps[:split]}
    down = {field(program, s): s.b for s in program.steps[split:] if s.code == "WRITE"}
    assert up["cpl"] == 3 and down["cpl"] == 2
    for segment in ("cs", "ss"):
        assert up[f"{segment}.attrib"] >> 5 & 3 == 3 and down[f"{segment}.attrib"] >> 5 & 3 == 2
        assert up[f"{segment}.selector"] & 3 == 3 and down[f"{segment}.selector"] & 3 == 2


def test_probes(compiler: Compiler) -> None:
    program = compiler.compile(one("read a; write2 b+0x10 = 0xBEEF; fetch 0xFFFF_8000_0000_0000+8; write c; rmw d; "
                                   "rdcr2; "
                                   "write guest.a.pte = &guest.a.pte-rw+nx; read a+0xFFFF_FFFF_FFFF_FFFF"))
    world = program.world
    (step,) = steps(program, "RUN")
    assert step.probes[0] == ("read", 8, world.gva["a"], 0)
    assert step.probes[1] == ("write", 2, world.gva["b"] + 0x10, 0xBEEF)
    assert step.probes[2] == ("fetch", 8, 0xFFFF_8000_0000_0008, 0)
    assert step.probes[3].value != step.probes[4].value != 0  # each write has a value of its own
    assert step.probes[5] == ("rdcr2", 8, 0, 0)
    entry = world.words[world.entries["guest.a.pte"]]
    assert step.probes[6] == ("write", 8, world.entry_gva["guest.a.pte"], entry & ~2 | 1 << 63)
    assert step.probes[7].address == world.gva["a"] - 1  # around the end of the address space
    assert step.arg == 8 and step.slots == 9


def test_most_probes(compiler: Compiler) -> None:
    program = compiler.compile(one("; ".join(["read a"] * MAX_PROBES)))
    assert steps(program, "RUN")[0].arg == MAX_PROBES


LINE = 5


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ('entry = "nested.e.pte"\nset = ["p"]', "no entry is called 'nested.e.pte'; there are .*nested.a.pte"),
        ('entry = "guest.a.pde5"\nset = ["p"]', "no entry is called"),
        ('entry = "nested.a.pte"\nset = ["zap"]', "no bit is called 'zap'; there are p, rw, us"),
        ('entry = "nested.a.pte"\nclear = ["bit64"]', "no bit is called 'bit64'"),
        ('entry = "nested.a.pte"\nframe = "z"', "no page is called 'z'"),
        ('vmcb = "colour"\nvalue = 1', "no VMCB field is called 'colour'"),
        ('vmcb = "cr0"\nset = ["zap"]', "no bit is called 'zap'; there are .*pe, mp"),
        ('vmcb = "asid"\nvalue = 0x1_0000_0000', "does not fit in asid, which has 32 bits"),
        ('vmcb = "cpl"\nvalue = 256', "does not fit in cpl, which has 8 bits"),
        ('vmcb = "cs.attrib"\nset = ["bit16"]', "does not fit in cs.attrib"),
        ('host = "cr3"\nvalue = 0', "no register of L1 is called 'cr3'; there are cr0, cr4, efer"),
        ('host = "efer"\nset = ["zap"]', "no bit is called 'zap'"),
        (run("read e"), "no page or entry of L2 is called 'e'; there are .*a, b, c, d"),
        (run("read nested.a.pte"), "no page or entry of L2 is called 'nested.a.pte'"),
        (run("write a = &guest.z.pte"), "no entry is called 'guest.z.pte'"),
        (run("write a = &guest.a.pte+zap"), "no bit is called 'zap'"),
        (run("; ".join(["read a"] * 33)), "a run may have 32 probes, this has 33"),
        (run("rdmsr nowhere"), "nowhere"),
    ],
)
def test_makes_no_sense(op: str, reason: str, compiler: Compiler) -> None:
    """UsageError with file and line of the op: the second one here."""
    scenario = one("read a", op)
    with pytest.raises(UsageError, match=reason) as caught:
        compiler.compile(scenario)
    assert re.match(rf"test\.toml:{scenario.lines[1]}: ", str(caught.value))


@pytest.mark.parametrize(("size", "entry"), [("2M", "pte"), ("1G", "pde")])
def test_entries_below_a_large_page_do_not_exist(size: str, entry: str, compiler: Compiler) -> None:
    for dimension in ("guest", "nested"):
        scenario = one(f'entry = "{dimension}.a.{entry}"\nset = ["p"]', head=f'{dimension}_page = "{size}"\n')
        with pytest.raises(UsageError, match="no entry is called"):
            compiler.compile(scenario)


def test_too_long(compiler: Compiler) -> None:
    scenario = one(*[run("; ".join(["read a"] * 32))] * (MAX_CHUNK // 33 + 1))
    with pytest.raises(UsageError, match=r"test\.toml.*too long"):
        compiler.compile(scenario)


def test_without_1g_pages(image: Image) -> None:
    """What the CPU lacks is seen when the program runs: PS is reserved there. It compiles."""
    compiler = Compiler(image, Cpu(40, page1g=False))
    assert compiler.compile(one("read a", head='nested_page = "1G"\n')).world.entries["nested.a.pdpte"]


def test_worlds_are_made_once(compiler: Compiler) -> None:
    assert compiler.compile(one("read a")).world is compiler.compile(one("read b")).world
    large = compiler.compile(one("read a", head='guest_page = "2M"\n'))
    assert large.world is not compiler.compile(one("read b")).world


def test_a_scenario_leaves_the_world_alone(compiler: Compiler) -> None:
    before = dict(compiler.compile(one("read a")).world.words)
    compiler.compile(one('entry = "guest.a.pte"\nvalue = 0', 'vmcb = "asid"\nvalue = 3'))
    world = compiler.compile(one("read a")).world
    assert world.words == before and world.vmcb["asid"] == 5


def test_values_tell_probes_apart(compiler: Compiler) -> None:
    """A default value is unlike any tag, and unlike that of any other probe."""
    program = compiler.compile(one("write a; write b", run("write a; rmw b")))
    values = [p.value for s in steps(program, "RUN") for p in s.probes]
    assert len(set(values)) == 4 and all(v >> 56 == 0x77 for v in values)


def test_change_names_a_bit_of_the_field(compiler: Compiler) -> None:
    assert ops.Change(None, ("wp",)).apply(0, {"wp": 1 << 16}) == 1 << 16
    program = compiler.compile(one('vmcb = "rflags"\nset = ["ac"]'))
    assert steps(program, "WRITE")[0].b == program.world.vmcb["rflags"] | 1 << 18
