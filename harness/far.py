"""A session on another host: the same as `harness.session`, with everything but the results left there.

What goes over the wire is what also goes to a worker of harness.pool: units of scenarios out, results back, each as
soon as it is there. A connection that breaks is made anew, and work goes on behind the last result that came: what was
checked is never lost. What comes is data: it is held against the types it must have, and against what was asked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from harness.errors import LaunchFailed, MachineLost, TwinwalkError, UsageError
from harness.lockstep.coverage import Coverage
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result
from harness.machine.l1 import Identity
from harness.model.coverage import Cell
from harness.report.styled import harmless
from harness.scenario.ops import Scenario
from harness.session import Done, Session, Unit
from harness.target import Target
from harness.typed_json import decode, encode

if TYPE_CHECKING:
    from harness.machine.ssh import Far

RETRY: Final = 120.0
"""Seconds for which a broken connection is tried again."""
_PAUSE: Final = 2.0
_WINDOW: Final = 3
"""Units that are given out before the first of them is done: the far side never waits for the next."""
_THERE: Final = "harness.farside"
_MOST_SAID: Final = 8000
"""Characters of what is shown of another host's words."""
_TWICE: Final = 2
"""Times that the connection may break in the same scenario."""


class ConnectionLost(TwinwalkError):
    """A host went away, and was not to be had again: exit code 3."""


class _Out:
    """A unit that was given out: its scenarios, and which of them are told."""

    def __init__(self, number: int, unit: Unit) -> None:
        self.number, self.unit = number, unit
        self.scenarios = [scenario for batch in unit.batches for scenario in batch]
        self.told: set[int] = set()

    def next(self) -> int:
        """The first one without a result."""
        return next((at for at in range(len(self.scenarios)) if at not in self.told), -1)

    def message(self) -> dict[str, Any]:
        """What is left of it."""
        batches, at = [], 0
        for batch in self.unit.batches:
            left = [[at + n, encode(one)] for n, one in enumerate(batch) if at + n not in self.told]
            at += len(batch)
            batches += [left] if left else []
        return {"unit": self.number, "batches": batches, "cases": self.unit.cases, "doubtful": self.unit.doubtful,
                "made_for": encode(self.unit.made_for)}


class FarSession:
    """See harness.session.Session."""

    def __init__(self, target: Target, errata: Sequence[Erratum], pipelined: bool, keep: int = 0,
                 careful: bool = True) -> None:
        assert target.host is not None
        self._target, self._host, self._keep = target, target.host, keep
        self._begin = {
            "machine": target.machine, "qemu": target.qemu, "cpu": target.cpu, "qemu_args": list(target.qemu_args),
            "l0": encode(target.l0), "errata": [encode(one) for one in errata], "pipelined": pipelined,
            "keep": keep, "careful": careful,
        }
        self._far: Far | None = None
        self._messages: Iterator[dict[str, Any]] = iter(())
        self._out: deque[_Out] = deque()
        self._number = 0
        self._broke: tuple[int, int, int] = 0, 0, 0
        """Where the connection broke last (unit, scenario), and how often in a row."""
        self.identity: Identity | None = None
        self.coverage = Coverage()
        self.seen: list[Mapping[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._drop()

    def work(self, unit: Unit) -> Iterator[Done]:
        """As `run`, of one unit."""
        yield from self.run([unit])

    def run(self, units: Iterable[Unit]) -> Iterator[Done]:
        """See Session.run. Raises ConnectionLost too."""
        self._out.clear()
        todo = iter(units)
        while True:
            while len(self._out) < _WINDOW and (unit := next(todo, None)) is not None:
                self._number += 1
                self._out.append(_Out(self._number, unit))
                self._give([self._out[-1]])
            if not self._out:
                return
            done = self._hear()
            if done is not None:
                yield done

    def rest(self) -> None:
        """The far side sees by itself that nothing comes."""

    def held(self) -> Iterator[Done]:
        """None: results are told as they come."""
        yield from ()

    def shut_down(self) -> None:
        """The next unit begins on a machine that is booted for it."""
        self._give([], fresh=True)

    def _give(self, out: Iterable[_Out], fresh: bool = False) -> None:
        """A connection that is not there is made first, or again when something is heard."""
        from harness.machine.ssh import Gone

        if self._far is None:
            if not fresh:
                self._connect()
            return
        try:
            if fresh:
                self._far.tell({"fresh": True})
            for one in out:
                self._far.tell(one.message())
        except Gone:
            pass  # it is seen, with the reason, by who listens

    def _connect(self) -> None:
        """With all that is given out. Raises LaunchFailed."""
        from harness.machine.ssh import Far, Gone, Unreachable

        self._far = Far(self._host, _THERE)
        self._messages = self._far.messages()
        try:
            self._far.tell(self._begin)
            while "ready" not in (message := next(self._messages)):
                self._aside(message)
            for one in self._out:
                self._far.tell(one.message())
        except Gone as reason:
            self._drop()
            raise Unreachable(f"{self._host}: nothing could be run there: {reason}") from None

    def _hear(self) -> Done | None:
        from harness.machine.ssh import Gone

        try:
            message = next(self._messages)
            if self._aside(message):
                return None
            return self._take(message)
        except Gone as reason:
            return self._again(str(reason))
        except (ValueError, KeyError, TypeError, IndexError) as reason:
            raise ConnectionLost(f"{self._host} said what makes no sense: {reason}") from None

    def _take(self, message: Mapping[str, Any]) -> Done | None:
        out = self._out[0]
        if message["unit"] != out.number:
            raise ValueError("a result of another unit than the one it has")
        if message.get("done"):
            self._out.popleft()
            return None
        result, index = decode(Result, message["result"]), message["index"]
        if type(index) is not int or not 0 <= index < len(out.scenarios) or index in out.told:
            raise ValueError("a result that was not asked for")
        scenario = out.scenarios[index]
        if result.scenario != scenario.name:
            raise ValueError("a result of another scenario than the one it has")
        out.told.add(index)
        self._note(message)
        return Done(scenario, result, out.unit.cases)

    def _note(self, message: Mapping[str, Any]) -> None:
        if message["identity"] is not None and self.identity is None:
            self.identity = replace(decode(Identity, message["identity"]), host=str(self._host))
        self.coverage.cells.update(decode(list[Cell], message["cells"]))
        self.seen += [one for one in message["records"] if isinstance(one, dict)][:max(0, self._keep - len(self.seen))]

    def _aside(self, message: Mapping[str, Any]) -> bool:
        """Whether it was a word beside the results. Raises what ended the far side."""
        if "say" in message:
            self._target.say(f"{self._host}: {_harmless(message['say'])}")
            return True
        if (reason := message.get("cannot")) is not None:
            raise LaunchFailed(f"{self._host}: nothing can be run there: {_harmless(reason)}")
        if (kind := message.get("error")) is not None:
            text = _harmless(message.get("text"))
            raise UsageError(text) if kind == "usage" else (LaunchFailed if kind == "launch" else ConnectionLost)(
                f"on {self._host}: {text}")
        return False

    def _again(self, reason: str) -> Done | None:
        """Connect anew; where it broke twice in the same scenario, that is what came of it."""
        from harness.machine.ssh import Unreachable

        self._drop()
        at = (self._out[0].number, self._out[0].next())
        self._broke = (*at, self._broke[2] + 1 if self._broke[:2] == at else 1)
        self._target.say(f"the connection to {self._host} was lost ({reason}): connecting again")
        lost = self._lost(reason) if self._broke[2] >= _TWICE else None
        end = time.monotonic() + RETRY
        while True:
            try:
                self._connect()
                break
            except Unreachable as still:
                if time.monotonic() > end:
                    raise ConnectionLost(f"the connection to {self._host} was lost ({reason}), and was not to be had "
                                         f"again in {RETRY:.0f} s: {still}\nwhat was checked is reported") from None
                time.sleep(_PAUSE)
        self._target.say(f"{self._host} is there again: going on behind the last result")
        return lost

    def _lost(self, reason: str) -> Done | None:
        out = self._out[0]
        if (at := out.next()) < 0:
            return None
        out.told.add(at)
        scenario: Scenario = out.scenarios[at]
        lost = MachineLost(f"the connection to {self._host} was lost {_TWICE} times while this scenario was next: "
                           f"{reason}")
        return Done(scenario, Result(scenario.name, lost=lost), out.unit.cases)

    def _drop(self) -> None:
        if self._far is not None:
            far, self._far = self._far, None
            far.close()


AnySession = Session | FarSession


def session(
    target: Target, errata: Sequence[Erratum], pipelined: bool, keep: int = 0, careful: bool = True
) -> AnySession:
    """Where the target is: here, or on another host."""
    kind = FarSession if target.host else Session
    return kind(target, errata, pipelined, keep, careful)


def _harmless(text: object) -> str:
    """What another host said, fit for a terminal."""
    return harmless(str(text)[:_MOST_SAID])
