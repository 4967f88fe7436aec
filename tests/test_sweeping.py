"""Budgets and records: how many cases of which sweep, and where the next run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import MachineLost, UsageError
from harness.lockstep.compare import Divergence
from harness.lockstep.result import Result
from harness.scenario import sweepfiles
from harness.scenario.cover import sequence
from harness.scenario.ops import Scenario
from harness.scenario.program import world_key
from harness.scenario.sweep import Sweep
from harness.sweeping import Plan, Record, Shard, shares


def small(name: str, probes: int = 4) -> Sweep:
    """A sweep of 5 * 2 * 2 * `probes` cases."""
    text = f'''title = "t"
manual = "15.25"
shows = "s"
guest = "{{guest}}"

[axis]
guest = ["4-level", "5-level"]
cpl = [0, 3]
[axis.bits]
as-is = {{}}
{"".join(f'{bit} = {{ set = ["{bit}"] }}{chr(10)}' for bit in ("nx", "g", "a", "d"))}
[axis.probe]
{"".join(f'p{n} = "read a+{8 * n}"{chr(10)}' for n in range(probes))}
[[op]]
entry = "guest.a.pte"
apply = ["bits"]

[[op]]
run = ["{{probe}}"]
cpl = "{{cpl}}"
'''
    return sweepfiles.parse(text, f"{name}.toml", name)


def run(plan: Plan, stop: int | None = None) -> list[str]:
    """Do what the plan says, or `stop` cases of it; their names in order."""
    done: list[str] = []
    for batch in plan.batches():
        assert len({world_key(scenario) for scenario in batch}) == 1
        for scenario in batch:
            if len(done) == stop:
                plan.close()
                return done
            assert not plan.took(scenario, Result(scenario.name, vmruns=1, probes=2), strict=False)
            done.append(scenario.name)
    plan.close()
    return done


def names(sweep: Sweep, count: int, seed: int = 0) -> list[str]:
    return [sweep.case_name(case) for _, case in sequence(sweep.space, seed)][:count]


@given(st.integers(0, 500), st.lists(st.integers(0, 200), max_size=6))
def test_shares_are_fair(budget: int, sizes: list[int]) -> None:
    out = shares(budget, sizes)
    assert sum(out) == min(budget, sum(sizes)) and all(0 <= part <= size for part, size in zip(out, sizes, strict=True))
    cut = [part for part, size in zip(out, sizes, strict=True) if part < size]
    assert all(part <= min(cut) + 1 for part in out) if cut else True


@pytest.mark.parametrize("of", [1, 2, 7, 30])
def test_shards_have_each_case_once(of: int) -> None:
    one, other = small("one"), small("other", 10)
    plans = [Plan([one, other], None, shard=Shard(number, of)) for number in range(1, of + 1)]
    done = [run(plan) for plan in plans]
    assert sorted(name for part in done for name in part) == sorted(names(one, 80) + names(other, 200))
    assert [len(part) for part in done] == [plan.cases for plan in plans]
    assert max(map(len, done)) < 2 * 280 / of + 8


def test_shards_share_a_budget() -> None:
    plans = [Plan([small("one", 100)], 500, seed=4, shard=Shard(number, 3)) for number in (1, 2, 3)]
    done = [run(plan) for plan in plans]
    assert [len(part) for part in done] == [167, 167, 166]
    assert len({name for part in done for name in part}) == 500
    assert [plan.tallies[0].pairs for plan in plans] != [plans[0].tallies[0].pairs_total] * 3


def test_a_budget_is_a_prefix() -> None:
    one, other = small("one"), small("other", 10)
    assert sorted(run(Plan([one, other], 60))) == sorted(names(one, 30) + names(other, 30))
    assert sorted(run(Plan([one, other], 200))) == sorted(names(one, 80) + names(other, 120))
    assert sorted(run(Plan([one], 1_000_000))) == sorted(names(one, 80))
    assert run(Plan([one], 0)) == []


def test_exhaustive() -> None:
    plan = Plan([small("one"), small("other", 10)], None)
    assert plan.cases == 280 and len(set(run(plan))) == 280
    one, other = plan.tallies
    assert (one.done, one.total, one.pairs, one.triples) == (80, 80, one.pairs_total, one.triples_total)
    assert (other.done, other.total, other.vmruns, other.probes) == (200, 200, 200, 400)


def test_what_is_skipped_covers_nothing() -> None:
    """Five levels, say, on a CPU that has four: neither done nor covered."""
    one = small("one")
    plan = Plan([one], None)
    for batch in plan.batches():
        for scenario in batch:
            skipped = "5-level" if scenario.guest == "5-level" else ""
            plan.took(scenario, Result(scenario.name, skipped=skipped), strict=False)
    plan.close()
    (tally,) = plan.tallies
    left = [name for name in names(one, 80) if "4-level" in name]
    assert (tally.done, tally.skipped) == (40, 40) == (len(left), len(left))
    assert tally.pairs == len({pair for name in left for pair in _pairs(one.case(name))}) < tally.pairs_total


def test_too_much_is_refused() -> None:
    joint = sweepfiles.read(Path(__file__).resolve().parents[1] / "scenarios/sweeps/joint.toml", "sweeps/joint")
    with pytest.raises(UsageError, match=rf"{joint.space.size:,} of them of sweeps/joint.*--budget N"):
        Plan([small("one"), joint], None)


def test_seeds() -> None:
    assert sorted(run(Plan([small("one")], 20, seed=3))) == sorted(names(small("one"), 20, 3))
    assert sorted(names(small("one"), 20, 3)) != sorted(names(small("one"), 20))


class TestRecord:
    def record(self, tmp_path: Path, target: str = "tcg") -> Record:
        return Record(tmp_path / "record", target)

    def test_goes_on(self, tmp_path: Path) -> None:
        """Runs with one record do what one longer run does, each case once."""
        parts: list[str] = []
        for budget in (10, 25, 30, 100):
            plan = Plan([small("one")], budget, record=self.record(tmp_path))
            assert plan.tallies[0].before == len(parts)
            parts += run(plan)
        assert sorted(parts) == sorted(names(small("one"), 80)) and len(set(parts)) == 80
        tally = plan.tallies[0]
        assert (tally.done, tally.pairs, tally.triples) == (15, tally.pairs_total, tally.triples_total)
        assert run(Plan([small("one")], 100, record=self.record(tmp_path))) == []

    def test_a_run_that_was_cut_short(self, tmp_path: Path) -> None:
        """What it has not done is done by the next one; what it covered is what it did."""
        plan = Plan([small("one")], 60, record=self.record(tmp_path))
        done = run(plan, stop=37)
        assert plan.tallies[0].done == 37 < 60
        one = small("one")
        pairs = {pair for name in done for pair in _pairs(one.case(name))}
        assert plan.tallies[0].pairs == len(pairs)
        rest = run(Plan([one], 80, record=self.record(tmp_path)))
        assert set(done) | set(rest) == set(names(one, 80))

    def test_half_a_line(self, tmp_path: Path) -> None:
        run(Plan([small("one")], 10, record=self.record(tmp_path)))
        with (tmp_path / "record").open("a") as file:
            file.write('{"sweep": "one", "dig')
        run(Plan([small("one")], 10, record=self.record(tmp_path)))
        rest = run(Plan([small("one")], 80, record=self.record(tmp_path)))
        assert sorted(rest) == sorted(names(small("one"), 80)[20:])

    def test_another_sweep_of_that_name(self, tmp_path: Path) -> None:
        run(Plan([small("one")], 10, record=self.record(tmp_path)))
        assert Plan([small("one", 5)], 10, record=self.record(tmp_path)).tallies[0].before == 0
        assert Plan([small("one")], 10, seed=1, record=self.record(tmp_path)).tallies[0].before == 0
        assert Plan([small("one")], 10, record=self.record(tmp_path)).tallies[0].before == 10

    def test_another_target(self, tmp_path: Path) -> None:
        run(Plan([small("one")], 10, record=self.record(tmp_path)))
        with pytest.raises(UsageError, match="record:1: this record is of another target"):
            self.record(tmp_path, "tcg of another version")

    @pytest.mark.parametrize("text", ["nonsense\n{}\n", "[1]\n{}\n"])
    def test_no_record(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "record").write_text(text)
        with pytest.raises(UsageError, match="record:1: this is no line of a record"):
            self.record(tmp_path)

    def test_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--record: cannot use"):
            Record(tmp_path / "no" / "folder", "tcg")

    def test_lines_are_json(self, tmp_path: Path) -> None:
        run(Plan([small("one"), small("other")], 10, record=self.record(tmp_path)))
        lines = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
        assert [(line["sweep"], line["next"], line["seed"]) for line in lines] == [("one", 5, 0), ("other", 5, 0)]


def _pairs(case: tuple[int, ...]) -> Iterable[tuple[int, int, int, int]]:
    return ((a, case[a], b, case[b]) for b in range(len(case)) for a in range(b))


class TestTally:
    def results(self, *found: Divergence, lost: MachineLost | None = None, senseless: str = "") -> tuple[Plan, bool]:
        plan = Plan([small("one")], 4)
        (scenario, *_), *_ = plan.batches()
        result = Result(scenario.name, divergences=list(found), lost=lost, senseless=senseless)
        return plan, plan.took(scenario, result, strict=False)

    def divergence(self, erratum: str | None) -> Divergence:
        return Divergence("one", 0, 0, "C1", "value", 1, 2, "write", erratum=erratum)

    def test_known_ones_are_counted(self) -> None:
        plan, more = self.results(self.divergence("e1"), self.divergence("e1+e2"))
        (tally,) = plan.tallies
        assert not more and (tally.known, tally.known_cases) == ({"e1": 2, "e2": 1}, {"e1": 1, "e2": 1})
        assert tally.divergences_new == 0

    def test_new_ones_are_told(self) -> None:
        plan, more = self.results(self.divergence("e1"), self.divergence(None))
        assert more and plan.tallies[0].divergences_new == 1 and not plan.tallies[0].known

    def test_what_cannot_be_decided_is_told(self) -> None:
        assert self.results(lost=MachineLost("gone"))[1] and self.results(senseless="x.toml:3: why")[1]

    def test_strict(self) -> None:
        plan = Plan([small("one")], 4)
        scenario: Scenario = next(iter(plan.batches()))[0]
        assert plan.took(scenario, Result(scenario.name, divergences=[self.divergence("e1")]), strict=True)
