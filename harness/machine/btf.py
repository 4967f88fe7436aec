"""Where the members of the kernel's structures lie, from its own type information.

The kernel describes its types in BTF (/sys/kernel/btf/vmlinux); a module's BTF goes on where that of
vmlinux ends, in type numbers and in the string table (Documentation/bpf/btf.rst). Only what is needed
to find members is read: structures, unions, and the types in between.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, Self

_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_TYPE: Final = struct.Struct("<III")
_MEMBER: Final = struct.Struct("<III")
_ARRAY: Final = struct.Struct("<III")

_INT, _POINTER, _ARRAY_KIND, _STRUCT, _UNION, _ENUM, _ENUM64 = 1, 2, 3, 4, 5, 6, 19
_NAMES_FOR: Final = frozenset({8, 9, 10, 11, 18})
"""Typedef, volatile, const, restrict, type tag: another name for a type."""

_TRAILER: Final = {_INT: (4, 0), _ARRAY_KIND: (12, 0), _STRUCT: (0, 12), _UNION: (0, 12), _ENUM: (0, 8),
                   13: (0, 8), 14: (4, 0), 15: (0, 12), 17: (4, 0), _ENUM64: (0, 12)}
"""Bytes behind a type by its kind: how many, and how many more for each of its members."""


class Member(NamedTuple):
    """A member: `bit` from the structure's start, `width` in bits, and the number of its type."""

    bit: int
    width: int
    type: int

    @property
    def offset(self) -> int:
        """In bytes. Only for what is no bit-field."""
        return self.bit // 8


class Btf:
    """The types of vmlinux, or of a module on top of them.

    Raises ValueError for bytes that are no BTF, and KeyError, naming it, for a structure or member that
    the kernel does not have.
    """

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        try:
            magic, version, _, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(data)
        except struct.error:
            raise ValueError("no BTF: too short for its header") from None
        if magic != _MAGIC or version != 1:
            raise ValueError(f"no BTF of version 1: it begins with {data[:4].hex()}")
        self._types = data[header + types_at : header + types_at + types_size]
        self._strings = data[header + strings_at : header + strings_at + strings_size]
        if len(self._types) < types_size or len(self._strings) < strings_size:
            raise ValueError("BTF that was cut short")
        self._base = base
        self._first: int = base.end if base else 1
        self._strings_from: int = base.strings_end if base else 0
        self._at: list[int] = []
        self._named: dict[str, int] = {}
        self._index()
        self.end: int = self._first + len(self._at)
        """The number behind that of the last type."""
        self.strings_end: int = self._strings_from + len(self._strings)

    @classmethod
    def of_module(cls, vmlinux: bytes, module: bytes) -> Self:
        """The types of a module, which go on from those of the kernel. Raises ValueError for what cannot be read."""
        return cls(module, Btf(vmlinux))

    def _index(self) -> None:
        at, types = 0, self._types
        try:
            while at < len(types):
                name, info, _ = _TYPE.unpack_from(types, at)
                kind = info >> 24 & 0x1F
                if kind in (_STRUCT, _UNION) and name:
                    self._named[self._string(name)] = self._first + len(self._at)
                self._at.append(at)
                fixed, each = _TRAILER.get(kind, (0, 0))
                at += _TYPE.size + fixed + each * (info & 0xFFFF)
        except struct.error:
            raise ValueError("BTF with a type that was cut short") from None

    def _string(self, at: int) -> str:
        if at < self._strings_from:
            assert self._base is not None
            return self._base._string(at)
        at -= self._strings_from
        return self._strings[at : self._strings.index(b"\0", at)].decode(errors="replace")

    def _owner(self, number: int) -> Btf:
        if number < self._first:
            assert self._base is not None
            return self._base._owner(number)
        return self

    def _head(self, number: int) -> tuple[Btf, int, int, int, int]:
        """Of a type, behind its other names: who has it, its place there, kind, info, size or type."""
        while True:
            owner = self._owner(number)
            at = owner._at[number - owner._first]
            _, info, value = _TYPE.unpack_from(owner._types, at)
            kind = info >> 24 & 0x1F
            if kind not in _NAMES_FOR:
                return owner, at + _TYPE.size, kind, info, value
            number = value

    def struct(self, name: str) -> int:
        """The number of a structure or union by its name. Raises KeyError."""
        at: Btf | None = self
        while at is not None:
            if name in at._named:
                return at._named[name]
            at = at._base
        raise KeyError(f"struct {name}")

    def members(self, number: int) -> dict[str, Member]:
        """Members of the structure with this number; those of anonymous ones inside count as its own."""
        owner, at, kind, info, _ = self._head(number)
        if kind not in (_STRUCT, _UNION):
            return {}
        out: dict[str, Member] = {}
        for name_at, type_, offset in _MEMBER.iter_unpack(owner._types[at : at + _MEMBER.size * (info & 0xFFFF)]):
            width, bit = (offset >> 24, offset & 0xFF_FFFF) if info >> 31 else (0, offset)
            if name_at:
                out[self._string(name_at)] = Member(bit, width or 8 * self.size(type_), type_)
            else:
                for name, inner in self.members(type_).items():
                    out[name] = inner._replace(bit=bit + inner.bit)
        return out

    def member(self, name: str, path: str) -> Member:
        """A member by its path in the structure `name`: `arch.mmu`, `root.hpa`. A step through a pointer
        is none: ask for the structure it points to. Raises KeyError, naming it."""
        number, bit = self.struct(name), 0
        found = Member(0, 0, number)
        for step in path.split("."):
            members = self.members(number)
            if step not in members:
                raise KeyError(f"struct {name}: {path}: no {step}")
            found = members[step]
            bit += found.bit
            number = found.type
        return found._replace(bit=bit)

    def size(self, number: int) -> int:
        """Bytes of a type; 0 for what has no size (a function, void)."""
        if number == 0:
            return 0
        owner, at, kind, _, value = self._head(number)
        if kind == _POINTER:
            return 8
        if kind == _ARRAY_KIND:
            element, _, count = _ARRAY.unpack_from(owner._types, at)
            return int(count) * self.size(element)
        return value if kind in (_INT, _STRUCT, _UNION, _ENUM, _ENUM64, 16) else 0
