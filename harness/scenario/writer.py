"""Scenarios written as files of the library's format: the other way around of `harness.scenario.files`.

A case of a sweep becomes a file that can be dropped into scenarios/, or sent to somebody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.errors import UsageError
from harness.scenario.files import SECOND
from harness.scenario.ops import (
    DEFAULT_MODE,
    DEFAULT_PAGE_SIZE,
    Change,
    EntryOp,
    HostOp,
    InvlpgaOp,
    Op,
    RunOp,
    Scenario,
    UseOp,
    VmcbOp,
)

_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
_LONGEST = 200


def text(scenario: Scenario) -> str:
    """The file of one scenario: read again it is the same one, but for its name and where it was read."""
    head = [("title", scenario.title), ("manual", scenario.manual), ("shows", scenario.shows)]
    worlds = (("guest", scenario.guest, DEFAULT_MODE), ("nested", scenario.nested, DEFAULT_MODE),
              ("guest_page", scenario.guest_page, DEFAULT_PAGE_SIZE),
              ("nested_page", scenario.nested_page, DEFAULT_PAGE_SIZE),
              ("table_page", scenario.table_page, DEFAULT_PAGE_SIZE))
    head += [(key, value) for key, value, default in worlds if value != default]
    lines = [f"# {scenario.name}", "", *(f"{key} = {_string(value)}" for key, value in head)]
    for op in scenario.ops:
        lines += ["", "[[op]]", *op_lines(op)]
    return "\n".join(lines) + "\n"


def file_name(scenario: Scenario) -> str:
    """A name for its file: `joint-4-level-PAE-....toml` for `sweeps/joint[4-level,PAE,...]`."""
    family, bracket, values = scenario.name.partition("[")
    stem = _NOT_IN_NAMES.sub("-", family.rpartition("/")[2] + bracket + values).strip("-.") or "scenario"
    return f"{stem[:_LONGEST]}.toml"


def write(scenarios: Sequence[Scenario], folder: Path) -> list[Path]:
    """A file for each scenario in `folder`, which is made if need be. Raises UsageError for what is there
    already, or cannot be written."""
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise UsageError(f"{folder} cannot be written to: {reason.strerror}") from None
    for scenario in scenarios:
        path = folder / file_name(scenario)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text(scenario))
        except FileExistsError:
            raise UsageError(f"{path} is there already") from None
        except OSError as reason:
            raise UsageError(f"{path} cannot be written: {reason.strerror}") from None
        paths.append(path)
    return paths


def op_lines(op: Op) -> Iterator[str]:
    """The lines of one op, as they stand under `[[op]]`."""
    match op:
        case EntryOp(entry, change, frame, second):
            yield f"entry = {_string(entry)}"
            yield from _change(change)
            if second:
                yield f"by = {_string(SECOND)}"
            if frame is not None:
                yield f"frame = {_string(frame)}"
        case VmcbOp(field, change, page, frame):
            yield f"vmcb = {_string(field)}"
            yield from _change(change)
            if page is not None:
                yield f"page = {_string(page)}"
            if frame is not None:
                yield f"frame = {_string(frame)}"
        case UseOp(number):
            yield f"use = {number}"
        case InvlpgaOp(page, asid):
            yield f"invlpga = {_string(page)}"
            yield f"asid = {asid}"
        case HostOp(register, change):
            yield f"host = {_string(register)}"
            yield from _change(change)
        case RunOp(probes, cpl, expect):
            yield f"run = {_strings([str(probe) for probe in probes])}"
            if cpl:
                yield f"cpl = {cpl}"
            if expect:
                yield f"expect = {_strings(expect)}"


def _change(change: Change) -> Iterator[str]:
    if change.value is not None:
        yield f"value = {change.value:#x}"
    if change.set:
        yield f"set = {_strings(change.set)}"
    if change.clear:
        yield f"clear = {_strings(change.clear)}"


def _strings(values: Sequence[str]) -> str:
    return f"[{', '.join(map(_string, values))}]"


def _string(value: str) -> str:
    """TOML's basic strings are JSON's, but for DEL, which must be escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
