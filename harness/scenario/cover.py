"""The order in which a sweep's cases are tried: one fixed sequence for each seed, without repetition.

First come cases that have between them every pair of values of two axes that may occur, then such that
have every triple; each is built for as much of what is still missing as it can hold (a greedy covering
array). Behind them follow all other cases in the order of a pseudo-random permutation of their numbers.
So a longer budget is a longer prefix of the same sequence.

    coverage   which pairs and triples some cases have between them
    sequence   the cases in their order, from any position on, or each so many of them
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from random import Random
from typing import Final

from harness.scenario.space import Case, Partial, Space

_ROUNDS: Final = 4
_FIRST_VALUE: Final = 0.5
"""How often, where no value covers more than another, an axis gets its first one: that which changes
nothing, so that what other axes change is seen."""


class Coverage:
    """The pairs and triples of values that cases have not had yet."""

    def __init__(self, space: Space) -> None:
        self.space = space
        every = range(len(space.axis_of))
        self.pair = [space.together[one] & ~(1 << one) for one in every]
        """By a value's number: the values, as bits, with which a pair is missing."""
        self.triple = [[0] * len(every) for _ in every]
        """By the numbers of two values: the values with which a triple is missing."""
        for one in every:
            for other in range(one):
                self.triple[one][other] = self.triple[other][one] = space.third(one, other)
        self.pairs = self.pairs_left = sum(row.bit_count() for row in self.pair) // 2
        """How many pairs there are in all cases, and how many are missing."""
        self.triples = self.triples_left = sum(cell.bit_count() for row in self.triple for cell in row) // 6

    def add(self, case: Case) -> None:
        """Note that a case was had."""
        values = [start + value for start, value in zip(self.space.first, case, strict=False)]
        mask = sum(1 << value for value in values)
        pairs = triples = 0
        for index, one in enumerate(values):
            row = self.pair[one]
            new = row & mask
            if new:
                pairs += new.bit_count()
                self.pair[one] = row & ~mask
            cells = self.triple[one]
            for other in values[:index]:
                cell = cells[other]
                new = cell & mask
                if new:
                    triples += new.bit_count()
                    cells[other] = self.triple[other][one] = cell & ~mask
        self.pairs_left -= pairs // 2
        self.triples_left -= triples // 3


def sequence(
    space: Space, seed: int, start: int = 0, coverage: Coverage | None = None, step: int = 1
) -> Iterator[tuple[int, Case]]:
    """All cases, each once, with positions that grow; from position `start` on, and of those each `step`-th. The same
    for the same arguments, whenever and wherever. `coverage`, made for `space`, has after each case what it and all
    before it cover, those before `start` included; with a `step` it is of no use."""
    had = coverage if coverage is not None else Coverage(space)
    chosen: set[Case] = set()
    position = 0
    for case in _covering(had, Random(seed)):
        chosen.add(case)
        if position >= start and not (position - start) % step:
            yield position, case
        position += 1
    first = start if position <= start else position + (start - position) % step
    for number in range(first - position, space.size, step):
        case = space.at(_permuted(number, space.size, seed))
        if case not in chosen:
            yield position + number, case


def _covering(had: Coverage, random: Random) -> Iterator[Case]:
    """Cases until no pair is missing, then until no triple is; each is noted in `had`."""
    space = had.space
    while had.pairs_left:
        most = max(row.bit_count() for row in had.pair)
        one = random.choice([value for value, row in enumerate(had.pair) if row.bit_count() == most])
        case = _Case(space, random)
        case.put(one)
        case.put(_any(had.pair[one], random))
        for axis in case.rest():
            case.put(case.best(axis, [had.pair]))
        yield case.done(had)
    todo = [(one, other) for one, row in enumerate(had.triple) for other, cell in enumerate(row[:one]) if cell]
    random.shuffle(todo)
    while todo:
        one, other = todo[-1]
        if not had.triple[one][other]:
            todo.pop()
            continue
        case = _Case(space, random)
        case.put(one)
        case.put(other)
        case.put(_any(had.triple[one][other], random))
        for axis in case.rest():
            case.put(case.best(axis, [had.triple[value] for value in case.values]))
        yield case.done(had)


class _Case:
    """A case in the making: `values` by their numbers, in the order in which they were put."""

    def __init__(self, space: Space, random: Random) -> None:
        self.space, self.random = space, random
        self.values: list[int] = []
        self.mask = 0
        self._part = Partial(space)

    def put(self, value: int) -> None:
        axis = self.space.axis_of[value]
        self._part.put(axis, value - self.space.first[axis])
        assert self._part.open, "constraints do not permit this value here"
        self.values.append(value)
        self.mask |= 1 << value

    def rest(self) -> list[int]:
        """The axes that have no value yet, in a random order."""
        had = {self.space.axis_of[value] for value in self.values}
        rest = [axis for axis in range(len(self.space.sizes)) if axis not in had]
        self.random.shuffle(rest)
        return rest

    def best(self, axis: int, missing: list[list[int]]) -> int:
        """The value of `axis` that fits and, with the values that are there, has the most of what is missing:
        `missing` has rows by the numbers of candidates."""
        space, mask, most = self.space, self.mask, -1
        first, kind_of = space.first[axis], space.kind_of
        best: list[int] = []
        fits: dict[int, bool] = {}
        for value in range(first, space.first[axis + 1]):
            kind = kind_of[value]
            if kind not in fits:
                fits[kind] = bool(self._part.room(axis, value - first))
            if fits[kind]:
                gain = 0
                for row in missing:
                    new = row[value] & mask
                    if new:
                        gain += new.bit_count()
                if gain > most:
                    most, best = gain, [value]
                elif gain == most:
                    best.append(value)
        if len(best) == 1 or (best[0] == first and self.random.random() < _FIRST_VALUE):
            return best[0]
        return best[int(self.random.random() * len(best))]

    def done(self, had: Coverage) -> Case:
        case = tuple(value - self.space.first[self.space.axis_of[value]] for value in sorted(self.values))
        had.add(case)
        return case


def _any(values: int, random: Random) -> int:
    """One of the numbers whose bits are set."""
    numbers = [number for number in range(values.bit_length()) if values >> number & 1]
    return numbers[int(random.random() * len(numbers))]


def _permuted(number: int, size: int, seed: int) -> int:
    """Where a pseudo-random permutation of 0 to `size` - 1 takes `number`: a Feistel network over the next
    power of four, walked until it ends within."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = seed.to_bytes(16, "little", signed=True)
    while True:
        left, right = number >> half, number & mask
        for turn in range(_ROUNDS):
            text = right.to_bytes(half // 8 + 1, "little")
            digest = blake2b(text, digest_size=half // 8 + 1, key=key, salt=bytes([turn])).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & mask
        number = left << half | right
        if number < size:
            return number
