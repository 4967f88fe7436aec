"""Sweep files: TOML in, sweeps out, with file and line for every mistake.

    title = "Rights in both dimensions"
    manual = "15.25.5"
    shows = "what to learn from it"
    guest = "{mode}"                       # as in a scenario; {axis} stands for the text of an axis' value

    [axis]
    mode = ["4-level", "PAE"]
    level = ["pte", "pde"]
    probe = ["read", "write", "fetch"]

    [axis.bits]                            # what an op that applies this axis gets; the first changes nothing
    as-is = {}
    read-only = { clear = ["rw"] }

    [[op]]
    entry = "guest.a.{level}"
    apply = ["bits"]

    [[op]]
    run = ["{probe} a"]

    [[unless]]                             # combinations that make no sense, and why
    reason = "L2 has no such thing"
    probe = ["fetch"]
    mode = ["PAE"]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Final

from harness.errors import UsageError
from harness.scenario import files
from harness.scenario.files import REQUIRED, File, substitute
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import DEFAULT_MODE, DEFAULT_PAGE_SIZE, NO_NESTED_PAGING, Op
from harness.scenario.space import TooTangled
from harness.scenario.sweep import WORLD, Axis, Rule, Slot, Sweep, Table, Value

_TOP: Final = {
    "title": str, "manual": str, "shows": str, "guest": str, "nested": str, "guest_page": str, "nested_page": str,
    "axis": dict, "op": list, "unless": list, "only": list,
}
_CHANGES: Final[dict[str, Any]] = {"set": list, "clear": list, "value": (int, str), "frame": str, "asid": (int, str)}
"""What a value of an axis may give to an op."""
_WORLD_DEFAULTS: Final = {
    "guest": DEFAULT_MODE, "nested": DEFAULT_MODE, "guest_page": DEFAULT_PAGE_SIZE, "nested_page": DEFAULT_PAGE_SIZE,
}
_WORLD_NAMES: Final = {
    "guest": tuple(MODES), "nested": tuple(HOST_MODES),
    "guest_page": tuple(dict.fromkeys(size for mode in MODES.values() for size in mode.pages)),
    "nested_page": (*dict.fromkeys(size for mode in HOST_MODES.values() for size in mode.pages), NO_NESTED_PAGING),
}
_NAME: Final = re.compile(r"[^\s,\[\]{}]+")
_MANY: Final = 2000
_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")


def load(paths: Sequence[Path], wanted: Callable[[str], bool] = files.every) -> list[Sweep]:
    """The sweeps of files and folders whose name is `wanted`; those of a folder are named by their path in it."""
    return [
        read(file, name)
        for path in paths
        for file in files.find([path], sweeps=True)
        if wanted(name := files.name_of(file, path))
    ]


def read(path: Path, name: str | None = None) -> Sweep:
    """The sweep of one file, called `name`, by default the file's. Raises UsageError with file and line."""
    return parse(files.text_of(path), str(path), name or path.stem)


def parse(text: str, source: str, name: str) -> Sweep:
    """As `read`, from text; `source` is named in messages."""
    reader = _Reader(File(source, name, text.splitlines()), files.tables(text, source))
    return reader.sweep(name)


@dataclass
class _Reader:
    file: File
    data: Mapping[str, Any]
    axes: tuple[Axis, ...] = ()
    number: dict[str, int] = field(default_factory=dict)

    def sweep(self, name: str) -> Sweep:
        self.file.check(self.data, _TOP, None)
        for key in (*REQUIRED, "axis"):
            if key not in self.data:
                raise self.file.error(None, "", f"{key!r} is missing")
        self.axes = tuple(self.axis(*item) for item in self.data["axis"].items())
        self.number = {axis.name: n for n, axis in enumerate(self.axes)}
        world = {key: self.world(key) for key in WORLD}
        tables = self.data["op"]
        for index, table in enumerate(tables):
            if not isinstance(table, dict):
                raise self.file.error(None, "op", "'op' must be a list of tables: write [[op]]")
            if table.get("apply") and "run" in table:
                raise self.file.error(index, "apply", "a run applies no axis: write {axis} in its probes")
        used = [self.used(index, table) for index, table in enumerate(tables)]
        everywhere = [axes for axes, _ in world.values()] + [axes for part in used for axes in part]
        slots = tuple(self.slot(index, table, everywhere, *used[index]) for index, table in enumerate(tables))
        for axis in self.axes:
            if not any(self.number[axis.name] in axes for axes in everywhere):
                raise self.error(axis.name, f"no op uses the axis {axis.name!r}")
        sweep = Sweep(name, self.data["title"], self.data["manual"], self.data["shows"], self.file.source, self.axes,
                      world, slots, tuple(self.rules()))
        self.check(sweep)
        return sweep

    def check(self, sweep: Sweep) -> None:
        """There are cases, and each value is in one."""
        try:
            space = sweep.space
        except TooTangled as tangled:
            names = ", ".join(self.axes[axis].name for axis in tangled.axes)
            raise self.error("axis", f"constraints tie the axes {names} together, which have {tangled}: use fewer "
                                     "values") from None
        if not space.size:
            raise self.error("axis", "no combination is left")
        for number, axis in enumerate(self.axes):
            for index, value in enumerate(axis.values):
                if not space.together[space.first[number] + index]:
                    raise self.error(axis.name, f"{value.name!r} of {axis.name!r} is in no combination that is left")

    def error(self, key: str, reason: str) -> UsageError:
        """With the line of an axis, or of a key."""
        name = re.escape(key)
        wanted = re.compile(rf"^\s*(\[+\s*axis\s*\.\s*{name}\s*\]|{name}\s*=|\[+\s*{name}\b)")
        line = next((n for n, text in enumerate(self.file.lines, 1) if wanted.match(text)), 1)
        return UsageError(f"{self.file.source}:{line}: {reason}")

    def axis(self, name: str, table: Any) -> Axis:
        if not _NAME.fullmatch(name) or (name in _TOP and name not in WORLD) or name in ("reason", "when", "then"):
            raise self.error(name, f"an axis cannot be called {name!r}")
        if isinstance(table, list):
            items: Mapping[str, Any] = {str(value): str(value) for value in table if isinstance(value, str | int)}
            if len(items) != len(table):
                raise self.error(name, f"the values of {name!r} must be different strings or numbers")
        elif isinstance(table, dict):
            items = table
        else:
            raise self.error(name, f"the axis {name!r} must be a list of values, or a table of them by name")
        if len(items) < 2:
            raise self.error(name, f"the axis {name!r} needs at least two values")
        return Axis(name, tuple(self.value(name, *item) for item in items.items()))

    def value(self, axis: str, name: str, value: Any) -> Value:
        if not _NAME.fullmatch(name):
            raise self.error(axis, f"{name!r} of {axis!r}: a value's name has no blanks, commas, brackets or braces; "
                                   f"with a name in front it may be any text: NAME = {name!r} under [axis.{axis}]")
        if isinstance(value, str):
            return Value(name, value, {})
        if not isinstance(value, dict):
            raise self.error(name, f"{name!r} of {axis!r} must be a text, or a table with some of "
                                   f"{', '.join(_CHANGES)}")
        text = value.get("text", name)
        if not isinstance(text, str):
            raise self.error(name, f"{name!r} of {axis!r}: 'text' must be a string")
        value = {key: content for key, content in value.items() if key != "text"}
        for key, content in value.items():
            if key not in _CHANGES or not isinstance(content, _CHANGES[key]):
                raise self.error(name, f"{name!r} of {axis!r}: {key!r} is unknown, or of the wrong kind; "
                                       f"there are text, {', '.join(_CHANGES)}")
        return Value(name, text, value)

    def world(self, key: str) -> Table:
        text = self.data.get(key, _WORLD_DEFAULTS[key])
        axes = self.mentioned(None, key, text)
        table = {choice: self.filled(text, axes, choice) for choice in self.choices(axes)}
        for result in table.values():
            if result not in _WORLD_NAMES[key]:
                raise self.file.error(None, key, f"{key} must be one of {', '.join(_WORLD_NAMES[key])}, not {result!r}")
        return axes, table

    def used(self, index: int, table: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes that an op mentions in its texts, those in its entry's name, and those that it applies."""
        texts = {key: value for key, value in table.items() if key != "apply"}
        mentioned = self.mentioned(index, "", texts)
        apply = table.get("apply", [])
        if not isinstance(apply, list) or not all(name in self.number for name in apply):
            raise self.file.error(index, "apply", f"'apply' must be a list of axes; there are {', '.join(self.number)}")
        for name in apply:
            if not any(value.keys for value in self.axes[self.number[name]].values):
                raise self.file.error(index, "apply", f"no value of {name!r} changes anything: it can only be "
                                                      f"mentioned, as {{{name}}}")
        return mentioned, self.mentioned(index, "entry", table.get("entry", "")), tuple(self.number[n] for n in apply)

    def slot(
        self, index: int, table: Mapping[str, Any], everywhere: list[tuple[int, ...]], mentioned: tuple[int, ...],
        naming: tuple[int, ...], applies: tuple[int, ...],
    ) -> Slot:
        axes = tuple(sorted({*mentioned, *applies}))
        says_something = any(key in table for key in _CHANGES)
        place = tuple(a for a in mentioned if sum(a in other for other in everywhere) == 1 + (a in naming)
                      and a not in applies)
        return Slot(
            axes,
            _Ops(lambda choice: self.op(index, table, axes, choice, applies), self.some(axes)),
            self.file.line(index, ""),
            () if says_something else applies,
            naming,
            {choice: self.filled(table["entry"], naming, choice) for choice in self.choices(naming)}
            if "entry" in table else {},
            place if applies and not says_something else (),
        )

    def op(
        self, index: int, table: Mapping[str, Any], axes: tuple[int, ...], choice: tuple[int, ...],
        applies: tuple[int, ...],
    ) -> Op | None:
        whole = self.filled({key: value for key, value in table.items() if key != "apply"}, axes, choice)
        for axis in applies:
            keys = self.axes[axis].values[choice[axes.index(axis)]].keys
            for key, content in keys.items():
                whole[key] = [*whole.get(key, []), *content] if isinstance(content, list) else content
        if applies and not any(key in whole for key in _CHANGES):
            return None
        return self.file.op(index, whole)

    def rules(self) -> Iterator[Rule]:
        for kind in ("unless", "only"):
            for number, table in enumerate(self.data.get(kind, [])):
                where = [n for n, text in enumerate(self.file.lines, 1) if re.match(rf"\s*\[\[\s*{kind}\s*\]\]", text)]
                at = f"{self.file.source}:{where[number] if number < len(where) else 1}"
                if not isinstance(table, dict) or not isinstance(table.get("reason"), str):
                    raise UsageError(f"{at}: [[{kind}]] needs a reason")
                rest = {key: value for key, value in table.items() if key != "reason"}
                if kind == "unless":
                    yield Rule(table["reason"], self.wanted(at, rest))
                elif rest.keys() != {"when", "then"}:
                    raise UsageError(f"{at}: [[only]] has 'reason', 'when' and 'then'")
                else:
                    yield Rule(table["reason"], self.wanted(at, rest["when"]), self.wanted(at, rest["then"]))

    def wanted(self, at: str, table: Any) -> dict[int, frozenset[int]]:
        """Axes and some of their values, by number."""
        if not isinstance(table, dict) or not table:
            raise UsageError(f"{at}: a table of axes, with some of their values, is wanted, not {table!r}")
        found = {}
        for name, names in table.items():
            if name not in self.number:
                raise UsageError(f"{at}: no axis is called {name!r}; there are {', '.join(self.number)}")
            axis = self.axes[self.number[name]]
            numbers = set()
            for one in names if isinstance(names, list) else [names]:
                try:
                    numbers.add(axis.number(str(one)))
                except KeyError:
                    raise UsageError(f"{at}: {name} has no value {one!r}; there are "
                                     f"{', '.join(value.name for value in axis.values)}") from None
            found[self.number[name]] = frozenset(numbers)
        return found

    def mentioned(self, index: int | None, key: str, value: Any) -> tuple[int, ...]:
        """The axes of all {axis} in a value."""
        found: set[int] = set()
        for text in _texts(value):
            for name in _PLACEHOLDER.findall(text):
                if name not in self.number:
                    raise self.file.error(index, key, f"no axis is called {name!r}; there are {', '.join(self.number)}")
                found.add(self.number[name])
        return tuple(sorted(found))

    def choices(self, axes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        return product(*(range(len(self.axes[axis].values)) for axis in axes))

    def some(self, axes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """All choices, or, where they are many, those in which all values but one are the first."""
        if prod(len(self.axes[axis].values) for axis in axes) <= _MANY:
            yield from self.choices(axes)
            return
        for place, axis in enumerate(axes):
            for number in range(len(self.axes[axis].values)):
                yield tuple(number if n == place else 0 for n in range(len(axes)))

    def filled(self, value: Any, axes: Sequence[int], choice: Sequence[int]) -> Any:
        texts = {self.axes[a].name: self.axes[a].values[n].text for a, n in zip(axes, choice, strict=True)}
        return substitute(value, texts)


class _Ops(dict[tuple[int, ...], Op | None]):
    """What becomes of an op for each choice of its axes: at first for `some`, so that mistakes are told at once."""

    def __init__(self, make: Callable[[tuple[int, ...]], Op | None], some: Iterable[tuple[int, ...]]) -> None:
        super().__init__((choice, make(choice)) for choice in some)
        self._make = make

    def __missing__(self, choice: tuple[int, ...]) -> Op | None:
        return self.setdefault(choice, self._make(choice))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
