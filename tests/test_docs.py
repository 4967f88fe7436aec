"""What the documents say one may type: each command is one that twinwalk has, with options that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from harness import observing
from harness.cli import parser
from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_COMMAND = re.compile(r"(?:^ {4}(?:sudo )?|`)\./twinwalk ([a-z][^`\n]*)", re.MULTILINE)
_LAUNCHERS = {"test", "setup"}
"""What the launcher does itself."""


def commands(path: Path) -> list[list[str]]:
    """The arguments of each, without what is said of it."""
    return [shlex.split(text, comments=True) for text in _COMMAND.findall(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands(path: Path) -> None:
    for arguments in commands(path):
        if arguments[0] not in _LAUNCHERS:
            try:
                parser().parse_args(observing.split(arguments)[0])
            except SystemExit:
                pytest.fail(f"{path.relative_to(ROOT)}: twinwalk has no such command: {' '.join(arguments)}")


def test_some_are_found() -> None:
    assert sum(len(commands(path)) for path in DOCUMENTS) > 40


@pytest.mark.parametrize("path", [ROOT / "CHANGELOG.md", *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_width(path: Path) -> None:
    """What is not a row of a table fits into 120 columns; the notes of the matrix are the command's own."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == [] or path.name == "matrix.md"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    """Links to files lead somewhere."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: there is no {target}"
