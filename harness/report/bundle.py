"""Bundles: one finding as a folder `NAME.twin`, to be sent to somebody, kept, and replayed.

    bundle.json     what it is: format, our version, signature, class, machine, target, command line; a digest of each
                    file
    scenario.toml   the scenario in the library's own format: it can be dropped into scenarios/
    before-1.toml   scenarios that must run before it on the same machine, if it needs any
    records.json    what L1 posted of each VMRUN, a record a line
    walks.txt       both walks, or how the machine was lost

A folder, so that the scenario in it is a file as any other, and all of it can be read without us. It is written whole
or not at all. What is read is checked: a bundle may come from anybody.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from harness.errors import TwinwalkError, UsageError
from harness.lockstep.signature import Signature
from harness.report.output import MIN_FREE
from harness.scenario import files, writer
from harness.scenario.ops import Scenario

FORMAT: Final = 1
SUFFIX: Final = ".twin"
MANIFEST: Final = "bundle.json"
SCENARIO: Final = "scenario.toml"
RECORDS: Final = "records.json"
WALKS: Final = "walks.txt"
_BEFORE: Final = "before-{}.toml"
_LARGEST: Final = 16 << 20
"""Bytes of a file in a bundle at most."""
_NOT_IN_NAMES: Final = re.compile(r"[^\w.-]+")
_LONGEST: Final = 80


@dataclass(frozen=True)
class About:
    """What the manifest says. `kind`, `seen` and `tried` are how the finding repeats (harness.shrinking.Repeated);
    `machine` is the identity of what was tested, `target` what makes one like it, by option; `found_in` the scenario
    that it was found in, which had `ops` ops."""

    check: str
    field: str
    rule: str
    kind: str
    seen: int
    tried: int
    strict: bool
    pipelined: bool
    found_in: str
    ops: int
    machine: Mapping[str, Any]
    target: Mapping[str, Any]
    command: str
    twinwalk: str
    divergences: list[dict[str, Any]]
    """Those of the finding (harness.report.jsonfile), that first which says most; none of a lost machine."""

    @property
    def signature(self) -> Signature:
        """Of the finding: check, field and rule."""
        return Signature(self.check, self.field, self.rule)


@dataclass(frozen=True)
class Bundle:
    """`scenario` shows the finding, after those `before`; `records` in plain values (harness.report.records)."""

    about: About
    scenario: Scenario
    before: tuple[Scenario, ...] = ()
    records: tuple[Mapping[str, Any], ...] = ()
    walks: str = ""


def check_folder(folder: Path, option: str) -> None:
    """Before a run: make the folder that bundles go to. Raises UsageError, saying what to do, if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{os.getpid()}.tmp"
        scratch.write_bytes(b"")
        scratch.unlink()
    except OSError as reason:
        raise UsageError(f"{option} {folder}: cannot write there: {reason.strerror}: name another folder") from None
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE:
        raise UsageError(f"{option} {folder}: the disk is full ({free} bytes free): make room, or name another folder")


def name_of(about: About) -> str:
    """A name for a bundle: of the scenario that it was found in and of what is wrong."""
    family = about.found_in.partition("[")[0].rpartition("/")[2]
    return file_name(family, about.check, about.field, about.rule)


def file_name(*parts: str) -> str:
    """What these say, as a file's name."""
    text = "-".join(filter(None, parts))
    return _NOT_IN_NAMES.sub("-", text.lower()).strip("-.")[:_LONGEST] or "finding"


def write(folder: Path, bundle: Bundle) -> Path:
    """A bundle in `folder`, under a name that is not there yet. Raises TwinwalkError if it cannot be written."""
    parts = {SCENARIO: writer.text(bundle.scenario), RECORDS: _records(bundle.records), WALKS: bundle.walks}
    parts |= {_BEFORE.format(n): writer.text(one) for n, one in enumerate(bundle.before, 1)}
    content = asdict(bundle.about) | {"scenario": bundle.scenario.name, "before": [one.name for one in bundle.before]}
    return store(folder, name_of(bundle.about), FORMAT, content, parts)


def store(folder: Path, name: str, form: int | str, content: Mapping[str, Any], parts: Mapping[str, str]) -> Path:
    """A folder `name`.twin with these files, whole or not at all: `content` is the manifest's, with the format `form`
    and a digest of each part. Raises TwinwalkError."""
    whole = {"format": form, **content,
             "files": {part: _digest(text.encode(errors="backslashreplace")) for part, text in parts.items()}}
    manifest = json.dumps(whole | {"digest": _digest_of(whole)}, indent=1) + "\n"
    scratch = folder / f".{name}.{os.getpid()}.tmp"
    try:
        scratch.mkdir()
        for part, text in {**parts, MANIFEST: manifest}.items():
            with (scratch / part).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        return _moved(scratch, folder, name)
    except OSError as reason:
        raise TwinwalkError(f"no bundle could be written to {folder}: {reason.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _moved(scratch: Path, folder: Path, name: str) -> Path:
    number = 1
    while True:
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}{SUFFIX}"
        if not path.exists():
            return scratch.rename(path)
        number += 1


def _records(records: Sequence[Mapping[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode(errors="backslashreplace"))


# --- reading --------------------------------------------------------------------------------------


def load(path: Path, form: int | str = FORMAT) -> dict[str, Any]:
    """The manifest of a bundle of that format, as it was written. Raises UsageError, saying where and why."""
    if not path.is_dir() or not (path / MANIFEST).exists():
        raise UsageError(f"{path}: this is no bundle: a bundle is a folder NAME{SUFFIX} with a {MANIFEST} in it")
    where = path / MANIFEST
    content = parsed(where, _bytes(where))
    if not isinstance(content, dict):
        raise UsageError(f"{where}: it must be an object, not {type(content).__name__}")
    if content.get("format") != form:
        raise UsageError(f"{where}: its format is {content.get('format')!r}, this version reads format {form}: use "
                         f"the twinwalk that wrote it ({content.get('twinwalk', 'unknown')!s:.40})")
    if content.get("digest") != _digest_of({name: value for name, value in content.items() if name != "digest"}):
        raise UsageError(f"{where}: it was changed since it was written: its digest does not fit")
    return content


def load_parts(path: Path, content: Mapping[str, Any], wanted: set[str]) -> dict[str, bytes]:
    """The files of that bundle, which must be those `wanted`, as they were written. Raises UsageError."""
    where = path / MANIFEST
    listed = _typed(where, content, "files", dict)
    if set(listed) != wanted:
        raise UsageError(f"{where}: its files must be {', '.join(sorted(wanted))}, not {', '.join(sorted(listed))}")
    return {name: _part(path / name, digest) for name, digest in listed.items()}


def read(path: Path) -> Bundle:
    """Raises UsageError, saying where and why, for what is no whole bundle of this format, as it was written."""
    content, where = load(path), path / MANIFEST
    about = _about(where, content)
    divergences: list[Any] = list(about.divergences)
    if not all(isinstance(one, dict) and (type(one.get("op")), type(one.get("probe")), type(one.get("field"))) == (
            int, int, str) for one in divergences):
        raise UsageError(f"{where}: each of its divergences must have an op, a probe and a field")
    names = _typed(where, content, "before", list)
    if len(names) > 999 or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: 'before' must be names of scenarios, 999 at most")
    parts = load_parts(path, content, {SCENARIO, RECORDS, WALKS, *(_BEFORE.format(n + 1) for n in range(len(names)))})
    records = parsed(path / RECORDS, parts[RECORDS])
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UsageError(f"{path / RECORDS}: it must be a list of objects")
    return Bundle(
        about, _scenario(path / SCENARIO, parts[SCENARIO], _typed(where, content, "scenario", str)),
        tuple(_scenario(path / (part := _BEFORE.format(n)), parts[part], name) for n, name in enumerate(names, 1)),
        tuple(records), parts[WALKS].decode(errors="replace"),
    )


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path}: it has more than {_LARGEST:,} bytes: no bundle of ours does")
        return path.read_bytes()
    except OSError as reason:
        raise UsageError(f"{path}: cannot be read: {reason.strerror}: the bundle is not whole") from None


def _part(path: Path, digest: object) -> bytes:
    data = _bytes(path)
    if _digest(data) != digest:
        raise UsageError(f"{path}: it was changed since the bundle was written, or is not whole: its digest does not "
                         "fit (a changed scenario is run by `twinwalk run FILE`)")
    return data


def parsed(path: Path, data: bytes) -> Any:
    """JSON of a bundle's file. Raises UsageError."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"{path}: it is not text in UTF-8") from None
    except json.JSONDecodeError as reason:
        raise UsageError(f"{path}:{reason.lineno}: not JSON, or not whole: {reason.msg}") from None
    except (ValueError, RecursionError) as reason:  # a number of thousands of digits; a thousand brackets
        raise UsageError(f"{path}: no JSON of ours: {reason}") from None


def _about(where: Path, content: Mapping[str, Any]) -> About:
    types = {"int": int, "str": str, "bool": bool, "Mapping[str, Any]": dict, "list[dict[str, Any]]": list}
    return About(**{one.name: _typed(where, content, one.name, types[str(one.type)]) for one in fields(About)})


def _typed(where: Path, content: Mapping[str, Any], name: str, wanted: type) -> Any:
    value = content.get(name)
    if type(value) is not wanted:
        raise UsageError(f"{where}: {name!r} must be {files.WORDS.get(wanted, 'true or false')}, "
                         f"not {json.dumps(value)[:60]}")
    return value


def _scenario(path: Path, data: bytes, name: str) -> Scenario:
    try:
        found = files.parse(data.decode("utf-8"), str(path), name)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: it is not text in UTF-8") from None
    if len(found) != 1:
        raise UsageError(f"{path}: it must be one scenario, not {len(found)}: a bundle's has no `each`")
    return found[0]
