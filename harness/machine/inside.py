"""The way into a Linux L1 over SSH, by a forwarded port and with a key that is made for the run: commands and files."""

from __future__ import annotations

import base64
import io
import socket
from types import TracebackType
from typing import Final, Self

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from harness.machine.line import NoAnswer

_PIECE: Final = 1 << 15


def make_key() -> paramiko.Ed25519Key:
    """A key that nobody has seen."""
    text = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    return paramiko.Ed25519Key.from_private_key(io.StringIO(text))


class Inside:
    """A connection, ended with the block. Each method raises NoAnswer where L1 does not do it, or not in time."""

    def __init__(self, port: int, key: paramiko.PKey, host_key: str, timeout: float) -> None:
        """`port` is that of this host; `host_key` the server's, as OpenSSH writes one: another one is refused."""
        self._timeout = timeout
        self._transport: paramiko.Transport | None = None
        try:
            known = paramiko.Ed25519Key(data=base64.b64decode(host_key.split()[-1]))
            channel = socket.create_connection(("127.0.0.1", port), timeout)
            self._transport = paramiko.Transport(channel)
            self._transport.banner_timeout = self._transport.auth_timeout = timeout
            self._transport.start_client(timeout=timeout)
            if (theirs := self._transport.get_remote_server_key()) != known:
                raise NoAnswer(f"what answers at port {port} is not L1: its key is {theirs.get_base64()}")
            self._transport.auth_publickey("root", key)
        except (paramiko.SSHException, OSError, EOFError, ValueError, IndexError) as reason:
            self.close()
            raise NoAnswer(f"L1 cannot be reached over SSH: {str(reason) or type(reason).__name__}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Safe to call twice, and while another thread waits for an answer."""
        if self._transport is not None:
            self._transport.close()

    def start(self, command: str) -> paramiko.Channel:
        """A command that runs on; its input and its output are the channel's. Raises NoAnswer."""
        assert self._transport is not None
        try:
            channel = self._transport.open_session(timeout=self._timeout)
            channel.settimeout(self._timeout)
            channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError) as reason:
            raise NoAnswer(f"`{command}` cannot be started in L1: {str(reason) or type(reason).__name__}") from None
        return channel

    def run(self, command: str, data: bytes = b"") -> bytes:
        """What a command prints that is given `data`; it must end with status 0. Raises NoAnswer if it does not, or not
        in time."""
        with self.start(command) as channel:
            try:
                channel.sendall(data)
                channel.shutdown_write()
                out = b"".join(iter(lambda: channel.recv(_PIECE), b""))
                errors = b"".join(iter(lambda: channel.recv_stderr(_PIECE), b""))
                if not channel.status_event.wait(self._timeout):
                    raise TimeoutError
            except (paramiko.SSHException, OSError, EOFError) as reason:
                raise NoAnswer(f"`{command}` does not end in L1: {str(reason) or 'no answer'}") from None
            if channel.exit_status:
                raise NoAnswer(f"`{command}` failed in L1 with status {channel.exit_status}: "
                               f"{errors.decode(errors='replace').strip()}")
            return out

    def put(self, data: bytes, path: str) -> None:
        """A file there."""
        self.run(f"cat >{path}", data)

    def get(self, path: str) -> bytes:
        """What is in a file there."""
        return self.run(f"cat {path}")
