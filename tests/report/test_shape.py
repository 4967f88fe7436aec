"""Both walks side by side: every step is there, each in its place, and it can be read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.model.access import Access, PageFault
from harness.model.entries import NX, PS, RW, A
from harness.model.walk import GUEST, NESTED
from harness.report.styled import plain
from harness.report.walks import draw
from tests.model.tables import FETCH, GVA, READ, USER_READ, WRITE, E, Space
from tests.report import cases
from tests.report.cases import (
    GPA,
    SCENARIO,
    SPA,
    Case,
    divergence,
    drawn,
    entry,
    marked,
    missing_a,
    only,
    rows,
    went_through,
)


class TestShape:
    def test_every_step_is_there_in_order(self) -> None:
        case = Case()
        walk = case.walk()
        text = rows(only(missing_a(case, case.final["pte"], walk)))
        shown = [line for line in text if re.match(r"  [> ] (  |guest )(pml4e|pdpte|pde|pte) ", line)]
        assert len(shown) == len(walk.steps) == 24
        for line, step in zip(shown, walk.steps, strict=True):
            assert f"{step.level} " in line and f" {step.address:x} " in line
            assert ("guest " in line) == (step.dimension == GUEST)
        headings = [line.split("for ")[1] for line in text if "nested walk of gPA" in line]
        assert headings == [*(f"the guest's {n}:" for n in ("pml4e", "pdpte", "pde", "pte")), "the page itself:"]

    @pytest.mark.parametrize("shift", [12, 21, 30])
    def test_gpas(self, shift: int) -> None:
        """Each nested walk is headed by the gPA that it translates, worked out from the entries."""
        case = Case(shift=shift)
        finding = only(missing_a(case, case.guest["pml4e"], case.walk()))
        headed = [int(line.split("gPA ")[1].split(",")[0], 16) for line in rows(finding) if "nested walk" in line]
        low = (1 << shift) - 1
        tables = [case.space.gcr3, *(case.space.get(at) & ~0xFFF & ~NX for at in list(case.guest.values())[:-1])]
        entries = [table | at & 0xFFF for table, at in zip(tables, case.guest.values(), strict=True)]
        assert headed == [*entries, GPA & ~low | GVA & low & ~0xFFF]

    @pytest.mark.parametrize("shift", [21, 30])
    def test_gpas_through_large_nested_pages(self, shift: int) -> None:
        """The low bits come from where the guest's entry was found."""
        case = Case(Space(identity=True, identity_shift=shift))
        walk = case.walk()
        tables = [s.address for s in walk.steps if s.dimension == GUEST]
        headed = [int(line.split("gPA ")[1].split(",")[0], 16) for line in rows(only(divergence(
            walk, field="value", expected=1, observed=2, after=case.after(walk)))) if "nested walk" in line]
        assert headed[:4] == tables

    def test_outcomes_at_the_bottom(self) -> None:
        case = Case()
        walk = case.walk()
        agreed = [line for line in rows(only(missing_a(case, case.guest["pte"], walk))) if "outcome" in line]
        assert [line.split() for line in agreed] == [["outcome", "sPA", f"{SPA:#x}", "the", "same"]]

    def test_without_nested_paging(self) -> None:
        case = Case(Space(nested=False))
        text = rows(only(missing_a(case, case.guest["pte"], case.walk())))
        assert not any("nested" in line for line in text)

    def test_the_rule_and_the_figures(self) -> None:
        case = Case()
        case.space.change(case.final["pte"], clear=RW)
        walk = case.walk(WRITE, 8)
        text = "\n".join(drawn(only(went_through(case, walk))))
        assert "nested-write[pte]: The machine let L2 write sPA 0x654008: the nested pte for the page" in text
        assert "probe 1: write a+0x8 at CPL 3" in text
        assert "rule nested.write (AMD APM vol. 2, 15.25.7): What L2 writes must have R/W=1" in text
        assert f"expected #NPF 0x100000007 (P|W|U|FINAL) at gPA {GPA + 8:#x}" in text
        assert "observed done, result 0x77" in text

    def test_rule_of_the_probe_not_of_the_exit(self) -> None:
        """A probe in the middle of a run: the run's end has nothing to do with it."""
        case = Case()
        walk = case.walk()
        text = drawn(only(divergence(walk, field="value", rule="exit.vmmcall", expected=1, observed=2)))
        assert any(line.startswith("  rule reached ") for line in text)

    def test_lost_registers_have_no_walk(self) -> None:
        case = Case()
        case.space.change(case.final["pte"], clear=RW)
        walk = case.walk(WRITE)
        text = drawn(only(divergence(walk, check="C3", field="cr2", expected=1, observed=2, after=case.after(walk))))
        assert not any("machine" in line.split() for line in text)
        assert any(line.startswith("  exit by rule nested.write") for line in text)
        guest = divergence(check="C3", field="cr2", expected=1, observed=2, rule="guest.present")
        assert any(line.startswith("  exit by rule guest.present") for line in drawn(only(guest)))

    def test_many_divergences_are_counted(self) -> None:
        found = only(*(entry(None, 0x1000 + 8 * n, 7, 0x27) for n in range(20)))
        assert "  and 12 more like it" in drawn(found)

    def test_known_ones_say_so(self) -> None:
        known = divergence(field="cr0", expected=1, observed=2, erratum="e7")
        text = drawn(only(divergence(expected=1, observed=2), known))
        assert any("cr0 (known: e7)" in line for line in text)

    def test_unknown_rule(self) -> None:
        assert "  rule from.the.future" in drawn(only(divergence(rule="from.the.future")))

    def test_entries_of_four_bytes(self) -> None:
        space, walk = cases.narrow_walk()
        pde = next(s.address for s in walk.steps if s.dimension == GUEST)
        quadword = space.get(pde & ~7)
        after = tuple(space.get(s.address) for s in walk.steps)  # as the driver reads them: by quadwords
        finding = only(entry(walk, pde & ~7, quadword | A << 32, quadword, after=after))
        both = [f"{quadword >> 32 | A:x}", f"{quadword >> 32:x}"]
        assert f" {pde:x} " in marked(finding)
        assert [word for word in marked(finding).split() if word in both] == both
        assert rows(finding)[-1].strip() == "> guest pde: A is missing"

    def test_four_bytes_without_divergence(self) -> None:
        """The other half of a quadword is another entry."""
        space, walk = cases.narrow_walk(lambda space, pde, pte: space.memory.write(pte - 4, 0x1234_5067, 4))
        after = tuple(space.get(s.address) for s in walk.steps)
        text = rows(only(divergence(walk, field="value", expected=1, observed=2, after=after)))
        assert not any("12345067" in line for line in text) and not any(line.startswith("  ~") for line in text)

    def test_32_bit_addresses(self) -> None:
        """A #PF at the walk's own gVA is found to be of this walk also with tables of 1024 entries."""
        space, walk = cases.narrow_walk()
        gva = 0x5 << 22 | 0x7 << 12 | 0x10
        after = tuple(space.get(s.address) for s in walk.steps)
        here = only(divergence(walk, observed=str(PageFault(E.P, gva)), after=after))
        there = only(divergence(walk, observed=str(PageFault(E.P, gva ^ 1 << 22)), after=after))
        assert "guest pte " in marked(here) and "outcome" in marked(there)


@given(
    width=st.integers(60, 140),
    high=st.sampled_from([0, NX, 1 << 51, NX | 1 << 62 | PS, 0x7FF << 52]),
    access=st.sampled_from([READ, WRITE, FETCH, USER_READ]),
    shift=st.sampled_from([12, 21, 30]),
    where=st.sampled_from(["pml4e", "pdpte", "pde", "pte"]),
)
def test_fits_the_width(width: int, high: int, access: Access, shift: int, where: str) -> None:
    """80 to 120 columns, whatever the entries are; plain text, no blanks at the ends of lines."""
    case = Case(shift=shift)
    case.space.change(case.final[where], set=high)
    walk = case.walk(access)
    finding = only(divergence(walk, expected=str(walk.outcome), observed="done, result 0x90e3ff08e9e400b8",
                              after=case.after(walk)),
                   entry(walk, case.guest["pml4e"], "unchanged", case.space.get(case.guest["pml4e"]) | high,
                         after=case.after(walk)))
    text = plain(draw(finding, SCENARIO, width))
    assert max(map(len, text.splitlines())) <= max(80, min(120, width))
    assert text.isascii() and "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_is_wide_where_there_is_room() -> None:
    case = Case()
    walk = case.walk()
    finding = only(missing_a(case, case.guest["pml4e"], walk))
    assert max(map(len, drawn(finding, 120))) > max(map(len, drawn(finding, 80)))


def test_constants_of_the_model() -> None:
    """What the tests above take for granted of a walk."""
    walk = Case().walk()
    assert {s.dimension for s in walk.steps} == {GUEST, NESTED}
    assert walk.steps[-1].entry & ~0xFFF == SPA
