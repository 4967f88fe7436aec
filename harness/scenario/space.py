"""The cases of a sweep: one value of each axis, wherever no constraint forbids the combination.

A case is a tuple of indices, a value for each axis. Cases are numbered without being listed: axes that
constraints tie together are solved once for each such group, with values between which no constraint
makes a difference taken as one. So the product is known exactly, however large, and any case of it can
be had by its number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import prod
from typing import Final, NamedTuple

Case = tuple[int, ...]
Label = Hashable

MAX_SOLUTIONS: Final = 200_000
"""Of one group of axes: more, and constraints tie too much together to be solved one by one."""


class Constraint(NamedTuple):
    """`labels` has, for each of `axes` and each value of it, all that the constraint sees of that value;
    `holds` says of a label for each axis whether they go together."""

    axes: tuple[int, ...]
    labels: tuple[tuple[Label, ...], ...]
    holds: Callable[[tuple[Label, ...]], bool]


class TooTangled(ValueError):
    """Constraints tie together `axes`, which have more than MAX_SOLUTIONS solutions."""

    def __init__(self, axes: Sequence[int]) -> None:
        super().__init__(f"over {MAX_SOLUTIONS:,} solutions")
        self.axes = axes


class Group:
    """Axes that constraints tie together. Values with the same labels are of one class; a solution is a
    class for each axis. `where` has for each value of each axis the set of solutions with it, a bit each;
    `size` is the number of combinations of values."""

    def __init__(self, axes: tuple[int, ...], sizes: Sequence[int], constraints: Sequence[Constraint]) -> None:
        self.axes = axes
        self._class: list[list[int]] = []  # by axis and value
        self._members: list[list[list[int]]] = []  # by axis and class
        labels: list[list[tuple[Label, ...]]] = []
        for axis in axes:
            seen = [tuple(one.labels[one.axes.index(axis)][value] for one in constraints if axis in one.axes)
                    for value in range(sizes[axis])]
            kinds = list(dict.fromkeys(seen))
            labels.append(kinds)
            self._class.append([kinds.index(label) for label in seen])
            self._members.append([[v for v in range(sizes[axis]) if seen[v] == kind] for kind in kinds])
        self._solutions = self._solve(labels, constraints)
        self._number = {solution: number for number, solution in enumerate(self._solutions)}
        weights = [prod(map(len, self._chosen(solution))) for solution in self._solutions]
        self._before = [0, *accumulate(weights)]
        self.size = self._before[-1]
        self.everything = (1 << len(self._solutions)) - 1
        self.where: dict[int, list[int]] = {}
        for place, axis in enumerate(axes):
            sets = [sum(1 << n for n, solution in enumerate(self._solutions) if solution[place] == kind)
                    for kind in range(len(self._members[place]))]
            self.where[axis] = [sets[kind] for kind in self._class[place]]

    def _solve(self, labels: list[list[tuple[Label, ...]]], constraints: Sequence[Constraint]) -> list[tuple[int, ...]]:
        """Axis by axis; a constraint is looked at as soon as all of its axes have a class."""
        seen_by = [[one for one in constraints if axis in one.axes] for axis in self.axes]
        found: list[tuple[int, ...]] = [()]
        for depth in range(len(self.axes)):
            due = [(lru_cache(None)(one.holds), [(p, seen_by[p].index(one)) for p in map(self.axes.index, one.axes)])
                   for one in constraints if max(map(self.axes.index, one.axes)) == depth]
            longer = ((*part, kind) for part in found for kind in range(len(labels[depth])))
            found = [part for part in longer
                     if all(holds(tuple(labels[p][part[p]][n] for p, n in at)) for holds, at in due)]
            if len(found) > MAX_SOLUTIONS:
                raise TooTangled(self.axes)
        return found

    def _chosen(self, solution: tuple[int, ...]) -> list[list[int]]:
        """By axis, the values that a solution leaves the choice of."""
        return [members[kind] for members, kind in zip(self._members, solution, strict=True)]

    def at(self, rank: int) -> list[int]:
        """Values for the axes, by a number up to `size` - 1."""
        number = bisect_right(self._before, rank) - 1
        rank -= self._before[number]
        values = []
        for members in self._chosen(self._solutions[number]):
            rank, index = divmod(rank, len(members))
            values.append(members[index])
        return values

    def rank(self, values: Sequence[int]) -> int:
        """The number of these values. Raises KeyError for those that constraints forbid."""
        solution = tuple(kinds[value] for kinds, value in zip(self._class, values, strict=True))
        number = self._number[solution]
        rank = 0
        for members, value in reversed(list(zip(self._chosen(solution), values, strict=True))):
            rank = rank * len(members) + members.index(value)
        return self._before[number] + rank


class Space:
    """All cases over axes of `sizes` values that `constraints` permit. Raises TooTangled."""

    def __init__(self, sizes: Sequence[int], constraints: Sequence[Constraint] = ()) -> None:
        self.sizes = tuple(sizes)
        self.groups = [
            Group(_ordered(axes, mine), sizes, mine)
            for axes in _tied(len(sizes), constraints)
            for mine in [[one for one in constraints if one.axes[0] in axes]]
        ]
        self.group_of = {axis: group for group in self.groups for axis in group.axes}
        self.size = prod(group.size for group in self.groups)
        """How many cases there are."""

    def at(self, rank: int) -> Case:
        """The case of that number, 0 to `size` - 1."""
        case = [0] * len(self.sizes)
        for group in self.groups:
            rank, number = divmod(rank, group.size)
            for axis, value in zip(group.axes, group.at(number), strict=True):
                case[axis] = value
        return tuple(case)

    def rank(self, case: Case) -> int:
        """The number of `case`. Raises KeyError for one that constraints forbid."""
        rank = 0
        for group in reversed(self.groups):
            rank = rank * group.size + group.rank([case[axis] for axis in group.axes])
        return rank

    def __contains__(self, case: object) -> bool:
        try:
            return isinstance(case, tuple) and self.rank(case) >= 0
        except KeyError:
            return False

    @cached_property
    def first(self) -> tuple[int, ...]:
        """A number for each value of each axis, its place in one row of all: where each axis' values begin,
        and behind the last where that ends."""
        row = [0]
        for size in self.sizes:
            row.append(row[-1] + size)
        return tuple(row)

    @cached_property
    def axis_of(self) -> tuple[int, ...]:
        """By a value's number: its axis."""
        return tuple(axis for axis, (start, end) in enumerate(pairwise(self.first)) for _ in range(start, end))

    @cached_property
    def together(self) -> list[int]:
        """By a value's number: the set of values, as bits by their numbers, of other axes with which it has
        a case. The value itself is among them if it has one at all."""
        if not self.size:
            return [0] * len(self.axis_of)
        rows = []
        for one, axis in enumerate(self.axis_of):
            group, mine = self.group_of[axis], self._where(one)
            row = 0
            for other, its_axis in enumerate(self.axis_of):
                if its_axis == axis:
                    good = one == other and mine
                elif self.group_of[its_axis] is group:
                    good = mine & self._where(other)
                else:
                    good = mine and self._where(other)
                row |= 1 << other if good else 0
            rows.append(row)
        return rows

    def third(self, one: int, other: int) -> int:
        """The values, as bits by their numbers, that have a case with both of two values of different axes."""
        if not self.together[one] >> other & 1:
            return 0
        candidates = self.together[one] & self.together[other] & ~(1 << one) & ~(1 << other)
        group = self.group_of[self.axis_of[one]]
        if self.group_of[self.axis_of[other]] is group and len(group.axes) > 2:
            both = self._where(one) & self._where(other)
            for axis in group.axes:
                for value in range(self.first[axis], self.first[axis + 1]):
                    if candidates >> value & 1 and not both & self._where(value):
                        candidates &= ~(1 << value)
        return candidates

    def _where(self, value: int) -> int:
        axis = self.axis_of[value]
        return self.group_of[axis].where[axis][value - self.first[axis]]


def _tied(axes: int, constraints: Iterable[Constraint]) -> list[tuple[int, ...]]:
    """The axes in groups: those of one constraint are in one."""
    group = list(range(axes))
    for one in constraints:
        names = {group[axis] for axis in one.axes}
        group = [min(names) if name in names else name for name in group]
    return [tuple(axis for axis in range(axes) if group[axis] == name) for name in sorted(set(group))]


def _ordered(axes: Iterable[int], constraints: Iterable[Constraint]) -> tuple[int, ...]:
    """`axes` in an order in which each constraint can be looked at early."""
    order: dict[int, None] = {}
    left = list(constraints)
    while left:
        nearest = min(left, key=lambda one: len(set(one.axes) - order.keys()))
        left.remove(nearest)
        order.update(dict.fromkeys(nearest.axes))
    return tuple(order | dict.fromkeys(axes))
