"""A process that does one shard: `python -m harness.shardworker EDITION ARG...`. It writes one line of JSON: the exit
code of that command, its `--json` object, and the end of what it said.

It ends when stdin does, with its machine: so nothing outlives the worker that it was started by.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from harness import cli, places
from harness.shards import OTHER_EDITION

_MOST_SAID: Final = 2_000


def _watch() -> None:
    while os.read(0, 4096):  # sys.stdin has a lock, at which a process that is forked here would wait for this thread
        pass
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    """One shard, by the command line; a line of JSON with its exit code, and what it says, on stdout."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what prints by mistake is no answer
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_watch, daemon=True).start()
    edition, *argv = sys.argv[1:]
    out.write(json.dumps(_work(argv) if edition == places.edition() else {"exit": None, "said": OTHER_EDITION}) + "\n")
    out.flush()


def _work(argv: list[str]) -> dict[str, Any]:
    said = io.StringIO()
    with TemporaryDirectory(prefix="twinwalk-shard-") as folder:
        path = Path(folder) / "result.json"
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                code = cli.main([*argv, f"--json={path}"])
        except SystemExit as reason:  # argparse's
            code = int(reason.code or 0)
        document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return {"exit": code, "document": document, "said": said.getvalue()[-_MOST_SAID:]}


if __name__ == "__main__":
    main()
