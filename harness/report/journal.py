"""The journal of a run: each result as soon as it is there, so that nothing checked is lost with the process.

One line of JSON for each scenario, in `FILE.journal` beside the file that `--json` names; when that file
has been written, the journal is removed. One that is still there is of a run that was killed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from harness.errors import UsageError
from harness.lockstep.result import Result
from harness.report.jsonfile import entry


class Journal:
    """A context manager; `result` writes a line, `done` says that it is no longer needed. Without a
    `path` it does nothing."""

    def __init__(self, path: Path | None) -> None:
        if path is not None and path.exists() and not path.is_file():
            path = None  # a pipe or a device: there is nothing beside it
        self._path = path.with_name(path.name + ".journal") if path is not None else None
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._file = self._path.open("w", encoding="utf-8", buffering=1)  # a line at a time
            except OSError as reason:
                raise UsageError(f"--json: cannot write {self._path}: {reason.strerror}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def result(self, result: Result) -> None:
        """Take down one result. A full disk ends the journal, not the run."""
        if self._file is not None:
            try:
                self._file.write(json.dumps(entry(result)) + "\n")
            except OSError:
                self._file = None

    def done(self) -> None:
        """The results are safe elsewhere."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
