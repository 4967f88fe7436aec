"""Scenario files: TOML in, scenarios out, with file and line for every mistake.

    title = "A write through a read-only nested {level} faults"
    manual = "15.25.5"
    shows = "what to learn from it"
    each = { level = ["pde", "pte"] }      # one scenario for each combination; {level} stands for it

    [[op]]
    entry = "nested.a.{level}"
    clear = ["rw"]

    [[op]]
    run = ["read a", "write a+8"]
    expect = ["ok", "#NPF 0x100000007"]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Final

from harness.errors import UsageError
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import (
    DEFAULT_MODE,
    DEFAULT_PAGE_SIZE,
    NO_NESTED_PAGING,
    VMCBS,
    Change,
    EntryOp,
    HostOp,
    InvlpgaOp,
    Op,
    RunOp,
    Scenario,
    UseOp,
    VmcbOp,
    parse_probe,
)

ERRATA_FOLDER: Final = "errata"
"""Files in folders of this name are not scenarios."""

_TOP: Final = {
    "title": str, "manual": str, "shows": str, "each": dict, "guest": str, "nested": str, "guest_page": str,
    "nested_page": str, "table_page": str, "op": list,
}
SECOND: Final = "second"
REQUIRED: Final = ("title", "manual", "shows", "op")
_CHANGE: Final = {"value": (int, str), "set": list, "clear": list}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "entry": {"entry": str, "frame": str, "by": str} | _CHANGE,
    "vmcb": {"vmcb": str, "page": str, "frame": str} | _CHANGE,
    "host": {"host": str} | _CHANGE,
    "use": {"use": (int, str)},
    "invlpga": {"invlpga": str, "asid": (int, str)},
    "run": {"run": list, "cpl": (int, str), "expect": list},
}
_AXES: Final = re.compile(r"^\s*\[\s*axis\s*[.\]]", re.MULTILINE)
_OP_HEADER: Final = re.compile(r"^\s*\[\[\s*op\s*\]\]")
WORDS: Final = {(int, str): "a number", str: "a string", int: "a whole number", list: "a list", dict: "a table"}


def find(paths: Sequence[Path], sweeps: bool = False) -> list[Path]:
    """The scenario files among `paths`, or the `sweeps`, folders searched. Raises UsageError for what is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*.toml") if ERRATA_FOLDER not in p.relative_to(path).parts)
        elif path.exists():
            found.append(path)
        else:
            raise UsageError(f"{path}: no such file or folder")
    if not found:
        raise UsageError(f"no scenario files (*.toml) in {', '.join(map(str, paths))}")
    return [path for path in found if _is_sweep(path) == sweeps]


def _is_sweep(path: Path) -> bool:
    """A file with axes is a sweep."""
    try:
        return bool(_AXES.search(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return False  # its reader will say so


def has_ops(path: Path) -> bool:
    """Whether a TOML file is one of scenarios: other projects have such files too."""
    try:
        return any(_OP_HEADER.match(line) for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return False


def every(name: str) -> bool:
    """What is `wanted` of files where nobody says otherwise."""
    return True


def load(paths: Sequence[Path], wanted: Callable[[str], bool] = every) -> list[Scenario]:
    """The scenarios of files and folders whose name is `wanted`; those of a folder are named by their path in it."""
    scenarios = []
    for path in paths:
        for file in find([path]):
            scenarios += read(file, name_of(file, path), wanted)
    return scenarios


def name_of(file: Path, path: Path) -> str:
    """What a file is called that was found in, or is, `path`."""
    return file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem


def read(path: Path, name: str | None = None, wanted: Callable[[str], bool] = every) -> list[Scenario]:
    """The scenarios of one file, called `name`, by default the file's. Raises UsageError with file and line."""
    return parse(text_of(path), str(path), name or path.stem, wanted)


def text_of(path: Path) -> str:
    """What is in a file. Raises UsageError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise UsageError(f"{path}: cannot be read: {reason}") from None


def parse(text: str, source: str, stem: str, wanted: Callable[[str], bool] = every) -> list[Scenario]:
    """As `read`, from text; `source` is named in messages, `stem` in the scenarios' names."""
    data = tables(text, source)
    file = File(source, stem, text.splitlines())
    file.check(data, _TOP, None)
    for key in REQUIRED:
        if key not in data:
            raise file.error(None, "", f"{key!r} is missing")
    return [
        file.scenario(substitute(data, choice), name)
        for choice in file.choices(data.get("each", {})) if wanted(name := file.name(choice))
    ]


def tables(text: str, source: str) -> dict[str, Any]:
    """The TOML of a text. Raises UsageError, with the line, for what is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as reason:
        at = re.search(r"at line (\d+)", str(reason))
        raise UsageError(f"{source}:{at[1] if at else 1}: not TOML: {reason}") from None


@dataclass(frozen=True)
class File:
    """The text of a file, for what is read from it and for messages about it."""

    source: str
    stem: str
    lines: list[str]

    @cached_property
    def headers(self) -> list[int]:
        """Where each op begins, as an index into `lines`."""
        return [n for n, line in enumerate(self.lines) if _OP_HEADER.match(line)]

    def line(self, op: int | None, key: str) -> int:
        """The line of `key` in the op of that index, or of the op, or of the top-level key."""
        headers = self.headers
        if op is None:
            start, end = 0, headers[0] if headers else len(self.lines)
        elif op < len(headers):
            start, end = headers[op], [*headers, len(self.lines)][op + 1]
        else:
            start, end = 0, len(self.lines)
        wanted = re.compile(rf"^\s*{re.escape(key)}\s*=")
        for number in range(start, end):
            if key and wanted.match(self.lines[number]):
                return number + 1
        return start + 1

    def error(self, op: int | None, key: str, reason: str) -> UsageError:
        """Wrong use, with the file and the line of `key` in op number `op`, None for what stands above all ops."""
        return UsageError(f"{self.source}:{self.line(op, key)}: {reason}")

    def check(self, table: Mapping[str, Any], known: Mapping[str, Any], op: int | None) -> None:
        """Every key is known and has a value of its type."""
        for key, value in table.items():
            if key not in known:
                raise self.error(op, key, f"unknown key {key!r}; there are {', '.join(known)}")
            if not isinstance(value, known[key]) or isinstance(value, bool):
                raise self.error(op, key, f"{key!r} must be {WORDS[known[key]]}, not {value!r}")

    def choices(self, each: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        """All combinations of what `each` lists; one empty one without it."""
        for name, values in each.items():
            if not isinstance(values, list) or not values or not all(isinstance(v, str | int) for v in values):
                raise self.error(None, "each", f"'each.{name}' must be a list of strings or numbers")
        for combination in product(*each.values()):
            yield dict(zip(each, map(str, combination), strict=True))

    def name(self, choice: Mapping[str, str]) -> str:
        """Of the scenario with these values of `each`."""
        return self.stem + (f"[{','.join(choice.values())}]" if choice else "")

    def scenario(self, data: Mapping[str, Any], name: str) -> Scenario:
        """Of a whole table. Raises UsageError, with the line."""
        guest = data.get("guest", DEFAULT_MODE)
        if guest not in MODES:
            raise self.error(None, "guest", f"guest must be one of {', '.join(MODES)}, not {guest!r}")
        nested = data.get("nested", DEFAULT_MODE)
        if nested not in HOST_MODES:
            raise self.error(None, "nested", f"nested must be one of {', '.join(HOST_MODES)}, not {nested!r}")
        nested_pages = (*HOST_MODES[nested].pages, NO_NESTED_PAGING)
        sizes_of = {"guest_page": MODES[guest].pages, "nested_page": nested_pages,
                    "table_page": HOST_MODES[nested].pages}
        for key, sizes in sizes_of.items():
            if data.get(key, DEFAULT_PAGE_SIZE) not in sizes:
                raise self.error(None, key, f"{key} must be one of {', '.join(sizes)}, not {data[key]!r}")
        if not data["op"]:
            raise self.error(None, "op", "a scenario needs at least one op")
        return Scenario(
            name=name,
            title=data["title"],
            manual=data["manual"],
            shows=data["shows"],
            ops=tuple(self.op(index, op) for index, op in enumerate(data["op"])),
            guest=guest,
            nested=nested,
            guest_page=data.get("guest_page", DEFAULT_PAGE_SIZE),
            nested_page=data.get("nested_page", DEFAULT_PAGE_SIZE),
            table_page=data.get("table_page", DEFAULT_PAGE_SIZE),
            source=self.source,
            lines=tuple(self.line(index, "") for index in range(len(data["op"]))),
        )

    def op(self, index: int, table: Any) -> Op:
        """The op number `index`, from 0. Raises UsageError, with the line."""
        if not isinstance(table, dict):
            raise self.error(None, "op", "'op' must be a list of tables: write [[op]]")
        kinds = [kind for kind in KINDS if kind in table]
        if len(kinds) != 1:
            raise self.error(index, "", f"an op has exactly one of {', '.join(KINDS)}; this has "
                                        f"{' and '.join(kinds) or ', '.join(table) or 'nothing'}")
        kind = kinds[0]
        self.check(table, KINDS[kind], index)
        if kind == "run":
            return self.run(index, table)
        if kind == "use":
            which = self.number(index, table, "use")
            if which is None or not 1 <= which <= VMCBS:
                raise self.error(index, "use", f"there are VMCBs 1 to {VMCBS}, not {which}")
            return UseOp(which)
        if kind == "invlpga":
            asid = self.number(index, table, "asid")
            if asid is None or not 0 <= asid < 1 << 32:
                raise self.error(index, "asid", "INVLPGA needs an ASID of 32 bits, as in `asid = 5`")
            return InvlpgaOp(table["invlpga"], asid)
        bits = (self.strings(index, table, key) for key in ("set", "clear"))
        change = Change(self.number(index, table), *bits)
        if change == Change() and not {"frame", "page"} & table.keys():
            raise self.error(index, kind, "nothing is changed: give value, set, clear or frame or, for a VMCB field, "
                                          "page")
        if change.value is not None and not 0 <= change.value < 1 << 64:
            raise self.error(index, "value", f"{change.value:#x} does not fit in 64 bits")
        if kind == "entry":
            if table.get("by", SECOND) != SECOND:
                raise self.error(index, "by", f"'by' can be {SECOND!r}, L1's second processor, and nothing else")
            return EntryOp(table["entry"], change, table.get("frame"), "by" in table)
        if kind == "vmcb":
            return VmcbOp(table["vmcb"], change, table.get("page"), table.get("frame"))
        return HostOp(table["host"], change)

    def number(self, index: int, table: Mapping[str, Any], key: str = "value") -> int | None:
        """The value of `key`: a number, or text that is one (as `each` makes it)."""
        value = table.get(key)
        try:
            return int(value, 0) if isinstance(value, str) else value
        except ValueError:
            raise self.error(index, key, f"{key!r} must be a number, not {value!r}") from None

    def run(self, index: int, table: Mapping[str, Any]) -> RunOp:
        """A VMRUN with its probes. Raises UsageError, with the line."""
        probes = []
        for text in self.strings(index, table, "run"):
            try:
                probes.append(parse_probe(text))
            except ValueError as reason:
                raise self.error(index, "run", str(reason)) from None
        cpl = self.number(index, table, "cpl") or 0
        if cpl not in range(4):
            raise self.error(index, "cpl", f"cpl must be 0, 1, 2 or 3, not {cpl}")
        expect = self.strings(index, table, "expect")
        if expect and len(expect) != len(probes):
            raise self.error(index, "expect", f"{len(expect)} expectations for {len(probes)} probes")
        return RunOp(tuple(probes), cpl, expect)

    def strings(self, index: int, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        """A list of strings, empty if it is not there. Raises UsageError, with the line."""
        values = table.get(key, [])
        if not all(isinstance(v, str) for v in values):
            raise self.error(index, key, f"{key!r} must be a list of strings, not {values!r}")
        return tuple(values)


def substitute(value: Any, choice: Mapping[str, str]) -> Any:
    """`value` with {name} replaced in all its strings."""
    if isinstance(value, str):
        for name, text in choice.items():
            value = value.replace(f"{{{name}}}", text)
        return value
    if isinstance(value, list):
        return [substitute(v, choice) for v in value]
    if isinstance(value, dict):
        return {k: v if k == "each" else substitute(v, choice) for k, v in value.items()}
    return value
