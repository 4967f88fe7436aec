"""Signatures: what is wrong, without where."""

from __future__ import annotations

from typing import Any

import pytest

from harness.errors import MachineLost
from harness.lockstep.signature import LOST, Signature, of_loss, signature
from harness.model.entries import A, D
from tests.report.cases import Case, divergence, entry, missing_a, narrow_walk


@pytest.mark.parametrize(
    ("observed", "field"),
    [
        ("done, result 0x77", "outcome done"),
        ("#NPF 0x200000006 (W|U|GUEST-TABLE) at gPA 0x8044431ff8", "outcome #NPF"),
        ("VMEXIT_SHUTDOWN, EXITINFO1 0x0, EXITINFO2 0x0", "outcome VMEXIT_SHUTDOWN"),
        ("VMEXIT_INVALID, EXITINFO1 0x0, EXITINFO2 0x0", "outcome VMEXIT_INVALID"),
        ("exception 6 of VMRUN, in L1", "outcome exception ... of VMRUN"),
    ],
)
def test_an_outcome_is_told_by_what_came_instead(observed: str, field: str) -> None:
    """Another outcome is another finding, whatever its numbers are."""
    one = divergence(expected="#NPF 0x100000007 at gPA 0x1000", observed=observed, rule="nested.write")
    assert signature(one) == Signature("C1", field, "nested.write")


def test_entries_by_the_bits_that_differ() -> None:
    case = Case()
    walk = case.walk()
    found = signature(missing_a(case, case.final["pte"], walk))
    assert found == signature(missing_a(case, case.final["pde"], walk)) == Signature("C2", "entry -a", "ad")
    assert signature(entry(walk, 0x9000, 7, 7 | D)).field == "entry +d"
    assert signature(entry(walk, 0x9000, 7 | A, 7 | D)).field == "entry -a +d"
    assert signature(entry(walk, 0x9000, 7, 7 | 1 << 9 | D)).field == "entry +d other"
    assert signature(entry(walk, 0x9000, 7 << 32, (7 | A) << 32)).field == "entry +a"


def test_an_entry_that_must_not_change_is_as_it_was_read() -> None:
    """Pipelined, the record has only what changed; strict, memory has it all: the finding is the same."""
    case = Case()
    walk, pte = case.walk(), case.final["pte"]
    read = next(step.entry for step in walk.steps if step.address == pte)
    assert signature(entry(walk, pte, "unchanged", read | D)).field == "entry +d"
    assert signature(entry(walk, pte, read | A, "unchanged")).field == "entry -a"
    assert signature(entry(None, pte, "unchanged", read | D)).field == "entry"
    _, narrow = narrow_walk()
    last = narrow.steps[-1]
    half = next(step for step in narrow.steps if step.level == "pte" and step.address & 4)
    assert signature(entry(narrow, half.address & ~7, (half.entry | A) << 32, "unchanged")).field == "entry -a", last


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"check": "C2", "field": "entry at sPA 0x1000 before VMRUN", "expected": 3, "observed": 0x23, "rule": "ad"},
         Signature("C2", "entry +a", "ad")),
        ({"check": "C1", "field": "memory at sPA 0x69100088 at the end", "expected": 1, "observed": 2, "rule": "write"},
         Signature("C1", "memory", "write")),
        ({"check": "C3", "field": "l1.cr4 at the end", "expected": 1, "observed": 2},
         Signature("C3", "l1.cr4", "exit.host")),
        ({"check": "C1", "field": "exitinfo2", "expected": 1, "observed": 2},
         Signature("C1", "exitinfo2", "exit.host")),
        ({"check": "C4", "field": "root level 5 at 0x14f85000", "expected": 1, "observed": 2},
         Signature("C4", "root level ... at ...", "exit.host")),
    ],
)
def test_no_address_is_in_it(values: dict[str, Any], expected: Signature) -> None:
    assert signature(divergence(**values)) == expected


def test_a_divergence_that_an_erratum_names_keeps_its_signature() -> None:
    assert signature(divergence(erratum="e1")) == signature(divergence())


def test_losses_are_a_kind_of_their_own() -> None:
    one = of_loss(MachineLost("QEMU exited with status 1\nlast words", ["qemu"]))
    assert one == Signature(LOST, "QEMU exited with status ...", "")
    assert one == of_loss(MachineLost("QEMU exited with status 134"))
    assert one != of_loss(MachineLost("no record for 5 s: L1 or L2 hangs"))


def test_in_words() -> None:
    assert str(Signature("C1", "exitinfo1", "nested.write")) == "C1 exitinfo1, rule nested.write"
    assert str(Signature(LOST, "it hangs", "")) == "lost it hangs"
