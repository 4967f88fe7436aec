"""The kinds of trouble that are not findings. Each message says what to do."""

from __future__ import annotations

from dataclasses import dataclass, field


class TwinwalkError(Exception):
    """Base of all errors that end in a message instead of a traceback."""

    exit_code = 3


class UsageError(TwinwalkError):
    """Wrong use, or a bad input file; the message says where. Exit code 2."""

    exit_code = 2


class LaunchFailed(TwinwalkError):
    """A machine could not be started: exit code 3."""


class WorkerLost(TwinwalkError):
    """A process of the run's own ended before its work was done: exit code 3."""


@dataclass
class MachineLost(TwinwalkError):
    """A machine died or hung while it was in use: exit code 3, never a pass, never a divergence."""

    reason: str
    argv: list[str] = field(default_factory=list)
    log: str = ""
    last_record: str = ""

    def __reduce__(self) -> tuple[type[MachineLost], tuple[object, ...]]:
        """For pickle, which would make an exception anew of what it was first given by position."""
        return MachineLost, (self.reason, self.argv, self.log, self.last_record)

    def __str__(self) -> str:
        parts = [f"machine lost: {self.reason}"]
        if self.last_record:
            parts.append(f"last record: {self.last_record}")
        if self.log:
            parts.append("end of its log:\n" + "\n".join("    " + line for line in self.log.splitlines()))
        if self.argv:
            parts.append("it was started as: " + " ".join(self.argv))
        return "\n".join(parts)
