"""Errata: divergences that are known, of a named machine and version range, with a reference.

An erratum never changes what is compared: it names what was found. Its predicate is over the
divergence, narrow enough that another bug in the same place is still new.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from harness.errors import UsageError
from harness.lockstep.compare import Divergence
from harness.lockstep.hazards import HAZARDS
from harness.lockstep.quirks import QUIRKS, below
from harness.model.coverage import Cell
from harness.model.entries import A, D

Version = tuple[int, ...]

_KEYS: Final = {"id": str, "title": str, "machine": str, "since": str, "until": str, "checks": list, "fields": list,
                "rules": list, "differs": list, "observed": str, "expected": str, "explanation": str,
                "reference": str, "consequences": bool, "quirk": str, "surfaces": bool,
                "unreachable": list, "severity": str, "shown": list, "fixed": list, "hazard": str, "below": bool}
_MAX_ABOUT: Final = 10_000
_REQUIRED: Final = ("id", "title", "machine", "explanation", "reference")


@dataclass(frozen=True)
class Erratum:
    """A known divergence.

    `fields` and `rules` are patterns (`*` is any text). `differs` lists what expected XOR observed may
    be; `expected` and `observed` are regular expressions over the two as text (integers in hex).
    `since` and `until` are versions, both included; None is no bound. `fixed` are versions that have it right, where
    older series were mended too: the newest of them and all behind it, and of each other one what follows in its own
    series (of the same first two numbers). With `consequences`, accessed
    and dirty bits of the same probe's walk that follow from the erratum belong to it. `quirk`
    names a variation of the walk (harness.lockstep.quirks) under which all agrees: in place of a predicate, or
    beside one that suffices where nothing follows from it. One that
    `surfaces` is seen through a hypervisor that runs L1 on this machine, where it is a quirk in L2's own walks only,
    and its predicate does not hold. One that is `below` is seen in no other way.
    `unreachable` are words of coverage cells (harness.model.coverage), such as a pair of modes: those that have
    them all cannot be reached on such a machine, because L2 does not run. `severity` says what a guest can make of
    it: empty where that is nothing but a wrong value of its own. `shown` are scenarios, each of which shows it wherever
    it is: where one ran and nothing does, it is stale. `hazard`, in place of a predicate, names what the machine does
    not survive (harness.lockstep.hazards): it is not tried.
    """

    id: str
    title: str
    machine: str
    explanation: str
    reference: str
    checks: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    since: Version | None = None
    until: Version | None = None
    differs: tuple[int, ...] = ()
    expected: str = ""
    observed: str = ""
    consequences: bool = False
    quirk: str = ""
    surfaces: bool = False
    unreachable: tuple[str, ...] = ()
    severity: str = ""
    shown: tuple[str, ...] = ()
    fixed: tuple[Version, ...] = ()
    hazard: str = ""
    below: bool = False

    def bars(self, cell: Cell) -> bool:
        """Whether `cell` is one of those that are `unreachable`."""
        words = {word.strip(",") for text in cell for word in text.split()}
        return any(words.issuperset(pattern.split()) for pattern in self.unreachable)

    def holds_for(self, machine: str, version: Version) -> bool:
        """Whether this erratum is of `machine` in `version`; a bound of two numbers covers all of its
        third ones."""
        if machine != self.machine:
            return False
        if self.since is not None and version[: len(self.since)] < self.since:
            return False
        if any(version >= one and (one == max(self.fixed) or version[:2] == one[:2]) for one in self.fixed):
            return False
        return self.until is None or version[: len(self.until)] <= self.until

    def matches(self, divergence: Divergence) -> bool:
        """Whether the predicate holds for `divergence`."""
        if not _is_about(self, divergence.check, divergence.field, divergence.rule):
            return False
        expected, observed = divergence.expected, divergence.observed
        numbers = isinstance(expected, int) and isinstance(observed, int)
        if self.differs and not (numbers and int(expected) ^ int(observed) in self.differs):
            return False
        return bool(re.search(self.expected, _text(expected)) and re.search(self.observed, _text(observed)))


def _is_about(erratum: Erratum, check: str, field: str, rule: str) -> bool:
    return (check in erratum.checks and any(fnmatchcase(field, pattern) for pattern in erratum.fields)
            and any(fnmatchcase(rule, pattern) for pattern in erratum.rules))


class Known:
    """The errata of a machine, as far as they have predicates: which of them may explain a divergence is looked up by
    what that is about."""

    def __init__(self, errata: Iterable[Erratum]) -> None:
        self._errata = [erratum for erratum in errata if erratum.checks]
        self._about: dict[tuple[str, str, str], tuple[Erratum, ...]] = {}

    def about(self, divergence: Divergence) -> tuple[Erratum, ...]:
        """Those that are about its check, field and rule."""
        key = divergence.check, divergence.field, divergence.rule
        found = self._about.get(key)
        if found is None:
            if len(self._about) >= _MAX_ABOUT:
                self._about.clear()
            found = self._about[key] = tuple(erratum for erratum in self._errata if _is_about(erratum, *key))
        return found


def of_layers(errata: Iterable[Erratum], layers: Sequence[tuple[str, Version]]) -> list[Erratum]:
    """The errata of a machine made of `layers`, each with its version: that which runs L1 first, then those below
    it, of which only those count that surface. In the order of the layers."""
    errata = list(errata)
    out = [erratum for erratum in errata if erratum.holds_for(*layers[0]) and not erratum.below]
    for layer in layers[1:]:
        for erratum in errata:
            if (erratum.surfaces or erratum.below) and erratum.holds_for(*layer):
                out.append(replace(erratum, quirk=below(erratum.quirk), checks=()) if erratum.quirk else erratum)
    return out


def outdated(errata: Iterable[Erratum], machine: str, version: Version, ran: Set[str],
             found: Collection[str]) -> list[Erratum]:
    """Those that are said to be of `machine` in `version`, and are not: of whose scenarios some `ran`, while their ids
    are not among those that were `found`."""
    return [erratum for erratum in errata if erratum.holds_for(machine, version) and erratum.id not in found
            and not erratum.below and not ran.isdisjoint(erratum.shown)]


def quirks_of(errata: Iterable[Erratum]) -> dict[str, str]:
    """The quirks that `errata` name, each with its erratum's id."""
    return {erratum.quirk: erratum.id for erratum in errata if erratum.quirk}


def _text(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value:#x}"


def explain(found: Sequence[Divergence], errata: Known) -> list[Divergence]:
    """`found`, of one scenario, each with the id of the erratum that explains it, if one does."""
    if not found:
        return []
    out = []
    causes: list[tuple[Divergence, Erratum]] = []
    for divergence in found:
        for erratum in errata.about(divergence):
            if erratum.matches(divergence):
                causes.append((divergence, erratum))
                divergence = divergence.explained_by(erratum.id)
                break
        out.append(divergence)
    for index, divergence in enumerate(out):
        if divergence.erratum is None:
            for cause, erratum in causes:
                if erratum.consequences and _follows(divergence, cause):
                    out[index] = divergence.explained_by(erratum.id)
                    break
    return out


def _follows(divergence: Divergence, cause: Divergence) -> bool:
    """Whether `divergence` is no more than accessed and dirty bits of the walk of `cause`."""
    if (divergence.op, divergence.probe, divergence.check) != (cause.op, cause.probe, "C2"):
        return False
    before, after = divergence.expected, divergence.observed
    if cause.walk is None or not divergence.field.startswith("entry at sPA "):
        return False
    address = int(divergence.field.split()[3], 16)
    read = [entry for _, _, _, at, entry in cause.walk.trail if at & ~7 == address]
    if not read:
        return False
    values = [read[0] if isinstance(v, str) else v for v in (before, after)]
    return not (values[0] ^ values[1]) & ~((A | D) << 32 | A | D)  # two entries of 32-bit paging are one quadword


def load(folder: Path) -> list[Erratum]:
    """All errata of a folder. Raises UsageError, with the file, for one that is not well-formed."""
    errata: dict[str, Erratum] = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as reason:
            raise UsageError(f"{path}: {reason}") from None
        if table.keys() != {"erratum"} or not isinstance(table["erratum"], list):
            raise UsageError(f"{path}: a file of errata has [[erratum]] tables, and nothing else")
        for entry in table["erratum"]:
            erratum = _erratum(path, entry)
            if erratum.id in errata:
                raise UsageError(f"{path}: there are two errata {erratum.id!r}")
            errata[erratum.id] = erratum
    return list(errata.values())


def _erratum(path: Path, table: Mapping[str, Any]) -> Erratum:
    name = table.get("id", "an erratum without id")
    for key, value in table.items():
        if key not in _KEYS or not isinstance(value, _KEYS[key]):
            raise UsageError(f"{path}: {name}: {key!r} is unknown, or not a {_KEYS.get(key, str).__name__}")
    for key in _REQUIRED:
        if key not in table:
            raise UsageError(f"{path}: {name}: {key!r} is missing")
    for key in ("expected", "observed"):
        try:
            re.compile(table.get(key, ""))
        except re.error as reason:
            raise UsageError(f"{path}: {name}: {key!r} is no regular expression: {reason}") from None
    if table.get("quirk", next(iter(QUIRKS))) not in QUIRKS:
        raise UsageError(f"{path}: {name}: no quirk is called {table['quirk']!r}; there are {', '.join(QUIRKS)}")
    if table.get("hazard", next(iter(HAZARDS))) not in HAZARDS:
        raise UsageError(f"{path}: {name}: no hazard is called {table['hazard']!r}; there are {', '.join(HAZARDS)}")
    predicate = all(table.get(key) for key in ("checks", "fields", "rules"))
    if not (table.get("quirk") or table.get("hazard") or predicate):
        raise UsageError(f"{path}: {name}: it needs checks, fields and rules, or a quirk or a hazard")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    def version(key: str, text: object) -> Version:
        if not isinstance(text, str) or not re.fullmatch(r"\d+(\.\d+)*", text):
            raise UsageError(f"{path}: {name}: {key!r} must be a version such as 7.2, not {text!r}")
        return tuple(map(int, text.split(".")))

    for key in ("since", "until"):
        if key in values:
            values[key] = version(key, values[key])
    values["fixed"] = tuple(version("fixed", text) for text in table.get("fixed", ()))
    return Erratum(**values)
