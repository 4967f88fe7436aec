"""What L1 posted of a VMRUN in plain values: for bundles, by the names that the manual and reports use."""

from __future__ import annotations

from typing import Any, Final

from harness.model.vmcb import CONTROL, SAVE, STATE
from harness.wire.records import KIND_NAMES, Record

_NAMES: Final = {**{name: (0, at) for name, at in CONTROL.items()}, **{name: (SAVE, at) for name, at in STATE.items()}}


def plain(record: Record, op: int) -> dict[str, Any]:
    """A record of the op of that index; numbers are strings in hex. Fields that are 0 are left out."""
    kind = KIND_NAMES.get(record.kind, f"{record.kind}")
    out: dict[str, Any] = {"kind": kind, "op": op, "first_probe": record.first_probe, "vmcb_at": hex(record.vmcb),
                           "vmcb": _vmcb(record.control, record.save), "l2": _hex(record.regs)}
    if kind == "EXIT":
        probes = range(record.first_probe, record.next_probe)
        out |= {
            "next_probe": record.next_probe, "results": {str(probe): hex(record.result(probe)) for probe in probes},
            "l1_before": _hex(record.before), "l1_after": _hex(record.after), "changes": record.diffs_found,
            "changed": {hex(address): hex(value) for address, value in record.diffs.items()},
        }
    return out


def _vmcb(control: bytes, save: bytes) -> dict[str, str]:
    found = {}
    for name, (base, at) in _NAMES.items():
        area, start = (save, at.offset - base) if base else (control, at.offset)
        if value := int.from_bytes(area[start : start + at.width], "little"):
            found[name] = hex(value)
    return found


def _hex(values: dict[str, int]) -> dict[str, str]:
    return {name: hex(value) for name, value in values.items() if value}
