"""Finding members in the kernel's type information: types put together by hand, as the format says."""

from __future__ import annotations

import struct

import pytest

from harness.machine.btf import Btf

INT, POINTER, ARRAY, STRUCT, UNION, ENUM, FORWARD, TYPEDEF, CONST, FUNCTION = 1, 2, 3, 4, 5, 6, 7, 8, 10, 12
PROTO, VAR, DATASEC, FLOAT, TAG, ENUM64 = 13, 14, 15, 16, 17, 19


class Builder:
    """BTF as a compiler writes it; numbers and strings go on from `base`."""

    def __init__(self, base: Builder | None = None) -> None:
        self.strings = b"" if base else b"\0"
        self.from_string: int = base.from_string + len(base.strings) if base else 0
        self.base = base
        self.types = b""
        self.next: int = base.next if base else 1

    def name(self, text: str) -> int:
        if not text:
            return 0
        raw = text.encode() + b"\0"
        if self.base and b"\0" + raw in self.base.strings:  # a module uses the strings of vmlinux
            return self.base.strings.index(b"\0" + raw) + 1
        self.strings += raw
        return self.from_string + len(self.strings) - len(raw)

    def add(self, kind: int, name: str, value: int, trailer: bytes = b"", members: int = 0, flag: int = 0) -> int:
        self.types += struct.pack("<III", self.name(name), flag << 31 | kind << 24 | members, value) + trailer
        self.next += 1
        return self.next - 1

    def integer(self, name: str, size: int) -> int:
        return self.add(INT, name, size, struct.pack("<I", size * 8))

    def struct(
        self, name: str, size: int, *members: tuple[str, int, int], kind: int = STRUCT, fields: bool = False
    ) -> int:
        """Members are name, type, bit; with `fields` the bit has the width of a bit-field above bit 23."""
        trailer = b"".join(struct.pack("<III", self.name(n), t, at) for n, t, at in members)
        return self.add(kind, name, size, trailer, len(members), int(fields))

    def bytes(self, version: int = 1) -> bytes:
        return struct.pack("<HBBIIIII", 0xEB9F, version, 0, 24, 0, len(self.types), len(self.types),
                           len(self.strings)) + self.types + self.strings


def vmlinux() -> Builder:
    """One type of each kind whose length a reader has to know, and u64 behind them."""
    out = Builder()
    u32 = out.integer("unsigned int", 4)
    out.add(ENUM, "colours", 4, struct.pack("<IiIi", out.name("red"), 0, out.name("blue"), 1), 2)
    out.add(ENUM64, "wide", 8, struct.pack("<III", out.name("far"), 0, 1), 1)
    proto = out.add(PROTO, "", u32, struct.pack("<II", out.name("x"), u32), 1)
    out.add(FUNCTION, "f", proto)
    variable = out.add(VAR, "v", u32, struct.pack("<I", 1))
    out.add(DATASEC, ".data", 4, struct.pack("<III", variable, 0, 4), 1)
    out.add(FLOAT, "double", 8)
    out.add(TAG, "tag", u32, struct.pack("<i", -1))
    out.add(FORWARD, "later", 0)
    out.add(TYPEDEF, "u64", out.integer("unsigned long", 8))
    return out


def module() -> tuple[bytes, bytes]:
    base = vmlinux()
    u64 = base.next - 1
    words = base.add(ARRAY, "", 0, struct.pack("<III", u64, 1, 5))
    base.struct("list", 16, ("next", u64, 0), ("prev", u64, 64))
    out = Builder(base)
    bits = ("level", 1, 4 << 24), ("direct", 1, 1 << 24 | 7), ("access", 1, 4 << 24 | 8)
    role = out.struct("role", 4, *bits, fields=True)
    both = out.struct("", 8, ("word", 1, 0), ("", role, 0), kind=UNION)
    mmu = out.struct("mmu", 24, ("root", u64, 0), ("role", both, 64), ("next", u64, 128))
    constant = out.add(CONST, "", mmu)
    pointer = out.add(POINTER, "", mmu)
    inner = out.struct("", 48, ("now", pointer, 0), ("", constant, 64), ("words", words, 256))
    out.struct("vcpu", 64, ("id", 1, 0), ("arch", inner, 64))
    return base.bytes(), out.bytes()


@pytest.fixture
def types() -> Btf:
    return Btf.of_module(*module())


def test_members_of_a_module(types: Btf) -> None:
    """Through nested and anonymous structures, typedefs and qualifiers; names may be strings of vmlinux."""
    assert types.member("vcpu", "id").offset == 0
    assert types.member("vcpu", "arch").offset == 8
    assert types.member("vcpu", "arch.now").offset == 8
    assert types.member("vcpu", "arch.next").offset == 8 + 8 + 16
    assert types.member("vcpu", "arch.role.word").offset == 8 + 8 + 8
    assert types.member("list", "prev").offset == 8, "a type of vmlinux's"


def test_bit_fields(types: Btf) -> None:
    fields = types.members(types.struct("role"))
    assert {n: (m.bit, m.width) for n, m in fields.items()} == {"level": (0, 4), "direct": (7, 1), "access": (8, 4)}
    role = types.members(types.member("vcpu", "arch.role").type)
    assert (role["direct"].bit, role["word"].width) == (7, 32)


def test_sizes(types: Btf) -> None:
    members = types.members(types.member("vcpu", "arch").type)
    assert {n: m.width for n, m in members.items()} == {"now": 64, "root": 64, "role": 64, "next": 64, "words": 320}


@pytest.mark.parametrize(
    ("name", "path", "missing"),
    [("none", "x", "struct none"), ("vcpu", "arch.gone", "arch.gone: no gone"), ("vcpu", "id.x", "no x")],
)
def test_what_is_not_there_is_named(types: Btf, name: str, path: str, missing: str) -> None:
    with pytest.raises(KeyError, match=missing):
        types.member(name, path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too short"),
        (b"\x7fELF" + bytes(40), "begins with 7f454c46"),
        (vmlinux().bytes(version=2), "no BTF of version 1"),
        (vmlinux().bytes()[:-1], "cut short"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 10, 10, 1) + bytes(11), "type that was cut short"),
    ],
)
def test_what_is_no_btf(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Btf(data)
