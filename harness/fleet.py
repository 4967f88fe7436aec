"""Shards on many hosts, with Dask's distributed scheduler: it knows the workers, gives each what it can do, and gives
the shards of one that died to another.

A worker runs a shard as a process of its own. What comes back is text; nothing of it is unpickled or executed by us.
The scheduler itself is trusted, as Dask's own messages are pickles: where the network is not, Dask has TLS for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from harness import places
from harness.errors import LaunchFailed, UsageError
from harness.machine.address import SCHEME, parse
from harness.shards import OTHER_EDITION, Answer, Shard, answer

if TYPE_CHECKING:
    from distributed import Client, Future

TRIES: Final = 3
"""Times that a shard is given out: what failed on one host may do on another."""
_CONNECT: Final = 10.0
"""Seconds in which a scheduler must answer."""
_POLL: Final = 0.25
_GRACE: Final = 30.0
"""Seconds in which a process that is no longer wanted ends its machine."""


class Came(NamedTuple):
    """Of a shard: its answer, or why there is none."""

    shard: Shard
    answer: Answer | None
    reason: str = ""


def work(argv: Sequence[str], edition: str) -> str:
    """Runs on a worker, in one of its threads: the line of JSON of harness.shardworker. Ends early, with an empty text,
    where nobody wants it any more."""
    end, begin = os.pipe()
    try:
        process = subprocess.Popen([sys.executable, "-m", "harness.shardworker", edition, *argv], stdin=end,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        os.close(end)
        while _wanted():
            with suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=_POLL)[0]
        return ""
    finally:
        os.close(begin)  # it is told so, also if this process dies
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


def _wanted() -> bool:
    from distributed import get_worker

    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    return task is not None and task.state in ("executing", "long-running")


def _busy(dask_worker: Any) -> int:
    """Runs on a worker: how many shards it is at, those included that nobody wants any more."""
    return len(dask_worker.state.executing)


class Fleet:
    """A context manager: connected to a `scheduler` that is there, or to one that is started, with workers, on `hosts`
    over SSH. Raises UsageError where Dask is not installed, LaunchFailed where nobody answers."""

    def __init__(self, scheduler: str | None, hosts: Path | None) -> None:
        self._scheduler, self._hosts = scheduler, hosts
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            from distributed import Client
        except ImportError:
            raise UsageError("a campaign needs Dask: install it here and on the workers, with pip install "
                             "'twinwalk[fleet]'") from None
        with self._stack as stack:
            where: Any = self._scheduler
            if self._hosts is not None:
                where = stack.enter_context(_cluster(hosts(self._hosts)))
            try:
                self._client: Client = stack.enter_context(
                    Client(where, timeout=_CONNECT, deserializers=["msgpack"], set_as_default=False))
            except (OSError, ValueError) as reason:
                raise LaunchFailed(f"no scheduler answers at {where}: {reason}: start one with `dask scheduler`, and "
                                   "name the address that it prints") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def workers(self) -> int:
        """Shards that are done at once, as things are."""
        return sum(one["nthreads"] for one in self._client.scheduler_info(n_workers=-1)["workers"].values())

    def run(self, shards: Sequence[Shard]) -> Generator[Came, None, None]:
        """Each shard once, as they are done. Raises UsageError if a worker has another twinwalk, or if a command line
        is wrong there. What is not done when the generator is closed is called back."""
        from distributed import as_completed

        out: dict[str, tuple[Future, Shard, int]] = {}

        def give(shard: Shard, tries: int) -> Future:
            future = self._client.submit(work, shard, places.edition(), pure=False)
            out[future.key] = future, shard, tries
            return future

        futures = as_completed([give(shard, 1) for shard in shards], loop=self._client.loop)
        try:
            for future in futures:
                _, shard, tries = out.pop(future.key)
                came = _came(shard, future)
                future.release()
                if came.answer is None and tries < TRIES:
                    futures.add(give(shard, tries + 1))
                else:
                    yield came
        finally:
            if out:
                self._call_back([future for future, _, _ in out.values()])

    def _call_back(self, futures: Sequence[Future]) -> None:
        """And wait until no worker is at it: each ends its machine first."""
        self._client.cancel(futures, force=True)
        end = time.monotonic() + _GRACE
        while any(self._client.run(_busy, on_error="ignore").values()) and time.monotonic() < end:
            time.sleep(_POLL)


def _came(shard: Shard, future: Future) -> Came:
    if future.status != "finished":  # the exception is a pickle: it is not looked at
        return Came(shard, None, "the workers that it was given to died")
    try:
        said = json.loads(future.result())
        code, document = said["exit"], said.get("document")
        text = str(said["said"]).strip()
    except (ValueError, KeyError, TypeError) as reason:
        return Came(shard, None, f"its worker said what makes no sense: {reason}")
    if said["exit"] is None and text == OTHER_EDITION:
        raise UsageError("a worker has another twinwalk than this one: install the same one there")
    if code == UsageError.exit_code:
        raise UsageError(f"on a worker: {text}")
    if document is None:
        return Came(shard, None, text or f"exit code {code}")
    try:
        return Came(shard, answer(document))
    except ValueError as reason:
        return Came(shard, None, f"its worker said what makes no sense: {reason}")


def hosts(path: Path) -> list[dict[str, Any]]:
    """A file of hosts, `[user@]host[:port]` each on a line, as asyncssh wants them. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        raise UsageError(f"--hosts: cannot read {path}: {reason}") from None
    found = []
    for number, text in enumerate(lines, 1):
        name = text.partition("#")[0].strip()
        if not name:
            continue
        try:
            address, kind = parse(SCHEME + name.removeprefix(SCHEME))
        except ValueError as reason:
            raise UsageError(f"{path}:{number}: {reason}") from None
        if kind:
            raise UsageError(f"{path}:{number}: the machine is named with --machine, for all hosts: write "
                             "[user@]host[:port]")
        found.append({"host": address.host} | ({"username": address.user} if address.user else {})
                     | ({"port": address.port} if address.port else {}))
    if not found:
        raise UsageError(f"{path}: there is no host in it: write one [user@]host[:port] on each line")
    return found


def _cluster(found: list[dict[str, Any]]) -> Any:
    """Workers on all of them, and the scheduler on the first. Host keys and logins are those of ~/.ssh, as asyncssh
    reads it; a host that is not known there is refused."""
    try:
        import asyncssh
        from distributed import SSHCluster
    except ImportError:
        raise UsageError("--hosts needs asyncssh: pip install 'twinwalk[fleet]'") from None
    names = [one.pop("host") for one in found]
    try:
        return SSHCluster([names[0], *names], connect_options=[found[0], *found], remote_python=sys.executable)
    except (OSError, RuntimeError, asyncssh.Error) as reason:
        raise LaunchFailed(f"no workers could be started on {', '.join(names)}: {reason}: see that `ssh HOST "
                           f"{sys.executable} -m distributed.cli.dask_worker --help` works for each") from None
