"""A sweep: a template of ops, and axes whose values fill it in. Every combination is a case: a scenario.

`harness.scenario.sweepfiles` reads them from files; `harness.scenario.space` has the combinations, which
are never listed, and `harness.scenario.cover` the order in which they are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Final, NamedTuple

from harness.model.entries import BITS, LEVEL_NAMES, PAGE_SHIFTS, Format
from harness.model.registers import Cpu
from harness.model.vmrun import table_format
from harness.scenario.initial import INITIAL_HOST
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import NO_NESTED_PAGING, Op, Scenario
from harness.scenario.space import Case, Constraint, Space
from harness.scenario.world import PAGES

WORLD: Final = ("guest", "nested", "guest_page", "nested_page")
"""The keys of a sweep, and of a scenario, that say in which world it plays."""


@dataclass(frozen=True, eq=False)
class Value:
    """One value of an axis: its `name` in the names of cases, the `text` that stands for {axis}, and what an
    op that applies the axis gets of it: keys of that op."""

    name: str
    text: str
    keys: Mapping[str, Any]


class Axis(NamedTuple):
    """One axis of a sweep: its name, and its values in order."""

    name: str
    values: tuple[Value, ...]

    def number(self, name: str) -> int:
        """The place of the value of that name. Raises KeyError."""
        for index, value in enumerate(self.values):
            if value.name == name:
                return index
        raise KeyError(name)


@dataclass(frozen=True)
class Slot:
    """One op of the template. Axes are given by number, choices as the numbers of their values.

    `ops` has what becomes of the op for each choice of `axes`: None where nothing is left to do, because
    all axes that it `applies` say nothing (and it says nothing itself). `names` has the entry that is
    written, for each choice of `naming`. `place` are the axes that say where something is changed, and
    nothing else in the sweep.
    """

    axes: tuple[int, ...]
    ops: Mapping[tuple[int, ...], Op | None]
    line: int
    applies: tuple[int, ...] = ()
    naming: tuple[int, ...] = ()
    names: Mapping[tuple[int, ...], str] = field(default_factory=dict)
    place: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rule:
    """Combinations in which all of `when` holds are left out; with `then`, only those in which not all of
    that holds. Both by axis, with the numbers of values."""

    reason: str
    when: Mapping[int, frozenset[int]]
    then: Mapping[int, frozenset[int]] = field(default_factory=dict)


Table = tuple[tuple[int, ...], Mapping[tuple[int, ...], str]]
"""Axes, and a text for each choice of their values."""


@dataclass(frozen=True)
class Sweep:
    """Cases are tuples of numbers of values, one for each of `axes` (see harness.scenario.space). `world`
    has for each key of WORLD its axes, and its value for each choice of their values."""

    name: str
    title: str
    manual: str
    shows: str
    source: str
    axes: tuple[Axis, ...]
    world: Mapping[str, Table]
    slots: tuple[Slot, ...]
    rules: tuple[Rule, ...]

    @cached_property
    def space(self) -> Space:
        """Its cases. Raises space.TooTangled."""
        sizes = [len(axis.values) for axis in self.axes]
        return Space(sizes, list(self._constraints()), self._world_axes(*WORLD))

    def case_name(self, case: Case) -> str:
        """The name of one case: `sweeps/joint[4-level,4K,...]`, a value for each axis in the file's order."""
        return f"{self.name}[{','.join(axis.values[n].name for axis, n in zip(self.axes, case, strict=True))}]"

    def case(self, name: str) -> Case:
        """The case of that name. Raises ValueError, saying why, for one that is not of this sweep."""
        inside = name.removeprefix(f"{self.name}[").removesuffix("]").split(",")
        if len(inside) != len(self.axes):
            raise ValueError(f"{len(inside)} values for the {len(self.axes)} axes "
                             f"{', '.join(axis.name for axis in self.axes)}")
        numbers = []
        for axis, text in zip(self.axes, inside, strict=True):
            try:
                numbers.append(axis.number(text))
            except KeyError:
                known = ", ".join(value.name for value in axis.values)
                raise ValueError(f"{axis.name} has no value {text!r}; there are {known}") from None
        case = tuple(numbers)
        if case not in self.space:
            raise ValueError(f"the sweep leaves this combination out: {self.why_not(case)}")
        return case

    def why_not(self, case: Case) -> str:
        """The reason by which a combination is left out; empty for one that is not."""
        for rule in self.rules:
            if _all(rule.when, case) and not (rule.then and _all(rule.then, case)):
                return rule.reason
        if case not in self.space:
            return "it names an entry or a page size that its modes do not have, or a place where it changes nothing"
        return ""

    def scenario(self, case: Case) -> Scenario:
        """The scenario that a case is."""
        ops, lines = [], []
        for slot in self.slots:
            op = slot.ops[tuple(case[axis] for axis in slot.axes)]
            if op is not None:
                ops.append(op)
                lines.append(slot.line)
        guest, nested, guest_page, nested_page = (
            table[tuple(case[axis] for axis in axes)] for axes, table in (self.world[key] for key in WORLD)
        )
        return Scenario(
            self.case_name(case), self.title, self.manual, self.shows, tuple(ops), guest, nested, guest_page,
            nested_page, self.source, tuple(lines),
        )

    # --- which combinations there are -----------------------------------------------------------------

    def _constraints(self) -> Iterator[Constraint]:
        for mode, page, sizes in (("guest", "guest_page", _guest_pages), ("nested", "nested_page", _nested_pages)):
            axes = self._world_axes(mode, page)
            if axes:
                yield self._over(axes, (), lambda seen, mode=mode, page=page, sizes=sizes:
                                 self._said(page, seen) in sizes(self._said(mode, seen)))
        for slot in self.slots:
            if slot.names or slot.place:
                world = self._world_axes(*WORLD) if slot.names else ()
                yield self._over(tuple(sorted({*slot.applies, *slot.naming, *slot.place, *world})),
                                 {*slot.applies} - {*slot.naming, *slot.place, *world},
                                 lambda seen, slot=slot: self._makes_sense(slot, seen))
        for rule in self.rules:
            yield self._ruled(rule)

    def _world_axes(self, *keys: str) -> tuple[int, ...]:
        return tuple(sorted({axis for key in keys for axis in self.world[key][0]}))

    def _said(self, key: str, seen: Mapping[int, Any]) -> str:
        axes, table = self.world[key]
        return table[tuple(seen[axis] for axis in axes)]

    def _makes_sense(self, slot: Slot, seen: Mapping[int, Any]) -> bool:
        """An op that changes an entry has one to change, with the bits that it changes; one that changes nothing
        is in one case, not in many."""
        reach = max((_reach(self.axes[axis].values[seen[axis]]) for axis in slot.applies), default=1)
        if not reach:
            return not any(seen[axis] for axis in slot.place)
        if not slot.names:
            return True
        name = slot.names[tuple(seen[axis] for axis in slot.naming)]
        return reach <= entry_bits(name, *(self._said(key, seen) for key in WORLD))

    def _over(self, axes: tuple[int, ...], coarse: Collection[int], holds: Callable[..., bool]) -> Constraint:
        """A constraint that sees the number of a value, of `coarse` axes only the first one that has as wide a
        reach."""
        labels = []
        for axis in axes:
            reaches = [_reach(value) for value in self.axes[axis].values]
            labels.append(tuple(reaches.index(reach) if axis in coarse else n for n, reach in enumerate(reaches)))
        return Constraint(axes, tuple(labels), lambda seen: holds(dict(zip(axes, seen, strict=True))))

    def _ruled(self, rule: Rule) -> Constraint:
        axes = tuple(sorted({*rule.when, *rule.then}))
        labels = tuple(
            tuple((n in rule.when.get(axis, ()), n in rule.then.get(axis, ()))
                  for n in range(len(self.axes[axis].values)))
            for axis in axes
        )

        def holds(labels: tuple[Any, ...]) -> bool:
            seen = dict(zip(axes, labels, strict=True))
            if not all(seen[axis][0] for axis in rule.when):
                return True
            return bool(rule.then) and all(seen[axis][1] for axis in rule.then)

        return Constraint(axes, labels, holds)


def _all(wanted: Mapping[int, frozenset[int]], case: Case) -> bool:
    return all(case[axis] in values for axis, values in wanted.items())


def _guest_pages(mode: str) -> tuple[str, ...]:
    return MODES[mode].pages


def _nested_pages(mode: str) -> tuple[str, ...]:
    return (*HOST_MODES[mode].pages, NO_NESTED_PAGING)


@cache
def _reach(value: Value) -> int:
    """0 for a value that changes nothing; 64 for one that sets bits which an entry of 32 bits has not, else 32."""
    named = [BITS.get(name, 0) for name in value.keys.get("set", ())]
    number = value.keys.get("value", 0)
    whole = int(number, 0) if isinstance(number, str) else number
    return 0 if not value.keys else 64 if max([whole, *named]) >> 32 else 32


@cache
def entry_bits(name: str, guest: str, nested: str, guest_page: str, nested_page: str) -> int:
    """Bits of the entry of that name (as `World.entries` has them) that a walk in such a world reads; 0 if there
    is none."""
    dimension, what, level = f"{name}..".split(".")[:3]
    host = HOST_MODES[nested].registers(INITIAL_HOST)
    guest_format = MODES[guest].format(Cpu())
    nested_format = table_format(host.cr0, host.cr4, host.efer, Cpu()) if nested_page != NO_NESTED_PAGING else None
    fmt, page = (guest_format, guest_page) if dimension == "guest" else (nested_format, nested_page)
    if fmt is None or level not in _above(fmt, page if what in PAGES else "4K"):
        return 0
    tables = _above(guest_format, guest_page) if guest_format is not None else []
    if dimension == "nested" and f"{what}e" in LEVEL_NAMES and f"{what}e" not in tables:
        return 0
    return 8 << fmt.entry_shift


def _above(fmt: Format, page: str) -> list[str]:
    """The names of levels down to the one that maps a page of that size."""
    return [level.name for level in fmt.levels if level.shift >= PAGE_SHIFTS[page]]
