"""Every kind of field, doctored in a record: the check and the field that must be named, and no other."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import pytest

from harness.lockstep.compare import DEAR, Divergence
from harness.lockstep.prediction import Prediction
from harness.lockstep.twin import Twin
from harness.model.registers import Cpu
from harness.model.vmcb import CONTROL, FIELDS, STATE
from harness.scenario.program import Compiler
from harness.wire.image import Image
from harness.wire.layout import CONTROL_BYTES, HOST, RECORD, RECORDS, REGS, VMLOADED
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake
from tests.scenario.texts import one, run

_AT: Final = RECORD.offsets
Check = Callable[..., list[Divergence]]


class Doctor(Plant):
    """Changes bytes of the `number`th record of `kind`."""

    def __init__(self, kind: str, offset: int, mask: bytes, number: int = 0) -> None:
        self.kind, self.offset, self.mask, self.left = RECORDS[kind], offset, mask, number

    def record(self, fake: FakeMachine, data: bytearray) -> None:
        if data[0] == self.kind:
            if not self.left:
                for index, byte in enumerate(self.mask):
                    data[self.offset + index] ^= byte
            self.left -= 1


@pytest.fixture
def check(image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> Check:
    """Run ops on a machine with a plant in it."""

    def inner(plant: Plant, *ops: str, strict: bool = True) -> list[Divergence]:
        (result,) = run_on_fake(image, cpu, twin, [compiler.compile(one(*ops))], plant, strict)
        assert result.lost is None
        return result.divergences

    return inner


def only(found: list[Divergence]) -> Divergence:
    assert len(found) == 1, found
    return found[0]


def place(name: str) -> int:
    """Of a VMCB field in a record."""
    offset = FIELDS[name].offset
    return _AT["control"] + offset if name in CONTROL else _AT["save"] + offset - 0x400


# at a VMMCALL exit: 15.6 (not defined where no value is named), 15.8.4, and the course itself
UNDEFINED_AT_VMMCALL = {"exitinfo1", "exitinfo2", "fetched_count", "fetched_bytes"}
TESTED_ELSEWHERE = {"exitcode", "eventinj", "exitintinfo"}


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in UNDEFINED_AT_VMMCALL | TESTED_ELSEWHERE])
def test_each_vmcb_field(name: str, check: Check) -> None:
    """After #VMEXIT, byte for byte: C3."""
    width = FIELDS[name].width
    found = only(check(Doctor("EXIT", place(name) + width - 1, b"\x40"), "read a"))
    assert (found.check, found.field, found.op) == ("C3", name, 0)
    assert isinstance(found.expected, int) and isinstance(found.observed, int)
    assert found.expected ^ found.observed == 0x40 << 8 * (width - 1)


@pytest.mark.parametrize("name", sorted(UNDEFINED_AT_VMMCALL))
def test_undefined_fields_are_left_alone(name: str, check: Check) -> None:
    assert check(Doctor("EXIT", place(name), b"\x40"), "read a") == []


@pytest.mark.parametrize("name", ["eventinj", "exitintinfo"])
def test_an_event_is_its_valid_bit(name: str, check: Check) -> None:
    """15.20: with V=0 the rest of an event means nothing."""
    assert check(Doctor("EXIT", place(name), b"\xff\x07"), "read a") == []
    found = only(check(Doctor("EXIT", place(name) + 3, b"\x80"), "read a"))
    assert (found.check, found.field) == ("C3", name)


def test_bytes_in_no_field(check: Check) -> None:
    used = {b for f in STATE.values() for b in range(f.offset, f.offset + f.width)}
    free = next(b for b in range(0x4A0, 0x600) if b not in used)
    found = only(check(Doctor("EXIT", _AT["save"] + free - 0x400, b"\x01"), "read a"))
    assert (found.check, found.field) == ("C3", f"reserved+{free:03X}h")
    found = only(check(Doctor("EXIT", _AT["control"] + 0x20, b"\x01"), "read a"))
    assert found.field == "reserved+020h"


@pytest.mark.parametrize("name", ["asid", "ncr3", "rip", "cr3", "cpl", "intercept_misc2", "g_pat"])
def test_vmcb_before_vmrun(name: str, check: Check) -> None:
    """L1 did to the VMCB what the program says."""
    found = only(check(Doctor("ENTER", place(name), b"\x01"), "read a"))
    assert (found.check, found.field) == ("C3", f"vmcb.{name} before VMRUN")


def test_first_probe(check: Check) -> None:
    found = only(check(Doctor("ENTER", _AT["first_probe"], b"\x03"), "read a"))
    assert (found.check, found.field, found.expected, found.observed) == ("C3", "first probe", 0, 3)


RESTORED = ("rax", "rsp", "rflags", "cr0", "cr3", "cr4", "cr8", "efer", "pat", "dr6", "es", "cs", "ss", "ds",
            "gdt_base", "gdt_limit", "idt_base", "idt_limit")


@pytest.mark.parametrize("name", RESTORED)
def test_each_register_of_l1(name: str, check: Check) -> None:
    """15.6: restored by #VMEXIT (or, DR6 and PAT, not touched by it)."""
    found = only(check(Doctor("EXIT", _AT["after"] + HOST.offsets[name], b"\x10"), "read a"))
    assert (found.check, found.field) == ("C3", f"l1.{name}")


REFUSED = ('vmcb = "asid"\nvalue = 0', "read a")


@pytest.mark.parametrize("name", [name for name in RESTORED if name != "dr6"])  # whether L2's was loaded is open
def test_each_register_of_l1_after_a_refusal(name: str, check: Check) -> None:
    """VMEXIT_INVALID is a #VMEXIT: the host's state is reloaded as by any other (15.5.1, 15.6)."""
    found = only(check(Doctor("EXIT", _AT["after"] + HOST.offsets[name], b"\x10"), *REFUSED))
    assert (found.check, found.field) == ("C3", f"l1.{name}")


def test_every_register_of_l1_is_covered() -> None:
    assert set(RESTORED) | {"dr7", "all_read", "early", "tsc"} == set(HOST.names)


@pytest.mark.parametrize("taken", [1, 2, 0xD04])
def test_what_l1_takes_while_gif_is_0(taken: int, check: Check) -> None:
    """15.17: it holds NMIs and interrupts back until VMRUN, or STGI; exceptions are L1's own instructions'."""
    at = _AT["after"] + HOST.offsets["early"]
    found = only(check(Doctor("EXIT", at, taken.to_bytes(2, "little")), "read a"))
    assert (found.check, found.field, found.observed) == ("C3", "l1.early", taken)



class Sparing(Doctor):
    """L1 reads what is dear at the program's end only, and a register is spoilt."""

    def record(self, fake: FakeMachine, data: bytearray) -> None:
        if data[0] == RECORDS["EXIT"]:
            data[_AT["after"] + HOST.offsets["all_read"]] = 0
        super().record(fake, data)


@pytest.mark.parametrize("name", DEAR)
def test_what_is_not_read_behind_vmrun_is_not_compared_there(name: str, check: Check) -> None:
    assert check(Sparing("EXIT", _AT["after"] + HOST.offsets[name], b"\x10"), "read a") == []


def test_what_is_cheap_to_read_always_is(check: Check) -> None:
    found = only(check(Sparing("EXIT", _AT["after"] + HOST.offsets["cr3"], b"\x10"), "read a"))
    assert found.field == "l1.cr3"


@pytest.mark.parametrize("name", [name for name in DEAR if name != "dr6"])
def test_what_is_dear_is_compared_at_the_end(name: str, check: Check) -> None:
    found = only(check(Sparing("SYNC", _AT["after"] + HOST.offsets[name], b"\x10"), "read a"))
    assert (found.check, found.field, found.rule) == ("C3", f"l1.{name} at the end", "exit.host")


@pytest.mark.parametrize("index", range(len(VMLOADED)))
def test_what_no_vmsave_saved_is_compared_at_the_end(index: int, check: Check) -> None:
    found = only(check(Doctor("SYNC", _AT["results"] + 8 * (len(VMLOADED) + index), b"\x10"), "read a"))
    assert (found.check, found.field) == ("C3", f"{list(VMLOADED)[index]} at the end")


@pytest.mark.parametrize("ops", [("read a",), REFUSED], ids=["exit", "refused"])
def test_breakpoints_of_l1_are_off(ops: tuple[str, ...], check: Check) -> None:
    found = only(check(Doctor("EXIT", _AT["after"] + HOST.offsets["dr7"], b"\x02"), *ops))
    assert (found.check, found.field, found.rule) == ("C3", "l1.dr7", "exit.host-dr7")


@pytest.mark.parametrize("name", ["rsi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"])
def test_each_register_that_passes_through(name: str, check: Check) -> None:
    found = only(check(Doctor("EXIT", _AT["regs"] + REGS.offsets[name], b"\x08"), "read a"))
    assert (found.check, found.field) == ("C3", f"l2.{name}")


class TestProbes:
    @pytest.mark.parametrize("probe", ["read a", "rmw a", "fetch a", "read2 a+6", "read4 a"])
    def test_value(self, probe: str, check: Check) -> None:
        found = only(check(Doctor("EXIT", _AT["results"] + 8, b"\x80"), f"read b; {probe}; read c"))
        assert (found.check, found.field, found.probe, found.op) == ("C1", "value", 1, 0)
        assert found.walk is not None and found.walk.rule == "reached"

    def test_register(self, check: Check) -> None:
        found = only(check(Doctor("EXIT", _AT["results"] + 8, b"\x80"), "read b; rdcr2; read c"))
        assert (found.check, found.field, found.probe) == ("C3", "rdcr2", 1)

    def test_every_bit_of_a_nested_fault(self, check: Check) -> None:
        for bit in (0, 1, 2, 3, 4, 5, 6, 31, 32, 33, 63):
            mask = (1 << bit).to_bytes(8, "little")
            found = only(check(Doctor("EXIT", place("exitinfo1"), mask), 'entry = "nested.b.pte"\nclear = ["p"]',
                               "read a; read b"))
            assert (found.check, found.field, found.probe, found.rule) == ("C1", "exitinfo1", 1, "nested.present")
        for bit in (0, 3, 11, 12, 39, 63):
            mask = (1 << bit).to_bytes(8, "little")
            found = only(check(Doctor("EXIT", place("exitinfo2"), mask), 'entry = "nested.b.pde"\nclear = ["p"]',
                               "read b"))
            assert (found.check, found.field) == ("C1", "exitinfo2")

    def test_every_bit_of_a_page_fault(self, check: Check) -> None:
        ops = ('entry = "guest.b.pde"\nclear = ["rw"]', "read b; write b+0x123")
        for name in ("exitinfo1", "exitinfo2"):
            for bit in (0, 1, 3, 12, 47, 63):
                found = only(check(Doctor("EXIT", place(name), (1 << bit).to_bytes(8, "little")), *ops))
                assert (found.check, found.field, found.probe, found.rule) == ("C1", name, 1, "guest.write")

    def test_cr2_of_an_intercepted_page_fault(self, check: Check) -> None:
        """15.12.15: it is not written."""
        found = only(check(Doctor("EXIT", place("cr2"), b"\x01"), 'entry = "guest.b.pde"\nclear = ["p"]', "read b"))
        assert (found.check, found.field) == ("C3", "cr2")

    def test_another_exit(self, check: Check) -> None:
        found = check(Doctor("EXIT", place("exitcode"), b"\x01"), "read a")
        assert [(d.check, d.field, d.probe) for d in found] == [("C1", "outcome", 1)]
        assert "VMMCALL" in str(found[0].expected)

    def test_left_at_another_probe(self, check: Check) -> None:
        found = check(Doctor("EXIT", _AT["next_probe"], b"\x01"), 'entry = "nested.b.pte"\nclear = ["p"]',
                      "read b; read a")
        assert ("C1", "outcome", 0) in [(d.check, d.field, d.probe) for d in found]


class TestRefusal:
    def test_not_refused(self, check: Check) -> None:
        class Obliging(Plant):
            def predict(self, fake: FakeMachine, step: object, first: int) -> Prediction:
                fake.twin.vmcb["asid"] = 1
                out = super().predict(fake, step, first)  # type: ignore[arg-type]
                fake.twin.vmcb["asid"] = 0
                return out

        found = check(Obliging(), *REFUSED)
        outcome = next(d for d in found if d.field == "outcome")
        assert (outcome.check, outcome.expected, outcome.rule) == ("C3", "VMEXIT_INVALID", "vmrun.asid")

    def test_wrongly_refused(self, check: Check) -> None:
        class Picky(Plant):
            def predict(self, fake: FakeMachine, step: object, first: int) -> Prediction:
                vmcb = fake.twin.vmcb
                asid, vmcb["asid"] = vmcb["asid"], 0
                out = super().predict(fake, step, first)  # type: ignore[arg-type]
                vmcb["asid"] = asid
                return out

        found = check(Picky(), "read a; read b")
        outcome = next(d for d in found if d.field == "outcome")
        assert outcome.check == "C3" and "INVALID" in str(outcome.observed) and outcome.probe == 0

    def test_half_an_exit_code(self, check: Check) -> None:
        """15.5.1: -1 is of 64 bits."""
        found = check(Doctor("EXIT", place("exitcode") + 4, b"\xff\xff\xff\xff"), *REFUSED)
        assert [(d.check, d.field) for d in found] == [("C3", "outcome")]

    @pytest.mark.parametrize("name", ["asid", "ncr3", "intercept_misc2", "tlb_control", "np_control", "iopm_base"])
    def test_control_fields_stay(self, name: str, check: Check) -> None:
        found = only(check(Doctor("EXIT", place(name), b"\x01"), *REFUSED))
        assert (found.check, found.field) == ("C3", name)

    def test_the_save_area_is_undefined(self, check: Check) -> None:
        assert check(Doctor("EXIT", place("rip"), b"\x01"), *REFUSED) == []


class TestMemory:
    """C2 and C1 by what memory holds, in either mode."""

    @pytest.fixture(params=[True, False], ids=["strict", "pipelined"])
    def strict(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    def _world(self, compiler: Compiler) -> dict[str, int]:
        return compiler.compile(one("read a")).world.entries

    @pytest.mark.parametrize(
        "entry", ["guest.a.pml4e", "guest.a.pte", "nested.a.pdpte", "nested.a.pte", "nested.pt.pte"]
    )
    @pytest.mark.parametrize("bit", [0x20, 0x40, 1 << 62], ids=["A", "D", "available"])
    def test_a_bit_of_an_entry(self, entry: str, bit: int, strict: bool, check: Check, compiler: Compiler) -> None:
        address = self._world(compiler)[entry]

        class Flip(Plant):
            def after_run(self, fake: FakeMachine, out: Prediction) -> None:
                if fake.runs == 1:
                    fake.memory.cast("Q")[address >> 3] ^= bit

        found = only(check(Flip(), "write a", run("read b"), strict=strict))
        assert (found.check, found.field, found.op, found.probe) == ("C2", f"entry at sPA {address:#x}", 0, 0)
        assert found.walk is not None and any(s.address == address for s in found.walk.steps)

    def test_an_entry_nobody_walked(self, strict: bool, check: Check, compiler: Compiler) -> None:
        address = self._world(compiler)["nested.d.pte"] + 0x800

        class Stray(Plant):
            def after_run(self, fake: FakeMachine, out: Prediction) -> None:
                if fake.runs == 1:
                    fake.memory.cast("Q")[address >> 3] = 0xBAD

        found = only(check(Stray(), "read a", run("read b"), strict=strict))
        assert (found.check, found.observed) == ("C2", 0xBAD)

    def test_a_table_changed_while_l1_prepared(self, check: Check, compiler: Compiler) -> None:
        address = self._world(compiler)["nested.d.pte"] + 0x800

        class Early(Plant):
            def record(self, fake: FakeMachine, data: bytearray) -> None:
                if data[0] == RECORDS["ENTER"] and fake.runs == 1:
                    fake.memory.cast("Q")[address >> 3] = 0xBAD

        found = check(Early(), "read a", run("read b"))
        assert ("C2", f"entry at sPA {address:#x} before VMRUN") in [(d.check, d.field) for d in found]

    def test_a_write_that_did_not_happen(self, strict: bool, check: Check, compiler: Compiler) -> None:
        spa = compiler.compile(one("read a")).world.spa["a"]

        class Lost(Plant):
            def after_run(self, fake: FakeMachine, out: Prediction) -> None:
                fake.memory.cast("Q")[spa + 8 >> 3] = out.old[spa + 8]

        found = only(check(Lost(), "write a+8", strict=strict))
        assert (found.check, found.field) == ("C1", f"memory at sPA {spa + 8:#x}")

    @pytest.mark.parametrize("watched", [True, False])
    def test_a_write_elsewhere(
        self, watched: bool, strict: bool, check: Check, compiler: Compiler, image: Image
    ) -> None:
        world = compiler.compile(one("read a")).world
        other = world.spa["b"] + 8 if watched else next(
            p for p in range(image.data.start, image.data.end, 4096) if p not in world.watch) + 8

        class Astray(Plant):
            def after_run(self, fake: FakeMachine, out: Prediction) -> None:
                fake.memory.cast("Q")[other >> 3] = 0xBAD

        found = only(check(Astray(), "write a+8", strict=strict))
        assert found.check == "C1" and found.field.startswith(f"memory at sPA {other:#x}")
        assert found.op == (0 if watched else -1)

    def test_what_was_spoilt_is_mended(self, image: Image, cpu: Cpu, compiler: Compiler, twin: Twin) -> None:
        """The next scenario starts from a clean state, whatever the last one's verdict."""

        class Astray(Plant):
            def after_run(self, fake: FakeMachine, out: Prediction) -> None:
                if fake.runs == 1:
                    fake.memory.cast("Q")[image.data.end - 8 >> 3] = 0xBAD
                    fake.memory.cast("Q")[image.arena.start + 0xFF8 >> 3] = 0xBAD

        program = compiler.compile(one("read a"))
        first, second = run_on_fake(image, cpu, twin, [program, program], Astray())
        assert len(first.divergences) == 2 and second.divergences == []


def test_next_probe_that_never_moves_ends(check: Check) -> None:
    """A machine that loses RBP makes L1 begin again and again: that must end, and not in silence."""

    class Loses(Plant):
        def predict(self, fake: FakeMachine, step: object, first: int) -> Prediction:
            assert fake.runs < 400, "L1 runs for ever, and the checker follows"
            out = super().predict(fake, step, first)  # type: ignore[arg-type]
            out.next_probe = out.regs["rbp"] = 0
            return out

    found = check(Loses(), 'entry = "nested.a.pte"\nclear = ["p"]', "read a; read a+8; read a+16")
    assert found


def test_control_bytes_cover_the_table() -> None:
    assert struct.calcsize("Q") * 32 == CONTROL_BYTES


class Clock(Plant):
    """L1's counter before VMRUN and behind it, and what L2 reads in its first probe."""

    def __init__(self, begin: int, end: int, read: int) -> None:
        self.begin, self.end, self.read = begin, end, read

    def record(self, fake: FakeMachine, data: bytearray) -> None:
        if data[0] == RECORDS["EXIT"]:
            struct.pack_into("<Q", data, _AT["before"] + HOST.offsets["tsc"], self.begin)
            struct.pack_into("<Q", data, _AT["after"] + HOST.offsets["tsc"], self.end)
            struct.pack_into("<Q", data, _AT["results"], self.read)


@pytest.mark.parametrize(("offset", "read", "good"), [
    (0, 1000, True), (0, 1040, True), (0, 1100, True), (0, 999, False), (0, 1101, False),
    (5000, 6001, True), (5000, 1001, False), (5000, 11001, False), (-2000 % (1 << 64), -960 % (1 << 64), True),
])
def test_the_counter_of_l2_is_that_of_l1(offset: int, read: int, good: bool, check: Check) -> None:
    """15.5.1: TSC_OFFSET is added; no offset that a hypervisor below has for L1 is lost, nor counts twice."""
    found = check(Clock(1000, 1100, read), f'vmcb = "tsc_offset"\nvalue = {offset:#x}', "rdtsc; read a")
    assert not found if good else (only(found).check, only(found).field) == ("C3", "rdtsc")


def test_the_counter_of_l1_goes_on_as_before(check: Check) -> None:
    """What VMRUN adds for L2 is gone behind the #VMEXIT."""
    found = only(check(Clock(1000, 1000 + (0x5A << 56), 0), 'vmcb = "cr2"\nvalue = 0x0', "rdcr2"))
    assert (found.check, found.field) == ("C3", "l1.tsc")
