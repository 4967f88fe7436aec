"""The cases of a sweep: one value of each axis, wherever no constraint forbids the combination.

A case is a tuple of indices, a value for each axis. Cases are numbered without being listed. The values of
a few axes, the hub, are listed with each other; under each such choice the other axes fall into blocks that
no constraint ties to each other, and each block is solved by itself, with values between which no constraint
makes a difference taken as one. So the product is known exactly, however large, and any case of it can be
had by its number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import accumulate, pairwise, product
from math import prod
from operator import itemgetter
from typing import Final, NamedTuple

Case = tuple[int, ...]
Label = Hashable

MAX_SOLUTIONS: Final = 200_000
"""Of the hub, or of one block under all choices of the hub: more, and constraints tie too much together."""


class Constraint(NamedTuple):
    """`labels` has, for each of `axes` and each value of it, all that the constraint sees of that value;
    `holds` says of a label for each axis whether they go together."""

    axes: tuple[int, ...]
    labels: tuple[tuple[Label, ...], ...]
    holds: Callable[[tuple[Label, ...]], bool]

    def label(self, axis: int, value: int) -> Label:
        """What value number `value` of `axis`, which is one of its axes, is called."""
        return self.labels[self.axes.index(axis)][value]


class TooTangled(ValueError):
    """Constraints tie together `axes`, which have more than MAX_SOLUTIONS solutions."""

    def __init__(self, axes: Sequence[int]) -> None:
        super().__init__(f"over {MAX_SOLUTIONS:,} solutions")
        self.axes = axes


class _Solved(NamedTuple):
    """A block under one choice of the hub: its solutions, a class for each axis; by which place the solution
    of a number is found; and the sum of their weights."""

    solutions: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.before[-1]


_Permitted = tuple[
    Callable[[tuple[int, ...]], object], tuple[int, ...], Callable[[tuple[int, ...]], frozenset[object]]]


class Block:
    """Axes that constraints tie together under a choice of the hub. Values with the same labels are of one
    class; a solution is a class for each axis, and weighs as much as it has combinations of values."""

    def __init__(
        self, axes: tuple[int, ...], sizes: Sequence[int], constraints: Sequence[Constraint],
        hub: Sequence[Mapping[int, int]],
    ) -> None:
        self.axes = axes
        self.classes: dict[int, list[int]] = {}
        self._members: list[list[list[int]]] = []  # by axis and class
        for axis in axes:
            seen = [tuple(one.label(axis, value) for one in constraints if axis in one.axes)
                    for value in range(sizes[axis])]
            kinds = {label: number for number, label in enumerate(dict.fromkeys(seen))}
            self.classes[axis] = [kinds[label] for label in seen]
            self._members.append([[v for v in range(sizes[axis]) if seen[v] == kind] for kind in kinds])
        combinations = prod(map(len, self._members))
        if combinations * len(hub) > MAX_SOLUTIONS * 10:
            raise TooTangled(axes)
        solved: dict[tuple[tuple[int, ...], ...], _Solved] = {}
        self.solved: list[_Solved] = []
        """By the number of a choice of the hub."""
        permitted = [self._permitted(one) for one in constraints]
        for choice in hub:
            checks = [(pick, kinds(tuple(choice[axis] for axis in outside))) for pick, outside, kinds in permitted]
            found = tuple(
                solution for solution in product(*(range(len(members)) for members in self._members))
                if all(pick(solution) in kinds for pick, kinds in checks)
            )
            if found not in solved:
                weights = (prod(map(len, self._chosen(solution))) for solution in found)
                solved[found] = _Solved(found, (0, *accumulate(weights)))
            self.solved.append(solved[found])
        if sum(len(one.solutions) for one in solved.values()) > MAX_SOLUTIONS:
            raise TooTangled(axes)
        self._fits: dict[tuple[int, ...], int] = {}
        self._sorts = [(sum(1 << n for n, other in enumerate(self.solved) if other is one), len(one.solutions), [
            {kind: sum(1 << m for m, solution in enumerate(one.solutions) if solution[place] == kind)
             for kind in range(len(members))}
            for place, members in enumerate(self._members)
        ]) for one in solved.values()]
        """For each set of solutions: under which choices of the hub it is, a bit each; how many they are; and by place
        and class those that have it, a bit each."""

    def _permitted(self, one: Constraint) -> _Permitted:
        """A constraint on solutions: what it sees of one; the axes of the hub that it sees too; and, by their values,
        all that it permits to be seen."""
        inside = [self.axes.index(axis) for axis in one.axes if axis in self.axes]
        outside = tuple(axis for axis in one.axes if axis not in self.axes)
        holds = cache(one.holds)

        @cache
        def kinds(values: tuple[int, ...]) -> frozenset[object]:
            chosen = dict(zip(outside, values, strict=True))
            found: list[tuple[int, ...]] = []
            for classes in product(*(range(len(self._members[place])) for place in inside)):
                seen = chosen | {self.axes[place]: self._members[place][kind][0]
                                 for place, kind in zip(inside, classes, strict=True)}
                if holds(tuple(labels[seen[axis]] for axis, labels in zip(one.axes, one.labels, strict=True))):
                    found.append(classes)
            return frozenset(found if len(inside) > 1 else [kind for kind, in found])

        return itemgetter(*inside), outside, kinds

    def _chosen(self, solution: tuple[int, ...]) -> list[list[int]]:
        """By axis, the values that a solution leaves the choice of."""
        return [members[kind] for members, kind in zip(self._members, solution, strict=True)]

    def at(self, choice: int, rank: int) -> list[int]:
        """Values for the axes, by a number, under a choice of the hub."""
        solutions, before = self.solved[choice]
        number = bisect_right(before, rank) - 1
        rank -= before[number]
        values = []
        for members in self._chosen(solutions[number]):
            rank, index = divmod(rank, len(members))
            values.append(members[index])
        return values

    def rank(self, choice: int, values: Sequence[int]) -> int:
        """The number of these values. Raises ValueError for those that constraints forbid."""
        solutions, before = self.solved[choice]
        solution = tuple(self.classes[axis][value] for axis, value in zip(self.axes, values, strict=True))
        number = solutions.index(solution)
        rank = 0
        for members, value in reversed(list(zip(self._chosen(solution), values, strict=True))):
            rank = rank * len(members) + members.index(value)
        return before[number] + rank

    def fits(self, part: tuple[int, ...]) -> int:
        """The choices of the hub, a bit each, under which there is a solution with these classes; -1 is any."""
        found = self._fits.get(part)
        if found is None:
            wanted = [(place, kind) for place, kind in enumerate(part) if kind >= 0]
            found = 0
            for choices, count, having in self._sorts:
                left = (1 << count) - 1
                for place, kind in wanted:
                    left &= having[place][kind]
                if left:
                    found |= choices
            self._fits[part] = found
        return found


class Partial:
    """Values of some axes, and what they leave room for: `open` are the choices of the hub that still go."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.open = space.everything
        self._parts = [(-1,) * len(block.axes) for block in space.blocks]

    def room(self, axis: int, value: int) -> int:
        """The choices of the hub that go with a further value: none if it does not fit."""
        if axis in self._space.free:
            return self.open
        at = self._space.block_of.get(axis)
        if at is None:
            return self.open & self._space.hub_with[axis][value]
        return self.open & self._space.blocks[at].fits(self._part(at, axis, value))

    def put(self, axis: int, value: int) -> None:
        """Give an axis its value, by its place among them: what else is open depends on it."""
        if axis in self._space.free:
            return
        self.open = self.room(axis, value)
        at = self._space.block_of.get(axis)
        if at is not None:
            self._parts[at] = self._part(at, axis, value)

    def _part(self, at: int, axis: int, value: int) -> tuple[int, ...]:
        block, part = self._space.blocks[at], self._parts[at]
        place = block.axes.index(axis)
        return (*part[:place], block.classes[axis][value], *part[place + 1 :])


class Space:
    """All cases over axes of `sizes` values that `constraints` permit; the axes of `hub` are those that tie
    most others together. Raises TooTangled."""

    def __init__(self, sizes: Sequence[int], constraints: Sequence[Constraint] = (), hub: Sequence[int] = ()) -> None:
        self.sizes, self.hub = tuple(sizes), tuple(hub)
        if prod(sizes[axis] for axis in hub) > MAX_SOLUTIONS:
            raise TooTangled(self.hub)
        of_hub = [one for one in constraints if set(one.axes) <= set(hub)]
        choices = [dict(zip(hub, values, strict=True)) for values in product(*(range(sizes[axis]) for axis in hub))]
        self._choices = [
            choice for choice in choices
            if all(one.holds(tuple(one.label(axis, choice[axis]) for axis in one.axes)) for one in of_hub)
        ]
        rest = [one for one in constraints if not set(one.axes) <= set(hub)]
        self.blocks = [
            Block(axes, sizes, [one for one in rest if set(one.axes) & set(axes)], self._choices)
            for axes in _tied([axis for axis in range(len(sizes)) if axis not in hub], rest)
        ]
        tied = {axis for one in constraints for axis in one.axes}
        self.free = frozenset(axis for axis in range(len(sizes)) if axis not in tied and axis not in hub)
        """Axes whose values all go with everything."""
        self.block_of = {axis: at for at, block in enumerate(self.blocks) for axis in block.axes}
        self.hub_with = {
            axis: [sum(1 << n for n, choice in enumerate(self._choices) if choice[axis] == value)
                   for value in range(sizes[axis])]
            for axis in hub
        }
        self._number = {tuple(choice.values()): n for n, choice in enumerate(self._choices)}
        sizes_then = [prod(block.solved[n].size for block in self.blocks) for n in range(len(self._choices))]
        self._before = [0, *accumulate(sizes_then)]
        self.size = self._before[-1]
        """How many cases there are."""
        self.everything = sum(1 << n for n, size in enumerate(sizes_then) if size)
        self._thirds: dict[tuple[int, int], int] = {}

    def at(self, rank: int) -> Case:
        """The case of that number, 0 to `size` - 1."""
        number = bisect_right(self._before, rank) - 1
        rank -= self._before[number]
        case = dict(self._choices[number])
        for block in self.blocks:
            rank, inside = divmod(rank, block.solved[number].size)
            case.update(zip(block.axes, block.at(number, inside), strict=True))
        return tuple(case[axis] for axis in range(len(self.sizes)))

    def rank(self, case: Case) -> int:
        """The number of `case`. Raises ValueError for one that constraints forbid."""
        number = self._number.get(tuple(case[axis] for axis in self.hub))
        if number is None:
            raise ValueError(f"no case {case}")
        rank = 0
        for block in reversed(self.blocks):
            inside = block.rank(number, [case[axis] for axis in block.axes])
            rank = rank * block.solved[number].size + inside
        return self._before[number] + rank

    def __contains__(self, case: object) -> bool:
        try:
            return isinstance(case, tuple) and self.rank(case) >= 0
        except ValueError:
            return False

    @cached_property
    def first(self) -> tuple[int, ...]:
        """A number for each value of each axis, its place in one row of all: where each axis' values begin,
        and behind the last where that ends."""
        return (0, *accumulate(self.sizes))

    @cached_property
    def axis_of(self) -> tuple[int, ...]:
        """By a value's number: its axis."""
        return tuple(axis for axis, (start, end) in enumerate(pairwise(self.first)) for _ in range(start, end))

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """By a value's number: its kind. Values of one axis between which no constraint makes a difference are of
        one, so that what goes with one of them goes with all."""
        kinds: dict[tuple[int, int], int] = {}
        found = []
        for one, axis in enumerate(self.axis_of):
            value, at = one - self.first[axis], self.block_of.get(axis)
            sort = 0 if axis in self.free else value if at is None else self.blocks[at].classes[axis][value]
            found.append(kinds.setdefault((axis, sort), len(kinds)))
        return tuple(found)

    @cached_property
    def kinds(self) -> list[tuple[int, int]]:
        """By the number of a kind: the first of its values, and all of them as bits by their numbers."""
        found: dict[int, tuple[int, int]] = {}
        for value, kind in enumerate(self.kind_of):
            first, values = found.get(kind, (value, 0))
            found[kind] = first, values | 1 << value
        return list(found.values())

    @cached_property
    def together(self) -> list[int]:
        """By a value's number: the set of values, as bits by their numbers, of other axes with which it has
        a case. The value itself is among them if it has one at all."""
        rows = []
        for first, _ in self.kinds:
            with_one = self._with(first)
            rows.append((bool(with_one.open), sum(
                values for other, values in self.kinds
                if self.axis_of[other] != self.axis_of[first] and self._goes(with_one, other)
            )))
        return [rows[kind][1] | rows[kind][0] << one for one, kind in enumerate(self.kind_of)]

    def third(self, one: int, other: int) -> int:
        """The values, as bits by their numbers, that have a case with both of two values of different axes."""
        pair = self.kind_of[one], self.kind_of[other]
        found = self._thirds.get(pair)
        if found is None:
            found = self._thirds[pair] = self._third(one, other)
        return found

    def _third(self, one: int, other: int) -> int:
        if one == other or not self.together[one] >> other & 1:
            return 0
        candidates = self.together[one] & self.together[other] & ~(1 << one) & ~(1 << other)
        both = self._with(one, other)
        near = self._blocks(one, other) - {None}
        for first, values in self.kinds:
            axis = self.axis_of[first]
            if self.block_of.get(axis) in near:
                goes = self._goes(both, first)
            elif both.open == self.everything:
                continue  # all that goes with each goes with both
            else:  # a block of its own is tied to them by the hub alone
                goes = bool(both.open & self._alone[first])
            if not goes:
                candidates &= ~values
        return candidates

    @cached_property
    def _alone(self) -> list[int]:
        """By a value's number: the choices of the hub that go with it."""
        return [self._with().room(axis, value - self.first[axis]) for value, axis in enumerate(self.axis_of)]

    def _with(self, *values: int) -> Partial:
        part = Partial(self)
        for value in values:
            part.put(self.axis_of[value], value - self.first[self.axis_of[value]])
        return part

    def _goes(self, part: Partial, value: int) -> bool:
        return bool(part.room(self.axis_of[value], value - self.first[self.axis_of[value]]))

    def _blocks(self, *values: int) -> set[int | None]:
        return {self.block_of.get(self.axis_of[value]) for value in values}


def _tied(axes: Iterable[int], constraints: Iterable[Constraint]) -> list[tuple[int, ...]]:
    """The axes in groups: those of one constraint are in one."""
    axes = list(axes)
    group = {axis: axis for axis in axes}
    for one in constraints:
        names = {group[axis] for axis in one.axes if axis in group}
        for axis, name in group.items():
            if name in names:
                group[axis] = min(names)
    return [tuple(axis for axis in axes if group[axis] == name) for name in sorted(set(group.values()))]
