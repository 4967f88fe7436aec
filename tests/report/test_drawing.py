"""A finding as it looks, to the letter: in 80 columns, and where flags have columns of their own."""

from __future__ import annotations

import pytest

from harness.model.entries import NX, PS, RW, D
from harness.report.styled import plain
from harness.report.walks import draw
from tests.model.tables import WRITE
from tests.report.cases import SCENARIO, Case, divergence, entry, only, rows

NARROW = """\
nested-write[pte]: The machine let L2 write sPA 0x654008: the nested pte for
  the page itself has R/W=0; manual 15.25.7.
  op 1 (/somewhere/scenarios/walk/nested-write.toml:9), probe 1: write a+0x8 at
  CPL 3
  C1 outcome
     expected #NPF 0x100000007 (P|W|U|FINAL) at gPA 0x81dd7e6008
     observed done, result 0x770000000001015a
  C2 entry at sPA 0x6b50
     expected 0x81c00000e7 (P|RW|US|A|D|PS)
     observed 0x81c00000a7 (P|RW|US|A|PS)
  rule nested.write (AMD APM vol. 2, 15.25.7): What L2 writes must have R/W=1 at
       every nested level, whatever either CR0.WP says; and every access to a
       guest table counts as a write (15.25.5).

    entry        sPA  model                         machine
    nested walk of gPA 0x31400023c0, for the guest's pml4e:
      pml4e     1000  3027 P RW US +A               3027 P RW US +A
      pdpte     3628  4027 P RW US +A               4027 P RW US +A
      pde       4000  5027 P RW US +A               5027 P RW US +A
      pte       5010  2067 P RW US +A +D            2067 P RW US +A +D
    guest pml4e 23c0  8000003140006027 P RW US +A   8000003140006027 P RW US +A
                      NX                            NX
    nested walk of gPA 0x3140006b50, for the guest's pdpte:
      pml4e     1000  3027 P RW US +A               3027 P RW US +A
      pdpte     3628  4027 P RW US +A               4027 P RW US +A
      pde       4000  5027 P RW US +A               5027 P RW US +A
      pte       5030  6067 P RW US +A +D            6067 P RW US +A +D
  > guest pdpte 6b50  81c00000e7 P RW US +A +D PS   81c00000a7 P RW US +A PS
    nested walk of gPA 0x81dd7e6008, for the page itself:
      pml4e     1008  7027 P RW US +A               7027 P RW US +A
      pdpte     7038  8027 P RW US +A               8027 P RW US +A
      pde       8758  9027 P RW US +A               9027 P RW US +A
      pte       9f30  654085 P US PAT               654085 P US PAT
  ! outcome           #NPF 0x100000007              done, result
                      (P|W|U|FINAL) at gPA          0x770000000001015a
                      0x81dd7e6008
  > guest pdpte: D is missing
"""

WIDE = """\
nested-write[pte]: The machine let L2 write sPA 0x654008: the nested pte for the page itself has R/W=0;
  manual 15.25.7.
  op 1 (/somewhere/scenarios/walk/nested-write.toml:9), probe 1: write a+0x8 at CPL 3
  C1 outcome
     expected #NPF 0x100000007 (P|W|U|FINAL) at gPA 0x81dd7e6008
     observed done, result 0x770000000001015a
  C2 entry at sPA 0x6b50: expected 0x81c00000e7 (P|RW|US|A|D|PS), observed 0x81c00000a7 (P|RW|US|A|PS)
  rule nested.write (AMD APM vol. 2, 15.25.7): What L2 writes must have R/W=1 at every nested level, whatever
       either CR0.WP says; and every access to a guest table counts as a write (15.25.5).

    entry        sPA  model                                        machine
    nested walk of gPA 0x31400023c0, for the guest's pml4e:
      pml4e     1000              3027 P RW US +A                              3027 P RW US +A
      pdpte     3628              4027 P RW US +A                              4027 P RW US +A
      pde       4000              5027 P RW US +A                              5027 P RW US +A
      pte       5010              2067 P RW US +A +D                           2067 P RW US +A +D
    guest pml4e 23c0  8000003140006027 P RW US +A        NX        8000003140006027 P RW US +A        NX
    nested walk of gPA 0x3140006b50, for the guest's pdpte:
      pml4e     1000              3027 P RW US +A                              3027 P RW US +A
      pdpte     3628              4027 P RW US +A                              4027 P RW US +A
      pde       4000              5027 P RW US +A                              5027 P RW US +A
      pte       5030              6067 P RW US +A +D                           6067 P RW US +A +D
  > guest pdpte 6b50        81c00000e7 P RW US +A +D PS                  81c00000a7 P RW US +A    PS
    nested walk of gPA 0x81dd7e6008, for the page itself:
      pml4e     1008              7027 P RW US +A                              7027 P RW US +A
      pdpte     7038              8027 P RW US +A                              8027 P RW US +A
      pde       8758              9027 P RW US +A                              9027 P RW US +A
      pte       9f30            654085 P    US       PAT                     654085 P    US       PAT
  ! outcome           #NPF 0x100000007 (P|W|U|FINAL) at gPA        done, result 0x770000000001015a
                      0x81dd7e6008
  > guest pdpte: D is missing
"""


@pytest.mark.parametrize(("width", "text"), [(80, NARROW), (110, WIDE)])
def test_drawing(width: int, text: str) -> None:
    """A write that went through a read-only nested pte (which has PAT set), and did not set D in the guest's
    1G entry either, on its way through a guest entry with NX."""
    case = Case(shift=30)
    case.space.change(case.guest["pml4e"], set=NX)
    case.space.change(case.final["pte"], set=PS, clear=RW)
    walk = case.walk(WRITE, 8)
    at, want = case.guest["pdpte"], case.space.get(case.guest["pdpte"])
    after = case.after(walk, {at: want & ~D})
    finding = only(
        divergence(walk, expected=str(walk.outcome), observed="done, result 0x770000000001015a", after=after),
        entry(walk, at, want, want & ~D, after=after),
    )
    assert plain(draw(finding, SCENARIO, width)) + "\n" == text


def test_memory_types() -> None:
    """A step's own type stands behind its flags unless it is WB; the page's behind where it was reached."""
    case = Case()
    walk = case.walk()
    types = ["WB"] * len(walk.steps) + ["WC+"]
    types[4] = "WT"
    one = divergence(walk, field="value", expected=1, observed=2, after=case.after(walk), types=tuple(types))
    lines = rows(only(one))
    assert [text for text in lines if " WT " in text] == [next(text for text in lines if "guest pml4e" in text)]
    assert "sPA 0x654000 WC+," in " ".join(" ".join(lines).split())
    assert not any("WB" in text for text in lines)
