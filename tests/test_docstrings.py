"""What is public says what it is, and which errors it raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.conftest import ROOT

MODULES: Final = sorted((ROOT / "harness").rglob("*.py"))
_OURS: Final = {"AssertionError", "NotImplementedError", "SystemExit"}
"""Errors of the program itself, or none."""


class Public(NamedTuple):
    """A class, or a function of a module or of a class, that others may use."""

    where: str
    name: str
    text: str
    raises: frozenset[str]


def _raised(function: ast.AST) -> Iterator[str]:
    """The names of the errors that stand in `raise` statements; what is made elsewhere has no name here."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(error, ast.Name) and error.id[0].isupper() and error.id not in _OURS:
                yield error.id


def _public(where: str, body: list[ast.stmt]) -> Iterator[Public]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            is_class = isinstance(node, ast.ClassDef)
            raises = frozenset() if is_class else frozenset(_raised(node))
            yield Public(f"{where}:{node.lineno}", node.name, ast.get_docstring(node) or "", raises)
            if is_class:
                yield from _public(where, node.body)


def public() -> list[Public]:
    return [one for path in MODULES
            for one in _public(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8")).body)]


def test_each_has_a_docstring() -> None:
    """Or it is one of several of its name, of which the first, the protocol's or the base class's, has one."""
    told = {one.name for one in public() if one.text}
    assert [f"{one.where} {one.name}" for one in public() if not one.text and one.name not in told] == []


def test_errors_are_told() -> None:
    """By name, or where it says Raises."""
    assert [f"{one.where} {one.name}: {', '.join(sorted(one.raises))}" for one in public()
            if one.raises and one.text and "Raises" not in one.text
            and not re.search("|".join(one.raises), one.text)] == []


def test_they_are_looked_at() -> None:
    """One that lacks either is found."""
    bad = "class A:\n 'A'\n def b(self):\n  'Does b.'\n  raise ValueError('x')\ndef c(): pass"
    found = list(_public("x", ast.parse(bad).body))
    assert [(one.name, bool(one.text), one.raises) for one in found] == [
        ("A", True, frozenset()), ("b", True, frozenset({"ValueError"})), ("c", False, frozenset())]
    assert len(public()) > 1000


@pytest.mark.parametrize("folder", ["lockstep", "machine", "model", "report", "scenario", "wire"])
def test_a_package_tells_its_modules(folder: str) -> None:
    """Each once, at the beginning of a line of its list."""
    package = ROOT / "harness" / folder
    text = (package / "__init__.py").read_text(encoding="utf-8")
    told = [name for names in re.findall(r"^ {4}((?:\w+, )*\w+) {2}", text, re.MULTILINE) for name in names.split(", ")]
    assert sorted(told) == sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")


def test_contributing_tells_the_faces() -> None:
    """Each module right under harness/, but those that are open to all."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = "\n".join(line.partition("|")[2] for line in text.partition("## A rule")[0].splitlines() if "|" in line)
    told = set(re.findall(r"`(\w+)`", rows))
    faces = {path.stem for path in (ROOT / "harness").glob("*.py")} - {"__init__", "errors", "places"}
    assert faces == told - {"list", "coverage"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_module_is_told(path: Path) -> None:
    """It begins by saying what it is for."""
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))
