"""Which scenarios and sweeps a command is about: files, folders, and `-k`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.errors import UsageError
from harness.options import LIBRARY
from harness.scenario import files, sweepfiles
from harness.scenario.ops import Scenario
from harness.scenario.sweep import Sweep


def selection(parser: argparse.ArgumentParser) -> None:
    """The options that say which."""
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE",
                        help="scenario files or folders (default: the library)")
    parser.add_argument("-k", dest="expression", default="", metavar="EXPR",
                        help="only scenarios whose name contains EXPR; `and`, `or` and `not` combine")


class Picked(NamedTuple):
    """What is to be run: scenarios, those among them that are single cases of a sweep, and whole sweeps."""

    scenarios: list[Scenario]
    sweeps: list[Sweep]


def selected(paths: Sequence[Path], expression: str) -> Picked:
    """What is chosen of files and folders (none: the library). Raises UsageError where that is nothing."""
    paths = paths or [LIBRARY]
    chosen = files.load(paths, lambda name: matches(expression, name))
    sweeps = sweepfiles.load(paths, lambda name: matches(expression, name) or any(_terms(expression, name)))
    chosen += _cases(expression, sweeps)
    picked = Picked(chosen, [sweep for sweep in sweeps if matches(expression, sweep.name)])
    if not any(picked):
        raise UsageError(f"-k {expression!r} matches none of the scenarios and sweeps: see `twinwalk list`")
    return picked


def _cases(expression: str, sweeps: Sequence[Sweep]) -> Iterator[Scenario]:
    """The cases of sweeps that an expression names in full, as `sweeps/joint[...]`."""
    for sweep in sweeps:
        for name in _terms(expression, sweep.name):
            try:
                yield sweep.scenario(sweep.case(name))
            except ValueError as reason:
                raise UsageError(f"-k: {name}: {reason}") from None


def _terms(expression: str, sweep: str) -> Iterator[str]:
    """What in an expression is the name of a case of that sweep."""
    for term in expression.split(" or "):
        name = term.strip()
        if name.startswith(f"{sweep}[") and name.endswith("]"):
            yield name


def matches(expression: str, name: str) -> bool:
    """`a and not b or c` over parts of a name; `and` binds closer than `or`."""
    if not expression.strip():
        return True
    alternatives = [group.split(" and ") for group in f" {expression} ".split(" or ")]
    return any(all(_holds(term.split(), expression, name) for term in group) for group in alternatives)


def _holds(term: list[str], expression: str, name: str) -> bool:
    negated = term[:1] == ["not"]
    rest = term[1:] if negated else term
    if len(rest) != 1 or rest[0] in ("and", "or", "not"):
        raise UsageError(f"-k: cannot make sense of {expression!r}; write e.g. 'nested and not write'")
    return (rest[0] in name) != negated
