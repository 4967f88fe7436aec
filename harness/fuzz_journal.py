"""The journal of a fuzzing run, which can be killed at any moment and goes on where it was.

It has one line for each program, written as soon as that is checked: that it was done, and what was found in
it, at once. So nothing found is lost, and no program is done twice; half a line, of a run that was killed while it
wrote, is of a program that is done again. Behind each block stands what its programs reached, from which the blocks
behind it are made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from harness.errors import UsageError
from harness.lockstep.signature import Signature
from harness.model.coverage import Cell
from harness.report.catches import Catch
from harness.scenario import files, writer
from harness.scenario.ops import Scenario
from harness.steering import VERSION

_KIND: Final = "twinwalk fuzz"


class FuzzJournal:
    """A context manager. `target` is what is tested, in words; a journal is of one seed and one target. `path` None
    keeps no journal. `done` are programs that were checked before, `catches` what was found by them; the blocks from
    `first` on are still to be made, of which `reached` is what was reached before it."""

    def __init__(self, path: Path | None, seed: int, target: str) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._head = {"journal": _KIND, "programs": VERSION, "seed": seed, "target": target}
        self.done: set[str] = set()
        self.catches: dict[Signature, Catch] = {}
        self.before = self.first = 0
        self.reached: set[Cell] = set()
        self.fresh = True
        """Whether it begins with this run."""

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._read(self._path)
                self._file = self._path.open("a", encoding="utf-8", buffering=1)  # a line at a time
            except (OSError, UnicodeDecodeError) as reason:
                raise UsageError(f"--journal: cannot use {self._path}: {reason}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk has been told of by then
                self._file.close()

    # --- what earlier runs left -------------------------------------------------------------------

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a run that was killed left half a line
            with path.open("r+b") as file:
                file.truncate(len(whole.encode()))
        blocks: dict[int, tuple[int, list[Cell]]] = {}
        counts: Counter[int] = Counter()
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check_head(path, entry)
                    continue
                if isinstance(entry, dict) and "block" in entry:
                    cells = [Cell(*cell) for cell in entry["cells"]]
                    blocks[entry["block"]] = entry["programs"], cells
                    continue
                name = entry if isinstance(entry, str) else self._catch(entry)
                counts[_block_of(name)] += 1
            except (ValueError, KeyError, TypeError, IndexError):
                raise UsageError(f"{path}:{number}: this is no line of a journal of `twinwalk fuzz`: name another "
                                 "file, or take the line out") from None
            self.done.add(name)
        self.fresh = not whole
        self.before = len(self.done)
        if -1 in blocks:
            self.reached.update(blocks[-1][1])
        while self.first in blocks and counts[self.first] >= blocks[self.first][0]:
            self.reached.update(blocks[self.first][1])
            self.first += 1
        self._written = set(blocks)
        self.done = {name for name in self.done if _block_of(name) >= self.first}

    def _check_head(self, path: Path, entry: Any) -> None:
        for key, value in self._head.items():
            if not isinstance(entry, dict) or key not in entry:
                raise KeyError(key)
            if entry[key] != value:
                raise UsageError(f"{path}:1: this journal is of {key} {entry[key]!r}, not of {value!r}: give --journal "
                                 "another file")

    def _catch(self, entry: dict[str, Any]) -> str:
        signature = Signature(*entry["signature"])
        known = self.catches.get(signature)
        if known is None:
            (scenario,) = files.parse(entry["scenario"], entry["program"], entry["program"])
            self.catches[signature] = Catch(signature, entry["what"], scenario)
        else:
            known.count += 1
        return str(entry["program"])

    # --- what this run adds -----------------------------------------------------------------------

    def agreed(self, name: str) -> None:
        """A program was checked, and there is nothing new in it."""
        self._write(name)

    def caught(self, scenario: Scenario, signature: Signature, what: str) -> bool:
        """A program showed something new; whether it is the first to show that."""
        entry = {"program": scenario.name, "signature": list(signature)}
        first = signature not in self.catches
        if first:
            self.catches[signature] = Catch(signature, what, scenario)
            entry |= {"what": what, "scenario": writer.text(scenario)}
        else:
            self.catches[signature].count += 1
        self._write(entry)
        return first

    def block(self, number: int, programs: int, cells: Iterable[Cell]) -> None:
        """A block was made."""
        if self._file is not None and number not in self._written:
            self._write({"block": number, "programs": programs, "cells": sorted(cells)})

    def _write(self, entry: Any) -> None:
        if self._file is None:
            return
        try:
            if self.fresh:
                self._file.write(json.dumps(self._head) + "\n")
                self.fresh = False
            self._file.write(json.dumps(entry) + "\n")
        except OSError as reason:
            raise UsageError(f"--journal: cannot write {self._path}: {reason.strerror}: make room, and start the same "
                             "command again: it goes on") from None


def _block_of(name: str) -> int:
    """The block of `fuzz[SEED,BLOCK,...]`; -1 for what came from a corpus."""
    part = name.partition("[")[2].split(",")[1]
    return int(part) if part != "corpus" else -1
