"""The layers of the design: imports only go down, the model is pure, modules are of a size to be read."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# what each layer may import of the others; harness.errors and harness.places are open to all
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "places": set(),
    "model": set(),
    "wire": {"model"},
    "machine": {"wire", "model"},
    "scenario": {"model", "wire"},
    "lockstep": {"model", "wire", "scenario"},
    "report": {"model", "scenario", "lockstep", "wire"},
}
FACES = set(BELOW)
"""Modules right under harness/ may import all of the above, and each other."""

PURE = {"array", "bisect", "collections", "copy", "dataclasses", "enum", "functools", "itertools", "math", "mmap",
        "operator", "struct", "typing", "__future__"}
"""What of the standard library the model may use: no I/O, no clock, no logging."""

MODULES = sorted((ROOT / "harness").rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _layer(path: Path) -> str:
    parts = path.relative_to(ROOT / "harness").parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(source: str) -> set[str]:
    """Full names of all modules that a source imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def against_the_layers(layer: str, names: set[str]) -> set[str]:
    """Those of `names` that `layer` must not import."""
    allowed = BELOW.get(layer)
    bad = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != "harness" or len(parts) == 1:
            continue
        target = parts[1]
        if allowed is None:
            continue
        if target not in allowed | {layer, "errors", "places"}:
            bad.add(name)
    return bad


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_down(path: Path) -> None:
    assert against_the_layers(_layer(path), imported(path.read_text())) == set()


def test_every_package_is_in_the_list() -> None:
    packages = {p.name for p in (ROOT / "harness").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert packages <= BELOW.keys()


@pytest.mark.parametrize("path", [p for p in MODULES if _layer(p) == "model"], ids=_name)
def test_the_model_is_pure(path: Path) -> None:
    names = imported(path.read_text())
    outside = {n.split(".")[0] for n in names} - {"harness"}
    assert outside <= sys.stdlib_module_names | {"__future__"}
    assert outside <= PURE, f"not for the model: {outside - PURE}"
    calls = {n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
             and isinstance(n.func, ast.Name)}
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_lockstep_knows_no_machine(path: Path) -> None:
    """The checks are handed a machine as a protocol; QEMU's name stands in errata alone."""
    if _layer(path) in ("model", "wire", "scenario", "lockstep"):
        outside = {n.split(".")[0] for n in imported(path.read_text())}
        assert not outside & {"subprocess", "socket", "qemu", "elftools", "signal", "pexpect", "multiprocessing"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_size(path: Path) -> None:
    """A module that needs more has more than one job."""
    assert len(path.read_text().splitlines()) <= 400


class TestTheTestItself:
    """A rule that nothing can break would be none."""

    @pytest.mark.parametrize(
        ("layer", "source", "bad"),
        [
            ("model", "from harness.wire import layout", {"harness.wire.layout"}),
            ("model", "import harness.machine.qemu", {"harness.machine.qemu"}),
            ("lockstep", "def f():\n    from harness.machine import tcg", {"harness.machine.tcg"}),
            ("wire", "from harness.scenario.ops import Probe", {"harness.scenario.ops.Probe"}),
            ("machine", "from harness.lockstep.twin import Twin", {"harness.lockstep.twin.Twin"}),
            ("scenario", "from harness import run", {"harness.run"}),
            ("scenario", "from harness.errors import UsageError", set()),
            ("lockstep", "from harness.scenario.ops import Probe\nimport re", set()),
            ("run", "from harness.machine import tcg", set()),
        ],
    )
    def test_against_the_layers(self, layer: str, source: str, bad: set[str]) -> None:
        assert against_the_layers(layer, imported(source)) == bad

    def test_relative_imports(self) -> None:
        with pytest.raises(AssertionError, match="relative"):
            imported("from . import x")
