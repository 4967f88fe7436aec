"""Changes of a generated program that take more than one op to mean anything: a device in place of memory, and what
comes to L1 from outside while L2 is to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.model import local_apic
from harness.scenario.ops import Change, EntryOp, HostOp, Op, Probe, VmcbOp
from harness.scenario.world import DEVICE, PAGES

if TYPE_CHECKING:
    from harness.scenario.draws import Draw

_NO_IF: Final = 0x8D7
_IF: Final = 0xAD7
"""L1's RFLAGS, as it has them and with IF."""
_NMI: Final = ("bit1",)
_INTR: Final = ("bit0",)
"""Of `intercept_misc1`."""


def device(draw: Draw) -> list[Op]:
    """One of a to d becomes the registers of L1's local APIC; none where a frame of 4K cannot be had for it."""
    world = draw.ground.world
    last, places = ("nested", world.spa) if DEVICE in world.spa else ("guest", world.gpa)
    pages = [page for page in PAGES if f"{last}.{page}.pte" in world.entries]
    if not pages or DEVICE not in places or world.mode.real:
        return []
    page = draw.one(pages)
    draw.devices.add(page)
    return [EntryOp(f"{last}.{page}.pte", Change(), DEVICE)]


def register(draw: Draw, page: str) -> Probe:
    """An access of a register of the local APIC that only holds a value, which RAM is good for too."""
    offset = draw.one(tuple(local_apic.WRITABLE))
    if draw.chance(0.5):
        return Probe("read", page, offset, local_apic.WIDTH)
    bits = local_apic.WRITABLE[offset]
    return Probe("write", page, offset, local_apic.WIDTH, draw.one((0, bits, bits & 0x5A00_0002)))


def outside(draw: Draw) -> list[Op]:
    """GIF, or an NMI or an interrupt that is pending at the next VMRUN, which L1 intercepts mostly. None for an L1 in a
    32-bit mode, which has them as they are."""
    if draw.ground.world.host_mode.narrow:
        return []
    dice = draw.random.random()
    if dice < 0.25:
        return [HostOp("gif", Change(value=draw.one((0, 1))))]
    held: list[Op] = [HostOp("gif", Change(value=0))]
    if dice < 0.55:
        return [VmcbOp("intercept_misc1", Change(set=_NMI)), *held, HostOp("nmi", Change(value=1))]
    ops: list[Op] = [VmcbOp("intercept_misc1", Change(set=_INTR))] if draw.chance(0.7) else []
    if draw.chance(0.5):
        ops.append(VmcbOp("v_intr", Change(value=draw.one((0, 0x100_0000)))))
    if draw.chance(0.5):
        ops.append(VmcbOp("rflags", Change(value=draw.one((0x2, 0x202)))))
    return [*ops, *held, HostOp("rflags", Change(value=draw.one((_NO_IF, _IF)))), HostOp("interrupt", Change(value=1))]
