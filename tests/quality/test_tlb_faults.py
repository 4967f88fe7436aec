"""Machines that use every old translation that they may, and some that use one they may not.

The machine is the model behind the real rings (tests/lockstep/fake.py), with a TLB that never lets go of anything by
itself. If it keeps to the rules, whatever it does must be permitted; if it breaks one, that one must be named.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, islice
from typing import Final

import pytest

from harness.lockstep import stale
from harness.lockstep.prediction import Prediction
from harness.lockstep.state import State
from harness.lockstep.twin import Twin
from harness.model import tlb_events as rules
from harness.model.access import Access, Reached
from harness.model.dirty import Update
from harness.model.liberties import WIDEST, Caches, Liberties, Takes
from harness.model.registers import Cpu
from harness.model.walk import Walk
from harness.scenario import files, sweepfiles
from harness.scenario.cover import sequence
from harness.scenario.program import Compiler, world_key
from harness.wire.image import Image
from tests.conftest import LIBRARY
from tests.lockstep.fake import FakeMachine, Plant, run_on_fake

SWEEPS: Final = ("litmus-own", "litmus-exit", "litmus-second")
OLDEST_FIRST, NEWEST_FIRST = 0, -1
WITH_FLUSH_BY_ASID: Final = frozenset({"flushbyasid"})


class _Hoards(Plant):
    """Takes an old translation wherever there is one: of several the one at `which`."""

    twin: Twin | None = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch, which: int = 0, breaks: str = "") -> None:
        self._caches = WIDEST._replace(ignores=frozenset([breaks] if breaks else []))
        self._which, self._real = which, stale.choose
        monkeypatch.setattr(stale, "choose", self.choose)

    def predict(self, fake: FakeMachine, step: object, first: int) -> Prediction:
        self.twin = fake.twin
        fake.twin.caches = self._caches
        return super().predict(fake, step, first)  # type: ignore[arg-type]

    def choose(
        self, state: State, out: Prediction, gva: int, access: Access, fresh: Walk, index: int,
        fits: Callable[[int], bool] | None, more: bool = False,
    ) -> tuple[Walk, list[Update]]:
        if state is not self.twin:
            return self._real(state, out, gva, access, fresh, index, fits, more)
        others = state.tlb.stale(state.memory.words, gva, access, fresh, self._caches)
        return others[self._which] if others else fresh, []


def _run(
    image: Image, cpu: Cpu, text: str, plant: Plant, liberties: Liberties | None = None, strict: bool = True
) -> list[str]:
    """The rules of what was found on the scenarios of `text`."""
    program = [Compiler(image, cpu).compile(one) for one in files.parse(text, "t.toml", "t")]
    twin = Twin(image, cpu, liberties or Liberties.each(Takes.ALWAYS))
    results = run_on_fake(image, cpu, twin, program, plant, strict)
    assert not any(result.lost or result.senseless for result in results)
    return [one.rule for result in results for one in result.divergences]


HEAD: Final = 'title = "t"\nmanual = "15.16"\nshows = "s"\n'


def _own(
    flush: str, then: str = "read a+8", change: str = "&guest.b.pte", before: str = "read a", head: str = ""
) -> str:
    return HEAD + f'''
[[op]]
vmcb = "cr4"
set = ["pge"]
{head}
[[op]]
run = ["{before}", "write guest.a.pte = {change}", "{flush}", "{then}"]
'''


def _exit(ops: str, then: str = "read a+8", entry: str = "nested.a.pte", before: str = "read a") -> str:
    return HEAD + f'''
[[op]]
run = ["{before}"]
[[op]]
entry = "{entry}"
frame = "b"
[[op]]
vmcb = "tlb_control"
value = 0
{ops}
[[op]]
run = ["{then}"]
'''


CONTROL: Final = '[[op]]\nvmcb = "tlb_control"\nvalue = {}\n'
BROKEN: Final = {
    "INVLPG does nothing": (rules.INVLPG, _own("invlpg a")),
    "INVLPG does nothing for a dirty page": (rules.INVLPG, _own("invlpg a", "write a+8", before="write a")),
    "INVLPG does nothing: a stale dirty bit": (
        rules.INVLPG, _own("invlpg a", "write a+8", "&guest.a.pte+a", "write a")),
    "INVLPG does nothing: a stale accessed bit": (rules.INVLPG, _own("invlpg a", change="&guest.a.pte")),
    "INVLPG does nothing for a right taken": (
        rules.INVLPG, _own("invlpg a", "write a+8", "&guest.a.pte-rw", "write a")),
    "MOV CR3 does nothing": (rules.CR3, _own("wrcr3 = &vmcb.cr3")),
    "CR4.PGE toggled does nothing": (rules.CR4, _own("wrcr4 = &vmcb.cr4-pge")),
    "a global entry survives CR4.PGE": (rules.CR4, _own(
        "wrcr4 = &vmcb.cr4-pge", head='[[op]]\nentry = "guest.a.pte"\nset = ["g"]')),
    "a right given shows only behind a flush": (rules.UPGRADE, _own(
        "rdflags", "write a+8", "&guest.a.pte+rw", head='[[op]]\nentry = "guest.a.pte"\nclear = ["rw"]')),
    "a page made present shows only behind a flush": (rules.UPGRADE, _own(
        "rdflags", "read a+8", "&guest.a.pte+p", "rdcr0", head='[[op]]\nentry = "guest.a.pte"\nclear = ["p"]')),
    "TLB_CONTROL=1 does nothing": (rules.CONTROL, _exit(CONTROL.format(1))),
    "TLB_CONTROL=1 does nothing for guest entries": (rules.CONTROL, _exit(CONTROL.format(1), entry="guest.a.pte")),
    "TLB_CONTROL=3 does nothing": (rules.CONTROL, _exit(CONTROL.format(3))),
    "TLB_CONTROL=7 does nothing": (rules.CONTROL, _exit(CONTROL.format(7))),
    "the ASID is ignored": (rules.ASID, _exit('[[op]]\nvmcb = "asid"\nvalue = 6\n')),
    "the ASID is ignored for a root": (rules.ASID, HEAD + """
[[op]]
run = ["read a"]
[[op]]
vmcb = "tlb_control"
value = 0
[[op]]
vmcb = "cr3"
frame = "alt"
[[op]]
vmcb = "asid"
value = 6
[[op]]
run = ["read a+8"]
"""),
    "INVLPGA does nothing": (rules.INVLPGA, _exit('[[op]]\ninvlpga = "a"\nasid = 5\n', entry="guest.a.pte")),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "pipelined"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(
    name: str, strict: bool, image: Image, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, text = BROKEN[name]
    by_asid = cpu._replace(features=cpu.features | WITH_FLUSH_BY_ASID)
    found = _run(image, by_asid, text, _Hoards(monkeypatch, breaks=rule), strict=strict)
    assert found and set(found) == {rule}


@pytest.mark.parametrize("name", BROKEN)
def test_it_is_that_rule(name: str, image: Image, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fault the same scenario agrees."""
    by_asid = cpu._replace(features=cpu.features | WITH_FLUSH_BY_ASID)
    assert _run(image, by_asid, BROKEN[name][1], _Hoards(monkeypatch)) == []


PERMITTED: Final = {
    "no flush": _own("rdcr0"),
    "another page flushed": _own("invlpg c"),
    "a global entry and MOV CR3": _own("wrcr3 = &vmcb.cr3", head='[[op]]\nentry = "guest.a.pte"\nset = ["g"]'),
    "no flush between two runs": _exit(""),
    "a root changed": HEAD + '[[op]]\nrun = ["read a"]\n[[op]]\nvmcb = "tlb_control"\nvalue = 0\n'
                             '[[op]]\nvmcb = "ncr3"\nframe = "nested-alt"\n[[op]]\nrun = ["read a+8"]\n',
    "INVLPGA of another page": _exit('[[op]]\ninvlpga = "c"\nasid = 5\n'),
    "INVLPGA in another ASID": _exit('[[op]]\ninvlpga = "a"\nasid = 6\n'),
    "INVLPG, which flushes no nested translations": _exit("").replace(
        'run = ["read a+8"]', 'run = ["invlpg a", "read a+8"]'),
    "back under the first ASID": _exit('[[op]]\nvmcb = "asid"\nvalue = 6\n[[op]]\nrun = ["read c"]\n'
                                       '[[op]]\nvmcb = "asid"\nvalue = 5\n'),
}


@pytest.mark.parametrize("name", PERMITTED)
def test_permitted_and_seen(
    name: str, image: Image, cpu: Cpu, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old translation is used, and that is right; on a machine known not to keep any it is not."""
    programs = [compiler.compile(one) for one in files.parse(PERMITTED[name], "t.toml", "t")]
    twin = Twin(image, cpu, Liberties.each(Takes.ALWAYS))
    (result,) = run_on_fake(image, cpu, twin, programs, _Hoards(monkeypatch))
    assert result.divergences == [] and not result.lost
    assert (result.stale_permitted, result.stale_seen) == (1, 1)
    monkeypatch.undo()
    twin = Twin(image, cpu, Liberties.each(Takes.ALWAYS))
    (result,) = run_on_fake(image, cpu, twin, programs)
    assert result.divergences == []
    assert (result.stale_permitted, result.stale_seen) == (1, 0)


@pytest.mark.parametrize("name", [name for name in PERMITTED if "run" in name])
def test_the_profile_is_stricter(name: str, image: Image, cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Liberties.each(Takes.ALWAYS, Caches(upper=False, over_vmrun=False))
    found = _run(image, cpu, PERMITTED[name], _Hoards(monkeypatch), profile)
    assert set(found) == {rules.VMRUN}


@pytest.mark.parametrize("which", [OLDEST_FIRST, NEWEST_FIRST])
@pytest.mark.parametrize("name", SWEEPS)
def test_whatever_is_permitted_is_followed(
    name: str, which: int, image: Image, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that uses old translations by the rules agrees on every case."""
    by_asid = cpu._replace(features=cpu.features | WITH_FLUSH_BY_ASID)
    sweep = sweepfiles.read(LIBRARY / "sweeps" / f"{name}.toml")
    scenarios = [sweep.scenario(case) for _, case in islice(sequence(sweep.space, 3), 600)]
    compiler, twin = Compiler(image, by_asid), Twin(image, by_asid, Liberties.each(Takes.ALWAYS))
    seen = 0
    for _, group in groupby(sorted(scenarios, key=world_key), world_key):
        for result in run_on_fake(
            image, by_asid, twin, compiler.batch(list(group)), _Hoards(monkeypatch, which), strict=False
        ):
            assert not result.lost
            assert result.divergences == [], result.scenario
            seen += result.stale_seen
        monkeypatch.undo()
    assert seen > 20


def test_reached_only(image: Image, cpu: Cpu) -> None:
    """Faults are never stale (section 5.5.3), unless that very rule is broken."""
    twin = Twin(image, cpu, Liberties())
    twin.search = True
    program = Compiler(image, cpu).compile(files.parse(_own("rdcr0", "write a+8", before="write a"), "t", "t")[0])
    twin.reset(program.world)
    for step in program.steps:
        if step.code == "RUN":
            stale = [walk for walks in twin.predict(step, 0).stale.values() for walk in walks]
            assert stale and all(isinstance(walk.outcome, Reached) for walk in stale)
        else:
            twin.apply(step)
