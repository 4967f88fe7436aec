"""Bundles of findings about a foreign L1: one as a folder `NAME.twin`, to be judged again by the model alone.

    bundle.json     what it is: signature, machine, command line, our version; a digest of each file
    stops.json      the VMRUN before it and the stop that it was found at: L1's registers, and where L2's access went
    memory.json     the pages of L1's memory that were read: VMCB and tables; behind each stop those that have changed
    walks.txt       what is wrong, and both walks
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from harness.errors import UsageError
from harness.lockstep.evidence import PAGE, Evidence, Moment
from harness.model.registers import Cpu
from harness.report.bundle import MANIFEST, WALKS, file_name, load, load_parts, parsed, store
from harness.wire.layout import FEATURES
from harness.wire.stop import ACCESS, ENTER, EXIT, HOST, INVLPGA, Stop

FORMAT: Final = "observed-1"
STOPS: Final = "stops.json"
MEMORY: Final = "memory.json"

_MOST_MEMORY: Final = 1 << 40
_KINDS: Final = (ENTER, EXIT, INVLPGA, ACCESS)


@dataclass(frozen=True)
class About:
    """What the manifest says: the finding's signature, what was observed, the identity of its machine, the command line
    and version that found it."""

    check: str
    field: str
    rule: str
    observed: str
    machine: Mapping[str, Any]
    command: str
    twinwalk: str


@dataclass(frozen=True)
class Observed:
    """A bundle: what it is about, what the finding was made of, the processor, and the walks as text."""

    about: About
    evidence: Evidence
    cpu: Cpu
    walks: str


def is_one(path: Path) -> bool:
    """Whether that folder is such a bundle, whole or not, and not one of a scenario."""
    return says(path, FORMAT)


def says(path: Path, form: str) -> bool:
    """Whether that folder says of itself that it is a bundle of that format."""
    try:
        return f'"format": "{form}"' in (path / MANIFEST).read_text(errors="replace")[:200]
    except OSError:
        return False


def write(folder: Path, bundle: Observed) -> Path:
    """The bundle in `folder`, under a name that is not there yet. Raises TwinwalkError if it cannot be written."""
    about, evidence = bundle.about, bundle.evidence
    content = asdict(about) | {"memory": evidence.memory, "cpu": of_cpu(bundle.cpu)}
    pages = [of_pages(one.pages) for one in evidence.moments]
    parts = {STOPS: json.dumps([one.stop._asdict() for one in evidence.moments], indent=1) + "\n",
             MEMORY: json.dumps(pages, indent=0) + "\n", WALKS: bundle.walks}
    return store(folder, file_name(about.observed, about.check, about.field, about.rule), FORMAT, content, parts)


def read(path: Path) -> Observed:
    """Raises UsageError, saying where and why, for what is no whole bundle of this format, as it was written."""
    content = load(path, FORMAT)
    parts = load_parts(path, content, {STOPS, MEMORY, WALKS})
    try:
        about = About(**{name: content[name] for name in About.__dataclass_fields__})
        size, cpu = content["memory"], to_cpu(content["cpu"])
        stops = [_stop(one) for one in parsed(path / STOPS, parts[STOPS])]
        pages = [to_pages(one, size) for one in parsed(path / MEMORY, parts[MEMORY])]
        if not (0 < size <= _MOST_MEMORY and size % PAGE == 0 and len(stops) == len(pages) == 2):
            raise ValueError("a value that cannot be")
    except (KeyError, TypeError, ValueError, AttributeError) as reason:
        raise UsageError(f"{path}: it is damaged, or was not written by this version: {reason}") from None
    evidence = Evidence(size, tuple(map(Moment, stops, pages)))
    return Observed(about, evidence, cpu, parts[WALKS].decode(errors="replace"))


def _stop(given: Mapping[str, Any]) -> Stop:
    stop = Stop(**given)
    numbers = [stop.vcpu, stop.rip, stop.gva, stop.asid, stop.spa, *(stop.host[name] for name in HOST)]
    if stop.kind not in _KINDS or not all(type(one) is int and 0 <= one < 1 << 64 for one in numbers):
        raise ValueError(f"no stop: {stop.kind!s:.20}")
    return stop


def of_cpu(cpu: Cpu) -> dict[str, Any]:
    """A processor in plain values."""
    return {"maxphyaddr": cpu.maxphyaddr, "asids": cpu.asids, "features": sorted(cpu.features)}


def to_cpu(given: Mapping[str, Any]) -> Cpu:
    """That processor. Raises ValueError, KeyError and TypeError for what is none."""
    features = frozenset(given["features"])
    if not (32 <= given["maxphyaddr"] <= 52 and 0 < given["asids"] < 1 << 32 and features <= set(FEATURES)):
        raise ValueError("no processor")
    return Cpu(given["maxphyaddr"], "page1g" in features, given["asids"], features)


def of_pages(pages: Mapping[int, bytes]) -> dict[str, str]:
    """Pages of memory in plain values."""
    return {f"{at:#x}": data.hex() for at, data in sorted(pages.items())}


def to_pages(given: Mapping[str, str], size: int) -> dict[int, bytes]:
    """Those pages, of a memory of so many bytes. Raises ValueError and AttributeError for what is none."""
    pages = {int(spa, 16): bytes.fromhex(data) for spa, data in given.items()}
    if not all(spa % PAGE == 0 and 0 <= spa < size and len(data) == PAGE for spa, data in pages.items()):
        raise ValueError("a page out of memory, or of another size")
    return pages
