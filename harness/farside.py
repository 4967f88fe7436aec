"""The far side of a run over SSH: takes units of work from stdin, runs them on a machine of this host, and tells each
result on stdout as soon as it is there. Messages are lines of JSON, see `harness.far`.

It ends when stdin does, or when nothing was heard for a while: with the one who asked, all that was started for him
is gone.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, NoReturn

from harness.errors import LaunchFailed, TwinwalkError, UsageError
from harness.lockstep.errata import Erratum
from harness.machine import kvm_on_tcg
from harness.model.coverage import Cell
from harness.model.registers import Cpu
from harness.scenario.ops import Scenario
from harness.session import Session, Unit
from harness.target import Target
from harness.typed_json import decode, encode

BEAT: Final = 5.0
"""Seconds between two signs of life, in both directions."""
SILENCE: Final = 60.0
"""Seconds without one after which the other side is taken to be gone."""
_GRACE: Final = 5.0


class Link:
    """stdin and stdout, which belong to nobody else here."""

    def __init__(self) -> None:
        self._in: BinaryIO = sys.stdin.buffer
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what prints by mistake does not get between the messages
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self.inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        signal.signal(signal.SIGTERM, _leave)
        for task in (self._listen, self._beat):
            threading.Thread(target=task, daemon=True).start()

    def tell(self, **message: Any) -> None:
        """Send one message, a line of JSON; from any thread."""
        with self._lock:
            self._out.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            self._out.flush()

    def _listen(self) -> None:
        for line in self._in:
            self._heard = time.monotonic()
            message = json.loads(line)
            if "beat" not in message:
                self.inbox.put(message)
        _end()

    def _beat(self) -> None:
        while time.monotonic() - self._heard < SILENCE:
            time.sleep(BEAT)
            try:
                self.tell(beat=True)
            except OSError:
                break
        _end()


def _leave(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _end() -> None:
    """The main thread closes its machine; if it cannot, machines die with the process all the same."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)


def main() -> None:
    """Until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link()
    try:
        _serve(link)
    except UsageError as reason:
        link.tell(error="usage", text=str(reason))
    except LaunchFailed as reason:
        link.tell(error="launch", text=str(reason))
    except TwinwalkError as reason:
        link.tell(error="other", text=str(reason))
    except Exception:
        link.tell(error="other", text=f"twinwalk failed there:\n{traceback.format_exc()}")


def _serve(link: Link) -> None:
    begin = link.inbox.get()
    target = Target(begin["machine"], begin["qemu"], begin["cpu"], tuple(begin["qemu_args"]),
                    decode(kvm_on_tcg.Options, begin["l0"]), lambda text: link.tell(say=text))
    if target.qemu is None and not shutil.which("qemu-system-x86_64"):
        raise LaunchFailed("there is no QEMU (qemu-system-x86_64): install it there (Debian, Ubuntu: apt-get install "
                           "qemu-system-x86), or name its path there with --qemu")
    errata = [decode(Erratum, one) for one in begin["errata"]]
    told: set[Cell] = set()
    with Session(target, errata, begin["pipelined"], begin["keep"], begin["careful"]) as session:
        link.tell(ready=True)
        while True:
            if link.inbox.empty():
                session.rest()
            message = link.inbox.get()
            if "fresh" in message:
                session.shut_down()
                continue
            unit, index = _unit(message)
            for done in session.work(unit):
                reached = session.coverage.cells
                new = reached - told if len(reached) > len(told) else set()
                told |= new
                link.tell(unit=message["unit"], index=index[id(done.scenario)], result=encode(done.result),
                          cells=encode(sorted(new)), records=session.seen, identity=encode(session.identity))
                session.seen.clear()
            link.tell(unit=message["unit"], done=True)


def _unit(message: Mapping[str, Any]) -> tuple[Unit, dict[int, int]]:
    """The unit, and of each scenario in it, by its id(), where the asker has it."""
    index: dict[int, int] = {}
    batches = []
    for batch in message["batches"]:
        scenarios = []
        for at, plain in batch:
            scenario = decode(Scenario, plain)
            index[id(scenario)] = at
            scenarios.append(scenario)
        batches.append(tuple(scenarios))
    made_for = decode(Cpu, message["made_for"]) if message["made_for"] is not None else None
    return Unit(tuple(batches), message["cases"], message["doubtful"], made_for), index
