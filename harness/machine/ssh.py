"""A connection to another host, as OpenSSH would make it: its ~/.ssh/config, known hosts, keys and agent.

Hosts that are not known are refused; passwords are neither asked for nor taken.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import paramiko

from harness.errors import LaunchFailed
from harness.machine import archive, bootstrap
from harness.machine.address import Address

CONNECT_TIMEOUT: Final = 15.0
"""Seconds, where ~/.ssh/config has none."""
SILENCE: Final = 30.0
"""Seconds without a sign of life after which the other side is taken to be gone."""
_KEEPALIVE: Final = 15
_END_TIMEOUT: Final = 6.0
LONGEST: Final = 64 << 20
"""Bytes of one message at most."""
_MOST_JUNK: Final = 1 << 16
_MOST_SAID: Final = 8 << 10
_NO_PYTHON: Final = 97

_FIND_PYTHON: Final = f"""for p in python3 python3.14 python3.13 python3.12 python3.11; do
v=$($p -c "import sys; print(sys.version_info >= (3, 11), sys.version.split()[0])" 2>/dev/null) || continue
case $v in True*) exec $p -I -c "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))";; esac
old="$old $p is ${{v#* }},"
done
echo "twinwalk-python:$old" >&2
exit {_NO_PYTHON}"""

logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


class Unreachable(LaunchFailed):
    """The host cannot be reached now; perhaps later it can."""


class Gone(Exception):
    """The connection broke; the message says how."""


class _Refuse(paramiko.MissingHostKeyPolicy):
    """Of hosts that are not known: what ssh with StrictHostKeyChecking=yes does."""

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> NoReturn:
        raise _UnknownHost(_fingerprint(key))


class _UnknownHost(Exception):
    pass


def _fingerprint(key: paramiko.PKey) -> str:
    """As ssh shows it."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} SHA256:{digest}"


class _Settings:
    """What ~/.ssh/config and /etc/ssh/ssh_config have for a host; the user's own comes first."""

    def __init__(self, address: Address) -> None:
        found: dict[str, Any] = {}
        for path in ("~/.ssh/config", "/etc/ssh/ssh_config"):
            with suppress(FileNotFoundError):
                try:
                    config = paramiko.SSHConfig.from_path(os.path.expanduser(path))
                    found = dict(config.lookup(address.host)) | found
                except (paramiko.ConfigParseError, paramiko.CouldNotCanonicalize, UnicodeDecodeError,
                        PermissionError) as reason:
                    raise LaunchFailed(f"{path} cannot be used: {reason}") from None
        self.host = str(found.get("hostname", address.host))
        self.user = address.user or str(found.get("user") or getpass.getuser())
        self.port = address.port or int(found.get("port") or 22)
        self.timeout = float(found.get("connecttimeout") or CONNECT_TIMEOUT)
        self.keys = [path for path in map(os.path.expanduser, found.get("identityfile", [])) if os.path.exists(path)]
        self.keys_only = found.get("identitiesonly") == "yes"
        self.known_hosts = [os.path.expanduser(path) for path in str(
            found.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")).split()]
        self.known_hosts.append("/etc/ssh/ssh_known_hosts")
        self.known_as = found.get("hostkeyalias")
        jump = str(found.get("proxyjump", "none"))
        self.proxy = str(found.get("proxycommand", "none")) if jump == "none" else (
            f"ssh -W {shlex.quote(f'[{self.host}]:{self.port}')} {shlex.quote(jump)}")


def connect(address: Address) -> paramiko.SSHClient:
    """Raises Unreachable, or LaunchFailed where trying again does not help, saying what to do."""
    settings = _Settings(address)
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(_Refuse())
    for path in settings.known_hosts:
        with suppress(FileNotFoundError, PermissionError):
            client.load_system_host_keys(path)
    by_hand = f"ssh{f' -p {settings.port}' if settings.port != 22 else ''} {settings.user}@{address.host}"
    sock: Any = None
    try:
        if settings.proxy != "none":
            sock = paramiko.ProxyCommand(settings.proxy)
        client.connect(
            settings.known_as or settings.host, settings.port, settings.user, timeout=settings.timeout,
            banner_timeout=settings.timeout, auth_timeout=settings.timeout, channel_timeout=settings.timeout,
            key_filename=settings.keys,  # type: ignore[arg-type] # several are taken, too
            look_for_keys=not settings.keys_only, sock=sock or _dial(settings),
        )
    except _UnknownHost as key:
        client.close()
        raise LaunchFailed(
            f"{address} is not a known host; its key is {key}. If that is the key it should have, let ssh take it "
            f"down: `{by_hand}`, then run this again") from None
    except paramiko.BadHostKeyException as reason:
        client.close()
        raise LaunchFailed(
            f"{address} has another host key ({_fingerprint(reason.key)}) than the one that is known "
            f"({_fingerprint(reason.expected_key)}): find out why. If it is meant to be so, `ssh-keygen -R "
            f"{_entry(settings)}`, then `{by_hand}`, then run this again") from None
    except paramiko.PasswordRequiredException:
        client.close()
        raise LaunchFailed(f"the key for {settings.user}@{address.host} has a passphrase: give it to your agent with "
                           "`ssh-add`, then run this again") from None
    except paramiko.AuthenticationException as reason:
        client.close()
        raise LaunchFailed(
            f"{address} does not let {settings.user} in ({reason}). No password is tried: `{by_hand}` must work "
            "without one; for that, `ssh-copy-id` puts your key there, `ssh-add` gives it to your agent") from None
    except (paramiko.SSHException, OSError, EOFError) as reason:
        client.close()
        text = str(reason) or type(reason).__name__
        raise Unreachable(f"{address} cannot be reached: {text}: try `{by_hand}`") from None
    transport = client.get_transport()
    assert transport is not None
    transport.set_keepalive(_KEEPALIVE)
    return client


def _entry(settings: _Settings) -> str:
    host = settings.known_as or settings.host
    return host if settings.port == 22 else shlex.quote(f"[{host}]:{settings.port}")


def _dial(settings: _Settings) -> socket.socket:
    return socket.create_connection((settings.host, settings.port), settings.timeout)


class Far:
    """twinwalk on another host, ready for messages: a context manager. All that it is there ends with the block: its
    processes, its folder."""

    def __init__(self, address: Address, module: str) -> None:
        """`module` is what is run there, by its main(). Raises Unreachable or LaunchFailed, saying what to do, if it
        cannot be had."""
        self._address, self._module = address, module
        self._said = b""
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._client = connect(address)
        try:
            transport = self._client.get_transport()
            assert transport is not None
            self._channel = transport.open_session(timeout=CONNECT_TIMEOUT)
            self._channel.settimeout(1.0)
            self._begin()
        except (paramiko.SSHException, OSError, EOFError) as reason:
            self.close()
            raise Unreachable(f"{address}: the connection broke at once: {reason}") from None
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _begin(self) -> None:
        packed = archive.pack()
        text = Path(bootstrap.__file__).read_bytes()
        head = {"size": len(packed), "sha256": hashlib.sha256(packed).hexdigest(), "packages": archive.PACKAGES,
                "cache": archive.CACHE, "module": self._module, "environment": {"CC": archive.compiler()}}
        self._channel.exec_command(f"exec sh -c {shlex.quote(_FIND_PYTHON)}")
        try:
            self._write(b"%d\n%s" % (len(text), text))
            self._write(json.dumps(head).encode() + b"\n" + packed)
        except Gone:
            pass  # it has ended already: it said why
        try:
            self._find_magic()
        except Gone as reason:
            raise self._failure(str(reason)) from None

    def _find_magic(self) -> None:
        for line in self._lines(_MOST_JUNK):
            if line == bootstrap.MAGIC:
                return

    def _failure(self, reason: str) -> LaunchFailed:
        status = self._channel.recv_exit_status() if self._channel.exit_status_ready() else -1
        said = self._said.decode(errors="replace").strip()
        if status == _NO_PYTHON:
            found = said.rpartition("twinwalk-python:")[2].strip().rstrip(",")
            return LaunchFailed(f"{self._address} has no Python 3.11 or later{f' ({found})' if found else ''}: install "
                                "one there, so that `python3` or `python3.11` is on the PATH of a command over ssh")
        return LaunchFailed(f"{self._address}: nothing could be run there ({reason}, status {status}): {said}")

    def _beat(self) -> None:
        while not self._over.wait(5.0):
            try:
                self.tell({"beat": True})
            except Gone:
                return

    def tell(self, message: Mapping[str, Any]) -> None:
        """Raises Gone."""
        self._write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        with self._lock:
            view, last = memoryview(data), time.monotonic()
            while view:
                try:
                    view = view[self._channel.send(view[:1 << 15].tobytes()):]
                    last = time.monotonic()
                except TimeoutError:
                    if time.monotonic() - last > SILENCE:
                        raise Gone(f"it took nothing for {SILENCE:.0f} s") from None
                except (OSError, EOFError, paramiko.SSHException) as reason:
                    raise Gone(str(reason) or "it was closed") from None

    def messages(self) -> Iterator[dict[str, Any]]:
        """What comes, signs of life left out. Raises Gone when the connection breaks, or makes no sense."""
        for line in self._lines(LONGEST):
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise Gone(f"it said {line[:60]!r}, which is no message") from None
            if not isinstance(message, dict):
                raise Gone(f"it said {line[:60]!r}, which is no message")
            if "beat" not in message:
                yield message

    def _lines(self, longest: int) -> Iterator[bytes]:
        while True:
            at = self._buffer.find(b"\n")
            if at >= 0:
                line = bytes(self._buffer[:at])
                del self._buffer[:at + 1]
                yield line
            elif len(self._buffer) > longest:
                raise Gone(f"it said more than {longest} bytes that are no message")
            else:
                self._buffer += self._receive()

    def _receive(self) -> bytes:
        last = time.monotonic()
        while True:
            try:
                data = self._channel.recv(1 << 16)
            except TimeoutError:
                data = None
            except (OSError, EOFError, paramiko.SSHException) as reason:
                raise Gone(str(reason)) from None
            while self._channel.recv_stderr_ready():
                self._said = (self._said + self._channel.recv_stderr(1 << 16))[-_MOST_SAID:]
            if data:
                return data
            if data is not None:
                self._channel.status_event.wait(1.0)
                raise Gone(self._how())
            if time.monotonic() - last > SILENCE:
                raise Gone(f"nothing came for {SILENCE:.0f} s")

    def _how(self) -> str:
        if not self._channel.exit_status_ready() or (status := self._channel.recv_exit_status()) < 0:
            return "the connection was closed"
        said = self._said.decode(errors="replace").strip().splitlines()
        return f"its process there ended with status {status}" + (f": {said[-1]}" if said else "")

    def close(self) -> None:
        """Let it end there, and wait for that, but not long."""
        self._over.set()
        with suppress(OSError, EOFError, paramiko.SSHException, AttributeError):
            if not self._channel.closed:
                self._channel.shutdown_write()
                self._channel.status_event.wait(_END_TIMEOUT)
        self._client.close()
