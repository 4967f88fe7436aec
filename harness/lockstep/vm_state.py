"""VMLOAD and VMSAVE that L2 executes itself, since L1 intercepts neither (sections 15.5.2 and 15.33.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.lockstep.delivery import Leave
from harness.lockstep.quirks import VM_STATE_WANTS_NPT
from harness.model.intercepts import INTERCEPTS
from harness.model.vmcb import FIELDS, NP_ENABLE
from harness.wire.image import PAGE
from harness.wire.layout import VMLOADED

if TYPE_CHECKING:
    from harness.lockstep.l2 import L2

_VIRTUAL: Final = 1 << 1
"""Of `lbr_control`: rAX is then a gPA."""
_PARTS: Final = (("selector", 0, 16), ("attrib", 16, 12), ("limit", 32, 32))
_ADDRESSES: Final = VMLOADED.keys() - {"star", "sfmask", "sysenter_cs"}
_EDGE: Final = 1 << 47
_MASK64: Final = (1 << 64) - 1


def do(l2: L2, kind: str, spa: int) -> int:
    """rAX is a system-physical address, whatever L2's translation is. Raises UsageError unless it is that of a page of
    L1's data; and for VMSAVE on a real processor, where a hypervisor that fails lets L2 write to any memory."""
    state = l2.state
    if not state.image.in_data(spa) or spa % PAGE:
        raise UsageError(f"{kind.upper()} of L2 at sPA {spa:#x}: L1 must intercept it, or it is one of pages a to d")
    if state.vmcb["lbr_control"] & _VIRTUAL:
        raise UsageError("VMLOAD and VMSAVE of L2 that are virtual are not modelled")
    if kind == "vmsave" and state.liberties.speculates:
        raise UsageError("VMSAVE that L1 does not intercept is not tried on a real processor: should the hypervisor "
                         "below not intercept it either, L2 writes to the host's memory")
    if not state.vmcb["np_control"] & NP_ENABLE and state.quirks.has(VM_STATE_WANTS_NPT):
        raise Leave(INTERCEPTS[kind].exitcode, rule="exit.intercept", length=3)
    for name, offset in VMLOADED.items():
        if kind == "vmsave":
            l2.store(spa + offset, _read(l2, name), _MASK64)
        else:
            _write(l2, name, state.memory.words[spa + offset >> 3])
    return spa


def _read(l2: L2, name: str) -> int:
    vmcb = l2.state.vmcb
    if name in FIELDS:
        return vmcb[name]
    return sum(vmcb[f"{name}.{part}"] << shift for part, shift, _ in _PARTS)


def _write(l2: L2, name: str, value: int) -> None:
    vmcb = l2.state.vmcb
    if name not in FIELDS:
        for part, shift, bits in _PARTS:
            vmcb[f"{name}.{part}"] = value >> shift & (1 << bits) - 1
    elif name in _ADDRESSES and (value + _EDGE & _MASK64) >= 2 * _EDGE:
        raise UsageError(f"VMLOAD of L2 that loads {value:#x} to {name}, which is not canonical, is not modelled")
    else:
        vmcb[name] = value
