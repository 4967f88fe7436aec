"""Values as JSON and back, by their types: what goes to another host and comes from there.

A named tuple or a dataclass is a list, its class's name first; what is read is held against the type that is wanted
there, so that nothing else can come of it, whoever wrote it. Nothing is looked up by a name that was read but the
classes of a union, which the type lists.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_ATOMS: Final = (int, str, bool, float, type(None))
_Reader = Callable[[Any], Any]


def encode(value: object) -> Any:
    """`value` in what JSON has: it is made of named tuples, dataclasses, sequences, sets, paths, numbers, text, None.
    Raises TypeError for anything else."""
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [type(value).__name__, *map(encode, value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(encode(getattr(value, one.name)) for one in fields(value))]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [encode(one) for one in value]
    raise TypeError(f"{type(value).__name__} cannot go to another host")


def decode(wanted: Callable[..., T], value: Any) -> T:
    """A `wanted` of what `encode` made. Raises ValueError for anything else."""
    try:
        result: T = _reader(wanted)(value)
    except (TypeError, RecursionError) as reason:
        raise ValueError(f"no {getattr(wanted, '__name__', wanted)}: {reason}") from None
    return result


@lru_cache(maxsize=200)
def _reader(wanted: Any) -> _Reader:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _union(parts)
    if wanted in _ATOMS:
        return lambda value: value if type(value) is wanted else _refuse(wanted, value)
    if wanted is Path:
        return lambda value: Path(value) if isinstance(value, str) else _refuse(wanted, value)
    if origin is tuple and parts[-1] is not ...:
        readers = [_reader(part) for part in parts]
        return lambda value: tuple(read(one) for read, one in zip(readers, _list(value), strict=True))
    if origin in (tuple, list, set, frozenset):
        each, collection = _reader(parts[0]), origin
        return lambda value: collection([each(one) for one in _list(value)])
    if is_dataclass(wanted) or hasattr(wanted, "_fields"):
        return _record(wanted)
    raise TypeError(f"{wanted} cannot come from another host")


def _record(wanted: Any) -> _Reader:
    hints = get_type_hints(wanted)
    names: Sequence[str] = getattr(wanted, "_fields", None) or [one.name for one in fields(wanted)]
    readers: list[_Reader] = []  # made when first used: classes may hold each other

    def read(value: Any) -> Any:
        if not readers:
            readers.extend(_reader(hints[name]) for name in names)
        parts = _list(value)
        if len(parts) != len(readers) + 1 or parts[0] != wanted.__name__:
            _refuse(wanted, value)
        return wanted(*(one(part) for one, part in zip(readers, parts[1:], strict=True)))

    return read


def _union(parts: Sequence[Any]) -> _Reader:
    """Classes are told apart by their names, the rest by what JSON has."""
    plain = {part for part in parts if part in _ATOMS}
    classes = {part.__name__: _reader(part) for part in parts if part not in plain}
    single = next(iter(classes.values())) if len(classes) == 1 else None

    def read(value: Any) -> Any:
        if type(value) in plain:
            return value
        if single is not None:
            return single(value)
        name = _list(value)[0] if value else ""
        if not isinstance(name, str) or name not in classes:
            _refuse(" | ".join(classes), value)
        return classes[name](value)

    return read


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list is wanted, not {str(value)[:60]!r}")
    return value


def _refuse(wanted: Any, value: Any) -> Any:
    raise TypeError(f"{getattr(wanted, '__name__', wanted)} is wanted, not {str(value)[:60]!r}")
