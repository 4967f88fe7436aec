"""The table of rules holds every rule that the code names, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from harness.model import rules
from harness.model.rules import RULES, Rule
from tests.conftest import ROOT

SOURCES = sorted([*(ROOT / "harness" / "model").glob("*.py"), *(ROOT / "harness" / "lockstep").glob("*.py")])
DOTTED = re.compile(r"(canonical|guest|nested|exit|vmrun|type|context|tlb|shadow)\.[a-z][a-z0-9-]*")
FAULTS = {"_guest_fault": "guest.", "_nested_fault": "nested.", "_denied": "nested.", "Fault": ""}
RULE_ARGUMENT = {"Divergence": 7, "_plain": 5}
"""Calls that take a rule by position, and which argument it is."""


def strings(node: ast.AST) -> Iterator[str]:
    """Constants that an expression may come to: of both sides of a condition too."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from strings(body)
            yield from strings(orelse)


def named(source: str) -> set[str]:
    """The ids of all rules that a source names: those with a dot wherever they stand, in docstrings behind the word
    "rule", the others where a rule is handed on."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if DOTTED.fullmatch(text):
                found.add(text)
            case ast.Constant(value=str(text)):  # a docstring: "Rule type.pat: ..."
                found |= set(re.findall(r"\b[Rr]ule ([a-z]+\.[a-z-]+)\b", text))
            case ast.Call(func=ast.Name(id=name), args=args) if name in FAULTS and args:
                found |= {FAULTS[name] + text for text in strings(args[0])}
            case ast.Call(func=ast.Name(id=name), args=args) if len(args) > RULE_ARGUMENT.get(name, 99):
                found |= set(strings(args[RULE_ARGUMENT[name]]))
            case ast.Assign(targets=[ast.Name(id="rule")], value=value):
                found |= set(strings(value))
            case ast.keyword(arg="rule", value=value):
                found |= {text for text in strings(value) if text}
    return found


def in_the_code() -> set[str]:
    return {name for path in SOURCES if path.name != "rules.py" for name in named(path.read_text())}


def test_every_rule_is_in_the_table() -> None:
    assert in_the_code() - RULES.keys() == set()


def test_every_rule_in_the_table_is_used() -> None:
    assert RULES.keys() - in_the_code() == set()


def test_no_id_is_there_twice() -> None:
    groups = (rules._WALK, rules._MEMORY, rules._EXIT, rules._VMRUN, rules._COMPUTED, rules._TLB, rules._OBSERVED,
              rules._CONTEXT, rules._SHADOW, rules._LOCKSTEP)
    assert sum(map(len, groups)) == len(RULES)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_a_rule_reads_well(rule: Rule) -> None:
    """A section (or several) of volume 2 as the manual numbers them, and one sentence."""
    assert RULES[rule.id] is rule
    ours = rule.id.startswith(("lockstep", "context.", "shadow.", "tlb.vmrun"))
    assert ours or re.fullmatch(r"\d+\.\d+(\.\d+)?(, \d+\.\d+(\.\d+)?)*", rule.section)
    assert rule.text.endswith(".") and not rule.text[0].islower() and "  " not in rule.text
    assert ". " not in re.sub(r"\([^)]*\)", "", rule.text), "one sentence"


def test_reference() -> None:
    assert RULES["nested.user"].reference == "AMD APM vol. 2, 15.25.7"
    assert RULES["lockstep"].reference == ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('raise _nested_fault("present", x)', {"nested.present"}),
        ('raise Fault("canonical", x)', {"canonical"}),
        ('rule = "reached"', {"reached"}),
        ('f(a, rule="exit.vmmcall")', {"exit.vmmcall"}),
        ('return "vmrun.cr0-nw"', {"vmrun.cr0-nw"}),
        ('Divergence(a, b, c, d, e, f, g, "ad" if table else "write", w)', {"ad", "write"}),
        ('_plain(a, b, c, d, e, "lockstep")', {"lockstep"}),
        ('x["exitinfo1"] = "write" + "guest.a.pte"', set()),
    ],
)
def test_how_rules_are_found(source: str, expected: set[str]) -> None:
    assert named(source) == expected
