"""Sweep files: what they say, what is left out by itself, and the line of every mistake."""

from __future__ import annotations

from itertools import islice

import pytest

from harness.errors import UsageError
from harness.model.registers import Cpu
from harness.scenario import sweepfiles
from harness.scenario.cover import Coverage, sequence
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import Change, EntryOp, RunOp, VmcbOp
from harness.scenario.program import Compiler
from harness.scenario.sweep import Sweep, entry_bits
from harness.scenario.world import build
from harness.wire.image import Image
from tests.conftest import LIBRARY

TEXT = '''title = "t"
manual = "15.25"
shows = "s"
guest = "{guest}"
guest_page = "{page}"

[axis]
guest = ["4-level", "PAE", "32-bit", "off"]
page = ["4K", "2M"]
level = ["pte", "pde", "pdpte"]
cpl = [0, 3]

[axis.bits]
as-is = {}
read-only = { clear = ["rw"] }
nx = { set = ["nx"] }

[axis.check]
none = { text = "dr6" }
no-asid = { text = "asid", value = 0 }

[axis.probe]
read = "read a+0x20"
write = "write a+0x28"

[[op]]
entry = "guest.a.{level}"
apply = ["bits"]

[[op]]
vmcb = "{check}"
apply = ["check"]

[[op]]
run = ["{probe}"]
cpl = "{cpl}"

[[unless]]
reason = "because"
probe = ["write"]
cpl = [3]
guest = ["off"]
'''

SWEEPS = sweepfiles.load([LIBRARY])


def sweep(text: str = TEXT) -> Sweep:
    return sweepfiles.parse(text, "x.toml", "x")


def every(one: Sweep) -> dict[str, tuple[int, ...]]:
    return {one.case_name(case): case for case in map(one.space.at, range(one.space.size))}


def test_a_case_is_a_scenario() -> None:
    one = sweep()
    case = one.case("x[PAE,2M,pde,3,read-only,no-asid,write]")
    scenario = one.scenario(case)
    assert scenario.name == "x[PAE,2M,pde,3,read-only,no-asid,write]"
    world = scenario.guest, scenario.nested, scenario.guest_page, scenario.nested_page
    assert world == ("PAE", "4-level", "2M", "4K")
    entry, vmcb, run = scenario.ops
    assert entry == EntryOp("guest.a.pde", Change(clear=("rw",)))
    assert vmcb == VmcbOp("asid", Change(0))
    assert isinstance(run, RunOp) and (run.cpl, [str(probe) for probe in run.probes]) == (3, ["write a+0x28"])
    assert scenario.lines == (26, 30, 34)


def test_what_changes_nothing_is_left_out() -> None:
    one = sweep()
    scenario = one.scenario(one.case("x[4-level,4K,pte,0,as-is,none,read]"))
    assert [type(op) for op in scenario.ops] == [RunOp] and scenario.lines == (34,)


def test_which_combinations_there_are() -> None:
    """Counted by hand: places of a changed entry, and one where nothing is changed; twice none or no-asid; two
    probes at two CPLs but for a user's write without paging."""
    names = every(sweep())
    def count(begin: str) -> int:
        return sum(name.startswith(f"x[{begin},") for name in names)

    assert count("4-level,4K") == (3 * 2 + 1) * 2 * 4
    assert count("4-level,2M") == (2 * 2 + 1) * 2 * 4  # no PTE
    assert count("PAE,4K") == (3 * 2 + 1) * 2 * 4
    assert count("32-bit,4K") == (2 * 1 + 1) * 2 * 4  # two levels, and no NX in 32 bits
    assert count("32-bit,2M") == 0
    assert count("off,4K") == 1 * 2 * 3 and count("off,2M") == 0
    assert len(names) == sweep().space.size == 56 + 40 + 56 + 40 + 24 + 6


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x[off,4K,pte,3,as-is,none,write]", "leaves this combination out: because"),
        ("x[4-level,2M,pte,0,nx,none,read]", "leaves this combination out: it names an entry or a page size"),
        ("x[4-level,4K,pde,0,as-is,none,read]", "leaves this combination out"),
        ("x[4-level,4K,pte,0,blue,none,read]", "bits has no value 'blue'; there are as-is, read-only, nx"),
        ("x[4-level,4K]", "2 values for the 7 axes guest, page, level"),
    ],
)
def test_no_such_case(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sweep().case(name)


def test_names_are_cases() -> None:
    one = sweep()
    assert all(one.case(name) == case for name, case in every(one).items())


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ('title = "t"\n', "", 1, "'title' is missing"),
        ('shows = "s"', 'shows = "s"\ncolour = "red"', 4, "unknown key 'colour'"),
        ('"{guest}"', '"{guests}"', 4, "no axis is called 'guests'; there are guest, page, level"),
        ('"off"]\npage', '"real-life"]\npage', 4, "guest must be one of 4-level"),
        ("cpl = [0, 3]", "cpl = [0]", 11, "needs at least two values"),
        ("cpl = [0, 3]", "cpl = [0, 0]", 11, "must be different"),
        ("cpl = [0, 3]", 'cpl = ["a b", "c"]', 11, "has no blanks"),
        ("cpl = [0, 3]", "cpl = 3", 11, "must be a list of values"),
        ("cpl = [0, 3]", "cpl = [0, 3]\nspare = [1, 2]", 12, "no op uses the axis 'spare'"),
        ("cpl = [0, 3]", "cpl = [0, 3, 4]", 36, "cpl must be 0, 1, 2 or 3, not 4"),
        ('nx = { set = ["nx"] }', "nx = { sat = [] }", 16, "'sat' is unknown"),
        ('nx = { set = ["nx"] }', "nx = 3", 16, "must be a text, or a table"),
        ('read = "read a+0x20"', 'read = "red a"', 35, "'red a' is not a probe"),
        ('apply = ["bits"]', 'apply = ["bots"]', 28, "'apply' must be a list of axes"),
        ('apply = ["bits"]', 'apply = ["cpl"]', 28, "no value of 'cpl' changes anything"),
        ('entry = "guest.a.{level}"', 'entry = "guest.a.{lovel}"', 26, "no axis is called 'lovel'"),
        ('entry = "guest.a.{level}"', 'antry = "guest.a.{level}"', 26, "an op has exactly one of"),
        ('cpl = "{cpl}"', 'cpl = "{cpl}"\napply = ["bits"]', 37, "a run applies no axis"),
        ('reason = "because"\n', "", 38, r"\[\[unless\]\] needs a reason"),
        ('guest = ["off"]', 'guest = ["of"]', 38, "guest has no value 'of'; there are 4-level"),
        ('guest = ["off"]', 'gast = ["off"]', 38, "no axis is called 'gast'"),
        ("[[unless]]", "[[only]]", 38, r"\[\[only\]\] has 'reason', 'when' and 'then'"),
    ],
)
def test_mistakes(old: str, new: str, line: int, reason: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(UsageError, match=reason) as caught:
        sweep(TEXT.replace(old, new))
    assert str(caught.value).startswith(f"x.toml:{line}: "), str(caught.value)


def test_a_value_that_is_never_there() -> None:
    text = TEXT.replace('page = ["4K", "2M"]', 'page = ["4K", "1G"]').replace('"4-level", "PAE"', '"PAE"')
    with pytest.raises(UsageError, match="'1G' of 'page' is in no combination that is left"):
        sweep(text)


@pytest.mark.parametrize("one", SWEEPS, ids=lambda one: one.name)
class TestLibrary:
    def test_compiles(self, one: Sweep, compiler: Compiler) -> None:
        """Every pair of values makes a program; every value is reached by them."""
        had = Coverage(one.space)
        for _, case in islice(sequence(one.space, 0, coverage=had), 1000):
            scenario = one.scenario(case)
            assert one.case(scenario.name) == case
            assert compiler.compile(scenario).steps[-1].code == "SYNC"
            if not had.pairs_left:
                return
        raise AssertionError("a thousand cases without all pairs")

    def test_says_what_it_is(self, one: Sweep) -> None:
        assert one.title and one.shows and one.manual[0].isdigit()
        assert all(rule.reason for rule in one.rules)
        assert all(not axis.values[0].keys for axis in one.axes), "the first value of an axis changes nothing"


def test_the_joint_sweep_is_beyond_reach() -> None:
    (joint,) = [one for one in SWEEPS if one.name == "sweeps/joint"]
    assert joint.space.size > 10**13


@pytest.mark.parametrize("guest", ["4-level", "5-level", "PAE", "32-bit", "off"])
@pytest.mark.parametrize("nested", ["4-level", "5-level", "PAE", "32-bit"])
def test_entries_are_those_of_the_world(guest: str, nested: str, image: Image, cpu: Cpu) -> None:
    """What a sweep takes for an entry of a world is one, and of as many bits."""
    for guest_page in MODES[guest].pages:
        for nested_page in (*HOST_MODES[nested].pages, "none"):
            world = build(image, cpu, guest, nested, guest_page, nested_page)
            levels = ("pte", "pde", "pdpte", "pml4e", "pml5e")
            names = [f"{what}.{level}" for what in ("guest.a", "nested.a", "nested.pt", "nested.pml5", "nested.code")
                     for level in levels]
            for name in names:
                bits = entry_bits(name, guest, nested, guest_page, nested_page)
                if bits:
                    assert name in world.entries and world.entry_widths[name.partition(".")[0]] * 8 == bits
                elif name in world.entries:
                    assert name.startswith("nested.pt.") and guest_page != "4K"  # there, but not walked
