"""Bundles of findings in the tables of the KVM under a foreign L1 (C5): one as a folder `NAME.twin`, to be judged again
by the model alone.

    bundle.json     what it is: signature, machine, command line, our version; a digest of each file
    kvm.json        what KVM had at the audit before and at that one: its roots, memory slots and tables; the control
                    area of the VMCB that L2 ran by, with L1's CR0, CR4 and EFER
    memory.json     the pages of L0's memory that were read: tables of KVM's, of L1's and L0's page map; of the second
                    audit those that have changed
    walks.txt       what is wrong, and the entries of all tables
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from harness.errors import UsageError
from harness.lockstep.audited import Evidence, Look, Ran
from harness.lockstep.evidence import PAGE
from harness.model.backing import Kvm, Shape, Slot, Table
from harness.model.registers import Cpu
from harness.report import stops
from harness.report.bundle import WALKS, file_name, load, load_parts, parsed, store
from harness.report.stops import MEMORY, About
from harness.wire.layout import CONTROL_BYTES

FORMAT: Final = "audited-1"
KVM: Final = "kvm.json"

_MOST: Final = 1 << 40


@dataclass(frozen=True)
class Audited:
    """A bundle: what it is about, what the finding was made of, L1's processor, and the entries as text."""

    about: About
    evidence: Evidence
    cpu: Cpu
    walks: str


def is_one(path: Path) -> bool:
    """Whether that folder is such a bundle, whole or not."""
    return stops.says(path, FORMAT)


def write(folder: Path, bundle: Audited) -> Path:
    """The bundle in `folder`, under a name that is not there yet. Raises TwinwalkError if it cannot be written."""
    about, evidence = bundle.about, bundle.evidence
    content = asdict(about) | {
        "memory": evidence.memory, "shape": evidence.shape, "of_l2": evidence.of_l2, "gpa": evidence.gpa,
        "cpu": stops.of_cpu(bundle.cpu)}
    looks = [{"kvm": _of_kvm(one.kvm), "ran": _of_ran(one.ran), "synced": one.synced} for one in evidence.looks]
    pages = [stops.of_pages(one.pages) for one in evidence.looks]
    parts = {KVM: json.dumps(looks) + "\n", MEMORY: json.dumps(pages, indent=0) + "\n", WALKS: bundle.walks}
    return store(folder, file_name(about.observed, about.check, about.field, about.rule), FORMAT, content, parts)


def read(path: Path) -> Audited:
    """Raises UsageError, saying where and why, for what is no whole bundle of this format, as it was written."""
    content = load(path, FORMAT)
    parts = load_parts(path, content, {KVM, MEMORY, WALKS})
    try:
        about = About(**{name: content[name] for name in About.__dataclass_fields__})
        size, shape, gpa = content["memory"], Shape(*content["shape"]), content["gpa"]
        if not (0 < size <= _MOST and size % PAGE == 0 and shape.levels in (4, 5) and 32 <= shape.maxphyaddr <= 52
                and 0 <= gpa < 1 << 64):
            raise ValueError("a value that cannot be")
        cpu = stops.to_cpu(content["cpu"])
        pages = [stops.to_pages(one, size) for one in parsed(path / MEMORY, parts[MEMORY])]
        looks = [Look(_to_kvm(one["kvm"]), _to_ran(one["ran"]), bool(one["synced"]), data)
                 for one, data in zip(parsed(path / KVM, parts[KVM]), pages, strict=True)]
        if len(looks) not in (1, 2):
            raise ValueError(f"{len(looks)} audits")
    except (KeyError, TypeError, ValueError, AttributeError) as reason:
        raise UsageError(f"{path}: it is damaged, or was not written by this version: {reason}") from None
    evidence = Evidence(size, shape, bool(content["of_l2"]), gpa, tuple(looks))
    return Audited(about, evidence, cpu, parts[WALKS].decode(errors="replace"))


def _of_kvm(kvm: Kvm) -> dict[str, Any]:
    return kvm._asdict() | {"tables": [[at, *table] for at, table in kvm.tables.items()],
                            "stitched": sorted(kvm.stitched)}


def _to_kvm(given: Mapping[str, Any]) -> Kvm:
    slots = tuple(Slot(_number(start), _number(end), _number(process), bool(writable))
                  for start, end, process, writable in given["slots"])
    tables = {_number(at): Table(_number(gfn), _number(level), *map(bool, flags))
              for at, gfn, level, *flags in given["tables"]}
    l1_root, l2_root, page_map = (_number(given[name]) for name in ("l1_root", "l2_root", "page_map"))
    return Kvm(l1_root, l2_root, page_map, slots, tables, frozenset(map(_number, given["stitched"])))


def _of_ran(ran: Ran | None) -> dict[str, Any] | None:
    return None if ran is None else ran._asdict() | {"control": ran.control.hex()}


def _to_ran(given: Mapping[str, Any] | None) -> Ran | None:
    if given is None:
        return None
    control = bytes.fromhex(given["control"])
    if len(control) != CONTROL_BYTES:
        raise ValueError("no control area")
    return Ran(control, *(_number(given[name]) for name in ("cr0", "cr4", "efer")))


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"no number: {value!s:.20}")
    return value
