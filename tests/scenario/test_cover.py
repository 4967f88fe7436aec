"""The order of a sweep's cases: pairs first, then triples, then the rest; each once; always the same."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations, islice

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.scenario.cover import Coverage, sequence
from harness.scenario.space import Case, Constraint, Space
from tests.conftest import ROOT
from tests.scenario.test_space import listed, problems

LARGE = Space([6, 5, 9, 4, 7, 12, 3, 5, 2, 2, 2, 2, 2, 2])


def tuples(cases: list[Case], size: int) -> set[tuple[tuple[int, int], ...]]:
    """All pairs, or triples, of (axis, value) that the cases have."""
    return {part for case in cases for part in combinations(enumerate(case), size)}


@given(problems(), st.integers(-(2**64), 2**64))
def test_all_cases_once(problem: tuple[list[int], list[Constraint]], seed: int) -> None:
    space = Space(*problem)
    cases = [case for _, case in sequence(space, seed)]
    assert sorted(cases) == listed(*problem)


@given(problems(), st.integers(0, 1000))
def test_pairs_then_triples(problem: tuple[list[int], list[Constraint]], seed: int) -> None:
    """What `Coverage` says is what the cases so far have."""
    space = Space(*problem)
    everything = listed(*problem)
    assume(everything)
    had = Coverage(space)
    assert (had.pairs, had.triples) == (len(tuples(everything, 2)), len(tuples(everything, 3)))
    cases: list[Case] = []
    for _, case in sequence(space, seed, coverage=had):
        new = {part for size in (2, 3) for part in tuples([case], size)} - tuples(cases, 2) - tuples(cases, 3)
        cases.append(case)
        if had.triples_left or had.pairs_left:
            assert new, "a case of a covering array covers something"
        assert had.pairs - had.pairs_left == len(tuples(cases, 2))
        assert had.triples - had.triples_left == len(tuples(cases, 3))
    assert (had.pairs_left, had.triples_left) == (0, 0)


def test_pairs_take_few_cases() -> None:
    """As many as the two longest axes make at the least; half as much again at the most."""
    had = Coverage(LARGE)
    count = next(n for n, _ in enumerate(sequence(LARGE, 0, coverage=had), 1) if not had.pairs_left)
    assert 12 * 9 <= count <= 12 * 9 * 1.5
    assert had.triples_left


@pytest.mark.parametrize("start", [0, 1, 57, 400, 3000])
def test_a_later_start_is_the_same_sequence(start: int) -> None:
    whole = list(islice(sequence(LARGE, 5), 4000))
    assert whole[start:] == list(islice(sequence(LARGE, 5, start), 4000 - start))
    positions = [position for position, _ in whole]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("start", [0, 2, 900])
def test_each_third_case(start: int) -> None:
    whole = list(islice(sequence(LARGE, 5), 4000))
    thirds = [(position, case) for position, case in whole if position >= start and not (position - start) % 3]
    assert thirds == list(islice(sequence(LARGE, 5, start, step=3), len(thirds)))


def test_seeds_differ() -> None:
    def begin(seed: int) -> list[Case]:
        return [case for _, case in islice(sequence(LARGE, seed), 3000)]

    assert begin(1) == begin(1) and begin(1)[:50] != begin(2)[:50]
    assert len(set(begin(1)[2000:]) & set(begin(2)[2000:])) < 50


def test_the_same_in_every_process() -> None:
    code = ("from itertools import islice; from hashlib import sha256\n"
            "from tests.scenario.test_cover import LARGE, sequence\n"
            "print(sha256(repr(list(islice(sequence(LARGE, 3), 2500))).encode()).hexdigest())")
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                       env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 65


def test_fresh_samples_are_spread() -> None:
    """Behind the covering arrays every value of every axis comes about as often as any other."""
    space = Space([4] * 20)
    had = Coverage(space)
    cases = [case for _, case in islice(sequence(space, 1, coverage=had), 6000)][-4000:]
    assert not had.triples_left and len(set(cases)) == 4000
    for axis in range(20):
        for value in range(4):
            assert 850 < sum(case[axis] == value for case in cases) < 1150
