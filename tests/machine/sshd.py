"""A real OpenSSH server on loopback, with keys, known hosts and settings of its own in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from getpass import getuser
from pathlib import Path

PREFIX = "twinwalk-far-"


class Sshd:
    """`home` is the HOME of who connects: with it, ssh and twinwalk know the host and have the right key."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.home, self.scratch = folder, folder / "home", folder / "far-tmp"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self.scratch.mkdir()
        there = folder / "far-home"
        there.mkdir()
        (there / ".bashrc").write_text("printf 'what a login script prints'\n")
        for key in (self.folder / "host", self.home / ".ssh" / "id_ed25519", self.folder / "other"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.known = self.home / ".ssh" / "known_hosts"
        self.known.write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        shutil.copy(self.home / ".ssh" / "id_ed25519.pub", folder / "authorized_keys")
        values = {"TMPDIR": str(self.scratch), "HOME": str(there)} | dict(environment)
        self.scratch = Path(values["TMPDIR"])
        (folder / "config").write_text("\n".join([
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {folder / 'host'}", "UsePAM no",
            f"AuthorizedKeysFile {folder / 'authorized_keys'}", "PasswordAuthentication no", "StrictModes no",
            "KbdInteractiveAuthentication no", f"PidFile {folder / 'pid'}", "PermitRootLogin yes",
            "SetEnv " + " ".join(f'{name}="{value}"' for name, value in values.items()), ""]))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def user(self) -> str:
        return getuser()

    @property
    def machine(self) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}/tcg"

    @property
    def environment(self) -> dict[str, str]:
        """Of a twinwalk that connects."""
        kept = {name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"}
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return kept | {"HOME": str(self.home), "XDG_CACHE_HOME": cache}

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        binary = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"])
        assert binary, "no sshd: apt-get install openssh-server, as `./twinwalk test` does"
        self.process = subprocess.Popen([binary, "-D", "-e", "-f", str(self.folder / "config")],
                                        stderr=(self.folder / "log").open("ab"), start_new_session=True)
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < end, (self.folder / "log").read_text()
                time.sleep(0.02)

    def stop(self) -> None:
        """The server, and all connections to it."""
        if self.process is not None:
            connections = self.connections()
            self.process.terminate()
            self.process.wait()
            self.process = None
            _kill(connections)

    def connections(self) -> list[int]:
        """Pids of the processes that serve connections: the server's children."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def cut(self) -> int:
        """Break all connections, hard; how many there were."""
        found = self.connections()
        _kill(found)
        return len(found)

    def left(self) -> list[str]:
        """Folders of runs that are there."""
        return sorted(path.name for path in self.scratch.iterdir())

    def processes(self) -> list[str]:
        """Command lines of processes of runs there."""
        found = []
        for pid in self.pids():
            with suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return [line for line in found if line]

    def pids(self) -> list[int]:
        """Processes whose scratch folder is ours, or below: all of a run there."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and f"TMPDIR={self.scratch}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def clean(self, seconds: float = 60.0) -> bool:
        """Whether no process and no folder is left, within that time."""
        end = time.monotonic() + seconds
        while self.processes() or self.left():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def serving(folder: Path, **environment: str) -> Iterator[Sshd]:
    server = Sshd(folder, environment)
    server.start()
    try:
        yield server
    finally:
        server.stop()
