"""The cases of a sweep: counted and numbered without being listed, and constraints kept."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.scenario.space import MAX_SOLUTIONS, Case, Constraint, Space, TooTangled


@st.composite
def constraints(draw: st.DrawFn, sizes: list[int]) -> Constraint:
    """Over some axes: combinations of labels that are left out."""
    axes = tuple(sorted(draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1, max_size=3))))
    labels = tuple(tuple(draw(st.integers(0, 2)) for _ in range(sizes[axis])) for axis in axes)
    bad = draw(st.frozensets(st.tuples(*(st.integers(0, 2) for _ in axes)), max_size=4))
    return Constraint(axes, labels, lambda seen: seen not in bad)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[Constraint]]:
    """Axes and constraints, small enough to be listed."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    return sizes, draw(st.lists(constraints(sizes), max_size=4))


def listed(sizes: list[int], given: list[Constraint]) -> list[Case]:
    """All cases, the slow way."""
    def fits(case: Case) -> bool:
        return all(
            one.holds(tuple(labels[case[axis]] for axis, labels in zip(one.axes, one.labels, strict=True)))
            for one in given
        )
    return [case for case in product(*map(range, sizes)) if fits(case)]


@given(problems())
def test_every_case_has_one_number(problem: tuple[list[int], list[Constraint]]) -> None:
    sizes, given = problem
    space, cases = Space(sizes, given), listed(sizes, given)
    assert space.size == len(cases)
    assert sorted(space.at(rank) for rank in range(space.size)) == cases
    assert [space.rank(space.at(rank)) for rank in range(space.size)] == list(range(space.size))
    assert [case for case in product(*map(range, sizes)) if case in space] == cases


@given(problems())
def test_what_goes_together(problem: tuple[list[int], list[Constraint]]) -> None:
    """Pairs and triples that may occur are those that do occur in a case."""
    space = Space(*problem)
    cases = listed(*problem)
    assume(cases)
    rows = [[space.first[axis] + value for axis, value in enumerate(case)] for case in cases]
    pairs = {pair for row in rows for pair in combinations(row, 2)}
    triples = {triple for row in rows for triple in combinations(row, 3)}
    numbers = range(len(space.axis_of))
    assert {p for p in combinations(numbers, 2) if space.together[p[0]] >> p[1] & 1} == pairs
    found = {t for t in combinations(numbers, 3) if space.third(t[0], t[1]) >> t[2] & 1}
    assert found == triples


def test_a_space_that_nobody_could_list() -> None:
    space = Space([20] * 30)
    assert space.size == 20**30
    last = space.at(space.size - 1)
    assert last == (19,) * 30 and space.rank(last) == space.size - 1


def test_values_without_a_difference_are_one_to_it() -> None:
    """A constraint over axes of a thousand values is no burden where it sees two kinds of them."""
    size = 1000
    labels = tuple(value < 10 for value in range(size))
    space = Space([size] * 4, [Constraint((0, 1, 2, 3), (labels,) * 4, lambda seen: any(seen))])
    assert space.size == size**4 - (size - 10) ** 4


def test_too_tangled() -> None:
    size = 100
    labels = tuple(range(size))
    with pytest.raises(TooTangled) as caught:
        Space([size] * 4, [Constraint((0, 2, 3), (labels,) * 3, lambda seen: seen != (0, 0, 0))])
    assert set(caught.value.axes) == {0, 2, 3} and f"{MAX_SOLUTIONS:,}" in str(caught.value)
