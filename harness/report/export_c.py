"""A bundle as a C test that needs nothing of ours: a small L1 that does what the scenario's ops do, runs L2, and says
what the manual asks for and what it observed.

Its fixed parts are guests/export: a start in assembly, and what C needs. Made here are L1's tables and VMCB, its
writes, L2's code for each VMRUN, and the checks behind the VMRUN in question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from harness.errors import UsageError
from harness.lockstep import stub
from harness.lockstep.compare import predicted_outcome
from harness.lockstep.prediction import WHOLE, Prediction
from harness.lockstep.signature import LOST
from harness.lockstep.twin import Twin
from harness.model.registers import CR4
from harness.model.vmcb import FIELDS, ExitCode
from harness.report.bundle import Bundle
from harness.report.words import entry_address
from harness.scenario.initial import HOST_PAT
from harness.scenario.program import Compiler, Program
from harness.wire.image import DATA_PAGES_TAG, PAGE
from harness.wire.layout import HOST_REGISTERS, VMRUN_RAISED
from harness.wire.program import Step, WireProbe

_SUFFIX: Final = {1: "b", 2: "w", 4: "l", 8: "q"}
_RAX: Final = {1: "%al", 2: "%ax", 4: "%eax", 8: "%rax"}
_LOADS: Final = {"cr0": "SET(cr0, {})", "cr4": "SET(cr4, {})", "efer": "write_msr(MSR_EFER, {})",
                 "pat": "write_msr(MSR_PAT, {})", "dr7": "SET(dr7, {})", "cr8": "SET(cr8, {})", "pkru": "set_pkru({})"}
_OWN: Final = {"l1.cr0": "READ(cr0)", "l1.cr4": "READ(cr4)", "l1.efer": "read_msr(MSR_EFER)",
               "l1.pat": "read_msr(MSR_PAT)", "l1.dr6": "READ(dr6)", "l1.dr7": "READ(dr7) & 0xff"}
"""L1's registers, as its C reads them."""
_MODES: Final = {"PAE": "PAE", "32-bit": "LEGACY", "off": "OFF"}
"""L1's modes outside of long mode, as test.c names them."""
_NUMBERS: Final = {number: name for name, number in HOST_REGISTERS.items()}
_SIMPLE: Final = {
    "invlpg": "invlpg ({di})", "rdcr0": "mov %cr0, {ax}", "rdcr2": "mov %cr2, {ax}", "rdcr3": "mov %cr3, {ax}",
    "rdcr4": "mov %cr4, {ax}", "rddr6": "mov %dr6, {ax}", "rddr7": "mov %dr7, {ax}", "wrcr0": "mov {ax}, %cr0",
    "wrcr2": "mov {ax}, %cr2", "wrcr3": "mov {ax}, %cr3", "wrcr4": "mov {ax}, %cr4", "wrdr6": "mov {ax}, %dr6",
    "wrdr7": "mov {ax}, %dr7", "vmrun": "vmrun {ax}", "vmload": "vmload {ax}", "vmsave": "vmsave {ax}", "stgi": "stgi",
    "clgi": "clgi", "cpuid": "cpuid", "wbinvd": "wbinvd", "invd": "invd", "hlt": "hlt", "vmmcall": "vmmcall",
    "pause": "pause", "undefined": "ud2", "breakpoint": "int3", "icebp": ".byte 0xf1", "intn": "int $13",
    "rdpmc": "rdpmc", "monitor": "monitor {ax}, %ecx, %edx", "mwait": "mwait %eax, %ecx", "rsm": "rsm",
    "skinit": "skinit %eax", "clts": "clts", "rdcr8": "mov %cr8, {ax}", "wrcr8": "mov {ax}, %cr8", "xsetbv": "xsetbv",
    "iret": "iret", "lldt": "lldt %ax", "ltr": "ltr %ax", "smsw": "smsw %eax", "lmsw": "lmsw %ax",
    "rdldtr": "sldt %eax", "rdtr": "str %eax", "rdrsp": "mov {sp}, {ax}", "wrrsp": "mov {ax}, {sp}",
    "invlpga": "invlpga {ax}, %ecx", "divide": "div %ecx", "lar": "lar %eax, %edx", "rdtsc": "rdtsc",
    "rdtscp": "rdtscp",
}
"""Probes that are one instruction."""
_FIRST: Final = {"monitor": ("xor %ecx, %ecx", "xor %edx, %edx"), "mwait": ("xor %ecx, %ecx",),
                 "divide": ("xor %edx, %edx", "xor %ecx, %ecx"), "lar": ("xor %edx, %edx",)}
_THEN: Final = {"lar": ("mov {dx}, {ax}",), **dict.fromkeys(("cpuid", "pause", "wbinvd"), ("xor %eax, %eax",))}
"""What goes before such an instruction, and what behind it."""


@dataclass
class _Test:
    """What is made: set_up(), the labels of L2's code, the statements of test(), and L2's code."""

    set_up: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


def export(bundle: Bundle, compiler: Compiler, twin: Twin) -> tuple[str, str, bool]:
    """The statements that take the place of @CASE@ in test.c, L2's code for start.S, and whether L1 has LA57. Raises
    UsageError, saying why, for what such a test cannot hold."""
    about = bundle.about
    if bundle.before or about.kind.startswith("depends"):
        raise _cannot("it depends on what ran before it")
    if about.check in ("C4", "C5"):
        raise _cannot("what a hypervisor under L1 does inside is not seen by L1")
    program = compiler.compile(bundle.scenario)
    world = program.world
    if world.mode.real:
        raise _cannot("L2 would have to run in real mode")
    test = _Test()
    _world(test, program)
    _Course(test, bundle, program, twin, compiler).follow()
    body = "\n".join([*test.names, "", "static void test(void)", "{",
                      *(f"\t{text}".rstrip() for text in test.body), "}", ""])
    head = "\n".join(test.set_up)
    return f"{head}\n{body}", "\n".join(test.code) + "\n", world.host_mode.name == "5-level"


def _cannot(why: str) -> UsageError:
    return UsageError(f"--export-c: this finding cannot be a C test: {why}")


def _world(test: _Test, program: Program) -> None:
    """Tables, pages and the VMCB as they are at first."""
    world = program.world
    names: dict[int, str] = {}
    for name, address in world.entries.items():
        names.setdefault(address & ~7, name)
    out = test.set_up
    out.append(f"/* L2's code and pages; a quadword of the pages is its own address, and code that returns it. */\n"
               f"enum {{ L2_CODE = {world.spa['code']:#x} }};\n"
               f"static const uint64_t VMCB = {world.vmcb_address:#x}, DATA = {world.data.start:#x}, "
               f"DATA_END = {world.data.end:#x};\n")
    out.append("/* L1's nested table and L2's tables, which are in L1's memory, and what else L2 needs. */\n"
               "static const struct { uint64_t at, value; } memory[] = {")
    out.extend(f"\t{{ {at:#x}, {value:#x} }},{f'	/* {names[at]} */' if at in names else ''}"
               for at, value in sorted(world.words.items()))
    out.append("};\n\nstatic void set_up(void)\n{\n\tfor (unsigned i = 0; i < sizeof(memory) / sizeof(*memory); i++)\n"
               "\t\tput(memory[i].at, memory[i].value, 8);\n"
               f"\tfor (uint64_t at = DATA; at < DATA_END; at += 8)\n"
               f"\t\tput(at, {DATA_PAGES_TAG:#x} | at >> 3 << 8, 8);\t/* mov $at/8, %eax; jmp *%rbx; nop */")
    out.extend(f"\tput(VMCB + {FIELDS[name].offset:#05x}, {value:#x}, {FIELDS[name].width});\t/* {name} */"
               for name, value in sorted(world.vmcb.items(), key=lambda item: FIELDS[item[0]].offset) if value)
    out.append(f"\twrite_msr(MSR_PAT, {HOST_PAT:#x});\n}}\n")


class _Course:
    """The program run on the model, up to the VMRUN in question."""

    def __init__(self, test: _Test, bundle: Bundle, program: Program, twin: Twin, compiler: Compiler) -> None:
        self.test, self.program, self.twin, self.world = test, program, twin, program.world
        self.found = [dict(one) for one in bundle.about.divergences]
        self.lost = bundle.about.check == LOST
        first = self.found[0] if self.found else {}
        self.op, self.probe = int(first.get("op", -1)), int(first.get("probe", -1))
        runs = [step.origin for step in program.steps if step.code == "RUN"]
        if not runs:
            raise _cannot("it has no VMRUN")
        if self.op < 0:
            self.op, self.probe = runs[-1], -1
        if self.op not in runs:
            raise _cannot(f"its op {self.op} is no VMRUN")
        self.number = 0
        self.wide = self.world.mode.long

    def follow(self) -> None:
        self.twin.reset(self.world)
        for step in self.program.steps:
            if step.code == "RUN":
                if self._run(step):
                    return
            elif step.code == "REMOTE":
                raise _cannot("L1's second processor has a part in it")
            elif step.code != "SYNC":
                self._op(step)
                self.twin.apply(step)
        raise _cannot("its VMRUN is not reached")

    def _op(self, step: Step) -> None:
        if step.code == "HOST":
            name = _NUMBERS[step.arg]
            value = step.b | (CR4.LA57 if name == "cr4" and self.world.host_mode.name == "5-level" else 0)
            self.test.body.append(f"{_LOADS[name].format(hex(value))};\t/* L1's {name.upper()} */")
        elif step.code == "INVLPGA":
            self.test.body.append(f"invlpga({step.a:#x}, {step.arg:#x});")
        elif step.code == "WRITE" and not self._is_rip(step):
            self.test.body.append(f"put({step.a:#x}, {step.b:#x}, {step.arg});{self._named(step.a)}")

    def _is_rip(self, step: Step) -> bool:
        """What RUN writes to RIP: L2's code is this test's own, at the same place."""
        return step.a & PAGE - 1 == FIELDS["rip"].offset and step.a & ~(PAGE - 1) >= self.world.vmcb_address and (
            step.arg == FIELDS["rip"].width and step.a < self.world.vmcb_address + 8 * PAGE)

    def _named(self, address: int) -> str:
        if 0 <= address - self.world.vmcb_address < 8 * PAGE:
            offset = address - self.world.vmcb_address & PAGE - 1
            names = [name for name, at in FIELDS.items() if at.offset == offset]
        else:
            names = [name for name, at in self.world.entries.items() if at == address]
        return f"\t/* {names[0]} */" if names else ""

    def _run(self, step: Step) -> bool:
        """One RUN op; whether the VMRUN in question is in it."""
        begun, first = self.twin.begin(step), 0
        while True:
            self.number += 1
            prediction = self.twin.predict(step, first)
            self._refuse(prediction, step)
            self._vmrun(step, first)
            over = prediction.refused or prediction.exitcode == ExitCode.VMMCALL or (
                prediction.next_probe + 1 >= len(step.probes))
            if step.origin == self.op and (over or first <= self.probe <= prediction.next_probe):
                self._checks(prediction, step)
                return True
            if over:
                return False
            first = prediction.next_probe + 1
            self.twin.resume(begun)
            self.test.body += [
                f"put({step.a + FIELDS[name].offset:#x}, {value:#x}, {FIELDS[name].width});\t/* {name} again */"
                for name, value in begun.items() if name != "rip"]

    def _refuse(self, prediction: Prediction, step: Step) -> None:
        if prediction.exitcode & ~0xFF == VMRUN_RAISED:
            raise _cannot("VMRUN raises an exception in L1")
        if prediction.event is not None:
            raise _cannot("an event is delivered through L2's own IDT")
        if prediction.ambiguous:
            raise _cannot("the manual permits more than one outcome: a TLB may hold an old translation")

    def _vmrun(self, step: Step, first: int) -> None:
        probes = step.probes[first:]
        n, mode = self.number, _MODES.get(self.world.host_mode.name)
        self.test.code += [f"/* VMRUN {n} */", "\t.code64" if self.wide else "\t.code32",
                           f"\t.globl l2_{n}, l2_{n}_end", f"l2_{n}:"]
        for index, probe in enumerate(probes, first):
            self.test.code += list(self._code(probe, index, step.b & ~(PAGE - 1)))
        self.test.code += ["\txor %eax, %eax", "\tcmp %ecx, %ecx", f"\t.globl l2_{n}_end_access",
                           f"l2_{n}_end_access:", "\tvmmcall", f"l2_{n}_end:", "\t.code64"]
        labels = "".join(f", l2_{n}_{i}[]" for i in range(first, len(step.probes)))
        self.test.names.append(f"extern const uint8_t l2_{n}[], l2_{n}_end[], l2_{n}_end_access[]{labels};")
        self.test.body += [
            "", f"/* VMRUN {n} */",
            f"copy(L2_CODE, l2_{n}, l2_{n}_end);",
            f"put({step.a + FIELDS['rip'].offset:#x}, {step.b & ~(PAGE - 1):#x}, 8);\t/* rip: L2's code page */",
            f"run_l2({step.a:#x});" if not mode else f"run_l2_from_32({step.a:#x}, {mode});",
        ]

    def _code(self, probe: WireProbe, index: int, page: int) -> Iterator[str]:
        """A probe as instructions; `page` is the gVA of L2's code."""
        kind, size, address, value = probe
        di, ax, sp, dx, bx = ("%rdi", "%rax", "%rsp", "%rdx", "%rbx") if self.wide else (
            "%edi", "%eax", "%esp", "%edx", "%ebx")
        n, native = self.number, 8 if self.wide else 4
        move = "movabs" if self.wide else "mov"
        before: list[str] = []
        after: list[str] = []
        if kind in ("read", "write", "rmw"):
            operand, suffix = _RAX[size], _SUFFIX[size]
            text = {"read": f"mov{suffix} ({di}), {operand}", "write": f"mov{suffix} {operand}, ({di})",
                    "rmw": f"lock xadd{suffix} {operand}, ({di})"}[kind]
        elif kind == "fetch":
            before = [f"{move} $({page:#x} + l2_{n}_{index}_done - l2_{n}), {bx}"]
            text, after = f"jmp *{di}", [f"l2_{n}_{index}_done:"]
        elif kind in ("push", "pop"):
            before = [f"mov {sp}, {dx}", f"lea {native}({di}), {sp}" if kind == "push" else f"mov {di}, {sp}"]
            text, after = f"{kind} {ax}", [f"mov {dx}, {sp}"]
        elif kind in _SIMPLE:
            names = {"di": di, "ax": ax, "dx": dx, "sp": sp}
            before, after = list(_FIRST.get(kind, ())), [one.format(**names) for one in _THEN.get(kind, ())]
            text = _SIMPLE[kind].format(**names)
        elif kind in ("in", "out"):
            operands = ["%dx", _RAX[size]]
            before, after = ["mov %edi, %edx"], ["xor %eax, %eax"]
            text = f"{kind} {', '.join(operands if kind == 'in' else operands[::-1])}"
        elif kind in ("rdmsr", "wrmsr"):
            before = ["mov %edi, %ecx"]
            before += ["mov %rax, %rdx", "shr $32, %rdx"] if kind == "wrmsr" and self.wide else []
            text = kind
            after = ["shl $32, %rdx", "or %rdx, %rax"] if kind == "rdmsr" and self.wide else []
        else:
            raise _cannot(f"its L2 knows no {kind!r}")
        yield f"\t{move} ${address:#x}, {di}"
        yield f"\t{move} ${value:#x}, {ax}"
        yield from (f"\t{one}" for one in before)
        yield "\tcmp %ecx, %ecx"
        yield f"\t.globl l2_{n}_{index}"
        yield f"l2_{n}_{index}:"
        yield f"\t{text}"
        yield from (one if one.endswith(":") else f"\t{one}" for one in after)
        if self._is_wanted(index):
            yield f"\tmov {ax}, {'%rsi' if self.wide else '%esi'}"

    def _is_wanted(self, index: int) -> bool:
        """Whether what that probe returns is to be checked."""
        return any(one["probe"] == index and one["op"] == self.op for one in self.found)

    def _checks(self, prediction: Prediction, step: Step) -> None:
        vmcb, free = step.a, prediction.free
        area = self.twin.vmcb
        self._follows(prediction)
        checked = ["exitcode"]
        if not prediction.refused:
            checked += [name for name in ("exitinfo1", "exitinfo2") if prediction.exitcode == ExitCode.NPF
                        or ExitCode.EXCEPTION <= prediction.exitcode < ExitCode.EXCEPTION + 32]
        checked += [str(one["field"]) for one in self.found if one["op"] in (self.op, -1)]
        out = ["", "/* what the manual asks for */"]
        for name in dict.fromkeys(checked):
            if name in FIELDS:
                mask = ~free.get(name, 0) & (1 << 8 * min(8, FIELDS[name].width)) - 1
                if mask and FIELDS[name].width <= 8:
                    out.append(f'check("{name}", get({vmcb + FIELDS[name].offset:#x}, {FIELDS[name].width}), '
                               f"{self._value(name, area[name], prediction, step)}, {mask:#x});")
            elif name in _OWN and self.world.host_mode.name not in _MODES:
                out.append(f'check("{name}", {_OWN[name]}, {prediction.host.get(name[3:], 0):#x}, ~0ull);')
            elif name.startswith(("entry at ", "memory at ")):
                out.append(self._memory(name, prediction))
            elif name == "value" or any(name == probe.kind for probe in step.probes):
                out.append(self._result(name, prediction))
            elif name != "outcome":
                raise _cannot(f"its {name} is not seen by such a test")
        self.test.body += out

    def _follows(self, prediction: Prediction) -> None:
        """Raises UsageError if what the machine did before has a part in what was expected."""
        first = self.found[0] if self.found else {"field": ""}
        name, wanted = str(first["field"]), first.get("expected")
        now = predicted_outcome(prediction, self.probe) if name == "outcome" else (
            hex(self.twin.vmcb[name]) if name in FIELDS else wanted)
        if wanted is not None and wanted != now:
            raise _cannot("what the manual asks for there follows from what the machine had done wrong before")

    def _value(self, name: str, value: int, prediction: Prediction, step: Step) -> str:
        """A field as C has it: RIP is where this test's own code has the access."""
        page = step.b & ~(PAGE - 1)
        if name != "rip" or value & ~(PAGE - 1) != page:
            return f"{value:#x}"
        n, index = self.number, prediction.next_probe
        if index >= len(step.probes):
            return f"{page:#x} + (l2_{n}_end_access - l2_{n})"
        kind, size, *_ = step.probes[index]
        if value != page + self.twin.stub.labels[stub.label(kind, size)]:
            return f"{page:#x}"  # at its first instruction
        return f"{page:#x} + (l2_{n}_{index} - l2_{n})"

    def _memory(self, name: str, prediction: Prediction) -> str:
        address = entry_address(name) or int(name.split()[3], 16)
        mask = ~prediction.permitted.get(address, 0) & WHOLE & (1 << 64) - 1
        return (f'check("{" ".join(name.split()[:4])}", get({address:#x}, 8), '
                f"{self.twin.memory.words[address >> 3]:#x}, {mask:#x});{self._named(address)}")

    def _result(self, name: str, prediction: Prediction) -> str:
        one = next(one for one in self.found if one["field"] == name)
        probe = int(one["probe"])
        if probe not in prediction.results:
            raise _cannot("the probe whose value is wrong is not done by then")
        mask = (1 << 8 * (8 if self.wide and self.world.host_mode.name not in _MODES else 4)) - 1
        return f'check("{name} of probe {probe}", l2_registers[3], {prediction.results[probe]:#x}, {mask:#x});'


def head(bundle: Bundle, machine: str) -> str:
    """The comment that test.c begins with: what is wrong, on what it was seen, and both walks."""
    text = (f"{bundle.scenario.title}\n\nSeen on {machine}\nBuild it with `make`, run it with `make run`: it prints "
            f"PASS or FAIL, and what is WRONG.\n\n{bundle.walks}")
    lines = text.replace("*/", "* /").replace("/*", "/ *").splitlines()
    return "\n".join(["/*", *(f" * {one}".rstrip() for one in lines), " */"])


def fill(template: str, values: Mapping[str, Any]) -> str:
    """`template` with @NAME@ replaced by each value, once."""
    for name, value in values.items():
        template = template.replace(f"@{name}@", str(value), 1)
    return template
