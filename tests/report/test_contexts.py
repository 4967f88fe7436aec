"""C4 in the reports: which context is wrong, in words, and what KVM did around it."""

from __future__ import annotations

import pytest

from harness.lockstep.compare import Divergence
from harness.report.findings import findings
from harness.report.headline import headline, kind
from harness.report.styled import BAD
from harness.report.walks import draw
from tests.report.cases import divergence

EVENTS = ("  VMRUN       vmcb 0x1000 rip 0x2 NP_ENABLE=1 nCR3 0x3000",
          f"> run         L2 root_mmu direct, root level 4 at 0x7c927000 {' '.join(['efer_nx cr0_wp'] * 9)}",
          "  #VMEXIT     exit code 0x400 EXITINFO1 0x6 EXITINFO2 0x5000")


def wrong(field: str = "role.direct", rule: str = "context.nested") -> Divergence:
    return divergence(check="C4", field=field, expected=0, observed=1, rule=rule, probe=-1, events=EVENTS)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("context.direct-l1", "The MMU context of L1 is wrong: role.direct."),
        ("context.direct-l2", "The MMU context of L2, which runs without nested paging, is wrong: role.direct."),
        ("context.nested", "The MMU context of L2, which runs on L1's nested table, is wrong: role.direct."),
        ("context.guest-table",
         "The MMU context of a guest on a host without usable nested paging is wrong: role.direct."),
        ("context.back", "The MMU context of L1 after #VMEXIT is wrong: role.direct."),
        ("context.vmrun", "The hypervisor under L1 did not run what L1's VMCB says: role.direct."),
    ],
)
def test_headlines(rule: str, sentence: str) -> None:
    (finding,) = findings([wrong(rule=rule)])
    assert headline(finding, None) == sentence
    assert kind(finding) == f"{sentence.removesuffix('.')} (rule {rule})"


@pytest.mark.parametrize("width", [80, 120])
def test_the_events_are_shown(width: int) -> None:
    """Below the figures and the rule; the event in question stands out, however long it is."""
    (finding,) = findings([wrong(), wrong("root's gfn")])
    lines = draw(finding, None, width)
    texts = ["".join(span.text for span in line) for line in lines]
    assert all(len(text) <= width for text in texts)
    start = texts.index("  what KVM did:")
    assert start > next(n for n, text in enumerate(texts) if text.startswith("  rule context.nested: "))
    assert texts[start + 1] == "    VMRUN       vmcb 0x1000 rip 0x2 NP_ENABLE=1 nCR3 0x3000"
    assert texts[start + 2].startswith("  > run         L2 root_mmu direct")
    assert texts[-1] == "    #VMEXIT     exit code 0x400 EXITINFO1 0x6 EXITINFO2 0x5000"
    marked = [text for text, line in zip(texts, lines, strict=True) if any(span.style == BAD for span in line)]
    assert [text for text in marked if text in texts[start:]] == texts[start + 2 : -1]


def test_a_context_is_a_finding_of_its_own() -> None:
    """Of the same VMRUN, but no state of L2's."""
    state = divergence(check="C3", field="rip", probe=-1, expected=1, observed=2)
    assert [{d.check for d in finding.divergences} for finding in findings([state, wrong(), state])] == [{"C3"}, {"C4"}]


def test_a_shadow_is_a_finding_of_its_own_with_all_tables() -> None:
    """C5."""
    leaf = divergence(check="C5", field="4K leaf for gPA 0x1a72b0000 in the shadow", expected="no writes",
                      observed="RW", rule="shadow.rights", probe=-1,
                      events=("  L1's table       pte    at sPA 0x1: 0x25",
                              "> the shadow       pte    at hPA 0x2: 0x27"))
    one, other = findings([wrong(), leaf])
    assert {d.check for d in one.divergences} == {"C4"}
    assert headline(other, None) == ("KVM's 4K leaf for gPA 0x1a72b0000 in the shadow is not justified: it has RW "
                                     "where there must be no writes.")
    texts = ["".join(span.text for span in line) for line in draw(other, None, 100)]
    assert texts[-3:] == ["  the tables:", "    L1's table       pte    at sPA 0x1: 0x25",
                          "  > the shadow       pte    at hPA 0x2: 0x27"]
