"""The model with one rule changed, in memory: a source line is replaced, and the functions that come of it
take the place of the real ones wherever the model's users have them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import harness.lockstep
import harness.model
from harness.scenario.ops import Scenario


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in harness.`module`; `scenarios` are files of the library, or a scenario; a
    divergence of `check` in a field that begins with `field` must come of it."""

    module: str
    old: str
    new: str
    scenarios: tuple[str | Scenario, ...]
    check: str
    field: str
    number: int = 1


def modules() -> Iterator[ModuleType]:
    for package in (harness.model, harness.lockstep):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            yield importlib.import_module(found.name)


def mutated(module: ModuleType, old: str, new: str, number: int = 1) -> ModuleType:
    """`module` made anew with the `number`th `old` of its source as `new`."""
    assert module.__file__ is not None
    parts = Path(module.__file__).read_text(encoding="utf-8").split(old)
    assert len(parts) > number, f"{module.__name__} has no {old!r} number {number}: mutations must follow the model"
    source = old.join(parts[:number]) + new + old.join(parts[number:])
    mutant = ModuleType(module.__name__)
    mutant.__file__ = module.__file__
    exec(compile(source, f"{module.__file__} (mutated)", "exec"), mutant.__dict__)
    return mutant


def plant(patch: pytest.MonkeyPatch, name: str, old: str, new: str, number: int = 1) -> None:
    """Change a rule in harness.`name` until `patch` is undone."""
    module = importlib.import_module(f"harness.{name}")
    mutant = mutated(module, old, new, number)
    planted = 0
    for key, real in list(vars(module).items()):
        theirs = vars(mutant).get(key)
        if not callable(real) or getattr(real, "__module__", "") != module.__name__:
            continue
        if isinstance(real, type) and not name.startswith("lockstep"):
            continue  # values must stay what isinstance() takes them for
        for user in modules():
            if vars(user).get(key) is real:
                patch.setattr(user, key, theirs)
                planted += 1
    assert planted
