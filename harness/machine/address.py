"""`ssh://[user@]host[:port][/machine]`: another host, and the machine on it."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import urlsplit

SCHEME: Final = "ssh://"
FORM: Final = "ssh://[USER@]HOST[:PORT][/kvm|/kvm-on-tcg|/tcg]"
_IN_NAMES: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:%")


class Address(NamedTuple):
    """A host as the user names it; empty and 0: as ~/.ssh/config has it, else the defaults of OpenSSH."""

    host: str
    user: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")


def parse(text: str) -> tuple[Address, str]:
    """The host, and the machine on it, empty where none is named. Raises ValueError, which says what is wrong, and
    never has a password in it."""
    parts = urlsplit(text)
    if parts.password is not None:
        raise ValueError("no password goes into an address: use a key (ssh-keygen, ssh-copy-id) or an agent (ssh-add)")
    try:
        port = parts.port or 0
    except ValueError:
        raise ValueError(f"the port of {text!r} is none: it is a number up to 65535") from None
    host, user = parts.hostname or "", parts.username or ""
    if not text.startswith(SCHEME) or not host or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is no address of a machine: it is {FORM}")
    if not _IN_NAMES.issuperset(host + user) or host.startswith("-") or user.startswith("-"):
        raise ValueError(f"{text!r}: no host or user is called that; it is {FORM}")
    return Address(host, user, port), parts.path.strip("/")
