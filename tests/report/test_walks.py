"""Both walks side by side: where the first difference is marked, and why."""

from __future__ import annotations

import pytest

from harness.model.access import Access, NestedPageFault, PageFault, Reached
from harness.model.entries import NX, RW, US, A, D, P
from harness.report.findings import Finding, findings
from harness.report.styled import plain
from harness.report.walks import draw
from tests.model.tables import FETCH, GVA, READ, USER_READ, WRITE, E
from tests.report import cases
from tests.report.cases import (
    GPA,
    SCENARIO,
    Case,
    also,
    divergence,
    drawn,
    entry,
    marked,
    missing_a,
    only,
    rows,
    went_through,
)


class TestTheModelStops:
    """The machine goes on where it must not: the entry that forbids it is marked, not the last one read."""

    @pytest.mark.parametrize("level", ["pml4e", "pdpte", "pde", "pte"])
    @pytest.mark.parametrize(
        ("access", "bit", "present", "why"),
        [(READ, US, False, "U/S=0"), (WRITE, RW, False, "R/W=0"), (FETCH, NX, True, "NX=1")],
    )
    def test_nested_rights(self, level: str, access: Access, bit: int, present: bool, why: str) -> None:
        case = Case()
        case.space.change(case.final[level], set=bit if present else 0, clear=0 if present else bit)
        finding = only(went_through(case, case.walk(access)))
        assert f" {case.final[level]:x} " in marked(finding)
        assert rows(finding)[-1].strip() == (
            f"> nested {level} for the page itself: the model stops here ({why}), the machine goes on")

    @pytest.mark.parametrize("level", ["pml4e", "pdpte", "pde", "pte"])
    @pytest.mark.parametrize(
        ("access", "bit", "present"), [(USER_READ, US, False), (WRITE, RW, False), (FETCH, NX, True)]
    )
    def test_guest_rights(self, level: str, access: Access, bit: int, present: bool) -> None:
        case = Case()
        case.space.change(case.guest[level], set=bit if present else 0, clear=0 if present else bit)
        assert f"guest {level} " in marked(only(went_through(case, case.walk(access))))

    def test_smep_is_the_leafs(self) -> None:
        case = Case()
        walk = case.space.walk(GVA, FETCH, case.space.paging(smep=True))
        assert walk.rule == "guest.smep"
        assert "guest pte " in marked(only(went_through(case, walk)))

    @pytest.mark.parametrize(("set_", "clear", "why"), [(0, P, "P=0"), (1 << 51, 0, "reserved bit 51 set")])
    def test_not_present_and_reserved(self, set_: int, clear: int, why: str) -> None:
        case = Case()
        case.space.change(case.final["pde"], set=set_, clear=clear)
        finding = only(went_through(case, case.walk()))
        assert f" {case.final['pde']:x} " in marked(finding) and why in " ".join(rows(finding)[-2:])

    def test_of_a_guest_table(self) -> None:
        """Rights of one nested walk are not looked for in another."""
        case = Case()
        at = case.guest["pdpte"] & ~0xFFF
        leaf = next(s.address for s in case.space.walk(GVA).steps
                    if (s.level, s.purpose) == ("pte", "pdpte") and s.entry & ~0xFFF == at)
        case.space.change(leaf, clear=RW)
        finding = only(went_through(case, case.walk()))
        assert f" {leaf:x} " in marked(finding)
        assert "nested pte for the guest's pdpte" in rows(finding)[-1]

    def test_traces_of_going_on_are_no_cause(self) -> None:
        """A and D that the machine set on its way further come after what let it go there."""
        case = Case()
        case.space.change(case.final["pml4e"], clear=US)
        walk = case.walk()
        leaf = case.guest["pte"]
        seen = case.space.get(leaf) | D
        after = case.after(walk, {leaf: seen})
        finding = only(
            divergence(walk, expected=str(walk.outcome), observed="done, result 0x1", after=after),
            entry(walk, leaf, case.space.get(leaf), seen, after=after),
        )
        assert f" {case.final['pml4e']:x} " in marked(finding)
        assert f" {leaf:x} " in also(finding)[0]

    def test_a_lost_bit_is_the_cause(self) -> None:
        """The entry itself lost the bit that forbids, before it was used."""
        case = Case()
        case.space.change(case.guest["pdpte"], set=NX)
        walk = case.walk(FETCH)
        at, want = case.guest["pdpte"], case.space.get(case.guest["pdpte"])
        after = case.after(walk, {at: want & ~NX})
        finding = only(divergence(walk, expected=str(walk.outcome), observed="done, result 0x1", after=after),
                       entry(walk, at, want, want & ~NX, after=after))
        assert "guest pdpte " in marked(finding) and rows(finding)[-1].strip() == "> guest pdpte: NX is missing"


class TestTheMachineStops:
    def stops(self, case: Case, observed: NestedPageFault | PageFault, access: Access = READ) -> Finding:
        walk = case.walk(access)
        return only(divergence(walk, expected=str(walk.outcome), observed=str(observed), after=case.after(walk)))

    def test_at_the_page(self) -> None:
        finding = self.stops(Case(), NestedPageFault(E.P | E.U | E.FINAL, GPA))
        assert marked(finding).split()[1] == "pte"
        assert rows(finding)[-1].strip() == (
            "> nested pte for the page itself: the machine stops in this walk, the model goes on")

    @pytest.mark.parametrize("level", ["pml4e", "pdpte", "pde", "pte"])
    def test_at_a_guest_table(self, level: str) -> None:
        """EXITINFO2 is the gPA of the guest entry, which says in which nested walk it was."""
        case = Case()
        gpa = {"pml4e": case.space.gcr3} | {
            below: case.space.get(case.guest[above]) & ~0xFFF
            for above, below in (("pml4e", "pdpte"), ("pdpte", "pde"), ("pde", "pte"))
        }
        address = gpa[level] | case.guest[level] & 0xFFF
        finding = self.stops(case, NestedPageFault(E.P | E.W | E.U | E.GUEST_TABLE, address))
        assert rows(finding)[-1].strip().startswith(f"> nested pte for the guest's {level}: the machine stops")
        elsewhere = self.stops(Case(), NestedPageFault(E.P | E.W | E.U | E.GUEST_TABLE, address ^ 1 << 20))
        assert "outcome" in marked(elsewhere)

    def test_at_the_guests_page(self) -> None:
        finding = self.stops(Case(), PageFault(E.P | E.W, GVA), WRITE)
        assert "guest pte " in marked(finding)

    def test_at_another_gva(self) -> None:
        """L2's own code, say: then the walk at hand says nothing of where."""
        assert "outcome" in marked(self.stops(Case(), PageFault(E.P | E.W, GVA ^ 1 << 21)))

    @pytest.mark.parametrize("gva", [0xC000_0000 | 5 << 21 | 7 << 12, 0x4000_0000])
    def test_in_pae_mode(self, gva: int) -> None:
        """Its root has four entries, and may begin at any 32 bytes: not all of its address is an index."""
        space, walk = cases.pae_walk(gva)
        after = tuple(space.get(s.address) for s in walk.steps)
        assert isinstance(walk.outcome, Reached)
        here = only(divergence(walk, observed=str(PageFault(E.P, gva | 0x10)), after=after))
        there = only(divergence(walk, observed=str(PageFault(E.P, gva ^ 1 << 31)), after=after))
        assert "guest pte " in marked(here) and "outcome" in marked(there)

    def test_not_present(self) -> None:
        """P=0 in the code: it stopped where the entry is not present, if there is one."""
        case = Case()
        walk = case.walk()
        at = case.guest["pde"]
        after = case.after(walk, {at: case.space.get(at) & ~P})
        finding = only(divergence(walk, expected=str(walk.outcome), observed=str(PageFault(0, GVA)), after=after))
        assert "guest pde " in marked(finding)

    def test_before_the_model(self) -> None:
        """Both stop; the one that stops first is where they part."""
        case = Case()
        case.space.change(case.final["pte"], clear=RW)
        finding = self.stops(case, PageFault(E.P | E.W, GVA), WRITE)
        assert "guest pte " in marked(finding)

    def test_behind_the_model(self) -> None:
        case = Case()
        case.space.change(case.guest["pte"], clear=RW)
        finding = self.stops(case, NestedPageFault(E.P | E.W | E.U | E.FINAL, GPA), WRITE)
        assert "guest pte " in marked(finding) and "R/W=0" in rows(finding)[-1]


    def test_in_the_same_place_by_another_name(self) -> None:
        """The same fault with another code, where L2 was found at another probe: nothing parts the walks."""
        case = Case()
        case.space.change(case.guest["pde"], clear=P)
        assert "outcome" in marked(self.stops(case, PageFault(E.W, GVA)))

    def test_refusals_are_about_the_walk(self) -> None:
        """An outcome is, also where it is a matter of C3."""
        case = Case()
        walk = case.walk()
        one = divergence(walk, check="C3", observed="VMEXIT_INVALID", after=case.after(walk))
        assert "outcome" in marked(only(one))


class TestTheReport:
    """Both stop at the same place, and report it differently: the outcome is marked."""

    @pytest.mark.parametrize("field", ["exitinfo1", "exitinfo2"])
    def test_fields(self, field: str) -> None:
        case = Case()
        case.space.change(case.final["pte"], clear=P)
        walk = case.walk()
        assert isinstance(walk.outcome, NestedPageFault)
        values = {"exitinfo1": (walk.outcome.error_code, E.U), "exitinfo2": (walk.outcome.address, GVA)}[field]
        finding = only(divergence(walk, field=field, expected=values[0], observed=values[1], after=case.after(walk)))
        assert "outcome" in marked(finding)
        assert str(walk.outcome).split()[1] in marked(finding)

    def test_codes_section_of_the_guest(self) -> None:
        case = Case()
        case.space.change(case.guest["pte"], clear=P)
        finding = only(divergence(case.walk(), field="exitinfo1", expected=1, observed=2))
        assert any(text.endswith("the error code's bits: AMD APM vol. 2, 8.4.2") for text in drawn(finding))

    def test_codes_section(self) -> None:
        case = Case()
        case.space.change(case.final["pte"], clear=P)
        walk = case.walk()
        finding = only(divergence(walk, field="exitinfo1", expected=1, observed=2, after=case.after(walk)))
        assert any("error code's bits: AMD APM vol. 2, 15.25.6" in text for text in drawn(finding))

    def test_value(self) -> None:
        case = Case()
        walk = case.walk()
        finding = only(divergence(walk, field="value", expected=0x1111, observed=0x2222, after=case.after(walk)))
        assert "value 0x1111" in marked(finding) and "value 0x2222" in marked(finding)


class TestEntries:
    def test_first_of_several(self) -> None:
        case = Case()
        walk = case.walk()
        late, early = missing_a(case, case.final["pte"], walk), missing_a(case, case.guest["pdpte"], walk)
        after = case.after(walk, {case.final["pte"]: int(late.observed), case.guest["pdpte"]: int(early.observed)})
        finding = only(*(divergence(walk, check="C2", field=d.field, expected=d.expected, observed=d.observed,
                                    rule="ad", after=after) for d in (late, early)))
        assert "guest pdpte " in marked(finding)
        assert [f" {case.final['pte']:x} " in text for text in also(finding)] == [True]
        assert rows(finding)[-1].strip() == "> guest pdpte: A is missing"

    def test_both_values_and_what_was_set(self) -> None:
        """`+` says what was set since the walk read the entry, on either side."""
        case = Case()
        finding = only(missing_a(case, case.guest["pte"], case.walk(WRITE)))
        model, machine = marked(finding).split("+A")
        assert model.split()[-3:] == ["P", "RW", "US"]
        assert machine.split()[0] == "+D" and machine.split()[2:] == ["P", "RW", "US", "+D"]

    def test_too_much(self) -> None:
        case = Case()
        finding = only(cases.extra_d(case, case.guest["pml4e"], case.walk()))
        assert "guest pml4e " in marked(finding) and "+D" in marked(finding)

    def test_of_another_probe(self) -> None:
        """The walk goes through an entry that an earlier probe of the same VMRUN left wrong."""
        case = Case()
        walk = case.walk()
        wrong = missing_a(case, case.guest["pml4e"], walk)
        outcome = divergence(walk, probe=2, expected=str(walk.outcome), observed="#PF 0x0 (0) at gVA 0x1000",
                             after=wrong.after)
        found = findings([divergence(wrong.walk, probe=0, check="C2", field=wrong.field, expected=wrong.expected,
                                     observed=wrong.observed, after=wrong.after), outcome])
        assert "guest pml4e " in marked(found[1])

    def test_of_another_vmrun(self) -> None:
        """Not if it has another value by now: that was a VMRUN before this one."""
        case = Case()
        walk = case.walk()
        at = case.guest["pml4e"]
        old = entry(walk, at, case.space.get(at), case.space.get(at) | 1 << 9, probe=0, after=case.after(walk))
        outcome = divergence(walk, probe=2, expected=str(walk.outcome), observed="#PF 0x0 (0) at gVA 0x1000",
                             after=case.after(walk))
        assert "outcome" in marked(findings([old, outcome])[1])

    def test_rewritten_by_l2(self) -> None:
        """Nobody objects to it, so it is no difference; what the walk read is what the model's side shows."""
        case = Case()
        walk = case.walk()
        at = case.guest["pte"]
        after = case.after(walk, {at: case.space.get(at) ^ 1 << 20})
        finding = only(divergence(walk, field="value", expected=1, observed=2, after=after))
        line = next(text for text in rows(finding) if f" {at:x} " in text)
        assert line.startswith("  ~ ") and "outcome" in marked(finding)

    def test_machine_not_looked_at(self) -> None:
        case = Case()
        walk = case.walk()
        finding = only(divergence(walk, field="value", expected=1, observed=2))
        assert sum(text.rstrip().endswith("?") for text in rows(finding)) == len(walk.steps)


@pytest.mark.parametrize("which", [slice(None), slice(0, 1), slice(7, 8), slice(-1, None), slice(0, 0)], ids=str)
def test_it_fits_a_terminal(which: slice) -> None:
    """Of 80 columns and 24 lines, where every entry differs, or one, or the outcome alone: the walk with the first
    difference is whole, and the rest is counted."""
    walk = Case().walk()
    found = [divergence(walk, expected=str(walk.outcome), observed="VMEXIT_HLT, EXITINFO1 0x0, EXITINFO2 0x0")]
    found += [entry(walk, step.address, step.entry | A, step.entry,
                    erratum="an-erratum-with-a-long-name-of-its-own+and-a-second-one-with-one")
              for step in walk.steps[which]]
    lines = plain(draw(only(*found), SCENARIO, 80, 22)).splitlines()
    assert len(lines) <= 22 and max(map(len, lines)) <= 80
    first = [text.split()[1] for text in lines if text.startswith("  > ")]
    others = [text.split()[1] for text in lines if text.startswith("  ! ")]
    assert len(first) == 1 and "outcome" in first + others
    if which == slice(None):
        assert first + others == ["pml4e", "pdpte", "pde", "pte", "guest", "outcome"]
        assert "    and 19 further entries, 19 of which differ too" in lines
