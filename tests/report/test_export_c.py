"""A finding as a C test: what it says, and what cannot be one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.errors import UsageError
from harness.lockstep.twin import Twin
from harness.report.bundle import Bundle
from harness.report.export_c import export, fill, head
from harness.scenario.ops import Scenario
from harness.scenario.program import Compiler
from tests.report.test_bundle import ABOUT
from tests.scenario.texts import one, run

WRITE = one('entry = "nested.a.pte"\nclear = ["rw"]', run("read a; write a+8"))


def bundle(scenario: Scenario, *fields: str, op: int = 1, probe: int = 1, **about: Any) -> Bundle:
    found = [{"op": op, "probe": probe, "field": name} for name in fields]
    return Bundle(replace(ABOUT, divergences=found, **about), scenario)


def test_what_it_says(compiler: Compiler, twin: Twin) -> None:
    """L1's write by the entry's name, L2's code, and each field in question as the model has it."""
    case, code, la57 = export(bundle(WRITE, "exitinfo1", "rip", "cpl"), compiler, twin)
    assert "\tput(0x101004188, 0x100000000" not in case  # the entry's own address is the world's business
    assert ", 8);\t/* nested.a.pte */" in case and "/* asid */" in case
    assert 'check("exitcode", get(0x100c00070, 8), 0x400, 0xffffffffffffffff);' in case
    assert 'check("exitinfo1", get(0x100c00078, 8), 0x100000007, 0xffffffffffffffff);' in case
    assert 'check("rip", get(0x100c00578, 8), 0xfffffffbfbfbf000 + (l2_1_1 - l2_1), 0xffffffffffffffff);' in case
    assert 'check("cpl", get(0x100c004cb, 1), 0x0, 0xff);' in case
    assert "\tmovq (%rdi), %rax\n" in code and "l2_1_1:\n\tmovq %rax, (%rdi)\n" in code and "\tvmmcall\n" in code
    assert case.count("run_l2(") == 1 and not la57


def test_up_to_the_vmrun_in_question(compiler: Compiler, twin: Twin) -> None:
    """L1 goes on behind a fault as ours does; what follows on the finding is left out."""
    scenario = one('entry = "nested.a.pte"\nclear = ["p"]', run("read a; read a; read b"), run("read c"))
    case, code, _ = export(bundle(scenario, "exitinfo2"), compiler, twin)
    assert case.count("run_l2(") == 2 and "/* rflags again */" in case and "l2_3:" not in code
    case, _, _ = export(bundle(scenario, "cr0", op=2, probe=-1), compiler, twin)
    assert case.count("run_l2(") == 4
    case, _, _ = export(bundle(scenario, check="lost"), compiler, twin)
    assert case.count("run_l2(") == 4 and 'check("exitcode"' in case


def test_other_modes_of_l1(compiler: Compiler, twin: Twin) -> None:
    five = one('host = "cr4"\nset = ["smep"]', "read a", head='nested = "5-level"\n')
    case, _, la57 = export(bundle(five, "cr0", probe=0), compiler, twin)
    assert la57 and "SET(cr4, 0x101628);" in case
    for mode, name in (("PAE", "PAE"), ("32-bit", "LEGACY"), ("off", "OFF")):
        page = 'nested_page = "none"\n' if mode == "off" else ""
        scenario = one("read a", head=f'guest = "32-bit"\nnested = "{mode}"\n{page}')
        case, _, la57 = export(bundle(scenario, "cr0", op=0, probe=0), compiler, twin)
        assert not la57 and f", {name});" in case and "run_l2(" not in case


@pytest.mark.parametrize(("name", "expected", "fits"), [
    ("outcome", "#NPF 0x100000007 (P|W|U|FINAL) at gPA 0x81b70c1008", False), ("outcome", "VMEXIT_INVALID", False),
    ("exitinfo1", "0x100000007", True), ("exitinfo1", "0x100000005", False), ("rip", None, True),
])
def test_what_follows_from_what_was_wrong_before(
    name: str, expected: str | None, fits: bool, compiler: Compiler, twin: Twin
) -> None:
    """Where the machine left something wrong already, what is expected then is not what is expected of a test."""
    made = bundle(WRITE, name)
    made.about.divergences[0]["expected"] = expected
    if fits:
        export(made, compiler, twin)
    else:
        with pytest.raises(UsageError, match="follows from what the machine had done wrong before"):
            export(made, compiler, twin)


def test_entries_memory_and_own_registers(compiler: Compiler, twin: Twin) -> None:
    case, _, _ = export(bundle(WRITE, "entry at sPA 0x101004188 after #VMEXIT", "memory at sPA 0x1674f2008 at the end",
                               "l1.cr4", "l1.dr7"), compiler, twin)
    assert 'check("entry at sPA 0x101004188", get(0x101004188, 8), 0x' in case
    assert 'check("memory at sPA 0x1674f2008", get(0x1674f2008, 8), 0x' in case
    assert 'check("l1.cr4", READ(cr4), 0x628, ~0ull);' in case
    assert 'check("l1.dr7", READ(dr7) & 0xff, 0x0, ~0ull);' in case  # of DR7 only that no breakpoint is on


@pytest.mark.parametrize(
    ("scenario", "about", "why"),
    [
        (one("read a", head='nested = "PAE"\n'), {"fields": ["l1.cr4"]}, "its l1.cr4 is not seen by such a test"),
        (one("read a", head='guest = "real"\n'), {}, "L2 would have to run in real mode"),
        (one("rdgdtr"), {}, "its L2 knows no 'rdgdtr'"),
        (one('vmcb = "intercept_exceptions"\nclear = ["ud"]', "undefined"), {"op": 1}, "through L2's own IDT"),
        (one('entry = "guest.a.pte"\nframe = "b"\nby = "second"', "remote; read a"), {"op": 1},
         "L1's second processor has a part in it"),
        (one("read a"), {"kind": "depends on what ran before"}, "it depends on what ran before it"),
        (one("read a"), {"check": "C4"}, "what a hypervisor under L1 does inside"),
        (one("read a"), {"fields": ["l2.r9"]}, "its l2.r9 is not seen by such a test"),
        (one("read a"), {"op": 7}, "its op 7 is no VMRUN"),
        (one('vmcb = "cr0"\nclear = ["wp"]'), {}, "it has no VMRUN"),
        (one("read a; write guest.a.pte = &guest.b.pte; read a"), {}, "more than one outcome"),
        (WRITE, {"fields": ["value"], "op": 1, "probe": 1}, "the probe whose value is wrong is not done by then"),
    ],
)
def test_what_cannot_be_exported(
    scenario: Scenario, about: dict[str, Any], why: str, compiler: Compiler, twin: Twin
) -> None:
    fields, about = about.get("fields", ["exitinfo1"]), {k: v for k, v in about.items() if k != "fields"}
    with pytest.raises(UsageError, match=f"^--export-c: this finding cannot be a C test: .*{why}"):
        export(bundle(scenario, *fields, **{"op": 0, "probe": 0} | about), compiler, twin)


def test_the_head_stays_a_comment() -> None:
    """Whatever a machine wrote."""
    text = head(replace(Bundle(ABOUT, WRITE), walks="a */ b /* c\n"), "a machine */")
    assert text.startswith("/*\n * t\n") and text.endswith("\n */") and text.count("*/") == 1


def test_each_place_is_filled_once() -> None:
    assert fill("a @X@ @X@ @Y@", {"X": "@Y@", "Y": 2}) == "a 2 @X@ @Y@"
